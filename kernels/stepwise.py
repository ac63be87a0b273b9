"""Schedule *stepwise*: each step is a library GEMM and one fused elementwise launch.

The simplest schedule, and the one that takes any H, batch and dtype, fp64 included. A program owns
BLOCK_B sequences times BLOCK_H units of one direction for one step; the host runs the loop over T.
The grid is ``(cdiv(B, BLOCK_B), cdiv(H, BLOCK_H), D)``.

A step has a product for each phase of the cell, and a launch after each product. The launch makes
the operand of the next phase, or after the last one the new state, which is the operand of the next
step. One more launch before the first step makes the operand of h_0. Backward is the mirror image:
a launch makes the ``dgates`` of a phase, the product that follows makes the gradient of the phase's
operand, and the first launch of the step before adds it to the gradient of h; one more launch does
so for h_0. What an earlier launch of the step had in registers is computed again: beside the loads
the arithmetic is free.

h, c and their gradients are carried from step to step in fp32 (fp64 in fp64). What a product reads
or writes has the dtype of the tensors. W_hh is read in every step, so the schedule is slow wherever
another one fits. The products in fp32 are as exact as torch's switch for them; the caller sets it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .cells import CELLS
from .launch import cdiv, layers_backward, on_device, options_of, tile_of
from .problem import Plan, Tiles
from .rows import Rows
from .spec import SPECS, runs_of
from .tensors import Grads, Layers
from .tiles import (
    SKIPPED,
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
    load_origins,
    load_state,
    load_state_after,
    load_step,
    row_ptrs,
    store,
    store_h,
    store_saved,
    store_state,
    time_of,
    visible,
)


class Carried(NamedTuple):
    """The tensors that one launch or product leaves to the next."""

    h: Any  # [D, B, H] in fp32 or fp64: the state, backward its gradient
    c: Any  # the same; None if the cell has no c
    u: Any  # [D, B, H]: the operand of the next product; backward [P, D, B, H], their gradients
    gh: Any  # [D, B, G*H]: the products of the step; None backward


@triton.jit
def _program(layers, T, B, R, TILE: tl.constexpr):
    """The sequences, units and direction of this program."""
    d = tl.program_id(2).to(tl.int64)
    offs_b = tl.program_id(0).to(tl.int64) * TILE.block_b + tl.arange(0, TILE.block_b)
    cols = tl.program_id(1) * TILE.block_h + tl.arange(0, TILE.block_h)
    return Program(d, d, layers.out[0], T, B, R, offs_b, offs_b < B, cols)


@triton.jit(do_not_specialize=["step", "T", "B", "R"])
def _stepwise_fwd_kernel(
    layers, carried, step, T, B, R, CELL: tl.constexpr, PHASE: tl.constexpr, TILE: tl.constexpr
):
    """Makes the operand of PHASE; after the last one (PHASE == P) the new state and the next u."""
    H: tl.constexpr = TILE.H
    G: tl.constexpr = len(CELL.gates)
    P: tl.constexpr = len(CELL.phases)
    program = _program(layers, T, B, R, TILE)
    d, mask_b, cols = program.d, program.mask_b, program.cols
    state = load_state(carried.h, carried.c, program, mask_b, H)
    t = time_of(step, program)
    origins = load_origins(layers, program, t)
    entering = entering_state(layers, state, origins)
    u = entering[0]

    if PHASE > 0:
        READY: tl.constexpr = CELL.phases[PHASE - 1][-1] + 1  # gates whose products are made
        first = first_row(layers, program, t)
        row = d * R + first
        here = is_present(layers, program, origins)
        gx = load(row_ptrs(layers.gx, row, program, G * H), here, cols, G, H)
        made = load(row_ptrs(carried.gh, d * B, program, G * H), mask_b, cols, READY, H)
        bias = load_bias(choose(layers.b_hh, d), cols, CELL, H)
        gh = ()
        for g in tl.static_range(READY):
            gh = gh + (made[g] + bias[g],)
        if PHASE < P:
            u = CELL.operand(PHASE, gx, gh, entering)
        else:
            state, saved = CELL.forward(gx, gh, entering)
            state = leaving_state(layers, state, entering, origins)
            store_state(carried.h, carried.c, program, state, H)
            store_h(layers, program, first, origins, state, TILE)
            store_saved(layers, program, first, origins, state, saved, CELL, TILE)
            following = time_of(tl.minimum(step + 1, T - 1), program)
            origins = load_origins(layers, program, following)
            u = entering_state(layers, state, origins)[0]
    store(row_ptrs(carried.u, d * B, program, H), mask_b, cols, (u,), H)


@triton.jit(do_not_specialize=["step", "T", "B", "R"])
def _stepwise_bwd_kernel(
    layers, grads, carried, step, T, B, R,
    CELL: tl.constexpr, PHASE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Makes the dgates of PHASE; with PHASE -1, before the first step, the gradient of h_0."""
    H: tl.constexpr = TILE.H
    N: tl.constexpr = len(CELL.tiles)
    P: tl.constexpr = len(CELL.phases)
    program = _program(layers, T, B, R, TILE)
    d, mask_b, cols = program.d, program.mask_b, program.cols

    # The product of the later step's phase 0. After the last step there is none, and u is zero.
    d_state = load_state(carried.h, carried.c, program, mask_b, H)
    du = load(row_ptrs(carried.u, d * B, program, H), mask_b, cols, 1, H)[0]
    origins = load_origins(layers, program, time_of(tl.minimum(step + 1, T - 1), program))
    if layers.origins is not None:
        origins = tl.where(step < T - 1, origins, SKIPPED)
    d_state = gradient_before(layers, add_to(d_state, 0, du), d_state, origins)

    if PHASE >= 0:
        t = time_of(step, program)
        saved, before, _, d_out, d_cs, origins = load_step(layers, grads, program, step, CELL, TILE)
        after = load_state_after(layers, program, t, TILE)
        d_state = add_gradients(d_state, d_out, d_cs)
        d_leaving, carry = d_state, ()
        for p in tl.static_range(P - 1, PHASE - 1, -1):
            if p < P - 1:
                du_rows = row_ptrs(carried.u, ((p + 1) * TILE.D + d) * B, program, H)
                du = load(du_rows, mask_b, cols, 1, H)[0]
            dgates, d_state, carry = CELL.adjoint(p, d_state, du, saved, before, after, carry)
        # A skipped step leaves the gradient as it was.
        d_state = leaving_state(layers, d_state, d_leaving, origins)
        dgates_rows = row_ptrs(grads.gates, d * R + first_row(layers, program, t), program, N * H)
        here, dgates = is_stored(layers, program, origins), visible(layers, dgates, origins)
        store(dgates_rows + CELL.grads[PHASE][0] * H, here, cols, dgates, H)

    if PHASE <= 0:
        store_state(carried.h, carried.c, program, d_state, H)


