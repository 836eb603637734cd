"""EGBAD, a BiGAN that scores by reconstruction: Zenati, Foo, Lecouat, Manek, Chandrasekhar, 2018, arXiv 1802.06222.

Encoder E, generator G and a discriminator D of pairs: (x, E(x)) is to be told from (G(z), z), and f(x, z) is D's
activation before its last layer. Defaults are the paper's for MNIST, details those of the authors' public code
(github.com/houssamzenati/Efficient-GAN-Anomaly-Detection).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ganomaly_plugin.networks import Decoder, Discriminator, Encoder, check_square, dcgan_init, halvings
from ganomaly_plugin.recipe import Networks, Optimiser, Phase, Recipe, Stage, StepInput, at_least, check_adam, check_share


class PairDiscriminator(nn.Module):
    """Tells pairs of an image and a code apart: convolutions on x, a layer on z, a layer on both, and a logit.

    # Differs: on x it has DCGAN's convolutions (64, 128, 256 at 32×32) for the authors' two of 64, slope 0.2 for 0.1,
    and nowhere their dropout of ½: D's randomness would need masks of each map's size for every pass of a step.
    """

    def __init__(self, side: int, channels: int, features: int, latent_dim: int, joint_features: int) -> None:
        super().__init__()
        count, last = halvings(side)
        width = features * 2 ** (count - 1)
        self.image = Discriminator(side, channels, features).features  # (b, c, s, s) → (b, width, last, last)
        on_code = max(1, joint_features // 2)
        self.code = nn.Sequential(nn.Conv2d(latent_dim, on_code, 1), nn.LeakyReLU(0.2))
        self.joint = nn.Sequential(nn.Conv2d(width * last**2 + on_code, joint_features, 1), nn.LeakyReLU(0.2))
        self.classifier = nn.Conv2d(joint_features, 1, 1)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(b,)` (positive: a real image with its code) and features f `(b, joint_features, 1, 1)`."""
        image = self.image(x).flatten(1)[:, :, None, None]
        features = self.joint(torch.cat([image, self.code(z)], dim=1))
        return self.classifier(features).flatten(), features


def cross_entropy(logits: Tensor, real: bool) -> Tensor:
    """Mean cross-entropy of `logits` against all-real or all-fake; unlike `networks.bce` it never saturates."""
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))


def pair_loss(logits_image: Tensor, logits_sample: Tensor) -> Tensor:
    """-V(D, E, G) of the paper's section 3, to be minimised by D: pairs (x, E(x)) are real, pairs (G(z), z) are fake."""
    return cross_entropy(logits_image, real=True) + cross_entropy(logits_sample, real=False)


def fooling_loss(logits_image: Tensor, logits_sample: Tensor) -> Tensor:
    """The non-saturating loss of the authors' code for E (first term) and G (second): `pair_loss`, labels swapped."""
    return cross_entropy(logits_image, real=False) + cross_entropy(logits_sample, real=True)


