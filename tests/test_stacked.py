"""The stacked trainer is held to the plain one: the same models, alone and together."""

from __future__ import annotations

import types
import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ganomaly_plugin.datasets.base import load_dataset
from ganomaly_plugin.detectors.ae import AutoencoderRecipe
from ganomaly_plugin.errors import Diverged, InvalidInput
from ganomaly_plugin.recipe import Recipe
from ganomaly_plugin.registry import make_detector
from ganomaly_plugin.speed.work import count_work
from ganomaly_plugin.training import together
from ganomaly_plugin.training.detector import RecipeDetector
from ganomaly_plugin.training.memory import bytes_of_model
from ganomaly_plugin.training.plain import PlainTrainer, build_networks, trained_parameters
from ganomaly_plugin.training.redraw import READY, Spares
from ganomaly_plugin.training.stack import make_stack
from ganomaly_plugin.training.stacked import StackedTrainer, why_not_stackable
from ganomaly_plugin.training.together import Member, _packed, fit_together

CPU = torch.device("cpu")
SMALL = {"batch_size": 16, "features": 8, "latent_dim": 10}
STACKABLE = {
    "ganomaly": {},
    "ae": {},
    "vae": {},
    "skip_ganomaly": {},
    "egbad": {"joint_features": 32},
    "alad": {"joint_features": 32, "spectral": False},
    "anogan": {},
    "ganomaly_plus": {"ema_decay": 0.9},
}


def digits() -> torch.Tensor:
    """Digits under noise: a weight whose pixels are always black has no gradient, and Adam would magnify rounding errors."""
    images = torch.from_numpy(load_dataset("digits", root=None, image_size=16).images[:600].copy())
    noise = torch.randint(0, 256, images.shape, generator=torch.Generator().manual_seed(0))
    return (0.8 * images + 0.2 * noise).to(torch.uint8)


