"""Folders of images: layouts, pixel formats, bad files, the cached memory map."""

from __future__ import annotations

import os
import struct
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from PIL import Image

from ganomaly_plugin import read_images
from ganomaly_plugin.datasets import decode, imagefiles
from ganomaly_plugin.datasets.base import _load_cached, load_dataset
from ganomaly_plugin.datasets.decode import BadImage
from ganomaly_plugin.datasets.imagefiles import BadImages
from ganomaly_plugin.datasets.inspect import check
from ganomaly_plugin.datasets.splits import leaked, make_split
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.store import Store


def save(path: Path, value: object = 100, size: tuple[int, int] = (20, 20), mode: str = "L", **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = value if isinstance(value, Image.Image) else Image.new(mode, size, value)
    image.save(path, **options)
    return path


def authors(base: Path) -> Path:
    for k in range(4):
        save(base / f"train/0.normal/{k}.png", 10 + k)
    for k in range(2):
        save(base / f"test/0.normal/{k}.png", 20 + k)
    for k in range(3):
        save(base / f"test/1.abnormal/{k}.png", 30 + k)
    return base


def mvtec(base: Path) -> Path:
    for k in range(4):
        save(base / f"train/good/{k}.png", (10 + k, 0, 0), mode="RGB")
    save(base / "test/good/0.png", (20, 0, 0), mode="RGB")
    for k, kind in enumerate(("crack", "dirt")):
        save(base / f"test/{kind}/000.png", (30 + k, 0, 0), mode="RGB")
        mask = Image.new("L", (20, 20))
        mask.paste(255, (0, 0, 10, 20))  # the left half
        save(base / f"ground_truth/{kind}/000_mask.png", mask)
    return base


def load(base: Path, tmp_path: Path, **options: object):
    return load_dataset(f"folder:{base}", root=tmp_path, **{"image_size": 16, **options})


def test_the_authors_layout(tmp_path: Path) -> None:
    dataset = load(authors(tmp_path / "f"), tmp_path)
    assert dataset.images.shape == (9, 1, 16, 16)
    assert dataset.images[:, 0, 8, 8].tolist() == [10, 11, 12, 13, 20, 21, 30, 31, 32]
    assert dataset.labels.tolist() == [0] * 6 + [1] * 3
    assert dataset.is_test.tolist() == [False] * 4 + [True] * 5
    assert dataset.classes == ("good", "anomaly")
    assert dataset.anomaly_classes == ("anomaly",)
    assert dataset.masks is None


def test_mvtecs_layout_with_masks(tmp_path: Path) -> None:
    dataset = load(mvtec(tmp_path / "f"), tmp_path)
    assert dataset.images.shape == (7, 3, 16, 16)
    assert dataset.source["defects"] == {"crack": 1, "dirt": 1}
    assert dataset.masks.shape == (7, 16, 16)
    assert dataset.masks.dtype == bool
    marked = dataset.masks.sum((1, 2))
    assert marked.tolist() == [128 if label else 0 for label in dataset.labels]
    assert dataset.masks[dataset.labels == 1][0][:, :8].all()


def test_a_mask_marks_with_every_value_but_0_and_by_its_own_name_first(tmp_path: Path) -> None:
    base = mvtec(tmp_path / "f")
    faint = Image.new("L", (20, 20))
    faint.paste(1, (0, 0, 20, 5))  # the upper quarter
    save(base / "ground_truth/crack/000_mask.png", faint)
    save(base / "ground_truth/crack/000.png", 255)
    dataset = load(base, tmp_path)
    mask = dataset.masks[dataset.labels == 1][0]
    assert mask[:4].all() and not mask[4:].any()
    save(base / "ground_truth/crack/000_mask.png", 255)
    _load_cached.cache_clear()
    assert load(base, tmp_path).masks[dataset.labels == 1][0].all()  # a mask that changed is read again


def test_defects_in_both_parts_are_counted_together_and_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    base = mvtec(tmp_path / "f")
    save(base / "train/crack/0.png", (40, 0, 0), mode="RGB")
    for part in ("train", "test"):
        save(base / part / ".ipynb_checkpoints/0.png", (50, 0, 0), mode="RGB")
    dataset = load(base, tmp_path, defects="each")
    assert dataset.source["defects"] == {"crack": 2, "dirt": 1} and dataset.classes == ("good", "crack", "dirt")


def test_a_class_folder_of_one_fault_is_one_problem(tmp_path: Path) -> None:
    base = authors(tmp_path / "f")
    (base / "test/2.odd").mkdir()
    (base / "test/2.odd/gone.png").symlink_to(base / "nowhere.png")
    with pytest.raises(BadImages) as caught:
        load(base, tmp_path)
    assert [problem.path.name for problem in caught.value.problems] == ["gone.png"]


def test_the_cache_holds_what_is_used_and_others_may_read_it(tmp_path: Path) -> None:
    base = authors(tmp_path / "f")
    (base / "train/0.normal/0.png").write_text("not an image")
    assert len(load(base, tmp_path, on_bad_image="skip").images) == 8
    (folder,) = [path for path in tmp_path.rglob("images-*") if path.is_dir()]
    assert (folder / "images.u8").stat().st_size == 8 * 16 * 16
    assert folder.stat().st_mode & 0o777 == 0o755


def test_each_defect_as_its_own_class(tmp_path: Path) -> None:
    dataset = load(mvtec(tmp_path / "f"), tmp_path, defects="each")
    assert dataset.classes == ("good", "crack", "dirt")
    assert dataset.anomaly_classes == ("crack", "dirt")
    assert sorted(dataset.labels.tolist()) == [0] * 5 + [1, 2]


def test_a_plain_pair_has_no_official_split(tmp_path: Path) -> None:
    for k in range(5):
        save(tmp_path / f"f/good/{k}.png", k)
    save(tmp_path / "f/bad/0.png", 200)
    dataset = load(tmp_path / "f", tmp_path)
    assert dataset.is_test is None
    assert dataset.labels.tolist() == [0] * 5 + [1]


def test_a_folder_below_the_data_root_is_found(tmp_path: Path) -> None:
    authors(tmp_path / "mine")
    assert len(load_dataset("folder:mine", root=tmp_path).images) == 9


@pytest.mark.parametrize(
    ("made", "said"),
    [([], "There is no folder"), (["x"], "none of the known layouts"), (["train/good"], "no test folder")],
)
def test_an_unknown_layout_is_explained(tmp_path: Path, made: list[str], said: str) -> None:
    for name in made:
        (tmp_path / "f" / name).mkdir(parents=True)
    with pytest.raises(InvalidInput, match=said):
        load(tmp_path / "f", tmp_path)


@pytest.mark.parametrize(("layout", "other"), [(authors, "test/good"), (authors, "train/good"), (mvtec, "test/0.normal")])
def test_normal_images_of_two_layouts_are_refused(tmp_path: Path, layout: Callable[[Path], Path], other: str) -> None:
    base = layout(tmp_path / "f")
    save(base / other / "0.png")
    with pytest.raises(InvalidInput, match=rf"has both train/(0\.normal|good) and {other}, of two layouts\. Rename one"):
        load(base, tmp_path)


def test_a_home_that_is_not_there_is_said_in_one_line(bench) -> None:
    for command in ("check", "ls"):
        code, out, err = bench("data", command, "folder:~nouser/x")
        assert code != 0 or command == "ls"
        assert "~nouser/x" in out + err and "Write the folder out." in out + err and (out + err).count("\n") == 1


def test_a_plain_pair_beside_a_train_folder_is_a_plain_pair(tmp_path: Path) -> None:
    for k in range(10):
        save(tmp_path / f"f/good/{k}.png", k)
        save(tmp_path / f"f/bad/{k}.png", 200 + k)
    save(tmp_path / "f/train/notes/0.png")
    dataset = load(tmp_path / "f", tmp_path)
    assert dataset.is_test is None and len(dataset.images) == 20
    assert make_split(dataset, "one-anomalous/strict-v1", "anomaly", 0).is_anomaly.sum() == 2


@pytest.mark.parametrize("options", [{"fit": "stretch"}, {"channels": 2}, {"on_bad_image": "ignore"}, {"defects": "all"}])
def test_options_are_checked(tmp_path: Path, options: dict[str, object]) -> None:
    authors(tmp_path / "f")
    with pytest.raises(InvalidInput, match=next(iter(options))):
        load(tmp_path / "f", tmp_path, **options)


def centre(path: Path, channels: int = 3) -> list[int]:
    pixels, _ = decode.decode(path, size=8, channels=channels, fit="crop")
    assert pixels.dtype == np.uint8
    assert pixels.shape == (channels, 8, 8)
    return pixels[:, 4, 4].tolist()


def test_pixel_formats(tmp_path: Path) -> None:
    assert centre(save(tmp_path / "grey.png", 77), 1) == [77]
    assert centre(save(tmp_path / "bit.png", 1, mode="1"), 1) == [255]
    assert centre(save(tmp_path / "grey16.png", 0x8080, mode="I;16"), 1) == [0x80]
    assert centre(save(tmp_path / "grey16.tif", 65535, mode="I;16"), 1) == [255]
    assert centre(save(tmp_path / "float.tif", 0.5, mode="F"), 1) == [128]
    assert centre(save(tmp_path / "palette.png", Image.new("RGB", (9, 9), (10, 20, 30)).quantize(4))) == [10, 20, 30]
    assert centre(save(tmp_path / "cmyk.tif", (255, 0, 0, 0), mode="CMYK")) == [0, 255, 255]
    assert centre(save(tmp_path / "grey_to_rgb.png", 50)) == [50, 50, 50]
    half = Image.new("RGBA", (9, 9), (200, 100, 0, 128))
    assert centre(save(tmp_path / "alpha.png", half)) == [100, 50, 0]  # on black
    assert centre(save(tmp_path / "grey_alpha.png", (200, 0), mode="LA"), 1) == [0]
    clear = Image.new("P", (9, 9), 3)
    assert centre(save(tmp_path / "clear.gif", clear, transparency=3)) == [0, 0, 0]


def test_a_float_image_on_an_unknown_scale_is_bad(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match=r"span \[300, 300\]"):
        centre(save(tmp_path / "f.tif", 300.0, mode="F"))


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("L", (16, 16))
    image.paste(255, (0, 0, 16, 8))  # the top half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: what is on top belongs to the right
    pixels, _ = decode.decode(save(tmp_path / "e.png", image, exif=exif), size=16, channels=1, fit="crop")
    assert pixels[0, :, 12].min() == 255
    assert pixels[0, :, 4].max() == 0


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_tiffs_are_turned_as_other_files_are(tmp_path: Path, orientation: int, compression: str | None) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 2, (12, 20), dtype=np.uint8) * 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    png = save(tmp_path / "e.png", picture, exif=exif)
    tiff = save(tmp_path / "e.tif", picture, exif=exif, compression=compression)
    np.testing.assert_array_equal(decode.read_upright(tiff), decode.read_upright(png))
    size = decode.read_upright(png).size
    masks = [decode.decode_mask(path, size, size=8, fit="pad")[0] for path in (tiff, png)]
    np.testing.assert_array_equal(*masks)


