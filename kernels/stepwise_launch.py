"""Runs schedule *stepwise* (``stepwise.py``): the loop over T, a GEMM and a launch in each step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch

from .cells import CELLS
from .graphs import GRAPHS, Graphs, Loop, Series
from .launch import cdiv, kept, launch_options, on_device
from .plan import Tiles, stepwise_tiles
from .rows import INITIAL, PREVIOUS, Rows
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
    graph_steps: int = 0,
    graphs: Graphs = GRAPHS,
) -> None:
    """Runs one layer, all directions, and fills ``out``, ``h_n``, ``c_n`` and what is saved.

    gx: ``[D, R, G*H]``; weights: one entry a direction, of which all but ``w_ih`` and ``b_ih`` is
    read, each tensor with the members in front if B is equal parts of an ensemble; h_0, h_n: ``[D,
    B, P]``; c_0, c_n: ``[D, B, H]``; out: ``[R, D*P]``; gates ``[D, R, S*H]`` and cs ``[D, R, H]``:
    None when not saved; rows: what R means, and dense without origins if there is a projection;
    aux: what a cell's own functions read through ``ctx``; graph_steps: how many steps a CUDA graph
    of ``graphs`` holds, 0 for none. All contiguous, and all but aux of one dtype: fp16, bf16, fp32
    or fp64.
    """
    # h is carried in fp32, but what W_hr makes is an operand and has the dtype of the tensors.
    state = _carry(h_0, h_n, keep=weights[0].w_hr is not None), _carry(c_0, c_n)
    run = partial(_forward, cell, weights, rows, aux)
    series = _series(rows, len(h_0), (gx, 1), (out, 0), (gates, 1), (cs, 1), (rows.origins, 1))
    loop = Loop(run, state, series, (False, True, True, True, False), rows.T)
    with on_device(out):
        if _is_capturable(rows, aux, graph_steps, gx):
            graphs.run(loop, graph_steps, _frozen("forward", cell, loop, weights))
        else:
            loop.directly()
        _hand_over((state[0], h_n), (state[1], c_n))


def _forward(cell, weights, rows, aux, state, gx, out, gates, cs, origins) -> None:
    """Runs the steps that ``gx`` holds, from ``state`` on, which it leaves behind."""
    spec, first, other, (carried, c) = SPECS[cell], weights[0], weights[-1], state
    gx, (D, B, P), columns = gx.flatten(1, -2), carried.shape, gx.shape[-1]
    H, out, total = columns // spec.gates, out.view(-1, D * P), gx.shape[1]
    rows = _rows_of_piece(rows, total, origins)
    tiles, projects = stepwise_tiles(H), first.w_hr is not None
    has_bias = first.b_hh is not None and first.w_hh.dim() == 2  # of members it is in the product
    gh = gx.new_empty(D, B, columns)
    if projects:  # the kernel's h, o tanh(c), is one projection away from h
        u, h, made = carried, gx.new_zeros(D, B, H), gx.new_empty(total, D * H)
        kernel_u = gx.new_empty(D, B, H)
    else:
        u, h, made = gx.new_empty(D, B, H), carried, out
        kernel_u = u
    options = launch_options(tiles) | rows.switches

    def launch(step: int, constants: dict) -> None:
        _stepwise_fwd_kernel[grid(D, B, H, tiles)](
            # A pointer that the switches leave unread is any tensor of that dtype.
            gx,
            gh,
            first.b_hh if has_bias else gh,
            other.b_hh if has_bias else gh,
            origins,
            rows.starts,
            aux,
            h,
            h if c is None else c,
            kernel_u,
            made,
            made if gates is None else gates,
            made if cs is None else cs,
            step,
            rows.T,
            B,
            total,
            **constants,
            **options,
        )

    work = []  # of a step: the products of each phase, and the constants of the launch after them
    for phase, served in enumerate(spec.phases):
        units = slice(served[0] * H, (served[-1] + 1) * H)
        products = [
            _product(
                u[d], w.w_hh[..., units, :].mT, gh[d, :, units],
                None if has_bias or w.b_hh is None else w.b_hh[:, None, units],
            )
            for d, w in enumerate(weights)
        ]  # fmt: skip
        following, ready = (phase + 1) % len(spec.phases), served[-1] + 1
        constants = fwd_constants(cell, D, H, has_bias, kept(gates, cs), following, ready)
        work.append((products, constants))

    spans, projections = rows.spans(), _projections(weights)
    if not projects:
        launch(0, fwd_constants(cell, D, H, has_bias, 0, 0, 0))
    for step in range(rows.T):
        for products, constants in work:
            for multiply in products:
                multiply()
            launch(step, constants)
        for d, w_hr in projections:
            span = spans[(step, rows.T - 1 - step)[d]]
            _product(made[span, d * H : (d + 1) * H], w_hr.mT, u[d])()
            out[span, d * P : (d + 1) * P] = u[d]


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
    graph_steps: int = 0,
    graphs: Graphs = GRAPHS,
) -> None:
    """Runs one layer backwards: fills ``dgates [D, R, N*H]``, d_h_0 and d_c_0 (as h_0, c_0).

    d_out: ``[R, D*P]``, d_cs: ``[D, R, H]``, the gradient of every c; each None where no gradient
    arrives; the rest as in ``stepwise_fwd``. All contiguous and of one dtype.
    """
    state = _carry(d_h_n, d_h_0, keep=weights[0].w_hr is not None), _carry(d_c_n, d_c_0)
    # out and cs lead, for ``enter``; what is written comes last but one.
    tensors = (out, 0), (cs, 1), (rows.origins, 1), (gates, 1), (d_out, 0), (d_cs, 1), (dgates, 1)
    series = _series(rows, len(h_0), *tensors)
    written = (False,) * (len(series) - 1) + (True,)
    enter = partial(_enter, rows.T, h_0, c_0, series[:2])
    run = partial(_backward, cell, weights, rows, aux)
    loop = Loop(run, state, series, written, rows.T, True, (h_0, c_0), enter)
    with on_device(out):
        if _is_capturable(rows, aux, graph_steps, gates):
            graphs.run(loop, graph_steps, _frozen("backward", cell, loop, weights))
        else:
            loop.directly()
        _hand_over((state[0], d_h_0), (state[1], d_c_0))


def _backward(
    cell, weights, rows, aux, state, out, cs, origins, gates, d_out, d_cs, dgates, h_0, c_0
) -> None:
    """Runs the steps that ``gates`` holds backwards, from ``state`` on, which it leaves behind."""
    spec, projects, (carried, d_c) = SPECS[cell], weights[0].w_hr is not None, state
    dgates, (D, B, P), total = dgates.flatten(1, -2), carried.shape, gates.flatten(1, -2).shape[1]
    d_out = None if d_out is None else d_out.view(-1, D * P)
    H, rows = dgates.shape[-1] // spec.grad_tiles, _rows_of_piece(rows, total, origins)
    tiles = stepwise_tiles(H)
    options = launch_options(tiles) | rows.switches
    du = gates.new_zeros(len(spec.phases), D, B, H)
    if projects:
        # dh reaches the kernel through du, already projected; of h itself an LSTM's adjoint reads
        # nothing, so whatever is as large may stand in for it.
        d_h, h_before, hs = torch.zeros_like(d_c), c_0, gates
    else:
        d_h, h_before, hs = carried, h_0, out
    has_d_out = d_out is not None and not projects

    def launch(step: int, constants: dict) -> None:
        _stepwise_bwd_kernel[grid(D, B, H, tiles)](
            d_out if has_d_out else hs,
            hs if d_cs is None else d_cs,
            h_before,
            h_before if c_0 is None else c_0,
            hs,
            gates,
            hs if cs is None else cs,
            du,
            origins,
            rows.starts,
            aux,
            d_h,
            d_h if d_c is None else d_c,
            dgates,
            step,
            rows.T,
            B,
            total,
            **constants,
            **options,
        )

    work = []  # of a step: the constants of each phase's launch, and the terms of its product
    for phase in reversed(range(len(spec.phases))):
        runs = [
            (slice(tile * H, (tile + count) * H), slice(gate * H, (gate + count) * H))
            for gate, tile, count in runs_of(spec.phases[phase], spec.recurrent)
        ]
        terms = [
            (
                d,
                columns,
                w.w_hh[..., units, :],
                carried[d] if projects else du[phase, d],
                float(i > 0),
            )
            for d, w in enumerate(weights)
            for i, (columns, units) in enumerate(runs)
        ]
        work.append((bwd_constants(cell, D, H, has_d_out, d_cs is not None, phase), terms))

    every_span, projections = rows.spans(), _projections(weights)
    for step in reversed(range(rows.T)):
        spans = every_span[step], every_span[rows.T - 1 - step]
        for d, w_hr in projections:
            if d_out is not None:
                carried[d] += d_out[spans[d], d * P : (d + 1) * P]
            _product(carried[d], w_hr, du[0, d])()
        for constants, terms in work:
            launch(step, constants)
            for d, columns, w_hh, target, beta in terms:
                grads = dgates[d, spans[d], columns]
                _add_product(target[: len(grads)], grads, w_hh, beta)
    if not projects:
        launch(-1, bwd_constants(cell, D, H, has_d_out, False, -1))


def _product(
    u: torch.Tensor, w: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None
) -> Callable[[], object]:
    """What fills ``out [B, ...]``: ``u w``, or of members ``[N, ...]`` each part of B by its own.

    bias: of members ``[N, 1, ...]``; a launch has that of one cell.
    """
    if w.dim() == 2:
        return partial(torch.mm, u, w, out=out)
    parts = (len(w), -1)
    u, out = u.unflatten(0, parts), out.unflatten(0, parts)
    if bias is None:
        return partial(torch.bmm, u, w, out=out)
    return partial(torch.baddbmm, bias, u, w, out=out)


def _add_product(total: torch.Tensor, grads: torch.Tensor, w_hh: torch.Tensor, beta: float) -> None:
    """``total = beta total + grads w_hh``, or of members ``[N, ...]`` each part of B by its own."""
    if w_hh.dim() == 2:
        torch.addmm(total, grads, w_hh, beta=beta, out=total)
    else:
        parts = (len(w_hh), -1)
        total = total.unflatten(0, parts)
        torch.baddbmm(total, grads.unflatten(0, parts), w_hh, beta=beta, out=total)


def _rows_of_piece(rows: Rows, total: int, origins: torch.Tensor | None) -> Rows:
    """The rows of a piece of the loop: ``total`` of them, or packed all."""
    T = rows.T if rows.sizes is not None else total // rows.B
    return rows._replace(T=T, origins=origins)


def _series(rows: Rows, D: int, *tensors: Series) -> list[Series]:
    """Dense tensors with time as a dimension of its own; packed ones, never cut, as they are."""
    if rows.sizes is not None:
        return list(tensors)
    T, B = rows.T, rows.B
    return [
        (tensor if tensor is None else tensor.view(shape), time)
        for tensor, time in tensors
        for shape in [(D, T, B, -1) if time else (T, B, D, -1)]
    ]


def _is_capturable(
    rows: Rows, aux: torch.Tensor | None, graph_steps: int, like: torch.Tensor
) -> bool:
    """Whether the loop can be run in graphs and is long enough for one.

    Not packed, where every step has its own size; not with a cell's own constants, which it
    addresses by the call's t; and not inside a capture of the user's, which takes in every step.
    """
    if not 0 < graph_steps <= rows.T or rows.sizes is not None or aux is not None:
        return False
    return not (like.is_cuda and torch.cuda.is_current_stream_capturing())


def _frozen(direction: str, cell: str, loop: Loop, weights: Sequence[Weights]) -> Hashable:
    """All that a graph of the loop has frozen: a call with another key needs another graph."""

    def form(tensor: torch.Tensor | None, time: int | None = None) -> Hashable:
        if tensor is None:
            return None
        shape = (size for dim, size in enumerate(tensor.shape) if dim != time)
        return tensor.device, tensor.dtype, *shape

    device = weights[0].w_hh.device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    return (
        direction,
        cell,
        stream,  # whose order alone keeps one call's copies from another's replays
        torch.backends.cuda.matmul.fp32_precision,
        tuple(form(tensor) for tensor in (*loop.state, *loop.entering)),
        tuple(form(tensor, time) for tensor, time in loop.series),
        tuple(
            (tensor.data_ptr(), tensor.stride(), form(tensor))
            for w in weights
            for tensor in (w.w_hh, w.b_hh, w.w_hr)
            if tensor is not None
        ),
    )


def _enter(
    T: int,
    h_0: torch.Tensor,
    c_0: torch.Tensor | None,
    series: Sequence[Series],
    first: int,
    tensors: Sequence[torch.Tensor | None],
) -> None:
    """Backward's h_0 and c_0 of a piece: what the step before left, where a sequence goes on.

    series: out and cs of the call; tensors: the piece's, which begin with out, cs and origins and
    end with its h_0 and c_0. Where a sequence goes on, the piece's origins say that it begins.
    """
    origins, h, c = tensors[2], tensors[-2], tensors[-1]
    for d in range(len(h_0)):
        t, before = (0, first - 1) if d == 0 else (-1, T - first)
        goes_on = None
        if origins is not None:
            goes_on = origins[d, t] == PREVIOUS
            origins[d, t].masked_fill_(goes_on, INITIAL)
        for start, target, (values, time) in ((h_0, h, series[0]), (c_0, c, series[1])):
            if start is None or target is None:
                continue
            target[d] = start[d]
            if first:
                assert values is not None
                left = values[d, before] if time else values[before, :, d]
                target[d] = left if goes_on is None else torch.where(goes_on, left, start[d])


def fwd_constants(
    cell: str, D: int, H: int, has_bias: bool, save: int, phase: int, ready: int
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


def grid(D: int, B: int, H: int, tiles: Tiles) -> tuple[int, int, int]:
    """The programs of each launch."""
    return cdiv(B, tiles.block_b), cdiv(H, tiles.blocks[0][1]), D


def _carry(
    start: torch.Tensor | None, end: torch.Tensor | None, keep: bool = False
) -> torch.Tensor | None:
    """What a state is carried in from step to step: ``end``, or fp32 where that has 16 bits.

    keep: in ``end`` in any case.
    """
    if start is None or end is None:
        return None
    wide = end.dtype.itemsize > 2 or keep
    return (end if wide else torch.empty_like(end, dtype=torch.float32)).copy_(start)


def _hand_over(*states: tuple[torch.Tensor | None, torch.Tensor | None]) -> None:
    """Rounds what was carried into where it ends, unless it is there."""
    for carried, end in states:
        if carried is not None and end is not None and carried is not end:
            end.copy_(carried)
