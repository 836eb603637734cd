"""GANomaly: its numbers by hand, its facts from the paper, and the authors' checkpoint files."""

from __future__ import annotations

import copy
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import blobs

from ganomaly_plugin import load_authors_checkpoint, load_detector, make_detector, save_authors_checkpoint
from ganomaly_plugin.detectors.ganomaly import (
    GanomalyRecipe,
    adversarial_loss,
    contextual_loss,
    discriminator_loss,
    encoder_loss,
)
from ganomaly_plugin.errors import CorruptFile, InvalidInput, NotFitted
from ganomaly_plugin.images import to_float
from ganomaly_plugin.networks import Decoder, Encoder, halvings
from ganomaly_plugin.recipe import Optimiser
from ganomaly_plugin.training.detector import RecipeDetector
from ganomaly_plugin.training.plain import (
    PlainTrainer,
    build_networks,
    epoch_batches,
    epoch_means,
    make_optimiser,
    set_gradients,
    to_device,
    train,
)

SMALL = {"features": 4, "latent_dim": 8}
CPU = torch.device("cpu")


def parameters(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_size_of_the_paper_networks() -> None:
    networks = GanomalyRecipe().build((1, 32, 32))
    assert parameters(networks["generator"]) == 3_200_384
    assert parameters(networks["discriminator"]) == 661_248


def test_losses_by_hand() -> None:
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 5.0]])
    assert adversarial_loss(a, b).item() == pytest.approx((1 + 9) / 2)
    assert contextual_loss(a, b).item() == pytest.approx((1 + 3) / 2)
    assert encoder_loss(a, b).item() == pytest.approx((1 + 9) / 2)
    logits = torch.tensor([0.0, math.log(3)])  # sigmoid: 1/2 and 3/4
    wanted = 0.5 * (-(math.log(1 / 2) + math.log(3 / 4)) / 2 - (math.log(1 / 2) + math.log(1 / 4)) / 2)
    assert discriminator_loss(logits, logits).item() == pytest.approx(wanted)


def test_feature_matching_gives_no_gradient_to_the_real_features() -> None:
    real, fake = torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    adversarial_loss(real, fake).backward()
    assert real.grad is None and fake.grad is not None


def test_initial_weights_are_dcgan() -> None:
    generator = build_networks(GanomalyRecipe(), (3, 32, 32), seed=0)["generator"]
    for module in generator.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)) and module.weight.numel() > 20_000:
            assert module.bias is None
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert abs(module.weight.mean().item()) < 0.001
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.weight.mean().item() == pytest.approx(1.0, abs=0.02) and not module.bias.any()


@pytest.mark.parametrize(("side", "count", "last"), [(16, 2, 4), (32, 3, 4), (128, 5, 4), (48, 4, 3), (80, 4, 5), (112, 4, 7)])
def test_every_multiple_of_16_goes_through_the_networks(side: int, count: int, last: int) -> None:
    assert halvings(side) == (count, last)
    x = torch.zeros(1, 1, side, side)
    z = Encoder(side, 1, 2, 3)(x)
    assert z.shape == (1, 3, 1, 1) and Decoder(side, 1, 2, 3).eval()(z).shape == x.shape


def step_losses(recipe: GanomalyRecipe) -> dict[str, float]:
    trainer = PlainTrainer(recipe, build_networks(recipe, (1, 16, 16), 0), seed=0, device=CPU)
    return {name: float(value) for name, value in trainer.step(torch.from_numpy(blobs(8))).items()}


def test_total_is_the_weighted_sum_and_variants_differ() -> None:
    losses = step_losses(GanomalyRecipe(**SMALL, w_adv=2, w_con=3, w_enc=5))
    wanted = 2 * losses["adversarial"] + 3 * losses["contextual"] + 5 * losses["encoder"]
    assert losses["generator"] == pytest.approx(wanted, rel=1e-6)
    early = step_losses(GanomalyRecipe(**SMALL, adversarial="bce"))
    assert early["adversarial"] == pytest.approx(math.log(2), abs=0.3) != losses["adversarial"]
    assert early["contextual"] == losses["contextual"]


