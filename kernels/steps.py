"""The tensors of a step: how a kernel reads and writes the rows of one program.

Plain Triton that also serves the Gluon kernels, because indices come with their layouts: a program
makes them once for its ``Part``, and every pointer follows from them. TILE has L, D, H, ``block_b``
and ``block_h``. An address is a pointer that no step changes plus a row times its width. A row that
a sequence does not have, beyond B or where it skips a step, is another one that exists, which is
cheaper than a mask of the read; what follows from it is left out.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tiles import INITIAL, SKIPPED, choose, visible


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
def _inside(masks, mask_h):
    """The mask of a tile, given none or one of its sequences and none or one of its units."""
    if len(masks) == 0:
        return mask_h[0][None, :]
    elif len(mask_h) == 0:
        return masks[0][:, None]
    else:
        return masks[0][:, None] & mask_h[0][None, :]


@triton.jit
def _pointers(base, program, rows, W):
    """Pointers to the first tile of rows of W values."""
    first, each = rows
    if each.dtype == tl.int32:
        each = each.to(tl.uint32)  # multiplied to 64 bits in one instruction
    return (base + first * W + program.cols)[None, :] + (each.to(tl.int64) * W)[:, None]


@triton.jit
def load(base, program, rows, masks, N: tl.constexpr, W, TILE: tl.constexpr):
    """N tiles from rows of W values, side by side; zero where a mask is not, and beyond H."""
    H: tl.constexpr = TILE.H
    mask_h = program.mask_h if H % TILE.block_h > 0 else ()
    ptrs = _pointers(base, program, rows, W)
    tiles = ()
    for n in tl.static_range(N):
        if len(masks) + len(mask_h) == 0:
            tile = tl.load(ptrs + n * H)
        else:
            tile = tl.load(ptrs + n * H, mask=_inside(masks, mask_h), other=0.0)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def store(base, program, rows, masks, tiles, W: tl.constexpr, TILE: tl.constexpr):
    """Stores tiles into rows of W values."""
    ptrs = _pointers(base, program, rows, W)
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

    What a step reads depends on it, so it is loaded one step before that. Beyond the first and the
    last step it is theirs.
    """
    place = ()
    if layers.origins is not None:
        t = time_of(tl.maximum(tl.minimum(step, program.T - 1), 0), program)
        first = program.d.to(tl.int64) * program.T * program.B
        row, ptrs = t.to(tl.uint32).to(tl.int64), layers.origins + first + program.offs_b
        if len(program.mask_b) > 0:
            origins = tl.load(ptrs + row * program.B.to(tl.uint32).to(tl.int64))
            origins = tl.where(program.mask_b[0], origins, SKIPPED)
        else:  # counted in bytes it is one instruction less
            ptrs = ptrs.to(tl.pointer_type(tl.int8)) + row * (program.B.to(tl.int64) * 4)
            origins = tl.load(ptrs.to(tl.pointer_type(tl.int32)))
        place = (origins,)
        if layers.starts is not None:
            place = place + (tl.load(layers.starts + t.to(tl.int64)),)
    return place


@triton.jit
def located(program, place):
    """The place of a step, and if rows are packed those of its sequences, found once for all."""
    return place + (rows_of(program, 0, place)[1],) if len(place) == 2 else place


@triton.jit
def origins_at(program, place):
    return place[0] if len(place) > 0 else ()


@triton.jit
def rows_of(program, step, place):
    """The row of a step, and those of its sequences from there.

    If rows are packed, sequences that have none get any others.
    """
    if len(place) > 2:
        return 0, place[2]
    elif len(place) > 1:
        return 0, tl.minimum(place[1].to(program.R.dtype) + program.offs_b, program.R - 1)
    else:
        t = time_of(step, program).to(tl.uint32)
        return t.to(tl.int64) * program.B.to(tl.uint32).to(tl.int64), program.offs_b


@triton.jit
def _written(layers, program, place, tiles):
    """The mask of the sequences to store, if any, and the tiles, zero where a step is skipped.

    If rows are packed, a skipped step has none.
    """
    if layers.starts is None:
        return program.mask_b, visible(layers, tiles, origins_at(program, place))
    else:
        return (place[0] != SKIPPED,), tiles


@triton.jit
def load_ends(h_ptr, c_ptr, program, TILE: tl.constexpr):
    """h_0 and c_0, or what is like them."""
    rows = program.z.to(tl.int64) * program.B, program.offs_b
    state = load(h_ptr, program, rows, (), 1, TILE.H, TILE)
    if c_ptr is not None:
        state = state + load(c_ptr, program, rows, (), 1, TILE.H, TILE)
    return state


@triton.jit
def store_ends(h_ptr, c_ptr, program, state, TILE: tl.constexpr):
    rows = program.z.to(tl.int64) * program.B, program.offs_b
    store(h_ptr, program, rows, program.mask_b, (state[0],), TILE.H, TILE)
    if c_ptr is not None:
        store(c_ptr, program, rows, program.mask_b, (state[1],), TILE.H, TILE)


