"""A convolutional variational autoencoder: Kingma and Welling, arXiv 1312.6114, on DCGAN blocks.

The likelihood, its width and the budget are those of the published one-class-anomalous MNIST numbers (Tonnaer,
"Anomaly detection with VAEs", PhD thesis, TU Eindhoven, chapter 3): a Gaussian of variance ½ around the decoder's
output, pixels in [0, 1], beta 1, 50 epochs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.networks import Decoder, Encoder, check_square, dcgan_init
from ganomaly_plugin.recipe import Networks, Optimiser, Phase, Recipe, Stage, StepInput, at_least, check_adam

EPSILON = 1e-6  # keeps the logarithms of saturated pixels finite


class BiasedDecoder(Decoder):
    """DCGAN's decoder with biases for BatchNorm, in torch's own initialisation.

    # Differs: a VAE's decoder must be able to ignore the parts of z that tell nothing of the image. BatchNorm undoes
    every shrinking of their weights, and then the posterior's mean, which varies less than the samples that the
    decoder was trained on, decodes to something that no sample decodes to.
    """

    def __init__(self, side: int, channels: int, features: int, latent_dim: int, extra_layers: int = 0) -> None:
        super().__init__(side, channels, features, latent_dim, extra_layers)
        layers = [layer for layer in self.main if not isinstance(layer, nn.BatchNorm2d)]
        self.main = nn.Sequential(*map(with_bias, layers))


def with_bias(layer: nn.Module) -> nn.Module:
    """A fresh convolution like `layer` with a bias; other layers as they are."""
    if not isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        return layer
    sizes: tuple[Any, ...] = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
    return type(layer)(*sizes)


def gaussian_loss(x: Tensor, x_hat: Tensor, sigma: float) -> Tensor:
    """-log N(x; x̂, σ²) of each pixel, without its constant log(σ√(2π)); 1312.6114, appendix C.2."""
    return (x - x_hat).square() / (2 * sigma**2)


def bernoulli_loss(x: Tensor, x_hat: Tensor) -> Tensor:
    """Cross-entropy of each pixel's brightness in [0, 1] with the probability x̂; 1312.6114, appendix C.1."""
    p = x_hat.clamp(EPSILON, 1 - EPSILON)
    return -(x * p.log() + (1 - x) * (1 - p).log())


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL of N(mean, variance) from N(0, 1), summed over the latent, `(b,)`; 1312.6114, eq. 10 and appendix B."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)


def sample_posterior(mean: Tensor, log_variance: Tensor, epsilon: Tensor) -> Tensor:
    """A code z = mean + standard deviation · epsilon, the reparameterisation of 1312.6114, section 2.4."""
    return mean + (0.5 * log_variance).exp() * epsilon


