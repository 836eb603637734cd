"""Recipes whose networks are not plain functions of their own weights: for tests of stacks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ganomaly_plugin.detectors.ae import AutoencoderRecipe


class Centre(nn.Module):
    """An encoder that keeps a running mean of its codes, by assignment."""

    def __init__(self, encoder: nn.Module, length: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("centre", torch.zeros(length))

    def forward(self, x):
        z = self.encoder(x)
        if self.training:
            self.centre = 0.9 * self.centre + 0.1 * z.detach().flatten(1).mean(0)
        return z


@dataclass(frozen=True)
class Centred(AutoencoderRecipe):
    """Scores the distance from a buffer that training replaces, and does not change in place."""

    def build(self, chw):
        networks = super().build(chw)
        return {**networks, "encoder": Centre(networks["encoder"], self.latent_dim)}

    def score(self, networks, images):
        return (networks["encoder"](images).flatten(1) - networks["encoder"].centre).square().mean(1)


class Projection(nn.Module):
    """Noise that is added to images: another in each model, and not in its `state_dict`."""

    def __init__(self, encoder: nn.Module, chw: tuple[int, int, int]) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("noise", torch.randn(chw), persistent=False)

    def forward(self, x):
        return self.encoder(x + self.noise)


@dataclass(frozen=True)
class Projected(AutoencoderRecipe):
    """Draws a buffer that is not saved."""

    def build(self, chw):
        networks = super().build(chw)
        return {**networks, "encoder": Projection(networks["encoder"], chw)}


@dataclass(frozen=True)
class Drawing(AutoencoderRecipe):
    """Draws from torch's own generator in scoring."""

    def score(self, networks, images):
        return super().score(networks, images) * (1 + torch.rand(len(images), device=images.device))


@dataclass(frozen=True)
class Silent(AutoencoderRecipe):
    """Has no losses to show."""

    def _phase(self, networks, step):
        return super()._phase(networks, step)[0], {}


@dataclass(frozen=True)
class Large(AutoencoderRecipe):
    """Has no room where models are mapped."""

    def _phase(self, networks, step):
        if torch._C._functorch.is_batchedtensor(step.images):
            raise torch.OutOfMemoryError("no room for patches")
        return super()._phase(networks, step)


@dataclass(frozen=True)
class Dropped(AutoencoderRecipe):
    """Draws from torch's own generator in training."""

    def build(self, chw):
        networks = super().build(chw)
        return {**networks, "encoder": nn.Sequential(nn.Dropout(0.3), networks["encoder"])}


@dataclass(frozen=True)
class Spectral(AutoencoderRecipe):
    """Has a tensor that is no leaf, so that its networks cannot be copied after a step."""

    def build(self, chw):
        networks = super().build(chw)
        first = nn.utils.spectral_norm(nn.Conv2d(chw[0], chw[0], 3, padding=1))
        return {**networks, "encoder": nn.Sequential(first, networks["encoder"])}


@dataclass(frozen=True)
class Tied(AutoencoderRecipe):
    """Has one layer under two names."""

    def build(self, chw):
        networks, twice = super().build(chw), nn.Conv2d(chw[0], chw[0], 3, padding=1)
        return {"encoder": nn.Sequential(twice, networks["encoder"]), "decoder": nn.Sequential(networks["decoder"], twice)}


@dataclass(frozen=True)
class Frozen(AutoencoderRecipe):
    """Has a layer that is not trained."""

    def build(self, chw):
        networks, first = super().build(chw), nn.Conv2d(chw[0], chw[0], 3, padding=1).requires_grad_(False)
        return {**networks, "encoder": nn.Sequential(first, networks["encoder"])}


class LateNoise(nn.Module):
    """An encoder that draws from NumPy's global generator, from its third call in training on."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.calls = encoder, 0

    def forward(self, x):
        self.calls += self.training
        return self.encoder(x) * (1 + 0.1 * np.random.randn() * (self.training and self.calls > 2))  # noqa: NPY002


@dataclass(frozen=True)
class Late(AutoencoderRecipe):
    """Draws, and not from torch, once training is on its way."""

    def build(self, chw):
        networks = super().build(chw)
        return {**networks, "encoder": LateNoise(networks["encoder"])}


@dataclass(frozen=True)
class Scattered(AutoencoderRecipe):
    """Weighs the pixels by numbers that it draws when it is calibrated."""

    calibrates = True

    def build(self, chw):
        weights = nn.Module()
        weights.register_buffer("of_pixels", torch.zeros(chw))
        return {**super().build(chw), "weights": weights}

    def calibrate(self, networks, train, held_out):
        networks["weights"].of_pixels.copy_(torch.rand(networks["weights"].of_pixels.shape))

    def score(self, networks, images):
        apart = (images - self.reconstruct(networks, images)).abs()
        return (apart * networks["weights"].of_pixels).flatten(1).mean(1)


@dataclass(frozen=True)
class Named(AutoencoderRecipe):
    """Hands its images to a convolution by name."""

    def build(self, chw):
        return {**super().build(chw), "first": nn.Conv2d(chw[0], 1, 3, padding=1)}

    def score(self, networks, images):
        first = networks["first"]
        return nn.functional.conv2d(input=images, weight=first.weight, bias=first.bias, padding=1).flatten(1).mean(1)


class Hiding(nn.Module):
    """An encoder behind a layer that no module knows of, since it is in a list."""

    def __init__(self, encoder: nn.Module, channels: int) -> None:
        super().__init__()
        self.encoder, self.before = encoder, [nn.Conv2d(channels, channels, 3, padding=1).requires_grad_(False)]

    def forward(self, x):
        return self.encoder(self.before[0](x))


@dataclass(frozen=True)
class Hidden(AutoencoderRecipe):
    """Draws what is neither parameter nor buffer."""

    def build(self, chw):
        networks = super().build(chw)
        return {**networks, "encoder": Hiding(networks["encoder"], chw[0])}
