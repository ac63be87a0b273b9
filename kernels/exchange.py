"""The protocol by which the programs of a batch tile exchange what they computed (Gluon).

A group of programs (one layer and direction, one batch tile) has one counter, zero before the
launch, and two *slots*: rows of memory for an operand of the next product. In the e-th
*publication* (e = 0, 1, ...) each of the M partners stores its part of a slot and adds 1 to the
counter; the slots alternate. The publication is complete when the counter reaches M * (e + 1): a
program makes publication e + 1 only after it has waited for all of publication e, so the counter
cannot reach that value in any other way.

A program that has waited reads the data, because a barrier and a release precede the addition, and
an acquire and a barrier follow the poll; loads of what is exchanged bypass L1, which is not
coherent. ``docs/kernels.md`` has the proof by the PTX memory model, and why nothing is overwritten
before it was read.

A wait is bounded: after ``patience`` polls it fails, so that a lost program gives a "device-side
assert triggered" with the message below and not a hung GPU.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .mma import barrier, round_operand, sequences, units
from .steps import part_of


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
def wait(counter_ptr, target, patience, other_ptr=None, other_target=None):
    """Returns when the counter has reached ``target``, and another one its own target.

    Each counter is polled by a thread, which fails after ``patience`` polls.
    """
    COUNTERS: tl.constexpr = 1 if other_ptr is None else 2
    if other_ptr is None:
        other_ptr, other_target = counter_ptr, target
    met = gl.inline_asm_elementwise(
        """{
        .reg .pred done; .reg .pred mine; .reg .u32 polls; .reg .s32 seen;
        .reg .b64 counter; .reg .s32 target;
        mov.u32 polls, %tid.x;
        mov.u32 $0, 1;
        setp.ge.u32 done, polls, $6;
        @done bra DONE;
        setp.eq.u32 mine, polls, 0;
        selp.b64 counter, $1, $2, mine;
        selp.b32 target, $3, $4, mine;
        POLL:
        ld.acquire.gpu.global.u32 seen, [counter];
        setp.ge.s32 done, seen, target;
        @done bra DONE;
        add.u32 polls, polls, 1;
        setp.le.u32 done, polls, $5;
        @done bra POLL;
        mov.u32 $0, 0;
        DONE:
        }""",
        "=&r,l,l,r,r,r,r,~{memory}",
        [counter_ptr, other_ptr, target, other_target, patience, COUNTERS],
        tl.int32,
        False,
        1,
    )
    tl.device_assert(met != 0, "fusedrnn: a program waited in vain for its partners")
    barrier()


@gluon.jit
def program_of(layers, z, T, B, R, first_tile, TILE: tl.constexpr):
    """The batch tile and the hidden units of this program, in layer and direction z."""
    first_b = (first_tile + tl.program_id(1)) * TILE.block_b
    cols = tl.program_id(0) * TILE.block_h + units(TILE)
    return part_of(layers, z, first_b, sequences(TILE), cols, T, B, R, TILE)


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
