"""ALAD: Zenati, Romain, Foo, Lecouat, Chandrasekhar, ICDM 2018, arXiv 1812.02288.

EGBAD's bidirectional GAN with two more discriminators: D_xx tells (x, x) from (x, G(E(x))) and D_zz tells (z, z) from
(z, E(G(z))), which pulls E and G towards being inverses. D_xx's features score. Defaults and details are those of the
authors' public code for CIFAR-10 (github.com/houssamzenati/Adversarially-Learned-Anomaly-Detection).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ganomaly_plugin.detectors.egbad import PairDiscriminator, cross_entropy, fooling_loss, pair_loss
from ganomaly_plugin.networks import SPECTRAL_IN_PLACE, Decoder, Encoder, check_square, dcgan_init, normalise_spectrally
from ganomaly_plugin.recipe import Networks, Optimiser, Phase, Recipe, Stage, StepInput, at_least, check_adam


class ImagePairDiscriminator(nn.Module):
    """D_xx: two 5×5 convolutions on a pair of images, and a logit; its features are what ALAD scores with.

    # Differs: the images are stacked as channels. The authors' code joins them along axis 1 of (n, h, w, c), the
    height, so that a convolution hardly ever sees both. Their dropout of 0.2 is left out, as in `PairDiscriminator`.
    """

    def __init__(self, side: int, channels: int, features: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2 * channels, features, 5, 2, 2),
            nn.LeakyReLU(0.2),
            nn.Conv2d(features, 2 * features, 5, 2, 2),
            nn.LeakyReLU(0.2),
        )
        self.classifier = nn.Conv2d(2 * features, 1, side // 4)

    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(b,)` (positive: `other` is x itself) and features `(b, 2·features, s/4, s/4)`."""
        features = self.features(torch.cat([x, other], dim=1))
        return self.classifier(features).flatten(), features