def forward(cell: str, plan: Plan, layers: Layers, rows: Rows) -> None:
    """Runs one layer in all its directions: writes out, h_n, c_n and what is to be saved."""
    D, B, H = layers.h_0.shape
    spec, like = SPECS[cell], layers.h_0
    u, gh = like.new_empty(D, B, H), like.new_empty(D, B, spec.gates * H)
    carried = Carried(_carry(layers.h_0, layers.h_n), _carry(layers.c_0, layers.c_n), u, gh)
    read = layers._replace(w_ih=None, b_ih=None, w_hh=None, masks=None)
    launch = _launcher(_stepwise_fwd_kernel, cell, (read, carried), rows, plan.forward)
    units = [slice(gates[0] * H, (gates[-1] + 1) * H) for gates in spec.phases]
    products = [
        [(u[d], w_hh[of].mT, gh[d, :, of]) for d, w_hh in enumerate(layers.w_hh)] for of in units
    ]
    with on_device(like):
        launch(0, 0)
        for step in range(rows.T):
            for phase, factors in enumerate(products):
                for operand, w_hh, result in factors:
                    torch.mm(operand, w_hh, out=result)
                launch(phase + 1, step)
        _end(carried.h, layers.h_n)
        _end(carried.c, layers.c_n)


def backward(cell: str, plan: Plan, layers: Layers, grads: Grads, rows: Rows) -> None:
    """Runs the layer backwards: writes the gradients of its gates, h_0 and c_0."""
    D, B, H = layers.h_0.shape
    spec, like = SPECS[cell], layers.h_0
    du = like.new_zeros(len(spec.phases), D, B, H)
    carried = Carried(_carry(grads.h_n, grads.h_0), _carry(grads.c_n, grads.c_0), du, None)
    read = layers_backward(layers)._replace(w_hh=None)
    launch = _launcher(_stepwise_bwd_kernel, cell, (read, grads, carried), rows, plan.backward)
    runs = [list(runs_of(gates, spec.recurrent)) for gates in spec.phases]
    spans = rows.spans()
    with on_device(like):
        for step in reversed(range(rows.T)):
            for phase in reversed(range(len(runs))):
                launch(phase, step)
                for d, w_hh in enumerate(layers.w_hh):
                    of_step = grads.gates[d, spans[step if d == 0 else rows.T - 1 - step]]
                    total = du[phase, d, : len(of_step)]
                    for i, (gate, first, count) in enumerate(runs[phase]):
                        dgates = of_step[:, first * H : (first + count) * H]
                        factor = w_hh[gate * H : (gate + count) * H]
                        torch.addmm(total, dgates, factor, beta=float(i > 0), out=total)
        launch(-1, -1)
        _end(carried.h, grads.h_0)
        _end(carried.c, grads.c_0)


def _launcher(
    kernel: Any, cell: str, tensors: tuple, rows: Rows, tiles: Tiles | None
) -> Callable[[int, int], None]:
    """Makes the function that launches a phase of a step."""
    assert tiles is not None, "the plan has no backward"
    tile, options = tile_of(CELLS[cell], tensors[0], tiles), options_of(tiles)
    D, B, H = tensors[0].h_0.shape
    grid = cdiv(B, tile.block_b), cdiv(H, tile.block_h), D

    def launch(phase: int, step: int) -> None:
        kernel[grid](*tensors, step, rows.T, B, rows.total, CELLS[cell], phase, tile, **options)

    return launch


def _carry(start: torch.Tensor | None, end: torch.Tensor | None) -> torch.Tensor | None:
    """A copy of ``start`` that steps update: in ``end``, or in fp32 if that has 16 bits."""
    if start is None or end is None:
        return None
    carried = end if end.dtype.itemsize > 2 else torch.empty_like(end, dtype=torch.float32)
    return carried.copy_(start)


def _end(carried: torch.Tensor | None, end: torch.Tensor | None) -> None:
    """Rounds what was carried into where it belongs."""
    if carried is not None and end is not None and carried is not end:
        end.copy_(carried)
