"""Loaders of published sets, on small files made in their formats; the real ones with `-m real_data`."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import odd_options
import pandas as pd
import pytest
from PIL import Image

from ganomaly_plugin.datasets import anomalib_sets, cache, elpv, torchvision_sets, torchvision_table
from ganomaly_plugin.datasets.base import ImageDataset, _load_cached, check_options, load_dataset
from ganomaly_plugin.datasets.imagefiles import load_listing
from ganomaly_plugin.datasets.splits import make_split
from ganomaly_plugin.errors import CorruptFile, InvalidInput

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Made files have no published checksum, and nothing is downloaded."""
    _load_cached.cache_clear()

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", refuse)
    if not request.node.get_closest_marker("real_data"):
        monkeypatch.setattr(torchvision_table, "PUBLISHED_MD5", {})


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    path.write_bytes(head + array.astype(np.uint8).tobytes())


def write_mnist(folder: Path, train: str = "train", test: str = "t10k", first: int = 0, side: int = 28) -> np.ndarray:
    images = RNG.integers(0, 256, (9, side, side), dtype=np.uint8)
    for part, rows in ((train, slice(0, 6)), (test, slice(6, 9))):
        write_idx(folder / f"raw/{part}-images-idx3-ubyte", images[rows])
        write_idx(folder / f"raw/{part}-labels-idx1-ubyte", np.arange(9)[rows] + first)
    return images


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")])
def test_idx_sets(tmp_path: Path, name: str, folder: str) -> None:
    images = write_mnist(tmp_path / folder)
    dataset = load_dataset(name, root=tmp_path, image_size=28)
    assert np.array_equal(dataset.images[:, 0], images)
    assert dataset.labels.tolist() == list(range(9))
    assert dataset.is_test.tolist() == [False] * 6 + [True] * 3
    assert len(dataset.classes) == 10
    assert set(dataset.source["sha256"]) == set(torchvision_table.SETS[name].layouts[0].files)
    assert load_dataset(name, root=tmp_path).images.shape == (9, 1, 32, 32)


def test_packed_files_are_unpacked(tmp_path: Path) -> None:
    images = write_mnist(tmp_path / "MNIST")
    for path in list((tmp_path / "MNIST/raw").iterdir()):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert np.array_equal(load_dataset("mnist", root=tmp_path, image_size=28).images[:, 0], images)


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    write_mnist(tmp_path / "MNIST")
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes())[:-30])
    path.unlink()
    with pytest.raises(CorruptFile, match=r"train-images-idx3-ubyte\.gz cannot be unpacked"):
        load_dataset("mnist", root=tmp_path)


def test_emnist_is_upright_and_letters_count_from_one(tmp_path: Path) -> None:
    images = write_mnist(tmp_path / "EMNIST", "emnist-letters-train", "emnist-letters-test", first=1)
    dataset = load_dataset("emnist", root=tmp_path, image_size=28, split="letters")
    assert np.array_equal(dataset.images[:, 0], images.transpose(0, 2, 1))
    assert dataset.labels.tolist() == list(range(9))
    assert dataset.classes[0] == "a"
    with pytest.raises(InvalidInput, match="Did you mean 'letters'"):
        load_dataset("emnist", root=tmp_path, split="leters")


