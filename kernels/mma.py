"""Recurrent products on NVIDIA's tensor cores with every layout written out (Gluon).

A product computes ``W u^T`` with W_hh as the first operand, which stays in registers for all steps.
The units of H are its rows, so that no row of an ``mma`` instruction is wasted on a batch of 8. Row
``8 r + l`` of an instruction's 16 is unit ``2 l + r``: the two rows that a thread holds are
neighbouring units, so the accumulator is a tile ``[BLOCK_B, BLOCK_H]`` whose rows are stored with
32 bits a thread in full sectors. Going from one to the other moves nothing, which
``assert_trivial`` makes the compiler prove. A small H has more warps, of 8 units each: rows 8 to
15 are left, and the work of a thread outside of the products halves.

u changes hands between warps through shared memory, in tiles of the same layout.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.target_info import cuda_capability_geq

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # its name in Triton 3.6


class Tile(NamedTuple):
    """The compile-time sizes and layouts of a launch."""

    L: int
    D: int
    H: int
    block_b: int  # sequences of a program
    block_h: int  # its units, a power of two of at least 16
    rows: int  # of a product: block_h, or twice that if a warp has 8 units
    chunks: tuple  # (first, number) of the columns of W_hh, H padded to a multiple of 16
    is_full: bool  # W_hh takes half of the registers
    tile: Any  # [BLOCK_B, BLOCK_H], a tile in registers
    acc: Any  # [rows, BLOCK_B], the accumulator of a product
    weight: Any  # [rows, BLOCK_H], its first operand
    operand: Any  # [BLOCK_H, BLOCK_B], its second operand
    shared: Any  # [BLOCK_B, BLOCK_H], a tile in shared memory


@lru_cache(maxsize=1024)
def tile_of(D: int, H: int, block_b: int, block_h: int, warps: int, itemsize: int) -> Tile:
    """Returns the layouts for elements of 2 or 4 bytes; a warp has 8 units or more."""

    def steps(first: int, stop: int) -> list[int]:
        return [first << n for n in range((stop // first).bit_length() - 1)]

    acc = gl.NVMMADistributedLayout([2, 0], [warps, 1], [16, 8])
    pair = 2 if block_h >= 16 * warps else 1  # units of a thread side by side
    tile = gl.DistributedLinearLayout(
        reg_bases=[
            *([0, h] for h in steps(1, pair)),
            [1, 0],
            *([b, 0] for b in steps(8, block_b)),
            *([0, h] for h in steps(8 * pair * warps, block_h)),
        ],
        lane_bases=[[2, 0], [4, 0], [0, pair], [0, 2 * pair], [0, 4 * pair]],
        warp_bases=[[0, h] for h in steps(8 * pair, 8 * pair * warps)],
        block_bases=[],
        shape=[block_b, block_h],
    )
    width = 4 // itemsize  # elements of an operand in a register
    vector = 16 // itemsize  # elements of a row that ldmatrix reads at once
    # Rows differ in the banks that they begin in, so that neither stores nor ldmatrix conflict.
    shared = gl.SwizzledSharedLayout(
        vector, max(1, 8 * vector // block_h), min(8, block_h // vector), [1, 0]
    )
    first, second = (gl.DotOperandLayout(n, acc, width) for n in (0, 1))
    rows, is_full = 2 * block_h // pair, block_h * itemsize >= 256
    columns = -(-H // 16) * 16
    # At most 128 at once: the addresses of 256 spill registers with Triton 3.9.
    chunks = tuple((n, 128) for n in range(0, columns - 127, 128))
    chunks += tuple((columns & -2 * n, n) for n in (64, 32, 16) if columns & n)
    return Tile(1, D, H, block_b, block_h, rows, chunks, is_full, tile, acc, first, second, shared)


@gluon.jit
def sequences(TILE: tl.constexpr):
    """0 to BLOCK_B - 1, for the rows of a tile."""
    return gl.arange(0, TILE.block_b, gl.SliceLayout(1, TILE.tile))


@gluon.jit
def units(TILE: tl.constexpr):
    """0 to BLOCK_H - 1, for the columns of a tile."""
    return gl.arange(0, TILE.block_h, gl.SliceLayout(0, TILE.tile))


@gluon.jit
def to_acc(tile, TILE: tl.constexpr):
    """A tile as an accumulator."""
    B: tl.constexpr = tile.shape[0]
    H: tl.constexpr = TILE.rows
    if TILE.rows > TILE.block_h:
        tile = gl.join(tile, tile)
    rows = tile.reshape([B, H // 16, 8, 2]).permute([1, 3, 2, 0]).reshape([H, B])
    return gl.convert_layout(rows, TILE.acc, assert_trivial=True)


@gluon.jit
def to_tile(acc, TILE: tl.constexpr):
    """An accumulator as a tile."""
    H: tl.constexpr = acc.shape[0]
    B: tl.constexpr = acc.shape[1]
    columns = acc.reshape([H // 16, 2, 8, B]).permute([3, 0, 2, 1])
    if TILE.rows > TILE.block_h:
        columns, _ = gl.split(columns)
    columns = columns.reshape([B, TILE.block_h])
    return gl.convert_layout(columns, TILE.tile, assert_trivial=True)


@gluon.jit
def widened(tiles, PAIRS: tl.constexpr = True):
    """Tiles in fp32. For PAIRS of bf16 it is one instruction a number: the compiler takes two."""
    out = ()
    for n in tl.static_range(len(tiles)):
        if tiles[n].dtype == tl.bfloat16 and PAIRS:
            x = gl.inline_asm_elementwise(
                "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
                "=r,=r,r",
                [tiles[n]],
                tl.float32,
                True,
                2,
            )
        else:
            x = tiles[n].to(tl.float32)
        out = out + (x,)
    return out


@gluon.jit
def zero_where(condition, tiles):
    """Zero in the sequences where the condition holds, even in place of a NaN.

    The compiler would move a choice behind the rounding, and unpack the numbers for it.
    """
    code: tl.constexpr = "and.b32 $0, $1, $2;"
    mask = tl.where(condition, 0, -1)[:, None]
    out = ()
    for n in tl.static_range(len(tiles)):
        out = out + (
            gl.inline_asm_elementwise(code, "=f,f,r", [tiles[n], mask], tl.float32, True, 1),
        )
    return out


@gluon.jit
def round_operand(x):
    """fp32 rounded to the nearest TF32: the tensor cores would cut off the low bits."""
    if x.dtype == tl.float32:
        if cuda_capability_geq(9, 0):  # one instruction
            code: tl.constexpr = "cvt.rn.tf32.f32 $0, $1;"
        else:
            code: tl.constexpr = "cvt.rna.tf32.f32 $0, $1;"
        x = gl.inline_asm_elementwise(code, "=r,f", [x], tl.float32, True, 1)
    return x


@gluon.jit
def load_weights(w_ptr, TRANSPOSE: tl.constexpr, CELL: tl.constexpr, TILE: tl.constexpr):
    """``w[gate][chunk]`` of a whole W_hh ``[G*H, H]``, or its transpose, as the first operand.

    Units beyond H are the first ones again, and compute the same; their columns are zero.
    """
    H: tl.constexpr = TILE.H
    row = gl.arange(0, TILE.rows, gl.SliceLayout(1, TILE.weight))
    if TILE.rows > TILE.block_h:
        unit = (row // 16) * 8 + (row % 8 ^ row // 8 % 2)
    else:
        unit = (row // 16) * 16 + (row % 8) * 2 + (row // 8) % 2
    unit = (unit % H)[:, None]
    w = ()
    for g in tl.static_range(len(CELL.gates)):
        chunks = ()
        for n in tl.static_range(len(TILE.chunks)):
            k = gl.arange(0, TILE.chunks[n][1], gl.SliceLayout(0, TILE.weight))
            k = (TILE.chunks[n][0] + k)[None, :]
            ptrs = w_ptr + ((g * H + k) * H + unit if TRANSPOSE else (g * H + unit) * H + k)
            x = tl.load(ptrs, mask=(unit < H) & (k < H), other=0.0)
            chunks = chunks + (round_operand(x),)
            barrier()  # the addresses of all weights at once would need more registers
        w = w + (chunks,)
    return w


@gluon.jit
def load_bias(b_ptr, cols, CELL: tl.constexpr, TILE: tl.constexpr):
    """``b[gate]`` of some units, rows ``[1, BLOCK_H]``, or nothing without a bias."""
    b = ()
    if b_ptr is not None:
        for g in tl.static_range(len(CELL.gates)):
            row = tl.load(b_ptr + g * TILE.H + cols, mask=cols < TILE.H, other=0.0)
            b = b + (row.to(tl.float32)[None, :],)
    return b


@gluon.jit
def shared_tiles(N: tl.constexpr, COUNT: tl.constexpr, dtype: tl.constexpr, TILE: tl.constexpr):
    """COUNT tiles in shared memory, of which those behind the first N are the last of them."""
    out = ()
    for n in tl.static_range(COUNT):
        if n < N:
            out = out + (
                gl.allocate_shared_memory(dtype, [TILE.block_b, TILE.block_h], TILE.shared),
            )
        else:
            out = out + (out[N - 1],)
    return out


@gluon.jit
def share(buffer, tile):
    """Writes a tile for all warps to read, rounded to the dtype of the operands."""
    buffer.store(round_operand(tile.to(buffer.dtype)))


@gluon.jit
def operand(buffer, TILE: tl.constexpr):
    """Reads a shared tile as the second operand; the compiler puts a barrier before it."""
    u = ()
    for n in tl.static_range(len(TILE.chunks)):
        chunk = buffer.slice(TILE.chunks[n][0], TILE.chunks[n][1], 1)
        u = u + (chunk.permute((1, 0)).load(TILE.operand),)
    return u


@gluon.jit
def multiply(weight, u, acc):
    """``weight u + acc``."""
    for n in tl.static_range(len(u)):
        acc = mma_v2(weight[n], u[n], acc, input_precision="tf32")
    return acc


@gluon.jit
def zero_acc(TILE: tl.constexpr):
    return gl.full([TILE.rows, TILE.block_b], 0.0, tl.float32, TILE.acc)


@gluon.jit
def start_of(g: tl.constexpr, gx, b, CELL: tl.constexpr, TILE: tl.constexpr):
    """The value that the product of a gate is added to."""
    if CELL.merged[g]:
        return to_acc(gx[g] + b[g] if len(b) > 0 else gx[g], TILE)
    elif len(b) > 0:
        return to_acc(tl.where(gx[g] == gx[g], b[g], b[g]), TILE)
    else:
        return zero_acc(TILE)


@gluon.jit
def sum_of(terms):
    """The sum of one to four accumulators, in pairs."""
    if len(terms) == 1:
        return terms[0]
    elif len(terms) == 2:
        return terms[0] + terms[1]
    elif len(terms) == 3:
        return terms[0] + terms[1] + terms[2]
    else:
        return (terms[0] + terms[1]) + (terms[2] + terms[3])


@gluon.jit
def exp2(x):
    """2^x to 2 ulp; what is too small for a normal number is 0."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@gluon.jit
