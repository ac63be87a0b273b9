"""Schedule *stepwise*: a library GEMM and one fused elementwise launch a step; any H, B and dtype.

Axes: T time, B batch, R rows (``rows.py``), H hidden, G gates, D directions, S saved tiles,
N gradient tiles (``spec.py``). Grid ``(cdiv(B, BLOCK_B), cdiv(H, BLOCK_H), D)``: one program owns
BLOCK_B sequences times BLOCK_H units of one direction in one step. The host runs the loop over T.

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

import triton
import triton.language as tl

from .common import (
    add_tile,
    all_columns,
    load_left,
    load_rows,
    load_state,
    load_step,
    no_tiles,
    only,
    pick,
    store_rows,
    store_state,
    time_of,
    to_float,
)
from .ragged import (
    SKIPPED,
    enter,
    enter_gradient,
    first_row,
    leave,
    load_origins,
    present,
    shown,
)


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


@triton.jit(do_not_specialize=["step", "T", "B", "R"])
def _stepwise_fwd_kernel(
    # inputs
    gx_ptr,  # [D, R, G*H] = x @ W_ih.T + b_ih
    gh_ptr,  # [D, B, G*H], of which the first READY gates are read
    b_hh_ptr,  # [G*H] of direction 0, read when HAS_BIAS
    b_hh_reverse_ptr,  # of direction 1
    origins_ptr,  # [D, T, B], read when RAGGED
    starts_ptr,  # [T], read when PACKED
    aux_ptr,  # what the cell's own functions read
    # read, and written when READY == G
    h_ptr,  # [D, B, H] in fp32, or fp64 where all is fp64
    c_ptr,  # likewise, when STATES == 2
    # outputs
    u_ptr,  # [D, B, H], the operand of PHASE
    out_ptr,  # [R, D*H], this and the rest written when READY == G
    gates_ptr,  # [D, R, S*H], written when SAVE == 2
    cs_ptr,  # [D, R, H], written when SAVE > 0 and STATES == 2
    # run-time sizes
    step,
    T,
    B,
    R,  # rows of a direction
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
    RAGGED: tl.constexpr,
    PACKED: tl.constexpr,
):
    pid_d = tl.program_id(2).to(tl.int64)
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    start = tl.program_id(1) * BLOCKS[0][1]
    mask_b = offs_b < B
    row = pid_d * B + offs_b
    if D == 2:
        b_hh_ptr = tl.where(pid_d == 0, b_hh_ptr, b_hh_reverse_ptr)

    t = time_of(step, T, pid_d)
    origins = load_origins(origins_ptr, t, T, B, pid_d, offs_b, mask_b, RAGGED)
    here = present(origins, mask_b, RAGGED)
    out_row = first_row(starts_ptr, t, B, PACKED) + offs_b
    gx_rows = gx_ptr + (pid_d * R + out_row) * (G * H)
    gx = to_float(load_rows(gx_rows, here, start, G, H, BLOCKS))
    gh = _load_products(gh_ptr + row * (G * H), b_hh_ptr, mask_b, start, READY, HAS_BIAS, H, BLOCKS)
    state = load_state(h_ptr + row * H, c_ptr + row * H, mask_b, start, STATES, H, BLOCKS)
    state = enter(state, origins, RAGGED)
    if READY == G:
        ctx = (aux_ptr, t, offs_b, mask_b, H, all_columns(start, BLOCKS))
        entered = state
        state, saved = FORWARD(ctx, gx, gh, entered)
        state = leave(state, entered, origins, RAGGED)
        store_state(h_ptr + row * H, c_ptr + row * H, mask_b, start, state, STATES, H, BLOCKS)
        here = present(origins, mask_b, PACKED)
        out = shown(state, origins, RAGGED)
        out_rows = out_ptr + out_row * (D * H) + pid_d * H
        store_rows(out_rows, here, start, only(out, 0), 0, H, BLOCKS)
        if SAVE:
            step_row = pid_d * R + out_row
            if SAVE == 2:
                saved = shown(saved, origins, RAGGED)
                gates_rows = gates_ptr + step_row * (len(SAVED) * H)
                store_rows(gates_rows, here, start, saved, 0, H, BLOCKS)
            if STATES == 2:
                cs_rows = cs_ptr + step_row * H
                store_rows(cs_rows, here, start, only(out, 1), 0, H, BLOCKS)
        # The rest belongs to the next step. After the last one nobody reads what comes out.
        t = time_of(tl.minimum(step + 1, T - 1), T, pid_d)
        origins = load_origins(origins_ptr, t, T, B, pid_d, offs_b, mask_b, RAGGED)
        state = enter(state, origins, RAGGED)
        gx_rows = gx_ptr + (pid_d * R + first_row(starts_ptr, t, B, PACKED) + offs_b) * (G * H)
        here = present(origins, mask_b, RAGGED)
        gx = to_float(load_rows(gx_rows, here, start, G, H, BLOCKS))
        gh = no_tiles(BLOCKS)

    ctx = (aux_ptr, t, offs_b, mask_b, H, all_columns(start, BLOCKS))
    u = OPERAND(PHASE, ctx, gx, gh, state)
    store_rows(u_ptr + row * H, mask_b, start, _as_rows(u), 0, H, BLOCKS)


@triton.jit(do_not_specialize=["step", "T", "B", "R"])
def _stepwise_bwd_kernel(
    # inputs
    d_out_ptr,  # [R, D*H], read when HAS_D_OUT
    d_cs_ptr,  # [D, R, H], read when HAS_D_CS
    h_0_ptr,  # [D, B, H]
    c_0_ptr,
    out_ptr,  # [R, D*H]
    gates_ptr,  # [D, R, S*H]
    cs_ptr,  # [D, R, H]
    du_ptr,  # [P, D, B, H], the gradients of the operands; of phase 0 the later step's
    origins_ptr,
    starts_ptr,
    aux_ptr,
    # read, and written when PHASE <= 0
    d_h_ptr,  # [D, B, H] in fp32, or fp64 where all is fp64
    d_c_ptr,  # likewise, when STATES == 2
    # output
    dgates_ptr,  # [D, R, N*H], of which the tiles of PHASE are written
    # run-time sizes
    step,
    T,
    B,
    R,  # rows of a direction
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
    HAS_D_CS: tl.constexpr,
    RAGGED: tl.constexpr,
    PACKED: tl.constexpr,
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
    origins = load_origins(origins_ptr, t, T, B, pid_d, offs_b, mask_b, RAGGED)
    ctx = (aux_ptr, t, offs_b, mask_b, H, all_columns(start, BLOCKS))
    d_state = load_state(d_h_rows, d_c_rows, mask_b, start, STATES, H, BLOCKS)
    du = pick(to_float(load_rows(du_ptr + row * H, mask_b, start, 1, H, BLOCKS)), 0)
    folded = FOLD(ctx, d_state, du)
    if RAGGED:
        origins = tl.where(step < T - 1, origins, SKIPPED)
    d_state = enter_gradient(folded, d_state, origins, RAGGED)

    if PHASE >= 0:
        t = time_of(step, T, pid_d)
        ctx = (aux_ptr, t, offs_b, mask_b, H, all_columns(start, BLOCKS))
        loaded = load_step(
            gates_ptr, cs_ptr, out_ptr, h_0_ptr, c_0_ptr, d_out_ptr, d_cs_ptr, origins_ptr,
            starts_ptr, step, T, B, R, pid_d, pid_d, offs_b, mask_b, start,
            SAVED, STATES, HAS_D_OUT, HAS_D_CS, RAGGED, PACKED, D, H, BLOCKS,
        )  # fmt: skip
        saved = to_float(loaded[0])
        prev = to_float(loaded[1])
        origins = loaded[5]
        d_state = add_tile(d_state, to_float(loaded[2]), 0)
        d_state = add_tile(d_state, to_float(loaded[3]), 1)
        d_left = d_state
        new = to_float(load_left(
            out_ptr, cs_ptr, origins_ptr, starts_ptr, t, T, B, R, pid_d, pid_d,
            offs_b, mask_b, start, STATES, RAGGED, PACKED, D, H, BLOCKS,
        ))  # fmt: skip
        du = no_tiles(BLOCKS)
        carry = no_tiles(BLOCKS)
        for later in tl.static_range(P - PHASE):
            if later > 0:
                du_rows = du_ptr + ((P - later) * D * B + row) * H
                du = pick(to_float(load_rows(du_rows, mask_b, start, 1, H, BLOCKS)), 0)
            grads, d_state, carry = ADJOINT(
                P - 1 - later, ctx, d_state, du, saved, prev, new, carry
            )
        # A skipped step's part of d_state stays; a cut is made when the step before begins.
        d_state = leave(d_state, d_left, origins, RAGGED)
        grads = shown(grads, origins, RAGGED)
        step_row = pid_d * R + first_row(starts_ptr, t, B, PACKED) + offs_b
        dgates_rows = dgates_ptr + step_row * (GRAD_TILES * H)
        here = present(origins, mask_b, PACKED)
        store_rows(dgates_rows, here, start, grads, FIRST_TILE[PHASE], H, BLOCKS)

    if PHASE <= 0:
        store_state(d_h_rows, d_c_rows, mask_b, start, d_state, STATES, H, BLOCKS)