@pytest.mark.parametrize("orientation", [1, 6])
def test_tiffs_whose_white_is_zero_are_no_negatives(tmp_path: Path, orientation: int) -> None:
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    tags = {262: 0, 274: orientation}
    bits8 = save(tmp_path / "8.tif", Image.fromarray(values), tiffinfo=tags)  # Pillow writes them inverted
    bits16 = save(tmp_path / "16.tif", Image.fromarray(65535 - values.astype(np.uint16) * 257), tiffinfo=tags)
    seen = np.asarray(decode.read_upright(bits8))
    np.testing.assert_array_equal(seen, values if orientation == 1 else np.rot90(values, -1))
    np.testing.assert_array_equal(decode.read_upright(bits16), seen)
    masks = [decode.decode_mask(path, seen.shape[::-1], size=4, fit="pad")[0] for path in (bits8, bits16)]
    np.testing.assert_array_equal(*masks)


@pytest.mark.parametrize("size", [(40, 40), (100, 37), (33, 64), (17, 90)])
def test_crop_is_torchvisions_resize_and_centre_crop(tmp_path: Path, size: tuple[int, int]) -> None:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path = save(tmp_path / "n.png", Image.fromarray(noise))
    authors_way = Compose([Resize(32, InterpolationMode.BILINEAR), CenterCrop(32)])
    want = np.asarray(authors_way(Image.fromarray(noise))).transpose(2, 0, 1).astype(int)
    got, _ = decode.decode(path, size=32, channels=3, fit="crop")
    assert np.abs(got - want).max() <= 1


