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

from typing import Any

import triton
import triton.language as tl
from triton.experimental import gluon

from .cells import CELLS, Cell
from .launch import cdiv, on_device, options_of
from .mma import (
    Tile,
    load_weights,
    multiply,
    operand,
    sequences,
    share,
    shared_tiles,
    squash,
    tile_of,
    to_acc,
    to_tile,
    units,
    widened,
    zero_acc,
)
from .plan import Plan, Tiles
from .resident import layers_backward, layers_forward
from .rows import Rows
from .tensors import Grads, Layers
from .tiles import (
    INITIAL,
    PREVIOUS,
    Program,
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
    widen,
)


@gluon.jit
def _program(layers, T, B, R, TILE: tl.constexpr):
    """The sequences and the direction of this program, and all hidden units."""
    d = tl.program_id(1) * (TILE.D - 1)  # of a single direction a constant
    offs_b = tl.program_id(0) * TILE.block_b + sequences(TILE)
    cols = units(TILE)
    return Program(d, d, layers.out[0], T, B, R, tl.minimum(offs_b, B - 1), offs_b < B, cols)


@triton.jit
def _load(base, program, mask, N: tl.constexpr, W, TILE: tl.constexpr):
    """N tiles from rows of W values, the first at base; zero where masked and beyond H."""
    H: tl.constexpr = TILE.H
    ptrs = base + ((program.offs_b * W)[:, None] + program.cols[None, :])
    tiles = ()
    for n in tl.static_range(N):
        if mask is not None:
            inside = mask[:, None] & (program.cols < H)[None, :]
            tile = tl.load(ptrs + n * H, mask=inside, other=0.0)
        elif H < TILE.block_h:
            tile = tl.load(ptrs + n * H, mask=(program.cols < H)[None, :], other=0.0)
        else:
            tile = tl.load(ptrs + n * H)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def _store(base, program, mask, tiles, W: tl.constexpr, TILE: tl.constexpr):
    """Stores tiles into rows of W values, the first at base."""
    ptrs = base + ((program.offs_b * W)[:, None] + program.cols[None, :])
    inside = mask[:, None] & (program.cols < TILE.H)[None, :]
    for n in tl.static_range(len(tiles)):
        tl.store(ptrs + n * TILE.H, tiles[n].to(base.dtype.element_ty), mask=inside)


@triton.jit
def _first_row(layers, program, t):
    """The row of sequence 0 at time t."""
    if layers.starts is not None:
        return tl.load(layers.starts + t)
    else:
        # Of unsigned numbers of 32 bits the product of 64 is one instruction.
        return t.to(tl.uint32).to(tl.int64) * program.B.to(tl.uint32).to(tl.int64)


@triton.jit
def _row_mask(layers, program, origins):
    """The rows that may be read; None for all."""
    if layers.origins is not None:
        return is_present(layers, program, origins)
    else:
        return None


@triton.jit
def _load_ends(h_ptr, c_ptr, program, mask, TILE: tl.constexpr):
    """h_0 and c_0, or what is like them."""
    first = (program.d * program.B).to(tl.int64) * TILE.H
    state = _load(h_ptr + first, program, mask, 1, TILE.H, TILE)
    if c_ptr is not None:
        state = state + _load(c_ptr + first, program, mask, 1, TILE.H, TILE)
    return state


@triton.jit
def _store_ends(h_ptr, c_ptr, program, state, TILE: tl.constexpr):
    first = (program.d * program.B).to(tl.int64) * TILE.H
    _store(h_ptr + first, program, program.mask_b, (state[0],), TILE.H, TILE)
    if c_ptr is not None:
        _store(c_ptr + first, program, program.mask_b, (state[1],), TILE.H, TILE)


@triton.jit
def _load_gx(layers, program, step, CELL: tl.constexpr, TILE: tl.constexpr):
    """What a forward step reads: its tiles of gx, its origins, its first row.

    Behind the last step there is one more, to which the state just goes on.
    """
    G: tl.constexpr = len(CELL.gates)
    t = time_of(tl.minimum(step, program.T - 1), program)
    origins = load_origins(layers, program, t)
    row = _first_row(layers, program, t)
    base = layers.gx + (program.d.to(tl.int64) * program.R + row) * (G * TILE.H)
    gx = _load(base, program, _row_mask(layers, program, origins), G, G * TILE.H, TILE)
    if layers.origins is not None:
        origins = tl.where(step < program.T, origins, PREVIOUS)
    return gx, origins, row


@gluon.jit
def _load_bias(b_ptr, program, CELL: tl.constexpr, TILE: tl.constexpr):
    """``b[gate]``, rows ``[1, BLOCK_H]``, or nothing without a bias."""
    b = ()
    if b_ptr is not None:
        for g in tl.static_range(len(CELL.gates)):
            inside = program.cols < TILE.H
            row = tl.load(b_ptr + g * TILE.H + program.cols, mask=inside, other=0.0)
            b = b + (widen(row)[None, :],)
    return b


