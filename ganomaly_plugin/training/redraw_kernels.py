"""Triton kernel of `redraw`: models that collapsed get spare weights, all others are left alone."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def renew(
    weights,  # (m, numbers), written
    spares,  # (READY · m, numbers), the first ones of all models first
    spent,  # int64 (m,)
    below,  # bool (m,)
    numbers,
    READY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Overwrite the weights of a model that is `below` with its next spare ones, or else the last. Most models are not."""
    model = tl.program_id(1).to(tl.int64)
    if tl.load(below + model):
        ready = tl.minimum(tl.load(spent + model), READY - 1)
        to = weights + model * numbers
        spare = spares + (ready * tl.num_programs(1) + model) * numbers
        for block in range(tl.program_id(0), tl.cdiv(numbers, BLOCK), tl.num_programs(0)):
            number = block * BLOCK + tl.arange(0, BLOCK)
            inside = number < numbers
            tl.store(to + number, tl.load(spare + number, mask=inside), mask=inside)
