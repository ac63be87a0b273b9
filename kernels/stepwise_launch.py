"""Runs schedule *stepwise* (``stepwise.py``): the loop over T, a GEMM and a launch in each step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

from .cells import CELLS
from .launch import launch_options, on_device
from .plan import Tiles, stepwise_tiles
from .rows import Rows
from .spec import SPECS, Weights, runs_of
from .stepwise import _stepwise_bwd_kernel, _stepwise_fwd_kernel


def stepwise_fwd(
    cell: str,
    gx: torch.Tensor,
    weights: Sequence[Weights],
    h_0: torch.Tensor,
    c_0: torch.Tensor | None,
    out: torch.Tensor,
    h_n: torch.Tensor,
    c_n: torch.Tensor | None,
    gates: torch.Tensor | None,
    cs: torch.Tensor | None,
    rows: Rows,
    aux: torch.Tensor | None = None,
) -> None:
    """Runs one layer, all directions, and fills ``out``, ``h_n``, ``c_n`` and what is saved.

    gx: ``[D, R, G*H]``; weights: one entry a direction, of which all but ``w_ih`` and ``b_ih``
    is read; h_0, h_n: ``[D, B, P]``; c_0, c_n: ``[D, B, H]``; out: ``[R, D*P]``; gates
    ``[D, R, S*H]`` and cs ``[D, R, H]``: None when nothing is saved; rows: what R means, and dense
    without origins if there is a projection; aux: what a cell's own functions read through
    ``ctx``. All contiguous, and all but aux of one dtype: fp16, bf16, fp32 or fp64.
    """
    spec, first, other = SPECS[cell], weights[0], weights[-1]
    (D, B, P), columns, out = h_0.shape, gx.shape[-1], out.flatten(0, -2)
    H, T = columns // spec.gates, rows.T
    tiles, has_bias, projects = stepwise_tiles(H), first.b_hh is not None, first.w_hr is not None
    c = None if c_0 is None or c_n is None else _carry(c_0, c_n)
    options = launch_options(tiles)
    u, gh = h_0.clone(), gx.new_empty(D, B, columns)
    if projects:  # the kernel's h, o tanh(c), is one projection away from h
        h, made, kernel_u = gx.new_zeros(D, B, H), gx.new_empty(T * B, D * H), gx.new_empty(D, B, H)
    else:
        h, made, kernel_u = _carry(h_0, h_n), out, u

    def launch(step: int, constants: dict) -> None:
        _stepwise_fwd_kernel[_grid(D, B, H, tiles)](
            # A pointer that the switches leave unread is any tensor of that dtype.
            gx,
            gh,
            first.b_hh if has_bias else gh,
            other.b_hh if has_bias else gh,
            rows.origins,
            rows.starts,
            aux,
            h,
            h if c is None else c,
            kernel_u,
            made,
            made if gates is None else gates,
            made if cs is None else cs,
            step,
            T,
            B,
            rows.total,
            **constants,
            **rows.switches,
            **options,
        )

    work = []  # of a step: the products of each phase, and the constants of the launch after them
    for phase, served in enumerate(spec.phases):
        units = slice(served[0] * H, (served[-1] + 1) * H)
        products = [(u[d], w.w_hh[units].t(), gh[d, :, units]) for d, w in enumerate(weights)]
        following, ready = (phase + 1) % len(spec.phases), served[-1] + 1
        constants = fwd_constants(cell, D, H, has_bias, gates is not None, following, ready)
        work.append((products, constants))

    spans, projections = rows.spans(), _projections(weights)
    with on_device(out):
        if not projects:
            launch(0, fwd_constants(cell, D, H, has_bias, False, 0, 0))
        for step in range(T):
            for products, constants in work:
                for operand, w_hh, product in products:
                    torch.mm(operand, w_hh, out=product)
                launch(step, constants)
            for d, w_hr in projections:
                span = spans[(step, T - 1 - step)[d]]
                torch.mm(made[span, d * H : (d + 1) * H], w_hr.t(), out=u[d])
                out[span, d * P : (d + 1) * P] = u[d]
        _hand_over((u if projects else h, h_n), (c, c_n))


def stepwise_bwd(
    cell: str,
    d_out: torch.Tensor | None,
    d_cs: torch.Tensor | None,
    d_h_n: torch.Tensor,
    d_c_n: torch.Tensor | None,
    weights: Sequence[Weights],
    h_0: torch.Tensor,
    c_0: torch.Tensor | None,
    out: torch.Tensor,
    gates: torch.Tensor,
    cs: torch.Tensor | None,
    dgates: torch.Tensor,
    d_h_0: torch.Tensor,
    d_c_0: torch.Tensor | None,
    rows: Rows,
    aux: torch.Tensor | None = None,
) -> None:
    """Runs one layer backwards: fills ``dgates [D, R, N*H]``, d_h_0 and d_c_0 (as h_0, c_0).

    d_out: ``[R, D*P]``, d_cs: ``[D, R, H]``, the gradient of every c; each None where no gradient
    arrives; the rest as in ``stepwise_fwd``. All contiguous and of one dtype.
    """
    spec, (D, B, P), T = SPECS[cell], h_0.shape, rows.T
    H, projects = dgates.shape[-1] // spec.grad_tiles, weights[0].w_hr is not None
    dgates, d_out = dgates.flatten(1, -2), None if d_out is None else d_out.flatten(0, -2)
    tiles = stepwise_tiles(H)
    options = launch_options(tiles)
    d_c = None if d_c_n is None or d_c_0 is None else _carry(d_c_n, d_c_0)
    du = gates.new_zeros(len(spec.phases), D, B, H)
    if projects:
        assert d_c is not None
        assert c_0 is not None
        # dh reaches the kernel through du, already projected; of h itself an LSTM's adjoint reads
        # nothing, so whatever is as large may stand in for it.
        d_h, dh, h_before, hs = torch.zeros_like(d_c), d_h_n.clone(), c_0, gates
    else:
        d_h, h_before, hs = _carry(d_h_n, d_h_0), h_0, out
    has_d_out = d_out is not None and not projects

    def launch(step: int, constants: dict) -> None:
        _stepwise_bwd_kernel[_grid(D, B, H, tiles)](
            d_out if has_d_out else hs,
            hs if d_cs is None else d_cs,
            h_before,
            h_before if c_0 is None else c_0,
            hs,
            gates,
            hs if cs is None else cs,
            du,
            rows.origins,
            rows.starts,
            aux,
            d_h,
            d_h if d_c is None else d_c,
            dgates,
            step,
            T,
            B,
            rows.total,
            **constants,
            **rows.switches,
            **options,
        )

    work = []  # of a step: the constants of each phase's launch, and the terms of its product
    for phase in reversed(range(len(spec.phases))):
        runs = [
            (slice(tile * H, (tile + count) * H), slice(gate * H, (gate + count) * H))
            for gate, tile, count in runs_of(spec.phases[phase], spec.recurrent)
        ]
        terms = [
            (d, columns, w.w_hh[units], dh[d] if projects else du[phase, d], float(i > 0))
            for d, w in enumerate(weights)
            for i, (columns, units) in enumerate(runs)
        ]
        work.append((bwd_constants(cell, D, H, has_d_out, d_cs is not None, phase), terms))

    every_span, projections = rows.spans(), _projections(weights)
    with on_device(out):
        for step in reversed(range(T)):
            spans = every_span[step], every_span[T - 1 - step]
            for d, w_hr in projections:
                if d_out is not None:
                    dh[d] += d_out[spans[d], d * P : (d + 1) * P]
                torch.mm(dh[d], w_hr, out=du[0, d])
            for constants, terms in work:
                launch(step, constants)
                for d, columns, w_hh, target, beta in terms:
                    grads = dgates[d, spans[d], columns]
                    target = target[: len(grads)]
                    torch.addmm(target, grads, w_hh, beta=beta, out=target)
        if projects:
            _hand_over((dh, d_h_0), (d_c, d_c_0))
        else:
            launch(-1, bwd_constants(cell, D, H, has_d_out, False, -1))
            _hand_over((d_h, d_h_0), (d_c, d_c_0))


def fwd_constants(
    cell: str, D: int, H: int, has_bias: bool, save: bool, phase: int, ready: int
) -> dict:
    """The compile-time arguments of one forward launch; together with dtypes, one binary each."""
    tiles, spec = stepwise_tiles(H), SPECS[cell]
    return {
        "OPERAND": CELLS[cell].operand,
        "FORWARD": CELLS[cell].forward,
        "SAVED": tuple(range(spec.saved)),
        "STATES": spec.states,
        "PHASE": phase,
        "READY": ready,
        "D": D,
        "H": H,
        "G": spec.gates,
        "BLOCK_B": tiles.block_b,
        "BLOCKS": tiles.blocks,
        "HAS_BIAS": has_bias,
        "SAVE": save,
    }


def bwd_constants(cell: str, D: int, H: int, has_d_out: bool, has_d_cs: bool, phase: int) -> dict:
    """The compile-time arguments of one backward launch."""
    tiles, spec = stepwise_tiles(H), SPECS[cell]
    return {
        "ADJOINT": CELLS[cell].adjoint,
        "FOLD": CELLS[cell].fold,
        "FIRST_TILE": spec.first_tiles,
        "GRAD_TILES": spec.grad_tiles,
        "SAVED": tuple(range(spec.saved)),
        "STATES": spec.states,
        "PHASE": phase,
        "D": D,
        "H": H,
        "BLOCK_B": tiles.block_b,
        "BLOCKS": tiles.blocks,
        "HAS_D_OUT": has_d_out,
        "HAS_D_CS": has_d_cs,
    }


def _projections(weights: Sequence[Weights]) -> list[tuple[int, torch.Tensor]]:
    """Each direction's W_hr, if there are any."""
    return [(d, w.w_hr) for d, w in enumerate(weights) if w.w_hr is not None]


def _grid(D: int, B: int, H: int, tiles: Tiles) -> tuple[int, int, int]:
    return triton.cdiv(B, tiles.block_b), triton.cdiv(H, tiles.blocks[0][1]), D


def _carry(start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """What a state is carried in from step to step: ``end``, or fp32 where that has 16 bits."""
    wide = end if end.dtype.itemsize > 2 else torch.empty_like(end, dtype=torch.float32)
    return wide.copy_(start)


def _hand_over(*states: tuple[torch.Tensor | None, torch.Tensor | None]) -> None:
    """Rounds what was carried into where it ends, unless it is there."""
    for carried, end in states:
        if carried is not None and end is not None and carried is not end:
            end.copy_(carried)