class CodePairDiscriminator(nn.Module):
    """D_zz: layers of 64 and 32 on a pair of codes, and a logit."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2 * latent_dim, 64, 1), nn.LeakyReLU(0.2), nn.Conv2d(64, 32, 1), nn.LeakyReLU(0.2)
        )
        self.classifier = nn.Conv2d(32, 1, 1)

    def forward(self, z: Tensor, other: Tensor) -> Tensor:
        """Logits `(b,)`; positive: `other` is z itself."""
        return self.classifier(self.features(torch.cat([z, other], dim=1))).flatten()


@dataclass(frozen=True)
class AladRecipe(Recipe):
    """ALAD's networks, losses and score.

    # Differs: 100 epochs; the authors' code leaves the number to the user, and can stop early by the score of held-out images.

    Args:
        features: Channels after the first convolution of E, G and D_xz; D_xx has half as many (authors: 128 and 64).
        latent_dim: Length of z.
        joint_features: Length of D_xz's last hidden layer.
        spectral: Whether E and the discriminators are normalised spectrally, their last layers excepted.
        lr, betas: Adam's, for all networks.
        ema_decay: Decay of the moving average of the weights that score; None scores with the trained weights.
    """

    batch_size: int = 32
    features: int = 128
    latent_dim: int = 100
    joint_features: int = 1024
    spectral: bool = True
    lr: float = 2e-4
    betas: tuple[float, float] = (0.5, 0.999)
    # Differs: the authors average the weights only; the trainer averages BatchNorm's statistics and the spectral
    # norm's singular vectors with them.
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
        check_adam(self.lr, self.betas)

    def build(self, chw: tuple[int, int, int]) -> dict[str, nn.Module]:
        """`encoder`, `generator`, `d_xz`, `d_xx` and `d_zz`.

        # Differs: the first convolution of DCGAN's encoder has no BatchNorm, the authors' has one; D_xz has one layer on z,
        the authors' two; weights start from N(0, 0.02), the authors' from N(0, 0.01); BatchNorm's epsilon and momentum are
        torch's (1e-5, 0.1), the authors' TensorFlow's (1e-3, 0.01).
        """
        check_square(chw)
        channels, side, _ = chw
        networks = {
            "encoder": Encoder(side, channels, self.features, self.latent_dim),
            "generator": Decoder(side, channels, self.features, self.latent_dim),
            "d_xz": PairDiscriminator(side, channels, self.features, self.latent_dim, self.joint_features),
            "d_xx": ImagePairDiscriminator(side, channels, max(1, self.features // 2)),
            "d_zz": CodePairDiscriminator(self.latent_dim),
        }
        for name, network in networks.items():
            network.apply(dcgan_init)
            if self.spectral and name != "generator":
                normalise_spectrally(network)
        return networks

    @property
    def unstackable(self) -> str | None:
        """Spectral normalisation iterates on singular vectors in place, which torch does not map over models."""
        return SPECTRAL_IN_PLACE if self.spectral else None

    @property
    def stages(self) -> tuple[Stage, ...]:
        """One stage: the three discriminators, then E and G against them so updated, as in the authors' loop."""
        adam = Optimiser(self.lr, self.betas)
        discriminators = Phase("discriminators", ("d_xz", "d_xx", "d_zz"), self._discriminators_phase, adam)
        generator = Phase("generator", ("encoder", "generator"), self._generator_phase, adam)
        return (Stage("train", (discriminators, generator)),)

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """`z`, codes from the prior N(0, 1)."""
        return {"z": torch.randn(n, self.latent_dim, 1, 1, generator=generator)}

    def _discriminators_phase(self, networks: Networks, step: StepInput) -> tuple[Tensor, dict[str, Tensor]]:
        # Differs: the codes and images made here serve both phases of a step, as in EGBAD.
        x, z = step.images, step.draws["z"]
        z_hat, x_sample = networks["encoder"](x), networks["generator"](z)
        x_hat, z_cycle = networks["generator"](z_hat), networks["encoder"](x_sample)
        logits_image, _ = networks["d_xz"](x, z_hat.detach())
        logits_sample, _ = networks["d_xz"](x_sample.detach(), z)
        xz = pair_loss(logits_image, logits_sample)  # V(D_xz, E, G), section III
        xx = pair_loss(networks["d_xx"](x, x)[0], networks["d_xx"](x, x_hat.detach())[0])  # V(D_xx, E, G)
        zz = pair_loss(networks["d_zz"](z, z), networks["d_zz"](z, z_cycle.detach()))  # V(D_zz, E, G)
        made = {"z_hat": z_hat, "x_sample": x_sample, "x_hat": x_hat, "z_cycle": z_cycle}
        return xz + xx + zz, {"d_xz": xz, "d_xx": xx, "d_zz": zz, **made}

    def _generator_phase(self, networks: Networks, step: StepInput) -> tuple[Tensor, dict[str, Tensor]]:
        x, z, made = step.images, step.draws["z"], step.earlier
        logits_image, _ = networks["d_xz"](x, made["z_hat"])
        logits_sample, _ = networks["d_xz"](made["x_sample"], z)
        xz = fooling_loss(logits_image, logits_sample)
        # The authors' cycle losses also hold the terms of (x, x) and (z, z), which no weight of E or G changes.
        cycle_x = cross_entropy(networks["d_xx"](x, made["x_hat"])[0], real=True)
        cycle_z = cross_entropy(networks["d_zz"](z, made["z_cycle"]), real=True)
        total = xz + cycle_x + cycle_z
        return total, {"adversarial": xz, "cycle_x": cycle_x, "cycle_z": cycle_z, "generator": total}

    def score(self, networks: Networks, images: Tensor) -> Tensor:
        """‖f_xx(x, x) - f_xx(x, G(E(x)))‖₁, the paper's A(x) of section III."""
        x_hat = networks["generator"](networks["encoder"](images))
        _, features_same = networks["d_xx"](images, images)
        _, features_other = networks["d_xx"](images, x_hat)
        return (features_same - features_other).abs().flatten(1).sum(1)

    def reconstruct(self, networks: Networks, images: Tensor) -> Tensor:
        """G(E(x))."""
        return networks["generator"](networks["encoder"](images))

    def anomaly_map(self, networks: Networks, images: Tensor) -> Tensor:
        """|x - G(E(x))|, mean over the channels."""
        return (images - self.reconstruct(networks, images)).abs().mean(1)
