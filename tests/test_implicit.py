"""Kernels that convolve many models at once: what they compute, as Triton interprets them, and that they compile for a GPU."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from ganomaly_plugin.detectors.ganomaly import GanomalyRecipe
from ganomaly_plugin.training import implicit, normalise
from ganomaly_plugin.training import trial as the_trial
from ganomaly_plugin.training.convolutions import in_order, layers_of_all
from ganomaly_plugin.training.halves import _known as known_of
from ganomaly_plugin.training.halves import halved
from ganomaly_plugin.training.joined import joined
from ganomaly_plugin.training.memory import bytes_of_model
from ganomaly_plugin.training.normalise import normalise_all
from ganomaly_plugin.training.plain import PlainTrainer, build_networks
from ganomaly_plugin.training.precision import precision
from ganomaly_plugin.training.room import make_room
from ganomaly_plugin.training.stack import default_how, make_stack

pytest.importorskip("triton")

CPU = torch.device("cpu")
MODELS = 3
HALVING = {"stride": 2, "padding": 1}
CONVOLUTIONS = {
    "halving": (functional.conv2d, (2, 16, 8, 6), (32, 16, 4, 4), HALVING),
    "of an odd map": (functional.conv2d, (2, 16, 7, 9), (16, 16, 3, 3), HALVING),
    "same size": (functional.conv2d, (2, 48, 6, 6), (16, 48, 3, 3), {"padding": 1}),
    "oblong": (functional.conv2d, (2, 16, 8, 9), (80, 16, 2, 5), {"stride": (1, 2), "padding": (0, 2)}),
    "steps past pixels": (functional.conv2d, (2, 16, 9, 9), (16, 16, 2, 2), {"stride": 3}),
    "in several blocks": (functional.conv2d, (1, 16, 11, 11), (144, 16, 2, 2), {"padding": 1}),
    "doubling": (functional.conv_transpose2d, (2, 32, 4, 3), (32, 16, 4, 4), HALVING),
    "to an odd map": (functional.conv_transpose2d, (2, 16, 4, 4), (16, 16, 3, 3), HALVING),
    "to several blocks": (functional.conv_transpose2d, (1, 16, 2, 2), (16, 144, 3, 3), {**HALVING, "output_padding": 1}),
    "of a grey image, summed in parts": (functional.conv2d, (2, 1, 32, 32), (16, 1, 4, 4), HALVING),
    "of a coloured image": (functional.conv2d, (2, 3, 8, 6), (32, 3, 4, 4), HALVING),
    "to a grey image": (functional.conv_transpose2d, (2, 16, 4, 3), (16, 1, 4, 4), HALVING),
    "with pixels between": (functional.conv_transpose2d, (2, 16, 3, 3), (16, 16, 2, 2), {"stride": 3}),
}


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(MODELS, *shape, generator=torch.Generator().manual_seed(seed))


def results(run, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """What `run` answers, and the gradients of a weighted sum of it."""
    inputs = [value.detach().requires_grad_() for value in inputs]
    answer = run(*inputs)
    towards = torch.linspace(-1, 1, answer.numel(), dtype=answer.dtype).view(answer.shape)
    return [answer.detach(), *torch.autograd.grad((answer * towards).sum(), inputs)]


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func._schema.name] += 1
        return func(*args, **(kwargs or {}))

    def ours(self) -> Counter[str]:
        parts = {name: name.partition("::") for name in self.names}
        return Counter({parts[name][2]: count for name, count in self.names.items() if parts[name][0] == "ganomaly_plugin"})


IN_TF32 = ("halving", "of an odd map", "doubling", "of a grey image, summed in parts", "of a coloured image", "to a grey image")


@pytest.mark.parametrize(
    ("case", "name", "rounding"),
    [*((case, "float32", 1e-6) for case in CONVOLUTIONS), *((case, "tf32", 1e-3) for case in IN_TF32)],
)
def test_kernels_convolve_as_each_model_does(case, name, rounding):
    layer, image, kernel, options = CONVOLUTIONS[case]
    out = kernel[1] if layer is functional.conv_transpose2d else kernel[0]
    inputs = [random(*image, seed=0), in_order(random(*kernel, seed=1)), random(out, seed=2)]

    def one(*tensors):
        return layer(*tensors, **options)

    def of_all(*tensors):
        with layers_of_all("implicit", name):
            return torch.vmap(one)(*tensors)

    wanted = results(lambda *all_: torch.stack([one(*each) for each in zip(*all_, strict=True)]), [x.double() for x in inputs])
    with precision(name), Operations() as operations:
        found = results(of_all, inputs)
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine.double() - theirs).abs().max() < rounding * theirs.abs().max()
    expected = Counter(convolve=1, correlate=1, **({"fold": 1} if kernel[1] < 16 else {"spread": 1}))
    expected += Counter(convolve=kernel[1] < 16, halve=3 * (name == "tf32"), measure=3 * (name == "tf32"))
    assert operations.ours() == +expected and not operations.names["aten::convolution"]


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.2, inplace=True)], ids=str)
@pytest.mark.parametrize("name", ["float32", "tf32"])
def test_a_convolution_takes_the_activation_after_it_over(name, activation):
    layers = nn.Sequential(nn.Conv2d(1, 16, 4, **HALVING, bias=False), activation, nn.Conv2d(16, 16, 3, bias=True), activation)
    inputs = [random(2, 1, 12, 12, seed=0), random(16, 1, 4, 4, seed=1), random(16, 16, 3, 3, seed=2)]

    def one(network, x, first, second):
        weights = {"0.weight": first, "2.weight": second, "2.bias": torch.linspace(-1, 1, 16)}
        return functional_call(network, weights, (x,))

    def of_all(network, *tensors):
        with layers_of_all("implicit", name):
            return torch.vmap(partial(one, network))(*tensors)

    found, activations = [], []
    for network in (layers, joined(layers)):
        with precision(name), Operations() as operations:
            found.append(results(partial(of_all, network), inputs))
        activations.append(operations.names["aten::relu"] + operations.names["aten::leaky_relu"])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert activations == [2, 1]  # the second convolution has a bias


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-30, 2.0**90])
def test_halves_are_as_good_as_tf32_for_numbers_of_any_size(scale):
    """A model's numbers, however small or large, and whatever another model's are."""
    maps, kernels = torch.randn(2, 1, 16, 4, 4, generator=torch.Generator().manual_seed(0)), random(16, 16, 4, 4, seed=1)[:2]

    def run(*inputs):
        with layers_of_all("implicit", "tf32"):
            return torch.vmap(lambda x, kernel: functional.conv2d(x, kernel, **HALVING))(*inputs)

    with precision("tf32"):
        alone = results(run, [maps, kernels])
        maps[1] *= scale
        scaled = results(run, [maps, kernels])
        maps[1, 0, 0, 0, 0] = torch.inf
        broken = results(run, [maps, kernels])
    for one, other, last in zip(alone, scaled, broken, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[0], last[0]) and one.isfinite().all()
    for found, wanted, factor in zip(scaled, alone, (scale, 1, scale), strict=True):
        assert torch.equal(found[1] / factor, wanted[1])
    assert not broken[0][1].isfinite().all()


def test_what_is_made_is_not_measured_again():
    """Magnitudes noted by the kernels that make maps are what would be measured; of maps changed later nothing is known.

    BatchNorm, and sums of few products, write halves themselves, by what they can be at most.
    """
    x, kernels = torch.randn(2, 8, 8, 2, 16, generator=torch.Generator().manual_seed(0)), random(16, 4, 4, 16, seed=1)[:2]
    geometry = implicit.Geometry((8, 8), (4, 4), (2, 2), (1, 1))
    with precision("tf32"):
        y = implicit.conv2d(x, kernels, geometry, 0.2)
        back = implicit.conv_transpose2d(y, kernels, geometry, 1.0)
        norm = [torch.rand(2, 16, generator=torch.Generator().manual_seed(k)) for k in range(4)]
        z = normalise_all(y, *norm, 0.1, 1e-5, 0.2)
        of_images = implicit.conv2d(x[..., :1].contiguous(), kernels[..., :1].contiguous(), geometry, 0.2)
    for made, known in ((y, True), (back, False)):  # BatchNorm comes after `back`, and needs it not
        with Operations() as operations:
            noted = halved(made).largest
        assert operations.ours() == ({"halve": 1} if known else {"halve": 1, "measure": 1})
        assert torch.equal(noted, made.abs().amax((0, 1, 2, 4)).view(torch.int32))
    most_of_images = 16 * x[..., :1].abs().amax((0, 1, 2, 4)) * kernels[..., :1].abs().amax((1, 2, 3, 4))
    for made, limit in ((z, math.sqrt(z[..., 0, 0].numel()) + 1), (of_images, most_of_images)):
        with Operations() as operations:
            halves, noted = halved(made)
            assert not operations.ours() and halved(made, activated=made, slope=0.2).largest is noted
        assert operations.ours() == {"halve": 1}
        most = noted.view(torch.float32)
        assert (most >= made.abs().amax((0, 1, 2, 4))).all() and (most <= 1.01 * limit).all()
        by = 2.0 ** (15 - torch.frexp(most).exponent)
        assert (halves.double() / by[:, None] - made).abs().max() <= 2**-11 * made.abs().max()
    y.mul_(2)
    with Operations() as operations:
        assert torch.equal(halved(y).largest, y.abs().amax((0, 1, 2, 4)).view(torch.int32))
    assert operations.ours()["measure"] == 1


@pytest.mark.parametrize("slope", [0.2, 3.0])
def test_halves_of_a_gradient_hold_what_a_steep_activation_makes_of_it(slope):
    maps = torch.randn(2, 8, 8, 2, 16, generator=torch.Generator().manual_seed(0))
    kernels = random(16, 4, 4, 16, seed=1)[:2]
    with precision("tf32"):
        gradient = implicit.conv2d(maps, kernels, implicit.Geometry((8, 8), (4, 4), (2, 2), (1, 1)), 0.2)
        assert known_of(gradient)[0] is not None
        below = torch.full_like(gradient, -1.0)  # every number is where the slope counts
        halves, largest = halved(gradient, activated=below, slope=slope)
    by = 2.0 ** (15 - torch.frexp(largest.view(torch.float32)).exponent)
    wanted = slope * gradient.double()
    assert halves.isfinite().all() and (halves.double() / by[:, None] - wanted).abs().max() <= 2**-11 * wanted.abs().max()


def test_what_was_noted_of_maps_goes_with_them():
    with precision("tf32"):
        made = implicit.conv2d(
            torch.ones(1, 4, 4, 1, 16), torch.ones(1, 16, 4, 4, 16), implicit.Geometry((4, 4), (4, 4), (2, 2), (1, 1)), 0.2
        )
    assert known_of(made)[0] is not None
    notes = weakref.ref(known_of(made)[0])
    make_room()
    assert notes() is not None and known_of(made)[0] is notes()
    del made
    make_room()
    assert notes() is None


def test_halves_keep_the_bits_of_tf32():
    numbers = torch.randn(4, 8, 8, 3, 16, generator=torch.Generator().manual_seed(0))
    numbers[..., 1, :], numbers[0, 0, 0, 2, 0] = 0, torch.nan
    halves, largest = halved(numbers)
    assert halves.dtype == torch.float16 and not halves[..., 1, :].any() and halves.isnan().sum() == 1
    first = numbers[..., 0, :]
    assert largest[0] == first.abs().max().view(torch.int32)
    scale = 2.0 ** (14 - torch.frexp(first.abs().max()).exponent + 1)
    assert 2**14 <= halves[..., 0, :].abs().max() <= 2**15
    apart = (halves[..., 0, :].double() / scale - first).abs()
    assert (apart <= 2**-11 * first.abs()).all() and (apart > 2**-13 * first.abs()).any()


@pytest.mark.slow
def test_stacked_models_are_those_of_the_plain_trainer():
    # G's phase goes through D and asks for none of D's gradients, D's phase for none of an image's. Adam's first step moves a
    # weight by about `lr`, and one whose gradient is mere rounding either way: `lr` is small, so that this is within 1e-5.
    recipe, seeds = GanomalyRecipe(features=16, latent_dim=8, batch_size=4, lr=2e-5), [3, 4]
    models = [build_networks(recipe, (1, 16, 16), seed) for seed in seeds]
    stack = make_stack(recipe, models, seeds=seeds, device=CPU, how="implicit")
    plain = [PlainTrainer(recipe, networks, seed=seed, device=CPU) for networks, seed in zip(models, seeds, strict=True)]
    images = torch.randn(2, 2, 4, 1, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    for batch in images:
        with Operations() as operations:
            together = stack.step(batch)
        # a wide layer and one of an image in each encoder, decoder and D: forward, towards the maps, towards the kernels
        forward, of_maps = Counter(convolve=9, spread=1, fold=1), Counter(convolve=4, spread=5, fold=2)
        of_kernels = Counter(correlate=10)
        # one BatchNorm in each encoder and D, two in the decoder; D twice, of real images and of others
        normalised = Counter(normalise=6, normalise_backward=7)
        renewed = Counter(renew=5)  # D's three kernels, and the weight and the bias of its BatchNorm
        assert operations.ours() == forward + of_maps + of_kernels + normalised + renewed
        others = {"aten::convolution", "aten::contiguous", "aten::native_batch_norm", "aten::relu", "aten::leaky_relu"}
        assert not others & set(operations.names)
        for model, trainer in enumerate(plain):
            for name, value in trainer.step(batch[model]).items():
                assert float(together[name][model]) == pytest.approx(float(value), rel=1e-5)


def test_memory_is_reckoned_without_patches():
    recipe = GanomalyRecipe(features=16, latent_dim=8, batch_size=4)
    sizes = {how: bytes_of_model(recipe, (1, 32, 32), how) for how in ("grouped", "implicit", "matmul")}
    assert sizes["implicit"] == sizes["grouped"] < sizes["matmul"]


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch knows no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gets_the_shapes_that_it_expects(dtype):
    def one(x, kernel):
        y = functional.conv2d(x, kernel, **HALVING)
        return y, functional.conv_transpose2d(y, kernel, **HALVING)

    with FakeTensorMode(), layers_of_all("implicit", "float32"), Operations() as operations:
        x, kernel = (torch.empty(MODELS, *shape, device="cuda", dtype=dtype) for shape in ((2, 16, 8, 6), (32, 16, 4, 4)))
        y, z = torch.vmap(one)(x, kernel)
    assert y.shape == (MODELS, 2, 32, 4, 3) and z.shape == (MODELS, 2, 16, 8, 6) and y.dtype == z.dtype == dtype
    assert y.device.type == z.device.type == "cuda" and operations.ours() == {"convolve": 1, "spread": 1}


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As on a GPU, whose `_trial` answers what the test wants."""
    monkeypatch.setattr(implicit, "is_interpreted", lambda: False)
    the_trial._why_not.cache_clear()
    yield lambda trial: monkeypatch.setattr(the_trial, "_trial", trial)
    the_trial._why_not.cache_clear()


