"""DCGAN building blocks shared by the detectors: encoder, decoder, discriminator, and their initialisation.

Module names follow the published GANomaly checkpoints, so those load with a plain `load_state_dict`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import is_parametrized

from ganomaly_plugin.errors import InvalidInput

INIT_STD = 0.02  # DCGAN (1511.06434), section 4
SPECTRAL_IN_PLACE = "spectral normalisation updates its singular vectors in place"  # so that torch maps it over no models


def check_side(side: int) -> None:
    """Raise InvalidInput unless `side` is a positive multiple of 16."""
    if side < 16 or side % 16:
        raise InvalidInput(
            f"Image size must be a multiple of 16 (16, 32, 48, 64, ...), got {side}. Resize the images, "
            f"for example to {max(16, round(side / 16) * 16)}."
        )


def check_square(chw: tuple[int, int, int]) -> None:
    """Raise InvalidInput unless images of `(c, h, w)` are square with a side that the networks can halve."""
    _, height, width = chw
    if height != width:
        raise InvalidInput(f"Images must be square, got {height}×{width}. Crop or pad them first.")
    check_side(height)


def halvings(side: int) -> tuple[int, int]:
    """How often a stride-2 convolution halves `side`, and the side of the map that is left.

    # Differs: the authors' code only terminates for powers of two, where the last map is 4×4. Other multiples of
    # 16 are halved while they are even and larger than 4 (48 → 3×3, 80 → 5×5), and the last kernel covers that map.
    """
    count = 0
    while side > 4 and side % 2 == 0:
        side //= 2
        count += 1
    return count, side


class Encoder(nn.Module):
    """Image `(b, c, s, s)` → code `(b, latent_dim, 1, 1)` by stride-2 convolutions; no biases."""

    def __init__(self, side: int, channels: int, features: int, latent_dim: int, extra_layers: int = 0) -> None:
        super().__init__()
        count, last = halvings(side)
        width = features
        main = nn.Sequential()
        main.add_module(f"initial-conv-{channels}-{width}", nn.Conv2d(channels, width, 4, 2, 1, bias=False))
        main.add_module(f"initial-relu-{width}", nn.LeakyReLU(0.2, inplace=True))
        for k in range(extra_layers):
            main.add_module(f"extra-layers-{k}-{width}-conv", nn.Conv2d(width, width, 3, 1, 1, bias=False))
            main.add_module(f"extra-layers-{k}-{width}-batchnorm", nn.BatchNorm2d(width))
            main.add_module(f"extra-layers-{k}-{width}-relu", nn.LeakyReLU(0.2, inplace=True))
        for _ in range(count - 1):
            main.add_module(f"pyramid-{width}-{2 * width}-conv", nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False))
            width *= 2
            main.add_module(f"pyramid-{width}-batchnorm", nn.BatchNorm2d(width))
            main.add_module(f"pyramid-{width}-relu", nn.LeakyReLU(0.2, inplace=True))
        main.add_module(f"final-{width}-1-conv", nn.Conv2d(width, latent_dim, last, 1, 0, bias=False))
        self.main = main

    def forward(self, images: Tensor) -> Tensor:
        """Codes `(b, latent_dim, 1, 1)` of `images`."""
        return self.main(images)


class Decoder(nn.Module):
    """Code `(b, latent_dim, 1, 1)` → image `(b, c, s, s)` in [-1, 1] by stride-2 transposed convolutions."""

    def __init__(self, side: int, channels: int, features: int, latent_dim: int, extra_layers: int = 0) -> None:
        super().__init__()
        if features < 2:
            raise InvalidInput(f"features must be at least 2 for a decoder, got {features}.")
        count, first = halvings(side)
        width = (features // 2) * 2**count  # the authors halve first: an odd `features` loses one channel here
        main = nn.Sequential()
        main.add_module(f"initial-{latent_dim}-{width}-convt", nn.ConvTranspose2d(latent_dim, width, first, 1, 0, bias=False))
        main.add_module(f"initial-{width}-batchnorm", nn.BatchNorm2d(width))
        main.add_module(f"initial-{width}-relu", nn.ReLU(inplace=True))
        for _ in range(count - 1):
            half = width // 2
            main.add_module(f"pyramid-{width}-{half}-convt", nn.ConvTranspose2d(width, half, 4, 2, 1, bias=False))
            main.add_module(f"pyramid-{half}-batchnorm", nn.BatchNorm2d(half))
            main.add_module(f"pyramid-{half}-relu", nn.ReLU(inplace=True))
            width = half
        for k in range(extra_layers):
            main.add_module(f"extra-layers-{k}-{width}-conv", nn.Conv2d(width, width, 3, 1, 1, bias=False))
            main.add_module(f"extra-layers-{k}-{width}-batchnorm", nn.BatchNorm2d(width))
            main.add_module(f"extra-layers-{k}-{width}-relu", nn.ReLU(inplace=True))
        main.add_module(f"final-{width}-{channels}-convt", nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False))
        main.add_module(f"final-{channels}-tanh", nn.Tanh())
        self.main = main

    def forward(self, z: Tensor) -> Tensor:
        """Images `(b, c, s, s)` of codes `z`."""
        return self.main(z)


class Discriminator(nn.Module):
    """An encoder with one output; returns its logits and the activation just before the last convolution."""

    def __init__(self, side: int, channels: int, features: int, extra_layers: int = 0) -> None:
        super().__init__()
        layers = list(Encoder(side, channels, features, 1, extra_layers).main.children())
        self.features = nn.Sequential(*layers[:-1])
        self.classifier = nn.Sequential(layers[-1])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(b,)` (positive: real) and features `(b, w, 4, 4)` of `images`."""
        features = self.features(images)
        return self.classifier(features).flatten(), features


