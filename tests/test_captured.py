"""Steps that are recorded and replayed, by the rules of CUDA graphs (`tape.py`): the same models as step by step."""

from __future__ import annotations

import contextlib
import types
import warnings
import weakref

import numpy as np
import pytest
import torch
from tape import record_tape
from test_stacked import CPU, SMALL, STACKABLE, alone, digits, recipe_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ganomaly_plugin.registry import make_detector
from ganomaly_plugin.speed.work import count_work
from ganomaly_plugin.training import captured, plain, stacked
from ganomaly_plugin.training.captured import WARM_UP, Replayed
from ganomaly_plugin.training.convolutions import layers_of_all
from ganomaly_plugin.training.plain import build_networks
from ganomaly_plugin.training.stack import make_stack
from ganomaly_plugin.training.together import Member, fit_together


def trained(name: str, how: str, record, **hparams):
    """Losses of a few steps of three models, of which two go on, and the weights they end with."""
    recipe, data, order = recipe_of(name, **{**STACKABLE[name], **hparams}), digits(), torch.Generator().manual_seed(0)
    models = [build_networks(recipe, (1, 16, 16), seed) for seed in (3, 4, 5)]
    stack = make_stack(recipe, models, seeds=[3, 4, 5], device=CPU, how=how, record=record)
    losses = []
    for step in range(2 * WARM_UP + 6):
        if step == WARM_UP + 3:
            assert stack.is_recorded == (record is not None)
            stack.keep([2, 0])
        batches = [data[torch.randint(len(data), (recipe.batch_size,), generator=order)] for _ in range(len(stack))]
        losses.append({key: value.tolist() for key, value in stack.step(torch.stack(batches)).items()})
    assert stack.is_recorded == (record is not None)
    networks = [stack.scoring_networks(model) for model in range(2)]
    return losses, [net.state_dict() for each in networks for net in each.values()]


def assert_same(one, other) -> None:
    assert one[0] == other[0]
    for mine, theirs in zip(one[1], other[1], strict=True):
        assert all(torch.equal(value, theirs[key]) for key, value in mine.items())


@pytest.mark.parametrize("name", STACKABLE)
def test_replayed_steps_are_the_steps_to_the_last_bit(name):
    assert_same(trained(name, "grouped", None), trained(name, "grouped", record_tape))


@pytest.mark.parametrize("how", ["matmul", "streams"])
def test_so_they_are_however_the_models_advance(how):
    assert_same(trained("ganomaly", how, None), trained("ganomaly", how, record_tape))


def test_networks_are_drawn_anew_in_replayed_steps_too():
    collapsing = {"redraw_below": 0.68}  # near the loss of a fresh D
    plainly, replayed = (trained("ganomaly", "grouped", record, **collapsing) for record in (None, record_tape))
    assert_same(plainly, replayed)
    assert plainly[0] != trained("ganomaly", "grouped", None)[0]


@pytest.mark.parametrize("how", ["grouped", "streams"])
def test_detectors_fitted_on_replayed_steps_are_those_fitted_alone(how):
    data = digits()
    shares = [torch.arange(0, 160), torch.arange(100, 260), torch.arange(50, 600, 7)]  # of 10, 10 and 4 steps an epoch
    members = [Member(make_detector("ganomaly", **SMALL), share, seed=k) for k, share in enumerate(shares)]
    fit_together(members, data, epochs=2, steps=None, device=CPU, how=how, record=record_tape)
    for k, (member, share) in enumerate(zip(members, shares, strict=True)):
        assert member.error is None and member.detector.describe()["replayed"]
        np.testing.assert_allclose(
            member.detector.score(data[:50]), alone("ganomaly", data, share, k, 2).score(data[:50]), 1e-4
        )


