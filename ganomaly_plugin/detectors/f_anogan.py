"""f-AnoGAN: Schlegl, Seeböck, Waldstein, Langs, Schmidt-Erfurth, Medical Image Analysis 54, 2019.

First a WGAN-GP (Gulrajani et al., arXiv 1704.00028) learns normal images; then, with generator and critic frozen, an
encoder learns to invert the generator (the paper's "izi_f" training). The same error of image and features scores.
Defaults and details are those of the authors' public code (github.com/tSchlegl/f-AnoGAN).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.networks import Decoder, Discriminator, Encoder, check_square, dcgan_init
from ganomaly_plugin.recipe import Networks, Optimiser, Phase, Recipe, Stage, StepInput, at_least, check_adam


class Critic(Discriminator):
    """DCGAN's discriminator with layer norm for BatchNorm: the penalty is on each image's own gradient (1704.00028, 4).

    Layer norm spans channels, height and width and has a gain and a bias for each channel, as in the authors' code.
    """

    def __init__(self, side: int, channels: int, features: int) -> None:
        super().__init__(side, channels, features)
        layers = [nn.GroupNorm(1, m.num_features) if isinstance(m, nn.BatchNorm2d) else m for m in self.features]
        self.features = nn.Sequential(*layers)


def critic_loss(critic_real: Tensor, critic_fake: Tensor) -> Tensor:
    """The critic's loss mean D(x̃) - mean D(x), 1704.00028, eq. 3 without its penalty."""
    return critic_fake.mean() - critic_real.mean()


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor, share: Tensor) -> Tensor:
    """The penalty mean (‖∇ D(x̂)‖₂ - 1)² at x̂ between each real and fake image, 1704.00028, eq. 3 and algorithm 1.

    Args:
        critic: Maps images to `(values, features)`.
        real: Images `(b, c, s, s)`.
        fake: Generated images of that shape, without gradient.
        share: Share of the fake image in each x̂, `(b, 1, 1, 1)` in [0, 1].
    """
    between = (real + share * (fake - real)).detach().requires_grad_(True)
    values, _ = critic(between)
    (gradient,) = torch.autograd.grad(values.sum(), between, create_graph=True)
    # Differs: the tiny constant keeps the root's own gradient finite where a critic is flat.
    norm = (gradient.square().flatten(1).sum(1) + 1e-12).sqrt()
    return (norm - 1).square().mean()