def test_pad_keeps_the_ratio(tmp_path: Path) -> None:
    pixels, original = decode.decode(save(tmp_path / "w.png", 255, (40, 20)), size=16, channels=1, fit="pad")
    assert original == (40, 20)
    assert (pixels[0, 4:12] == 255).all()
    assert pixels[0, :4].max() == pixels[0, 12:].max() == 0


def test_a_sliver_is_cropped_before_it_is_resized() -> None:
    (width, height), box = decode.placement(1, 1_000_000, 64, "crop")
    assert (width, height) == (64, 64)
    assert box[3] - box[1] == pytest.approx(1)


def test_channels_follow_the_images(tmp_path: Path) -> None:
    base = authors(tmp_path / "f")
    assert load(base, tmp_path).images.shape[1] == 1
    assert load(base, tmp_path, channels=3).images.shape[1] == 3
    save(base / "train/0.normal/colour.jpg", (9, 99, 9), mode="RGB")
    _load_cached.cache_clear()
    assert load(base, tmp_path).images.shape[1] == 3


def bomb(path: Path) -> None:
    """A PNG of a few bytes that claims 60,000×60,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


def broken_folder(base: Path) -> dict[str, str]:
    """A folder with one of each fault; name → what the report says."""
    authors(base)
    normal = base / "train/0.normal"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8))
    whole = save(normal / "truncated.png", noise).read_bytes()
    (normal / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (normal / "text.jpg").write_text("not an image")
    (normal / "nothing.bmp").write_bytes(b"")
    bomb(normal / "bomb.png")
    (normal / "round").symlink_to(normal)
    (normal / "gone.png").symlink_to(base / "nowhere.png")
    (normal / "itself.png").symlink_to(normal / "itself.png")
    os.mkfifo(normal / "pipe.png")
    (base / "test/2.empty").mkdir()
    return {
        "truncated.png": "damaged",
        "text.jpg": "not an image",
        "nothing.bmp": "not an image",
        "bomb.png": "limit of 89,478,485 pixels",
        "round": "symlink loop",
        "gone.png": "link to a file that is not there",
        "itself.png": "symlink loop",
        "pipe.png": "not a regular file",
        "2.empty": "empty class folder",
    }


def test_every_fault_is_in_one_report(tmp_path: Path) -> None:
    faults = broken_folder(tmp_path / "f")
    with pytest.raises(BadImages, match=r"9 of \d+ files and folders are not usable.*and 4 more.*on_bad_image=skip") as caught:
        load(tmp_path / "f", tmp_path)
    assert "\n" not in str(caught.value)
    assert {p.path.name for p in caught.value.problems} == set(faults)
    report = check(f"folder:{tmp_path / 'f'}", tmp_path)
    assert not report.ok
    told = {problem.path.name: problem.reason for problem in report.problems}
    assert set(told) == set(faults)
    for name, said in faults.items():
        assert said in told[name]


def test_faults_can_be_skipped_and_are_counted(tmp_path: Path) -> None:
    broken_folder(tmp_path / "f")
    dataset = load(tmp_path / "f", tmp_path, on_bad_image="skip")
    assert len(dataset.images) == len(dataset.labels) == 9
    assert sorted(dataset.images[:, 0, 5, 5].tolist()) == [10, 11, 12, 13, 20, 21, 30, 31, 32]
    assert dataset.source["skipped"] == 9
    assert len(dataset.source["skipped_first"]) == 5


def test_a_defect_without_a_usable_image_is_skipped_as_a_class(tmp_path: Path) -> None:
    base = mvtec(tmp_path / "f")
    (base / "test/bent").mkdir()
    (base / "test/dirt/000.png").write_bytes(b"nothing")
    with pytest.raises(BadImages, match=r"2 of 8 files .*empty class folder"):
        load(base, tmp_path, defects="each")
    dataset = load(base, tmp_path, defects="each", on_bad_image="skip")
    assert dataset.classes == ("good", "crack") and dataset.anomaly_classes == ("crack",)
    assert dataset.labels.tolist() == [0, 0, 0, 0, 1, 0] or sorted(dataset.labels.tolist()) == [0, 0, 0, 0, 0, 1]
    assert dataset.source["skipped"] == 2


def test_a_class_with_a_comma_stands_in_quotes(tmp_path: Path, bench) -> None:
    (mvtec(tmp_path / "f") / "test/dirt").rename(tmp_path / "f/test/hole, big")
    (tmp_path / "f/ground_truth/dirt").rename(tmp_path / "f/ground_truth/hole, big")
    words = ["--models", "pca", "--datasets", f"folder:{tmp_path / 'f'}[defects=each]", "--image-size", 16, "--dry-run"]
    assert "1 jobs" in bench("run", *words, "--classes", '"hole, big"')[1]
    (tmp_path / "c.yaml").write_text("classes: ['hole, big', crack]\n")
    assert "2 jobs" in bench("run", *words, "--config", tmp_path / "c.yaml")[1]


def test_files_are_read_as_the_folder_is(tmp_path: Path) -> None:
    dataset = load(mvtec(tmp_path / "f"), tmp_path)
    files = [*sorted((tmp_path / "f/train/good").glob("*.png")), tmp_path / "f/test/crack/000.png"]
    found = read_images(files, (3, 16, 16))
    assert found.dtype == np.uint8 and all((image == dataset.images).all((1, 2, 3)).any() for image in found)
    np.testing.assert_array_equal(read_images(str(files[0]), (3, 16, 16)), found[:1])
    (tmp_path / "bad.png").write_bytes(b"nothing")
    for paths, shape, said in (
        ([*files, tmp_path / "bad.png"], (3, 16, 16), r"bad\.png: not an image"),
        ([], (3, 16, 16), "no file to read"),
        ([tmp_path / "no.png"], (3, 16, 16), r"no\.png: no such file"),
        (tmp_path, (3, 16, 16), "is a directory"),
        (None, (3, 16, 16), "paths must be"),
        *((files, shape, "shape must be") for shape in ((0, 16, 16), (1, 16, 32), (2, 16, 16), (16, 16), 16, (1, 16.0, 16))),
        (files, (3, 0, 0), "image_size must be at least 1"),
    ):
        with pytest.raises(InvalidInput, match=said):
            read_images(paths, shape)


def test_masks_of_another_size_and_missing_masks_are_faults(tmp_path: Path) -> None:
    base = mvtec(tmp_path / "f")
    save(base / "ground_truth/crack/000_mask.png", 255, (20, 19))
    (base / "ground_truth/dirt/000_mask.png").unlink()
    with pytest.raises(BadImages) as caught:
        load(base, tmp_path)
    assert "its mask 000_mask.png is 20×19, the image 20×20" in str(caught.value)
    assert "no mask ground_truth/dirt/000_mask.png" in str(caught.value)


def test_endings_of_masks_may_be_in_capitals(tmp_path: Path) -> None:
    base = mvtec(tmp_path / "f")
    (base / "ground_truth/crack/000_mask.png").rename(base / "ground_truth/crack/000.BMP")
    (base / "ground_truth/dirt/000_mask.png").rename(base / "ground_truth/dirt/000_mask.PNG")
    assert load(base, tmp_path).masks.any((1, 2)).sum() == 2


def test_pixel_metrics_need_a_mask_of_every_tested_anomaly(tmp_path: Path, bench) -> None:
    base, out = mvtec(tmp_path / "f"), tmp_path / "out"
    for k in range(5):
        save(base / f"train/crack/{k}.png", (60 + k, 0, 0), mode="RGB")
    words = ["run", "--models", "pca,mean_intensity", "--datasets", f"folder:{base}", "--image-size", 16, "--out", out]
    code, _, err = bench(*words, "--protocols", "one-anomalous/paper-v1,one-anomalous/strict-v1")
    assert code == 0, err
    for record in Store(out).records():
        maps, some = record.job.detector == "pca", record.job.protocol.endswith("paper-v1")
        assert ({"pixel_auroc", "aupro"} <= set(record.metrics)) == (maps and not some)
        if maps and some:
            why = "5 of 7 tested anomalies have no mask. Give each of them one, or leave them out."
            assert record.notes["pixel_auroc"] == record.notes["aupro"] == why
    assert load(base, tmp_path).source["without_mask"] == 5
    assert "  without_mask: 5" in bench("data", "ls", f"folder:{base}")[1]


def test_a_tested_defect_without_masks_stays_in(tmp_path: Path, bench) -> None:
    base, out = mvtec(tmp_path / "f"), tmp_path / "out"
    (base / "ground_truth/dirt/000_mask.png").unlink()
    (base / "ground_truth/dirt").rmdir()
    dataset = load(base, tmp_path)
    assert dataset.has_mask.tolist() == [False] * 4 + [True, False, False] and dataset.source["without_mask"] == 1
    code, _, err = bench("run", "--models", "pca", "--datasets", f"folder:{base}", "--image-size", 16, "--out", out)
    (record,) = Store(out).records()
    assert code == 0 and record.counts["test_anomalous"] == 2 and "auroc" in record.metrics, err
    assert "pixel_auroc" not in record.metrics and "1 of 2 tested anomalies have no mask" in record.notes["pixel_auroc"]


def test_a_plain_pair_may_have_masks(tmp_path: Path, bench) -> None:
    for k in range(3):
        save(tmp_path / f"f/good/{k}.png", k)
        save(tmp_path / f"f/bad/{k}.png", 200)
    (tmp_path / "f/ground_truth/notes").mkdir(parents=True)  # which is no mask
    assert load(tmp_path / "f", tmp_path).masks is None
    assert "with masks" not in bench("data", "ls", f"folder:{tmp_path / 'f'}")[1]
    for k in range(3):
        save(tmp_path / f"f/ground_truth/bad/{k}_mask.png", 255)
    _load_cached.cache_clear()
    dataset = load(tmp_path / "f", tmp_path)
    assert dataset.masks.all((1, 2)).tolist() == [False] * 3 + [True] * 3 and "without_mask" not in dataset.source
    assert "with masks" in bench("data", "ls", f"folder:{tmp_path / 'f'}")[1]


def test_a_mask_that_marks_nothing_is_a_fault(tmp_path: Path) -> None:
    base = mvtec(tmp_path / "f")
    save(base / "ground_truth/crack/000_mask.png", Image.new("RGBA", (20, 20), (0, 0, 0, 255)))
    with pytest.raises(BadImages, match=r"its mask 000_mask\.png marks nothing"):
        load(base, tmp_path)


def test_a_mask_that_vanishes_when_resized_is_counted(tmp_path: Path) -> None:
    base = mvtec(tmp_path / "f")
    tiny = Image.new("L", (20, 20))
    tiny.putpixel((0, 0), 255)
    save(base / "ground_truth/crack/000_mask.png", tiny)
    assert load(base, tmp_path, image_size=2).source["masks_lost_to_resizing"] == 1


def test_unreadable_files_and_folders_are_faults() -> None:
    """Root reads anything, so the reading is done as another user where the tests run as root."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o777)
        base = authors(root / "f")
        (base / "train/0.normal/0.png").chmod(0)
        (base / "train/0.normal/locked").mkdir(mode=0)
        was = os.geteuid()
        if was == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(BadImages) as caught:
                load(base, root)
        finally:
            os.seteuid(was)
        assert {p.path.name: p.reason for p in caught.value.problems} == {
            "0.png": "no permission to read it",
            "locked": "no permission to read it",
        }


