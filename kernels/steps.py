"""The tensors of a step: how a kernel reads and writes the rows of one program.

Plain Triton that also serves the Gluon kernels, because indices come with their layouts: a program
makes them once for its ``Part``, and every pointer follows from them. TILE has L, D, H, ``block_b``
and ``block_h``. Addresses of a step are a scalar, which the uniform datapath computes, plus offsets
that no step changes. Reads of rows beyond B see the last row instead, which is cheaper than a mask.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tiles import INITIAL, PREVIOUS, SKIPPED, choose, visible, where, zero_where


class Part(NamedTuple):
    """The share of a launch that one program computes."""

    z: Any  # the layer and direction, in 0 .. L*D - 1
    d: Any  # the direction
    out: Any  # pointer to the layer's output
    T: Any
    B: Any
    R: Any
    first_b: Any  # the first sequence
    offs_b: Any  # [BLOCK_B], the sequences, the last one again in place of those beyond B
    mask_b: Any  # ([BLOCK_B],), those of them that exist; () if the others are stored again
    cols: Any  # [BLOCK_H], the hidden units
    mask_h: Any  # ([BLOCK_H],), those of them that exist; () if cols has the first ones again


@triton.jit
def part_of(
    layers, z, first_b, rows, cols, T, B, R, TILE: tl.constexpr, AGAIN: tl.constexpr = False
):
    """The part of layer and direction z: sequences ``first_b + rows``, and units ``cols``.

    With AGAIN, the kernel computes for sequences beyond B the last one again and for units beyond H
    the first ones, and stores the same values again in the same places: no store needs a mask.
    """
    out = choose(layers.out, z) if TILE.L > 1 else layers.out[0]
    offs_b = first_b + rows
    last = tl.minimum(offs_b, B - 1)
    if AGAIN:
        return Part(z, z % TILE.D, out, T, B, R, first_b, last, (), cols % TILE.H, ())
    else:
        inside = cols < TILE.H
        return Part(z, z % TILE.D, out, T, B, R, first_b, last, (offs_b < B,), cols, (inside,))


@triton.jit
def _pointers(base, program, cols, W):
    """Pointers to the first tile of rows of W values, the row of sequence 0 at base.

    Inside of a program offsets have 32 bits, up to its first row 64.
    """
    base += program.first_b.to(tl.int64) * W
    return base + (((program.offs_b - program.first_b) * W)[:, None] + cols[None, :])


@triton.jit
def _inside(masks, mask_h):
    """The mask of a tile, given none or one of its sequences and none or one of its units."""
    if len(masks) == 0:
        return mask_h[0][None, :]
    elif len(mask_h) == 0:
        return masks[0][:, None]
    else:
        return masks[0][:, None] & mask_h[0][None, :]


@triton.jit
def load(base, program, masks, N: tl.constexpr, W, TILE: tl.constexpr, ZERO: tl.constexpr = True):
    """N tiles from rows of W values; zero where a mask is not, and beyond H.

    Without ZERO they are anything where a mask is not, and beyond H those of the first units again,
    which takes fewer instructions.
    """
    H: tl.constexpr = TILE.H
    mask_h = program.mask_h if ZERO and H % TILE.block_h > 0 else ()
    again: tl.constexpr = len(program.mask_h) > 0 and not ZERO
    ptrs = _pointers(base, program, program.cols % H if again else program.cols, W)
    tiles = ()
    for n in tl.static_range(N):
        if len(masks) + len(mask_h) == 0:
            tile = tl.load(ptrs + n * H)
        elif ZERO:
            tile = tl.load(ptrs + n * H, mask=_inside(masks, mask_h), other=0.0)
        else:
            tile = tl.load(ptrs + n * H, mask=_inside(masks, mask_h))
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def store(base, program, masks, tiles, W: tl.constexpr, TILE: tl.constexpr):
    """Stores tiles into rows of W values."""
    ptrs = _pointers(base, program, program.cols, W)
    for n in tl.static_range(len(tiles)):
        tile = tiles[n].to(base.dtype.element_ty)
        if len(masks) + len(program.mask_h) == 0:
            tl.store(ptrs + n * TILE.H, tile)
        else:
            tl.store(ptrs + n * TILE.H, tile, mask=_inside(masks, program.mask_h))


@triton.jit
def time_of(step, program):
    """The time of a step: direction 1 runs from T - 1 down to 0."""
    return step + program.d * (program.T - 1 - 2 * step)


@triton.jit
def place_of(layers, program, step):
    """The origins of a step, and the row of sequence 0 if rows are packed; nothing if dense.

    What a step reads depends on it, so it is loaded one step before that.
    """
    place = ()
    if layers.origins is not None:
        step = tl.where(step < program.T, step, program.T - 1)
        t = time_of(tl.where(step < 0, 0, step), program).to(tl.uint32)
        row = (program.d * program.T).to(tl.int64) + t.to(tl.int64)
        row *= program.B.to(tl.uint32).to(tl.int64)
        ptrs = layers.origins + row + program.offs_b
        if len(program.mask_b) == 0:
            place = (tl.load(ptrs).to(tl.int32),)
        else:
            place = (tl.load(ptrs, mask=program.mask_b[0], other=SKIPPED).to(tl.int32),)
        if layers.starts is not None:
            place = place + (tl.load(layers.starts + t),)
    return place


@triton.jit
def origins_at(program, place):
    return place[0] if len(place) > 0 else ()


@triton.jit
def row_of(program, step, place):
    """The row of sequence 0."""
    if len(place) > 1:
        return place[1]
    else:
        # Unsigned numbers of 32 bits are multiplied to 64 in one instruction.
        t = time_of(step, program).to(tl.uint32)
        return t.to(tl.int64) * program.B.to(tl.uint32).to(tl.int64)


@triton.jit
def readable(layers, program, place):
    """A mask of the sequences whose row may be read, or nothing where all may."""
    if len(place) > 0:
        return (place[0] != SKIPPED,)
    else:
        return ()


@triton.jit
def _written(layers, program, place, tiles):
    """The mask of the sequences to store, if any, and the tiles, zero where a step is skipped.

    If rows are packed, a skipped step has none.
    """
    if layers.starts is not None:
        return (place[0] != SKIPPED,), tiles
    else:
        return program.mask_b, visible(layers, tiles, origins_at(program, place))


@triton.jit
def load_ends(h_ptr, c_ptr, program, TILE: tl.constexpr):
    """h_0 and c_0, or what is like them."""
    first = (program.z * program.B).to(tl.int64) * TILE.H
    state = load(h_ptr + first, program, (), 1, TILE.H, TILE)
    if c_ptr is not None:
        state = state + load(c_ptr + first, program, (), 1, TILE.H, TILE)
    return state


@triton.jit
def store_ends(h_ptr, c_ptr, program, state, TILE: tl.constexpr):
    first = (program.z * program.B).to(tl.int64) * TILE.H
    store(h_ptr + first, program, program.mask_b, (state[0],), TILE.H, TILE)
    if c_ptr is not None:
        store(c_ptr + first, program, program.mask_b, (state[1],), TILE.H, TILE)


@triton.jit
def load_gx(layers, program, step, place, CELL: tl.constexpr, TILE: tl.constexpr):
    """The projected input of a step, a tile for each gate, in the dtype of the tensors."""
    G: tl.constexpr = len(CELL.gates)
    row = program.d.to(tl.int64) * program.R
    row += row_of(program, tl.minimum(step, program.T - 1), place)
    masks = readable(layers, program, place)
    if TILE.L > 1:  # the layers above the first have none, and see zeros
        is_first = program.offs_b < tl.where(program.z == 0, program.B, 0)
        masks = (masks[0] & is_first if len(masks) > 0 else is_first,)
    rows = layers.gx + row * (G * TILE.H)
    return load(rows, program, masks, G, G * TILE.H, TILE, TILE.block_h < TILE.H)


@triton.jit
def store_h(layers, program, step, place, state, TILE: tl.constexpr):
    """Stores the output of a step, given the state that leaves it."""
    here, h = _written(layers, program, place, (state[0],))
    row = row_of(program, step, place) * TILE.D + program.d
    store(program.out + row * TILE.H, program, here, h, TILE.D * TILE.H, TILE)


@triton.jit
def store_saved(layers, program, step, place, state, saved, CELL: tl.constexpr, TILE: tl.constexpr):
    """Stores what backward needs of a step besides h: the saved tiles and c."""
    H: tl.constexpr = TILE.H
    S: tl.constexpr = len(CELL.saved)
    here, c = _written(layers, program, place, state[1:])
    row = program.z.to(tl.int64) * program.R + row_of(program, step, place)
    if layers.gates is not None:
        store(layers.gates + row * (S * H), program, here, saved, S * H, TILE)
    if layers.cs is not None:
        store(layers.cs + row * H, program, here, c, H, TILE)


@triton.jit
def load_left(layers, program, step, place, TILE: tl.constexpr):
    """The state that left a step, the one before the first if the rows are dense.

    It is anything where the step was skipped.
    """
    D: tl.constexpr = TILE.D
    H: tl.constexpr = TILE.H
    masks = readable(layers, program, place)
    row = row_of(program, tl.maximum(step, 0), place)
    h_rows = program.out + (row * D + program.d) * H
    c_rows = layers.cs
    if layers.cs is not None:
        c_rows = layers.cs + (program.z.to(tl.int64) * program.R + row) * H
    W = D * H
    if layers.origins is None:
        first = (program.z * program.B).to(tl.int64) * H
        h_rows = tl.where(step >= 0, h_rows, layers.h_0 + first)
        if D > 1:
            W = tl.where(step >= 0, D * H, H)
        if layers.cs is not None:
            c_rows = tl.where(step >= 0, c_rows, layers.c_0 + first)
    is_part: tl.constexpr = TILE.block_h < H
    state = load(h_rows, program, masks, 1, W, TILE, is_part)
    if layers.cs is not None:
        state = state + load(c_rows, program, masks, 1, H, TILE, is_part)
    return state


@triton.jit
def load_step(layers, grads, program, step, places, CELL: tl.constexpr, TILE: tl.constexpr):
    """Loads the tensors of a backward step, in their dtype: saved tiles, the state that left the
    step before, and the gradients of out and of cs (a tile or none).
    """
    D: tl.constexpr = TILE.D
    H: tl.constexpr = TILE.H
    S: tl.constexpr = len(CELL.saved)
    left = load_left(layers, program, step - 1, places[1], TILE)
    masks = readable(layers, program, places[0])
    row = row_of(program, tl.maximum(step, 0), places[0])
    d_row = program.z.to(tl.int64) * program.R + row
    saved, d_out, d_cs = (), (), ()
    if S > 0:
        rows = layers.gates + d_row * (S * H)
        saved = load(rows, program, masks, S, S * H, TILE, TILE.block_h < H)
    if grads.out is not None:
        base = grads.out + (row * D + program.d) * H
        shown = masks
        if TILE.L > 1:  # it is the output of the last layer
            is_last = program.offs_b < tl.where(program.z == TILE.L - 1, program.B, 0)
            shown = (masks[0] & is_last if len(masks) > 0 else is_last,)
        d_out = load(base, program, shown, 1, D * H, TILE)
    if grads.cs is not None:
        d_cs = load(grads.cs + d_row * H, program, masks, 1, H, TILE)
    return saved, left, d_out, d_cs


@triton.jit
def entered(layers, origins, left_before, initial):
    """The state that entered a step, given the one that left the step before and h_0 and c_0."""
    if layers.origins is not None:
        first = zero_where(origins != INITIAL, initial)
        return where(origins == PREVIOUS, left_before, first)
    else:
        return left_before


@triton.jit
def store_dgates(
    layers, grads, program, step, place, dgates,
    PHASE: tl.constexpr, CELL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of a phase's gates in a step."""
    W: tl.constexpr = len(CELL.tiles) * TILE.H
    here, dgates = _written(layers, program, place, dgates)
    row = program.z.to(tl.int64) * program.R + row_of(program, step, place)
    base = grads.gates + (row * W + CELL.grads[PHASE][0] * TILE.H)
    store(base, program, here, dgates, W, TILE)