@dataclass(frozen=True)
class EgbadRecipe(Recipe):
    """EGBAD's networks, losses and score.

    Args:
        features: Channels after the first convolution.
        latent_dim: Length of z.
        joint_features: Length of f; D's layer on z is half as wide.
        w_feature: Weight w of the feature error in the score; the image error has 1 - w.
        lr, betas: Adam's, for all networks.
        ema_decay: Decay of the moving average of the weights that score; None scores with the trained weights.
    """

    batch_size: int = 100
    features: int = 64
    latent_dim: int = 200
    joint_features: int = 1024
    w_feature: float = 0.1
    lr: float = 1e-5
    betas: tuple[float, float] = (0.5, 0.999)
    # Differs: the authors average the weights only; the trainer averages BatchNorm's statistics with them.
    ema_decay: float | None = 0.999

    default_epochs: ClassVar[int] = 100
    conformance_hparams: ClassVar[dict[str, Any]] = {
        "features": 4,
        "latent_dim": 8,
        "joint_features": 32,
        "batch_size": 8,
        "lr": 2e-3,
        "ema_decay": 0.9,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(features=(self.features, 2), latent_dim=(self.latent_dim, 1), joint_features=(self.joint_features, 1))
        check_share("w_feature", self.w_feature)
        check_adam(self.lr, self.betas)

    def build(self, chw: tuple[int, int, int]) -> dict[str, nn.Module]:
        """`encoder`, `generator` and `discriminator`.

        # Differs: the authors' encoder and generator are for 28×28 (3×3 convolutions of 32, 64, 128; dense layers of
        1024 and 7·7·128); here they are DCGAN's, for any side. BatchNorm's epsilon and momentum are torch's (1e-5, 0.1), the
        authors' TensorFlow's (1e-3, 0.01).
        """
        check_square(chw)
        channels, side, _ = chw
        networks = {
            "encoder": Encoder(side, channels, self.features, self.latent_dim),
            "generator": Decoder(side, channels, self.features, self.latent_dim),
            "discriminator": PairDiscriminator(side, channels, self.features, self.latent_dim, self.joint_features),
        }
        return {name: network.apply(dcgan_init) for name, network in networks.items()}

    @property
    def stages(self) -> tuple[Stage, ...]:
        """One stage: D, then E and G against the D so updated, as in the authors' loop."""
        adam = Optimiser(self.lr, self.betas)
        discriminator = Phase("discriminator", ("discriminator",), self._discriminator_phase, adam)
        # E's loss does not move G nor G's E, and Adam treats each weight alone: one phase does for their two optimisers.
        generator = Phase("generator", ("encoder", "generator"), self._generator_phase, adam)
        return (Stage("train", (discriminator, generator)),)

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """`z`, codes from the prior N(0, 1)."""
        return {"z": torch.randn(n, self.latent_dim, 1, 1, generator=generator)}

    def _discriminator_phase(self, networks: Networks, step: StepInput) -> tuple[Tensor, dict[str, Tensor]]:
        # Differs: E(x) and G(z) serve both phases of a step; the authors draw a new z, and images of another shuffle,
        # for the second one.
        z_hat, x_hat = networks["encoder"](step.images), networks["generator"](step.draws["z"])
        logits_image, _ = networks["discriminator"](step.images, z_hat.detach())
        logits_sample, _ = networks["discriminator"](x_hat.detach(), step.draws["z"])
        loss = pair_loss(logits_image, logits_sample)
        return loss, {"discriminator": loss, "z_hat": z_hat, "x_hat": x_hat}

    def _generator_phase(self, networks: Networks, step: StepInput) -> tuple[Tensor, dict[str, Tensor]]:
        logits_image, _ = networks["discriminator"](step.images, step.earlier["z_hat"])
        logits_sample, _ = networks["discriminator"](step.earlier["x_hat"], step.draws["z"])
        loss = fooling_loss(logits_image, logits_sample)
        return loss, {"generator": loss}

    def score(self, networks: Networks, images: Tensor) -> Tensor:
        """(1 - w)·‖x - G(E(x))‖₁ + w·‖f(x, E(x)) - f(G(E(x)), E(x))‖₁, the paper's A(x) with feature matching."""
        z_hat = networks["encoder"](images)
        x_hat = networks["generator"](z_hat)
        _, features_image = networks["discriminator"](images, z_hat)
        _, features_reconstruction = networks["discriminator"](x_hat, z_hat)
        image_error = (images - x_hat).abs().flatten(1).sum(1)
        feature_error = (features_image - features_reconstruction).abs().flatten(1).sum(1)
        return (1 - self.w_feature) * image_error + self.w_feature * feature_error

    def reconstruct(self, networks: Networks, images: Tensor) -> Tensor:
        """G(E(x))."""
        return networks["generator"](networks["encoder"](images))

    def anomaly_map(self, networks: Networks, images: Tensor) -> Tensor:
        """|x - G(E(x))|, mean over the channels."""
        return (images - self.reconstruct(networks, images)).abs().mean(1)
