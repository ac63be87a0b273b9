"""Schedule *resident*: one program owns BLOCK_B sequences for all T; its weights never leave it.

Axes: T time, B batch, R rows (``rows.py``), I input, H hidden, G gates, D directions, S saved
tiles, N gradient tiles (``spec.py``). Grid ``(cdiv(B, BLOCK_B), D)``: both directions of a layer
run in one launch, and no program waits for another. With members (an ensemble: equal parts of B
with weights of their own) it is ``(cdiv(B / members, BLOCK_B), D, members)``.

On chip for the whole launch: W_hh (and W_ih when PROJECT), the biases, and h and c in fp32. Only
dot operands and stores are rounded to the dtype of the tensors. What a step reads from memory does
not depend on h, so it is loaded one step ahead and overlaps the dots. Backward writes only
``dgates``; the weight gradients are library GEMMs over all T at once (``ops.py``): no atomics, and
two runs agree bit for bit.

Offsets are int64, T and B are run-time values: no binary depends on either.

Limits: W_hh must fit one SM (``plan.py`` says which H). One layer a launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .cells import CELLS
from .common import (
    add_tile,
    adjoint_products,
    all_columns,
    batch_tile,
    join,
    load_bias,
    load_left,
    load_rows,
    load_state,
    load_step,
    load_weight,
    no_tiles,
    only,
    pick,
    products,
    store_rows,
    store_state,
    time_of,
    to_float,
)
from .launch import cdiv, kept, launch_options, made_once, on_device
from .plan import Plan, Tiles
from .ragged import (
    enter,
    enter_gradient,
    first_row,
    leave,
    load_origins,
    present,
    shown,
)
from .rows import Rows
from .spec import SPECS, Weights


@triton.jit
def _load_x(
    x_rows, stride_x_t, origins_ptr, starts_ptr, t, T, B, pid_d, offs_b, mask_b,
    PROJECT: tl.constexpr, RAGGED: tl.constexpr, PACKED: tl.constexpr,
    I: tl.constexpr, G: tl.constexpr, H: tl.constexpr,
    I_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """x or gx of time t, and its origins."""
    origins = load_origins(origins_ptr, t, T, B, pid_d, offs_b, mask_b, RAGGED)
    here = present(origins, mask_b, RAGGED)
    # stride_x_t is of a row when packed.
    rows = x_rows + first_row(starts_ptr, t, 1, PACKED) * stride_x_t
    if PROJECT:
        return load_rows(rows, here, 0, 1, I, I_BLOCKS), origins
    else:
        return load_rows(rows, here, 0, G, H, BLOCKS), origins


@triton.jit(do_not_specialize=["T", "B", "R", "stride_x_t", "stride_x_b"])
def _resident_fwd_kernel(
    # inputs
    x_ptr,  # PROJECT: x [T, B, I] or [R, I], else gx [D, R, G*H] = x @ W_ih.T + b_ih
    w_ih_ptr,  # [G*H, I] of direction 0, read when PROJECT
    w_ih_reverse_ptr,  # of direction 1
    b_ih_ptr,  # [G*H]
    b_ih_reverse_ptr,
    w_hh_ptr,  # [G*H, H]
    w_hh_reverse_ptr,
    b_hh_ptr,  # [G*H]
    b_hh_reverse_ptr,
    h_0_ptr,  # [D, B, H]
    c_0_ptr,  # [D, B, H], read when STATES == 2
    origins_ptr,  # [D, T, B], read when RAGGED
    starts_ptr,  # [T], read when PACKED
    aux_ptr,  # what the cell's own functions read
    # outputs
    out_ptr,  # [R, D*H]
    gates_ptr,  # [D, R, S*H], written when SAVE == 2
    cs_ptr,  # [D, R, H], written when SAVE > 0 and STATES == 2
    h_n_ptr,  # [D, B, H]
    c_n_ptr,  # [D, B, H]
    # run-time sizes and strides, in elements
    T,
    B,
    R,  # rows of a direction
    stride_x_t,
    stride_x_b,
    # the cell
    OPERAND: tl.constexpr,
    FORWARD: tl.constexpr,
    PHASES: tl.constexpr,
    SAVED: tl.constexpr,
    STATES: tl.constexpr,
    # compile-time sizes and switches
    D: tl.constexpr,
    I: tl.constexpr,
    H: tl.constexpr,
    GATES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCKS: tl.constexpr,
    I_BLOCKS: tl.constexpr,
    PROJECT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE: tl.constexpr,
    RAGGED: tl.constexpr,
    PACKED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    MEMBERS: tl.constexpr,  # whether weights and biases are [members, ...]
):
    G: tl.constexpr = len(GATES)
    pid_d = tl.program_id(1).to(tl.int64)
    offs_b, mask_b = batch_tile(B, BLOCK_B, MEMBERS)
    if not PROJECT:
        x_ptr += pid_d * R * (G * H)
    state_rows = (pid_d * B + offs_b) * H

    if D == 2:
        w_hh_ptr = tl.where(pid_d == 0, w_hh_ptr, w_hh_reverse_ptr)
        b_hh_ptr = tl.where(pid_d == 0, b_hh_ptr, b_hh_reverse_ptr)
        w_ih_ptr = tl.where(pid_d == 0, w_ih_ptr, w_ih_reverse_ptr)
        b_ih_ptr = tl.where(pid_d == 0, b_ih_ptr, b_ih_reverse_ptr)
    if MEMBERS:
        first_unit = tl.program_id(2).to(tl.int64) * (G * H)
        w_hh_ptr += first_unit * H
        b_hh_ptr += first_unit
        w_ih_ptr += first_unit * I
        b_ih_ptr += first_unit
    w_hh = load_weight(w_hh_ptr, G, H, BLOCKS, H, BLOCKS, True)
    b_hh = load_bias(b_hh_ptr, 0, HAS_BIAS, G, H, BLOCKS)
    if PROJECT:
        w_ih = load_weight(w_ih_ptr, G, H, BLOCKS, I, I_BLOCKS, True)
        b_ih = load_bias(b_ih_ptr, 0, HAS_BIAS, G, H, BLOCKS)

    state = to_float(
        load_state(h_0_ptr + state_rows, c_0_ptr + state_rows, mask_b, 0, STATES, H, BLOCKS)
    )
    x_rows = x_ptr + offs_b * stride_x_b
    x, origins = _load_x(
        x_rows, stride_x_t, origins_ptr, starts_ptr, time_of(0, T, pid_d), T, B, pid_d, offs_b,
        mask_b, PROJECT, RAGGED, PACKED, I, G, H, I_BLOCKS, BLOCKS,
    )  # fmt: skip

    for step in range(T):
        t = time_of(step, T, pid_d)
        t_next = time_of(tl.minimum(step + 1, T - 1), T, pid_d)
        x_next, origins_next = _load_x(
            x_rows, stride_x_t, origins_ptr, starts_ptr, t_next, T, B, pid_d, offs_b,
            mask_b, PROJECT, RAGGED, PACKED, I, G, H, I_BLOCKS, BLOCKS,
        )  # fmt: skip
        ctx = (aux_ptr, t, offs_b, mask_b, H, all_columns(0, BLOCKS))
        if PROJECT:
            gx = products(pick(x, 0), w_ih, b_ih, (GATES,), 0, BLOCK_B, BLOCKS, INPUT_PRECISION)
        else:
            gx = to_float(x)

        entered = enter(state, origins, RAGGED)
        gh = no_tiles(BLOCKS)
        for p in tl.static_range(len(PHASES)):
            u = OPERAND(p, ctx, gx, gh, entered)
            gh = join(gh, products(u, w_hh, b_hh, PHASES, p, BLOCK_B, BLOCKS, INPUT_PRECISION))
        state, saved = FORWARD(ctx, gx, gh, entered)
        state = leave(state, entered, origins, RAGGED)

        first = first_row(starts_ptr, t, B, PACKED)
        here = present(origins, mask_b, PACKED)
        out = shown(state, origins, RAGGED)
        out_rows = out_ptr + (first + offs_b) * (D * H) + pid_d * H
        store_rows(out_rows, here, 0, only(out, 0), 0, H, BLOCKS)
        if SAVE:
            row = pid_d * R + first + offs_b  # scalars first: fewer registers
            if SAVE == 2:
                saved = shown(saved, origins, RAGGED)
                store_rows(gates_ptr + row * (len(SAVED) * H), here, 0, saved, 0, H, BLOCKS)
            if STATES == 2:
                store_rows(cs_ptr + row * H, here, 0, only(out, 1), 0, H, BLOCKS)
        x = x_next
        origins = origins_next

    store_state(h_n_ptr + state_rows, c_n_ptr + state_rows, mask_b, 0, state, STATES, H, BLOCKS)


@triton.jit(do_not_specialize=["T", "B", "R"])
def _resident_bwd_kernel(
    # inputs
    d_out_ptr,  # [R, D*H], read when HAS_D_OUT
    d_cs_ptr,  # [D, R, H], read when HAS_D_CS
    d_h_n_ptr,  # [D, B, H]
    d_c_n_ptr,  # [D, B, H], read when STATES == 2
    w_hh_ptr,  # [G*H, H] of direction 0
    w_hh_reverse_ptr,  # of direction 1
    h_0_ptr,  # [D, B, H]
    c_0_ptr,
    out_ptr,  # [R, D*H]
    gates_ptr,  # [D, R, S*H]
    cs_ptr,  # [D, R, H]
    origins_ptr,
    starts_ptr,
    aux_ptr,
    # outputs
    dgates_ptr,  # [D, R, N*H]
    d_h_0_ptr,  # [D, B, H]
    d_c_0_ptr,
    # run-time sizes
    T,
    B,
    R,
    # the cell
    ADJOINT: tl.constexpr,
    FOLD: tl.constexpr,
    PHASES: tl.constexpr,
    FIRST_TILE: tl.constexpr,  # of each phase, where its gradient tiles are stored
    FACTORS: tl.constexpr,  # for each gate of each phase, which gradient tile W multiplies
    GRAD_TILES: tl.constexpr,
    SAVED: tl.constexpr,
    STATES: tl.constexpr,
    # compile-time sizes and switches
    D: tl.constexpr,
    H: tl.constexpr,
    GATES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCKS: tl.constexpr,
    HAS_D_OUT: tl.constexpr,
    HAS_D_CS: tl.constexpr,
    RAGGED: tl.constexpr,
    PACKED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    pid_d = tl.program_id(1).to(tl.int64)
    offs_b, mask_b = batch_tile(B, BLOCK_B, MEMBERS)
    state_rows = (pid_d * B + offs_b) * H

    if D == 2:
        w_hh_ptr = tl.where(pid_d == 0, w_hh_ptr, w_hh_reverse_ptr)
    if MEMBERS:
        w_hh_ptr += tl.program_id(2).to(tl.int64) * (len(GATES) * H * H)
    w_hh = load_weight(w_hh_ptr, len(GATES), H, BLOCKS, H, BLOCKS, False)

    d_state = to_float(
        load_state(d_h_n_ptr + state_rows, d_c_n_ptr + state_rows, mask_b, 0, STATES, H, BLOCKS)
    )
    new = to_float(load_left(
        out_ptr, cs_ptr, origins_ptr, starts_ptr, time_of(T - 1, T, pid_d), T, B, R, pid_d, pid_d,
        offs_b, mask_b, 0, STATES, RAGGED, PACKED, D, H, BLOCKS,
    ))  # fmt: skip
    loaded = load_step(
        gates_ptr, cs_ptr, out_ptr, h_0_ptr, c_0_ptr, d_out_ptr, d_cs_ptr, origins_ptr, starts_ptr,
        T - 1, T, B, R, pid_d, pid_d, offs_b, mask_b, 0,
        SAVED, STATES, HAS_D_OUT, HAS_D_CS, RAGGED, PACKED, D, H, BLOCKS,
    )  # fmt: skip

    for back in range(T):
        step = T - 1 - back
        t = time_of(step, T, pid_d)
        earlier = load_step(
            gates_ptr, cs_ptr, out_ptr, h_0_ptr, c_0_ptr, d_out_ptr, d_cs_ptr, origins_ptr,
            starts_ptr, tl.maximum(step - 1, 0), T, B, R, pid_d, pid_d, offs_b, mask_b, 0,
            SAVED, STATES, HAS_D_OUT, HAS_D_CS, RAGGED, PACKED, D, H, BLOCKS,
        )  # fmt: skip
        saved = to_float(loaded[0])
        prev = to_float(loaded[1])
        origins = loaded[5]
        d_state = add_tile(d_state, to_float(loaded[2]), 0)
        d_state = add_tile(d_state, to_float(loaded[3]), 1)
        d_left = d_state

        ctx = (aux_ptr, t, offs_b, mask_b, H, all_columns(0, BLOCKS))
        row = pid_d * R + first_row(starts_ptr, t, B, PACKED) + offs_b
        dgates_rows = dgates_ptr + row * (GRAD_TILES * H)
        here = present(origins, mask_b, PACKED)
        du = no_tiles(BLOCKS)
        carry = no_tiles(BLOCKS)
        for later in tl.static_range(len(PHASES)):
            grads, d_state, carry = ADJOINT(
                len(PHASES) - 1 - later, ctx, d_state, du, saved, prev, new, carry
            )
            grads = shown(grads, origins, RAGGED)
            store_rows(dgates_rows, here, 0, grads, FIRST_TILE[len(PHASES) - 1 - later], H, BLOCKS)
            du = adjoint_products(
                grads, w_hh, PHASES, FACTORS, len(PHASES) - 1 - later, INPUT_PRECISION
            )
        d_state = enter_gradient(FOLD(ctx, d_state, du), d_left, origins, RAGGED)
        new = to_float(loaded[4]) if RAGGED else prev
        loaded = earlier

    ends = d_h_0_ptr + state_rows, d_c_0_ptr + state_rows
    store_state(*ends, mask_b, 0, d_state, STATES, H, BLOCKS)


def resident_fwd(
    cell: str,
    plan: Plan,
    x: torch.Tensor,
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

    x: if the plan projects in the kernel ``[T, B, I]``, packed ``[R, I]``, else
    ``gx [D, R, G*H]``; weights: one entry a direction, each tensor with ``plan.members`` in front
    if that is more than one; h_0, c_0, h_n, c_n: ``[D, B, H]``; out:
    ``[R, D*H]``; gates ``[D, R, S*H]`` and cs ``[D, R, H]``: None when not saved; rows:
    what R means; aux: what a cell's own functions read through ``ctx``. All but x contiguous.
    """
    tiles = plan.forward
    D, B, H = h_0.shape
    first, other = weights[0], weights[-1]
    stride_b = x.stride(-2)
    dense_t = x.stride(-3) if plan.i_blocks and rows.sizes is None else B * stride_b
    with on_device(out):
        _resident_fwd_kernel[grid(D, B, tiles, plan.members)](
            # A pointer that the switches below leave unread is any tensor of that dtype.
            x,
            first.w_ih,
            other.w_ih,
            first.w_hh if first.b_ih is None else first.b_ih,
            other.w_hh if other.b_ih is None else other.b_ih,
            first.w_hh,
            other.w_hh,
            first.w_hh if first.b_hh is None else first.b_hh,
            other.w_hh if other.b_hh is None else other.b_hh,
            h_0,
            h_0 if c_0 is None else c_0,
            rows.origins,
            rows.starts,
            aux,
            out,
            out if gates is None else gates,
            out if cs is None else cs,
            h_n,
            h_n if c_n is None else c_n,
            rows.T,
            B,
            rows.total,
            dense_t if rows.sizes is None else stride_b,
            stride_b,
            **_fwd_arguments(
                cell, plan, D, x.shape[-1], H, first.b_hh is not None, kept(gates, cs), rows
            ),
        )


