"""GANomaly for a few hundred images: the networks and losses of GANomaly, another score, and a budget in steps.

# Differs: not a published method. What each ingredient is worth is in results/ganomaly_plus. The networks are GANomaly's,
narrower; what is new happens after training, on normal images alone:

- latent: the distance of the whitened (z, z - ẑ) from the nearest training images', instead of the mean of (z - ẑ)².
- residual and feature: what of x - x̂, and of D's f(x) - f(x̂), lies outside the principal components that these
  differences have on training images. The part of a residual that every normal image has no longer counts. This is PCA,
  on what the networks got wrong: with an untrained generator (x̂ nearly 0) it is PCA on pixels.
- Each is standardised on held-out normal images; the score is their mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ganomaly_plugin.detectors.ganomaly import GanomalyRecipe
from ganomaly_plugin.errors import InvalidInput, unknown
from ganomaly_plugin.networks import Standardiser
from ganomaly_plugin.recipe import Networks, Optimiser, Phase, Stage, at_least
from ganomaly_plugin.training.validation import CALIBRATION_LIMIT

PARTS = ("latent", "residual", "feature")
#: The same parts as GANomaly has them, and as they are without a model of normal images.
PLAIN = ("paper_latent", "plain_residual", "plain_feature")
PAIRS = (("residual", "feature"), ("latent", "feature"), ("latent", "residual"))
NEIGHBOURS = 3
_SHRINK = 0.1  # of the mean variance, added to each variance before whitening divides by it
_RANK = 1e-6  # components with a smaller share of the largest variance are rounding


class Components(nn.Module):
    """Mean and principal components of vectors, as buffers of a fixed size; unused components are zero."""

    def __init__(self, size: int, count: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("axes", torch.zeros(max(1, min(count, size // 2)), size))
        self.register_buffer("variance", torch.zeros(len(self.axes)))

    mean: Tensor
    axes: Tensor
    variance: Tensor

    def fit(self, vectors: Tensor) -> None:
        """The components of `vectors` `(n, size)`, at most n - 1; none of equal vectors."""
        x = vectors.double()
        centred = x - x.mean(0)
        wide = x.shape[1] > len(x)
        values, sides = torch.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
        values, sides = values.flip(0).clamp(min=0), sides.flip(1)
        kept = min(len(self.axes), len(x) - 1, int((values > _RANK * values[0]).sum()))
        axes = (sides.T @ centred if wide else sides.T)[:kept]
        self.mean.copy_(x.mean(0))
        self.axes.zero_()
        self.variance.zero_()
        self.axes[:kept] = nn.functional.normalize(axes, dim=1).float()
        self.variance[:kept] = (values[:kept] / len(x)).float()

    def residual(self, vectors: Tensor) -> Tensor:
        """What of `vectors` `(n, size)` lies outside mean and components."""
        centred = vectors - self.mean
        return centred - (centred @ self.axes.T) @ self.axes

    def whitened(self, vectors: Tensor) -> Tensor:
        """Coordinates `(n, components)` along the components, each of about unit variance."""
        floor = _SHRINK * self.variance.mean().clamp(min=1e-12)
        return (vectors - self.mean) @ self.axes.T / (self.variance + floor).sqrt()


class Neighbours(nn.Module):
    """Distance from the nearest of at most CALIBRATION_LIMIT whitened vectors."""

    def __init__(self, size: int, count: int) -> None:
        super().__init__()
        self.components = Components(size, count)
        self.register_buffer("bank", torch.zeros(CALIBRATION_LIMIT, len(self.components.axes)))
        self.register_buffer("count", torch.tensor(1))

    bank: Tensor
    count: Tensor

    def fit(self, vectors: Tensor) -> None:
        """Remember `vectors` `(n, size)`, whitened."""
        self.components.fit(vectors)
        self.bank.zero_()
        self.bank[: len(vectors)] = self.components.whitened(vectors)
        self.count.fill_(len(vectors))

    def forward(self, vectors: Tensor) -> Tensor:
        """Root of the mean squared distance `(n,)` from the nearest NEIGHBOURS vectors."""
        known = self.bank[: int(self.count)]
        here = self.components.whitened(vectors)
        squared = here.square().sum(1, keepdim=True) + known.square().sum(1) - 2 * here @ known.T
        nearest = squared.topk(min(NEIGHBOURS, len(known)), dim=1, largest=False).values
        return nearest.clamp(min=0).mean(1).sqrt()


class NormalModel(nn.Module):
    """What calibration learns of normal images: a model of each part, and the scale of its scores."""

    def __init__(self, latent: int, pixels: int, features: int, components: int) -> None:
        super().__init__()
        self.latent = Neighbours(2 * latent, components)
        self.residual = Components(pixels, components)
        self.feature = Components(features, components)
        self.scale = Standardiser(len(PARTS + PLAIN))


@dataclass(frozen=True)
class GanomalyPlusRecipe(GanomalyRecipe):
    """GANomaly's networks and losses with a score that is calibrated on normal images.

    Args:
        features, latent_dim, extra_layers, w_adv, w_con, w_enc, lr, betas, adversarial, redraw_below: As GANomaly's.
        score_by: "combined" (the mean of `parts`), or another of `score_names`: a part alone, a pair of
            them ("residual_and_feature"), a part without its model of normal images ("paper_latent" is GANomaly's own
            score), or the mean of those ("plain").
        parts: Which parts the score is the mean of: latent, residual, feature.
        components: Principal components of each part; 0 takes residual and feature as plain mean squares.
        latent_distance: "nearest" (whitened, from the nearest training images) or "paper" (mean of (z - ẑ)²).
        lr_ratio: D's learning rate as a multiple of G's (two time scales).
        ema_decay: Score with a moving average of the weights; None with the trained ones.
    """

    features: int = 16
    batch_size: int = 32
    score_by: str = "combined"  # type: ignore[assignment]
    parts: tuple[str, ...] = PARTS
    components: int = 100
    latent_distance: Literal["nearest", "paper"] = "nearest"
    lr_ratio: float = 1.0
    ema_decay: float | None = None

    default_steps: ClassVar[int | None] = 200
    score_names: ClassVar[tuple[str, ...]] = (*PARTS, *PLAIN, *("_and_".join(pair) for pair in PAIRS), "plain", "combined")
    conformance_hparams: ClassVar[dict[str, Any]] = {"features": 4, "latent_dim": 8, "batch_size": 8, "lr": 2e-3}

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(components=(self.components, 0))
        if not self.lr_ratio > 0:
            raise InvalidInput(f"lr_ratio must be positive, got {self.lr_ratio}.")
        if self.score_by not in self.score_names:
            raise unknown("score_by", self.score_by, self.score_names)
        if not self.parts:
            raise InvalidInput(f"parts is empty. Give at least one of {', '.join(PARTS)}.")
        for part in self.parts:
            if part not in PARTS:
                raise unknown("part", part, PARTS)

    @property
    def calibrates(self) -> bool:
        """Always: every part but the paper's needs its model of normal images."""
        return True

    def build(self, chw: tuple[int, int, int]) -> dict[str, nn.Module]:
        """GANomaly's `generator` and `discriminator`, and `calibration`, which no optimiser touches."""
        networks = {name: net for name, net in super().build(chw).items() if name != "calibration"}
        channels, side, _ = chw
        with torch.no_grad():
            discriminator = networks["discriminator"].eval()
            size = discriminator(torch.zeros(1, channels, side, side))[1].numel()
            discriminator.train()
        return networks | {"calibration": NormalModel(self.latent_dim, channels * side * side, size, self.components)}

    @property
    def stages(self) -> tuple[Stage, ...]:
        """GANomaly's stage, with D's own learning rate."""
        (stage,) = super().stages
        generator, discriminator = stage.phases
        adam = Optimiser(self.lr * self.lr_ratio, self.betas)
        own = Phase("discriminator", discriminator.trains, discriminator.loss, adam, redraw_below=discriminator.redraw_below)
        return (Stage(stage.name, (generator, own)),)

    def _differences(self, networks: Networks, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(z, z - ẑ)`, `x - x̂` and `f(x) - f(x̂)` of images, as vectors."""
        x_hat, z, z_hat = networks["generator"](images)
        _, features = networks["discriminator"](images)
        _, features_hat = networks["discriminator"](x_hat)
        latent = torch.cat([z, z - z_hat], 1).flatten(1)
        return latent, (images - x_hat).flatten(1), (features - features_hat).flatten(1)

    def _parts(self, model: nn.Module, latent: Tensor, residual: Tensor, feature: Tensor) -> dict[str, Tensor]:
        plain = (latent[:, self.latent_dim :], residual, feature)
        found = {name: part.square().mean(1) for name, part in zip(PLAIN, plain, strict=True)}
        nearest = self.latent_distance == "nearest" and self.components > 0
        if self.components:
            residual, feature = model.residual.residual(residual), model.feature.residual(feature)  # type: ignore
        return {
            "latent": model.latent(latent) if nearest else found["paper_latent"],  # type: ignore[operator]
            "residual": residual.square().mean(1),
            "feature": feature.square().mean(1),
            **found,
        }

    def scores(self, networks: Networks, images: Tensor) -> dict[str, Tensor]:
        """The score of each part, with and without its model of normal images, and means of them, `(n,)` each."""
        model = networks["calibration"]
        found = self._parts(model, *self._differences(networks, images))
        scaled = model.scale(torch.stack([found[name] for name in PARTS + PLAIN], 1))  # type: ignore[operator]

        def mean(names: tuple[str, ...]) -> Tensor:
            return scaled[:, [(PARTS + PLAIN).index(name) for name in names]].mean(1)

        means = {"_and_".join(pair): mean(pair) for pair in PAIRS}
        return {**found, **means, "plain": mean(PLAIN), "combined": mean(self.parts)}

    def score(self, networks: Networks, images: Tensor) -> Tensor:
        """The score that `score_by` names."""
        return self.scores(networks, images)[self.score_by]

    def calibrate(self, networks: Networks, train: list[Tensor], held_out: list[Tensor]) -> None:
        """Fit each part's model to training images, and the scale of its scores to held-out ones."""
        model: Any = networks["calibration"]
        latent, residual, feature = (
            torch.cat(part) for part in zip(*(self._differences(networks, x) for x in train), strict=True)
        )
        if self.components:
            model.latent.fit(latent)
            model.residual.fit(residual)
            model.feature.fit(feature)
        held = [self._parts(model, *self._differences(networks, x)) for x in held_out]
        model.scale.fit(torch.cat([torch.stack([scores[name] for name in PARTS + PLAIN], 1) for scores in held]))

    def anomaly_map(self, networks: Networks, images: Tensor) -> Tensor:
        """Square of what the calibrated residual part leaves of x - x̂, mean over the channels."""
        model: Any = networks["calibration"]
        x_hat, _, _ = networks["generator"](images)
        residual = (images - x_hat).flatten(1)
        if self.components:
            residual = model.residual.residual(residual)
        return residual.view_as(images).square().mean(1)