def test_one_normal_image_is_too_few(tmp_path: Path) -> None:
    base = tmp_path / "f"
    save(base / "train/good/0.png")
    save(base / "test/good/0.png", 3)
    save(base / "test/bad/0.png", 4)
    with pytest.raises(InvalidInput, match="1 normal image to train on"):
        load(base, tmp_path)
    assert "a folder of one image" in "\n".join(check(f"folder:{base}", tmp_path).lines())


def test_nothing_usable(tmp_path: Path) -> None:
    for part in ("train/good", "test/good", "test/bad"):
        (tmp_path / "f" / part).mkdir(parents=True)
    with pytest.raises(InvalidInput, match=r"no usable image.*empty class folder"):
        load(tmp_path / "f", tmp_path, on_bad_image="skip")


def test_images_are_decoded_once_and_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = authors(tmp_path / "f")
    first = load(base, tmp_path)
    assert isinstance(first.images, np.memmap)
    assert not first.images.flags.writeable
    digest = first.digest
    _load_cached.cache_clear()
    monkeypatch.setattr(imagefiles, "decode", None)  # a second decoding would fail
    assert load(base, tmp_path).digest == digest
    monkeypatch.undo()
    _load_cached.cache_clear()
    save(base / "train/0.normal/0.png", 250)  # a changed file is seen
    assert load(base, tmp_path).digest != digest
    assert sum(p.is_dir() for p in (tmp_path / ".cache").iterdir()) == 2


