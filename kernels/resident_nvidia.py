"""Schedule *resident* for NVIDIA: W_hh in registers, and one barrier a step (Gluon).

The recurrence, the cells and the rules for rows are those of ``resident.py``; ``mma.py`` makes the
products. In forward, h changes hands through one of two shared buffers: a step reads the one that
the step before has written, so that the barrier between them is the only one. Backward does the
same with dgates. The loop over time makes two steps a turn, one with each buffer.

Addresses of a step are a scalar, which the uniform datapath computes, plus offsets that no step
changes. Reads of rows beyond B see the last row instead, which is cheaper than a mask.

Limits: tensors of 16 bits, or fp32 with tf32 products; W_hh must fit the registers (``plan.py``);
H is padded to a power of two of at least 16.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.experimental import gluon

from .cells import CELLS, Cell
from .launch import cdiv, layers_backward, layers_forward, on_device, options_of
from .mma import (
    Tile,
    load_bias,
    load_weights,
    multiply,
    operand,
    sequences,
    share,
    shared_tiles,
    squash,
    start_of,
    sum_of,
    tile_of,
    to_tile,
    units,
    widened,
    zero_acc,
)
from .problem import Plan, Tiles
from .rows import Rows
from .tensors import Grads, Layers
from .tiles import (
    INITIAL,
    PREVIOUS,
    add_to,
    choose,
    entering_state,
    gradient_before,
    is_present,
    is_stored,
    leaving_state,
    load_origins,
    time_of,
    visible,
    where,
    zero_where,
)

#: Steps in one turn of the loop over time.
STEPS = 2


class Part(NamedTuple):
    """The share of a launch that one program computes, as a ``tiles.Program`` of all units."""

    d: Any  # the direction
    out: Any  # pointer to the layer's output
    T: Any
    B: Any
    R: Any
    first_b: Any  # the first sequence
    offs_b: Any  # [BLOCK_B], the sequences, the last one again in place of those beyond B
    mask_b: Any  # [BLOCK_B], those of them that exist
    cols: Any  # [BLOCK_H], the hidden units


@gluon.jit
def _program(layers, T, B, R, TILE: tl.constexpr):
    """The sequences and the direction of this program."""
    d = tl.program_id(1) * (TILE.D - 1)  # of a single direction a constant
    first_b = tl.program_id(0) * TILE.block_b
    offs_b = first_b + sequences(TILE)
    last = tl.minimum(offs_b, B - 1)
    return Part(d, layers.out[0], T, B, R, first_b, last, offs_b < B, units(TILE))


@triton.jit
def _pointers(base, program, W):
    """Pointers to the first tile of rows of W values, the row of sequence 0 at base.

    Inside of a program offsets have 32 bits, up to its first row 64.
    """
    base += program.first_b.to(tl.int64) * W
    return base + (((program.offs_b - program.first_b) * W)[:, None] + program.cols[None, :])


@triton.jit
def _load(base, program, masks, N: tl.constexpr, W, TILE: tl.constexpr):
    """N tiles from rows of W values; zero beyond H and where a mask is not."""
    H: tl.constexpr = TILE.H
    ptrs = _pointers(base, program, W)
    tiles = ()
    for n in tl.static_range(N):
        if len(masks) > 0:
            inside = masks[0][:, None] & (program.cols < H)[None, :]
            tile = tl.load(ptrs + n * H, mask=inside, other=0.0)
        elif H < TILE.block_h:
            tile = tl.load(ptrs + n * H, mask=(program.cols < H)[None, :], other=0.0)
        else:
            tile = tl.load(ptrs + n * H)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def _store(base, program, mask, tiles, W: tl.constexpr, TILE: tl.constexpr):
    """Stores tiles into rows of W values."""
    ptrs = _pointers(base, program, W)
    inside = mask[:, None] & (program.cols < TILE.H)[None, :]
    for n in tl.static_range(len(tiles)):
        tl.store(ptrs + n * TILE.H, tiles[n].to(base.dtype.element_ty), mask=inside)


@triton.jit
def _place(layers, program, step):
    """The origins of a step, and the row of sequence 0 if rows are packed; nothing if dense.

    What a step reads depends on it, so it is loaded one step before that.
    """
    place = ()
    if layers.origins is not None:
        t = time_of(tl.minimum(tl.maximum(step, 0), program.T - 1), program).to(tl.int64)
        place = (load_origins(layers, program, t),)
        if layers.starts is not None:
            place = place + (tl.load(layers.starts + t),)
    return place


@triton.jit
def _origins(program, place):
    if len(place) > 0:
        return place[0]
    else:
        return program.mask_b


@triton.jit
def _row(program, step, place):
    """The row of sequence 0."""
    if len(place) > 1:
        return place[1]
    else:
        # Of unsigned numbers of 32 bits the product of 64 is one instruction.
        t = time_of(step, program).to(tl.uint32)
        return t.to(tl.int64) * program.B.to(tl.uint32).to(tl.int64)


@triton.jit
def _readable(layers, program, place):
    """A mask of the sequences whose row may be read, or nothing where all may."""
    if len(place) > 0:
        return (is_present(layers, program, place[0]),)
    else:
        return ()


@triton.jit
def _load_ends(h_ptr, c_ptr, program, TILE: tl.constexpr):
    """h_0 and c_0, or what is like them."""
    first = (program.d * program.B).to(tl.int64) * TILE.H
    state = _load(h_ptr + first, program, (), 1, TILE.H, TILE)
    if c_ptr is not None:
        state = state + _load(c_ptr + first, program, (), 1, TILE.H, TILE)
    return state


@triton.jit
def _store_ends(h_ptr, c_ptr, program, state, TILE: tl.constexpr):
    first = (program.d * program.B).to(tl.int64) * TILE.H
    _store(h_ptr + first, program, program.mask_b, (state[0],), TILE.H, TILE)
    if c_ptr is not None:
        _store(c_ptr + first, program, program.mask_b, (state[1],), TILE.H, TILE)


@triton.jit
def _load_gx(layers, program, step, place, CELL: tl.constexpr, TILE: tl.constexpr):
    """The projected input of a step, a tile for each gate, in the dtype of the tensors."""
    G: tl.constexpr = len(CELL.gates)
    row = program.d.to(tl.int64) * program.R
    row += _row(program, tl.minimum(step, program.T - 1), place)
    masks = _readable(layers, program, place)
    return _load(layers.gx + row * (G * TILE.H), program, masks, G, G * TILE.H, TILE)


@gluon.jit
def _forward_step(
    layers, program, step, weights, state, gx, places, read, write, inner,
    CELL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One step: its h comes from the buffer ``read``, the next one goes to ``write``.

    ``places`` are those of this step and the next two. Returns the state that enters the next step,
    and gx and places for the step after that.
    """
    D: tl.constexpr = TILE.D
    H: tl.constexpr = TILE.H
    S: tl.constexpr = len(CELL.saved)
    w, b = weights
    origins, origins_next = _origins(program, places[0]), _origins(program, places[1])
    gx = widened(gx)
    entering, gh = state, ()
    for p in tl.static_range(len(CELL.phases)):
        if p > 0:
            share(inner, CELL.operand(p, gx, gh, entering, squash, True))
        u = operand(read if p == 0 else inner, TILE)
        for i in tl.static_range(len(CELL.phases[p])):
            start = start_of(CELL.phases[p][i], gx, b, CELL, TILE)
            gh = gh + (to_tile(multiply(w[CELL.phases[p][i]], u, start), TILE),)
    state, saved = CELL.forward(gx, gh, entering, squash, True)
    result = leaving_state(layers, state, entering, origins)
    if layers.origins is not None:  # behind the last step no sequence begins
        origins_next = tl.where(step + 1 < program.T, origins_next, PREVIOUS)
    state = entering_state(layers, result, origins_next)
    share(write, state[0])

    # Behind the exchange, which the next step waits for.
    gx_later = _load_gx(layers, program, step + 2, places[2], CELL, TILE)
    later = (places[1], places[2], _place(layers, program, step + 3))
    if layers.starts is None:  # skipped steps have no row if rows are packed
        result = visible(layers, result, origins)
    here = is_stored(layers, program, origins)
    row = _row(program, step, places[0])
    d_row = program.d.to(tl.int64) * program.R + row
    _store(program.out + row * (D * H) + program.d * H, program, here, (result[0],), D * H, TILE)
    if layers.gates is not None:
        _store(layers.gates + d_row * (S * H), program, here, saved, S * H, TILE)
    if layers.cs is not None:
        _store(layers.cs + d_row * H, program, here, (result[1],), H, TILE)
    return state, gx_later, later


