"""GANomaly: Akcay, Atapour-Abarghouei, Breckon, ACCV 2018, arXiv 1805.06725.

Generator G = encoder GE → decoder GD → second encoder E: z = GE(x), x̂ = GD(z), ẑ = E(x̂). The anomaly score is the
distance of z and ẑ. Defaults and details are those of the authors' public code (github.com/samet-akcay/ganomaly).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ganomaly_plugin.networks import Decoder, Discriminator, Encoder, Standardiser, bce, check_square, dcgan_init
from ganomaly_plugin.recipe import Networks, Optimiser, Phase, Recipe, Stage, StepInput, at_least, check_adam


class Generator(nn.Module):
    """Encoder, decoder, encoder: an image to its code, its reconstruction, and the reconstruction's code."""

    def __init__(self, side: int, channels: int, features: int, latent_dim: int, extra_layers: int) -> None:
        super().__init__()
        self.encoder1 = Encoder(side, channels, features, latent_dim, extra_layers)
        self.decoder = Decoder(side, channels, features, latent_dim, extra_layers)
        self.encoder2 = Encoder(side, channels, features, latent_dim, extra_layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(x_hat, z, z_hat)` of images `(b, c, s, s)`; the codes are `(b, latent_dim, 1, 1)`."""
        z = self.encoder1(x)
        x_hat = self.decoder(z)
        return x_hat, z, self.encoder2(x_hat)


def adversarial_loss(features_real: Tensor, features_fake: Tensor) -> Tensor:
    """Feature matching, paper eq. 1: mean squared distance of D's features of x (no gradient) and x̂."""
    return (features_real.detach() - features_fake).square().mean()


def contextual_loss(x: Tensor, x_hat: Tensor) -> Tensor:
    """Paper eq. 2: mean absolute difference of image and reconstruction."""
    return (x - x_hat).abs().mean()


def encoder_loss(z: Tensor, z_hat: Tensor) -> Tensor:
    """Paper eq. 3, as a mean of squares (the authors' code): distance of the two codes."""
    return (z - z_hat).square().mean()


def discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """½·[BCE(D(x), 1) + BCE(D(x̂), 0)], section 3.3 and the authors' code."""
    return 0.5 * (bce(logits_real, real=True) + bce(logits_fake, real=False))


@dataclass(frozen=True)
class GanomalyRecipe(Recipe):
    """GANomaly's networks, losses and score.

    Args:
        features: Channels after the first convolution (the authors' ngf and ndf).
        latent_dim: Length of the codes z and ẑ.
        extra_layers: 3×3 convolutions at half resolution, in each network.
        w_adv, w_con, w_enc: Weights of the adversarial, contextual and encoder loss (eq. 4).
        lr, betas: Adam's, for both networks.
        adversarial: G's adversarial loss: "feature-matching" (the paper's; public code since October 2019), "bce"
            (BCE(D(x̂), 1), that of the public code of May 2018 to July 2019) or "feature-matching-detached" (in between: no
            gradient reaches G).
        redraw_below: D's weights are drawn anew when its loss falls under this; 0 never.
        score_by: "latent" (the authors': mean of (z - ẑ)²), "latent_l1" (the paper's eq. 5: mean of |z - ẑ|), "residual"
            and "residual_l2" (mean of |x - x̂| and of its square), "feature" (mean squared difference of D's features of x
            and x̂), or "combined" (the mean of those five, each standardised on held-out normal images).
    """

    features: int = 64
    latent_dim: int = 100
    extra_layers: int = 0
    w_adv: float = 1.0
    w_con: float = 50.0
    w_enc: float = 1.0
    lr: float = 2e-4
    betas: tuple[float, float] = (0.5, 0.999)
    adversarial: Literal["feature-matching", "bce", "feature-matching-detached"] = "feature-matching"
    redraw_below: float = 1e-5
    score_by: Literal["latent", "latent_l1", "residual", "residual_l2", "feature", "combined"] = field(
        default="latent", metadata={"late": True}
    )

    score_names: ClassVar[tuple[str, ...]] = ("latent", "latent_l1", "residual", "residual_l2", "feature")
    conformance_hparams: ClassVar[dict[str, Any]] = {"features": 4, "latent_dim": 8, "batch_size": 8, "lr": 2e-3}

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(features=(self.features, 2), latent_dim=(self.latent_dim, 1), extra_layers=(self.extra_layers, 0))
        at_least(w_adv=(self.w_adv, 0), w_con=(self.w_con, 0), w_enc=(self.w_enc, 0))
        at_least(redraw_below=(self.redraw_below, 0))
        check_adam(self.lr, self.betas)

    def build(self, chw: tuple[int, int, int]) -> dict[str, nn.Module]:
        """`generator` and `discriminator` for square images whose side is a multiple of 16."""
        check_square(chw)
        channels, side, _ = chw
        generator = Generator(side, channels, self.features, self.latent_dim, self.extra_layers)
        discriminator = Discriminator(side, channels, self.features, self.extra_layers)
        networks = {"generator": generator.apply(dcgan_init), "discriminator": discriminator.apply(dcgan_init)}
        return networks | ({"calibration": Standardiser(len(self.score_names))} if self.calibrates else {})

    @property
    def stages(self) -> tuple[Stage, ...]:
        """One stage: G from its three losses, then D, both at D's weights from before the step."""
        adam = Optimiser(self.lr, self.betas)
        generator = Phase("generator", ("generator",), self._generator_phase, adam)
        discriminator = Phase(
            "discriminator", ("discriminator",), self._discriminator_phase, adam, redraw_below=self.redraw_below or None
        )
        return (Stage("train", (generator, discriminator)),)

    def _generator_phase(self, networks: Networks, step: StepInput) -> tuple[Tensor, dict[str, Tensor]]:
        # Differs: the authors run D twice on x and twice on x̂ (once for each loss); one pass gives the same gradients.
        # D's BatchNorm running statistics then move twice a step instead of four times: the scores "feature" and "combined"
        # read them, the authors' own does not.
        # Differs: with "bce" this loss alone is that of 2018. That code moved D first, by the sum of the two cross-entropies,
        # then G against the D so moved, and drew D anew when either of D's losses fell under 1e-5.
        x = step.images
        x_hat, z, z_hat = networks["generator"](x)
        logits_real, features_real = networks["discriminator"](x)
        logits_fake, features_fake = networks["discriminator"](x_hat)
        if self.adversarial == "bce":
            adv = bce(logits_fake, real=True)
        elif self.adversarial == "feature-matching-detached":
            adv = adversarial_loss(features_real, features_fake.detach())
        else:
            adv = adversarial_loss(features_real, features_fake)
        con = contextual_loss(x, x_hat)
        enc = encoder_loss(z, z_hat)
        total = self.w_adv * adv + self.w_con * con + self.w_enc * enc
        computed = {"adversarial": adv, "contextual": con, "encoder": enc, "generator": total}
        return total, computed | {"logits_real": logits_real, "logits_fake": logits_fake}

    def _discriminator_phase(self, networks: Networks, step: StepInput) -> tuple[Tensor, dict[str, Tensor]]:
        loss = discriminator_loss(step.earlier["logits_real"], step.earlier["logits_fake"])
        return loss, {"discriminator": loss}

    def redraw(self, network: nn.Module) -> None:
        """DCGAN weights anew; Adam's moments and BatchNorm's statistics stay, as in the authors' code."""
        network.apply(dcgan_init)

    def score(self, networks: Networks, images: Tensor) -> Tensor:
        """The score that `score_by` names; by default the mean over the latent of (z - ẑ)², as the authors' code has it."""
        if self.score_by == "latent":
            _, z, z_hat = networks["generator"](images)
            return (z - z_hat).square().flatten(1).mean(1)  # (n, z, 1, 1) → (n,)
        scores = self.scores(networks, images)
        if self.score_by == "combined":
            return networks["calibration"](torch.stack(list(scores.values()), 1)).mean(1)
        return scores[self.score_by]

    def scores(self, networks: Networks, images: Tensor) -> dict[str, Tensor]:
        """All scores but the combined one, `(n,)` each."""
        x_hat, z, z_hat = networks["generator"](images)
        _, features = networks["discriminator"](images)
        _, features_hat = networks["discriminator"](x_hat)
        latent, residual, feature = z - z_hat, images - x_hat, features - features_hat
        parts = (latent.square(), latent.abs(), residual.abs(), residual.square(), feature.square())
        return {name: part.flatten(1).mean(1) for name, part in zip(self.score_names, parts, strict=True)}

    @property
    def calibrates(self) -> bool:
        """Only the combined score needs the scores of held-out normals."""
        return self.score_by == "combined"

    def calibrate(self, networks: Networks, train: list[Tensor], held_out: list[Tensor]) -> None:
        """Mean and deviation of each score on held-out normals."""
        scores = torch.cat([torch.stack(list(self.scores(networks, x).values()), 1) for x in held_out])
        networks["calibration"].fit(scores)  # type: ignore[operator]

    def reconstruct(self, networks: Networks, images: Tensor) -> Tensor:
        """x̂."""
        return networks["generator"](images)[0]

    def anomaly_map(self, networks: Networks, images: Tensor) -> Tensor:
        """|x - x̂|, mean over the channels."""
        return (images - self.reconstruct(networks, images)).abs().mean(1)
