"""VAE, Skip-GANomaly, EGBAD, ALAD, f-AnoGAN and AnoGAN: their losses by hand, and their facts from the papers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import blobs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ganomaly_plugin import load_detector, make_detector
from ganomaly_plugin.detectors.alad import AladRecipe
from ganomaly_plugin.detectors.anogan import AnoganRecipe, _Search, weights_frozen
from ganomaly_plugin.detectors.egbad import EgbadRecipe, fooling_loss, pair_loss
from ganomaly_plugin.detectors.f_anogan import FAnoganRecipe, critic_loss, gradient_penalty
from ganomaly_plugin.detectors.skip_ganomaly import SkipGanomalyRecipe, UNet
from ganomaly_plugin.detectors.vae import VaeRecipe, bernoulli_loss, gaussian_loss, kl_divergence, sample_posterior
from ganomaly_plugin.errors import InvalidInput
from ganomaly_plugin.hparams import default_hparams
from ganomaly_plugin.recipe import Networks, Optimiser, Recipe, StepInput
from ganomaly_plugin.registry import resolve
from ganomaly_plugin.training.detector import RecipeDetector
from ganomaly_plugin.training.plain import PlainTrainer, build_networks
from ganomaly_plugin.training.scoring import scoring_mode

CPU = torch.device("cpu")
FAMILY = ("vae", "skip_ganomaly", "egbad", "alad", "f_anogan", "anogan")
TINY: dict[str, dict[str, Any]] = {
    "vae": {"features": 2, "latent_dim": 3},
    "skip_ganomaly": {"features": 2, "latent_dim": 3},
    "egbad": {"features": 2, "latent_dim": 3, "joint_features": 4},
    "alad": {"features": 2, "latent_dim": 3, "joint_features": 4},
    "f_anogan": {"features": 2, "latent_dim": 3},
    "anogan": {"features": 2, "latent_dim": 3, "search_steps": 5},
}


class Calls(nn.Module):
    """A network that is one function, to work out losses by hand."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def stubs(**functions: Any) -> Networks:
    return {name: Calls(function) for name, function in functions.items()}


def step_of(images: Tensor, draws: dict[str, Tensor] | None = None, earlier: dict[str, Tensor] | None = None) -> StepInput:
    return StepInput(images, draws or {}, earlier or {})


def phases(recipe: Recipe, stage: int = 0) -> dict[str, Any]:
    return {phase.name: phase for phase in recipe.stages[stage].phases}


def trainer_of(recipe: Recipe, side: int = 16) -> PlainTrainer:
    return PlainTrainer(recipe, build_networks(recipe, (1, side, side), seed=0), seed=0, device=CPU)


def weights(network: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()]).clone()


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def images(n: int = 4, **options: Any) -> Tensor:
    return torch.from_numpy(blobs(n, **options))


# All six


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("shape", [(1, 48, 48), (3, 128, 128)])
def test_any_multiple_of_16_and_one_image(name: str, shape: tuple[int, int, int]) -> None:
    detector = make_detector(name, **TINY[name]).fit(np.zeros((1, *shape), np.uint8), epochs=1, device="cpu")
    x = blobs(2, channels=shape[0], side=shape[1])
    assert np.isfinite(detector.score(x)).all() and detector.anomaly_map(x).shape == (2, *shape[1:])


@pytest.mark.parametrize("name", FAMILY)
def test_batch_statistics_and_saving(name: str, tmp_path: Any) -> None:
    detector = make_detector(name, **TINY[name], batch_size=4, batchnorm="batch")
    detector.fit(blobs(12), epochs=2, device="cpu")
    expected = detector.score(blobs(5, seed=1))
    detector.save(tmp_path / "detector.pt")
    np.testing.assert_array_equal(load_detector(tmp_path / "detector.pt").score(blobs(5, seed=1)), expected)