@pytest.fixture
def float64():
    """Random numbers of a step are drawn in float64 too."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def recipe_of(name: str, **hparams: object) -> Recipe:
    detector = make_detector(name, **{**SMALL, **hparams})
    assert isinstance(detector, RecipeDetector)
    return detector.recipe


def side_by_side(recipe: Recipe, how: str, steps: int, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """The largest relative difference of a loss and absolute difference of a weight, over `steps` of three models."""
    data, order = digits(), torch.Generator().manual_seed(0)
    data = data.to(dtype) * 2 / 255 - 1
    seeds = [3, 4, 5]
    models = [{k: n.to(dtype) for k, n in build_networks(recipe, (1, 16, 16), seed).items()} for seed in seeds]
    stack = make_stack(recipe, models, seeds=seeds, device=CPU, how=how)
    plain = [PlainTrainer(recipe, networks, seed=seed, device=CPU) for networks, seed in zip(models, seeds, strict=True)]
    loss_gap = weight_gap = 0.0
    for _ in range(steps):
        x = torch.stack([data[torch.randint(len(data), (recipe.batch_size,), generator=order)] for _ in seeds])
        together = stack.step(x)
        for m, trainer in enumerate(plain):
            alone = trainer.step(x[m])
            assert together.keys() == alone.keys()
            for name, value in alone.items():
                gap = abs(float(together[name][m]) - float(value)) / max(abs(float(value)), 1e-3)
                loss_gap = max(loss_gap, gap)
    for m, trainer in enumerate(plain):
        mine = stack.scoring_networks(m)
        for name, network in trainer.scoring_networks().items():
            state = mine[name].state_dict()
            for key, value in network.state_dict().items():
                weight_gap = max(weight_gap, float((state[key] - value).abs().max()))
    return loss_gap, weight_gap


@pytest.mark.parametrize("name", STACKABLE)
def test_stacked_models_are_those_of_the_plain_trainer(name):
    recipe = recipe_of(name, **STACKABLE[name])
    loss_gap, _ = side_by_side(recipe, "grouped", steps=6)
    assert loss_gap < 1e-5


@pytest.mark.parametrize("name", STACKABLE)
def test_matrix_products_compute_the_same_models(name, float64):
    # In float32 their other order of summing sets weights apart whose gradient is all but zero, which Adam magnifies.
    layers = {"extra_layers": 1} if name == "ganomaly" else {}
    loss_gap, weight_gap = side_by_side(recipe_of(name, **STACKABLE[name], **layers), "matmul", steps=4, dtype=torch.float64)
    assert loss_gap < 1e-9 and weight_gap < 1e-9


@pytest.mark.parametrize("name", STACKABLE)
def test_in_float64_nothing_but_rounding_is_between_them(name, float64):
    # In float32 rounding depends on the processor and on the threads, and Adam makes whole steps of it where a gradient is all
    # but zero. In turns, which is how a CPU does it, nothing differs in float32 either.
    loss_gap, weight_gap = side_by_side(recipe_of(name, **STACKABLE[name]), "grouped", steps=25, dtype=torch.float64)
    assert loss_gap < 1e-9 and weight_gap < 1e-9


def test_at_the_published_width_the_mathematics_is_the_same():
    recipe = recipe_of("ganomaly", features=64, latent_dim=100)
    loss_gap, weight_gap = side_by_side(recipe, "grouped", steps=3, dtype=torch.float64)
    assert loss_gap < 1e-9 and weight_gap < 1e-9


@pytest.mark.parametrize("name", STACKABLE)
def test_in_turns_nothing_differs_at_all(name):
    assert side_by_side(recipe_of(name, **STACKABLE[name]), "turns", steps=25) == (0.0, 0.0)


class Dtypes(TorchDispatchMode):
    """Notes the precisions of convolutions and products, and of everything else."""

    def __init__(self) -> None:
        super().__init__()
        self.products: set[torch.dtype] = set()
        self.others: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            if name in ("convolution", "bmm", "mm", "addmm", "baddbmm"):
                self.products.add(result.dtype)
        elif name in ("native_batch_norm", "_native_batch_norm_legit"):
            self.others.add(result[0].dtype)
        return result


@pytest.mark.parametrize("how", ["grouped", "matmul", "streams"])
def test_bfloat16_networks_stack_within_their_precision(how):
    recipe = recipe_of("ae", precision="bf16")
    loss_gap, _ = side_by_side(recipe, how, steps=3)
    assert loss_gap < 0.05
    models = [build_networks(recipe, (1, 16, 16), seed) for seed in (0, 1)]
    stack = make_stack(recipe, models, seeds=[0, 1], device=CPU, how=how)
    with Dtypes() as dtypes:
        losses = stack.step(digits()[:32].view(2, 16, 1, 16, 16))
    with Dtypes() as of_plain:
        PlainTrainer(recipe, models[0], seed=0, device=CPU).step(digits()[:16])
    assert dtypes.products == of_plain.products == {torch.bfloat16} and dtypes.others == of_plain.others
    assert {loss.dtype for loss in losses.values()} == {torch.float32}


class Copies(TorchDispatchMode):
    """Counts the numbers that are moved from one place in memory to another and stay what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name.split("::")[1] in ("clone", "copy_", "constant_pad_nd", "new_empty_strided"):
            self.numbers += result.numel()
        return result


@pytest.mark.parametrize("how", ["grouped", "matmul"])
def test_a_step_of_mapped_models_copies_no_more_than_it_has_to(how):
    # On a GPU a step of small models is bound by memory. An activation in place of a view alone would copy its maps 5 times.
    recipe = recipe_of("ganomaly", features=16, batch_size=64)
    models = [build_networks(recipe, (1, 32, 32), seed) for seed in (0, 1)]
    stack = make_stack(recipe, models, seeds=[0, 1], device=CPU, how=how)
    images = torch.zeros(2, 64, 1, 32, 32, dtype=torch.uint8)
    stack.step(images)
    with Copies() as copies:
        stack.step(images)
    weights = sum(weight.numel() for weight in stack.weights.values())
    padded = 34**2 + 16 * 18**2 + 32 * 10**2  # the maps that an encoder's convolutions read, where these have borders
    patches = 16 * (16**2 + 16 * 8**2 + 32 * 4**2 + 64)
    networks = 4 + 1  # encoder, encoder and discriminator twice, and the decoder's gradients
    assert copies.numbers < weights + (2 * 64 * networks * (padded + patches) if how == "matmul" else 0)


