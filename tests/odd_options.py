"""Detectors and loaders of users, with options that are hard to record or wrongly told: for tests of both."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from faulty_detectors import Sound

from ganomaly_plugin.datasets.base import ImageDataset
from ganomaly_plugin.detectors.ae import AutoencoderRecipe

if TYPE_CHECKING:
    from collections.abc import Sequence


class Norm(enum.Enum):
    FLAT = "l1"
    ROUND = "l2"


class Kind(str, enum.Enum):
    GOOD = "good"
    BAD = "bad"


@dataclass(frozen=True)
class Named(AutoencoderRecipe):
    """A recipe with a member of an Enum and a path."""

    norm: Norm = Norm.FLAT
    weights: Path = Path("none")


@dataclass(frozen=True)
class Unchecked(AutoencoderRecipe):
    """A recipe with a type that is imported for type checkers only."""

    sides: Sequence[int] | None = None


class Bare:
    """No more than a detector needs, and no hparams."""

    has_epochs = False

    def __init__(self, norm: Norm = Norm.FLAT, weights: str = "none") -> None:
        self.norm, self.weights = norm, Path(weights)

    def fit(self, images, **options):
        assert isinstance(self.norm, Norm)
        return self

    def score(self, images):
        return np.asarray(images, dtype=float).mean((1, 2, 3)) + (self.norm is Norm.ROUND)


class HasName(Bare):
    """An option of its own with the name of what everything has."""

    def __init__(self, name: str = "mean") -> None:
        self.name = name

    def fit(self, images, **options):
        self.measure = getattr(np, self.name)
        return self

    def score(self, images):
        return self.measure(np.asarray(images, dtype=float), axis=(1, 2, 3))


@dataclass
class Built(Bare):
    """A dataclass and no recipe: a default that is made anew each time, and a field that is no option."""

    weights: list[float] = field(default_factory=lambda: [1.0, 2.0])
    fitted: bool = field(default=False, init=False)

    def fit(self, images, **options):
        self.fitted = True
        return self

    def score(self, images):
        return np.asarray(images, dtype=float).mean((1, 2, 3)) * sum(self.weights)


class Outer:
    class Inner(Bare):
        pass


class Required(Bare):
    """An option without a default."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size


class Told(Bare):
    """Tells its members and its path, which the constructor makes of text."""

    @property
    def hparams(self):
        return {"norm": self.norm, "weights": self.weights}


@dataclass(frozen=True)
class Net:
    """Options of an option; the last would import a module, were it read by the parser alone."""

    width: int = 8
    norm: Norm = Norm.FLAT
    act: Callable[[float], float] = abs


@dataclass(frozen=True)
class Plain:
    width: int = 8
    norm: Norm = Norm.FLAT


class Nested(Sound):
    """Dataclasses, members of an Enum and a path as options, in a detector that is saved."""

    def __init__(
        self, net: Plain = Plain(), more: list[Plain] | None = None, norm: Norm = Norm.FLAT, place: Path = Path("a")
    ) -> None:
        assert isinstance(net, Plain) and isinstance(norm, Norm)
        super().__init__(1 + net.width / 8)
        self.told = {"net": net, "more": more, "norm": norm, "place": place}

    @property
    def hparams(self):
        return self.told


class Calls(Bare):
    def __init__(self, net: Net = Net(), nets: dict[str, Callable] | None = None) -> None:
        super().__init__()


class Unsaid(Bare):
    """Its Enum is not in the signature, so that a name stays text."""

    def __init__(self, norm=Norm.FLAT) -> None:
        super().__init__(norm)

    @property
    def hparams(self):
        return {"norm": self.norm}


class Mixed(Bare):
    """Members that are text, and may be given as such: a record holds what it always held."""

    def __init__(self, kind=Kind.GOOD, also: Kind | str = Kind.GOOD, named: Kind = Kind.GOOD) -> None:
        super().__init__()
        self.told = {"kind": kind, "also": also, "named": named}

    @property
    def hparams(self):
        return self.told


class Forgets(Sound):
    """Tells one option of three, and that wrongly where it is negative."""

    def __init__(self, power: float = 2.0, sign: int = 1, betas: tuple[float, float] = (0.5, 0.9)) -> None:
        super().__init__(abs(power))


class TellsMore(Bare):
    """Passes its options on to another class, whose hparams name what its own constructor does not."""

    def __init__(self, **options) -> None:
        super().__init__(**options)

    @property
    def hparams(self):
        return {"norm": self.norm}


class InArrays(Bare):
    """Tells an option as an array, which no record can hold."""

    def __init__(self, weights: list[float] = [1.0]) -> None:  # noqa: B006
        self.hparams = {"weights": np.asarray(weights)}


class Method(Bare):
    def hparams(self):
        return {}


class Raises(Bare):
    @property
    def hparams(self):
        return {"norm": self.no_such_thing}


class Leaves(Bare):
    def __init__(self) -> None:
        sys.exit()


class LeavesLater(Bare):
    @property
    def hparams(self):
        sys.exit(0)


SEEN: list[dict] = []


def _made(**options):
    SEEN.append(options)
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
    return ImageDataset("odd", images, np.arange(40) % 2, ("a", "b"))


def load(*, root, image_size: int = 8, opt=None, mean=(0.0, 1.0), steps=[1, 2], noise=0.1, kind=Kind.GOOD):  # noqa: B006
    return _made(opt=opt, mean=mean, steps=steps, noise=noise, kind=kind)


def needs(*, root, needed, image_size: int = 8):
    return _made(needed=needed)


def leaves(*, root, image_size: int = 8):
    sys.exit()
