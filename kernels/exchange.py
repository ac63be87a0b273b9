"""The protocol by which the programs of a batch tile exchange what they computed (Gluon).

A group of programs (one layer and direction, one batch tile) has one counter, zero before the
launch, and two *slots*: rows of memory for an operand of the next product. In the e-th
*publication* (e = 0, 1, ...) each of the M partners stores its part of slot e % 2 and adds 1 to the
counter. The publication is complete when the counter reaches M * (e + 1): a program makes
publication e + 1 only after it has waited for all of publication e, so the counter cannot reach
that value in any other way.

A program that has waited sees the data, by the PTX memory model:

1. ``publish``: the barrier orders the stores of all threads of a program before the addition by one
   thread. The addition releases at GPU scope, which is cumulative over what the barrier ordered.
2. ``wait``: the load of one thread that polls the counter acquires at GPU scope. The barrier behind
   it orders all later loads of the program after it.
3. Loads of exchanged data bypass L1 (``cache_modifier=".cg"``), which is not coherent.

Nothing is overwritten too early: a program writes slot e % 2 again in publication e + 2, after it
has waited for publication e + 1, which every partner made after it had read publication e.

A wait is bounded: after ``patience`` polls it fails, so that a lost program gives a "device-side
assert triggered" with the message below and not a hung GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .launch import cdiv, in_rounds, on_device, options_of
from .mma import round_operand
from .problem import Tiles
from .rows import Rows
from .slices import sequences

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # its name in Triton 3.6

#: Polls of one wait before it fails: about ten seconds.
PATIENCE = 1 << 24
#: All programs run at once, or the launch is refused. The assertion of ``wait`` needs debug, which
#: by itself would also check every integer sum for overflow.
TOGETHER = {"debug": True, "sanitize_overflow": False, "launch_cooperative_grid": True}


@gluon.jit
def publish(counter_ptr):
    """Announces that this program has stored its part of the publication."""
    barrier()
    gl.inline_asm_elementwise(
        """{
        .reg .pred first; .reg .u32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 first, thread, 0;
        @first red.release.gpu.global.add.u32 [$1], 1;
        mov.u32 $0, 0;
        }""",
        "=r,l,~{memory}",
        [counter_ptr],
        tl.int32,
        False,
        1,
    )


@gluon.jit
def wait(counter_ptr, target, patience):
    """Returns when the counter has reached ``target``; fails after ``patience`` polls."""
    met = gl.inline_asm_elementwise(
        """{
        .reg .pred done; .reg .u32 polls; .reg .s32 seen;
        mov.u32 polls, %tid.x;
        mov.u32 $0, 1;
        setp.ne.u32 done, polls, 0;
        @done bra DONE;
        POLL: ld.acquire.gpu.global.u32 seen, [$1];
        setp.ge.s32 done, seen, $2;
        @done bra DONE;
        add.u32 polls, polls, 1;
        setp.le.u32 done, polls, $3;
        @done bra POLL;
        mov.u32 $0, 0;
        DONE:
        }""",
        "=&r,l,r,r,~{memory}",
        [counter_ptr, target, patience],
        tl.int32,
        False,
        1,
    )
    tl.device_assert(met != 0, "fusedrnn: a program waited in vain for its partners")
    barrier()


@gluon.jit
def wait_for_three(first, target, second, second_target, third, third_target, patience):
    """``wait`` for three counters at once, each polled by a thread of its own."""
    met = gl.inline_asm_elementwise(
        """{
        .reg .pred done; .reg .pred mine; .reg .u32 thread; .reg .u32 polls; .reg .s32 seen;
        .reg .b64 counter; .reg .s32 target;
        mov.u32 thread, %tid.x;
        mov.u32 polls, 0;
        mov.u32 $0, 1;
        setp.gt.u32 done, thread, 2;
        @done bra DONE;
        setp.eq.u32 mine, thread, 1;
        selp.b64 counter, $2, $1, mine;
        selp.b32 target, $5, $4, mine;
        setp.eq.u32 mine, thread, 2;
        selp.b64 counter, $3, counter, mine;
        selp.b32 target, $6, target, mine;
        POLL: ld.acquire.gpu.global.u32 seen, [counter];
        setp.ge.s32 done, seen, target;
        @done bra DONE;
        add.u32 polls, polls, 1;
        setp.le.u32 done, polls, $7;
        @done bra POLL;
        mov.u32 $0, 0;
        DONE:
        }""",
        "=&r,l,l,l,r,r,r,r,~{memory}",
        [first, second, third, target, second_target, third_target, patience],
        tl.int32,
        False,
        1,
    )
    tl.device_assert(met != 0, "fusedrnn: a program waited in vain for its partners")
    barrier()


@gluon.jit
def group_of(shared, z, B, first_tile, TILE: tl.constexpr):
    """The counter of the programs of layer and direction z, and pointers to their two slots."""
    tile = z * tl.cdiv(B, TILE.block_b) + first_tile + tl.program_id(1)
    slots = shared.slots + tile.to(tl.int64) * (2 * TILE.block_b * TILE.pitch)
    return shared.counters + tile, slots


@gluon.jit
def slot_of(slots, publication, TILE: tl.constexpr):
    """A pointer to the first row of the slot of a publication."""
    return slots + (publication % 2) * (TILE.block_b * TILE.pitch)


@gluon.jit
def put(rows_ptr, cols, tile, TILE: tl.constexpr):
    """Stores a tile into rows of a slot, rounded as operands are."""
    tile = round_operand(tile.to(rows_ptr.dtype.element_ty))
    ptrs = rows_ptr + sequences(TILE)[:, None] * TILE.pitch + cols[None, :]
    if TILE.H % TILE.block_h > 0:
        tl.store(ptrs, tile, mask=(cols < TILE.H)[None, :])
    else:
        tl.store(ptrs, tile)


class Workspace(NamedTuple):
    """The memory that the programs of one call share besides its results."""

    counters: torch.Tensor  # [Z, batch tiles], int32, zero
    slots: torch.Tensor  # [Z, batch tiles, 2, BLOCK_B, pitch], zero


def workspace(like: torch.Tensor, Z: int, tiles: int, block_b: int, pitch: int) -> Workspace:
    """Allocates the workspace of one call for Z layers and directions of ``tiles`` batch tiles.

    It comes from torch's caching allocator on the current stream, so that calls on two streams
    never share one, and a CUDA graph captures the zeros with the launch.
    """
    size = 2 * Z * tiles * block_b * pitch
    memory = like.new_zeros(size + Z * tiles * 4 // like.element_size())  # one kernel fills both
    slots = memory[:size].view(Z, tiles, 2, block_b, pitch)
    return Workspace(memory[size:].view(torch.int32).view(Z, tiles), slots)


def launch_together(
    kernel: Any,
    tensors: tuple,
    rows: Rows,
    tiles: Tiles,
    constants: tuple,
    shared: Workspace | None,
    patience: int,
) -> None:
    """Launches a kernel in rounds of batch tiles; its last compile-time argument is a ``Slice``.

    Raises:
        LaunchRefused: the device does not hold all programs of a round at once.
    """
    h_0, tile = tensors[0].h_0, constants[-1]
    Z, B, H = h_0.shape
    if shared is None:
        shared = workspace(h_0, Z, cdiv(B, tile.block_b), tile.block_b, tile.pitch)
    options = options_of(tiles) | TOGETHER

    def launch(first_tile: int, count: int) -> None:
        kernel[cdiv(H, tile.block_h), count, Z](
            *tensors, shared, rows.T, B, rows.total, first_tile, patience, *constants, **options
        )

    with on_device(h_0):
        in_rounds(launch, B, tiles)