def test_detached_features_leave_the_generator_to_the_other_losses() -> None:
    images = torch.from_numpy(blobs(8))
    weights = {}
    for name, change in {"detached": {"adversarial": "feature-matching-detached"}, "without": {"w_adv": 0.0}}.items():
        recipe = GanomalyRecipe(**SMALL, **change)
        trainer = PlainTrainer(recipe, build_networks(recipe, (1, 16, 16), 0), seed=0, device=CPU)
        trainer.step(images)
        weights[name] = torch.cat([p.flatten() for p in trainer.networks["generator"].parameters()])
    torch.testing.assert_close(weights["detached"], weights["without"])


def test_a_collapsed_discriminator_is_drawn_anew() -> None:
    def classifier(redraw_below: float, seed: int) -> torch.Tensor:
        recipe = GanomalyRecipe(**SMALL, redraw_below=redraw_below)
        trainer = PlainTrainer(recipe, build_networks(recipe, (1, 16, 16), 0), seed=seed, device=CPU)
        trainer.step(torch.from_numpy(blobs(8)))
        return trainer.networks["discriminator"].classifier[0].weight.detach().flatten()

    kept, drawn, again, other = classifier(1e-5, 0), classifier(100.0, 0), classifier(100.0, 0), classifier(100.0, 1)
    assert torch.equal(kept, classifier(0.0, 0)) and not torch.allclose(kept, drawn, atol=1e-3)
    assert torch.equal(drawn, again) and not torch.equal(drawn, other)
    assert drawn.std().item() == pytest.approx(0.02, rel=0.3)


def test_batch_statistics_depend_on_the_batch_and_running_ones_do_not() -> None:
    images, alone = blobs(40, seed=1), 7
    detector = make_detector("ganomaly", **SMALL).fit(images, epochs=2)
    together = detector.score(images)
    np.testing.assert_allclose(detector.score(images[alone : alone + 1])[0], together[alone], rtol=1e-5)
    assert isinstance(detector, RecipeDetector)
    before = {k: v.clone() for k, v in detector.networks_["generator"].state_dict().items()}
    batch = make_detector("ganomaly", **SMALL, batchnorm="batch").fit(images, epochs=2)
    scores = batch.score(images)
    assert abs(batch.score(images[alone : alone + 1])[0] / scores[alone] - 1) > 0.001
    np.testing.assert_array_equal(batch.score(images), scores)  # scoring remembers nothing
    assert isinstance(batch, RecipeDetector)
    after = batch.networks_["generator"].state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_input_range_is_the_authors_mnist_normalisation() -> None:
    low, high = (0 - 0.1307) / 0.3081, (1 - 0.1307) / 0.3081
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    torch.testing.assert_close(to_float(pixels, (low, high)), (pixels / 255 - 0.1307) / 0.3081)
    torch.testing.assert_close(to_float(pixels), torch.tensor([-1.0, -0.6, 1.0]))


def test_last_short_batch_is_dropped_unless_it_is_the_only_one() -> None:
    rng = torch.Generator().manual_seed(0)
    sizes = [len(index) for index in epoch_batches(10, 4, rng)]
    assert sizes == [4, 4]
    assert [len(index) for index in epoch_batches(3, 4, rng)] == [3]
    seen = torch.cat(list(epoch_batches(8, 4, rng)))
    assert sorted(seen.tolist()) == list(range(8))


def test_diverging_training_names_loss_and_step() -> None:
    from ganomaly_plugin.errors import Diverged

    with pytest.raises(Diverged, match=r"loss '\w+' of stage 'train' is (nan|inf) at step \d+"):
        make_detector("ganomaly", **SMALL, lr=1e30).fit(blobs(16), epochs=30)


def test_losses_of_an_epoch_are_means_and_the_first_bad_step_is_named() -> None:
    from ganomaly_plugin.errors import Diverged

    (stage,) = GanomalyRecipe().stages
    steps = [{"a": torch.tensor(1.0)}, {"a": torch.tensor(2.0), "b": torch.tensor(5.0)}, {"a": torch.tensor(6.0)}]
    assert epoch_means(steps, stage, first_step=1) == {"a": 3.0, "b": 5.0}  # b's phase does not run at each step
    steps[1]["b"] = torch.tensor(math.inf)
    with pytest.raises(Diverged, match="loss 'b' of stage 'train' is inf at step 12"):
        epoch_means(steps, stage, first_step=11)
    images, rate = torch.from_numpy(blobs(16)), {"batch_size": 8, "lr": 1e30}
    with pytest.raises(Diverged, match=r"at step 2\."):  # of two an epoch; the first is at weights that are finite
        train(GanomalyRecipe(**SMALL, **rate), images, seed=0, epochs=1, device=CPU, after_epoch=lambda *_: None)


