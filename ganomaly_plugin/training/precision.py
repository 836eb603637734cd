"""The arithmetic of training: float32 as IEEE has it, TF32 on GPUs that have it, or bfloat16 in the networks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ganomaly_plugin.recipe import Networks, Precision

_inside: dict[object, Precision] = {}  # who is, of all threads: the switches are the process's
_outside: list[str] = []  # what the switches were before the first of them
_TURNS = threading.Lock()


def _switches() -> tuple[Any, ...]:
    cudnn: Any = torch.backends.cudnn
    return torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn


def _set(values: list[str]) -> None:
    for switch, value in zip(_switches(), values, strict=True):
        switch.fp32_precision = value


def _values(name: Precision) -> list[str]:
    return ["tf32" if name == "tf32" else "ieee"] * len(_switches())


@contextmanager
def precision(name: Precision) -> Iterator[None]:
    """Convolutions and matrix products of float32 tensors inside: TF32 for "tf32", else true float32; restored after.

    torch lets cuDNN's convolutions use TF32 unless told otherwise, so "float32" has to say so. A CPU has no TF32. Threads may
    be inside at the same time, if they want the same.
    """
    me = object()
    with _TURNS:
        if not _inside:
            _outside[:] = [switch.fp32_precision for switch in _switches()]
        _inside[me] = name
        _set(_values(name))
    try:
        yield
    finally:
        with _TURNS:
            del _inside[me]
            _set(_values(next(reversed(_inside.values()))) if _inside else _outside)


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