@gluon.jit(do_not_specialize=["T", "B", "R"])
def _resident_fwd_kernel(layers, T, B, R, CELL: tl.constexpr, TILE: tl.constexpr):
    program = _program(layers, T, B, R, TILE)
    dtype: tl.constexpr = layers.h_0.dtype.element_ty
    w = load_weights(choose(layers.w_hh, program.d), False, CELL, TILE)
    weights = (w, load_bias(choose(layers.b_hh, program.d), CELL, TILE))
    even, odd, inner = shared_tiles(3 if len(CELL.phases) > 1 else 2, 3, dtype, TILE)

    places = (
        _place(layers, program, 0), _place(layers, program, 1), _place(layers, program, 2)
    )  # fmt: skip
    gx = _load_gx(layers, program, 0, places[0], CELL, TILE)
    gx_odd = _load_gx(layers, program, 1, places[1], CELL, TILE)
    state = widened(_load_ends(layers.h_0, layers.c_0, program, TILE))
    state = entering_state(layers, state, _origins(program, places[0]))
    share(even, state[0])
    for pair in range(T // 2):
        step = 2 * pair
        state, gx, places = _forward_step(
            layers, program, step, weights, state, gx, places, even, odd, inner, CELL, TILE
        )
        state, gx_odd, places = _forward_step(
            layers, program, step + 1, weights, state, gx_odd, places, odd, even, inner, CELL, TILE
        )
    if T % 2 == 1:
        state, gx, places = _forward_step(
            layers, program, T - 1, weights, state, gx, places, even, odd, inner, CELL, TILE
        )
    _store_ends(layers.h_n, layers.c_n, program, state, TILE)


@triton.jit
def _load_left(layers, program, step, place, TILE: tl.constexpr):
    """The state that left a step, the one before the first if the rows are dense.

    It is zero where the step was skipped.
    """
    D: tl.constexpr = TILE.D
    H: tl.constexpr = TILE.H
    masks = _readable(layers, program, place)
    row = _row(program, tl.maximum(step, 0), place)
    h_rows = program.out + row * (D * H) + program.d * H
    c_rows = layers.cs
    if layers.cs is not None:
        c_rows = layers.cs + (program.d.to(tl.int64) * program.R + row) * H
    W = D * H
    if layers.origins is None:
        first = (program.d * program.B).to(tl.int64) * H
        h_rows = tl.where(step >= 0, h_rows, layers.h_0 + first)
        if D > 1:
            W = tl.where(step >= 0, D * H, H)
        if layers.cs is not None:
            c_rows = tl.where(step >= 0, c_rows, layers.c_0 + first)
    state = _load(h_rows, program, masks, 1, W, TILE)
    if layers.cs is not None:
        state = state + _load(c_rows, program, masks, 1, H, TILE)
    return state


@triton.jit
def _load_step(layers, grads, program, step, places, CELL: tl.constexpr, TILE: tl.constexpr):
    """Loads the tensors of a backward step, in their dtype: saved tiles, the state that left the
    step before, and the gradients of out and of cs (a tile or none).
    """
    D: tl.constexpr = TILE.D
    H: tl.constexpr = TILE.H
    S: tl.constexpr = len(CELL.saved)
    left = _load_left(layers, program, step - 1, places[1], TILE)
    masks = _readable(layers, program, places[0])
    row = _row(program, tl.maximum(step, 0), places[0])
    d_row = program.d.to(tl.int64) * program.R + row
    saved, d_out, d_cs = (), (), ()
    if S > 0:
        saved = _load(layers.gates + d_row * (S * H), program, masks, S, S * H, TILE)
    if grads.out is not None:
        base = grads.out + row * (D * H) + program.d * H
        d_out = _load(base, program, masks, 1, D * H, TILE)
    if grads.cs is not None:
        d_cs = _load(grads.cs + d_row * H, program, masks, 1, H, TILE)
    return saved, left, d_out, d_cs


@gluon.jit
def _backward_step(
    layers, grads, program, step, fixed, d_state, left, now, places, buffers,
    CELL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One step: dgates go through the buffers, one for each gate.

    ``places`` are those of this step and the three before it, in time. Returns the gradient of the
    state that entered, the state that left the step before, and what the step before that reads.
    """
    H: tl.constexpr = TILE.H
    N: tl.constexpr = len(CELL.tiles)
    w, initial = fixed
    saved, left_before, d_out, d_cs = now
    saved, left_before, origins = widened(saved), widened(left_before), _origins(program, places[0])
    if not TILE.is_full:
        now = _load_step(layers, grads, program, step - 2, (places[2], places[3]), CELL, TILE)
    later = (places[1], places[2], places[3], _place(layers, program, step - 4))
    entered = left_before
    if layers.origins is not None:
        first = zero_where(origins != INITIAL, initial)
        entered = where(origins == PREVIOUS, left_before, first)
    if grads.out is not None:
        d_state = add_to(d_state, 0, widened(d_out)[0])
    if grads.cs is not None:
        d_state = add_to(d_state, 1, widened(d_cs)[0])
    d_leaving, carry = d_state, ()
    du = d_state[0]  # not read by the last phase
    here = is_stored(layers, program, origins)
    row = program.d.to(tl.int64) * program.R + _row(program, step, places[0])
    for p in tl.static_range(len(CELL.phases) - 1, -1, -1):
        dgates, d_state, carry = CELL.adjoint(p, d_state, du, saved, entered, left, carry, squash)
        if layers.starts is None:
            dgates = visible(layers, dgates, origins)
        for i in tl.static_range(len(CELL.phases[p])):
            share(buffers[CELL.phases[p][i]], dgates[CELL.factors[p][i]])
        rows = grads.gates + row * (N * H) + CELL.grads[p][0] * H
        _store(rows, program, here, dgates, N * H, TILE)
        terms = ()
        for i in tl.static_range(len(CELL.phases[p])):
            u = operand(buffers[CELL.phases[p][i]], TILE)
            term = multiply(w[CELL.phases[p][i]], u, zero_acc(TILE))
            terms = terms + (term,)
        du = to_tile(sum_of(terms), TILE)
    d_state = add_to(d_state, 0, du)
    d_state = gradient_before(layers, d_state, d_leaving, origins)
    if TILE.is_full:  # of registers, so that they are taken later
        now = _load_step(layers, grads, program, step - 2, (places[2], places[3]), CELL, TILE)
    return d_state, left_before, now, later


@gluon.jit(do_not_specialize=["T", "B", "R"])
def _resident_bwd_kernel(layers, grads, T, B, R, CELL: tl.constexpr, TILE: tl.constexpr):
    G: tl.constexpr = len(CELL.gates)
    program = _program(layers, T, B, R, TILE)
    dtype: tl.constexpr = layers.h_0.dtype.element_ty
    w = load_weights(choose(layers.w_hh, program.d), True, CELL, TILE)
    even, odd = shared_tiles(G, G, dtype, TILE), shared_tiles(G, G, dtype, TILE)

    places = (
        _place(layers, program, T - 1), _place(layers, program, T - 2),
        _place(layers, program, T - 3), _place(layers, program, T - 4),
    )  # fmt: skip
    fixed = (w, widened(_load_ends(layers.h_0, layers.c_0, program, TILE)))
    d_state = widened(_load_ends(grads.h_n, grads.c_n, program, TILE))
    left = widened(_load_left(layers, program, T - 1, places[0], TILE))
    now = _load_step(layers, grads, program, T - 1, (places[0], places[1]), CELL, TILE)
    ahead = _load_step(layers, grads, program, T - 2, (places[1], places[2]), CELL, TILE)
    for pair in range(T // 2):
        step = T - 1 - 2 * pair
        d_state, left, now, places = _backward_step(
            layers, grads, program, step, fixed, d_state, left, now, places, even, CELL, TILE
        )
        d_state, left, ahead, places = _backward_step(
            layers, grads, program, step - 1, fixed, d_state, left, ahead, places, odd,
            CELL, TILE,
        )  # fmt: skip
    if T % 2 == 1:
        d_state, left, now, places = _backward_step(
            layers, grads, program, 0, fixed, d_state, left, now, places, even, CELL, TILE
        )
    _store_ends(grads.h_0, grads.c_0, program, d_state, TILE)


def _arguments(cell: str, tiles: Tiles, layers: Layers) -> tuple[Cell, Tile, dict[str, Any]]:
    """The arguments CELL and TILE of a kernel, and its compiler options."""
    D, _, H = layers.h_0.shape
    itemsize = layers.h_0.element_size()
    tile = tile_of(D, H, tiles.block_b, tiles.block_h, tiles.num_warps, itemsize)
    return CELLS[cell], tile, options_of(tiles)


def forward(cell: str, plan: Plan, layers: Layers, rows: Rows) -> None:
    """Runs one layer in all its directions: writes out, h_n, c_n and what is to be saved."""
    D, B, _ = layers.h_0.shape
    cell_, tile, options = _arguments(cell, plan.forward, layers)
    with on_device(layers.h_0):
        _resident_fwd_kernel[cdiv(B, tile.block_b), D](
            layers_forward(layers), rows.T, B, rows.total, cell_, tile, **options
        )


def backward(cell: str, plan: Plan, layers: Layers, grads: Grads, rows: Rows) -> None:
    """Runs the layer backwards: writes the gradients of its gates, h_0 and c_0."""
    assert plan.backward is not None, "the plan has no backward"
    D, B, _ = layers.h_0.shape
    cell_, tile, options = _arguments(cell, plan.backward, layers)
    with on_device(layers.h_0):
        _resident_bwd_kernel[cdiv(B, tile.block_b), D](
            layers_backward(layers), grads, rows.T, B, rows.total, cell_, tile, **options
        )
