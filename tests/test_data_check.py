"""`bench data`: what is there, is it sound, how to get it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ganomaly_plugin.datasets import torchvision_table
from ganomaly_plugin.datasets.base import _load_cached
from ganomaly_plugin.datasets.inspect import check, describe, describe_lines, get
from ganomaly_plugin.errors import InvalidInput


@pytest.fixture(autouse=True)
def made_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision_table, "PUBLISHED_MD5", {})
    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", lambda *_, **__: 1 / 0)
    _load_cached.cache_clear()


def write_cifar(root: Path, images: np.ndarray, labels: list[int]) -> None:
    """Twelve images in CIFAR-10's binary version: ten train, two test."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    rows = np.hstack([np.array(labels, np.uint8)[:, None], images.reshape(12, 3072)])
    for k, name in enumerate((*(f"data_batch_{k}" for k in range(1, 6)), "test_batch")):
        (folder / f"{name}.bin").write_bytes(rows[2 * k : 2 * k + 2].tobytes())


def random_images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)


def test_a_sound_data_set(tmp_path: Path) -> None:
    write_cifar(tmp_path, random_images(), [0] * 12)
    report = check("cifar10", tmp_path)
    assert report.ok
    assert (report.images, report.leaks, report.duplicates, report.conflicts) == (12, [], [], [])


def test_leaks_duplicates_and_conflicts_are_told_apart(tmp_path: Path) -> None:
    images = random_images()
    images[10] = images[3]  # in both parts: leakage
    images[7] = images[6] = images[5]  # inside the training part
    images[11] = images[1][:, ::-1]  # at a size of 1 they would be equal
    labels = [0] * 12
    labels[6] = 4
    write_cifar(tmp_path, images, labels)
    report = check("cifar10", tmp_path)
    assert not report.ok
    assert report.leaks == [["train 3", "test 0"]]
    assert report.duplicates == [["train 5", "train 6", "train 7"]]
    assert report.conflicts == [["train 5", "train 6", "train 7"]]
    assert report.counts == {"leaked": 1, "repeated": 2}
    assert check("cifar10", tmp_path, image_size=1) == report  # as they are stored
    text = "\n".join(report.lines())
    assert "in both train and test (leakage): 1 test images" in text
    assert "train 3 = test 0" in text


def test_equal_pixels_in_different_files_leak(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (12, 12), dtype=np.uint8))
    for k, name in enumerate(("train/good/0", "train/good/1", "test/good/0", "test/bad/0", "test/bad/1")):
        path = tmp_path / f"f/{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (12, 12), k).save(path)
    noise.save(tmp_path / "f/train/good/1.png")
    noise.save(tmp_path / "f/test/good/0.bmp")
    noise.convert("RGB").save(tmp_path / "f/test/bad/1.png")  # grey in three channels
    report = check(f"folder:{tmp_path / 'f'}", tmp_path)
    assert report.leaks == report.conflicts == [["train/good/1.png", "test/bad/1.png", "test/good/0.bmp"]]


def test_describe_what_is_there(tmp_path: Path) -> None:
    write_cifar(tmp_path, random_images(), [0] * 10 + [1, 2])
    content = describe("cifar10", tmp_path)
    assert content["found"]
    assert content["counts"]["train"]["airplane"] == 10
    assert content["counts"]["test"] == {**dict.fromkeys(content["classes"], 0), "automobile": 1, "bird": 1}
    text = "\n".join(describe_lines(content))
    assert "cifar10: 12 images of 3×32×32" in text
    assert "cifar-10-batches-bin/test_batch.bin" in text


@pytest.mark.parametrize("name", ["mnist", "folder:nowhere", "anomalib:MVTecAD"])
def test_describe_what_is_not_there(tmp_path: Path, name: str) -> None:
    content = describe(name, tmp_path)
    assert not content["found"]
    (line,) = describe_lines(content)
    assert line.startswith(f"{name}: not found.")


def test_unknown_names_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="Did you mean 'mnist'"):
        describe("mnits", tmp_path)
    with pytest.raises(InvalidInput, match="option"):
        check("digits", tmp_path, side=3)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("emnist[split=foo]", "Unknown EMNIST split 'foo'. Known: balanced, "),
        ("cifar100[labels=foo]", "Unknown kind of CIFAR-100 labels 'foo'. Known: coarse, fine."),
        ("digits[root=/x]", "Unknown option of data set digits 'root'."),
        ("mnist[name=x]", "Unknown option of data set mnist 'name'."),
    ],
)
def test_unknown_parts_of_a_set_are_said_in_one_line(bench, name: str, said: str) -> None:
    for command in ("ls", "check", "get"):
        code, out, err = bench("data", command, name)
        assert code != 0 or (command == "ls" and said.startswith("Unknown ") and "option" not in said)
        assert said in out + err and (out + err).count("\n") == 1


def test_digits_need_no_files(tmp_path: Path) -> None:
    assert describe("digits", tmp_path)["counts"]["all"]["0"] == 178
    assert check("digits", tmp_path).images == 1797
    assert get("digits", tmp_path)[0].startswith("digits: 1,797 images")


def test_get_says_what_to_do_without_network(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"Put there MNIST/raw/train-images-idx3-ubyte.*The download failed"):
        get("mnist", tmp_path)
    assert not (tmp_path / "MNIST").exists()


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "elpv"])
def test_real_sets_have_no_image_twice(name: str) -> None:
    report = check(name)
    assert report.ok
    assert report.counts == {"leaked": 0, "repeated": 0}
