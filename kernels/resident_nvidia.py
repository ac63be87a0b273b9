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
def _carried(layers, state, before, origins, BACKWARD: tl.constexpr):
    """``tiles.leaving_state``, or backward ``tiles.gradient_before``.

    The second choice alone depends on what the step computed.
    """
    if layers.origins is not None:
        is_there = origins != tiles.SKIPPED
        if BACKWARD:
            before = tiles.zero_where(is_there, before)
            is_there = is_there & (origins != tiles.ZERO)
        return tiles.where(is_there, state, before)
    else:
        return state


@gluon.jit
def _load_forward(
    layers, program, step, places, N: tl.constexpr, CELL: tl.constexpr, TILE: tl.constexpr
):
    """Loads gx of N steps, whose places are given, and the places of those behind them.

    All that a turn loads is issued at one place, for the compiler counts it with one scoreboard:
    the wait for any of it is for the latest.
    """
    gx, known, later = (), (), ()
    for n in tl.static_range(N):  # full registers have no room for rows
        known = known + (places[n] if len(CELL.gates) > 1 else steps.located(program, places[n]),)
        gx = gx + (steps.load_gx(layers, program, step + n, known[n], CELL, TILE),)
        later = later + (steps.place_of(layers, program, step + N + n),)
    return gx, known + later