def test_products_are_only_of_the_gradients_that_a_phase_asks_for():
    # G's phase goes through D and asks for none of D's gradients, D's phase through D alone and for none of an image's.
    recipe = recipe_of("ganomaly", features=16, batch_size=64)
    models = [build_networks(recipe, (1, 32, 32), seed) for seed in (0, 1)]
    stack, plain = (
        make_stack(recipe, models, seeds=[0, 1], device=CPU, how="matmul"),
        PlainTrainer(recipe, models[0], seed=0, device=CPU),
    )
    images = torch.zeros(2, 64, 1, 32, 32, dtype=torch.uint8)
    needed = count_work(lambda: plain.step(images[0])).flops
    assert count_work(lambda: stack.step(images)).flops == pytest.approx(2 * needed, rel=0.02)


def test_a_collapsed_discriminator_is_drawn_anew_in_its_own_model_only(monkeypatch, float64):
    recipe = recipe_of("ganomaly", redraw_below=0.68)  # near the loss of a fresh D: some models redraw, at some steps
    counts = []
    original = Spares.give

    def watched(self: Spares, weights: dict[str, torch.Tensor], below: torch.Tensor) -> None:
        counts.append(below.tolist())
        original(self, weights, below)

    monkeypatch.setattr(Spares, "give", watched)
    loss_gap, weight_gap = side_by_side(recipe, "grouped", steps=12, dtype=torch.float64)
    assert any(any(row) and not all(row) for row in counts)
    assert loss_gap < 1e-9 and weight_gap < 1e-9


def test_so_it_is_where_new_weights_are_drawn_between_epochs_only(monkeypatch, float64):
    # As on a GPU, where a step does not wait to learn whether a model collapsed: it may do so several times till then.
    recipe = recipe_of("ganomaly", redraw_below=0.68)
    counts = []
    after_step, refill = StackedTrainer.after_step, Spares.refill

    def seldom(self: Spares) -> None:
        counts.extend(self.spent.tolist())
        refill(self)

    def between_epochs(self: StackedTrainer) -> None:
        monkeypatch.setattr(Spares, "refill", seldom if self.steps % 3 == 2 else lambda self: None)
        after_step(self)

    monkeypatch.setattr(StackedTrainer, "after_step", between_epochs)
    loss_gap, weight_gap = side_by_side(recipe, "grouped", steps=12, dtype=torch.float64)
    assert 1 < max(counts) < READY and min(counts) < max(counts)
    assert loss_gap < 1e-9 and weight_gap < 1e-9


KEPT = {"ganomaly": {"redraw_below": 100.0}, "egbad": {"joint_features": 32, "ema_decay": 0.9}, "vae": {}}


@pytest.mark.parametrize("name", KEPT)  # D is drawn anew at each step, weights are averaged, numbers are drawn
def test_models_that_stay_go_on_as_if_none_had_left(name, float64):
    recipe, data, seeds = recipe_of(name, **KEPT[name]), digits().double() * 2 / 255 - 1, [3, 4, 5]
    models = [{k: n.double() for k, n in build_networks(recipe, (1, 16, 16), seed).items()} for seed in seeds]
    whole, fewer = (make_stack(recipe, models, seeds=seeds, device=CPU, how="grouped") for _ in range(2))
    for step, x in enumerate(data[: 4 * 48].view(4, 3, 16, 1, 16, 16)):
        if step == 2:
            fewer.keep([2, 0])
        whole.step(x)
        fewer.step(x if step < 2 else x[[2, 0]])
    for mine, theirs in ((0, 2), (1, 0)):
        left = whole.scoring_networks(theirs)
        for key, network in fewer.scoring_networks(mine).items():
            for own, value in network.state_dict().items():
                torch.testing.assert_close(value, left[key].state_dict()[own], atol=1e-9, rtol=1e-9)


