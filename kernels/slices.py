"""Products of which every program holds a slice: whole rows of H columns times BLOCK_H units.

The sum over H is cut into *chunks* ``K_CHUNKS = ((start, KS, KC), ...)`` of KS pieces with KC
columns each; KS is the same for all. A chunk is one batched product
``[KS, BLOCK_B, KC] x [KS, KC, BLOCK_H]``: KS chains of dependent mma instructions (24 cycles each)
on as many warps instead of one KS times as long, and every warp reads its own pieces of the operand
only. Where dots are added the compiler makes one accumulator of them, so that a chain goes on
through all chunks (``gate_products``) or all gates of a phase (``gradient_product``). That saves
registers; where the chain would be too long (``model.py``) some dots begin an accumulator of their
own: ``DOT = (input precision, (APART or 0, ...))``, of each dot in the order of the sum. What the
warps have is added at the end, once for each tile and always in one order.
"""

import triton
import triton.language as tl

from .common import time_of
from .plan import Tiles
from .ragged import INITIAL, PREVIOUS, first_row

#: ``max_num_imprecise_acc`` of a dot that begins an accumulator. It means fp8 alone, but only where
#: it is 0 does the compiler add the sum so far into the dot.
APART = 1 << 20


def accumulators(tiles: Tiles, count: int) -> tuple[int, ...]:
    """Of ``count`` dots in the order of their sum, which begin an accumulator: the kernels' DOT."""
    each = tiles.folded or count
    return tuple(APART if each < count and place % each == 0 else 0 for place in range(count))


@triton.jit
def choose(pointers, index):
    """``pointers[index]`` of a tuple, for an index known only at run time."""
    pointer = pointers[0]
    for i in tl.static_range(1, len(pointers)):
        pointer = tl.where(index == i, pointers[i], pointer)
    return pointer


@triton.jit
def part(pointers, index, member, SIZE: tl.constexpr, MEMBERS: tl.constexpr):
    """``pointers[index]``; of ``[members, SIZE]`` where the part of ``member`` begins."""
    pointer = choose(pointers, index)
    if MEMBERS:
        pointer += member * SIZE
    return pointer


@triton.jit
def chunk_columns(K_CHUNKS: tl.constexpr, N: tl.constexpr):
    """The columns of chunk N, ``[KS, KC]``: KS pieces of KC neighbours."""
    pieces = tl.arange(0, K_CHUNKS[N][1])[:, None] * K_CHUNKS[N][2]
    return K_CHUNKS[N][0] + pieces + tl.arange(0, K_CHUNKS[N][2])[None, :]