def resident_bwd(
    cell: str,
    plan: Plan,
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
    """Runs one layer backwards and fills ``dgates [D, R, N*H]`` and d_h_0, d_c_0 ``[D, B, H]``.

    d_out: ``[R, D*H]``, d_cs: ``[D, R, H]``, the gradient of every c; each None where no gradient
    arrives; the rest as in ``resident_fwd``. All contiguous.
    """
    tiles = plan.backward
    D, B, H = h_0.shape
    with on_device(out):
        _resident_bwd_kernel[grid(D, B, tiles, plan.members)](
            out if d_out is None else d_out,
            out if d_cs is None else d_cs,
            d_h_n,
            d_h_n if d_c_n is None else d_c_n,
            weights[0].w_hh,
            weights[-1].w_hh,
            h_0,
            h_0 if c_0 is None else c_0,
            out,
            gates,
            out if cs is None else cs,
            rows.origins,
            rows.starts,
            aux,
            dgates,
            d_h_0,
            d_h_0 if d_c_0 is None else d_c_0,
            rows.T,
            B,
            rows.total,
            **_bwd_arguments(cell, plan, D, H, d_out is not None, d_cs is not None, rows),
        )


def fwd_constants(
    cell: str,
    plan: Plan,
    D: int,
    I: int,
    H: int,
    has_bias: bool,
    save: int,
    rows: Rows,
) -> dict:
    """The compile-time arguments of the forward kernel; together with dtypes, one binary each."""
    tiles, spec = plan.forward, SPECS[cell]
    return {
        "OPERAND": CELLS[cell].operand,
        "FORWARD": CELLS[cell].forward,
        "PHASES": spec.phases,
        "SAVED": tuple(range(spec.saved)),
        "STATES": spec.states,
        "D": D,
        "I": I if plan.i_blocks else 0,
        "H": H,
        "GATES": tuple(range(spec.gates)),
        "BLOCK_B": tiles.block_b,
        "BLOCKS": tiles.blocks,
        "I_BLOCKS": plan.i_blocks,
        "PROJECT": bool(plan.i_blocks),
        "HAS_BIAS": has_bias,
        "SAVE": save,
        "INPUT_PRECISION": tiles.input_precision,
        "MEMBERS": plan.members > 1,
        **rows.switches,
    }


def bwd_constants(
    cell: str, plan: Plan, D: int, H: int, has_d_out: bool, has_d_cs: bool, rows: Rows
) -> dict:
    """The compile-time arguments of the backward kernel."""
    tiles, spec = plan.backward, SPECS[cell]
    return {
        "ADJOINT": CELLS[cell].adjoint,
        "FOLD": CELLS[cell].fold,
        "PHASES": spec.phases,
        "FIRST_TILE": spec.first_tiles,
        "FACTORS": spec.factors,
        "GRAD_TILES": spec.grad_tiles,
        "SAVED": tuple(range(spec.saved)),
        "STATES": spec.states,
        "D": D,
        "H": H,
        "GATES": tuple(range(spec.gates)),
        "BLOCK_B": tiles.block_b,
        "BLOCKS": tiles.blocks,
        "HAS_D_OUT": has_d_out,
        "HAS_D_CS": has_d_cs,
        "INPUT_PRECISION": tiles.input_precision,
        "MEMBERS": plan.members > 1,
        **rows.switches,
    }


_fwd_arguments = made_once(fwd_constants, lambda plan: launch_options(plan.forward))
_bwd_arguments = made_once(bwd_constants, lambda plan: launch_options(plan.backward))


def grid(D: int, B: int, tiles: Tiles, members: int = 1) -> tuple[int, int, int]:
    """The programs of a launch."""
    return cdiv(B // members, tiles.block_b), D, members
