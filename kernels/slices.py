"""Products of a slice of W_hh with an operand that many programs computed (Gluon).

The slice, some rows of W_hh or of its transpose, is the first operand of an ``mma`` and stays in
registers. The columns are split over groups of one warp each, the leading dimension of a batched
product, so every element of the other operand is loaded by one thread of the program: it goes from
L2 straight into the registers that need it, 16 bytes a thread. The order of the sum over columns is
private: a thread's 16 bytes are the operands of two instructions (``_permuted``).

The partial sums of the groups meet in shared memory (``add_up``), from which each thread takes the
elements of some units and sequences, so the cell is computed once. An instruction has 16 rows.
Row ``8 r + l`` is unit ``2 l + r``, or with 8 units a program unit l of one of two gates, so the
two rows that a thread holds lie beside each other in memory and in shared memory.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2


@gluon.jit
def row_of_slice(N: tl.constexpr, LAYOUT: tl.constexpr):
    """0 to N - 1, for the rows of a slice as the first operand."""
    return gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))


@gluon.jit
def from_pairs(w, TILE: tl.constexpr):
    """The first operand, from rows by unit: nothing moves."""
    M: tl.constexpr = w.shape[1]
    K: tl.constexpr = w.shape[2]
    rows = w.reshape([TILE.groups, M // 16, 8, 2, K]).permute([0, 1, 3, 2, 4])
    return gl.convert_layout(rows.reshape([TILE.groups, M, K]), TILE.weight, assert_trivial=True)


@gluon.jit
def columns_of_slice(
    PHASE: tl.constexpr, CHUNK: tl.constexpr, bits: tl.constexpr, LAYOUT: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """The columns of a chunk ``[groups, 1, columns of a group]`` in the order of the products."""
    WIDTH: tl.constexpr = TILE.chunks[PHASE][CHUNK][1]
    group = gl.arange(0, TILE.groups, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    k = gl.arange(0, WIDTH, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    if bits == 16:
        k = k // 32 * 32 + k // 2 % 4 * 8 + k // 16 % 2 * 4 + k // 8 % 2 * 2 + k % 2
    else:
        k = k // 16 * 16 + k % 4 * 4 + k // 8 % 2 * 2 + k // 4 % 2
    return TILE.chunks[PHASE][CHUNK][0] + group[:, None, None] * WIDTH + k[None, None, :]


@gluon.jit
def _permuted(u, TILE: tl.constexpr):
    """An operand as loaded, with its columns in the order of the products: nothing moves."""
    K: tl.constexpr = u.shape[1]
    if u.dtype.primitive_bitwidth == 16:
        u = u.reshape([TILE.groups, K // 32, 4, 2, 2, 2, TILE.block_b])
        u = u.permute([0, 1, 3, 4, 2, 5, 6])
    else:
        u = u.reshape([TILE.groups, K // 16, 4, 2, 2, TILE.block_b])
        u = u.permute([0, 1, 3, 4, 2, 5])
    u = u.reshape([TILE.groups, K, TILE.block_b])
    return gl.convert_layout(u, TILE.operand, assert_trivial=True)


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
    rows_ptr, last, WIDTH, PHASE: tl.constexpr, CHUNK: tl.constexpr, MASK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    START: tl.constexpr = TILE.chunks[PHASE][CHUNK][0]
    COLUMNS: tl.constexpr = TILE.chunks[PHASE][CHUNK][1]
    wide: tl.constexpr = TILE.wide[PHASE][CHUNK]
    group = gl.arange(0, TILE.groups, gl.SliceLayout(1, gl.SliceLayout(2, wide)))
    k = gl.arange(0, COLUMNS, gl.SliceLayout(0, gl.SliceLayout(2, wide)))
    row = gl.arange(0, TILE.block_b, gl.SliceLayout(0, gl.SliceLayout(1, wide)))
    row = tl.minimum(row, last)[None, None, :]
    columns = START + group[:, None, None] * COLUMNS + k[None, :, None]
    if START + TILE.groups * COLUMNS > MASK:
        mask = (columns < MASK) & (row >= 0)
        return tl.load(rows_ptr + row * WIDTH + columns, mask, other=0.0, cache_modifier=".cg")
    else:
        return tl.load(rows_ptr + row * WIDTH + columns, cache_modifier=".cg")


@gluon.jit
def fetch(
    rows_ptr, last, WIDTH, PHASE: tl.constexpr, REST: tl.constexpr, MASK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """``u[chunk]``, whole rows of WIDTH values as the second operand, past L1.

    The chunks whose weights are in registers, or the REST. ``rows_ptr`` is the row of the first
    sequence. Rows beyond ``last`` are the last one again; columns beyond MASK are zero.
    """
    HELD: tl.constexpr = TILE.held[PHASE]
    u = ()
    for n in tl.static_range(len(TILE.chunks[PHASE])):
        if (n >= HELD) == REST:
            u = u + (_fetch_chunk(rows_ptr, last, WIDTH, PHASE, n, MASK, TILE),)
    if len(u) > 0:
        _issued()
    return u


@gluon.jit
def hold(w, PHASE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """A chunk of the first operand where it stays: in registers or in shared memory."""
    if CHUNK < TILE.held[PHASE]:
        return w
    else:
        return gl.allocate_shared_memory(w.dtype, w.shape, TILE.store, w)


@gluon.jit
def multiply(w, u, acc, PHASE: tl.constexpr, REST: tl.constexpr, TILE: tl.constexpr):
    """``w u + acc`` over the chunks of u."""
    HELD: tl.constexpr = TILE.held[PHASE]
    for n in tl.static_range(len(u)):
        if REST:
            acc = mma_v2(
                w[HELD + n].load(TILE.weight),
                _permuted(u[n], TILE), acc, input_precision="tf32",
            )  # fmt: skip
        else:
            acc = mma_v2(w[n], _permuted(u[n], TILE), acc, input_precision="tf32")
    return acc


@gluon.jit
def products(w, slot, starts, PHASE: tl.constexpr, TILE: tl.constexpr):
    """``w[n] u + starts[n]`` with the operand u of a phase, which is in a slot."""
    for rest in tl.static_range(2):
        u = fetch(slot, TILE.block_b, TILE.pitch, PHASE, rest, TILE.pitch, TILE)
        accs = ()
        for n in tl.static_range(len(w)):
            accs = accs + (multiply(w[n], u, starts[n], PHASE, rest, TILE),)
        starts = accs
    return starts


@gluon.jit
def zero_acc(ROWS: tl.constexpr, TILE: tl.constexpr):
    return gl.full([TILE.groups, ROWS, TILE.block_b], 0.0, tl.float32, TILE.acc)


@gluon.jit
def sum_buffers(N: tl.constexpr, TILE: tl.constexpr):
    """Shared memory for the partial sums of N products."""
    ROWS: tl.constexpr = TILE.groups * TILE.block_b * max(TILE.block_h, 16) // 16
    shape: tl.constexpr = [ROWS, 16]
    out = ()
    for _ in tl.static_range(N):
        out = out + (gl.allocate_shared_memory(tl.float32, shape, TILE.shared),)
    return out


@gluon.jit
def _sum(buffer, TILE: tl.constexpr):
    """The sum over the groups, as it lies in shared memory."""
    GROUPS: tl.constexpr = TILE.groups
    ROWS: tl.constexpr = buffer.shape[0] // GROUPS
    total = buffer.slice(0, ROWS).load(TILE.part)
    for g in tl.static_range(1, GROUPS):
        total += buffer.slice(g * ROWS, ROWS).load(TILE.part)
    return total


@gluon.jit
def add_up(buffers, accs, TILE: tl.constexpr):
    """The sums over all groups: a tile for each product, of 8 units two, in fp32.

    The compiler puts one barrier between the stores and the loads.
    """
    B: tl.constexpr = TILE.block_b
    M: tl.constexpr = max(TILE.block_h, 16)
    for n in tl.static_range(len(accs)):
        acc = accs[n].reshape([TILE.groups, M // 16, 2, 8, B // 8, 4, 2])
        acc = acc.permute([0, 4, 1, 3, 5, 6, 2])
        buffers[n].store(acc.reshape([TILE.groups * B * M // 16, 16]))
    out = ()
    for n in tl.static_range(len(accs)):
        total = _sum(buffers[n], TILE).reshape([B // 8, M // 16, 8, 4, 2, 2])
        total = total.permute([0, 3, 4, 1, 2, 5])
        if TILE.block_h > 8:
            tile = total.reshape([B, M])
            out = out + (gl.convert_layout(tile, TILE.tile, assert_trivial=True),)
        else:
            one, other = gl.split(total.reshape([B, 8, 2]))
            out = out + (
                gl.convert_layout(one, TILE.tile, assert_trivial=True),
                gl.convert_layout(other, TILE.tile, assert_trivial=True),
            )
    return out