def test_anogan_searches_the_same_codes(monkeypatch):
    data = digits()[:12]
    detector = make_detector("anogan", **SMALL, lr=2e-3, search_steps=200, search_tol=0.05, search_lr=0.1)
    detector.fit(digits()[:128], epochs=8, device="cpu")
    step_by_step, recorded = detector.score(data), []

    def noted(work, inputs):
        recorded.append(len(inputs["images"]))
        return record_tape(work, inputs)

    monkeypatch.setattr("ganomaly_plugin.detectors.anogan.record_on", lambda device: noted)
    # Recorded, images are dropped later, and other numbers of them may be rounded otherwise.
    np.testing.assert_allclose(detector.score(data), step_by_step, rtol=1e-6)
    assert recorded[0] == 12 and 0 < recorded[1] <= 6  # anew for the images whose search goes on, once half of them are done


def count_up(counter: torch.Tensor):
    def work(inputs):
        counter.add_(inputs["by"])
        return {"count": counter.clone()}

    return work


def test_a_recording_that_cannot_be_made_is_one_warning_and_the_steps_go_on():
    counter = torch.zeros(3)

    def refused(work, inputs):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    run = Replayed(count_up(counter), lambda: [counter], refused)
    with pytest.warns(UserWarning, match="cannot be replayed as one .RuntimeError: operation not permitted") as caught:
        seen = [float(run({"by": torch.ones(3)})["count"][0]) for _ in range(WARM_UP + 4)]
    assert seen == list(range(1, WARM_UP + 5)) and len(caught) == 1 and not run.is_recorded


def test_a_recording_that_fails_keeps_none_of_its_memory():
    made: list[weakref.ref] = []

    def work(inputs):
        value = inputs["x"] + 1
        made.append(weakref.ref(value))
        if len(made) == WARM_UP + 2:  # the recording
            raise torch.OutOfMemoryError("no memory for a second copy")
        return {"x": value + 1}

    def record(work, inputs):
        refused = None
        try:
            return work(inputs), list
        except torch.OutOfMemoryError as error:
            refused = error  # as `cuda_graph` does, which makes a cycle
            raise refused from None

    run = Replayed(work, list, record)
    with pytest.warns(UserWarning, match="OutOfMemoryError: no memory"):
        for _ in range(WARM_UP + 1):
            run({"x": torch.zeros(3)})
    assert len(made) == WARM_UP + 2 and made[-1]() is None


def test_a_recording_that_cannot_be_replayed_is_one_warning_and_the_steps_go_on():
    counter = torch.zeros(3)

    def refused():
        counter.add_(7)
        raise RuntimeError("CUDA error: out of memory")

    run = Replayed(count_up(counter), lambda: [counter], lambda work, inputs: ({"count": counter}, refused))
    with pytest.warns(UserWarning, match="cannot be replayed as one .RuntimeError: CUDA error: out of memory"):
        seen = [float(run({"by": torch.ones(3)})["count"][0]) for _ in range(WARM_UP + 3)]
    assert seen == list(range(1, WARM_UP + 4)) and not run.is_recorded


@pytest.mark.parametrize("doing", ["nothing", "too much"])
def test_a_recording_that_does_something_else_is_not_trusted(doing):
    counter = torch.zeros(3)

    def wrong(work, inputs):
        return {"count": counter}, (lambda: None) if doing == "nothing" else (lambda: counter.add_(2 * inputs["by"]))

    run = Replayed(count_up(counter), lambda: [counter], wrong)
    with pytest.warns(UserWarning, match="does something else"):
        seen = [float(run({"by": torch.ones(3)})["count"][0]) for _ in range(WARM_UP + 4)]
    assert seen == list(range(1, WARM_UP + 5))


def test_the_tape_refuses_what_a_cuda_graph_refuses():
    def asks(inputs):
        return {"x": inputs["x"] * float(inputs["x"].sum())}

    def draws(inputs):
        return {"x": inputs["x"] + torch.rand(2)}

    for work in (asks, draws):
        with pytest.raises(RuntimeError, match=r"the step (asks|draws)"):
            record_tape(work, {"x": torch.ones(2)})