def test_spares_of_models_that_stay_are_their_own():
    recipe = recipe_of("ganomaly", redraw_below=1.0)
    networks, phase = build_networks(recipe, (1, 16, 16), 0), recipe.stages[0].phases[1]
    rngs = [[torch.Generator().manual_seed(seed) for seed in (3, 4, 5)] for _ in range(2)]
    whole, fewer = (Spares(recipe, phase, networks, each, CPU) for each in rngs)

    def given(spares: Spares, *below: bool) -> dict[str, torch.Tensor]:
        weights = {name: torch.zeros_like(spare[0]) for name, spare in spares.weights.items()}
        spares.give(weights, torch.tensor(below))
        return weights

    for spares in (whole, fewer):
        given(spares, True, False, True)
        given(spares, False, False, True)
    fewer.keep([2, 0])
    assert fewer.spent.tolist() == [2, 1]
    left, mine = given(whole, True, True, True), given(fewer, True, True)
    assert all(torch.equal(mine[name], left[name][[2, 0]]) for name in mine)
    for spares in (whole, fewer):
        spares.refill()
    assert all(torch.equal(spare, whole.weights[name][:, [2, 0]]) for name, spare in fewer.weights.items())


def test_a_member_without_a_budget_has_its_methods_and_one_that_cannot_begin_fails_alone(monkeypatch):
    data, index = digits(), torch.arange(40)
    members = [Member(make_detector("ganomaly_plus", **SMALL, select="normal-val"), index[:n], seed=0) for n in (1, 40)]
    monkeypatch.setattr(type(members[0].detector.recipe), "default_steps", 3)
    fit_together(members, data, epochs=None, steps=None, device=CPU)
    assert isinstance(members[0].error, InvalidInput) and members[1].error is None
    assert members[1].detector.steps_ == 3


def alone(recipe_name: str, data: torch.Tensor, index: torch.Tensor, seed: int, epochs: int, **hparams: object):
    return make_detector(recipe_name, **{**SMALL, **hparams}).fit(data[index], seed=seed, epochs=epochs, device="cpu")


