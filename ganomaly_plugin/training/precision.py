"""The arithmetic of training: float32 as IEEE has it, TF32 on GPUs that have it, or bfloat16 in the networks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ganomaly_plugin.recipe import Networks, Precision

_inside: dict[object, Precision] = {}  # who is, of all threads: the switches are the process's
_outside: list[_Switches] = []  # how they stood before the first of them
_TURNS = threading.Lock()


class _Switches(NamedTuple):
    """How torch's switches stand: those of matrix products, convolutions and recurrent layers, and the older two.

    torch refuses to read an older one that contradicts the newer ones, and `torch.compile` reads them in some versions. So all
    are set.
    """

    newer: list[str]
    older: list[bool] | None  # of matrix products, and of cuDNN; None where they cannot be read, and are to be left alone

    @classmethod
    def read(cls) -> _Switches:
        """As they are."""
        try:
            older = [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]
        except RuntimeError:  # set through the newer ones only, by whoever called us
            older = None
        return cls([each.fp32_precision for each in _newer()], older)

    def to(self, name: Precision) -> _Switches:
        """As `name` wants them."""
        tf32 = name == "tf32"
        older = None if self.older is None else [tf32 for _ in self.older]
        return _Switches(["tf32" if tf32 else "ieee" for _ in self.newer], older)

    def set(self) -> None:
        """Put torch's so."""
        if self.older is not None:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self.older
        for switch, value in zip(_newer(), self.newer, strict=True):
            switch.fp32_precision = value


def _newer() -> tuple[Any, ...]:
    cudnn: Any = torch.backends.cudnn
    return torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn


@contextmanager
def precision(name: Precision) -> Iterator[None]:
    """Convolutions and matrix products of float32 tensors inside: TF32 for "tf32", else true float32; restored after.

    torch lets cuDNN's convolutions use TF32 unless told otherwise, so "float32" has to say so. A CPU has no TF32. Threads may
    be inside at the same time, if they want the same.
    """
    me = object()
    with _TURNS:
        if not _inside:
            _outside[:] = [_Switches.read()]
        _inside[me] = name
        _outside[0].to(name).set()
    try:
        yield
    finally:
        with _TURNS:
            del _inside[me]
            (_outside[0].to(next(reversed(_inside.values()))) if _inside else _outside[0]).set()


class InBfloat16(nn.Module):
    """A network whose convolutions and matrix products run in bfloat16, its weights, BatchNorm statistics and answers float32.

    Whatever is done with the answers, the losses first of all, is then done in float32.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def __getattr__(self, name: str) -> Any:
        """The network's own attributes beside a module's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    def forward(self, *inputs: Tensor) -> Any:
        """The network's answer as float32."""
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            answer = self.network(*inputs)
        return tree_map_only(Tensor, Tensor.float, answer)


def networks_in(name: Precision, networks: Networks) -> Networks:
    """`networks` as losses are to call them: themselves, or for "bf16" wrapped; weights and state stay shared."""
    if name != "bf16":
        return networks
    return {key: InBfloat16(network) for key, network in networks.items()}