@dataclass(frozen=True)
class VaeRecipe(Recipe):
    """A VAE's networks, its negative evidence lower bound, and two scores from it.

    # Differs: the thesis has VGG-like blocks with max-pooling (28×28, 32 and 64 filters, 64 hidden units); here it is
    the DCGAN encoder and decoder that GANomaly and the autoencoder of this package have, so that they compare.

    Args:
        features: Channels after the first convolution.
        latent_dim: Length of z; the published MNIST numbers are for 2 and for 32.
        extra_layers: 3×3 convolutions at half resolution, in each network.
        likelihood: "gaussian" (squared error) or "bernoulli" (cross-entropy of the brightness).
        sigma: Standard deviation of the Gaussian, where black is 0 and white is 1; √½ weighs the squared error by 1.
        beta: Weight of the KL term; 1 is the evidence lower bound.
        score_by: "reconstruction" (the likelihood's loss, summed over the pixels) or "elbo" (plus beta times the KL, as the
            thesis scores).
        lr, betas: Adam's.
    """

    features: int = 64
    latent_dim: int = 100
    extra_layers: int = 0
    likelihood: Literal["gaussian", "bernoulli"] = "gaussian"
    sigma: float = math.sqrt(0.5)
    beta: float = 1.0
    score_by: Literal["reconstruction", "elbo"] = "reconstruction"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)

    default_epochs: ClassVar[int] = 50
    conformance_hparams: ClassVar[dict[str, Any]] = {"features": 4, "latent_dim": 8, "batch_size": 8}

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(features=(self.features, 2), latent_dim=(self.latent_dim, 1), extra_layers=(self.extra_layers, 0))
        at_least(beta=(self.beta, 0))
        if not self.sigma > 0:
            raise InvalidInput(f"sigma must be positive, got {self.sigma}.")
        check_adam(self.lr, self.betas)

    def build(self, chw: tuple[int, int, int]) -> dict[str, nn.Module]:
        """`encoder` (mean and log-variance, stacked as channels) and `decoder`."""
        check_square(chw)
        channels, side, _ = chw
        encoder = Encoder(side, channels, self.features, 2 * self.latent_dim, self.extra_layers)
        decoder = BiasedDecoder(side, channels, self.features, self.latent_dim, self.extra_layers)
        return {"encoder": encoder.apply(dcgan_init), "decoder": decoder}

    @property
    def stages(self) -> tuple[Stage, ...]:
        """One stage of one phase."""
        phase = Phase("vae", ("encoder", "decoder"), self._phase, Optimiser(self.lr, self.betas))
        return (Stage("train", (phase,)),)

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """`epsilon`, the noise of the posterior's one sample an image."""
        return {"epsilon": torch.randn(n, self.latent_dim, 1, 1, generator=generator)}

    def _phase(self, networks: Networks, step: StepInput) -> tuple[Tensor, dict[str, Tensor]]:
        mean, log_variance = networks["encoder"](step.images).chunk(2, dim=1)
        z = sample_posterior(mean, log_variance, step.draws["epsilon"])
        # The sums over pixels and latent are the bound; a mean of either would be another beta. 1312.6114, eq. 10.
        reconstruction = self._loss_of_pixels(step.images, networks["decoder"](z)).flatten(1).sum(1).mean()
        kl = kl_divergence(mean, log_variance).mean()
        negative_elbo = reconstruction + self.beta * kl
        return negative_elbo, {"reconstruction": reconstruction, "kl": kl, "negative_elbo": negative_elbo}

    def _loss_of_pixels(self, images: Tensor, decoded: Tensor) -> Tensor:
        low, high = self.input_range
        x, x_hat = (images - low) / (high - low), (decoded + 1) / 2  # the decoder ends in tanh; both in [0, 1]
        return gaussian_loss(x, x_hat, self.sigma) if self.likelihood == "gaussian" else bernoulli_loss(x, x_hat)

    def score(self, networks: Networks, images: Tensor) -> Tensor:
        """Reconstruction loss of each image, or its negative evidence lower bound.

        # Differs: the thesis averages the bound over 128 samples of the posterior. Here the posterior's mean is
        decoded: a score is then the same each time, and no random number is shared by the images of a batch.
        """
        mean, log_variance = networks["encoder"](images).chunk(2, dim=1)
        reconstruction = self._loss_of_pixels(images, networks["decoder"](mean)).flatten(1).sum(1)
        if self.score_by == "reconstruction":
            return reconstruction
        return reconstruction + self.beta * kl_divergence(mean, log_variance)

    def reconstruct(self, networks: Networks, images: Tensor) -> Tensor:
        """The decoded mean of the posterior."""
        low, high = self.input_range
        mean, _ = networks["encoder"](images).chunk(2, dim=1)
        return (networks["decoder"](mean) + 1) * ((high - low) / 2) + low

    def anomaly_map(self, networks: Networks, images: Tensor) -> Tensor:
        """The reconstruction loss of each pixel, mean over the channels."""
        mean, _ = networks["encoder"](images).chunk(2, dim=1)
        return self._loss_of_pixels(images, networks["decoder"](mean)).mean(1)
