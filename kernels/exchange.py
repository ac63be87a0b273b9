"""How programs that share a batch tile hand each other what they computed: the whole protocol.

Every group of programs (one layer and direction, one batch tile) has one counter, zero before the
launch. A *publication* is: all partners store their slice of some tensor, and each adds 1 to the
counter. With M partners the e-th publication (e = 1, 2, ...) is complete when the counter reaches
M * e: nobody can make publication e + 1 before having waited for all of publication e, so a count
of M * e cannot be reached in any other way.

Why a reader that has waited sees the data, in terms of the PTX memory model (``docs/protocol.md``
has the whole proof, beside the compiled instructions):

1. ``publish``: the barrier orders the stores of all threads of a program before the add of one
   thread, and the add releases at GPU scope, which is cumulative over what the barrier ordered.
2. ``wait``: one thread's polling add of 0 acquires at GPU scope, and a barrier (the one that hands
   the value to the other threads) orders all later loads of the program after it.
3. Loads of exchanged data go past L1 (``cache_modifier=".cg"``): L1 is not coherent.

Why nothing is overwritten too early: what goes through ``out`` and ``dgates`` is written once in a
call, to an address of its own. The operands that have no such place (``slots`` below) alternate
between two: slot ``step % 2`` is written again two steps later, after a wait for a publication
that every partner made after it had read the slot.

A wait is bounded: after ``patience`` polls (0.65 us each, as modelled) it traps, and the host reads
"device-side assert triggered" with the message below instead of watching a hung GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .model import batch_tiles
from .plan import Tiles
from .spec import SPECS


@triton.jit
def publish(counter_ptr):
    """Announces that this program has stored its part of the publication."""
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
    """What the programs of one call share besides its results."""

    counters: torch.Tensor  # [Z, batch tiles], int32
    slots: torch.Tensor  # [Z, 2, P, B, H], or empty where h is all that is multiplied


def workspace(
    cell: str, tiles: Tiles, like: torch.Tensor, Z: int, B: int, H: int, members: int = 1
) -> Workspace:
    """A workspace for one call, of the dtype and on the device of ``like``.

    From torch's caching allocator and on the current stream: calls on two streams never share one,
    and in a CUDA graph the zeros are captured with the launch.
    """
    groups = Z, batch_tiles(B, tiles.block_b, members)
    operands = SPECS[cell].operands
    slots = 0 if set(operands) == {"h"} else (Z, 2, len(operands), B, H)
    zeros = torch.zeros(groups, dtype=torch.int32, device=like.device)
    return Workspace(zeros, like.new_empty(slots))