@pytest.mark.parametrize("name", ["ganomaly", "ae", "egbad", "alad", "f_anogan", "anogan"])
def test_a_map_is_what_the_reconstruction_misses_of_each_pixel(name: str) -> None:
    hparams = TINY.get(name, {"features": 2, "latent_dim": 3})
    detector = make_detector(name, **hparams).fit(blobs(8, channels=3), epochs=1, device="cpu")
    x = blobs(3, channels=3, seed=1)
    np.testing.assert_allclose(detector.anomaly_map(x), np.abs(x - detector.reconstruct(x)).mean(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "epochs", "published"),
    [
        ("ganomaly", 15, {"w_adv": 1, "w_con": 50, "w_enc": 1, "lr": 2e-4, "betas": (0.5, 0.999), "redraw_below": 1e-5}),
        ("vae", 50, {"likelihood": "gaussian", "sigma": math.sqrt(0.5), "beta": 1, "score_by": "reconstruction"}),
        ("skip_ganomaly", 15, {"w_adv": 1, "w_con": 50, "w_lat": 1, "w_image": 0.9, "betas": (0.5, 0.999), "lr": 2e-4}),
        ("egbad", 100, {"batch_size": 100, "latent_dim": 200, "w_feature": 0.1, "lr": 1e-5, "ema_decay": 0.999}),
        ("alad", 100, {"batch_size": 32, "latent_dim": 100, "spectral": True, "lr": 2e-4, "ema_decay": 0.999}),
        ("f_anogan", 15, {"critic_steps": 5, "penalty": 10, "kappa": 1, "lr": 1e-4, "betas": (0, 0.9), "lr_encoder": 5e-5}),
        ("anogan", 20, {"w_feature": 0.1, "lr": 2e-4, "search_steps": 500, "search_lr": 0.01, "search_tol": None}),
    ],
)
def test_a_name_alone_is_the_published_method(name: str, epochs: int, published: dict[str, Any]) -> None:
    cls = resolve("detector", name)
    assert cls.default_epochs == epochs and published.items() <= default_hparams(cls).items()


@pytest.mark.parametrize(
    ("name", "hparams", "message"),
    [
        ("vae", {"sigma": 0.0}, "sigma must be positive"),
        ("vae", {"beta": -1.0}, "beta must be at least 0"),
        ("vae", {"likelihood": "poisson"}, "likelihood must be"),
        ("skip_ganomaly", {"w_image": 1.5}, r"w_image must lie in \[0, 1\]"),
        ("skip_ganomaly", {"w_lat_discriminator": -1.0}, "w_lat_discriminator"),
        ("egbad", {"w_feature": -0.1}, r"w_feature must lie in \[0, 1\]"),
        ("egbad", {"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\)"),
        ("alad", {"joint_features": 0}, "joint_features must be at least 1"),
        ("f_anogan", {"critic_steps": 0}, "critic_steps must be at least 1"),
        ("f_anogan", {"lr_encoder": 0.0}, "lr_encoder must be positive"),
        ("anogan", {"search_lr": 0.0}, "search_lr must be positive"),
        ("anogan", {"search_tol": 1.0}, "search_tol must lie in"),
        ("anogan", {"search_steps": -1}, "search_steps must be at least 0"),
    ],
)
def test_hyperparameters_are_checked(name: str, hparams: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        make_detector(name, **hparams)


# VAE


def test_vae_losses_by_hand() -> None:
    x, x_hat = torch.tensor([1.0, 0.25]), torch.tensor([0.0, 0.75])
    assert gaussian_loss(x, x_hat, sigma=math.sqrt(0.5)).tolist() == pytest.approx([1.0, 0.25])
    assert gaussian_loss(x, x_hat, sigma=0.5).tolist() == pytest.approx([2.0, 0.5])
    assert bernoulli_loss(x[1:], x_hat[1:]).item() == pytest.approx(-(math.log(0.75) + 3 * math.log(0.25)) / 4)
    assert bernoulli_loss(torch.tensor(1.0), torch.tensor(0.0)).isfinite()
    mean, log_variance = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, math.log(4)], [0.0, 0.0]])
    assert kl_divergence(mean, log_variance).tolist() == pytest.approx([0.5 + 0.5 * (4 - 1 - math.log(4)), 0.0])
    assert sample_posterior(torch.tensor(1.0), torch.tensor(math.log(4)), torch.tensor(-2.0)).item() == pytest.approx(-3.0)


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_negative_elbo_by_hand(beta: float) -> None:
    # Two latents, mean 1 and variance 1: KL is 1. White images of 4 pixels, decoded to grey: 4·(1 - ½)² = 1.
    recipe = VaeRecipe(latent_dim=2, beta=beta)
    code = torch.tensor([1.0, 1.0, 0.0, 0.0]).reshape(1, 4, 1, 1)
    decoded: list[Tensor] = []

    def decode(z: Tensor) -> Tensor:
        decoded.append(z)
        return torch.zeros(len(z), 1, 2, 2)

    networks = stubs(encoder=lambda x: code.repeat(len(x), 1, 1, 1), decoder=decode)
    epsilon = torch.tensor([0.5, -1.0]).reshape(1, 2, 1, 1).repeat(3, 1, 1, 1)
    loss, computed = phases(recipe)["vae"].loss(networks, step_of(torch.ones(3, 1, 2, 2), {"epsilon": epsilon}))
    assert (loss.item(), computed["kl"].item(), computed["reconstruction"].item()) == pytest.approx((1 + beta, 1, 1))
    assert decoded[0].flatten(1)[0].tolist() == pytest.approx([1.5, 0.0])
    assert recipe.score(networks, torch.ones(3, 1, 2, 2)).tolist() == pytest.approx([1.0] * 3)
    assert decoded[1].flatten(1)[0].tolist() == pytest.approx([1.0, 1.0])  # the score decodes the mean
    by_elbo = VaeRecipe(latent_dim=2, beta=beta, score_by="elbo")
    assert by_elbo.score(networks, torch.ones(3, 1, 2, 2)).tolist() == pytest.approx([1 + beta] * 3)


