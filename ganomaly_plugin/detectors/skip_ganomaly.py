"""Skip-GANomaly: Akcay, Atapour-Abarghouei, Breckon, IJCNN 2019, arXiv 1901.08954.

The generator is a U-Net that reconstructs the image; the discriminator tells images from reconstructions and lends its
latent f(·) to a feature loss and to the score. Defaults are those of the authors' public code
(github.com/samet-akcay/skip-ganomaly) where it departs from the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ganomaly_plugin.networks import Encoder, bce, check_square, dcgan_init
from ganomaly_plugin.recipe import Networks, Optimiser, Phase, Recipe, Stage, StepInput, at_least, check_adam, check_share

WIDEST = 8  # in multiples of `features`


class UNet(nn.Module):
    """Image `(b, c, s, s)` → reconstruction in [-1, 1], with a skip from each map to the one of its size on the way up."""

    def __init__(self, side: int, channels: int, features: int) -> None:
        super().__init__()
        widths: list[int] = []  # of the maps going down; the last one is 1×1 when `side` is a power of two
        while side % 2 == 0:
            side //= 2
            widths.append(features * min(2 ** len(widths), WIDEST))
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for k, width in enumerate(widths):
            before = widths[k - 1] if k else channels
            layers: list[nn.Module] = [nn.LeakyReLU(0.2)] if k else []
            layers.append(nn.Conv2d(before, width, 4, 2, 1, bias=False))
            if 0 < k < len(widths) - 1:  # none on the first map, nor on the last, which may be a single pixel
                layers.append(nn.BatchNorm2d(width))
            self.downs.append(nn.Sequential(*layers))
        for k in reversed(range(len(widths))):
            inner = widths[k] if k == len(widths) - 1 else 2 * widths[k]  # what came up, and the skip beside it
            if k:
                up = nn.ConvTranspose2d(inner, widths[k - 1], 4, 2, 1, bias=False)
                self.ups.append(nn.Sequential(nn.ReLU(), up, nn.BatchNorm2d(widths[k - 1])))
            else:
                self.ups.append(nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(inner, channels, 4, 2, 1), nn.Tanh()))

    def forward(self, x: Tensor) -> Tensor:
        """Reconstructions of `x`."""
        maps = [x]
        for down in self.downs:
            maps.append(down(maps[-1]))
        h = self.ups[0](maps[-1])
        for up, skip in zip(list(self.ups)[1:], maps[-2:0:-1], strict=True):
            h = up(torch.cat([skip, h], dim=1))
        return h


class LatentDiscriminator(nn.Module):
    """A DCGAN encoder whose code is the feature f(·), and a linear classifier on it.

    # Differs: the authors' classifier is a 3×3 convolution with padding on a 1×1 map, where only its centre sees
    anything but zeros; a 1×1 convolution computes the same with a ninth of the weights.
    """

    def __init__(self, side: int, channels: int, features: int, latent_dim: int) -> None:
        super().__init__()
        self.features = Encoder(side, channels, features, latent_dim)
        self.classifier = nn.Conv2d(latent_dim, 1, 1, bias=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(b,)` (positive: real) and features `(b, latent_dim, 1, 1)` of `images`."""
        features = self.features(images)
        return self.classifier(features).flatten(), features


@dataclass(frozen=True)
class SkipGanomalyRecipe(Recipe):
    """Skip-GANomaly's networks, losses and score.

    Args:
        features: Channels after the first convolution, in both networks.
        latent_dim: Length of the discriminator's feature f.
        w_adv, w_con, w_lat: Weights of the adversarial, contextual and latent loss: 1, 50, 1 in the authors'
            code; the paper has w_con 40.
        w_lat_discriminator: Weight of the latent loss in the discriminator's own loss: 1 in the authors' code, which
            lets D lower it too; 0 in the paper.
        w_image: Share λ of the image error in the score; the rest is the feature error.
        lr, betas: Adam's, for both networks.
        redraw_below: D's weights are drawn anew when its loss falls under this (the authors' code); 0 never.
    """

    features: int = 64
    latent_dim: int = 100
    w_adv: float = 1.0
    w_con: float = 50.0
    w_lat: float = 1.0
    w_lat_discriminator: float = 1.0
    w_image: float = 0.9
    lr: float = 2e-4
    betas: tuple[float, float] = (0.5, 0.999)
    redraw_below: float = 1e-5

    conformance_hparams: ClassVar[dict[str, Any]] = {"features": 4, "latent_dim": 8, "batch_size": 8, "lr": 2e-3}

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(features=(self.features, 1), latent_dim=(self.latent_dim, 1), redraw_below=(self.redraw_below, 0))
        at_least(w_adv=(self.w_adv, 0), w_con=(self.w_con, 0), w_lat=(self.w_lat, 0))
        at_least(w_lat_discriminator=(self.w_lat_discriminator, 0))
        check_share("w_image", self.w_image)
        check_adam(self.lr, self.betas)

    def build(self, chw: tuple[int, int, int]) -> dict[str, nn.Module]:
        """`generator` and `discriminator` for square images whose side is a multiple of 16."""
        check_square(chw)
        channels, side, _ = chw
        generator = UNet(side, channels, self.features)
        discriminator = LatentDiscriminator(side, channels, self.features, self.latent_dim)
        return {"generator": generator.apply(dcgan_init), "discriminator": discriminator.apply(dcgan_init)}

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
        # Differs: the authors run D on x̂ once more for D's loss; one pass gives the same gradients.
        x = step.images
        x_hat = networks["generator"](x)
        logits_real, features_real = networks["discriminator"](x)
        logits_fake, features_fake = networks["discriminator"](x_hat)
        adv = bce(logits_fake, real=True)  # "adversarial loss", section III, in its non-saturating form
        con = (x - x_hat).abs().mean()  # "contextual loss"
        lat = (features_real - features_fake).square().mean()  # "latent loss", as the authors' mean of squares
        total = self.w_adv * adv + self.w_con * con + self.w_lat * lat
        computed = {"adversarial": adv, "contextual": con, "latent": lat, "generator": total}
        return total, computed | {"logits_real": logits_real, "logits_fake": logits_fake}

    def _discriminator_phase(self, networks: Networks, step: StepInput) -> tuple[Tensor, dict[str, Tensor]]:
        earlier = step.earlier
        loss = bce(earlier["logits_real"], real=True) + bce(earlier["logits_fake"], real=False)
        loss = loss + self.w_lat_discriminator * self.w_lat * earlier["latent"]
        return loss, {"discriminator": loss}

    def redraw(self, network: nn.Module) -> None:
        """DCGAN weights anew; Adam's moments and BatchNorm's statistics stay, as in the authors' code."""
        network.apply(dcgan_init)

    def score(self, networks: Networks, images: Tensor) -> Tensor:
        """λ·mean (x - x̂)² + (1 - λ)·mean (f(x) - f(x̂))², over one image's elements (section III, with λ = `w_image`)."""
        x_hat = networks["generator"](images)
        _, features_real = networks["discriminator"](images)
        _, features_fake = networks["discriminator"](x_hat)
        image_error = (images - x_hat).square().flatten(1).mean(1)
        feature_error = (features_real - features_fake).square().flatten(1).mean(1)
        return self.w_image * image_error + (1 - self.w_image) * feature_error

    def reconstruct(self, networks: Networks, images: Tensor) -> Tensor:
        """x̂."""
        return networks["generator"](images)

    def anomaly_map(self, networks: Networks, images: Tensor) -> Tensor:
        """(x - x̂)², mean over the channels."""
        return (images - self.reconstruct(networks, images)).square().mean(1)