def reciprocal(x):
    """1 / x to 1 ulp."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@gluon.jit
def _denominator(x, SCALE: tl.constexpr, N: tl.constexpr):
    """1 + 2^(SCALE x), at most 2^31 where a product of several is formed. Keeps NaN."""
    x = SCALE * x
    if N > 1:
        x = tl.minimum(x, 31.0, propagate_nan=tl.PropagateNan.ALL)
    return 1.0 + exp2(x)


@gluon.jit
def squash(tiles, KINDS: tl.constexpr):
    """The sigmoid of up to four tiles, or tanh where KINDS says so, with one reciprocal for all.

    ``sigmoid(x) = 1 / (1 + 2^(-x log2 e))`` and ``tanh(x) = 1 - 2 / (1 + 2^(2 x log2 e))``, to an
    absolute error of 4e-7. With ``r = 1 / (a b)``, ``1 / a = r b``.
    """
    N: tl.constexpr = len(tiles)
    d = ()
    for n in tl.static_range(N):
        d = d + (
            _denominator(tiles[n], 2.8853900817779268 if KINDS[n] else -1.4426950408889634, N),
        )
    if N == 4:
        left, right = d[0] * d[1], d[2] * d[3]
        r = reciprocal(left * right)
        right, left = r * right, r * left  # 1 / (d0 d1) and 1 / (d2 d3)
        inverse = (right * d[1], right * d[0], left * d[3], left * d[2])
    elif N == 2:
        r = reciprocal(d[0] * d[1])
        inverse = (r * d[1], r * d[0])
    else:
        inverse = (reciprocal(d[0]),)
    out = ()
    for n in tl.static_range(N):
        out = out + (1.0 - 2.0 * inverse[n] if KINDS[n] else inverse[n],)
    return out
