"""A GANomaly step as its authors write it: the baseline of `bench speed`, kept in its slow form on purpose.

D runs twice on x and twice on x̂, tensors are contiguous and Adam is not fused. Losses and gradients are those of ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ganomaly_plugin.detectors.ganomaly import GanomalyRecipe, contextual_loss, discriminator_loss, encoder_loss
from ganomaly_plugin.training.plain import build_networks


class AuthorsStep:
    """One GANomaly step in the authors' form: four passes of D, contiguous tensors, Adam of many small operations."""

    def __init__(self, recipe: GanomalyRecipe, chw: tuple[int, int, int], device: torch.device) -> None:
        self.recipe = recipe
        networks = build_networks(recipe, chw, seed=0)
        self.generator = networks["generator"].to(device).train()
        self.discriminator = networks["discriminator"].to(device).train()
        self.adam_g = torch.optim.Adam(self.generator.parameters(), recipe.lr, recipe.betas, foreach=False, fused=False)
        self.adam_d = torch.optim.Adam(self.discriminator.parameters(), recipe.lr, recipe.betas, foreach=False, fused=False)

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """Train on one batch in [-1, 1] and return its losses."""
        recipe = self.recipe
        x_hat, z, z_hat = self.generator(x)
        logits_real, _ = self.discriminator(x)
        logits_fake, _ = self.discriminator(x_hat.detach())

        self.adam_g.zero_grad()
        # As written there, D's features of x are not detached, and D's weights collect gradients that are thrown away.
        adv = (self.discriminator(x)[1] - self.discriminator(x_hat)[1]).square().mean()
        con, enc = contextual_loss(x, x_hat), encoder_loss(z, z_hat)
        total = recipe.w_adv * adv + recipe.w_con * con + recipe.w_enc * enc
        total.backward(retain_graph=True)
        self.adam_g.step()

        self.adam_d.zero_grad()
        loss = discriminator_loss(logits_real, logits_fake)
        loss.backward()
        self.adam_d.step()
        if loss.item() < recipe.redraw_below:
            recipe.redraw(self.discriminator)
        losses = {"adversarial": adv, "contextual": con, "encoder": enc, "generator": total, "discriminator": loss}
        return {name: value.detach() for name, value in losses.items()}
