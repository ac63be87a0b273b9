"""Schedule *stepwise*: a library GEMM and one fused elementwise launch a step; any H, B and dtype.

Axes: T time, B batch, H hidden, G gates, D directions, S saved tiles, N gradient tiles
(``spec.py``). Grid ``(cdiv(B, BLOCK_B), cdiv(H, BLOCK_H), D)``: one program owns BLOCK_B sequences
times BLOCK_H units of one direction in one step. The host runs the loop over T.

A step has one product per phase of the cell, and after each a launch. It makes the operand of the
next phase of all that the products gave so far; after the last it makes the new state, and of that
the operand of the next step's first phase. One launch before the first step makes it of h_0.
Backward is the mirror image: each launch makes a phase's part of ``dgates``, the product makes
the gradient of the phase's operand, and the first launch of the step before folds that into the
gradient of h; one launch after the last does it for d_h_0. What an earlier launch of the
step had in registers, a later one computes again: the arithmetic is free beside the loads.

h, c and their gradients are carried from step to step in fp32, or fp64 in fp64. What a product
reads and writes (u, gh, du, dgates) has the dtype of the tensors, since that is what torch.mm can
write everywhere without a copy of the weights. fp64 computes in fp64 throughout.

Cost of a step in memory: W_hh is read once for each direction, from L2 where it fits, and each
program reads gx and gh once. Short steps cost what P*(D + 1) launches cost the host, P phases.
No atomics; two runs agree bit for bit if the library's GEMMs do.

A projection (proj_size) is one more GEMM a step and direction: the kernel's h is then o tanh(c).

Limits: a program sees BLOCK_H units of a row, so no cell that reduces over it (``rowwise``).
The GEMMs of fp32 are as exact as torch's switch for them says; the caller sets it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .cells import CELLS
from .common import (
    add_first,
    all_columns,
    load_rows,
    load_state,
    load_step,
    no_tiles,
    only,
    pick,
    store_rows,
    time_of,
    to_float,
)
from .launch import launch_options, on_device
from .plan import Tiles, stepwise_tiles
from .spec import SPECS, Weights, runs_of


@triton.jit
def _load_products(
    gh_rows,
    b_ptr,  # [G*H]
    mask_b,
    start,
    READY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    H: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """``gh[block][gate]`` of the first READY gates, with the bias, which never gets rounded."""
    gh = to_float(load_rows(gh_rows, mask_b, start, READY, H, BLOCKS))
    if HAS_BIAS:
        one = tl.arange(0, 1)
        b = to_float(load_rows(b_ptr + one, one == 0, start, READY, H, BLOCKS))
        out = ()
        for j in tl.static_range(len(BLOCKS)):
            block = ()
            for g in tl.static_range(READY):
                block = block + (gh[j][g] + b[j][g],)
            out = out + (block,)
        return out
    else:
        return gh


@triton.jit
def _as_rows(tiles):
    """``tiles[block]`` as rows that hold nothing else, ``[block][0]``."""
    out = ()
    for j in tl.static_range(len(tiles)):
        out = out + ((tiles[j],),)
    return out


@triton.jit(do_not_specialize=["step", "T", "B"])
def _stepwise_fwd_kernel(
    # inputs
    gx_ptr,  # [D, T, B, G*H] = x @ W_ih.T + b_ih
    gh_ptr,  # [D, B, G*H], of which the first READY gates are read
    b_hh_ptr,  # [G*H] of direction 0, read when HAS_BIAS
    b_hh_reverse_ptr,  # of direction 1
    aux_ptr,  # what the cell's own functions read
    # read, and written when READY == G
    h_ptr,  # [D, B, H] in fp32, or fp64 where all is fp64
    c_ptr,  # likewise, when STATES == 2
    # outputs
    u_ptr,  # [D, B, H], the operand of PHASE
    out_ptr,  # [T, B, D*H], this and the rest written when READY == G
    gates_ptr,  # [D, T, B, S*H], written when SAVE
    cs_ptr,  # [D, T, B, H], written when SAVE and STATES == 2
    # run-time sizes
    step,
    T,
    B,
    # the cell
    OPERAND: tl.constexpr,
    FORWARD: tl.constexpr,
    SAVED: tl.constexpr,
    STATES: tl.constexpr,
    # compile-time sizes and switches
    PHASE: tl.constexpr,  # whose operand this launch makes
    READY: tl.constexpr,  # gates whose products of this step are made; with all, so is the state
    D: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE: tl.constexpr,
):
    pid_d = tl.program_id(2).to(tl.int64)
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    start = tl.program_id(1) * BLOCKS[0][1]
    mask_b = offs_b < B
    row = pid_d * B + offs_b
    if D == 2:
        b_hh_ptr = tl.where(pid_d == 0, b_hh_ptr, b_hh_reverse_ptr)

    t = time_of(step, T, pid_d)
    gx_rows = gx_ptr + (pid_d * T * B + offs_b) * (G * H)
    gx = to_float(load_rows(gx_rows + t * B * (G * H), mask_b, start, G, H, BLOCKS))
    gh = _load_products(gh_ptr + row * (G * H), b_hh_ptr, mask_b, start, READY, HAS_BIAS, H, BLOCKS)
    state = load_state(h_ptr + row * H, c_ptr + row * H, mask_b, start, STATES, H, BLOCKS)
    if READY == G:
        ctx = (aux_ptr, t, offs_b, mask_b, H, all_columns(start, BLOCKS))
        state, saved = FORWARD(ctx, gx, gh, state)
        store_rows(h_ptr + row * H, mask_b, start, only(state, 0), 0, H, BLOCKS)
        if STATES == 2:
            store_rows(c_ptr + row * H, mask_b, start, only(state, 1), 0, H, BLOCKS)
        out_rows = out_ptr + (t * B + offs_b) * (D * H) + pid_d * H
        store_rows(out_rows, mask_b, start, only(state, 0), 0, H, BLOCKS)
        if SAVE:
            step_row = (pid_d * T + t) * B + offs_b
            gates_rows = gates_ptr + step_row * (len(SAVED) * H)
            store_rows(gates_rows, mask_b, start, saved, 0, H, BLOCKS)
            if STATES == 2:
                cs_rows = cs_ptr + step_row * H
                store_rows(cs_rows, mask_b, start, only(state, 1), 0, H, BLOCKS)
        # The rest belongs to the next step. After the last one nobody reads what comes out.
        t = time_of(tl.minimum(step + 1, T - 1), T, pid_d)
        gx = to_float(load_rows(gx_rows + t * B * (G * H), mask_b, start, G, H, BLOCKS))
        gh = no_tiles(BLOCKS)

    ctx = (aux_ptr, t, offs_b, mask_b, H, all_columns(start, BLOCKS))
    u = OPERAND(PHASE, ctx, gx, gh, state)
    store_rows(u_ptr + row * H, mask_b, start, _as_rows(u), 0, H, BLOCKS)


@triton.jit(do_not_specialize=["step", "T", "B"])
def _stepwise_bwd_kernel(
    # inputs
    d_out_ptr,  # [T, B, D*H], read when HAS_D_OUT
    h_0_ptr,  # [D, B, H]
    c_0_ptr,
    out_ptr,  # [T, B, D*H]
    gates_ptr,  # [D, T, B, S*H]
    cs_ptr,  # [D, T, B, H]
    du_ptr,  # [P, D, B, H], the gradients of the operands; of phase 0 the later step's
    aux_ptr,
    # read, and written when PHASE <= 0
    d_h_ptr,  # [D, B, H] in fp32, or fp64 where all is fp64
    d_c_ptr,  # likewise, when STATES == 2
    # output
    dgates_ptr,  # [D, T, B, N*H], of which the tiles of PHASE are written
    # run-time sizes
    step,
    T,
    B,
    # the cell
    ADJOINT: tl.constexpr,
    FOLD: tl.constexpr,
    FIRST_TILE: tl.constexpr,  # of each phase, where its gradient tiles are stored
    GRAD_TILES: tl.constexpr,
    SAVED: tl.constexpr,
    STATES: tl.constexpr,
    # compile-time sizes and switches
    PHASE: tl.constexpr,  # -1 before the first step: d_state is made, and nothing else
    D: tl.constexpr,
    H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCKS: tl.constexpr,
    HAS_D_OUT: tl.constexpr,
):
    P: tl.constexpr = len(FIRST_TILE)
    pid_d = tl.program_id(2).to(tl.int64)
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    start = tl.program_id(1) * BLOCKS[0][1]
    mask_b = offs_b < B
    row = pid_d * B + offs_b
    d_h_rows = d_h_ptr + row * H
    d_c_rows = d_c_ptr + row * H

    # What the later step left undone. For the last step there is none, and du is zero.
    t = time_of(tl.minimum(step + 1, T - 1), T, pid_d)
    ctx = (aux_ptr, t, offs_b, mask_b, H, all_columns(start, BLOCKS))
    d_state = load_state(d_h_rows, d_c_rows, mask_b, start, STATES, H, BLOCKS)
    du = pick(to_float(load_rows(du_ptr + row * H, mask_b, start, 1, H, BLOCKS)), 0)
    d_state = FOLD(ctx, d_state, du)

    if PHASE >= 0:
        t = time_of(step, T, pid_d)
        ctx = (aux_ptr, t, offs_b, mask_b, H, all_columns(start, BLOCKS))
        loaded = load_step(
            gates_ptr, cs_ptr, out_ptr, h_0_ptr, c_0_ptr, d_out_ptr,
            step, T, B, pid_d, pid_d, offs_b, mask_b, start,
            SAVED, STATES, HAS_D_OUT, D, H, BLOCKS,
        )  # fmt: skip
        saved = to_float(loaded[0])
        prev = to_float(loaded[1])
        if HAS_D_OUT:
            d_state = add_first(d_state, pick(to_float(loaded[2]), 0))
        out_rows = out_ptr + (t * B + offs_b) * (D * H) + pid_d * H
        step_row = (pid_d * T + t) * B + offs_b
        new = to_float(
            load_state(out_rows, cs_ptr + step_row * H, mask_b, start, STATES, H, BLOCKS)
        )
        du = no_tiles(BLOCKS)
        carry = no_tiles(BLOCKS)
        for later in tl.static_range(P - PHASE):
            if later > 0:
                du_rows = du_ptr + ((P - later) * D * B + row) * H
                du = pick(to_float(load_rows(du_rows, mask_b, start, 1, H, BLOCKS)), 0)
            grads, d_state, carry = ADJOINT(
                P - 1 - later, ctx, d_state, du, saved, prev, new, carry
            )
        dgates_rows = dgates_ptr + step_row * (GRAD_TILES * H)
        store_rows(dgates_rows, mask_b, start, grads, FIRST_TILE[PHASE], H, BLOCKS)

    if PHASE <= 0:
        store_rows(d_h_rows, mask_b, start, only(d_state, 0), 0, H, BLOCKS)
        if STATES == 2:
            store_rows(d_c_rows, mask_b, start, only(d_state, 1), 0, H, BLOCKS)


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
    aux: torch.Tensor | None = None,
) -> None:
    """Runs one layer, all directions, and fills ``out``, ``h_n``, ``c_n`` and what is saved.

    gx: ``[D, T, B, G*H]``; weights: one entry a direction, of which all but ``w_ih`` and ``b_ih``
    is read; h_0, h_n: ``[D, B, P]``; c_0, c_n: ``[D, B, H]``; out: ``[T, B, D*P]``; gates
    ``[D, T, B, S*H]`` and cs ``[D, T, B, H]``: None when nothing is saved; aux: what a cell's own
    functions read through ``ctx``. All contiguous, and all but aux of one dtype: fp16, bf16, fp32
    or fp64.
    """
    spec, first, other = SPECS[cell], weights[0], weights[-1]
    D, T, B, columns = gx.shape
    H, P = columns // spec.gates, h_0.shape[-1]
    tiles, has_bias, projects = stepwise_tiles(H), first.b_hh is not None, first.w_hr is not None
    c, options = _carry(c_0, c_n), launch_options(tiles)
    u, gh = h_0.clone(), gx.new_empty(D, B, columns)
    if projects:  # the kernel's h, o tanh(c), is one projection away from h
        h, made, kernel_u = gx.new_zeros(D, B, H), gx.new_empty(T, B, D * H), gx.new_empty(D, B, H)
    else:
        h, made, kernel_u = _carry(h_0, h_n), out, u

    def launch(step: int, constants: dict) -> None:
        _stepwise_fwd_kernel[_grid(D, B, H, tiles)](
            # A pointer that the switches leave unread is any tensor of that dtype.
            gx,
            gh,
            first.b_hh if has_bias else gh,
            other.b_hh if has_bias else gh,
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
            **constants,
            **options,
        )

    work = []  # of a step: the products of each phase, and the constants of the launch after them
    for phase, served in enumerate(spec.phases):
        rows = slice(served[0] * H, (served[-1] + 1) * H)
        products = [(u[d], w.w_hh[rows].t(), gh[d, :, rows]) for d, w in enumerate(weights)]
        following, ready = (phase + 1) % len(spec.phases), served[-1] + 1
        constants = fwd_constants(cell, D, H, has_bias, gates is not None, following, ready)
        work.append((products, constants))

    with on_device(out):
        if not projects:
            launch(0, fwd_constants(cell, D, H, has_bias, False, 0, 0))
        for step in range(T):
            for products, constants in work:
                for operand, w_hh, product in products:
                    torch.mm(operand, w_hh, out=product)
                launch(step, constants)
            for d, w in enumerate(weights if projects else ()):
                t = (step, T - 1 - step)[d]
                torch.mm(made[t, :, d * H : (d + 1) * H], w.w_hr.t(), out=u[d])
                out[t, :, d * P : (d + 1) * P] = u[d]
        _hand_over((u if projects else h, h_n), (c, c_n))


def stepwise_bwd(
    cell: str,
    d_out: torch.Tensor | None,
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
    aux: torch.Tensor | None = None,
) -> None:
    """Runs one layer backwards: fills ``dgates [D, T, B, N*H]``, d_h_0 and d_c_0 (as h_0, c_0).

    d_out: ``[T, B, D*P]``, None where no gradient reaches the outputs; the rest as in
    ``stepwise_fwd``. All contiguous and of one dtype.
    """
    spec, (D, T, B, columns), P = SPECS[cell], dgates.shape, h_0.shape[-1]
    H, projects = columns // spec.grad_tiles, weights[0].w_hr is not None
    tiles = stepwise_tiles(H)
    options = launch_options(tiles)
    d_c, du = _carry(d_c_n, d_c_0), gates.new_zeros(len(spec.phases), D, B, H)
    if projects:
        # dh reaches the kernel through du, already projected; of h itself an LSTM's adjoint reads
        # nothing, so whatever is as large may stand in for it.
        d_h, dh, h_before, hs = torch.zeros_like(d_c), d_h_n.clone(), c_0, gates
    else:
        d_h, h_before, hs = _carry(d_h_n, d_h_0), h_0, out
    has_d_out = d_out is not None and not projects

    def launch(step: int, constants: dict) -> None:
        _stepwise_bwd_kernel[_grid(D, B, H, tiles)](
            d_out if has_d_out else hs,
            h_before,
            h_before if c_0 is None else c_0,
            hs,
            gates,
            hs if cs is None else cs,
            du,
            aux,
            d_h,
            d_h if d_c is None else d_c,
            dgates,
            step,
            T,
            B,
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
            (d, columns, w.w_hh[rows], dh[d] if projects else du[phase, d], float(i > 0))
            for d, w in enumerate(weights)
            for i, (columns, rows) in enumerate(runs)
        ]
        work.append((bwd_constants(cell, D, H, has_d_out, phase), terms))

    with on_device(out):
        for step in reversed(range(T)):
            times = (step, T - 1 - step)
            for d, w in enumerate(weights if projects else ()):
                if d_out is not None:
                    dh[d] += d_out[times[d], :, d * P : (d + 1) * P]
                torch.mm(dh[d], w.w_hr, out=du[0, d])
            for constants, terms in work:
                launch(step, constants)
                for d, columns, w_hh, target, beta in terms:
                    grads = dgates[d, times[d], :, columns]
                    torch.addmm(target, grads, w_hh, beta=beta, out=target)
        if projects:
            _hand_over((dh, d_h_0), (d_c, d_c_0))
        else:
            launch(-1, bwd_constants(cell, D, H, has_d_out, -1))
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


def bwd_constants(cell: str, D: int, H: int, has_d_out: bool, phase: int) -> dict:
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
    }


def _grid(D: int, B: int, H: int, tiles: Tiles) -> tuple[int, int, int]:
    return triton.cdiv(B, tiles.block_b), triton.cdiv(H, tiles.blocks[0][1]), D


def _carry(start: torch.Tensor | None, end: torch.Tensor | None) -> torch.Tensor | None:
    """What a state is carried in from step to step: ``end``, or fp32 where that has 16 bits."""
    if start is None or end is None:
        return None
    wide = end if end.dtype.itemsize > 2 else torch.empty_like(end, dtype=torch.float32)
    return wide.copy_(start)


def _hand_over(*states: tuple[torch.Tensor | None, torch.Tensor | None]) -> None:
    """Rounds what was carried into where it ends, unless it is there."""
    for carried, end in states:
        if carried is not None and end is not None and carried is not end:
            end.copy_(carried)
