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

from . import steps, tiles
from .cells import CELLS
from .launch import cdiv, on_device, options_of, tile_of
from .problem import Plan, Tiles
from .rows import Rows
from .spec import SPECS, runs_of
from .tensors import Grads, Layers
from .tiles import SKIPPED


class Carried(NamedTuple):
    """The tensors that one launch or product leaves to the next."""

    h: Any  # [D, B, H] in fp32 or fp64: the state, backward its gradient
    c: Any  # the same; None if the cell has no c
    u: Any  # [D, B, H]: the operand of the next product; backward [P, D, B, H], their gradients
    gh: Any  # [D, B, G*H]: the products of the step; None backward


@triton.jit
def _part(layers, T, B, R, TILE: tl.constexpr):
    """The sequences, units and direction of this program."""
    first_b, rows = tl.program_id(0) * TILE.block_b, tl.arange(0, TILE.block_b)
    cols = tl.program_id(1) * TILE.block_h + tl.arange(0, TILE.block_h)
    return steps.part_of(layers, tl.program_id(2), first_b, rows, cols, T, B, R, TILE)


@triton.jit(do_not_specialize=["step", "T", "B", "R"])
def _stepwise_fwd_kernel(
    layers, carried, step, T, B, R, CELL: tl.constexpr, PHASE: tl.constexpr, TILE: tl.constexpr
):
    """Makes the operand of PHASE; after the last one (PHASE == P) the new state and the next u."""
    H: tl.constexpr = TILE.H
    G: tl.constexpr = len(CELL.gates)
    program = _part(layers, T, B, R, TILE)
    rows = program.d.to(tl.int64) * B, program.offs_b  # of what is carried
    state = steps.load_ends(carried.h, carried.c, program, TILE)
    place = steps.place_of(layers, program, step)
    origins = steps.origins_at(program, place)
    entering = tiles.entering_state(layers, state, origins)
    u = entering[0]

    if PHASE > 0:
        READY: tl.constexpr = CELL.phases[PHASE - 1][-1] + 1  # gates whose products are made
        gx = tiles.widened(steps.load_gx(layers, program, step, place, CELL, TILE))
        made = steps.load(carried.gh, program, rows, (), READY, G * H, TILE)
        bias = tiles.load_bias(tiles.choose(layers.b_hh, program.d), program.cols, CELL, H)
        gh = ()
        for g in tl.static_range(READY):
            total = tiles.widened(made)[g] + bias[g]
            gh = gh + (total + gx[g] if CELL.merged[g] else total,)
        if PHASE < len(CELL.phases):
            u = CELL.operand(PHASE, gh, entering)
        else:
            state, saved = CELL.forward(gx, gh, entering)
            state = tiles.leaving_state(layers, state, entering, origins)
            steps.store_ends(carried.h, carried.c, program, state, TILE)
            steps.store_h(layers, program, step, place, state, TILE)
            steps.store_saved(layers, program, step, place, state, saved, CELL, TILE)
            origins = steps.origins_at(program, steps.place_of(layers, program, step + 1))
            u = tiles.entering_state(layers, state, origins)[0]
    steps.store(carried.u, program, rows, program.mask_b, (u,), H, TILE)


@triton.jit(do_not_specialize=["step", "T", "B", "R"])
def _stepwise_bwd_kernel(
    layers, grads, carried, step, T, B, R,
    CELL: tl.constexpr, PHASE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Makes the dgates of PHASE; with PHASE -1, before the first step, the gradient of h_0."""
    P: tl.constexpr = len(CELL.phases)
    program = _part(layers, T, B, R, TILE)

    # The product of the later step's phase 0. After the last step there is none, and u is zero.
    d_state = steps.load_ends(carried.h, carried.c, program, TILE)
    du = _load_du(carried, program, 0, TILE)
    origins = steps.origins_at(program, steps.place_of(layers, program, step + 1))
    if layers.origins is not None:
        origins = tl.where(step < T - 1, origins, SKIPPED)
    d_state = tiles.gradient_before(layers, tiles.add_to(d_state, 0, du), d_state, origins)

    if PHASE >= 0:
        places = (steps.place_of(layers, program, step), steps.place_of(layers, program, step - 1))
        loaded = steps.load_step(layers, grads, program, step, places, CELL, TILE)
        saved, left_before = tiles.widened(loaded[0]), tiles.widened(loaded[1])
        d_out, d_cs = tiles.widened(loaded[2]), tiles.widened(loaded[3])
        after = tiles.widened(steps.load_left(layers, program, step, places[0], (), TILE))
        origins = steps.origins_at(program, places[0])
        before = tiles.entering_state(layers, left_before, origins)
        d_leaving, carry = d_state, ()  # a step that is skipped adds nothing
        d_state = tiles.add_gradients(d_state, d_out, d_cs)
        for p in tl.static_range(P - 1, PHASE - 1, -1):
            if p < P - 1:
                du = _load_du(carried, program, p + 1, TILE)
            dgates, d_state, carry = CELL.adjoint(p, d_state, du, saved, before, after, carry)
        # A skipped step leaves the gradient as it was.
        d_state = tiles.leaving_state(layers, d_state, d_leaving, origins)
        steps.store_dgates(layers, grads, program, step, places[0], dgates, PHASE, CELL, TILE)

    if PHASE <= 0:
        steps.store_ends(carried.h, carried.c, program, d_state, TILE)


@triton.jit
def _load_du(carried, program, PHASE: tl.constexpr, TILE: tl.constexpr):
    """The gradient of a phase's operand."""
    rows = (PHASE * TILE.D + program.d.to(tl.int64)) * program.B, program.offs_b
    return tiles.widened(steps.load(carried.u, program, rows, (), 1, TILE.H, TILE))[0]


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
    read = layers._replace(w_hh=None)
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
