"""Products of a slice of W_hh with an operand that many programs computed (Gluon).

The slice, some rows of W_hh or of its transpose, is the first operand of an ``mma`` and stays in
registers. The columns are split over groups of one warp each, the leading dimension of a batched
product, so every element of the other operand is loaded by one thread of the program: it goes from
L2 straight into the registers that need it, 16 bytes a thread. The order of the sum over columns is
private: a thread's 16 bytes are the operands of two instructions (``_in_order``).

The partial sums of the groups meet in shared memory (``add_up``), from which each thread takes the
elements of some units and sequences, so the cell is computed once. An instruction has 16 rows.
Row ``8 r + l`` is unit ``2 l + r``, or with 8 units a program unit l of one of two gates, so the
two rows that a thread holds lie beside each other in memory and in shared memory.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .mma import barrier, round_operand
from .steps import time_of


@gluon.jit
def _index(DIM: tl.constexpr, SIZE: tl.constexpr):
    """0 to SIZE - 1 along one of the seven dimensions of a chunk as loaded."""
    index = gl.arange(0, SIZE)
    for dim in tl.static_range(7):
        if dim != DIM:
            index = index.expand_dims(dim)
    return index


@gluon.jit
def _load_chunk(
    w_ptr, GATES: tl.constexpr, PART: tl.constexpr, ROUND: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """A chunk of rows of W of this program's units, or columns; GATES begin at ``w_ptr``.

    First the pointer is moved by what differs between threads, then by the rest, which is constant:
    so all loads of a thread share an address, where one for each would cost registers.
    """
    H: tl.constexpr = TILE.H
    M: tl.constexpr = TILE.rows
    FIRST: tl.constexpr = TILE.rounds[PART][ROUND][CHUNK][0]
    K: tl.constexpr = TILE.rounds[PART][ROUND][CHUNK][1]
    STOP: tl.constexpr = TILE.rounds[PART][ROUND][CHUNK][2]
    WIDTH: tl.constexpr = 32 // w_ptr.dtype.element_ty.primitive_bitwidth  # values in a register
    UNIT: tl.constexpr = 1 if TILE.transposed else H
    COLUMN: tl.constexpr = H if TILE.transposed else 1
    unit = tl.program_id(0) * TILE.block_h + _index(2, 8) * (2 // TILE.gates)
    k = FIRST + _index(0, TILE.groups) * K + _index(4, 4) * (4 * WIDTH)
    row = _index(1, M // 16) * 16 + _index(6, 2)
    column = _index(3, K // (16 * WIDTH)) * (16 * WIDTH) + _index(5, 4 * WIDTH)
    gate, row = row % TILE.gates, row // TILE.gates
    ptrs = w_ptr + unit * UNIT + k * COLUMN + row * UNIT + gate * (H * H) + column * COLUMN
    ptrs = gl.set_auto_layout(ptrs, TILE.slice)
    if STOP <= TILE.columns[PART] and H % TILE.block_h == 0 and GATES >= TILE.gates:
        x = tl.load(ptrs)  # a mask would cost registers
    else:
        mask = (unit + row < H) & (gate < GATES) & (k + column < TILE.columns[PART])
        x = tl.load(ptrs, gl.set_auto_layout(mask, TILE.slice), other=0.0)
    x = round_operand(x)
    x = x.reshape([TILE.groups, M // 16, 8, K // (16 * WIDTH), 4, 4, WIDTH, 2])
    x = x.permute([0, 1, 7, 2, 3, 5, 4, 6]).reshape([TILE.groups, M, K])
    barrier()  # the addresses of all chunks at once would need more registers
    return gl.convert_layout(x, TILE.weight, assert_trivial=True)


@gluon.jit
def _load_products(w_ptr, PART: tl.constexpr, CELL: tl.constexpr, TILE: tl.constexpr):
    GATES: tl.constexpr = CELL.parts[PART]
    EACH: tl.constexpr = len(GATES) if TILE.transposed else TILE.gates
    w = ()
    for g in tl.static_range(0, len(GATES), EACH):
        rows, rounds = w_ptr + GATES[g] * (TILE.H * TILE.H), ()
        for r in tl.static_range(len(TILE.rounds[PART]) - 1, -1, -1):  # the last needs no registers
            chunks = ()
            for n in tl.static_range(len(TILE.rounds[PART][r])):
                x = _load_chunk(rows, len(GATES) - g, PART, r, n, TILE)
                if r > 0:
                    x = gl.allocate_shared_memory(x.dtype, x.shape, TILE.store, x)
                chunks = chunks + (x,)
            rounds = (chunks,) + rounds
        w = w + (rounds,)
    return w


@gluon.jit
def load_slices(
    w_ptr, FIRST: tl.constexpr, STOP: tl.constexpr, CELL: tl.constexpr, TILE: tl.constexpr
):
    """``w[part][product][round][chunk]``, the first operands of the products of some parts."""
    w = ()
    for part in tl.static_range(FIRST, STOP):
        w = w + (_load_products(w_ptr, part, CELL, TILE),)
    return w


@gluon.jit
def _issued():
    """Lets all loads be issued before a product; the compiler else waits for them one by one."""
    gl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.u32 $0, $1;",
        "=r,r,~{memory}",
        [tl.program_id(0)],
        tl.int32,
        False,
        1,
    )


@gluon.jit
def _fetch_chunk(
    rows_ptr, last, WIDTH, COLUMNS: tl.constexpr, PART: tl.constexpr, ROUND: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.minimum(gl.arange(0, TILE.block_b), last)[None, :, None]
    FIRST: tl.constexpr = TILE.rounds[PART][ROUND][CHUNK][0]
    K: tl.constexpr = TILE.rounds[PART][ROUND][CHUNK][1]
    k = (FIRST + gl.arange(0, TILE.groups)[:, None] * K + gl.arange(0, K)[None, :])[:, None, :]
    ptrs = gl.set_auto_layout(rows_ptr + row * WIDTH + k, TILE.wide)
    if TILE.rounds[PART][ROUND][CHUNK][2] > COLUMNS:
        mask = gl.set_auto_layout((k < COLUMNS) & (row >= 0), TILE.wide)
        return tl.load(ptrs, mask, other=0.0, cache_modifier=".cg")
    else:
        return tl.load(ptrs, cache_modifier=".cg")


@gluon.jit
def _fetch(
    rows_ptr, last, WIDTH, COLUMNS: tl.constexpr, PART: tl.constexpr, ROUND: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """``u[chunk]`` of rows of WIDTH values, the second operand past L1; zero beyond COLUMNS.

    Rows beyond ``last`` are the last one again.
    """
    u = ()
    for n in tl.static_range(len(TILE.rounds[PART][ROUND])):
        u = u + (_fetch_chunk(rows_ptr, last, WIDTH, COLUMNS, PART, ROUND, n, TILE),)
    _issued()
    return u


@gluon.jit
def _operand(u, TILE: tl.constexpr):
    """The second operand as fetched, with its columns in the order of the products."""
    B: tl.constexpr = u.shape[1]
    K: tl.constexpr = u.shape[2]
    WIDTH: tl.constexpr = 32 // u.dtype.primitive_bitwidth
    u = u.reshape([TILE.groups, B, K // (16 * WIDTH), 4, 4, WIDTH])
    u = u.permute([0, 2, 4, 3, 5, 1]).reshape([TILE.groups, K, B])
    return gl.convert_layout(u, TILE.operand, assert_trivial=True)


@gluon.jit
def multiply(w, u, accs, ROUND: tl.constexpr, TILE: tl.constexpr):
    """``w[n] u + accs[n]`` over the chunks of a round."""
    out = ()
    for n in tl.static_range(len(w)):
        acc = accs[n]
        for i in tl.static_range(len(u)):
            weight = w[n][ROUND][i].load(TILE.weight) if ROUND > 0 else w[n][ROUND][i]
            acc = mma_v2(weight, _operand(u[i], TILE), acc, input_precision="tf32")
        out = out + (acc,)
    return out


@gluon.jit
def zero_accs(N: tl.constexpr, TILE: tl.constexpr):
    out = ()
    for _ in tl.static_range(N):
        acc = gl.full([TILE.groups, TILE.rows, TILE.block_b], 0.0, tl.float32, TILE.acc)
        out = out + (acc,)
    return out


@gluon.jit
def products(w, slot, accs, PHASE: tl.constexpr, TILE: tl.constexpr):
    """``w[n] u + accs[n]`` with the operand u of a phase, which is in a slot."""
    for r in tl.static_range(len(TILE.rounds[PHASE])):
        u = _fetch(slot, TILE.block_b, TILE.pitch, TILE.pitch, PHASE, r, TILE)
        accs = multiply(w, u, accs, r, TILE)
    return accs


@gluon.jit
def fetch_rows(base, factors, program, step, place, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """The operand of the last part: rows of a step that another layer wrote, times the factors."""
    PART: tl.constexpr = len(TILE.rounds) - 1
    if len(place) > 1:
        first = place[1].to(tl.int64) + program.first_b
    else:
        first = time_of(tl.maximum(step, 0), program).to(tl.int64) * program.B + program.first_b
    last = (program.R - 1 - first).to(tl.int32)
    COLUMNS: tl.constexpr = TILE.columns[PART]
    u, x = (), _fetch(base + first * WIDTH, last, WIDTH, COLUMNS, PART, 0, TILE)
    if factors is not None:
        y = _fetch(factors + first * WIDTH, last, WIDTH, COLUMNS, PART, 0, TILE)
    for n in tl.static_range(len(x)):
        u = u + (round_operand(x[n] * y[n] if factors is not None else x[n]),)
    return u


@gluon.jit
def add_up(accs, TILE: tl.constexpr):
    """The sums over all groups: a tile for each product, of 8 units two, in fp32.

    The compiler puts one barrier between the stores and the loads.
    """
    G: tl.constexpr = TILE.groups
    B: tl.constexpr = TILE.block_b
    M: tl.constexpr = TILE.rows
    buffers, out = (), ()
    for n in tl.static_range(len(accs)):
        acc = accs[n].reshape([G, M // 16, 2, 8, B]).permute([0, 4, 1, 3, 2]).reshape([G, B, M])
        buffer = gl.allocate_shared_memory(tl.float32, [G, B, M], TILE.shared, acc)
        buffers = buffers + (buffer,)
    for n in tl.static_range(len(accs)):
        total = tl.sum(buffers[n].load(TILE.parts), 0)
        if TILE.gates == 1:
            out = out + (gl.convert_layout(total, TILE.tile, assert_trivial=True),)
        else:
            one, other = gl.split(total.reshape([B, 8, 2]))
            out = out + (
                gl.convert_layout(one, TILE.tile, assert_trivial=True),
                gl.convert_layout(other, TILE.tile, assert_trivial=True),
            )
    return out
