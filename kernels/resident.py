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

from .cells import CELLS
from .launch import layers_backward, layers_forward, run, tile_of
from .problem import Plan
from .rows import Rows
from .tensors import Grads, Layers
from .tiles import (
    Program,
    add_gradients,
    add_to,
    choose,
    entering_state,
    first_row,
    gradient_before,
    is_present,
    is_stored,
    leaving_state,
    load,
    load_bias,
    load_matrix,
    load_origins,
    load_state,
    load_state_after,
    load_step,
    product_sum,
    products,
    row_ptrs,
    store,
    store_h,
    store_saved,
    store_state,
    time_of,
    visible,
)


@triton.jit
def _program(layers, T, B, R, TILE: tl.constexpr):
    """The sequences and the direction of this program, and all hidden units."""
    d = tl.program_id(1).to(tl.int64)
    offs_b = tl.program_id(0).to(tl.int64) * TILE.block_b + tl.arange(0, TILE.block_b)
    cols = tl.arange(0, TILE.block_h)
    return Program(d, d, layers.out[0], T, B, R, offs_b, offs_b < B, cols)


@triton.jit
def _load_gx(layers, program, step, CELL: tl.constexpr, TILE: tl.constexpr):
    """The projected input of a step, a tile for each gate, and the step's origins."""
    G: tl.constexpr = len(CELL.gates)
    t = time_of(step, program)
    origins = load_origins(layers, program, t)
    here = is_present(layers, program, origins)
    row = program.d * program.R + first_row(layers, program, t)
    rows = row_ptrs(layers.gx, row, program, G * TILE.H)
    return load(rows, here, program.cols, G, TILE.H), origins


@triton.jit(do_not_specialize=["T", "B", "R"])
def _resident_fwd_kernel(layers, T, B, R, CELL: tl.constexpr, TILE: tl.constexpr):
    H: tl.constexpr = TILE.H
    program = _program(layers, T, B, R, TILE)
    d, cols = program.d, program.cols

    w_hh = load_matrix(choose(layers.w_hh, d), cols, True, CELL, TILE)
    b_hh = load_bias(choose(layers.b_hh, d), cols, CELL, H)
    state = load_state(layers.h_0, layers.c_0, program, program.mask_b, H)
    gx, origins = _load_gx(layers, program, 0, CELL, TILE)

    for step in range(T):
        gx_next, origins_next = _load_gx(layers, program, tl.minimum(step + 1, T - 1), CELL, TILE)

        entering = entering_state(layers, state, origins)
        gh = ()
        for p in tl.static_range(len(CELL.phases)):
            u = CELL.operand(p, gx, gh, entering)
            gh = gh + products(u, w_hh, b_hh, CELL, p, TILE)
        state, saved = CELL.forward(gx, gh, entering)
        state = leaving_state(layers, state, entering, origins)

        first = first_row(layers, program, time_of(step, program))
        store_h(layers, program, first, origins, state, TILE)
        store_saved(layers, program, first, origins, state, saved, CELL, TILE)
        gx, origins = gx_next, origins_next

    store_state(layers.h_n, layers.c_n, program, state, H)


@triton.jit(do_not_specialize=["T", "B", "R"])
def _resident_bwd_kernel(layers, grads, T, B, R, CELL: tl.constexpr, TILE: tl.constexpr):
    H: tl.constexpr = TILE.H
    N: tl.constexpr = len(CELL.tiles)
    program = _program(layers, T, B, R, TILE)
    d, cols = program.d, program.cols

    w_hh = load_matrix(choose(layers.w_hh, d), cols, False, CELL, TILE)
    d_state = load_state(grads.h_n, grads.c_n, program, program.mask_b, H)
    after = load_state_after(layers, program, time_of(T - 1, program), TILE)
    loaded = load_step(layers, grads, program, T - 1, CELL, TILE)

    for back in range(T):
        step = T - 1 - back
        loaded_next = load_step(layers, grads, program, tl.maximum(step - 1, 0), CELL, TILE)
        saved, before, after_previous, d_out, d_cs, origins = loaded

        d_state = add_gradients(d_state, d_out, d_cs)
        d_leaving, carry = d_state, ()
        du = tl.zeros_like(d_state[0])
        here = is_stored(layers, program, origins)
        first = d * R + first_row(layers, program, time_of(step, program))
        rows = row_ptrs(grads.gates, first, program, N * H)
        for p in tl.static_range(len(CELL.phases) - 1, -1, -1):
            dgates, d_state, carry = CELL.adjoint(p, d_state, du, saved, before, after, carry)
            dgates = visible(layers, dgates, origins)
            store(rows + CELL.grads[p][0] * H, here, cols, dgates, H)
            du = product_sum(dgates, w_hh, CELL, p, TILE)
        d_state = add_to(d_state, 0, du)
        d_state = gradient_before(layers, d_state, d_leaving, origins)
        after, loaded = after_previous, loaded_next

    store_state(grads.h_0, grads.c_0, program, d_state, H)


def forward(cell: str, plan: Plan, layers: Layers, rows: Rows) -> None:
    """Runs one layer in all its directions: writes out, h_n, c_n and what is to be saved."""
    tensors = (layers_forward(layers),)
    run(_resident_fwd_kernel, CELLS[cell], tensors, rows, plan.forward, tile_of)


def backward(cell: str, plan: Plan, layers: Layers, grads: Grads, rows: Rows) -> None:
    """Runs the layer backwards: writes the gradients of its gates, h_0 and c_0."""
    tensors = layers_backward(layers), grads
    run(_resident_bwd_kernel, CELLS[cell], tensors, rows, plan.backward, tile_of)
