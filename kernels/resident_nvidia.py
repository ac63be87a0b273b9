"""Schedule *resident* for NVIDIA: W_hh in registers, and one barrier a step (Gluon).

The recurrence, the cells and the rules for rows are those of ``resident.py``; ``mma.py`` makes the
products. In forward, h changes hands through one of two shared buffers: a step reads the one that
the step before has written, so that the barrier between them is the only one. Backward does the
same with dgates. The loop over time makes two steps a turn, one with each buffer.

Limits: tensors of 16 bits, or fp32 with tf32 products; W_hh must fit the registers (``plan.py``);
H is padded to a power of two of at least 16, whose units beyond H are the first ones again: they
compute the same, and store it to the same places. Products have the next multiple of 16 columns.
"""

import triton.language as tl
from triton.experimental import gluon

from . import mma, steps, tiles
from .cells import CELLS, Cell
from .launch import run, sizes_of
from .problem import Plan, Tiles
from .rows import Rows
from .tensors import Grads, Layers

#: Steps in one turn of the loop over time.
STEPS = 2


@gluon.jit
def _program(layers, T, B, R, TILE: tl.constexpr):
    """The sequences and the direction of this program."""
    d = tl.program_id(1) * (TILE.D - 1)  # of a single direction a constant
    first_b = tl.program_id(0) * TILE.block_b
    rows, cols = mma.sequences(TILE), mma.units(TILE)
    return steps.part_of(layers, d, first_b, rows, cols, T, B, R, TILE, True)


@gluon.jit
def _entering(layers, state, origins):
    """``tiles.entering_state``, or backward the gradient behind it."""
    return mma.zero_where(origins == tiles.ZERO, state) if layers.origins is not None else state


@gluon.jit
def _carried(layers, state, before, origins, following):
    """The state that a step leaves to the next one, given what it computed and what it had before.

    A step that is skipped leaves what it had; where a sequence begins behind it, that is zero.
    ``following`` are the origins of the step behind it, of a gradient its own. The second choice
    alone depends on what the step computed.
    """
    if layers.origins is not None:
        there = origins != tiles.SKIPPED
        before = tiles.zero_where(there, before)
        return tiles.where(there & (following != tiles.ZERO), state, before)
    else:
        return state


