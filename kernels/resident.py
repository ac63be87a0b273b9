"""Schedule *resident*: one program runs BLOCK_B sequences through all T steps.

W_hh is loaded once and stays on the chip, and so do h and c. A step reads only its input and
writes only its results. The input does not depend on h, so it is loaded one step ahead, while the
products run. Backward writes only the gradients of the pre-activations, ``dgates``; those of the
weights are library products over all steps at once.

The grid is ``(cdiv(B, BLOCK_B), D)``: both directions of a layer run side by side. No program waits
for another and no float is added atomically, so two runs agree bit for bit. T, B and R are
run-time values: no binary depends on them.

Limits: W_hh must fit one program (``plan.py``), H is padded to a power of two inside it, and a
launch runs one layer.
"""

import triton
import triton.language as tl

from . import steps, tiles
from .cells import CELLS
from .launch import run, tile_of
from .problem import Plan
from .rows import Rows
from .tensors import Grads, Layers


@triton.jit
def _part(layers, T, B, R, TILE: tl.constexpr):
    """The sequences and the direction of this program, and all hidden units."""
    first_b, rows = tl.program_id(0) * TILE.block_b, tl.arange(0, TILE.block_b)
    cols = tl.arange(0, TILE.block_h)
    return steps.part_of(layers, tl.program_id(1), first_b, rows, cols, T, B, R, TILE)


@triton.jit(do_not_specialize=["T", "B", "R"])
def _resident_fwd_kernel(layers, T, B, R, CELL: tl.constexpr, TILE: tl.constexpr):
    program = _part(layers, T, B, R, TILE)
    d, cols = program.d, program.cols

    w_hh = tiles.load_matrix(tiles.choose(layers.w_hh, d), cols, True, CELL, TILE)
    b_hh = tiles.load_bias(tiles.choose(layers.b_hh, d), cols, CELL, TILE.H)
    state = tiles.widened(steps.load_ends(layers.h_0, layers.c_0, program, TILE))
    places = (steps.place_of(layers, program, 0), steps.place_of(layers, program, 1))
    gx_next = steps.load_gx(layers, program, 0, places[0], CELL, TILE)

    for step in range(T):
        gx = tiles.widened(gx_next)
        gx_next = steps.load_gx(layers, program, step + 1, places[1], CELL, TILE)
        later = steps.place_of(layers, program, step + 2)

        origins = steps.origins_at(program, places[0])
        entering = tiles.entering_state(layers, state, origins)
        gh = ()
        for p in tl.static_range(len(CELL.phases)):
            u = CELL.operand(p, gh, entering)
            gh = gh + tiles.products(u, gx, w_hh, b_hh, CELL, p, TILE)
        state, saved = CELL.forward(gx, gh, entering)
        state = tiles.leaving_state(layers, state, entering, origins)

        steps.store_h(layers, program, step, places[0], state, TILE)
        steps.store_saved(layers, program, step, places[0], state, saved, CELL, TILE)
        places = (places[1], later)

    steps.store_ends(layers.h_n, layers.c_n, program, state, TILE)


@triton.jit(do_not_specialize=["T", "B", "R"])
def _resident_bwd_kernel(layers, grads, T, B, R, CELL: tl.constexpr, TILE: tl.constexpr):
    program = _part(layers, T, B, R, TILE)
    d, cols = program.d, program.cols

    w_hh = tiles.load_matrix(tiles.choose(layers.w_hh, d), cols, False, CELL, TILE)
    d_state = tiles.widened(steps.load_ends(grads.h_n, grads.c_n, program, TILE))
    places = (
        steps.place_of(layers, program, T - 1), steps.place_of(layers, program, T - 2),
        steps.place_of(layers, program, T - 3),
    )  # fmt: skip
    after = tiles.widened(steps.load_left(layers, program, T - 1, places[0], (), TILE))
    loaded = steps.load_step(layers, grads, program, T - 1, places, CELL, TILE)

    for back in range(T):
        step = T - 1 - back
        saved, left_before = tiles.widened(loaded[0]), tiles.widened(loaded[1])
        d_out, d_cs = tiles.widened(loaded[2]), tiles.widened(loaded[3])
        loaded = steps.load_step(layers, grads, program, step - 1, places[1:], CELL, TILE)

        origins = steps.origins_at(program, places[0])
        before = tiles.entering_state(layers, left_before, origins)
        d_leaving, carry = d_state, ()  # a step that is skipped adds nothing
        d_state = tiles.add_gradients(d_state, d_out, d_cs)
        du = tl.zeros_like(d_state[0])
        for p in tl.static_range(len(CELL.phases) - 1, -1, -1):
            dgates, d_state, carry = CELL.adjoint(p, d_state, du, saved, before, after, carry)
            steps.store_dgates(layers, grads, program, step, places[0], dgates, p, CELL, TILE)
            du = tiles.product_sum(dgates, w_hh, CELL, p, TILE)
        d_state = tiles.add_to(d_state, 0, du)
        d_state = tiles.gradient_before(layers, d_state, d_leaving, origins)
        after = left_before
        places = (places[1], places[2], steps.place_of(layers, program, step - 3))

    steps.store_ends(grads.h_0, grads.c_0, program, d_state, TILE)


def forward(cell: str, plan: Plan, layers: Layers, rows: Rows) -> None:
    """Runs one layer in all its directions: writes out, h_n, c_n and what is to be saved."""
    run(_resident_fwd_kernel, CELLS[cell], (layers,), rows, plan.forward, tile_of)


def backward(cell: str, plan: Plan, layers: Layers, grads: Grads, rows: Rows) -> None:
    """Runs the layer backwards: writes the gradients of its gates, h_0 and c_0."""
    run(_resident_bwd_kernel, CELLS[cell], (layers, grads), rows, plan.backward, tile_of)