def test_images_that_nobody_wanted_for_a_month_leave_the_cache(tmp_path: Path) -> None:
    base, cache, month = authors(tmp_path / "f"), tmp_path / ".cache", 31 * 86_400

    def folders() -> set[str]:
        return {path.name for path in cache.iterdir() if path.is_dir()}

    def age() -> None:
        _load_cached.cache_clear()
        for name in folders():
            os.utime(cache / name, (time.time() - month,) * 2)

    first = load(base, tmp_path)
    other = load(base, tmp_path, image_size=8)
    (cache / "building-killed").mkdir()
    before = folders()
    age()
    load(base, tmp_path)  # is in use, and needs nothing new
    assert folders() == before
    _load_cached.cache_clear()
    save(base / "train/0.normal/0.png", 250)
    changed = load(base, tmp_path)
    assert len(folders()) == 2 and len(folders() & before) == 1  # the one in use, and the new one
    assert first.images[0, 0, 8, 8] == 10 and other.images[0, 0, 4, 4] == 10  # who has mapped them goes on
    age()
    assert load(base, tmp_path).digest == changed.digest
    assert load(base, tmp_path, image_size=8).images[0, 0, 4, 4] == 250 and len(folders()) == 2


def test_a_damaged_cache_is_made_again(tmp_path: Path) -> None:
    base = authors(tmp_path / "f")
    digest = load(base, tmp_path).digest
    (cached,) = (p for p in (tmp_path / ".cache").iterdir() if p.is_dir())
    (cached / "images.u8").write_bytes(b"short")
    _load_cached.cache_clear()
    assert load(base, tmp_path).digest == digest