def write_cifar(root: Path, form: str) -> tuple[np.ndarray, np.ndarray]:
    images = RNG.integers(0, 256, (12, 3072), dtype=np.uint8)
    labels = np.arange(12) % 10
    names = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    folder = root / {"py": "cifar-10-batches-py", "bin": "cifar-10-batches-bin"}[form]
    folder.mkdir()
    for k, name in enumerate(names):
        rows = slice(2 * k, 2 * k + 2)
        if form == "bin":
            (folder / f"{name}.bin").write_bytes(np.hstack([labels[rows, None].astype(np.uint8), images[rows]]).tobytes())
        else:
            content = {"data": images[rows], "labels": labels[rows].tolist()}
            (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return images.reshape(-1, 3, 32, 32), labels


@pytest.mark.parametrize("form", ["py", "bin"])
def test_cifar10_in_both_versions(tmp_path: Path, form: str) -> None:
    images, labels = write_cifar(tmp_path, form)
    dataset = load_dataset("cifar10", root=tmp_path)
    assert np.array_equal(dataset.images, images)
    assert np.array_equal(dataset.labels, labels)
    assert dataset.is_test.tolist() == [False] * 10 + [True] * 2
    assert dataset.classes[:2] == ("airplane", "automobile")


def test_cifar100_fine_and_coarse(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-binary").mkdir()
    for name, coarse, fine in (("train", 19, 99), ("test", 0, 1)):
        record = bytes([coarse, fine]) + bytes(3072)
        (tmp_path / f"cifar-100-binary/{name}.bin").write_bytes(record)
    assert load_dataset("cifar100", root=tmp_path).labels.tolist() == [99, 1]
    assert load_dataset("cifar100", root=tmp_path, labels="coarse").labels.tolist() == [19, 0]


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    write_cifar(tmp_path, "py")

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/ran",)

    (tmp_path / "cifar-10-batches-py/data_batch_3").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(CorruptFile, match=r"data_batch_3.*no place in a file of images"):
        load_dataset("cifar10", root=tmp_path)
    assert not (tmp_path / "ran").exists()


def test_svhn(tmp_path: Path) -> None:
    from scipy.io import savemat

    images = RNG.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    for part, rows in (("train", slice(0, 3)), ("test", slice(3, 4))):
        labels = np.array([[1], [10], [9], [10]])[rows]
        savemat(tmp_path / f"{part}_32x32.mat", {"X": images[rows].transpose(2, 3, 1, 0), "y": labels})
    dataset = load_dataset("svhn", root=tmp_path)
    assert np.array_equal(dataset.images, images)
    assert dataset.labels.tolist() == [1, 0, 9, 0]  # 10 stands for digit 0
    assert dataset.is_test.tolist() == [False] * 3 + [True]


def test_stl10(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (3, 3, 96, 96), dtype=np.uint8)
    (tmp_path / "stl10_binary").mkdir()
    for part, rows in (("train", slice(0, 2)), ("test", slice(2, 3))):
        (tmp_path / f"stl10_binary/{part}_X.bin").write_bytes(images[rows].transpose(0, 1, 3, 2).tobytes())
        (tmp_path / f"stl10_binary/{part}_y.bin").write_bytes(bytes([1, 10, 5])[rows])
    dataset = load_dataset("stl10", root=tmp_path, image_size=96)
    assert np.array_equal(dataset.images, images)
    assert dataset.labels.tolist() == [0, 9, 4]
    assert load_dataset("stl10", root=tmp_path).images.shape == (3, 3, 32, 32)


def test_missing_files_are_named_with_their_place(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(InvalidInput) as caught:
        load_dataset("cifar10", root=tmp_path / "data")
    text = str(caught.value)
    assert "\n" not in text
    for part in ("cifar-10-batches-py/data_batch_1", "cifar-10-batches-bin/test_batch.bin", str(tmp_path), "no network"):
        assert part in text
    assert {p.name for p in (tmp_path / "data").iterdir()} <= {".cache"}


@pytest.mark.parametrize("name", ["mnist", "emnist", "svhn", "stl10", "cifar100"])
def test_every_set_says_what_is_missing(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match=f"Data set '{name}' is not complete.*no network"):
        load_dataset(name, root=tmp_path)


@pytest.mark.parametrize("cut", [3, 20, 900])
def test_a_truncated_idx_file_is_named(tmp_path: Path, cut: int) -> None:
    write_mnist(tmp_path / "MNIST")
    path = tmp_path / "MNIST/raw/t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CorruptFile, match="t10k-images-idx3-ubyte is not a whole idx file"):
        load_dataset("mnist", root=tmp_path)


def test_a_wrong_checksum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path / "MNIST")
    monkeypatch.setattr(torchvision_table, "PUBLISHED_MD5", {"MNIST/raw/train-labels-idx1-ubyte": "0" * 32})
    with pytest.raises(CorruptFile, match=r"train-labels-idx1-ubyte has md5 .* not the published"):
        load_dataset("mnist", root=tmp_path)


def test_checksums_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    first = cache.remembered_digests([path], tmp_path)[path]
    assert first["md5"] == "900150983cd24fb0d6963f7d28e17f72"  # RFC 1321
    assert first["sha256"].startswith("ba7816bf8f01cfea")  # FIPS 180-2
    monkeypatch.setattr(cache, "file_digest", lambda _: {"sha256": "other", "md5": "other"})
    assert cache.remembered_digests([path], tmp_path)[path] == first
    os.utime(path, (1e9, 1e9))  # other content may be as long
    assert cache.remembered_digests([path], tmp_path)[path]["md5"] == "other"
    monkeypatch.setattr(cache, "file_digest", lambda _: {"sha256": "new", "md5": "new"})
    path.write_bytes(b"abcd")
    assert cache.remembered_digests([path], tmp_path)[path]["md5"] == "new"
    (tmp_path / ".cache/checksums.json").write_text("{damaged")
    assert cache.remembered_digests([path], tmp_path)[path]["md5"] == "new"


def test_a_read_only_root_uses_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache.cache_folder(tmp_path / "nowhere") == tmp_path / "cache/ganomaly_plugin"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InvalidInput, match="No cache folder can be written"):
        cache.cache_folder(tmp_path / "nowhere")


def test_a_user_without_a_home_folder_has_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert cache.cache_folder(tmp_path) == tmp_path / ".cache"
    with pytest.raises(InvalidInput, match=r"no home folder .* Set XDG_CACHE_HOME"):
        cache.cache_folder(tmp_path / "nowhere")


def write_elpv(folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    lines = []
    for k, (probability, kind) in enumerate(
        [(0, "mono"), (0, "mono"), (0, "poly"), (1, "mono"), (1 / 3, "mono"), (2 / 3, "poly")]
    ):
        noise = RNG.normal(60 + 20 * k, 20, (30, 30)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noise).save(folder / f"images/cell{k}.png")
        lines.append(f"images/cell{k}.png  {probability}   {kind}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")


def test_elpv(tmp_path: Path) -> None:
    write_elpv(tmp_path / "elpv")
    dataset = load_dataset("elpv", root=tmp_path, image_size=16)
    assert dataset.classes == ("good", "defective")
    assert dataset.anomaly_classes == ("defective",)
    assert dataset.labels.tolist() == [0, 0, 0, 1]
    assert dataset.images.shape == (4, 1, 16, 16)
    assert dataset.is_test is None
    assert dataset.source["licence"] == "CC BY-NC-SA 4.0"
    assert dataset.source["ambiguous_dropped"] == 2
    assert "differ" in dataset.source["published_sha256"]
    assert load_dataset("elpv", root=tmp_path, subset="poly", image_size=16).labels.tolist() == [0]
    level = load_dataset("elpv", root=tmp_path, image_size=16, brightness="normalise").images.astype(float)
    assert np.abs(level.mean((1, 2, 3)) - 128).max() < 0.6
    assert np.abs(level.std((1, 2, 3)) - 40).max() < 0.6
    assert np.ptp(dataset.images.astype(float).mean((1, 2, 3))) > 30


def test_elpv_options_and_absence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elpv.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InvalidInput, match=r"ganomaly-plugin\[elpv\].*CC BY-NC-SA 4.0"):
        load_dataset("elpv", root=tmp_path)
    for option, value in (("subset", "tri"), ("brightness", "more")):
        with pytest.raises(InvalidInput, match=f"{option} must be .* got '{value}'"):
            load_dataset("elpv", root=tmp_path, **{option: value})


def test_elpv_labels_that_cannot_be_read_are_told_by_their_line(tmp_path: Path, bench) -> None:
    write_elpv(tmp_path / "elpv")
    labels = tmp_path / "elpv" / "labels.csv"
    labels.write_bytes(labels.read_bytes() + b"images/caf\xe9 1.png 0 mono\n")
    for action in ("check", "ls"):
        code, out, err = bench("data", action, "elpv", "--data-root", tmp_path)
        assert f"{labels}, line 7: expected an image, a probability and a kind" in out + err and code == (action == "check") * 2


def test_elpv_from_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_elpv(tmp_path / "site/elpv_dataset/data")
    (tmp_path / "site/elpv_dataset/__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    (tmp_path / "root").mkdir()
    assert len(load_dataset("elpv", root=tmp_path / "root", image_size=16).images) == 4


def test_a_blank_image_survives_normalisation() -> None:
    assert (elpv.normalise_brightness(np.full((1, 1, 4, 4), 9, np.uint8)) == 128).all()


def test_no_tested_image_is_set_aside_for_validation() -> None:
    def taken(root: str = "./datasets/A", val_split_mode: str = "same_as_test", num_workers: int = 8) -> None: ...
    def its_own(root: str = "./datasets/B", val_split_mode: str = "from_dir", seed: int | None = None) -> None: ...

    assert anomalib_sets._no_extra_splits(taken) == {"val_split_mode": "same_as_test", "num_workers": 0}
    assert anomalib_sets._no_extra_splits(its_own) == {"seed": 0}


def write_mvtecad(root: Path, category: str) -> None:
    for k, name in enumerate(("train/good/0", "train/good/1", "test/good/0", "test/broken/0", "ground_truth/broken/0_mask")):
        path = root / "MVTecAD" / category / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L" if "mask" in name else "RGB", (20, 20), 255 if "mask" in name else (10 * k, 0, 0)).save(path)


def test_anomalibs_mvtec(tmp_path: Path) -> None:
    write_mvtecad(tmp_path, "bottle")
    dataset = load_dataset("anomalib:MVTecAD", root=tmp_path, category="bottle", image_size=16)
    assert dataset.labels.tolist() == [0, 0, 1, 0]
    assert dataset.is_test.tolist() == [False, False, True, True]
    assert dataset.images.shape == (4, 3, 16, 16)
    assert dataset.images[:, 0, 3, 3].tolist() == [0, 10, 30, 20]
    assert dataset.masks.all((1, 2)).tolist() == [False, False, True, False]
    assert dataset.source["defects"] == {"broken": 1}
    split = make_split(dataset, "one-anomalous/strict-v1", "anomaly", 0)
    assert split.is_anomaly.tolist() == [True, False]


MADE = {  # data set → (its folder, a category, images and masks in the set's own layout)
    "Visa": ("visa", "candle", "visa_pytorch/candle", ("train/good/0", "train/good/1", "test/good/2", "test/bad/3"), "bad/3"),
    "MPDD": ("MPDD", "tubes", "tubes", ("train/good/0", "train/good/1", "test/good/2", "test/hole/3"), "hole/3_mask"),
    "BTech": ("BTech", "01", "01", ("train/ok/0", "train/ok/1", "test/ok/2", "test/ko/3"), "ko/3"),
    "MVTecAD2": (
        "MVTec_AD_2",
        "can",
        "can",
        ("train/good/0", "train/good/1", "test_public/good/2", "test_public/bad/3", "validation/good/4", "test_private/5"),
        "../test_public/ground_truth/bad/3_mask",
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_other_industrial_sets(tmp_path: Path, name: str) -> None:
    folder, category, below, images, mask = MADE[name]
    base = tmp_path / folder / below
    for path in (*images, f"ground_truth/{mask}"):
        file = (base / path).resolve().with_suffix(".png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (20, 20), 255 if "ground_truth" in path else 10 * int(path[-1])).save(file)
    (base / "test_private_mixed").mkdir()
    dataset = load_dataset(f"anomalib:{name}", root=tmp_path, category=category, image_size=16)
    order = np.argsort(dataset.images[:, 0, 0, 0])
    assert dataset.images[order, 0, 0, 0].tolist() == [0, 10, 20, 30]
    assert dataset.labels[order].tolist() == [0, 0, 0, 1]
    assert dataset.is_test[order].tolist() == [False, False, True, True]
    assert dataset.masks[order].all((1, 2)).tolist() == [False, False, False, True]
    assert anomalib_sets.expand(f"anomalib:{name}", tmp_path) == [(f"anomalib:{name}", {"category": category})]


def test_real_iad(tmp_path: Path) -> None:
    samples: dict[str, list[dict[str, object]]] = {"train": [], "test": []}
    base = tmp_path / "Real-IAD/realiad_256/audiojack"
    base.mkdir(parents=True)
    for k, (part, kind) in enumerate([("train", "OK"), ("train", "OK"), ("test", "OK"), ("test", "AK")]):
        Image.new("L", (20, 20), 10 * k).save(base / f"{k}.png")
        samples[part].append({"image_path": f"{k}.png", "anomaly_class": kind, "mask_path": "3_mask.png" if k == 3 else None})
    Image.new("L", (20, 20), 255).save(base / "3_mask.png")
    listed = tmp_path / "Real-IAD/realiad_jsons/realiad_jsons/audiojack.json"
    listed.parent.mkdir(parents=True)
    listed.write_text(json.dumps(samples))
    dataset = load_dataset("anomalib:RealIAD", root=tmp_path, category="audiojack", image_size=16)
    assert dataset.labels.tolist() == [0, 0, 0, 1]  # with anomalib's own default the normal test image is lost
    assert dataset.is_test.tolist() == [False, False, True, True]
    assert dataset.masks.all((1, 2)).tolist() == [False, False, False, True]


def test_anomalib_may_list_anomalies_without_a_mask(tmp_path: Path) -> None:
    samples = {
        "image_path": [str(tmp_path / f"{k}.png") for k in range(4)],
        "label_index": [0, 0, 1, 1],
        "mask_path": ["", None, str(tmp_path / "mask.png"), ""],
    }
    for k in range(4):
        Image.new("L", (20, 20), 10 * k).save(tmp_path / f"{k}.png")
    Image.new("L", (20, 20), 255).save(tmp_path / "mask.png")
    frame = pd.DataFrame(samples)
    module = SimpleNamespace(train_data=SimpleNamespace(samples=frame[:2]), test_data=SimpleNamespace(samples=frame[2:]))
    dataset = load_listing(anomalib_sets._listing("Some", "", tmp_path, module), tmp_path, image_size=16)
    assert dataset.has_mask.tolist() == [False, False, True, False] and dataset.source["without_mask"] == 1
    module.test_data.samples = frame[3:]
    dataset = load_listing(anomalib_sets._listing("Some", "", tmp_path, module), tmp_path, image_size=16)
    assert dataset.masks is None and dataset.has_mask is None


def test_kolektor(tmp_path: Path) -> None:
    for k in range(10):
        folder = tmp_path / f"kolektor/kos{k:02d}"
        folder.mkdir(parents=True)
        mask = Image.new("L", (20, 20))
        if k >= 7:
            mask.paste(255, (0, 0, 10, 20))
        Image.new("L", (20, 20), 10 * k).save(folder / "Part0.jpg")
        mask.save(folder / "Part0_label.bmp")
    dataset = load_dataset("anomalib:Kolektor", root=tmp_path, image_size=16)
    assert np.bincount(dataset.labels).tolist() == [7, 3]
    assert not (dataset.labels[~dataset.is_test]).any()
    assert (dataset.masks.any((1, 2)) == (dataset.labels == 1)).all()


def test_all_categories_in_one_go(tmp_path: Path) -> None:
    write_mvtecad(tmp_path, "bottle")
    write_mvtecad(tmp_path, "zipper")
    assert anomalib_sets.expand("anomalib:MVTecAD", tmp_path, {"fit": "pad"}) == [
        ("anomalib:MVTecAD", {"fit": "pad", "category": "bottle"}),
        ("anomalib:MVTecAD", {"fit": "pad", "category": "zipper"}),
    ]
    assert len(anomalib_sets.expand("anomalib:MVTecAD", tmp_path / "empty")) == 15
    assert anomalib_sets.expand("anomalib:Kolektor", tmp_path) == [("anomalib:Kolektor", {})]
    assert anomalib_sets.expand("mnist", tmp_path) == [("mnist", {})]
    assert anomalib_sets.expand("anomalib:MVTecAD", tmp_path, {"category": "cable"}) == [
        ("anomalib:MVTecAD", {"category": "cable"})
    ]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("anomalib:MVTecADD", {}, "Did you mean 'MVTecAD'"),
        ("anomalib:Visa", {"category": "candl"}, "Did you mean 'candle'"),
        ("anomalib:BTech", {}, r"Known: 01, 02, 03"),
        ("anomalib:Kolektor", {"category": "x"}, "has no categories"),
        ("anomalib:MPDD", {"category": "tubes"}, r"cannot be read from .*MPDD.*tubes"),
    ],
)
def test_anomalib_errors_say_what_to_do(tmp_path: Path, name: str, options: dict[str, str], said: str) -> None:
    with pytest.raises(InvalidInput, match=said) as caught:
        load_dataset(name, root=tmp_path, **options)
    assert "\n" not in str(caught.value)


def test_all_named_industrial_sets_are_there() -> None:
    wanted = {"MVTecAD", "MVTecAD2", "Visa", "BTech", "MPDD", "Kolektor", "RealIAD"}
    assert wanted <= set(anomalib_sets.names())
    for name in wanted - {"Kolektor"}:
        assert anomalib_sets.categories(name)


IMAGES, LABELS = np.zeros((4, 1, 8, 8), np.uint8), np.array([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (None, "is a NoneType. Have its loader return an ImageDataset"),
        (ImageDataset("m", IMAGES / 255, LABELS, ("a", "b")), "images are float64 (4, 1, 8, 8), not a non-empty uint8"),
        (ImageDataset("m", IMAGES[:0], LABELS[:0], ("a", "b")), "images are uint8 (0, 1, 8, 8), not a non-empty"),
        (ImageDataset("m", IMAGES[:, 0], LABELS, ("a", "b")), "images are uint8 (4, 8, 8)"),
        (ImageDataset("m", IMAGES.tolist(), LABELS, ("a", "b")), "images are a list"),
        (ImageDataset("m", IMAGES, LABELS[:3], ("a", "b")), "labels are no array of 4 whole numbers"),
        (ImageDataset("m", IMAGES, LABELS.tolist(), ("a", "b")), "labels are no array of 4 whole numbers"),
        (ImageDataset("m", IMAGES, LABELS, ("a", "b"), has_mask=LABELS), "its has_mask is no array of bool (4,)"),
        (ImageDataset("m", IMAGES, 5 * LABELS, ("a", "b")), "labels span [0, 5], and there are 2 classes"),
        (ImageDataset("m", IMAGES, 2 * LABELS, ("a", "b")), "labels span [0, 2], and there are 2 classes"),
        (ImageDataset("m", IMAGES, -LABELS, ("a", "b")), "labels span [-1, 0]"),
        (ImageDataset("m", IMAGES, LABELS, (0, 1)), "classes are not names that differ, but (0, 1)"),
        (ImageDataset("m", IMAGES, LABELS, ("a", "a")), "classes are not names that differ"),
        (ImageDataset("m", IMAGES, LABELS, np.array(["a", "b"])), "its classes are no tuple, but a ndarray"),
        (ImageDataset("m", IMAGES, LABELS, ("a", "b"), anomaly_classes=np.array(["a"])), "its anomaly_classes are no tuple"),
        (ImageDataset("m", IMAGES, LABELS, ("a", "b"), source={"at": Path("x")}), "its source is no dict of plain finite"),
        (ImageDataset("m", IMAGES, LABELS, ("a", "b"), files=LABELS), "its files are no array of text (4,)"),
        (ImageDataset("m", IMAGES, LABELS, ("a", "b"), anomaly_classes=("c",)), "anomaly_classes ('c',) are not all"),
        (ImageDataset("m", IMAGES, LABELS, ("a", "b"), LABELS), "is_test is no array of bool (4,)"),
        (ImageDataset("m", IMAGES, LABELS, ("a", "b"), masks=IMAGES > 0), "masks is no array of bool (4, 8, 8)"),
    ],
)
def test_a_loader_that_returns_something_else_is_named(monkeypatch: pytest.MonkeyPatch, made: object, said: str) -> None:
    monkeypatch.setattr(anomalib_sets, "made_here", lambda *, root: made, raising=False)
    _load_cached.cache_clear()
    with pytest.raises(InvalidInput) as caught:
        load_dataset("ganomaly_plugin.datasets.anomalib_sets:made_here")
    assert said in str(caught.value) and "\n" not in str(caught.value)
    _load_cached.cache_clear()


def test_options_of_a_users_loader(bench, tmp_path: Path) -> None:
    defaults = {"opt": None, "mean": (0.0, 1.0), "steps": [1, 2], "noise": 0.1, "kind": odd_options.Kind.GOOD}
    for written, seen in (
        ("", {}),
        ("opt={a: 1}", {"opt": {"a": 1}}),
        ("opt={1: [2]}", {"opt": {"1": [2]}}),  # as a worker would read it from the record
        ("opt=[1,[2]]", {"opt": [1, [2]]}),
        ("mean=[1.0,2.0]", {"mean": (1.0, 2.0)}),
        ("steps=[3]", {"steps": [3]}),
        ("noise=1", {"noise": 1.0}),
        ("kind=bad", {"kind": "bad"}),
        ("mean=[0.0,1.0],steps=[1,2],kind=good", {}),
    ):
        odd_options.SEEN.clear()
        _load_cached.cache_clear()
        words = ["--datasets", f"odd_options:load[{written}]", "--models", "mean_intensity", "--classes", "a"]
        code, _, stderr = bench("run", *words, "--out", tmp_path / f"out {written}")
        assert code == 0, stderr
        assert repr(odd_options.SEEN) == repr([{**defaults, **seen}])  # types included
    assert load_dataset("odd_options:load", opt=1) is not load_dataset("odd_options:load", opt=True)
    assert check_options("odd_options:load", {"mean": (1.0, 2.0)})["mean"] == [1.0, 2.0]
    with pytest.raises(InvalidInput, match="image_size of data set digits must be int, got True"):
        check_options("digits", {"image_size": True})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("load[noise=true]", "Option noise of data set odd_options:load must be float, got True."),
        (f"load[noise=1{400 * '0'}]", "must be float, got 1000"),
        ("load[mean=1]", "Option mean of data set odd_options:load must be list, got 1."),
        ("load[opt=.inf]", "odd_options:load: opt is inf, which no record can hold"),
        ("load[opt=2024-01-01]", "which no record can hold"),
        ("needs", "odd_options:needs needs the option needed: write odd_options:needs[needed=…]."),
        ("needs[needed=1]", ""),
        ("leaves", "The data set odd_options:leaves (image_size=8) cannot be loaded: SystemExit"),
    ],
)
def test_what_a_users_loader_does_not_take(bench, name: str, said: str) -> None:
    words = ["--datasets", f"odd_options:{name}", "--models", "mean_intensity", "--classes", "a", "--dry-run"]
    code, _, stderr = bench("run", *words)
    assert code == (2 if said else 0) and said in stderr and stderr.count("\n") <= 1, stderr


@pytest.mark.slow
def test_adding_a_data_set_is_one_file_and_one_line(tmp_path: Path) -> None:
    """The example package's file and its entry point are all it takes; nothing else of that package is there."""
    example = Path(__file__).parent / "example_plugin"
    line = 'stripes = "example_plugin.stripes:load"'
    assert line in (example / "pyproject.toml").read_text().splitlines()
    (tmp_path / "example_plugin").mkdir()
    (tmp_path / "example_plugin/stripes.py").write_text((example / "example_plugin/stripes.py").read_text())
    info = tmp_path / "stripes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stripes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[ganomaly_plugin.datasets]\n{line.replace(chr(34), '')}\n")
    words = ["run", "--models", "mean_intensity", "--datasets", "stripes[width=4]", "--protocols", "one-anomalous/strict-v1"]
    script = "import sys; from ganomaly_plugin.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script, *words, "--out", str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "stripes 16×16 width=4" in done.stdout
    assert "class flat" in done.stderr


