"""GANomaly with the differences of anomalib's Ganomaly as switches: what each of them does to the AUROC.

A detector for `bench`, by class path; `anomalib_ablation.yaml` names the runs:

    PYTHONPATH=benchmark_configs/anomalib bench run --config benchmark_configs/anomalib_ablation.yaml --trust ablation

Each switch is at "authors" by default, which is the `ganomaly` of this package to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss

from ganomaly_plugin.detectors.ganomaly import GanomalyRecipe, adversarial_loss, contextual_loss, encoder_loss
from ganomaly_plugin.recipe import Networks, StepInput

Whose = Literal["authors", "anomalib"]
#: ImageNet's mean and standard deviation, the mean of its three channels: grey pictures have one.
IMAGENET = (0.449, 0.226)


def default_init(module: nn.Module) -> None:
    """Initialise as torch does by default, one module, for `Module.apply`."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
        module.reset_parameters()


@dataclass(frozen=True)
class AblatedGanomaly(GanomalyRecipe):
    """GANomaly with switches; "anomalib" takes anomalib's way (2.3 to 2.7), "authors" that of the paper's code.

    Args:
        loss_adv: Squared difference of D's features, or of D's sigmoid outputs (anomalib issue 2137).
        loss_enc: Squared, or smooth L1, difference of the codes.
        init: DCGAN's N(0, 0.02), or torch's defaults: anomalib calls the initialisation where it reaches nothing.
        padding: Of each encoder's first convolution: 1, or 4.
        norm: Images in [-1, 1], or normalised by ImageNet's mean and deviation, which tanh cannot reach.
        channels: Those of the images, or always 3: grey images are repeated.

    The re-draw of a collapsed D, which anomalib lacks, is `redraw_below`.
    """

    loss_adv: Whose = "authors"
    loss_enc: Whose = "authors"
    init: Whose = "authors"
    padding: Whose = "authors"
    norm: Whose = "authors"
    channels: Whose = "authors"

    def build(self, chw: tuple[int, int, int]) -> dict[str, nn.Module]:
        """The networks of GANomaly, altered as the switches say."""
        networks = super().build((3, *chw[1:]) if self.channels == "anomalib" else chw)
        for network in networks.values():
            if self.padding == "anomalib":
                self._pad(network)
            if self.init == "anomalib":
                network.apply(default_init)
        return networks

    def _pad(self, network: nn.Module) -> None:
        for name, module in network.named_modules():
            if isinstance(module, nn.Conv2d) and ("initial-conv" in name or name == "features.0"):
                module.padding = (4, 4)

    def _generator_phase(self, networks: Networks, step: StepInput) -> tuple[Tensor, dict[str, Tensor]]:
        x = self._normalised(step.images)
        x_hat, z, z_hat = networks["generator"](x)
        logits_real, features_real = networks["discriminator"](x)
        logits_fake, features_fake = networks["discriminator"](x_hat)
        if self.loss_adv == "anomalib":
            adv = (logits_real.sigmoid() - logits_fake.sigmoid()).square().mean()
        else:
            adv = adversarial_loss(features_real, features_fake)
        con = contextual_loss(x, x_hat)
        enc = smooth_l1_loss(z, z_hat) if self.loss_enc == "anomalib" else encoder_loss(z, z_hat)
        total = self.w_adv * adv + self.w_con * con + self.w_enc * enc
        computed = {"adversarial": adv, "contextual": con, "encoder": enc, "generator": total}
        return total, computed | {"logits_real": logits_real, "logits_fake": logits_fake}

    def _normalised(self, images: Tensor) -> Tensor:
        if self.channels == "anomalib":
            images = images.expand(-1, 3, -1, -1)
        if self.norm == "authors":
            return images
        mean, deviation = IMAGENET
        return ((images + 1) / 2 - mean) / deviation

    def score(self, networks: Networks, images: Tensor) -> Tensor:
        """GANomaly's score of the images normalised as in training."""
        _, z, z_hat = networks["generator"](self._normalised(images))
        return (z - z_hat).square().flatten(1).mean(1)

    def scores(self, networks: Networks, images: Tensor) -> dict[str, Tensor]:
        """GANomaly's named scores of the images normalised as in training."""
        return super().scores(networks, self._normalised(images))

    def reconstruct(self, networks: Networks, images: Tensor) -> Tensor:
        """What the generator makes of the normalised images, back in the range and channels of `images`."""
        x_hat = networks["generator"](self._normalised(images))[0]
        if self.channels == "anomalib":
            x_hat = x_hat.mean(1, keepdim=True)
        if self.norm == "authors":
            return x_hat
        mean, deviation = IMAGENET
        return 2 * (x_hat * deviation + mean) - 1

    def anomaly_map(self, networks: Networks, images: Tensor) -> Tensor:
        """GANomaly's map, |x - x̂| with x normalised as in training."""
        x = self._normalised(images)
        return (x - networks["generator"](x)[0]).abs().mean(1)
