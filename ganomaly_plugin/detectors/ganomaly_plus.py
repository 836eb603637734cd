"""GANomaly for a few hundred images: the networks and losses of GANomaly, another score, and a budget in steps.

# Differs: not a published method. What each ingredient is worth is in results/ganomaly_plus. The networks are GANomaly's,
narrower. D has one more task, as in SS-GAN (arXiv 1811.11212): to tell by which quarter turns an image was turned, so that
its features learn what the images show. What else is new happens after training, on normal images alone:

- Eight views of an image, each a vector: the image x itself, x levelled to one brightness and contrast, its histograms of
  oriented gradients (HOG) in 8×8 and in 4×4 cells, the residual x - x̂, the latent (z, z - ẑ), D's features of x, and the
  means of D's features of x turned four ways. Of each, `NormalVectors` learns what it is like on training images; how far
  outside the principal components an image lies, on the whole and where it is furthest, and how far from its nearest
  neighbours, are the parts of the score.
- Each part is standardised, on the scale of logarithms, on held-out normal images, and then whitened: of what several parts
  say alike, each keeps a share, and what one says against the others stands out. The root mean square of the parts is one
  half of the score. One that is lower than normal counts too, with the weight `below`: an image that is blurred or faded is
  nearer to what images have in common than a normal one, and is none.
- An image that is strange as a whole, as a digit of another class is, is strange to all neighbours alike, which whitening
  makes little of. So the other half is how far the shapes in it, those of SHAPE, lie from their nearest neighbours, not
  whitened. The score is the logarithm of the sum of both halves' exponentials: about the larger one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ganomaly_plugin.detectors.ganomaly import GanomalyRecipe
from ganomaly_plugin.detectors.image_views import DIRECTIONS, TURNS, histograms, levelled, oriented_gradients, turned
from ganomaly_plugin.detectors.normal_models import PEAK, STATISTICS, NormalVectors, Whitening
from ganomaly_plugin.errors import InvalidInput, check_known
from ganomaly_plugin.networks import SPECTRAL_IN_PLACE, Standardiser, normalise_spectrally
from ganomaly_plugin.recipe import FEWEST_HELD_OUT, Networks, Optimiser, Phase, Stage, StepInput, at_least

VIEWS = ("image", "levelled", "hog8", "hog4", "latent", "residual", "feature", "turned")
CELLS = {"hog8": 8, "hog4": 4}  # of the views that are histograms, along an image's side
IMAGES = ("image", "levelled", "residual")  # the views that are images
PARTS = tuple(f"{view}_{statistic}" for view in VIEWS for statistic in (*STATISTICS, *[PEAK] * (view in IMAGES)))
#: GANomaly's own score, and mean squares of the differences: what there is without a model of normal vectors.
PLAIN = ("paper_latent", "plain_residual", "plain_feature")
#: The parts that the score is made of.
DEFAULT_PARTS = (
    "image_outside",
    "image_nearest",
    "levelled_nearest",
    "levelled_peak",
    "hog8_outside",
    "hog8_nearest",
    "hog4_outside",
    "hog4_nearest",
    "latent_nearest",
    "feature_outside",
    "feature_nearest",
    "turned_outside",
    "turned_nearest",
)
#: Those that tell how far an image's shapes are from known ones, whatever its brightness.
SHAPE = ("levelled_nearest", "hog8_nearest", "hog4_nearest")
#: What may be left out of the score, to see what it is worth: parts with one of these in their names.
LEFT_OUT = ("image", "levelled", "hog", "latent", "feature", "turned", "outside", "nearest", PEAK)
FOLDS = 5  # of the training images: the parts of each are taken with models of the others


def turn_loss(logits: Tensor) -> Tensor:
    """Mean cross-entropy of the logits `(4 n, 4)` of `turned` images with the turns they were turned by."""
    chances = logits.view(TURNS, -1, TURNS).log_softmax(2)
    return -chances.diagonal(dim1=0, dim2=2).mean()


class NormalModel(nn.Module):
    """What calibration learns of normal images: what views are like, scales of parts and halves, how they go together.

    Args:
        sizes: Length of each view's vectors.
        components: Principal components of each view, at most.
        chw: Shape of an image.
        means: Name of each mean that is taken of whitened parts, and which of PARTS it is of.
        halves: Name of each score, and of how many halves it is.
    """

    def __init__(
        self,
        sizes: dict[str, int],
        components: int,
        chw: tuple[int, int, int],
        means: dict[str, tuple[str, ...]],
        halves: dict[str, int],
    ) -> None:
        super().__init__()
        shapes = dict.fromkeys(IMAGES, chw)
        self.views = nn.ModuleDict({view: NormalVectors(size, components, shapes.get(view)) for view, size in sizes.items()})
        self.scale = Standardiser(len(PARTS + PLAIN))
        self.whitening = Whitening([[PARTS.index(part) for part in parts] for parts in means.values()], len(PARTS))
        self.halves = nn.ModuleDict({name: Standardiser(count) for name, count in halves.items()})

    def forward(self, vectors: dict[str, Tensor]) -> Tensor:
        """The logarithms of PARTS, `(n, parts)`, of the views' vectors `(n, size)`."""
        found = {view: self.views[view](vectors[view]) for view in VIEWS}
        return torch.stack([found[view][statistic] for view, _, statistic in (part.partition("_") for part in PARTS)], 1)