@triton.jit
def load_gx(layers, program, step, place, CELL: tl.constexpr, TILE: tl.constexpr):
    """The projected input of a step, a tile for each gate, in the dtype of the tensors."""
    G: tl.constexpr = len(CELL.gates)
    masks = ()
    if TILE.L > 1:  # the layers above the first have none, and see zeros
        masks = (program.offs_b < tl.where(program.z == 0, program.B, 0),)
    rows = rows_of(program, tl.minimum(step, program.T - 1), place)
    base = layers.gx + program.d.to(tl.int64) * program.R * (G * TILE.H)
    return load(base, program, rows, masks, G, G * TILE.H, TILE)


@triton.jit
def store_h(layers, program, step, place, state, TILE: tl.constexpr):
    """Stores the output of a step, given the state that leaves it."""
    here, h = _written(layers, program, place, (state[0],))
    rows, base = rows_of(program, step, place), program.out + program.d.to(tl.int64) * TILE.H
    store(base, program, rows, here, h, TILE.D * TILE.H, TILE)


@triton.jit
def store_saved(layers, program, step, place, state, saved, CELL: tl.constexpr, TILE: tl.constexpr):
    """Stores what backward needs of a step besides h: the saved tiles and c."""
    H: tl.constexpr = TILE.H
    S: tl.constexpr = len(CELL.saved)
    here, c = _written(layers, program, place, state[1:])
    if len(CELL.phases) > 1:  # the gradient of W_hh multiplies them, too
        _, saved = _written(layers, program, place, saved)
    rows, first = rows_of(program, step, place), program.z.to(tl.int64) * program.R
    if layers.gates is not None:
        store(layers.gates + first * (S * H), program, rows, here, saved, S * H, TILE)
    if layers.cs is not None:
        store(layers.cs + first * H, program, rows, here, c, H, TILE)


@triton.jit
def _left(ptr, initial, program, rows, is_first, W: tl.constexpr, TILE: tl.constexpr):
    """A tile of rows of W values, or where ``is_first``, if given, of an initial state."""
    ptrs = _pointers(ptr, program, rows, W)
    if len(is_first) > 0:
        rows = program.z.to(tl.int64) * program.B, program.offs_b
        ptrs = tl.where(is_first[0], _pointers(initial, program, rows, TILE.H), ptrs)
    if len(program.mask_h) > 0 and TILE.H % TILE.block_h > 0:
        return tl.load(ptrs, mask=program.mask_h[0][None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def load_left(layers, program, step, place, is_first, TILE: tl.constexpr):
    """The state that left a step, or h_0 and c_0 where ``is_first``, if given."""
    D: tl.constexpr = TILE.D
    H: tl.constexpr = TILE.H
    rows, h = rows_of(program, tl.maximum(step, 0), place), program.out + program.d.to(tl.int64) * H
    state = (_left(h, layers.h_0, program, rows, is_first, D * H, TILE),)
    if layers.cs is not None:
        c = layers.cs + program.z.to(tl.int64) * program.R * H
        state = state + (_left(c, layers.c_0, program, rows, is_first, H, TILE),)
    return state


@triton.jit
def load_step(layers, grads, program, step, places, CELL: tl.constexpr, TILE: tl.constexpr):
    """Loads the tensors of a backward step, in their dtype: saved tiles, the state that left the
    step before, and the gradients of out and of cs (a tile or none).
    """
    D: tl.constexpr = TILE.D
    H: tl.constexpr = TILE.H
    S: tl.constexpr = len(CELL.saved)
    is_first = step < 1
    if layers.origins is not None:
        is_first = (places[0][0] == INITIAL)[:, None]
    left = load_left(layers, program, step - 1, places[1], (is_first,), TILE)
    rows = rows_of(program, tl.maximum(step, 0), places[0])
    first = program.z.to(tl.int64) * program.R
    saved, d_out, d_cs = (), (), ()
    if S > 0:
        saved = load(layers.gates + first * (S * H), program, rows, (), S, S * H, TILE)
    if grads.out is not None:
        shown = ()
        if TILE.L > 1:  # it is the output of the last layer
            shown = (program.offs_b < tl.where(program.z == TILE.L - 1, program.B, 0),)
        d_out = load(grads.out + program.d.to(tl.int64) * H, program, rows, shown, 1, D * H, TILE)
    if grads.cs is not None:
        d_cs = load(grads.cs + first * H, program, rows, (), 1, H, TILE)
    return saved, left, d_out, d_cs


@triton.jit
def store_dgates(
    layers, grads, program, step, place, dgates,
    PHASE: tl.constexpr, CELL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of a phase's gates in a step."""
    W: tl.constexpr = len(CELL.tiles) * TILE.H
    here, dgates = _written(layers, program, place, dgates)
    first = program.z.to(tl.int64) * program.R * W + CELL.grads[PHASE][0] * TILE.H
    store(grads.gates + first, program, rows_of(program, step, place), here, dgates, W, TILE)