def test_all_that_a_cache_notes_beside_pixels_is_looked_at(tmp_path: Path) -> None:
    base = authors(tmp_path / "f")
    (base / "train/0.normal/0.png").write_text("not an image")
    digest = load(base, tmp_path, on_bad_image="skip").digest
    (cached,) = (p for p in (tmp_path / ".cache").iterdir() if p.is_dir())
    for path in cached.iterdir():
        if path.name != "images.u8":
            for content in (bytes(path.stat().st_size), b"7", b"{}"):
                path.write_bytes(content)
                _load_cached.cache_clear()
                assert load(base, tmp_path, on_bad_image="skip").digest == digest


def test_files_that_were_bad_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = mvtec(tmp_path / "f")
    (base / "train/good/9.png").write_bytes(b"nothing")  # is bad for good
    failing = {"train/good/0.png": PermissionError(13, "x"), "ground_truth/dirt/000_mask.png": MemoryError()}
    opened, decoded = Image.open, []

    def open_image(file: BinaryIO) -> Image.Image:
        path = Path(file.name)
        decoded.append(path.name)
        if error := failing.get(path.relative_to(base).as_posix()):
            raise error
        return opened(file)

    def again(**options: object):
        _load_cached.cache_clear()
        decoded.clear()
        return load(base, tmp_path, **options)

    monkeypatch.setattr(decode.Image, "open", open_image)
    with pytest.raises(BadImages, match=r"3 of 8.*9\.png \(not an image.*dirt/000\.png \(its mask 000_mask\.png is too large"):
        load(base, tmp_path)
    with pytest.raises(BadImages, match=r"3 of 8.*0\.png \(no permission to read it\)"):
        again()
    mapped = again(on_bad_image="skip")
    assert len(mapped.images) == 5 and sorted(set(decoded)) == ["0.png", "000.png", "000_mask.png", "9.png"]
    failing["train/good/0.png"] = OSError(5, "Input/output error")
    with pytest.raises(BadImages, match=r"0\.png \(not readable: Input/output error\)"):
        again()
    failing.clear()
    dataset = again(on_bad_image="skip")
    assert len(dataset.images) == 7 and dataset.masks.any((1, 2)).sum() == 2 and dataset.source["skipped"] == 1
    assert len(mapped.images) == 5 and mapped.images[0, 0, 8, 8] == 11  # who has mapped what was there goes on
    again(on_bad_image="skip")
    assert decoded == ["9.png"] and sum(path.is_dir() for path in (tmp_path / ".cache").iterdir()) == 1