@pytest.mark.parametrize("how", ["turns", "grouped"])
def test_detectors_fitted_together_are_those_fitted_alone(how):
    data = digits()
    shares = [torch.arange(0, 300), torch.arange(100, 260), torch.arange(50, 600, 7)]  # epochs of 18, 10 and 4 steps
    seen: list[tuple[int, int]] = []
    members = [
        Member(make_detector("ganomaly", **SMALL), share, seed=k, on_epoch=lambda epoch, _, k=k: seen.append((k, epoch)))
        for k, share in enumerate(shares)
    ]
    fit_together(members, data, epochs=2, steps=None, device=CPU, how=how)
    assert sorted(seen) == [(k, epoch) for k in range(3) for epoch in (1, 2)]
    for k, (member, share) in enumerate(zip(members, shares, strict=True)):
        reference = alone("ganomaly", data, share, k, 2)
        assert member.error is None and member.detector.describe()["trainer"] == "stacked"
        assert member.detector.steps_ == reference.steps_
        np.testing.assert_allclose(member.detector.score(data[:50]), reference.score(data[:50]), rtol=1e-4)
        for mine, theirs in zip(member.detector.history_, reference.history_, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("how", ["turns", "grouped", "matmul", "streams"])
@pytest.mark.parametrize("name", ["Centred", "Projected", "Frozen"])
def test_each_model_has_its_own_buffers_and_frozen_weights(name, how):
    data, share = digits(), torch.arange(0, 200)
    members = [Member(make_detector(f"unusual_recipes:{name}", **SMALL), share, seed=k) for k in (1, 2)]
    fit_together(members, data, epochs=2, steps=None, device=CPU, how=how)
    for member in members:
        reference = alone(f"unusual_recipes:{name}", data, share, member.seed, 2)
        np.testing.assert_allclose(member.detector.score(data[:30]), reference.score(data[:30]), rtol=1e-4)


def test_shared_weights_are_trained_once_in_a_step():
    recipe = recipe_of("unusual_recipes:Tied")
    networks = build_networks(recipe, (1, 16, 16), seed=0)
    trained = trained_parameters(recipe.stages[0].phases[0], networks)
    assert len(trained) == len(set(trained)) == len(list(torch.nn.ModuleDict(networks).parameters()))


def test_early_stopping_and_calibration_are_each_members_own():
    data = digits()
    share = torch.arange(0, 600, 4)
    for name, more in (("ae", {"select": "normal-val", "patience": 1, "criterion": "reconstruction"}), ("ganomaly_plus", {})):
        members = [Member(make_detector(name, **SMALL, **more), share, seed=k) for k in (1, 2)]
        fit_together(members, data, epochs=3, steps=None, device=CPU)
        for member in members:
            reference = alone(name, data, share, member.seed, 3, **more)
            assert member.error is None
            stacked = {"trainer": "stacked", "stacked_models": 2, "stacked_by": "turns"}
            assert member.detector.facts_ == {**reference.facts_, **stacked}
            np.testing.assert_allclose(member.detector.score(data[:40]), reference.score(data[:40]), rtol=1e-9)


@pytest.mark.parametrize(("name", "more"), [("ganomaly_plus", {}), ("ganomaly", {"score_by": "combined"})], ids=str)
def test_calibrated_scores_choose_one_epoch_whoever_watches_and_trains(name, more):
    data, share = digits(), torch.arange(0, 600, 4)
    more = {**SMALL, **more, "select": "normal-val", "criterion": "stability", "patience": 9}
    fitted = [make_detector(name, **more).fit(data[share], epochs=4, device="cpu", on_epoch=on) for on in (None, lambda *_: 0)]
    for on in (None, lambda *_: None):
        member = Member(make_detector(name, **more), share, seed=0, on_epoch=on)
        fit_together([member], data, epochs=4, steps=None, device=CPU, how="turns")
        fitted.append(member.detector)
    first, *others = fitted
    assert any(epoch["validation"] < 1 for epoch in first.history_)
    for other in others:
        assert other.history_ == first.history_
        assert other.describe()["selected_epoch"] == first.describe()["selected_epoch"]


def test_a_model_that_diverges_fails_alone():
    data = digits()
    share = torch.arange(0, 200)

    def spoil(epoch: int, detector: RecipeDetector) -> None:
        raise Diverged("its scores are not finite")

    members = [Member(make_detector("ganomaly", **SMALL), share, seed=k) for k in range(3)]
    members[1].on_epoch = spoil
    fit_together(members, data, epochs=2, steps=None, device=CPU, how="grouped")
    assert isinstance(members[1].error, Diverged)
    for k in (0, 2):
        reference = alone("ganomaly", data, share, k, 2)
        np.testing.assert_allclose(members[k].detector.score(data[:30]), reference.score(data[:30]), rtol=1e-4)


def test_a_loss_that_is_not_finite_is_told_from_the_others():
    recipe, data = recipe_of("ganomaly"), digits().float() * 2 / 255 - 1
    models = [build_networks(recipe, (1, 16, 16), seed) for seed in (0, 1)]
    with torch.no_grad():
        next(models[0]["generator"].parameters()).fill_(torch.nan)
    stack = make_stack(recipe, models, seeds=[0, 1], device=CPU, how="grouped")
    plain = PlainTrainer(recipe, models[1], seed=1, device=CPU)
    for k in range(3):
        x = data[16 * k : 16 * k + 16]
        together, by_itself = stack.step(torch.stack([x, x])), plain.step(x)
        assert together["generator"][0].isnan() and not together["generator"][1].isnan()
        assert float(together["generator"][1]) == pytest.approx(float(by_itself["generator"]), rel=1e-5)


def test_so_is_a_stack_that_does_not_fit_before_its_first_step(monkeypatch, capsys):
    """Where an epoch is chosen each member has networks on the device before."""
    data, begin, there = digits(), together.Fitting.__init__, []

    def narrow(self, *args, **options):
        if len([fitting for fitting in there if fitting() is not None]) >= 2:
            raise torch.OutOfMemoryError("no room for this many")
        begin(self, *args, **options)
        there.append(weakref.ref(self))

    monkeypatch.setattr(together.Fitting, "__init__", narrow)
    members = [Member(make_detector("ae", **SMALL), torch.arange(40), seed=k) for k in range(5)]
    fit_together(members, data, epochs=1, steps=None, device=CPU, how="grouped")
    assert all(member.error is None for member in members)
    assert sorted(member.detector.describe()["stacked_models"] for member in members) == [1, 2, 2, 2, 2]
    assert capsys.readouterr().err.count("going on in halves") == 2


def test_what_does_not_fit_into_memory_is_split_and_goes_on(monkeypatch, capsys):
    data, sizes, failed = digits(), [], []
    step = StackedTrainer.step

    def narrow(self: StackedTrainer, images: torch.Tensor) -> dict[str, torch.Tensor]:
        assert not any(stack() for stack in failed)  # or its memory would be missing now
        if len(images) > 2:
            failed.append(weakref.ref(self))
            raise torch.OutOfMemoryError("no room for this many")
        sizes.append(len(images))
        return step(self, images)

    monkeypatch.setattr(StackedTrainer, "step", narrow)
    members = [Member(make_detector("ae", **SMALL), torch.arange(40), seed=k) for k in range(5)]
    fit_together(members, data, epochs=1, steps=None, device=CPU, how="grouped")
    assert all(member.error is None for member in members) and max(sizes) == 2
    assert "5 models do not fit into the memory of cpu; going on in halves\n" in capsys.readouterr().err
    reference = alone("ae", data, torch.arange(40), 4, 1)
    np.testing.assert_allclose(members[4].detector.score(data[:30]), reference.score(data[:30]), rtol=1e-5)


@pytest.mark.parametrize(("how", "in_backward"), [("grouped", False), ("turns", True)])
def test_a_stack_that_did_not_fit_is_gone_before_its_halves_begin(how, in_backward, monkeypatch):
    """Neither the error, nor the pass over a graph that it broke off, keeps anything of it."""
    made, make, compute = [], together.make_stack, AutoencoderRecipe._phase

    def watched(recipe, models, **more):
        assert not any(there() for there in made)
        stack = make(recipe, models, **more)
        made.append(weakref.ref(stack))
        return stack

    def narrow(self, networks, step):
        loss, logged = compute(self, networks, step)
        if len(made[0]() or []) < 3:
            return loss, logged

        def refuse(*_):
            raise torch.OutOfMemoryError("no room for this many")

        if not in_backward:
            refuse()
        made.append(weakref.ref(refuse))  # lives as long as the graph
        later, first = loss.square(), loss.clone()
        first.register_hook(refuse)
        return later + first, logged

    monkeypatch.setattr(together, "make_stack", watched)
    monkeypatch.setattr(AutoencoderRecipe, "_phase", narrow)
    members = [Member(make_detector("ae", **SMALL), torch.arange(40), seed=k) for k in range(3)]
    fit_together(members, digits(), epochs=1, steps=None, device=CPU, how=how)
    assert [member.detector.describe()["stacked_models"] for member in members] == [1, 2, 2]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("how", ["matmul", "streams"])
def test_a_stack_that_is_over_holds_no_memory(how, fails, monkeypatch):
    made, make = [], together.make_stack

    def spoil(epoch: int, detector: RecipeDetector) -> None:
        raise Diverged("its scores are not finite")

    monkeypatch.setattr(together, "make_stack", lambda *args, **more: made.append(weakref.ref(s := make(*args, **more))) or s)
    members = [Member(make_detector("ae", **SMALL), torch.arange(40), seed=k) for k in range(3)]
    members[0].on_epoch = spoil if fails else None
    monkeypatch.setattr(together, "_packed", lambda courses, *_: [courses[:2], courses[2:]])
    fit_together(members, digits(), epochs=1, steps=None, device=CPU, how=how)
    assert len(made) == 2 and not any(stack() for stack in made)
    assert isinstance(members[0].error, Diverged) is fails


def test_a_gpu_takes_as_many_models_as_its_free_memory_holds(monkeypatch):
    recipe = recipe_of("ae")
    course = types.SimpleNamespace(fitting=types.SimpleNamespace(recipe=recipe))
    freed = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * bytes_of_model(recipe, (1, 16, 16)), 10**12))
    packed = _packed([course] * 5, digits(), torch.device("cuda"), "grouped")
    assert [len(part) for part in packed] == [2, 2, 1] and freed  # a fifth of the memory stays free


def test_recipes_that_cannot_be_stacked_say_why():
    assert why_not_stackable(recipe_of("f_anogan")) == "it trains in 2 stages"
    spectral = recipe_of("alad", joint_features=32)
    assert "singular vectors" in str(why_not_stackable(spectral))
    with pytest.raises(InvalidInput, match="cannot be stacked"):
        make_stack(spectral, [spectral.build((1, 16, 16))], seeds=[0], device=CPU)