def test_input_range_does_not_change_the_vaes_reconstruction_loss() -> None:
    networks = stubs(encoder=lambda x: torch.zeros(len(x), 4, 1, 1), decoder=lambda z: torch.zeros(len(z), 1, 2, 2))
    grey, other = VaeRecipe(latent_dim=2), VaeRecipe(latent_dim=2, input_range=(0.0, 3.0))
    black = torch.full((1, 1, 2, 2), -1.0)
    assert grey.score(networks, black).item() == pytest.approx(other.score(networks, black + 1).item()) == pytest.approx(1.0)


def test_vae_reconstruction_and_map_are_on_the_scale_of_the_input() -> None:
    networks = stubs(encoder=lambda x: torch.zeros(len(x), 4, 1, 1), decoder=lambda z: torch.full((len(z), 3, 2, 2), 0.5))
    recipe = VaeRecipe(latent_dim=2, input_range=(1.0, 5.0))
    black = torch.full((1, 3, 2, 2), 1.0)  # decoded to three quarters of white
    assert recipe.reconstruct(networks, black).unique().tolist() == [4.0]
    assert recipe.anomaly_map(networks, black).tolist() == torch.full((1, 2, 2), 0.75**2).tolist()


def test_vae_networks() -> None:
    networks = VaeRecipe(features=4, latent_dim=5).build((3, 32, 32))
    assert networks["encoder"](torch.zeros(2, 3, 32, 32)).shape == (2, 10, 1, 1)
    assert networks["decoder"](torch.zeros(2, 5, 1, 1)).shape == (2, 3, 32, 32)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in networks["decoder"].modules())


# Skip-GANomaly


@pytest.mark.parametrize(("side", "bottleneck"), [(16, 1), (32, 1), (48, 3), (64, 1)])
def test_unet_halves_to_an_odd_map_without_batchnorm(side: int, bottleneck: int) -> None:
    network = UNet(side, 3, 2)
    x = torch.rand(2, 3, side, side)
    maps = [x]
    for down in network.downs:
        maps.append(down(maps[-1]))
    assert maps[-1].shape[-1] == bottleneck and maps[-1].shape[1] <= 16
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.downs[-1])
    assert network(x).shape == x.shape and network(x).abs().max() <= 1


def test_unet_skips_carry_the_image_past_the_bottleneck() -> None:
    network = UNet(16, 1, 2).eval()
    nn.init.zeros_(network.downs[-1][1].weight)  # nothing comes through the bottleneck
    assert (network(images(1)) - network(images(1, seed=1))).abs().max() > 0


def test_skip_ganomaly_losses_by_hand() -> None:
    # x is 1 everywhere and x̂ is 0; D's only feature is the first pixel and its logit log 3 for x, 0 for x̂.
    def discriminator(x: Tensor) -> tuple[Tensor, Tensor]:
        feature = x[:, :, :1, :1]
        return math.log(3) * feature.flatten(), feature

    networks = stubs(generator=torch.zeros_like, discriminator=discriminator)
    x = torch.ones(2, 1, 2, 2)
    recipe = SkipGanomalyRecipe(w_adv=2, w_con=3, w_lat=5)
    loss, computed = phases(recipe)["generator"].loss(networks, step_of(x))
    assert loss.item() == pytest.approx(2 * math.log(2) + 3 * 1 + 5 * 1)
    adversarial = -math.log(3 / 4) - math.log(1 / 2)
    for weight in (1.0, 0.0):
        variant = SkipGanomalyRecipe(w_lat=5, w_lat_discriminator=weight)
        loss, _ = phases(variant)["discriminator"].loss(networks, step_of(x, earlier=computed))
        assert loss.item() == pytest.approx(adversarial + weight * 5)
    halved = stubs(generator=lambda x: x / 2, discriminator=discriminator)
    assert recipe.score(halved, 2 * x).tolist() == pytest.approx([0.9 * 1 + 0.1 * 1] * 2)
    assert recipe.anomaly_map(halved, 4 * x).tolist() == torch.full((2, 2, 2), 4.0).tolist()