@dataclass(frozen=True)
class FAnoganRecipe(Recipe):
    """f-AnoGAN's networks, its two stages and its score. Each stage trains for the whole epoch budget.

    # Differs: the authors train the GAN for 7 epochs and the encoder for 50,000 steps of 64 images, whatever the data.

    Args:
        features: Channels after the first convolution.
        latent_dim: Length of z.
        critic_steps: Steps of the critic for each step of the generator.
        penalty: Weight of the gradient penalty.
        kappa: Weight κ of the feature error, in the encoder's loss and in the score.
        lr, betas: Adam's, for generator and critic.
        lr_encoder: RMSprop's, for the encoder.
    """

    features: int = 64
    latent_dim: int = 128
    critic_steps: int = 5
    penalty: float = 10.0
    kappa: float = 1.0
    lr: float = 1e-4
    betas: tuple[float, float] = (0.0, 0.9)
    lr_encoder: float = 5e-5

    conformance_hparams: ClassVar[dict[str, Any]] = {
        "features": 4,
        "latent_dim": 8,
        "batch_size": 8,
        "critic_steps": 2,
        "lr": 2e-3,
        "lr_encoder": 2e-3,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(features=(self.features, 2), latent_dim=(self.latent_dim, 1), critic_steps=(self.critic_steps, 1))
        at_least(penalty=(self.penalty, 0), kappa=(self.kappa, 0))
        check_adam(self.lr, self.betas)
        if not self.lr_encoder > 0:
            raise InvalidInput(f"lr_encoder must be positive, got {self.lr_encoder}.")

    @property
    def uncompilable(self) -> str | None:
        """The critic's penalty is on a gradient, and has to be differentiated in turn."""
        return "torch.compile has no gradients of gradients"

    def build(self, chw: tuple[int, int, int]) -> dict[str, nn.Module]:
        """`generator`, `critic` and `encoder`.

        # Differs: the authors' networks are residual ones for 64×64 (4 blocks each); here they are DCGAN's, for any
        side, with layer norm in the critic as in the authors' code. BatchNorm's epsilon and momentum are torch's (1e-5, 0.1),
        the authors' TensorFlow's (1e-3, 0.01).
        """
        check_square(chw)
        channels, side, _ = chw
        networks = {
            "generator": Decoder(side, channels, self.features, self.latent_dim),
            "critic": Critic(side, channels, self.features),
            "encoder": Encoder(side, channels, self.features, self.latent_dim),
        }
        return {name: network.apply(dcgan_init) for name, network in networks.items()}

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The WGAN-GP, then the encoder on the frozen two; a trainer keeps networks it does not train in eval mode."""
        adam = Optimiser(self.lr, self.betas)
        critic = Phase("critic", ("critic",), self._critic_phase, adam)
        generator = Phase("generator", ("generator",), self._generator_phase, adam, every=self.critic_steps)
        # Differs: torch's RMSprop forgets with 0.99, starts from zero and adds 1e-8 to the root; TensorFlow's forgets with
        # 0.9, starts from one and adds 1e-10 below it.
        encoder = Phase("encoder", ("encoder",), self._encoder_phase, Optimiser(self.lr_encoder, kind="rmsprop"))
        return (Stage("wgan", (critic, generator)), Stage("encoder", (encoder,)))

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Codes from the prior N(0, 1) for the critic's and the generator's phase, and the penalty's shares."""
        return {
            "z_critic": torch.randn(n, self.latent_dim, 1, 1, generator=generator),
            "z_generator": torch.randn(n, self.latent_dim, 1, 1, generator=generator),
            "share": torch.rand(n, 1, 1, 1, generator=generator),
        }

    def _critic_phase(self, networks: Networks, step: StepInput) -> tuple[Tensor, dict[str, Tensor]]:
        real, fake = step.images, networks["generator"](step.draws["z_critic"]).detach()
        wasserstein = critic_loss(networks["critic"](real)[0], networks["critic"](fake)[0])
        penalty = gradient_penalty(networks["critic"], real, fake, step.draws["share"])
        return wasserstein + self.penalty * penalty, {"critic": wasserstein, "gradient_penalty": penalty}

    def _generator_phase(self, networks: Networks, step: StepInput) -> tuple[Tensor, dict[str, Tensor]]:
        values, _ = networks["critic"](networks["generator"](step.draws["z_generator"]))
        loss = -values.mean()
        return loss, {"generator": loss}

    def _encoder_phase(self, networks: Networks, step: StepInput) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self._errors(networks, step.images).mean()  # L_izi_f
        return loss, {"encoder": loss}

    def _errors(self, networks: Networks, images: Tensor) -> Tensor:
        """Per image, mean (x - G(E(x)))² + κ·mean (f(x) - f(G(E(x))))² over its own elements, `(b,)`."""
        x_hat = networks["generator"](networks["encoder"](images))
        _, features_real = networks["critic"](images)
        _, features_fake = networks["critic"](x_hat)
        image_error = (images - x_hat).square().flatten(1).mean(1)
        feature_error = (features_real - features_fake).square().flatten(1).mean(1)
        return image_error + self.kappa * feature_error

    def score(self, networks: Networks, images: Tensor) -> Tensor:
        """A(x) = A_R(x) + κ·A_D(x), the encoder's own loss on one image."""
        return self._errors(networks, images)

    def reconstruct(self, networks: Networks, images: Tensor) -> Tensor:
        """G(E(x))."""
        return networks["generator"](networks["encoder"](images))

    def anomaly_map(self, networks: Networks, images: Tensor) -> Tensor:
        """|x - G(E(x))|, mean over the channels; the paper's pixel-wise residual."""
        return (images - self.reconstruct(networks, images)).abs().mean(1)