def refused(device):
    raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")


@pytest.mark.parametrize(
    ("trial", "reason"),
    [(refused, "Failed to find C compiler"), (lambda _: 50.0, "wrong by 50.0 times"), (lambda _: 0.1, None)],
)
def test_kernels_are_tried_before_they_are_trusted(trial, reason, on_a_gpu):
    on_a_gpu(trial)
    found = the_trial.why_not_implicit(torch.device("cuda"))
    assert found is None if reason is None else reason in found
    assert default_how(torch.device("cuda")) == ("implicit" if reason is None else "matmul") and default_how(CPU) == "turns"


def test_a_want_of_memory_is_not_for_ever(on_a_gpu):
    def full(device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    on_a_gpu(full)
    assert "out of memory" in the_trial.why_not_implicit(torch.device("cuda"))
    on_a_gpu(lambda _: 0.1)
    assert the_trial.why_not_implicit(torch.device("cuda")) is None


@pytest.mark.slow
def test_the_trial_holds_kernels_to_torch(monkeypatch):
    monkeypatch.setattr(the_trial, "_TRIED", (2, 16))
    monkeypatch.setattr(the_trial, "_MAY_CHANGE", {"float32": 1e-5, "tf32": 1e-3})  # the interpreter cannot multiply bfloat16
    assert the_trial._trial(CPU) < 1
    monkeypatch.setattr(normalise, "error", lambda *given: torch.zeros(()))  # which takes its time
    right = implicit.correlate
    monkeypatch.setattr(implicit, "correlate", lambda *given: right(*given).flip(2))
    assert the_trial._trial(CPU) > 10
    monkeypatch.setattr(implicit, "correlate", lambda *given: right(*given) * float("nan"))
    assert not the_trial._trial(CPU) < 1


def test_a_cpu_refuses_them_before_any_work(on_a_gpu, bench, tmp_path, golden):
    out = tmp_path / "out"
    code, _, err = bench("run", "--models", "ganomaly", "--trainer", "stacked-implicit", "--out", out)
    assert code == 2 and "kernels are for a GPU, and this is cpu. Use stacked-matmul." in err and not out.exists()
    code, _, err = bench("verify", golden[0], "--trainer", "stacked-implicit")
    assert code == 2 and "kernels are for a GPU, and this is cpu. Use stacked-matmul." in err


def test_operations_that_change_tensors_have_no_defaults():
    """torch 2.11 leaves out arguments that are as their default, and then does not find those that are changed in place."""
    changing = []
    for name in ("convolve", "spread", "correlate", "fold", "measure", "halve", "normalise", "normalise_backward", "renew"):
        arguments = getattr(torch.ops.ganomaly_plugin, name).default._schema.arguments
        if any(argument.alias_info is not None and argument.alias_info.is_write for argument in arguments):
            changing.append(name)
            assert not any(argument.has_default_value() for argument in arguments)
    assert changing == ["convolve", "spread", "normalise", "normalise_backward", "renew"]


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ganomaly_plugin.training import implicit_kernels

lengths = dict(H=16, W=16, P=8, Q=8, O=128, R=4, S=4, STRIDE_H=2, STRIDE_W=2, PADDING_H=1, PADDING_W=1)
for number, depth, most, warps in (("fp32", 32, 64, 8), ("fp16", 64, 128, 4), ("bf16", 64, 128, 4)):
    for name, c, columns, summed in (
        ("convolve", 64, most, depth), ("spread", 64, 64, depth), ("correlate", 64, most, depth),
        *((("convolve", 1, most, 16), ("correlate", 1, 16, depth)) if number == "fp16" else ()),
    ):
        kernel = getattr(implicit_kernels, name)
        constants = dict(lengths, C=c, ROWS=128, COLUMNS=columns, SUMMED=summed, ROUNDING="bf16x6")
        constants |= dict(NOTED=number == "fp16", HALVED=c == 1)
        names = kernel.arg_names
        made = "*bf16" if number == "bf16" and name != "correlate" else "*fp32"
        largest = [name for name in names if name.startswith("largest")]
        pointers = dict(zip(names, ["*" + number] * 2 + ["*i32"] * len(largest) + [made]))
        pointers |= {"halves": "*fp16"} if "halves" in names else {}
        types = {name: "constexpr" if name in constants else "i32" for name in names} | pointers | {"slope": "fp32"}
        types = {name: types[name] for name in names}
        aligned = {(k,): [["tt.divisibility", 16]] for k in range(len(pointers))}
        values = {(names.index(name),): value for name, value in constants.items() if name in names}
        source = ASTSource(kernel, types, values, aligned)
        options = dict(num_warps=warps, num_stages=3, enable_fp_fusion=True)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        print(kernel.__name__, number, made.metadata.shared, made.asm["ptx"].count("wgmma.mma_async"))
"""


@pytest.mark.slow
def test_they_compile_for_a_gpu(compiled):
    """Of its compute capability 9.0, on which they are tensor-core products of 128 rows that share less than 100 kB."""
    kernels = compiled(COMPILE)
    assert len(kernels) == 11 and all(int(shared) < 100_000 and int(products) > 0 for *_, shared, products in kernels)