def test_skip_ganomaly_feature_is_the_latent_of_the_discriminator() -> None:
    _, features = SkipGanomalyRecipe(features=2, latent_dim=7).build((1, 32, 32))["discriminator"](torch.zeros(2, 1, 32, 32))
    assert features.shape == (2, 7, 1, 1)


def test_skip_ganomaly_draws_a_collapsed_discriminator_anew() -> None:
    recipe = SkipGanomalyRecipe(**TINY["skip_ganomaly"], redraw_below=0.3)
    assert phases(recipe)["discriminator"].redraw_below == 0.3 and phases(recipe)["generator"].redraw_below is None
    assert phases(SkipGanomalyRecipe(redraw_below=0.0))["discriminator"].redraw_below is None
    discriminator = recipe.build((1, 32, 32))["discriminator"]
    before = state(discriminator)
    recipe.redraw(discriminator)
    convolutions = [name for name, value in before.items() if value.ndim == 4]
    assert convolutions and not any(torch.equal(discriminator.state_dict()[name], before[name]) for name in convolutions)


def test_skip_ganomalys_slopes_are_the_authors() -> None:
    networks = SkipGanomalyRecipe(features=2, latent_dim=7).build((1, 32, 32)).values()
    assert {m.negative_slope for net in networks for m in net.modules() if isinstance(m, nn.LeakyReLU)} == {0.2}


# EGBAD and ALAD


def test_pair_losses_by_hand() -> None:
    image, sample = torch.tensor([math.log(3)]), torch.tensor([0.0])  # sigmoids 3/4 and 1/2
    assert pair_loss(image, sample).item() == pytest.approx(-math.log(3 / 4) - math.log(1 / 2))
    assert fooling_loss(image, sample).item() == pytest.approx(-math.log(1 / 4) - math.log(1 / 2))
    assert fooling_loss(torch.tensor([200.0]), sample).item() == pytest.approx(200 + math.log(2))  # it does not saturate


def test_egbad_score_by_hand() -> None:
    networks = stubs(
        encoder=lambda x: x.mean((1, 2, 3), keepdim=True),
        generator=lambda z: torch.zeros(len(z), 1, 2, 2),
        discriminator=lambda x, z: (z.flatten(), (x.sum((1, 2, 3)) * z.flatten())[:, None]),
    )
    x = torch.full((1, 1, 2, 2), -3.0)  # E(x) = -3, f(x, E(x)) = 36, f(0, E(x)) = 0
    assert EgbadRecipe().score(networks, x).item() == pytest.approx(0.9 * 12 + 0.1 * 36)
    assert EgbadRecipe(w_feature=0.0).score(networks, x).item() == pytest.approx(12)
    assert EgbadRecipe().anomaly_map(networks, x).tolist() == [[[3.0, 3.0], [3.0, 3.0]]]


def softplus(value: float) -> float:
    """-log of the sigmoid of -`value`."""
    return math.log1p(math.exp(value))


def pair_logit(x: Tensor, other: Tensor) -> Tensor:
    return x.mean((1, 2, 3)) - 3 * other.mean((1, 2, 3))


def test_egbad_phases_by_hand() -> None:
    networks = stubs(
        encoder=lambda x: x.mean((1, 2, 3), keepdim=True),
        generator=lambda z: (z / 2).expand(-1, 1, 2, 2),
        discriminator=lambda x, z: (pair_logit(x, z), x),
    )
    x, draws, two = torch.ones(2, 1, 2, 2), {"z": torch.full((2, 1, 1, 1), 2.0)}, phases(EgbadRecipe(latent_dim=1))
    loss, computed = two["discriminator"].loss(networks, step_of(x, draws))  # logits 1 - 3 of (x, E(x)), 1 - 6 of (G(z), z)
    assert loss.item() == pytest.approx(softplus(2) + softplus(-5))
    loss, _ = two["generator"].loss(networks, step_of(x, draws, computed))
    assert loss.item() == pytest.approx(softplus(-2) + softplus(5))