def test_the_registry_stays_light() -> None:
    script = (
        "import sys; from ganomaly_plugin.registry import entries; entries('data set'); "
        "print({'torch', 'torchvision', 'numpy', 'anomalib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


_LOAD_CIFAR = """
import json, resource, time
from ganomaly_plugin.datasets.base import load_dataset
from ganomaly_plugin.images import check_images
import ganomaly_plugin.datasets.torchvision_sets
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
images = check_images(load_dataset("cifar10").images)
seconds = time.perf_counter() - began
peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(json.dumps([list(images.shape), seconds, peak / images.numel()]))
"""


@pytest.mark.real_data
def test_real_cifar10_loads_fast_and_lean() -> None:
    done = subprocess.run([sys.executable, "-c", _LOAD_CIFAR], capture_output=True, text=True, check=True)
    shape, seconds, times_size = json.loads(done.stdout)
    assert shape == [60_000, 3, 32, 32]
    assert seconds < 3
    assert times_size < 2


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "options", "category", "sizes"),
    [
        ("mnist", {}, "0", (50_477, 12_620, 6_903)),
        ("fashion_mnist", {}, "Bag", (50_400, 12_600, 7_000)),
        ("cifar10", {}, "bird", (43_200, 10_800, 6_000)),
        ("elpv", {"subset": "mono"}, "defective", (470, 118, 313)),
    ],
)
def test_real_split_counts(name: str, options: dict[str, str], category: str, sizes: tuple[int, int, int]) -> None:
    dataset = load_dataset(name, **options)
    split = make_split(dataset, "one-anomalous/paper-v1", category, 0)
    assert (len(split.train), int((~split.is_anomaly).sum()), int(split.is_anomaly.sum())) == sizes
    assert "all match" in (dataset.source.get("published_md5"), dataset.source.get("published_sha256"))


@pytest.mark.real_data
def test_real_elpv_counts_and_its_darkness() -> None:
    from ganomaly_plugin.metrics import auroc

    for brightness, low, high in (("none", 0.77, 0.79), ("normalise", 0.45, 0.55)):
        mono = load_dataset("elpv", subset="mono", brightness=brightness)
        assert np.bincount(mono.labels).tolist() == [588, 313]
        assert low < auroc(mono.labels == 1, -mono.images.mean((1, 2, 3))) < high


def test_torchvision_sets_know_their_options() -> None:
    assert torchvision_sets.set_of("emnist", split="digits").classes == tuple("0123456789")
    assert torchvision_sets.set_of("cifar100", labels="coarse").classes[0] == "aquatic_mammals"
    assert torchvision_sets.set_of("digits") is None
