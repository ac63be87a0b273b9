"""The protocol by which the programs of a batch tile exchange what they computed.

A group of programs (one layer and direction, one batch tile) has one counter, zero before the
launch. In a *publication*, each of the M partners stores its slice of some tensor and adds 1 to the
counter. The e-th publication (e = 1, 2, ...) is complete when the counter reaches M * e: a program
makes publication e + 1 only after it has waited for all of publication e, so the counter cannot
reach M * e in any other way.

A program that has waited sees the data, by the PTX memory model:

1. ``publish``: the barrier orders the stores of all threads of a program before the addition by one
   thread. The addition releases at GPU scope, which is cumulative over what the barrier ordered.
2. ``wait``: the addition of 0 that polls the counter acquires at GPU scope. The barrier that gives
   its value to the other threads orders all later loads of the program after it.
3. Loads of exchanged data bypass L1 (``cache_modifier=".cg"``), which is not coherent.

Nothing is overwritten too early. Rows of ``out`` and ``dgates`` are written once in a call. An
operand that is not h has no row there but a slot, which is written again in the next step: after a
wait for h, which every partner published after it had read the slot.

A wait is bounded: after ``patience`` polls it traps, so that a lost program gives a "device-side
assert triggered" with the message below and not a hung GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .spec import SPECS


@triton.jit
def publish(counter_ptr):
    """Announces that this program has stored its slice of the publication."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter_ptr, target, patience):
    """Returns when the counter has reached ``target``; traps after ``patience`` polls."""
    seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    polls = 0
    while seen < target:
        tl.device_assert(polls < patience, "fusedrnn: a program waited in vain for its partners")
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
        polls += 1


class Workspace(NamedTuple):
    """The memory that the programs of one call share besides its results."""

    counters: torch.Tensor  # [Z, batch tiles], int32, zero
    slots: torch.Tensor | None  # [Z, P - 1, B, H] for P phases; None if h alone is multiplied


def workspace(cell: str, like: torch.Tensor, Z: int, tiles: int, B: int, H: int) -> Workspace:
    """Allocates the workspace of one call for Z layers and directions of ``tiles`` batch tiles.

    It comes from torch's caching allocator on the current stream, so that calls on two streams
    never share one, and a CUDA graph captures the zeros with the launch.
    """
    counters = torch.zeros(Z, tiles, dtype=torch.int32, device=like.device)
    operands = len(SPECS[cell].phases) - 1
    return Workspace(counters, like.new_empty(Z, operands, B, H) if operands else None)