def test_progress_is_told_when_it_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 10_000, 60))
    monkeypatch.setattr(imagefiles.time, "monotonic", lambda: next(clock))
    load(authors(tmp_path / "f"), tmp_path)
    assert "decoded 9 of 9 images" in capsys.readouterr().err


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    base = authors(tmp_path / "f")
    (base / "train/0.normal/Thumbs.db").write_text("x")
    (base / "train/0.normal/._0.png").write_text("x")
    save(base / "train/0.normal/deeper/9.PNG")
    save(base / "test/9.PNG")  # of which nothing says whether it is normal
    dataset = load(base, tmp_path)
    assert len(dataset.images) == 10 and dataset.source["other_files"] == {".db": 1, "beside the folders of test": 1}
    assert "  not read: 1 .db, 1 beside the folders of test" in check(f"folder:{base}", tmp_path).lines()


def test_a_folder_that_changed_is_neither_taken_for_done_nor_mixed(tmp_path: Path, bench) -> None:
    base, out = authors(tmp_path / "f"), tmp_path / "out"
    words = ["run", "--models", "mean_intensity", "--datasets", f"folder:{base}", "--out", out]
    assert bench(*words)[0] == 0 and bench(*words)[0] == 0
    save(base / "train/0.normal/9.png", 99)
    _load_cached.cache_clear()  # which another process would not have
    for more in (["--seeds", "0"], ["--seeds", "0-1"], ["--dry-run"]):
        code, stdout, err = bench(*words, *more)
        assert code == 2 and stdout == "" and err.count("\n") == 1
        assert "has changed: 1 of 1 finished jobs are of other images" in err and "delete their records, such as" in err
    other = [*words[:2], "pca", *words[3:]]  # before it is trained
    assert (
        "has changed: 1 of 1 finished jobs are of other images" in bench(*other)[2]
        and len(list((out / "records").iterdir())) == 1
    )
    for again in ([*words, "--seeds", "1"], ["tables", out], ["report", out]):
        code, stdout, err = bench(*again)
        assert code == 2 and stdout == "" and "were made from different images: the data changed in between" in err
    (old,) = (out / "records").glob("*-s0-*.json")
    old.unlink()
    assert bench(*words, "--seeds", "0-1")[0] == 0 and bench("tables", out)[0] == 0


