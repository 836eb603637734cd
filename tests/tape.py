"""A recording for machines without CUDA graphs, with the rules of one.

It holds what a function did to tensors and nothing of what Python did: every operation below autograd, with the very tensors it
was called on. Recording leaves no trace in them; replaying writes every result where it lay when it was recorded. What asks
for a value on the way, or draws a random number, cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ganomaly_plugin.training.captured import Work

ASKS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item"}


def record_tape(work: Work, inputs: Any) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """`work` on `inputs` as a tape, in place of a CUDA graph."""
    with _Tape() as tape:
        outputs = work(inputs)
    tape.undo()
    return outputs, tape.replay


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if name in ASKS:
            raise RuntimeError(f"the step asks the device for a value: {name}")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise RuntimeError(f"the step draws a random number: {name}")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(value):
                    self._note(tensor)
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result

    def _note(self, tensor: Any) -> None:
        if isinstance(tensor, Tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._before:
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                self._before[storage.data_ptr()] = (whole, whole.clone())

    def undo(self) -> None:
        """Bring back what was overwritten while recording."""
        for whole, before in self._before.values():
            whole.copy_(before)

    def replay(self) -> None:
        """Do it all again, on whatever lies in the tensors now."""
        with torch.no_grad():
            for func, args, kwargs, kept in self.calls:
                for mine, theirs in zip(tree_leaves(func(*args, **kwargs)), tree_leaves(kept), strict=True):
                    if isinstance(mine, Tensor) and mine.data_ptr() != theirs.data_ptr():
                        theirs.detach().copy_(mine)
