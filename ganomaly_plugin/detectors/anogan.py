"""AnoGAN: Schlegl, Seeböck, Waldstein, Schmidt-Erfurth, Langs, IPMI 2017, arXiv 1703.05921.

A DCGAN learns normal images. To score an image, gradient steps on a code z search for the generated image nearest to
it; what is left of the distance is the score. f(·) is the discriminator's activation before its last convolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.networks import Decoder, Discriminator, bce, check_square, dcgan_init
from ganomaly_plugin.recipe import (
    Networks,
    Optimiser,
    Phase,
    Recipe,
    Stage,
    StepInput,
    Tensors,
    at_least,
    check_adam,
    check_share,
)
from ganomaly_plugin.training.captured import Replayed, record_on

CHECK_EVERY = 25  # search steps between two looks at which images still improve
BETA1, BETA2, TINY = 0.9, 0.999, 1e-8  # the search's Adam


@contextmanager
def weights_frozen(networks: Networks) -> Iterator[None]:
    """Only the code is differentiated inside: the graph then keeps nothing for the weights' sake."""
    trainable = [p for network in networks.values() for p in network.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class AnoganRecipe(Recipe):
    """AnoGAN's networks, losses, search and score.

    Args:
        features: Channels after the first convolution.
        latent_dim: Length of z.
        w_feature: Weight λ of the discrimination loss (of features), in the search and in the score.
        lr, betas: Adam's, for both networks.
        search_steps: Gradient steps on z for each scored image.
        search_lr: Adam's in the search. The paper names none; 0.01 is what the EGBAD authors' AnoGAN begins with.
            With the networks' own 2e-4 no code could move by more than 0.1 in 500 steps.
        search_tol: An image's search ends when 25 steps lower its loss by less than this share; None never.
    """

    features: int = 64
    latent_dim: int = 100
    w_feature: float = 0.1
    lr: float = 2e-4
    betas: tuple[float, float] = (0.5, 0.999)
    search_steps: int = 500
    search_lr: float = 0.01
    search_tol: float | None = None

    default_epochs: ClassVar[int] = 20
    exportable: ClassVar[bool] = False
    conformance_hparams: ClassVar[dict[str, Any]] = {
        "features": 4,
        "latent_dim": 8,
        "batch_size": 8,
        "lr": 2e-3,
        "search_steps": 10,
        "search_lr": 0.05,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(features=(self.features, 2), latent_dim=(self.latent_dim, 1), search_steps=(self.search_steps, 0))
        check_share("w_feature", self.w_feature)
        check_adam(self.lr, self.betas)
        if not self.search_lr > 0:
            raise InvalidInput(f"search_lr must be positive, got {self.search_lr}.")
        if self.search_tol is not None and not 0 <= self.search_tol < 1:
            raise InvalidInput(f"search_tol must lie in [0, 1), or be None for all steps, got {self.search_tol}.")

    def build(self, chw: tuple[int, int, int]) -> dict[str, nn.Module]:
        """`generator` and `discriminator`."""
        check_square(chw)
        channels, side, _ = chw
        generator = Decoder(side, channels, self.features, self.latent_dim)
        discriminator = Discriminator(side, channels, self.features)
        return {"generator": generator.apply(dcgan_init), "discriminator": discriminator.apply(dcgan_init)}

    @property
    def stages(self) -> tuple[Stage, ...]:
        """One stage: D, then G against the D so updated, as DCGAN is trained."""
        adam = Optimiser(self.lr, self.betas)
        discriminator = Phase("discriminator", ("discriminator",), self._discriminator_phase, adam)
        generator = Phase("generator", ("generator",), self._generator_phase, adam)
        return (Stage("train", (discriminator, generator)),)

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """`z`, codes from the uniform prior on [-1, 1]."""
        return {"z": self._codes(n, generator)}

    def _codes(self, n: int, generator: torch.Generator) -> Tensor:
        return 2 * torch.rand(n, self.latent_dim, 1, 1, generator=generator) - 1

    def _discriminator_phase(self, networks: Networks, step: StepInput) -> tuple[Tensor, dict[str, Tensor]]:
        x_hat = networks["generator"](step.draws["z"])
        logits_real, _ = networks["discriminator"](step.images)
        logits_fake, _ = networks["discriminator"](x_hat.detach())
        loss = bce(logits_real, real=True) + bce(logits_fake, real=False)  # eq. 1, for D
        return loss, {"discriminator": loss, "x_hat": x_hat}

    def _generator_phase(self, networks: Networks, step: StepInput) -> tuple[Tensor, dict[str, Tensor]]:
        logits_fake, _ = networks["discriminator"](step.earlier["x_hat"])
        loss = bce(logits_fake, real=True)  # eq. 1, for G, in its non-saturating form
        return loss, {"generator": loss}

    def score(self, networks: Networks, images: Tensor) -> Tensor:
        """A(x) = (1 - λ)·R(x) + λ·D(x), eq. 6: the loss of the last code of the search."""
        return self._losses(networks, images, self._features(networks, images), self.search(networks, images))

    def reconstruct(self, networks: Networks, images: Tensor) -> Tensor:
        """G(z) at the end of the search."""
        return networks["generator"](self.search(networks, images))

    def anomaly_map(self, networks: Networks, images: Tensor) -> Tensor:
        """|x - G(z)| at the end of the search, mean over the channels: the paper's residual image."""
        return (images - self.reconstruct(networks, images)).abs().mean(1)

    def _features(self, networks: Networks, images: Tensor) -> Tensor:
        return networks["discriminator"](images)[1]

    def _losses(self, networks: Networks, images: Tensor, features: Tensor, z: Tensor) -> Tensor:
        """(1 - λ)·Σ|x - G(z)| + λ·Σ|f(x) - f(G(z))| of each image, eqs. 2, 4 and 5."""
        x_hat = networks["generator"](z)
        residual = (images - x_hat).abs().flatten(1).sum(1)
        discrimination = (features - self._features(networks, x_hat)).abs().flatten(1).sum(1)
        return (1 - self.w_feature) * residual + self.w_feature * discrimination

    def search(self, networks: Networks, images: Tensor) -> Tensor:
        """A code z `(n, latent_dim, 1, 1)` for each image, near the least loss that gradient steps reach.

        The images are searched together, but each has its own code, its own moments in Adam and, with networks in
        evaluation mode, its own loss; the sum of the losses has the gradient of each.

        # Differs: the paper starts from a random code. Here all images start from one code of a generator of its own,
        so that a score depends neither on the images beside it nor on chance.
        """
        start = self._codes(1, torch.Generator().manual_seed(0)).to(images.device)
        found = start.repeat(len(images), 1, 1, 1)
        left = torch.arange(len(images), device=images.device)  # the images that the search is of
        on = torch.ones_like(left, dtype=torch.bool)  # those of them whose search goes on
        crowd = 2 if record_on(images.device) else 1  # to record a step anew takes as long as many a step
        search = _Search(found.clone())
        previous: Tensor | None = None
        with weights_frozen(networks):
            features = self._features(networks, images)
            move = self._replayed(networks, search)
            for step in range(1, self.search_steps + 1):
                losses = move({"images": images, "features": features})["losses"]
                if self.search_tol is None or step % CHECK_EVERY:
                    continue
                if previous is not None:
                    found[left[on]] = search.z[on]
                    on &= losses < (1 - self.search_tol) * previous
                    if not on.any():
                        return found
                    if crowd * on.sum() <= len(on) and not on.all():
                        left, images, features, losses = left[on], images[on], features[on], losses[on]
                        search.keep(on)
                        on = on[on]
                        move = self._replayed(networks, search)
                previous = losses
        found[left[on]] = search.z[on]
        return found

    def _replayed(self, networks: Networks, search: _Search) -> Replayed:
        """`_search_step` on the codes of `search`, replayed as a CUDA graph where there is a GPU."""

        def work(inputs: Tensors) -> dict[str, Tensor]:
            return {"losses": self._search_step(networks, inputs["images"], inputs["features"], search)}

        return Replayed(work, search.state, record_on(search.z.device))

    def _search_step(self, networks: Networks, images: Tensor, features: Tensor, search: _Search) -> Tensor:
        """Move the codes by one step of Adam, in place, and return their losses before it.

        Nothing here waits for the device or depends on the number of the step, so that a CUDA graph can hold it.
        """
        with torch.enable_grad():
            z = search.z.requires_grad_(True)
            losses = self._losses(networks, images, features, z)
            (gradient,) = torch.autograd.grad(losses.sum(), z)
        search.z.requires_grad_(False)
        search.move(gradient, self.search_lr)
        return losses.detach()


class _Search:
    """Codes and their moments in Adam, all of them changed in place."""

    def __init__(self, z: Tensor) -> None:
        self.z, self.momentum, self.scale = z, torch.zeros_like(z), torch.zeros_like(z)
        self.count = torch.zeros((), device=z.device)  # steps; on the device, where the fused kernel reads it

    def move(self, gradient: Tensor, lr: float) -> None:
        """One step of Adam; each code's is its own, since nothing in Adam looks at more than one number."""
        adam(
            [self.z], [gradient], [self.momentum], [self.scale], [], [self.count],
            fused=True, amsgrad=False, beta1=BETA1, beta2=BETA2, lr=lr, weight_decay=0.0, eps=TINY, maximize=False,
        )  # fmt: skip

    def state(self) -> list[Tensor]:
        """All that a step changes."""
        return [self.z, self.momentum, self.scale, self.count]

    def keep(self, on: Tensor) -> None:
        """Go on with the codes that `on` selects."""
        self.z, self.momentum, self.scale = self.z[on], self.momentum[on], self.scale[on]
