"""A plain convolutional autoencoder: GANomaly's first encoder and decoder, without the adversary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from ganomaly_plugin.networks import Decoder, Encoder, check_square, dcgan_init
from ganomaly_plugin.recipe import Networks, Optimiser, Phase, Recipe, Stage, StepInput, at_least, check_adam


@dataclass(frozen=True)
class AutoencoderRecipe(Recipe):
    """DCGAN encoder and decoder, trained on and scored by their reconstruction error.

    Args:
        features: Channels after the first convolution.
        latent_dim: Length of the code.
        extra_layers: 3×3 convolutions at half resolution, in each network.
        loss: "l1" (mean absolute error, GANomaly's contextual loss) or "mse"; also the score.
        lr, betas: Adam's.
    """

    features: int = 64
    latent_dim: int = 100
    extra_layers: int = 0
    loss: Literal["l1", "mse"] = "l1"
    lr: float = 2e-4
    betas: tuple[float, float] = (0.5, 0.999)

    conformance_hparams: ClassVar[dict[str, Any]] = {"features": 4, "latent_dim": 8, "batch_size": 8, "lr": 2e-3}

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(features=(self.features, 2), latent_dim=(self.latent_dim, 1), extra_layers=(self.extra_layers, 0))
        check_adam(self.lr, self.betas)

    def build(self, chw: tuple[int, int, int]) -> dict[str, nn.Module]:
        """`encoder` and `decoder` for square images whose side is a multiple of 16."""
        check_square(chw)
        channels, side, _ = chw
        encoder = Encoder(side, channels, self.features, self.latent_dim, self.extra_layers)
        decoder = Decoder(side, channels, self.features, self.latent_dim, self.extra_layers)
        return {"encoder": encoder.apply(dcgan_init), "decoder": decoder.apply(dcgan_init)}

    @property
    def stages(self) -> tuple[Stage, ...]:
        """One stage of one phase."""
        phase = Phase("autoencoder", ("encoder", "decoder"), self._phase, Optimiser(self.lr, self.betas))
        return (Stage("train", (phase,)),)

    def _phase(self, networks: Networks, step: StepInput) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self._error(networks, step.images).mean()
        return loss, {"reconstruction": loss}

    def _error(self, networks: Networks, images: Tensor) -> Tensor:
        difference = images - networks["decoder"](networks["encoder"](images))
        return difference.abs() if self.loss == "l1" else difference.square()

    def score(self, networks: Networks, images: Tensor) -> Tensor:
        """Mean reconstruction error of each image."""
        return self._error(networks, images).flatten(1).mean(1)

    def reconstruct(self, networks: Networks, images: Tensor) -> Tensor:
        """The decoded code."""
        return networks["decoder"](networks["encoder"](images))

    def anomaly_map(self, networks: Networks, images: Tensor) -> Tensor:
        """Reconstruction error, mean over the channels."""
        return self._error(networks, images).mean(1)
