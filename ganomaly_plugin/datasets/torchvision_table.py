"""What torchvision's data sets are made of: files, published checksums, class names. Data, no behaviour."""

from __future__ import annotations

import string
from dataclasses import dataclass, field
from typing import Any, Literal

from ganomaly_plugin.errors import check_known

Form = Literal["idx", "idx-transposed", "cifar-python", "cifar-binary", "svhn", "stl10"]


@dataclass(frozen=True)
class Layout:
    """One form in which a data set is found: its files below the data root, in the order its reader takes them."""

    form: Form
    files: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)  # of the reader


@dataclass(frozen=True)
class TorchvisionSet:
    """One data set.

    Attributes:
        name: In the registry.
        download_class: The class of `torchvision.datasets` that downloads it.
        download_options: Its arguments, a download for each.
        layouts: Where to look; the first that is complete is read.
        classes: Class names, in the order of the labels.
        channels: 1 or 3.
        side: Side of the images as they are stored, pixels.
    """

    name: str
    download_class: str
    download_options: tuple[dict[str, Any], ...]
    layouts: tuple[Layout, ...]
    classes: tuple[str, ...]
    channels: int
    side: int


#: File below the data root → md5, of the files as published (of the unpacked file where the archive has another).
#: KMNIST, EMNIST and the binary CIFAR-100 publish none for unpacked files: torchvision checks their archives.
PUBLISHED_MD5 = {
    "MNIST/raw/train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "MNIST/raw/train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "MNIST/raw/t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "MNIST/raw/t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    "FashionMNIST/raw/train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "FashionMNIST/raw/train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "FashionMNIST/raw/t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "FashionMNIST/raw/t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    "cifar-10-batches-py/data_batch_1": "c99cafc152244af753f735de768cd75f",
    "cifar-10-batches-py/data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "cifar-10-batches-py/data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "cifar-10-batches-py/data_batch_4": "634d18415352ddfa80567beed471001a",
    "cifar-10-batches-py/data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "cifar-10-batches-py/test_batch": "40351d587109b95175f43aff81a1287e",
    "cifar-10-batches-bin/data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "cifar-10-batches-bin/data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "cifar-10-batches-bin/data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "cifar-10-batches-bin/data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "cifar-10-batches-bin/data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "cifar-10-batches-bin/test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
    "cifar-100-python/train": "16019d7e3df5f24257cddd939b257f8d",
    "cifar-100-python/test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
    "stl10_binary/train_X.bin": "918c2871b30a85fa023e0c44e0bee87f",
    "stl10_binary/train_y.bin": "5a34089d4802c674881badbb80307741",
    "stl10_binary/test_X.bin": "7f263ba9f9e0b06b93213547f721ac82",
    "stl10_binary/test_y.bin": "36f9794fa4beb8a2c72628de14fa638e",
}


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_DIGITS = tuple(string.digits)
_TRAIN = ({"train": True},)  # torchvision downloads both parts with either
_EACH_SPLIT = ({"split": "train"}, {"split": "test"})
_CIFAR10_BATCHES = (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch")

_EMNIST_MERGED = set("cijklmopsuvwxyz")  # lower-case letters that look like their capitals
_EMNIST_ALL = string.digits + string.ascii_uppercase + string.ascii_lowercase
EMNIST_CLASSES = {
    "byclass": tuple(_EMNIST_ALL),
    "bymerge": tuple(c for c in _EMNIST_ALL if c not in _EMNIST_MERGED),
    "balanced": tuple(c for c in _EMNIST_ALL if c not in _EMNIST_MERGED),
    "letters": tuple(string.ascii_lowercase),
    "digits": _DIGITS,
    "mnist": _DIGITS,
}

CIFAR100_CLASSES = {
    "fine": _words(
        "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can "
        "castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin "
        "elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster "
        "man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck "
        "pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk "
        "skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger "
        "tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
    ),
    "coarse": _words(
        "aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices "
        "household_furniture insects large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes "
        "large_omnivores_and_herbivores medium_mammals non-insect_invertebrates people reptiles small_mammals trees "
        "vehicles_1 vehicles_2"
    ),
}


def _idx_files(folder: str, train: str = "train", test: str = "t10k") -> tuple[str, ...]:
    return tuple(f"{folder}/raw/{part}-{kind}-ubyte" for part in (train, test) for kind in ("images-idx3", "labels-idx1"))


def _mnist_like(name: str, folder: str, classes: tuple[str, ...]) -> TorchvisionSet:
    return TorchvisionSet(name, folder, _TRAIN, (Layout("idx", _idx_files(folder)),), classes, 1, 28)


def emnist(split: str) -> TorchvisionSet:
    """EMNIST's part `split`.

    Raises:
        InvalidInput: It is none of `EMNIST_CLASSES`.
    """
    check_known("EMNIST split", split, EMNIST_CLASSES)
    files = _idx_files("EMNIST", f"emnist-{split}-train", f"emnist-{split}-test")
    first_label = 1 if split == "letters" else 0
    layout = Layout("idx-transposed", files, {"first_label": first_label})
    return TorchvisionSet("emnist", "EMNIST", ({"split": split},), (layout,), EMNIST_CLASSES[split], 1, 28)


def cifar100(labels: str) -> TorchvisionSet:
    """CIFAR-100 with its "fine" or "coarse" labels.

    Raises:
        InvalidInput: `labels` is neither.
    """
    check_known("kind of CIFAR-100 labels", labels, CIFAR100_CLASSES)
    layouts = (
        Layout("cifar-python", ("cifar-100-python/train", "cifar-100-python/test"), {"label_key": f"{labels}_labels"}),
        Layout(
            "cifar-binary",
            ("cifar-100-binary/train.bin", "cifar-100-binary/test.bin"),
            {"label_bytes": 2, "label_at": ("coarse", "fine").index(labels)},
        ),
    )
    return TorchvisionSet("cifar100", "CIFAR100", _TRAIN, layouts, CIFAR100_CLASSES[labels], 3, 32)


SETS = {
    entry.name: entry
    for entry in (
        _mnist_like("mnist", "MNIST", _DIGITS),
        _mnist_like(
            "fashion_mnist",
            "FashionMNIST",
            ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
        _mnist_like("kmnist", "KMNIST", ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")),
        TorchvisionSet(
            "cifar10",
            "CIFAR10",
            _TRAIN,
            (
                Layout("cifar-python", tuple(f"cifar-10-batches-py/{name}" for name in _CIFAR10_BATCHES)),
                Layout("cifar-binary", tuple(f"cifar-10-batches-bin/{name}.bin" for name in _CIFAR10_BATCHES)),
            ),
            ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
            3,
            32,
        ),
        TorchvisionSet("svhn", "SVHN", _EACH_SPLIT, (Layout("svhn", ("train_32x32.mat", "test_32x32.mat")),), _DIGITS, 3, 32),
        TorchvisionSet(
            "stl10",
            "STL10",
            ({"split": "train"},),
            (Layout("stl10", tuple(f"stl10_binary/{part}_{kind}.bin" for part in ("train", "test") for kind in "Xy")),),
            ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"),
            3,
            96,
        ),
    )
}