def test_alad_phases_by_hand() -> None:
    networks = stubs(
        encoder=lambda x: x.mean((1, 2, 3), keepdim=True),
        generator=lambda z: (z / 2).expand(-1, 1, 2, 2),
        d_xz=lambda x, z: (pair_logit(x, z), x),
        d_xx=lambda x, other: (pair_logit(x, other), x),
        d_zz=pair_logit,
    )
    x, draws, two = torch.ones(2, 1, 2, 2), {"z": torch.full((2, 1, 1, 1), 2.0)}, phases(AladRecipe(latent_dim=1))
    _, computed = two["discriminators"].loss(networks, step_of(x, draws))  # E(x) = 1, x̂ = ½, G(z) = 1, E(G(z)) = 1
    assert computed["d_xz"].item() == pytest.approx(softplus(2) + softplus(-5))
    assert computed["d_xx"].item() == pytest.approx(softplus(2) + softplus(-0.5))
    assert computed["d_zz"].item() == pytest.approx(softplus(4) + softplus(-1))
    _, logged = two["generator"].loss(networks, step_of(x, draws, computed))
    assert logged["adversarial"].item() == pytest.approx(softplus(-2) + softplus(5))
    assert (logged["cycle_x"].item(), logged["cycle_z"].item()) == pytest.approx((softplus(0.5), softplus(1)))


def test_alads_discriminator_of_images_is_half_as_wide() -> None:
    networks = AladRecipe(features=6, latent_dim=3, joint_features=4).build((1, 32, 32))
    assert networks["d_xx"].features[0].out_channels == 3 and networks["d_xz"].image[0].out_channels == 6


def test_bigan_phases_move_their_own_networks_and_the_second_sees_the_first() -> None:
    recipe = EgbadRecipe(**TINY["egbad"])
    trainer = trainer_of(recipe)
    seen: list[Tensor] = []
    discriminator = trainer.networks["discriminator"]
    discriminator.register_forward_pre_hook(lambda *_: seen.append(weights(discriminator)))
    before = {name: weights(net) for name, net in trainer.networks.items()}
    trainer.step(images())
    assert [phase.trains for phase in recipe.stages[0].phases] == [("discriminator",), ("encoder", "generator")]
    assert all(not torch.equal(weights(net), before[name]) for name, net in trainer.networks.items())
    assert len(seen) == 4 and torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])
    assert torch.equal(seen[0], before["discriminator"]) and torch.equal(seen[2], weights(discriminator))


@pytest.mark.parametrize(("name", "cls"), [("egbad", EgbadRecipe), ("alad", AladRecipe)])
def test_averaged_weights_score(name: str, cls: type[Recipe]) -> None:
    trainer = trainer_of(cls(**TINY[name], ema_decay=0.1, lr=1e-2))
    expected: Tensor | None = None  # a decay this small is not held back by the average's warm-up
    for k in range(3):
        trainer.step(images(seed=k))
        now = weights(trainer.networks["generator"])
        expected = now if expected is None else 0.1 * expected + 0.9 * now
    averaged = trainer.scoring_networks()["generator"]
    torch.testing.assert_close(weights(averaged), expected)
    assert not torch.equal(weights(averaged), weights(trainer.networks["generator"]))
    plain = trainer_of(cls(**TINY[name], ema_decay=None))
    assert plain.scoring_networks() is plain.networks


def test_alad_losses_and_score_by_hand() -> None:
    recipe = AladRecipe(latent_dim=1)
    logit = math.log(3)
    networks = stubs(
        encoder=lambda x: x.mean((1, 2, 3), keepdim=True),
        generator=lambda z: z.expand(-1, 1, 2, 2) - 1,
        d_xz=lambda x, z: (torch.zeros(len(x)), z),
        d_xx=lambda x, other: (torch.where((x == other).all(), logit, 0.0).expand(len(x)), 5 * other),
        d_zz=lambda z, other: torch.where((z == other).all(), logit, 0.0).expand(len(z)),
    )
    x, draws = torch.ones(2, 1, 2, 2), {"z": torch.full((2, 1, 1, 1), 2.0)}
    loss, computed = phases(recipe)["discriminators"].loss(networks, step_of(x, draws))
    cycle = -math.log(3 / 4) - math.log(1 / 2)  # (x, x) told from (x, G(E(x))), and the same for z
    assert (computed["d_xz"].item(), computed["d_xx"].item()) == pytest.approx((2 * math.log(2), cycle))
    assert loss.item() == pytest.approx(2 * math.log(2) + 2 * cycle)
    loss, _ = phases(recipe)["generator"].loss(networks, step_of(x, draws, computed))
    assert loss.item() == pytest.approx(2 * math.log(2) + 2 * math.log(2))
    assert recipe.score(networks, x).tolist() == pytest.approx([4 * 5.0] * 2)  # x̂ = 0