@triton.jit
def load_slice(
    w_ptrs,  # [Z], [G*H, H] each
    z,  # the layer and direction
    member,
    start,  # the first unit of the slice
    G: tl.constexpr,
    H: tl.constexpr,
    BLOCKS: tl.constexpr,  # ((0, BLOCK_H),)
    K_CHUNKS: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """``w[gate][chunk]``, tiles ``[KS, KC, BLOCK_H]`` for a product over KC.

    TRANSPOSE: the units are rows of each gate's matrix (forward, u W^T); else its columns
    (backward, dgates W).
    """
    w_ptr = part(w_ptrs, z, member, G * H * H, MEMBERS)
    units = start + tl.arange(0, BLOCKS[0][1])
    w = ()
    for g in tl.static_range(G):
        tiles = ()
        for n in tl.static_range(len(K_CHUNKS)):
            k = chunk_columns(K_CHUNKS, n)
            if TRANSPOSE:
                ptrs = w_ptr + (g * H + units)[None, None, :] * H + k[:, :, None]
            else:
                ptrs = w_ptr + (g * H + k)[:, :, None] * H + units[None, None, :]
            mask = (units < H)[None, None, :] & (k < H)[:, :, None]
            tiles = tiles + (tl.load(ptrs, mask=mask, other=0.0),)
        w = w + (tiles,)
    return w


@triton.jit
def load_operand(row_ptrs, mask_row, H: tl.constexpr, K_CHUNKS: tl.constexpr):
    """Whole rows that other programs wrote, ``[chunk]``: tiles ``[KS, BLOCK_B, KC]``, past L1."""
    u = ()
    for n in tl.static_range(len(K_CHUNKS)):
        k = chunk_columns(K_CHUNKS, n)[:, None, :]
        mask = mask_row[None, :, None]
        if K_CHUNKS[n][0] + K_CHUNKS[n][1] * K_CHUNKS[n][2] > H:
            mask = mask & (k < H)
        u = u + (tl.load(row_ptrs[None, :, None] + k, mask, other=0.0, cache_modifier=".cg"),)
    return u


@triton.jit
def load_previous(
    out_ptr, h_0_ptr, origins, starts_ptr, step, T, B, pid_z, pid_d, offs_b, mask_b,
    RAGGED: tl.constexpr, PACKED: tl.constexpr,
    D: tl.constexpr, H: tl.constexpr, K_CHUNKS: tl.constexpr,
):  # fmt: skip
    """Whole rows of the h that enters a step, as an operand."""
    t_prev = time_of(tl.maximum(step - 1, 0), T, pid_d)
    if RAGGED:
        first = first_row(starts_ptr, t_prev, B, PACKED)
        rows = out_ptr + (first * (D * H) + pid_d * H) + offs_b * (D * H)
        u = load_operand(rows, origins == PREVIOUS, H, K_CHUNKS)
        rows = h_0_ptr + pid_z * B * H + offs_b * H
        return add_tiles(u, load_operand(rows, origins == INITIAL, H, K_CHUNKS))
    else:
        # Scalars are chosen, for a choice of vectors loses their alignment (Triton 3.9).
        base = tl.where(step > 0, t_prev * B * (D * H) + pid_d * H, pid_z * B * H)
        rows = tl.where(step > 0, out_ptr, h_0_ptr) + base
        rows += offs_b * tl.where(step > 0, D * H, H)
        return load_operand(rows, mask_b, H, K_CHUNKS)


@triton.jit
def piece_products(u, w, FIRST: tl.constexpr, NEXT: tl.constexpr, DOT: tl.constexpr):
    """``u[chunk] w[chunk]`` in fp32, piece by piece: ``[chunk]``, ``[KS, BLOCK_B, BLOCK_H]``.

    Chunk n has place ``FIRST + n * NEXT`` in the sum that will be made of them.
    """
    out = ()
    for n in tl.static_range(len(w)):
        dot = tl.dot(
            u[n].to(w[n].dtype), w[n], input_precision=DOT[0],
            max_num_imprecise_acc=DOT[1][FIRST + n * NEXT],
        )  # fmt: skip
        out = out + (dot,)
    return out


@triton.jit
def sum_pieces(pieces, NEXT: tl.constexpr, DOT: tl.constexpr):
    """The sum over chunks and pieces, ``[BLOCK_B, BLOCK_H]``; chunk n has place ``n * NEXT``."""
    total, done = pieces[0], ()
    for n in tl.static_range(1, len(pieces)):
        if DOT[1][n * NEXT]:
            done = done + (total,)
            total = pieces[n]
        else:
            total = total + pieces[n]
    for i in tl.static_range(len(done)):
        total = done[i] + total
    return tl.sum(total, 0)


@triton.jit
def add_tiles(left, right):
    out = ()
    for n in tl.static_range(len(left)):
        out = out + (left[n] + right[n],)
    return out


@triton.jit
def masked(x, mask):
    out = ()
    for n in tl.static_range(len(x)):
        out = out + (x[n] * mask[n],)
    return out


@triton.jit
def gate_products(
    u,  # [chunk]
    w,  # [gate][chunk]
    b,  # [gate][block], rows [1, BLOCK_H]
    PHASES: tl.constexpr,
    PHASE: tl.constexpr,
    DOT: tl.constexpr,
):
    """``out[0][gate] = u W[gate] + b[gate]``, for the gates of PHASES[PHASE]."""
    block = ()
    for g in tl.static_range(len(PHASES[PHASE])):
        pieces = piece_products(u, w[PHASES[PHASE][g]], 0, 1, DOT)
        block = block + (sum_pieces(pieces, 1, DOT) + b[PHASES[PHASE][g]][0],)
    return (block,)


@triton.jit
def gradient_product(
    dgate_rows,
    mask_b,
    w,  # [gate][chunk]
    TILES: tl.constexpr,  # for each gate of each phase the tile of dgates
    PHASES: tl.constexpr,
    PHASE: tl.constexpr,
    H: tl.constexpr,
    K_CHUNKS: tl.constexpr,
    DOT: tl.constexpr,
):
    """The sum over the gates of a phase of ``dgates W[gate]``: this slice's part of every row."""
    # Of several gates it is these that are added, chunk by chunk, and then the chunks.
    one: tl.constexpr = len(PHASES[PHASE]) == 1
    done = ()
    for g in tl.static_range(len(PHASES[PHASE])):
        u = load_operand(dgate_rows + TILES[PHASE][g] * H, mask_b, H, K_CHUNKS)
        pieces = piece_products(u, w[PHASES[PHASE][g]], g, one, DOT)
        if g == 0:
            total = pieces
        elif DOT[1][g]:
            done = done + (total,)
            total = pieces
        else:
            total = add_tiles(total, pieces)
    for i in tl.static_range(len(done)):
        total = add_tiles(done[i], total)
    return sum_pieces(total, one, DOT)