@dataclass(frozen=True)
class GanomalyPlusRecipe(GanomalyRecipe):
    """GANomaly's networks and losses with a score that is calibrated on normal images.

    Args:
        features, latent_dim, extra_layers, w_adv, w_con, w_enc, lr, betas, adversarial: As GANomaly's.
        redraw_below: As GANomaly's; it is D's whole loss that counts, with `w_turn` that of the turns too.
        w_turn: Weight of D's task to tell an image's quarter turns, in D's loss; 0 leaves it out.
        score_by: "combined" (of `parts`), or another of `score_names`: a part alone, all without one view ("without_image"),
            one statistic ("without_nearest"), parts that are lower than normal ("without_below"), the whitening
            ("without_whitening") or the half that is not whitened ("without_shape"), all with the residual
            ("with_residual") or another statistic too ("with_inside"), "mean_of_parts" for the root mean square,
            "paper_latent" (GANomaly's own score), or "plain" (the mean of the standardised latent, residual and feature
            differences).
        parts: What the score is made of, each "<view>_<statistic>".
        components: Principal components of each view, at most.
        below: Weight of a part that is lower than on normal images; 0 ignores it, 1 counts it like one that is higher.
        lr_ratio: D's learning rate as a multiple of G's (two time scales).
        ema_decay: Score with a moving average of the weights; None with the trained ones.
        spectral: Whether D's convolutions, the last excepted, are normalised spectrally (arXiv 1802.05957).
        augment: Whether training images are moved by up to a 16th of their side and made up to a 10th brighter or darker.
        normalise: Whether each image is brought to mean 0 and deviation 0.5 before the networks and views see it.
    """

    features: int = 16
    batch_size: int = 32
    w_turn: float = 1.0
    score_by: str = "combined"  # type: ignore[assignment]
    parts: tuple[str, ...] = DEFAULT_PARTS
    components: int = 100
    below: float = 0.25
    lr_ratio: float = 1.0
    ema_decay: float | None = None
    spectral: bool = False
    augment: bool = False
    normalise: bool = False

    default_steps: ClassVar[int | None] = 200
    protocol_batchnorm: ClassVar[bool] = False
    score_names: ClassVar[tuple[str, ...]] = (
        *PARTS,
        *PLAIN,
        *(f"without_{left_out}" for left_out in LEFT_OUT),
        "without_below",
        "without_whitening",
        "without_shape",
        "with_residual",
        "with_inside",
        "mean_of_parts",
        "plain",
        "combined",
    )
    conformance_hparams: ClassVar[dict[str, Any]] = {"features": 4, "latent_dim": 8, "batch_size": 8, "lr": 2e-3}

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(components=(self.components, 1), below=(self.below, 0), w_turn=(self.w_turn, 0))
        if not self.lr_ratio > 0:
            raise InvalidInput(f"lr_ratio must be positive, got {self.lr_ratio}.")
        check_known("score_by", self.score_by, self.score_names)
        if not self.parts:
            raise InvalidInput(f"parts is empty. Give at least one of {', '.join(PARTS)}.")
        for part in self.parts:
            check_known("part", part, PARTS)

    @property
    def unstackable(self) -> str | None:
        """With spectral normalisation, which torch does not map over models."""
        return SPECTRAL_IN_PLACE if self.spectral else None

    @property
    def calibrates(self) -> bool:
        """Always: every part but the paper's needs its model of normal images."""
        return True

    def build(self, chw: tuple[int, int, int]) -> dict[str, nn.Module]:
        """GANomaly's `generator` and `discriminator`, `turns` where D tells them, and `calibration`, which none optimises."""
        networks = {name: net for name, net in super().build(chw).items() if name != "calibration"}
        channels, side, _ = chw
        with torch.no_grad():
            discriminator = networks["discriminator"].eval()
            features = discriminator(torch.zeros(1, channels, side, side))[1]
            discriminator.train()
        if self.spectral:
            normalise_spectrally(networks["discriminator"])
        pixels = channels * side * side
        sizes = dict.fromkeys(IMAGES, pixels) | {
            **{view: DIRECTIONS * cells * cells for view, cells in CELLS.items()},
            "latent": 2 * self.latent_dim,
            "feature": features.numel(),
            "turned": TURNS * features.shape[1],
        }
        if self.w_turn:
            networks["turns"] = nn.Sequential(nn.Flatten(), nn.Linear(features.numel(), TURNS))
        halves = {name: 1 + bool(shape) for name, shape in self._shapes.items()}
        return networks | {"calibration": NormalModel(sizes, self.components, chw, self._means, halves)}

    @property
    def _means(self) -> dict[str, tuple[str, ...]]:
        """The parts of each mean that is whitened by itself: of the score, and with some left out or put in."""
        means = {"combined": self.parts}
        for name in LEFT_OUT:
            left = tuple(part for part in self.parts if not any(word.startswith(name) for word in part.split("_")))
            means[f"without_{name}"] = left or self.parts
        more = {
            "with_residual": ("residual_outside", "residual_nearest"),
            "with_inside": tuple(f"{view}_inside" for view in VIEWS if view != "residual"),
        }
        return means | {name: tuple(dict.fromkeys((*self.parts, *parts))) for name, parts in more.items()}

    @property
    def _shapes(self) -> dict[str, tuple[str, ...]]:
        """Which of SHAPE the second half of each score is of; without any there is none."""
        of = dict.fromkeys(("without_below", "without_whitening", "mean_of_parts"), self.parts) | self._means
        return {name: tuple(part for part in parts if part in SHAPE) for name, parts in of.items()} | {"without_shape": ()}

    @property
    def stages(self) -> tuple[Stage, ...]:
        """GANomaly's stage, with D's own learning rate and task."""
        (stage,) = super().stages
        generator, discriminator = stage.phases
        adam = Optimiser(self.lr * self.lr_ratio, self.betas)
        trains = (*discriminator.trains, *["turns"] * bool(self.w_turn))
        own = Phase("discriminator", trains, discriminator.loss, adam, redraw_below=discriminator.redraw_below)
        return (Stage(stage.name, (generator, own)),)

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Where to and how brightly the images of a step are moved, if they are: in shares of their side, and a factor."""
        if not self.augment:
            return {}
        shift, gain = torch.rand(n, 2, generator=generator), torch.rand(n, 1, 1, 1, generator=generator)
        return {"shift": (2 * shift - 1) / 16, "gain": 1 + (2 * gain - 1) / 10}

    def _generator_phase(self, networks: Networks, step: StepInput) -> tuple[Tensor, dict[str, Tensor]]:
        images = step.images
        if self.augment:
            images = self._moved(images, step.draws["shift"], step.draws["gain"])
        images = self._input(images)
        loss, computed = super()._generator_phase(networks, StepInput(images, step.draws, step.earlier))
        return loss, computed | {"images": images}

    def _discriminator_phase(self, networks: Networks, step: StepInput) -> tuple[Tensor, dict[str, Tensor]]:
        loss, computed = super()._discriminator_phase(networks, step)
        if not self.w_turn:
            return loss, computed
        _, features = networks["discriminator"](turned(step.earlier["images"]))
        turns = turn_loss(networks["turns"](features))
        return loss + self.w_turn * turns, computed | {"turns": turns}

    def _moved(self, images: Tensor, shift: Tensor, gain: Tensor) -> Tensor:
        """`images` moved by whole pixels, the border repeated, their distance from black times `gain`."""
        _, _, side, _ = images.shape
        pixels = (shift * side).round().long()  # (b, 2)
        axis = torch.arange(side, device=images.device)
        rows = (axis + pixels[:, :1]).clamp(0, side - 1)[:, None, :, None]  # (b, 1, s, 1)
        columns = (axis + pixels[:, 1:]).clamp(0, side - 1)[:, None, None, :]
        batch = torch.arange(len(images), device=images.device)[:, None, None, None]
        channel = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
        low, high = self.input_range
        return ((images[batch, channel, rows, columns] - low) * gain + low).clamp(low, high)

    def _input(self, images: Tensor) -> Tensor:
        """What the networks see of `images`."""
        return levelled(images).clamp(-1, 1) if self.normalise else images

    def _views(self, networks: Networks, images: Tensor) -> dict[str, Tensor]:
        """Each of VIEWS, `(n, size)`, and `feature_hat`, D's features of x̂."""
        x = self._input(images)
        x_hat, z, z_hat = networks["generator"](x)
        _, features = networks["discriminator"](turned(x))
        _, features_hat = networks["discriminator"](x_hat)
        of_turns = features.unflatten(0, (TURNS, -1))  # (turns, n, w, s, s)
        shown = levelled(images)
        gradients = oriented_gradients(shown)
        vectors = {
            "image": x,
            "levelled": shown,
            **{view: histograms(gradients, cells) for view, cells in CELLS.items()},
            "latent": torch.cat([z, z - z_hat], 1),
            "residual": x - x_hat,
            "feature": of_turns[0],
            "turned": of_turns.mean((3, 4)).transpose(0, 1),
            "feature_hat": features_hat,
        }
        return {view: vector.flatten(1) for view, vector in vectors.items()}

    def _parts(self, model: nn.Module, vectors: dict[str, Tensor]) -> Tensor:
        """PARTS and PLAIN, `(n, parts)`, the former as logarithms."""
        latent, difference = vectors["latent"][:, self.latent_dim :], vectors["feature"] - vectors["feature_hat"]
        squares = torch.stack([vector.square().mean(1) for vector in (latent, vectors["residual"], difference)], 1)
        return torch.cat([model(vectors), squares], 1)

    def _halves(self, model: Any, scaled: Tensor) -> dict[str, Tensor]:
        """What each score is joined from, `(n, 1 or 2)`, of the standardised PARTS `(n, parts)`."""
        means, shapes = self._means, self._shapes

        def size(values: Tensor, count: int, *, below: float = self.below, power: float = 2.0) -> Tensor:
            powers = torch.where(values > 0, values, -below * values).pow(power)  # parts that are not of the mean are 0
            return (powers.sum(1) / count).pow(1 / power)

        def of(parts: tuple[str, ...]) -> Tensor:
            return scaled[:, [PARTS.index(part) for part in parts]]

        count = len(self.parts)
        whitened = {name: model.whitening(scaled, k) for k, name in enumerate(means)}
        found = {name: size(values, len(means[name])) for name, values in whitened.items()} | {
            "without_below": size(whitened["combined"], count, below=0),
            "without_whitening": size(of(self.parts), count),
            "without_shape": size(whitened["combined"], count),
            "mean_of_parts": size(whitened["combined"], count, power=1),
        }
        second = {shape: [size(of(shape), len(shape), below=0)] if shape else [] for shape in set(shapes.values())}
        return {name: torch.stack([half, *second[shapes[name]]], 1) for name, half in found.items()}

    def scores(self, networks: Networks, images: Tensor) -> dict[str, Tensor]:
        """Each part, with and without its model of normal images, and what is made of them, `(n,)` each."""
        model: Any = networks["calibration"]
        found = self._parts(model, self._views(networks, images))
        scaled = model.scale(found)
        halves = self._halves(model, scaled[:, : len(PARTS)])
        return {
            **dict(zip(PARTS + PLAIN, found.unbind(1), strict=True)),
            **{name: model.halves[name](values).logsumexp(1) for name, values in halves.items()},
            "plain": scaled[:, len(PARTS) :].mean(1),
        }

    def score(self, networks: Networks, images: Tensor) -> Tensor:
        """The score that `score_by` names."""
        return self.scores(networks, images)[self.score_by]

    def calibrate(self, networks: Networks, train: list[Tensor], held_out: list[Tensor]) -> None:
        """Fit each view's model to training images, the scale of the parts to held-out ones, and the whitening.

        How parts and halves go together takes more images than are held out: it is learned on the training images, each fifth
        of them scored with models of the other four. The scale is learned there too where none could be held out; where
        few were, those scores count in it like FEWEST_HELD_OUT more.
        """
        model: Any = networks["calibration"]
        vectors = self._all_views(networks, train)
        n = len(vectors["image"])
        crossed = []
        for fold in range(min(FOLDS, n) if n > 1 else 0):
            left_out = torch.arange(n, device=vectors["image"].device) % min(FOLDS, n) == fold
            self._fit(model, {view: vector[~left_out] for view, vector in vectors.items()})
            crossed.append(self._parts(model, {view: vector[left_out] for view, vector in vectors.items()}))
        self._fit(model, vectors)
        if held_out is train:
            known = torch.cat(crossed) if crossed else self._parts(model, vectors)
            model.scale.fit(known)
        else:
            own = self._parts(model, self._all_views(networks, held_out))
            known = torch.cat(crossed) if crossed else own
            model.scale.fit(own, known, worth=FEWEST_HELD_OUT)
        scaled = model.scale(known)[:, : len(PARTS)]
        model.whitening.fit(scaled)
        for name, values in self._halves(model, scaled).items():
            model.halves[name].fit(values)

    def _all_views(self, networks: Networks, chunks: list[Tensor]) -> dict[str, Tensor]:
        views = [self._views(networks, x) for x in chunks]
        return {name: torch.cat([found[name] for found in views]) for name in views[0]}

    @staticmethod
    def _fit(model: Any, vectors: dict[str, Tensor]) -> None:
        for view, learner in model.views.items():
            learner.fit(vectors[view])

    def reconstruct(self, networks: Networks, images: Tensor) -> Tensor:
        """x̂."""
        return super().reconstruct(networks, self._input(images))

    def anomaly_map(self, networks: Networks, images: Tensor) -> Tensor:
        """Square of what of x - x̂ lies outside its principal components on normal images, mean over the channels."""
        model: Any = networks["calibration"]
        residual = self._views(networks, images)["residual"]
        return model.views["residual"].components.residual(residual).view_as(images).square().mean(1)