def test_alad_spectral_norm() -> None:
    trainer = trainer_of(AladRecipe(**TINY["alad"], lr=1e-2))
    for k in range(3):
        trainer.step(images(seed=k))
    networks = trainer.networks
    with torch.no_grad():
        for _ in range(30):  # each pass in training mode is one more step of the power iteration
            networks["d_xz"](images(), networks["encoder"](images()))
            networks["d_xx"](images(), images())
            networks["d_zz"](torch.zeros(1, 3, 1, 1), torch.zeros(1, 3, 1, 1))
    for name in ("encoder", "d_xz", "d_xx", "d_zz"):
        layers = [m for m in networks[name].eval().modules() if isinstance(m, nn.Conv2d)]
        assert ["parametrizations" in dict(m.named_children()) for m in layers] == [True] * (len(layers) - 1) + [False]
        for layer in layers[:-1]:
            assert torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2).item() == pytest.approx(1.0, abs=0.02)
    assert not any("parametrizations" in key for key in networks["generator"].state_dict())
    without = AladRecipe(**TINY["alad"], spectral=False).build((1, 16, 16))
    assert not any("parametrizations" in key for net in without.values() for key in net.state_dict())


# f-AnoGAN


class LinearCritic(nn.Module):
    """D(x) = 3·x₀ + 4·x₁ of its first two pixels: its gradient has norm 5 everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([3.0, 4.0]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1)[:, :2] @ self.weight, x


def test_wgan_losses_by_hand() -> None:
    assert critic_loss(torch.tensor([1.0, 3.0]), torch.tensor([5.0, 0.0])).item() == pytest.approx(0.5)
    critic, x = LinearCritic(), torch.rand(3, 1, 2, 2)
    penalty = gradient_penalty(critic, x, torch.rand(3, 1, 2, 2), torch.rand(3, 1, 1, 1))
    assert penalty.item() == pytest.approx((5 - 1) ** 2)
    (gradient,) = torch.autograd.grad(penalty, critic.weight)
    assert gradient.tolist() == pytest.approx([2 * 4 * 3 / 5, 2 * 4 * 4 / 5])  # 2(‖w‖ - 1)·w/‖w‖


def test_gradient_penalty_is_taken_between_the_images() -> None:
    at: list[Tensor] = []

    def critic(x: Tensor) -> tuple[Tensor, Tensor]:
        at.append(x)
        return x.square().sum((1, 2, 3)), x

    share = torch.tensor([0.0, 0.25, 1.0]).reshape(3, 1, 1, 1)
    gradient_penalty(Calls(critic), torch.zeros(3, 1, 2, 2), torch.full((3, 1, 2, 2), 4.0), share)
    assert at[0][:, 0, 0, 0].tolist() == [0.0, 1.0, 4.0]


def test_f_anogan_error_by_hand() -> None:
    networks = stubs(encoder=lambda x: x, generator=lambda z: z / 2, critic=lambda x: (x.sum(), 3 * x[:, :, :1, :1]))
    x = torch.full((2, 1, 2, 2), 2.0)  # x̂ = 1; f is 6 and 3
    recipe = FAnoganRecipe(kappa=0.5)
    assert recipe.score(networks, x).tolist() == pytest.approx([1 + 0.5 * 9] * 2)
    assert phases(recipe, stage=1)["encoder"].loss(networks, step_of(x))[0].item() == pytest.approx(5.5)


def test_f_anogan_stages() -> None:
    recipe = FAnoganRecipe(**TINY["f_anogan"])
    assert [stage.name for stage in recipe.stages] == ["wgan", "encoder"]
    assert {name: phase.every for name, phase in phases(recipe).items()} == {"critic": 1, "generator": 5}
    trainer = trainer_of(recipe)
    untrained = state(trainer.networks["encoder"])
    moved = {"critic": [], "generator": []}
    for _ in range(10):
        before = {name: weights(trainer.networks[name]) for name in moved}
        trainer.step(images())
        for name, flags in moved.items():
            flags.append(not torch.equal(before[name], weights(trainer.networks[name])))
    assert moved == {"critic": [True] * 10, "generator": [False] * 4 + [True] + [False] * 4 + [True]}
    assert all(torch.equal(value, untrained[key]) for key, value in trainer.networks["encoder"].state_dict().items())
    trainer.begin(recipe.stages[1])
    frozen = {name: state(trainer.networks[name]) for name in moved}
    trainer.step(images())
    for name, before_stage in frozen.items():  # BatchNorm's statistics too
        assert all(torch.equal(value, before_stage[key]) for key, value in trainer.networks[name].state_dict().items())
    assert not torch.equal(trainer.networks["encoder"].main[0].weight, untrained["main.initial-conv-1-2.weight"])
    assert isinstance(trainer._phases[0][2], torch.optim.RMSprop)


def test_every_so_many_steps_are_counted_from_the_start_of_a_stage() -> None:
    recipe = FAnoganRecipe(**TINY["f_anogan"], critic_steps=2)
    trainer = trainer_of(recipe)
    trainer.step(images())
    trainer.begin(recipe.stages[0])
    before = weights(trainer.networks["generator"])
    trainer.step(images())
    assert torch.equal(weights(trainer.networks["generator"]), before)
    trainer.step(images())
    assert not torch.equal(weights(trainer.networks["generator"]), before)


def test_f_anogan_critic_judges_each_image_alone() -> None:
    critic = FAnoganRecipe(**TINY["f_anogan"]).build((1, 32, 32))["critic"].train()
    x = images(3, side=32)
    torch.testing.assert_close(critic(x)[0][:1], critic(x[:1])[0])
    assert [m.num_groups for m in critic.modules() if isinstance(m, nn.GroupNorm)] == [1, 1]  # layer norm


def test_f_anogans_encoder_has_a_rate_of_its_own() -> None:
    recipe = FAnoganRecipe(lr=1e-3, betas=(0.1, 0.2), lr_encoder=3e-3)
    assert [phase.optimiser for phase in recipe.stages[0].phases] == [Optimiser(1e-3, (0.1, 0.2))] * 2
    assert phases(recipe, stage=1)["encoder"].optimiser == Optimiser(3e-3, kind="rmsprop")


# AnoGAN


@pytest.fixture(scope="module")
def searched() -> tuple[AnoganRecipe, Networks]:
    recipe = AnoganRecipe(features=4, latent_dim=4, batch_size=16, lr=1e-3, search_steps=60, search_lr=0.05)
    detector = RecipeDetector(recipe).fit(blobs(64), epochs=10, device="cpu")
    return recipe, detector.networks_


def test_search_lowers_every_loss(searched: tuple[AnoganRecipe, Networks]) -> None:
    recipe, networks = searched
    with torch.no_grad(), scoring_mode(networks, "running"):
        start = replace(recipe, search_steps=0).score(networks, images(8, seed=1))
        assert (recipe.score(networks, images(8, seed=1)) < start).all()
        residual = [replace(recipe, search_steps=k).anomaly_map(networks, images(8, seed=1)).mean() for k in (0, 60)]
        assert residual[1] < residual[0]


def test_search_ignores_batch_mates_and_leaves_no_trace(searched: tuple[AnoganRecipe, Networks]) -> None:
    recipe, networks = searched
    x = images(6, seed=1)
    before = {name: state(net) for name, net in networks.items()}
    for parameter in [p for network in networks.values() for p in network.parameters()]:
        parameter.grad = None
    for tol in (None, 0.02):
        recipe = replace(recipe, search_tol=tol, search_steps=100)
        with torch.no_grad(), scoring_mode(networks, "running"):
            together = recipe.search(networks, x)
            alone = torch.cat([recipe.search(networks, x[k : k + 1]) for k in range(6)])
        torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-3)
        assert not together.requires_grad and together.shape == (6, 4, 1, 1)
    for name, network in networks.items():
        assert all(p.requires_grad and p.grad is None for p in network.parameters())
        assert all(torch.equal(value, before[name][key]) for key, value in network.state_dict().items())


def test_search_is_adam_on_each_code(searched: tuple[AnoganRecipe, Networks]) -> None:
    recipe, networks = searched
    x = images(2, seed=1)
    with scoring_mode(networks, "running"):
        recipe = replace(recipe, search_steps=8)
        with torch.no_grad():
            z = replace(recipe, search_steps=0).search(networks, x)
            found = recipe.search(networks, x)
            features = networks["discriminator"](x)[1]
        assert torch.equal(z[0], z[1])
        z.requires_grad_(True)
        adam = torch.optim.Adam([z], lr=recipe.search_lr)
        for _ in range(8):
            x_hat = networks["generator"](z)
            distance = 0.9 * (x - x_hat).abs().sum() + 0.1 * (features - networks["discriminator"](x_hat)[1]).abs().sum()
            (z.grad,) = torch.autograd.grad(distance, z)
            adam.step()
    torch.testing.assert_close(found, z.detach(), atol=1e-5, rtol=1e-5)


def test_search_stops_when_an_image_no_longer_improves(searched: tuple[AnoganRecipe, Networks]) -> None:
    recipe, networks = searched
    sizes: list[int] = []
    handle = networks["generator"].register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    with torch.no_grad(), scoring_mode(networks, "running"):
        replace(recipe, search_steps=400, search_tol=0.05).search(networks, images(8, seed=1))
    handle.remove()
    assert len(sizes) < 400 and sizes == sorted(sizes, reverse=True) and sizes[0] == 8


def test_each_search_ends_when_its_own_image_no_longer_improves(searched: tuple[AnoganRecipe, Networks]) -> None:
    recipe, networks = searched
    recipe, tol = replace(recipe, search_lr=0.5), 0.065
    x = torch.cat([images(2, seed=1), -images(2, seed=2), torch.full((1, 1, 16, 16), -1.0)])
    with torch.no_grad(), scoring_mode(networks, "running"):
        found = replace(recipe, search_steps=150, search_tol=tol).search(networks, x)
        search = _Search(replace(recipe, search_steps=0).search(networks, x))
        with weights_frozen(networks):
            features = networks["discriminator"](x)[1]
            steps = [(recipe._search_step(networks, x, features, search), search.z.clone()) for _ in range(125)]
    losses, codes = (torch.stack(each) for each in zip(*steps[24::25], strict=True))  # before and after each 25th step
    last = 1 + (losses[1:] > (1 - tol) * losses[:-1]).int().argmax(0)
    assert last.tolist() == [2, 2, 1, 1, 4]
    torch.testing.assert_close(found, codes[last, torch.arange(5)], atol=1e-2, rtol=1e-2)


def test_anogan_losses_by_hand() -> None:
    recipe = AnoganRecipe(latent_dim=1, search_steps=0, w_feature=0.25)
    start = recipe.search(stubs(generator=lambda z: z, discriminator=lambda x: (x, x)), torch.zeros(1, 1, 2, 2)).item()
    assert -1 <= start <= 1
    networks = stubs(
        generator=lambda z: (z - start).expand(-1, 1, 2, 2), discriminator=lambda x: (x.mean((1, 2, 3)), 7 * x[:, :, :1, :1])
    )
    x = torch.full((2, 1, 2, 2), -2.0)  # G(z₀) = 0: residual 8, features apart by 14
    assert recipe.score(networks, x).tolist() == pytest.approx([0.75 * 8 + 0.25 * 14] * 2)
    zeros = {"z": torch.full((2, 1, 1, 1), start)}
    loss, computed = phases(recipe)["discriminator"].loss(networks, step_of(torch.full((2, 1, 2, 2), math.log(3)), zeros))
    assert loss.item() == pytest.approx(-math.log(3 / 4) - math.log(1 / 2))
    assert phases(recipe)["generator"].loss(networks, step_of(x, zeros, computed))[0].item() == pytest.approx(math.log(2))


def test_anogan_prior_is_uniform() -> None:
    z = AnoganRecipe().draw(100, torch.Generator().manual_seed(0))["z"]
    assert z.shape == (100, 100, 1, 1) and -1 <= z.min() < -0.99 and 0.99 < z.max() <= 1
    assert z.var().item() == pytest.approx(1 / 3, abs=0.02)


class Syncs(TorchDispatchMode):
    """Counts what makes the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "_to_copy"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_a_search_step_of_anogan_never_waits_for_the_device() -> None:
    recipe = AnoganRecipe(features=4, latent_dim=8)
    networks = {name: network.eval() for name, network in recipe.build((1, 16, 16)).items()}
    images, search = torch.from_numpy(blobs(3)), _Search(torch.ones(3, 8, 1, 1))
    features = recipe._features(networks, images).detach()
    z = search.z
    with Syncs() as syncs, weights_frozen(networks):
        losses = [recipe._search_step(networks, images, features, search) for _ in range(3)]
    assert not syncs.found and search.z is z and not z.eq(1).any() and int(search.count) == 3
    assert not torch.equal(losses[0], losses[2])