class PretendedCuda:
    """`torch.cuda` as far as a recording asks for it, by the rules of the real one, that notes what it is left with."""

    def __init__(self, monkeypatch, broken: bool) -> None:
        self.stream, self.recording, self.released = "mine", [], []
        self.broken, self.random_numbers_recorded = broken, False
        for name in ("current_stream", "current_device", "set_stream", "graph_pool_handle", "device", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(captured, "_stream", lambda device: "cuda")
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=lambda: None))
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: self.released.append(pool), raising=False)

    def current_stream(self):
        return self.stream

    def current_device(self):
        return 0

    def set_stream(self, stream):
        self.stream = stream

    def graph_pool_handle(self):
        return "pool"

    def device(self, device):
        return contextlib.nullcontext()

    def end(self, device, pool):
        if pool not in self.recording:
            raise RuntimeError("not currently recording")
        self.recording.remove(pool)

    @contextlib.contextmanager
    def graph(self, graph, pool="another pool", *, stream, capture_error_mode):
        assert stream == "cuda" and capture_error_mode == "thread_local"
        self.recording.append(pool)
        self.random_numbers_recorded = True
        before, self.stream = self.stream, "the recording's"
        try:
            yield
        finally:  # as torch has it: what ends a recording fails when it was broken off, and nothing after it is done
            if self.broken:
                self.broken = False
                raise RuntimeError("operation failed due to a previous error during capture")
            self.end(0, pool)
            self.stream, self.random_numbers_recorded = before, False


@pytest.mark.parametrize("broken", [True, False])
def test_a_recording_that_is_broken_off_leaves_torch_as_it_was(broken, monkeypatch):
    cuda = PretendedCuda(monkeypatch, broken)

    def refused(inputs):
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):  # not what torch says of it afterwards
        captured.cuda_graph(refused, {"x": torch.zeros(1)})
    assert cuda.stream == "mine" and not cuda.recording and cuda.released == (["pool"] if broken else [])
    assert not cuda.random_numbers_recorded


def test_work_is_recorded_as_a_cuda_graph(monkeypatch):
    cuda = PretendedCuda(monkeypatch, broken=False)
    record = captured.record_on(torch.device("cuda"))
    assert record is not None
    outputs, replay = record(lambda inputs: {"x": inputs["x"] + 1}, {"x": torch.zeros(1)})
    replay()
    assert outputs["x"] == 1 and cuda.stream == "mine" and not cuda.recording
    with captured.never_recorded():
        assert captured.record_on(torch.device("cuda")) is None