def test_copies_of_training_images_among_the_tested_are_said(tmp_path: Path, bench) -> None:
    base, out = authors(tmp_path / "f"), tmp_path / "out"
    words = ["run", "--models", "mean_intensity,pca", "--datasets", f"folder:{base},digits", "--classes", "anomaly,0"]
    words += ["--image-size", "16", "--seeds", "0-1", "--out"]
    assert "training images" not in bench(*words, out)[2]
    dataset = load(base, tmp_path)
    assert dataset.first_equal.tolist() == list(range(9))
    save(base / "test/0.normal/copy.bmp", 11)  # of a training image; other bytes, equal pixels
    save(base / "test/1.abnormal/copy.png", 13)
    save(base / "test/1.abnormal/twice.png", 30)  # of a test image, which is no leak
    _load_cached.cache_clear()
    dataset = load(base, tmp_path)
    for protocol in ("one-anomalous/strict-v1", "one-anomalous/paper-v1"):
        counts = []
        for seed in range(4):
            split = make_split(dataset, protocol, "anomaly", seed)
            trained = {dataset.images[k].tobytes() for k in split.train}
            counts.append(leaked(dataset, split))
            assert counts[-1] == sum(dataset.images[k].tobytes() in trained for k in split.test)
        assert max(counts) > 0
    remark = (
        f"folder:{base} 16×16, one-anomalous/strict-v1: up to 2 of 8 test images (25.0%) are training images too; "
        f"bench data check folder:{base} shows equal images\n"
    )
    code, _, err = bench(*words, tmp_path / "copies")
    assert code == 0 and err.count(remark) == 1 and err.count("training images") == 1
    code, stdout, err = bench("tables", tmp_path / "copies")
    assert code == 0 and err == remark and remark not in stdout
    assert bench("report", tmp_path / "copies")[0] == 0
    assert (tmp_path / "copies/report.html").read_text().count("8 test images (25.0%) are training images too") == 1
    notes = [record.notes for record in Store(tmp_path / "copies").records() if record.job.dataset == "digits"]
    assert [each["leaked"] for each in notes] == [0] * 4
    assert "  in both train and test (leakage): 2 test images" in check(f"folder:{base}", tmp_path).lines()


def test_a_link_to_a_folder_above_brings_in_no_anomalies(tmp_path: Path) -> None:
    base = tmp_path / "f"
    for k in range(4):
        save(base / f"good/{k}.png", k)
        save(base / f"bad/{k}.png", 90 + k)
    (base / "good/up").symlink_to("..")
    with pytest.raises(BadImages, match=r"good/up \(a symlink loop\)"):
        load(base, tmp_path)
    assert load(base, tmp_path, on_bad_image="skip").labels.tolist() == [0] * 4 + [1] * 4


def test_folder_names_that_are_no_text_are_refused(tmp_path: Path, bench) -> None:
    base = authors(tmp_path / "f")
    (base / "test/1.abnormal").rename(os.fsdecode(os.fsencode(base / "test") + b"/l\xf6cher"))
    code, _, err = bench("run", "--models", "mean_intensity", "--datasets", f"folder:{base}", "--out", tmp_path / "out")
    assert code == 2 and "The folder name l?cher is no text in UTF-8" in err and not (tmp_path / "out").exists()


def test_a_bad_file_whose_name_is_no_text_is_skipped(tmp_path: Path, bench) -> None:
    base, out = mvtec(tmp_path / "f"), tmp_path / "out"
    broken = os.fsdecode(b"M\xfcller")
    for name in (f"train/good/{broken}.png", f"train/good/notes.{broken}", f"test/crack/{broken}.png"):
        (base / name).write_text("no image")
    words = ("run", "--models", "mean_intensity", "--datasets", f"folder:{base}", "--on-bad-image")
    code, _, err = bench(*words, "skip", "--out", out)
    assert code == 0, err
    (record,) = Store(out).records()
    assert record.notes["source"]["skipped"] == 2 and record.notes["source"]["other_files"] == {".m\\udcfcller": 1}
    told = "\n".join(record.notes["source"]["skipped_first"])
    assert "train/good/M\\udcfcller.png: not an image" in told and "no mask ground_truth/crack/M\\udcfcller_mask.png" in told
    assert "train/good/M\\udcfcller.png (not an image" in bench(*words, "fail", "--out", tmp_path / "no")[2]
    assert "train/good/M\\udcfcller.png: not an image" in bench("data", "check", f"folder:{base}")[1]


def test_names_of_bad_files_are_printed_without_what_steers_terminals(tmp_path: Path, bench) -> None:
    base = authors(tmp_path / "f")
    (base / "train/0.normal/a\x1b[31m\nb.png").write_text("x")
    code, out, _ = bench("data", "check", f"folder:{base}")
    assert code == 1 and "a?[31m?b.png: not an image" in out
    code, out, _ = bench("data", "ls", f"folder:{base}")
    assert "not usable. " in out and "\x1b" not in out


@pytest.mark.parametrize("lost", [[], [0], [255, 256, 599], range(0, 600, 2), range(600)])
def test_what_is_kept_moves_to_the_front_in_order(lost: list[int]) -> None:
    rows = np.arange(600)
    kept = np.setdiff1d(rows, lost)
    imagefiles._compact(rows, kept)
    np.testing.assert_array_equal(rows[: len(kept)], kept)