@gluon.jit
def _forward_step(
    layers, program, step, weights, state, loaded, places, buffers,
    N: tl.constexpr, CELL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Step N of a turn: its h comes from the first of ``buffers``, the next goes to the second.

    ``loaded`` and ``places`` are those from this step on. Returns the state that leaves the step,
    and ``loaded`` and ``places`` of the next one.
    """
    w, b = weights
    read, write, inner = buffers
    gx = mma.widened(loaded[0], TILE.rows == TILE.block_h)
    origins = steps.origins_at(program, places[0])
    entering, gh = _entering(layers, state, origins), ()
    gx_later, places_later = (), ()
    for p in tl.static_range(len(CELL.phases)):
        if p > 0:
            mma.share(inner, CELL.operand(p, gh, entering, mma.squash))
        u = mma.operand(read if p == 0 else inner, TILE)
        for i in tl.static_range(len(CELL.phases[p])):
            start = mma.start_of(CELL.phases[p][i], gx, b, CELL, TILE)
            gh = gh + (mma.to_tile(mma.multiply(w[CELL.phases[p][i]], u, start), TILE),)
    if len(CELL.gates) == 1 and N == 0:
        gx_later, places_later = _load_forward(layers, program, step + 2, places[2:], 2, CELL, TILE)
    result, saved = CELL.forward(gx, gh, entering, mma.squash)
    state = _carried(layers, result, state, origins, False)
    mma.share(write, _entering(layers, (state[0],), steps.origins_at(program, places[1]))[0])

    # Behind the exchange, which the next step waits for.
    if len(CELL.gates) > 1:
        gx_later, places_later = _load_forward(layers, program, step + 2, places[2:], 1, CELL, TILE)
    steps.store_h(layers, program, step, places[0], result, TILE)
    steps.store_saved(layers, program, step, places[0], result, saved, CELL, TILE)
    if len(gx_later) > 0:
        places = places[:2] + places_later
    return state, loaded[1:] + gx_later, places[1:]


@gluon.jit(do_not_specialize=["T", "B", "R"])
def _resident_fwd_kernel(layers, T, B, R, CELL: tl.constexpr, TILE: tl.constexpr):
    program = _program(layers, T, B, R, TILE)
    dtype: tl.constexpr = layers.h_0.dtype.element_ty
    w = mma.load_weights(tiles.choose(layers.w_hh, program.d), False, CELL, TILE)
    weights = (w, mma.load_bias(tiles.choose(layers.b_hh, program.d), program.cols, CELL, TILE))
    even, odd, inner = mma.shared_tiles(3 if len(CELL.phases) > 1 else 2, 3, dtype, TILE)
    buffers, swapped = (even, odd, inner), (odd, even, inner)

    places = steps.place_of(layers, program, 0), steps.place_of(layers, program, 1)
    loaded, places = _load_forward(layers, program, 0, places, 2, CELL, TILE)
    if len(CELL.gates) > 1:
        places = places[:3]
    state = mma.widened(steps.load_ends(layers.h_0, layers.c_0, program, TILE))
    mma.share(even, _entering(layers, state, steps.origins_at(program, places[0]))[0])
    for pair in range(T // 2):
        step = 2 * pair
        state, loaded, places = _forward_step(
            layers, program, step, weights, state, loaded, places, buffers, 0, CELL, TILE
        )
        state, loaded, places = _forward_step(
            layers, program, step + 1, weights, state, loaded, places, swapped, 1, CELL, TILE
        )
    if T % 2 == 1:
        state = _forward_step(
            layers, program, T - 1, weights, state, loaded, places, buffers, 0, CELL, TILE
        )[0]
    steps.store_ends(layers.h_n, layers.c_n, program, state, TILE)


@gluon.jit
def _load_backward(
    layers, grads, program, step, places, N: tl.constexpr, CELL: tl.constexpr, TILE: tl.constexpr
):
    """Loads what N steps read, whose places are given with one more; returns it and the places."""
    known, loaded = (), ()
    for n in tl.static_range(N + 1):  # full registers have no room for rows
        place = places[n] if TILE.is_full else steps.located(program, places[n])
        known = known + (place,)
    for n in tl.static_range(N):
        read = steps.load_step(layers, grads, program, step - n, known[n:], CELL, TILE)
        loaded = loaded + (read,)
    return loaded, known


@gluon.jit
def _backward_step(
    layers, grads, program, step, w, states, loaded, places, buffers,
    N: tl.constexpr, CELL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Step N of a turn: dgates go through the buffers, one for each gate.

    ``loaded`` and ``places`` are what ``_load_backward`` returned, from this step on: of the turn,
    or where the registers are full of a single step. Returns the gradient of the state that
    entered, the state that left the step before, and ``loaded`` and ``places`` of that step.
    """
    d_state, left = states
    AHEAD: tl.constexpr = 1 if TILE.is_full else 2
    IS_FREE: tl.constexpr = layers.origins is not None and TILE.block_b == 8  # of registers
    AT_ONCE: tl.constexpr = AHEAD if len(CELL.gates) == 1 or IS_FREE else 1
    STARTS: tl.constexpr = (
        len(CELL.gates) == 1 and not TILE.is_full
    )  # the product from the gradient
    saved, left_before = mma.widened(loaded[0][0]), mma.widened(loaded[0][1])
    d_out, d_cs = loaded[0][2], loaded[0][3]
    origins = steps.origins_at(program, places[0])
    later_places = ()
    for n in tl.static_range(AT_ONCE if N % AT_ONCE == 0 else 0):
        place = steps.place_of(layers, program, step - AHEAD - AT_ONCE - 1 - n)
        later_places = later_places + (place,)
    before = _entering(layers, left_before, origins)
    d_leaving, carry = d_state, ()  # a step that is skipped adds nothing
    d_state = tiles.add_gradients(d_state, mma.widened(d_out), mma.widened(d_cs))
    du = d_state[0]  # not read by the last phase
    places_after = places[1:]
    for p in tl.static_range(len(CELL.phases) - 1, -1, -1):
        dgates, d_state, carry = CELL.adjoint(
            p, d_state, du, saved, before, left, carry, mma.squash
        )
        for i in tl.static_range(len(CELL.phases[p])):
            mma.share(buffers[CELL.phases[p][i]], dgates[CELL.factors[p][i]])
        if p == 0 and N % AT_ONCE == 0:  # what this step has loaded is used by now
            later, known = _load_backward(
                layers, grads, program, step - AHEAD, places[AHEAD:], AT_ONCE, CELL, TILE
            )
            loaded, places_after = loaded + later, places[1:AHEAD] + known + later_places
        terms = ()
        for i in tl.static_range(len(CELL.phases[p])):
            u = mma.operand(buffers[CELL.phases[p][i]], TILE)
            start = mma.to_acc(d_state[0], TILE) if STARTS else mma.zero_acc(TILE)
            term = mma.multiply(w[CELL.phases[p][i]], u, start)
            terms = terms + (term,)
        du = mma.to_tile(mma.sum_of(terms), TILE)
        steps.store_dgates(layers, grads, program, step, places[0], dgates, p, CELL, TILE)
    d_state = (du,) if STARTS else tiles.add_to(d_state, 0, du)
    d_state = _carried(layers, d_state, d_leaving, origins, True)
    return (d_state, left_before), loaded[1:], places_after


@gluon.jit(do_not_specialize=["T", "B", "R"])
def _resident_bwd_kernel(layers, grads, T, B, R, CELL: tl.constexpr, TILE: tl.constexpr):
    G: tl.constexpr = len(CELL.gates)
    AHEAD: tl.constexpr = 1 if TILE.is_full else 2
    program = _program(layers, T, B, R, TILE)
    dtype: tl.constexpr = layers.h_0.dtype.element_ty
    w = mma.load_weights(tiles.choose(layers.w_hh, program.d), True, CELL, TILE)
    even, odd = mma.shared_tiles(G, G, dtype, TILE), mma.shared_tiles(G, G, dtype, TILE)

    places = ()
    IS_FREE: tl.constexpr = layers.origins is not None and TILE.block_b == 8
    AT_ONCE: tl.constexpr = AHEAD if G == 1 or IS_FREE else 1
    for n in tl.static_range(AHEAD + 1 + AT_ONCE):
        places = places + (steps.place_of(layers, program, T - 1 - n),)
    d_state = mma.widened(steps.load_ends(grads.h_n, grads.c_n, program, TILE))
    left = mma.widened(steps.load_left(layers, program, T - 1, places[0], (), TILE))
    loaded, known = _load_backward(layers, grads, program, T - 1, places, AHEAD, CELL, TILE)
    places = known + places[AHEAD + 1 :]
    states = d_state, left
    for pair in range(T // 2):
        step = T - 1 - 2 * pair
        states, loaded, places = _backward_step(
            layers, grads, program, step, w, states, loaded, places, even, 0, CELL, TILE
        )
        states, loaded, places = _backward_step(
            layers, grads, program, step - 1, w, states, loaded, places, odd, 1, CELL, TILE
        )
    if T % 2 == 1:
        states = _backward_step(
            layers, grads, program, 0, w, states, loaded, places, even, 0, CELL, TILE
        )[0]
    steps.store_ends(grads.h_0, grads.c_0, program, states[0], TILE)


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