class NothingOnTheCpu(TorchDispatchMode):
    """Nothing comes from the CPU in it but plain numbers: within a CUDA graph a copy from there is an error."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, torch.Tensor)]
        here = [tensor for tensor in tensors if tensor.device.type == "cpu"]
        copies = func._schema.name.split("::")[1] in ("copy_", "_to_copy")
        assert all(tensor.ndim == 0 for tensor in here) and not (copies and 0 < len(here) < len(tensors)), func
        return result


@pytest.mark.parametrize("how", ["grouped", "matmul"])
@pytest.mark.parametrize("name", STACKABLE)
def test_a_step_keeps_to_its_device_and_asks_it_nothing(name, how, monkeypatch):
    """On the device "meta" tensors have no values to ask for, and no way to another device."""

    def unfused(options, parameters):  # there is no fused Adam on "meta", and the other counts its steps on the CPU
        return torch.optim.SGD(parameters, lr=options.lr, foreach=True)

    for module in (plain, stacked):
        monkeypatch.setattr(module, "make_optimiser", unfused)
    recipe = recipe_of(name, **STACKABLE[name])
    models = [build_networks(recipe, (1, 16, 16), seed) for seed in (0, 1)]
    stack = make_stack(recipe, models, seeds=[0, 1], device=torch.device("meta"), how=how)
    images = torch.zeros(2, 16, 1, 16, 16, dtype=torch.uint8)
    work = stack.work

    def there(inputs):
        with NothingOnTheCpu():
            return work(inputs)

    for _ in range(2):
        stack.step(images)
    monkeypatch.setattr(stack, "work", there)
    for kept in ([1, 0], [0]):
        stack.keep(kept)
        losses = stack.step(images[: len(kept)])
        assert all(value.device.type == "meta" and value.shape == (len(kept),) for value in losses.values())


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch knows no GPU")
@pytest.mark.filterwarnings("ignore:CUDA is not available.*Disabling autocast")  # which does not see mapped layers anyway
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("how", ["grouped", "matmul"])
@pytest.mark.parametrize("name", STACKABLE)
def test_a_gpu_takes_every_operation_of_a_step(name, how, precision, monkeypatch):
    """Fake tensors say that they lie on a GPU: operations choose their kernels as there, and none is launched.

    Gradients are left out: autograd asks for the GPU's streams.
    """
    recipe = recipe_of(name, **STACKABLE[name], precision=precision)
    models = [build_networks(recipe, (1, 16, 16), seed) for seed in (0, 1)]
    stack = make_stack(recipe, models, seeds=[0, 1], device=CPU, how=how)
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, weights, **_: [torch.empty_like(weight) for weight in weights])

    def there(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            key: torch.empty(value.shape, dtype=value.dtype, device="cuda", requires_grad=value.requires_grad)
            for key, value in tensors.items()
        }

    with FakeTensorMode():
        draws = there({key: value.expand(2, *value.shape) for key, value in recipe.draw(16, torch.Generator()).items()})
        stack.weights, stack.buffers = there(stack.weights), there(stack.buffers)
        stack._optimisers = [stacked.make_optimiser(phase.optimiser, stack._trained(phase)) for phase in stack.phases]
        for spares in stack._spares.values():
            spares.weights, spares.spent = there(spares.weights), there({"spent": spares.spent})["spent"]
        losses = stack.work((torch.zeros(2, 16, 1, 16, 16, dtype=torch.uint8, device="cuda"), draws))
    assert all(value.device.type == "cuda" and value.shape == (2,) for value in losses.values())


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch knows no GPU")
@pytest.mark.parametrize("side", [1, 4])
def test_a_gpu_takes_batchnorm_after_matrix_products(side):
    def one(x, weight, scale):
        y = torch.conv2d(x, weight)
        return torch.nn.functional.batch_norm(y, torch.zeros_like(scale), torch.ones_like(scale), scale, scale, True)

    with FakeTensorMode(), layers_of_all("matmul", "float32"):
        arguments = [torch.empty(2, *shape, device="cuda") for shape in ((16, 3, side, side), (5, 3, 1, 1), (5,))]
        assert torch.func.vmap(one)(*arguments).shape == (2, 16, 5, side, side)


def test_operations_can_be_seen_where_steps_are_replayed():
    recipe = recipe_of("ae")
    models = [build_networks(recipe, (1, 16, 16), seed) for seed in (0, 1)]
    stack, plainly = (
        make_stack(recipe, models, seeds=[0, 1], device=CPU, how="grouped", record=r) for r in (record_tape, None)
    )
    images = digits()[:32].view(2, 16, 1, 16, 16)
    for _ in range(WARM_UP + 1):
        stack.step(images), plainly.step(images)
    assert stack.is_recorded
    seen = [count_work(lambda each=each: each.step(images)) for each in (stack, plainly)]
    assert seen[0] == seen[1] and seen[0].flops > 0
    mine, theirs = (each.step(images) for each in (stack, plainly))  # and the steps that were watched were steps
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_nothing_is_recorded_where_there_are_no_graphs():
    assert captured.record_on(CPU) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = Replayed(lambda inputs: {"x": inputs["x"] + 1}, list, None)
        assert all(float(run({"x": torch.zeros(1)})["x"]) == 1 for _ in range(WARM_UP + 2))