@gluon.jit
def _forward_step(
    layers, program, step, weights, state, gx, places, read, write, inner,
    CELL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One step: its h comes from the buffer ``read``, the next one goes to ``write``.

    ``places`` are those of this step and the next two. Returns the state that enters the next step,
    and gx and places for the step after that.
    """
    w, b = weights
    origins = steps.origins_at(program, places[0])
    gx = mma.widened(gx)
    entering, gh = state, ()
    for p in tl.static_range(len(CELL.phases)):
        if p > 0:
            mma.share(inner, CELL.operand(p, gh, entering, mma.squash))
        u = mma.operand(read if p == 0 else inner, TILE)
        for i in tl.static_range(len(CELL.phases[p])):
            start = mma.start_of(CELL.phases[p][i], gx, b, CELL, TILE)
            gh = gh + (mma.to_tile(mma.multiply(w[CELL.phases[p][i]], u, start), TILE),)
    result, saved = CELL.forward(gx, gh, entering, mma.squash)
    following = steps.origins_at(program, places[1])
    if layers.origins is not None:  # behind the last step no sequence begins
        following = tl.where(step + 1 < program.T, following, tiles.PREVIOUS)
    state = _carried(layers, result, entering, origins, following)
    mma.share(write, state[0])

    # Behind the exchange, which the next step waits for.
    gx_later = steps.load_gx(layers, program, step + 2, places[2], CELL, TILE)
    later = (places[1], places[2], steps.place_of(layers, program, step + 3))
    steps.store_h(layers, program, step, places[0], result, TILE)
    steps.store_saved(layers, program, step, places[0], result, saved, CELL, TILE)
    return state, gx_later, later


@gluon.jit(do_not_specialize=["T", "B", "R"])
def _resident_fwd_kernel(layers, T, B, R, CELL: tl.constexpr, TILE: tl.constexpr):
    program = _program(layers, T, B, R, TILE)
    dtype: tl.constexpr = layers.h_0.dtype.element_ty
    w = mma.load_weights(tiles.choose(layers.w_hh, program.d), False, CELL, TILE)
    weights = (w, mma.load_bias(tiles.choose(layers.b_hh, program.d), program.cols, CELL, TILE))
    even, odd, inner = mma.shared_tiles(3 if len(CELL.phases) > 1 else 2, 3, dtype, TILE)

    places = steps.place_of(layers, program, 0), steps.place_of(layers, program, 1)
    places = places + (steps.place_of(layers, program, 2),)
    gx = steps.load_gx(layers, program, 0, places[0], CELL, TILE)
    gx_odd = steps.load_gx(layers, program, 1, places[1], CELL, TILE)
    state = mma.widened(steps.load_ends(layers.h_0, layers.c_0, program, TILE))
    state = _entering(layers, state, steps.origins_at(program, places[0]))
    mma.share(even, state[0])
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
    steps.store_ends(layers.h_n, layers.c_n, program, state, TILE)


@gluon.jit
def _backward_step(
    layers, grads, program, step, w, d_state, left, loaded, places, buffers,
    CELL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One step: dgates go through the buffers, one for each gate.

    ``loaded`` is what this step reads, and unless the registers are full the next one, and
    ``places`` are those of these and two more, in time. Returns the gradient of the state that
    entered, the state that left the step before, and ``loaded`` and ``places`` of that step.
    """
    AHEAD: tl.constexpr = len(loaded)
    saved, left_before = mma.widened(loaded[0][0]), mma.widened(loaded[0][1])
    d_out, d_cs = loaded[0][2], loaded[0][3]
    origins = steps.origins_at(program, places[0])
    new_place = steps.place_of(layers, program, step - AHEAD - 2)
    before = _entering(layers, left_before, origins)
    d_leaving, carry = d_state, ()  # a step that is skipped adds nothing
    d_state = tiles.add_gradients(d_state, mma.widened(d_out), mma.widened(d_cs))
    du = d_state[0]  # not read by the last phase
    for p in tl.static_range(len(CELL.phases) - 1, -1, -1):
        dgates, d_state, carry = CELL.adjoint(
            p, d_state, du, saved, before, left, carry, mma.squash
        )
        for i in tl.static_range(len(CELL.phases[p])):
            mma.share(buffers[CELL.phases[p][i]], dgates[CELL.factors[p][i]])
        if p == 0:  # what this step has loaded is used by now
            later = steps.load_step(
                layers, grads, program, step - AHEAD, places[AHEAD:], CELL, TILE
            )
        terms = ()
        for i in tl.static_range(len(CELL.phases[p])):
            u = mma.operand(buffers[CELL.phases[p][i]], TILE)
            term = mma.multiply(w[CELL.phases[p][i]], u, mma.zero_acc(TILE))
            terms = terms + (term,)
        du = mma.to_tile(mma.sum_of(terms), TILE)
        steps.store_dgates(layers, grads, program, step, places[0], dgates, p, CELL, TILE)
    d_state = tiles.add_to(d_state, 0, du)
    d_state = _carried(layers, d_state, d_leaving, origins, origins)
    return d_state, left_before, loaded[1:] + (later,), places[1:] + (new_place,)


@gluon.jit(do_not_specialize=["T", "B", "R"])
def _resident_bwd_kernel(layers, grads, T, B, R, CELL: tl.constexpr, TILE: tl.constexpr):
    G: tl.constexpr = len(CELL.gates)
    program = _program(layers, T, B, R, TILE)
    dtype: tl.constexpr = layers.h_0.dtype.element_ty
    w = mma.load_weights(tiles.choose(layers.w_hh, program.d), True, CELL, TILE)
    even, odd = mma.shared_tiles(G, G, dtype, TILE), mma.shared_tiles(G, G, dtype, TILE)

    places = ()
    for n in tl.static_range(3 if TILE.is_full else 4):
        places = places + (steps.place_of(layers, program, T - 1 - n),)
    d_state = mma.widened(steps.load_ends(grads.h_n, grads.c_n, program, TILE))
    left = mma.widened(steps.load_left(layers, program, T - 1, places[0], (), TILE))
    loaded = ()
    for n in tl.static_range(1 if TILE.is_full else 2):
        loaded = loaded + (
            steps.load_step(layers, grads, program, T - 1 - n, places[n:], CELL, TILE),
        )
    for pair in range(T // 2):
        step = T - 1 - 2 * pair
        d_state, left, loaded, places = _backward_step(
            layers, grads, program, step, w, d_state, left, loaded, places, even, CELL, TILE
        )
        d_state, left, loaded, places = _backward_step(
            layers, grads, program, step - 1, w, d_state, left, loaded, places, odd, CELL, TILE
        )
    if T % 2 == 1:
        d_state, left, loaded, places = _backward_step(
            layers, grads, program, 0, w, d_state, left, loaded, places, even, CELL, TILE
        )
    steps.store_ends(grads.h_0, grads.c_0, program, d_state, TILE)


def _tile_of(cell: Cell, layers: Layers, tiles: Tiles) -> mma.Tile:
    """The argument TILE of a kernel."""
    itemsize = layers.h_0.element_size()
    return mma.tile_of(*sizes_of(layers, tiles)[1:], tiles.num_warps, itemsize)


def forward(cell: str, plan: Plan, layers: Layers, rows: Rows) -> None:
    """Runs one layer in all its directions: writes out, h_n, c_n and what is to be saved."""
    run(_resident_fwd_kernel, CELLS[cell], (layers,), rows, plan.forward, _tile_of)


def backward(cell: str, plan: Plan, layers: Layers, grads: Grads, rows: Rows) -> None:
    """Runs the layer backwards: writes the gradients of its gates, h_0 and c_0."""
    run(_resident_bwd_kernel, CELLS[cell], (layers, grads), rows, plan.backward, _tile_of)
