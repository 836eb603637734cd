"""Recipes whose networks are not plain functions of their own weights: for tests of stacks."""

from __future__ import annotations

from dataclasses import dataclass

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