def test_optimisers_have_what_the_recipe_gives_them() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 3, 4, 4))
    (adam,) = make_optimiser(Optimiser(3e-3, (0.1, 0.2)), [weight]).param_groups
    assert (adam["lr"], adam["betas"]) == (3e-3, (0.1, 0.2))
    (rmsprop,) = make_optimiser(Optimiser(3e-3, kind="rmsprop"), [weight]).param_groups
    assert rmsprop["lr"] == 3e-3
    gradient = torch.arange(96.0).view(2, 3, 4, 4).to(memory_format=torch.channels_last)
    set_gradients([weight], [gradient])
    assert torch.equal(weight.grad, gradient) and weight.grad.stride() == weight.stride() != gradient.stride()


def test_looking_at_batch_statistics_between_epochs_changes_no_training() -> None:
    images, found = blobs(24), []
    for on_epoch in (None, lambda _, detector: detector.score(images)):
        detector = make_detector("ganomaly", **SMALL, batch_size=8, batchnorm="batch")
        detector.fit(images, epochs=3, device="cpu", on_epoch=on_epoch)
        found.append({key: value for net in detector.networks_.values() for key, value in net.state_dict().items()})
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_networks_leave_torch_randomness_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    recipe = GanomalyRecipe(**SMALL)
    train(recipe, torch.from_numpy(blobs(8)), seed=0, epochs=1, device=CPU, after_epoch=lambda *_: None)
    assert torch.equal(torch.get_rng_state(), before)
    fitted = make_detector("ganomaly", **SMALL).fit(blobs(8), epochs=1, device="cpu")
    fitted.save(tmp_path / "detector.pt")
    save_authors_checkpoint(fitted, tmp_path)
    load_detector(tmp_path / "detector.pt", device="cpu")
    load_authors_checkpoint(tmp_path / "netG.pth", device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


class Slow(GanomalyRecipe):
    """Other threads have time to draw while this one does."""

    def build(self, chw: tuple[int, int, int]) -> dict[str, torch.nn.Module]:
        time.sleep(0.01)
        return super().build(chw)

    def redraw(self, network: torch.nn.Module) -> None:
        time.sleep(0.01)
        super().redraw(network)


def test_threads_that_draw_networks_get_what_they_get_alone() -> None:
    recipe = Slow(**SMALL, batch_size=4, redraw_below=1e9)  # D is drawn anew at each step

    def trained(seed: int) -> torch.Tensor:
        trainer = train(recipe, torch.from_numpy(blobs(8)), seed=seed, epochs=2, device=CPU, after_epoch=lambda *_: None)
        return torch.cat([p.detach().flatten() for net in trainer.networks.values() for p in net.parameters()])

    alone = [trained(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(trained, range(4)))
    assert all(map(torch.equal, together, alone))


@pytest.mark.parametrize("extra", [0, 2])
def test_authors_checkpoint_round_trip(tmp_path: Path, extra: int) -> None:
    images = blobs(12, channels=3, side=32)
    fitted = make_detector("ganomaly", **SMALL, extra_layers=extra).fit(images, epochs=1)
    assert isinstance(fitted, RecipeDetector)
    save_authors_checkpoint(fitted, tmp_path)
    content = torch.load(tmp_path / "netG.pth", weights_only=True)
    assert content["epoch"] == 1 and "encoder1.main.initial-conv-3-4.weight" in content["state_dict"]
    loaded = load_authors_checkpoint(tmp_path / "netG.pth", tmp_path / "netD.pth")
    assert loaded.hparams == fitted.hparams and loaded.image_shape_ == (3, 32, 32)
    np.testing.assert_array_equal(loaded.score(images), fitted.score(images))
    alone = load_authors_checkpoint(tmp_path / "netG.pth", batchnorm="batch")
    assert alone.hparams["batchnorm"] == "batch" and np.isfinite(alone.score(images)).all()


def test_scores_that_need_more_than_the_files_are_refused(tmp_path: Path) -> None:
    images = blobs(12)
    fitted = make_detector("ganomaly", **SMALL, score_by="feature").fit(images, epochs=1, device="cpu")
    save_authors_checkpoint(fitted, tmp_path)
    net_g, net_d = tmp_path / "netG.pth", tmp_path / "netD.pth"
    with pytest.raises(InvalidInput, match=r"score_by=feature needs the discriminator\. Give netD\.pth too"):
        load_authors_checkpoint(net_g, score_by="feature")
    both = load_authors_checkpoint(net_g, net_d, score_by="feature", device="cpu")
    np.testing.assert_array_equal(both.score(images), fitted.score(images))
    for files in ((net_g,), (net_g, net_d)):
        with pytest.raises(InvalidInput, match="score_by=combined is standardised on held-out normal images"):
            load_authors_checkpoint(*files, score_by="combined")
    one, two = (load_authors_checkpoint(net_g, device="cpu").named_scores(images)["feature"] for _ in range(2))
    np.testing.assert_array_equal(one, two)


def test_recorded_weights_load_as_a_checkpoint(golden: list[Path], tmp_path: Path) -> None:
    """The recordings hold the authors' own state, under their names: a published netG.pth is the same."""
    with np.load(golden[0]) as archive:
        final = {k.removeprefix("final/g/"): torch.from_numpy(archive[k]) for k in archive.files if k.startswith("final/g/")}
        test, scores = archive["test_images"], archive["test_scores_eval"]
    torch.save({"epoch": 5, "state_dict": final}, tmp_path / "netG.pth")
    detector = load_authors_checkpoint(tmp_path / "netG.pth")
    np.testing.assert_allclose(detector.score(test), scores, rtol=1e-4)


def test_bad_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="No checkpoint at"):
        load_authors_checkpoint(tmp_path / "netG.pth")
    (tmp_path / "netG.pth").write_bytes(b"PK\x03\x04 truncated")
    with pytest.raises(CorruptFile, match="not a checkpoint"):
        load_authors_checkpoint(tmp_path / "netG.pth")
    torch.save({"epoch": 1, "state_dict": {"conv.weight": torch.zeros(1)}}, tmp_path / "netG.pth")
    with pytest.raises(CorruptFile, match="no GANomaly generator"):
        load_authors_checkpoint(tmp_path / "netG.pth")
    with pytest.raises(InvalidInput, match="Only ganomaly"):
        save_authors_checkpoint(make_detector("ae"), tmp_path)
    with pytest.raises(InvalidInput, match="got ganomaly_plus"):  # whose score is more than those networks
        save_authors_checkpoint(make_detector("ganomaly_plus"), tmp_path)
    with pytest.raises(InvalidInput, match="Only ganomaly"):
        save_authors_checkpoint("ganomaly", tmp_path)  # type: ignore[arg-type]
    with pytest.raises(NotFitted):
        save_authors_checkpoint(make_detector("ganomaly"), tmp_path)
    fitted = make_detector("ganomaly", features=2, latent_dim=2).fit(blobs(8), epochs=1, device="cpu")
    with pytest.raises(InvalidInput, match=r"Cannot write /proc/netG\.pth"):
        save_authors_checkpoint(fitted, "/proc")
    save_authors_checkpoint(fitted, tmp_path)
    with pytest.raises(InvalidInput, match="features is told by the weights: 2"):
        load_authors_checkpoint(tmp_path / "netG.pth", features=8)
    state = torch.load(tmp_path / "netG.pth", weights_only=True)["state_dict"]
    first = next(key for key in state if "initial-conv" in key)
    for wrong in ({**state, first: 3}, {**state, 5: state[first]}, {**state, first: torch.zeros(3)}):
        torch.save({"epoch": 1, "state_dict": wrong}, tmp_path / "netG.pth")
        with pytest.raises(CorruptFile):
            load_authors_checkpoint(tmp_path / "netG.pth")


def test_kernels_lie_in_channels_last_order_those_of_one_channel_too() -> None:
    layers = torch.nn.ModuleList([torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(3, 4, 3), torch.nn.Conv3d(2, 4, 3)])
    plain = copy.deepcopy(layers[:2]).to(memory_format=torch.channels_last)
    moved = to_device(layers, torch.device("cpu"))
    assert [each.weight.stride() for each in moved[:2]] == [each.weight.stride() for each in plain]
    assert moved[0].weight.stride() == (9, 1, 3, 1) and moved[2].weight.is_contiguous()