@gluon.jit
def _start(g: tl.constexpr, gx, b, CELL: tl.constexpr, TILE: tl.constexpr):
    """What the product of a gate is added to."""
    if CELL.merged[g]:
        return to_acc(gx[g] + b[g] if len(b) > 0 else gx[g], TILE)
    elif len(b) > 0:
        return to_acc(tl.where(gx[g] == gx[g], b[g], b[g]), TILE)
    else:
        return zero_acc(TILE)


@gluon.jit
def _forward_step(
    layers, program, step, w, b, state, now, ahead, read, write, inner,
    CELL: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """One step: its h comes from the buffer ``read``, the next one goes to ``write``."""
    D: tl.constexpr = TILE.D
    H: tl.constexpr = TILE.H
    S: tl.constexpr = len(CELL.saved)
    gx, origins, row = now
    _, origins_next, _ = ahead
    gx = widened(gx)
    later = _load_gx(layers, program, step + 2, CELL, TILE)
    entering = entering_state(layers, state, origins)
    gh = ()
    for p in tl.static_range(len(CELL.phases)):
        if p > 0:
            share(inner, CELL.operand(p, gx, gh, entering, squash, True))
        u = operand(read if p == 0 else inner, TILE)
        for i in tl.static_range(len(CELL.phases[p])):
            start = _start(CELL.phases[p][i], gx, b, CELL, TILE)
            gh = gh + (to_tile(multiply(w[CELL.phases[p][i]], u, start), TILE),)
    state, saved = CELL.forward(gx, gh, entering, squash, True)
    state = leaving_state(layers, state, entering, origins)
    share(write, entering_state(layers, state, origins_next)[0])

    result = visible(layers, state, origins)
    here = is_stored(layers, program, origins)
    d_row = program.d.to(tl.int64) * program.R + row
    _store(program.out + row * (D * H) + program.d * H, program, here, (result[0],), D * H, TILE)
    if layers.gates is not None:
        saved = visible(layers, saved, origins)
        _store(layers.gates + d_row * (S * H), program, here, saved, S * H, TILE)
    if layers.cs is not None:
        _store(layers.cs + d_row * H, program, here, (result[1],), H, TILE)
    return state, later


@gluon.jit(do_not_specialize=["T", "B", "R"])
def _resident_fwd_kernel(
    layers, T, B, R,
    CELL: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    program = _program(layers, T, B, R, TILE)
    d = program.d
    dtype: tl.constexpr = layers.h_0.dtype.element_ty
    w = load_weights(choose(layers.w_hh, d), False, CELL, TILE)
    b = _load_bias(choose(layers.b_hh, d), program, CELL, TILE)
    even, odd = shared_tiles(2, dtype, TILE)
    inner = even
    if len(CELL.phases) > 1:
        inner = shared_tiles(1, dtype, TILE)[0]

    state = widened(_load_ends(layers.h_0, layers.c_0, program, None, TILE))
    now = _load_gx(layers, program, 0, CELL, TILE)
    ahead = _load_gx(layers, program, 1, CELL, TILE)
    share(even, entering_state(layers, state, now[1])[0])
    for pair in range(T // 2):
        step = 2 * pair
        state, now = _forward_step(
            layers, program, step, w, b, state, now, ahead, even, odd, inner,
            CELL, TILE,
        )  # fmt: skip
        state, ahead = _forward_step(
            layers, program, step + 1, w, b, state, ahead, now, odd, even, inner,
            CELL, TILE,
        )  # fmt: skip
    if T % 2 == 1:
        state, now = _forward_step(
            layers, program, T - 1, w, b, state, now, ahead, even, odd, inner,
            CELL, TILE,
        )  # fmt: skip
    _store_ends(layers.h_n, layers.c_n, program, state, TILE)


@triton.jit
def _load_left(layers, program, t, TILE: tl.constexpr):
    """The state that left the step of time t; zero where it was skipped."""
    D: tl.constexpr = TILE.D
    H: tl.constexpr = TILE.H
    mask = _row_mask(layers, program, load_origins(layers, program, t))
    row = _first_row(layers, program, t)
    state = _load(program.out + row * (D * H) + program.d * H, program, mask, 1, D * H, TILE)
    if layers.cs is not None:
        d_row = program.d.to(tl.int64) * program.R + row
        state = state + _load(layers.cs + d_row * H, program, mask, 1, H, TILE)
    return state


@triton.jit
def _load_entered(layers, program, step, origins, TILE: tl.constexpr):
    """The state that entered a step, and the one that left the step before it."""
    D: tl.constexpr = TILE.D
    H: tl.constexpr = TILE.H
    t = time_of(tl.maximum(step - 1, 0), program)
    if layers.origins is not None:
        left = _load_left(layers, program, t, TILE)
        initial = _load_ends(layers.h_0, layers.c_0, program, origins == INITIAL, TILE)
        return where(origins == PREVIOUS, left, initial), left
    else:
        row = _first_row(layers, program, t)
        first = (program.d * program.B).to(tl.int64) * H
        h_rows = program.out + row * (D * H) + program.d * H
        h_rows = tl.where(step > 0, h_rows, layers.h_0 + first)
        W = H if D == 1 else tl.where(step > 0, D * H, H)
        state = _load(h_rows, program, None, 1, W, TILE)
        if layers.cs is not None:
            c_rows = layers.cs + (program.d.to(tl.int64) * program.R + row) * H
            c_rows = tl.where(step > 0, c_rows, layers.c_0 + first)
            state = state + _load(c_rows, program, None, 1, H, TILE)
        return state, state


@triton.jit
def _load_step(layers, grads, program, step, CELL: tl.constexpr, TILE: tl.constexpr):
    """What a backward step reads, in the dtype of the tensors."""
    D: tl.constexpr = TILE.D
    H: tl.constexpr = TILE.H
    S: tl.constexpr = len(CELL.saved)
    step = tl.maximum(step, 0)
    t = time_of(step, program)
    origins = load_origins(layers, program, t)
    mask = _row_mask(layers, program, origins)
    row = _first_row(layers, program, t)
    d_row = program.d.to(tl.int64) * program.R + row
    entered, left = _load_entered(layers, program, step, origins, TILE)
    saved, d_out, d_cs = (), (), ()
    if S > 0:
        saved = _load(layers.gates + d_row * (S * H), program, mask, S, S * H, TILE)
    if grads.out is not None:
        base = grads.out + row * (D * H) + program.d * H
        d_out = _load(base, program, mask, 1, D * H, TILE)
    if grads.cs is not None:
        d_cs = _load(grads.cs + d_row * H, program, mask, 1, H, TILE)
    return saved, entered, left, d_out, d_cs, origins, d_row


@triton.jit
def _sum(terms):
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
def _backward_step(
    layers, grads, program, step, w, d_state, left, now, buffers,
    CELL: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """One step: dgates go through the buffers, one for each gate."""
    H: tl.constexpr = TILE.H
    N: tl.constexpr = len(CELL.tiles)
    saved, entered, left_before, d_out, d_cs, origins, d_row = now
    saved, entered = widened(saved), widened(entered)
    later = _load_step(layers, grads, program, step - 2, CELL, TILE)
    if grads.out is not None:
        d_state = add_to(d_state, 0, widened(d_out)[0])
    if grads.cs is not None:
        d_state = add_to(d_state, 1, widened(d_cs)[0])
    d_leaving, carry = d_state, ()
    du = d_state[0]  # not read by the last phase
    here = is_stored(layers, program, origins)
    for p in tl.static_range(len(CELL.phases) - 1, -1, -1):
        dgates, d_state, carry = CELL.adjoint(p, d_state, du, saved, entered, left, carry, squash)
        dgates = visible(layers, dgates, origins)
        for i in tl.static_range(len(CELL.phases[p])):
            share(buffers[CELL.phases[p][i]], dgates[CELL.factors[p][i]])
        rows = grads.gates + d_row * (N * H) + CELL.grads[p][0] * H
        _store(rows, program, here, dgates, N * H, TILE)
        terms = ()
        for i in tl.static_range(len(CELL.phases[p])):
            u = operand(buffers[CELL.phases[p][i]], TILE)
            term = multiply(w[CELL.phases[p][i]], u, zero_acc(TILE))
            terms = terms + (term,)
        du = to_tile(_sum(terms), TILE)
    d_state = add_to(d_state, 0, du)
    return gradient_before(layers, d_state, d_leaving, origins), widened(left_before), later


@gluon.jit(do_not_specialize=["T", "B", "R"])
def _resident_bwd_kernel(
    layers, grads, T, B, R,
    CELL: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    G: tl.constexpr = len(CELL.gates)
    program = _program(layers, T, B, R, TILE)
    dtype: tl.constexpr = layers.h_0.dtype.element_ty
    w = load_weights(choose(layers.w_hh, program.d), True, CELL, TILE)
    even = shared_tiles(G, dtype, TILE)
    odd = shared_tiles(G, dtype, TILE)

    d_state = widened(_load_ends(grads.h_n, grads.c_n, program, None, TILE))
    left = widened(_load_left(layers, program, time_of(T - 1, program), TILE))
    now = _load_step(layers, grads, program, T - 1, CELL, TILE)
    ahead = _load_step(layers, grads, program, T - 2, CELL, TILE)
    for pair in range(T // 2):
        step = T - 1 - 2 * pair
        d_state, left, now = _backward_step(
            layers, grads, program, step, w, d_state, left, now, even, CELL, TILE
        )
        d_state, left, ahead = _backward_step(
            layers, grads, program, step - 1, w, d_state, left, ahead, odd,
            CELL, TILE,
        )  # fmt: skip
    if T % 2 == 1:
        d_state, left, now = _backward_step(
            layers, grads, program, 0, w, d_state, left, now, even, CELL, TILE
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
