"""A device's memory: whether it ran out, and what is done about it."""

from __future__ import annotations

import gc
import traceback

import torch

from ganomaly_plugin.training.halves import forget_expired

# As CUDA and its libraries put it, where it is not torch that allocates: they are not initialised where the memory for their
# own ends does not do. The last but one is what torch makes of a convolution none of whose ways finds the memory to work in,
# the last what it says on a CPU.
_WORDS = (
    "out of memory",
    "ALLOC_FAILED",
    "ALLOCATION_FAILED",
    "STATUS_NOT_INITIALIZED",
    "unable to find an engine",
    "CPUAllocator",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device's memory did not do, that of libraries beside torch and of Python included."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def make_room(*errors: BaseException | None) -> None:
    """Give the memory of former work back to the device: of stacks, which refer to themselves, and of what `errors` hold."""
    for error in errors:
        if error is not None:
            traceback.clear_frames(error.__traceback__)
    gc.collect()
    # The graph of a backward pass that was broken off waits on the CPU until there is another.
    with torch.inference_mode(False), torch.enable_grad():
        torch.zeros((), requires_grad=True).neg().backward()
    forget_expired()
    torch.cuda.empty_cache()  # which does nothing where there is no GPU