class Standardiser(nn.Module):
    """Subtracts means and divides by standard deviations that it was given after training, as buffers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("deviation", torch.ones(size))

    mean: Tensor
    deviation: Tensor

    def fit(self, values: Tensor, prior: Tensor | None = None, worth: int = 0) -> None:
        """Take mean and deviation of each column of `values` `(n, size)`; a column that is constant is divided by 1.

        The mean and the variance of `prior` `(m, size)` count in them like those of `worth` more rows.
        """
        mean, variance = values.mean(0), values.var(0, correction=0)
        if prior is not None:
            share = worth / (len(values) + worth)
            mean = torch.lerp(mean, prior.mean(0), share)
            variance = torch.lerp(variance, prior.var(0, correction=0), share)
        deviation = variance.sqrt()
        self.mean.copy_(mean)
        self.deviation.copy_(torch.where(deviation > 1e-6 * self.mean.abs().clamp(min=1e-12), deviation, 1.0))

    def forward(self, values: Tensor) -> Tensor:
        """Standardised `values` `(n, size)`."""
        return (values - self.mean) / self.deviation


def dcgan_init(module: nn.Module) -> None:
    """DCGAN's initialisation of one module, for `Module.apply`: convolutions N(0, 0.02), BatchNorm N(1, 0.02) and 0."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        weight: Any = module.weight
        if is_parametrized(module, "weight"):  # spectral normalisation computes `weight` from this one
            weight = module.parametrizations["weight"].original  # type: ignore[index,union-attr]
        nn.init.normal_(weight, 0.0, INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, INIT_STD)
        nn.init.zeros_(module.bias)


def normalise_spectrally(network: nn.Module) -> None:
    """Divide the weights of all convolutions but the last by their largest singular value, in place (1802.05957)."""
    for layer in [m for m in network.modules() if isinstance(m, nn.Conv2d)][:-1]:
        spectral_norm(layer)


def bce(logits: Tensor, real: bool) -> Tensor:
    """Mean binary cross-entropy of `sigmoid(logits)` against all-real or all-fake; NaN when a logit is.

    As in the authors' code it is torch's BCELoss on probabilities, whose logarithms stop at -100 and whose gradient
    fades for saturated logits. That one refuses NaN with an error (on CUDA it ends the process), hence the detour.
    """
    p = torch.sigmoid(logits)
    diverged = p.isnan()
    target = torch.ones_like(p) if real else torch.zeros_like(p)
    loss = nn.functional.binary_cross_entropy(torch.where(diverged, 0.5, p), target)
    return torch.where(diverged.any(), torch.nan, loss)
