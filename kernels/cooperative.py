"""Schedule *cooperative*: several programs share a batch tile, each owns a slice of hidden units.

Axes: T time, B batch, H hidden, G gates, L layers, D directions, Z = L*D, S saved tiles, N gradient
tiles (``spec.py``). Grid ``(cdiv(H, BLOCK_H), cdiv(B, BLOCK_B), Z)``. A program owns all gates of
BLOCK_H units, so c and every gate stay with it; only h (forward) and dgates (backward) are handed
round, by the protocol in ``exchange.py``. Programs wait for those of their own batch tile alone.

On chip for the whole launch: the rows of W_hh (backward: the columns) that belong to the slice.
h_t is exchanged through ``out`` and the gradients through ``dgates``, which are written anyway and
only once. In each step: loads that do not depend on h, wait, load h, products, cell, store,
publish.

**Wavefront**: with L > 1 (one direction) all layers run in this launch. Layer l at step t needs
h_t of layer l-1 and h_{t-1} of its own, so it runs one step behind: T + L - 1 steps instead of T*L.
It then also holds W_ih, and projects its own input. Backward runs the other way: layer l takes
dy_t out of the dgates of layer l+1. Both directions of one layer (D = 2) share a launch likewise.

No float is added atomically: two runs agree bit for bit. Offsets are int64; T and B are run-time
values.

Limits: a launch must fit the chip at once (``launch_cooperative_grid`` refuses it otherwise), so
``plan.py`` puts at most one program on an SM, and larger batches go in rounds; a cell that reduces
over a row of H needs all of it in one program (``CellSpec.rowwise``), and stacked layers with two
directions need the whole of the layer below, hence a launch each.
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
    join,
    load_bias,
    load_rows,
    load_state,
    load_step,
    no_tiles,
    only,
    store_rows,
    time_of,
    to_float,
)
from .exchange import Workspace, publish, wait
from .launch import cooperative_options, in_rounds, mask_of_each_layer
from .plan import Plan, Tiles
from .slices import choose, gate_products, gradient_product, load_operand, load_slice, masked
from .spec import SPECS, Weights

#: Polls of one wait before it traps: about 10 seconds, if one takes 0.65 us as modelled.
PATIENCE = 1 << 24


@triton.jit(do_not_specialize=["T", "B", "first_tile", "patience"])
def _cooperative_fwd_kernel(
    # inputs
    gx_ptr,  # [D, T, B, G*H] = x @ W_ih.T + b_ih of the first layer
    w_ih_ptrs,  # [layer], [G*H, H] each, read by the layers above the first
    b_ih_ptrs,  # [layer], [G*H]
    w_hh_ptrs,  # [Z], [G*H, H]
    b_hh_ptrs,  # [Z], [G*H]
    mask_ptrs,  # [layer], [T, B, H]: the factor of each layer's input, read when HAS_MASK
    h_0_ptr,  # [Z, B, H]
    c_0_ptr,  # [Z, B, H], read when STATES == 2
    aux_ptr,  # what the cell's own functions read
    # outputs
    out_ptrs,  # [Z], [T, B, D*H]
    gates_ptr,  # [Z, T, B, S*H], written when SAVE
    cs_ptr,  # [Z, T, B, H], written when SAVE and STATES == 2
    h_n_ptr,  # [Z, B, H]
    c_n_ptr,  # [Z, B, H]
    # workspace
    slots_ptr,  # [Z, 2, P, B, H]: operands that are not h itself
    counters_ptr,  # [Z, cdiv(B, BLOCK_B)], zero
    # run-time sizes
    T,
    B,
    first_tile,  # of the batch tiles of this launch
    patience,
    # the cell
    OPERAND: tl.constexpr,
    FORWARD: tl.constexpr,
    PHASES: tl.constexpr,
    SAVED: tl.constexpr,
    STATES: tl.constexpr,
    SHARES_H: tl.constexpr,  # phase 0 multiplies h itself, which is in out
    # compile-time sizes and switches
    L: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    GATES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCKS: tl.constexpr,  # ((0, BLOCK_H),)
    K_CHUNKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SAVE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    G: tl.constexpr = len(GATES)
    P: tl.constexpr = len(PHASES)
    EACH: tl.constexpr = P if SHARES_H else P + 1  # publications: h, and operands that are not h
    pid_z = tl.program_id(2).to(tl.int64)
    pid_d = pid_z % D
    start = tl.program_id(0) * BLOCKS[0][1]
    pid_b = first_tile + tl.program_id(1)
    offs_b = pid_b.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < B
    members = tl.num_programs(0)
    groups = tl.cdiv(B, BLOCK_B)  # of a layer and direction
    counter_ptr = counters_ptr + pid_z * groups + pid_b
    out_ptr = choose(out_ptrs, pid_z)
    first_rows = (pid_z * B + offs_b) * H

    w_hh = load_slice(choose(w_hh_ptrs, pid_z), start, G, H, BLOCKS[0][1], K_CHUNKS, True)
    b_hh = load_bias(choose(b_hh_ptrs, pid_z), start, HAS_BIAS, G, H, BLOCKS)
    mask_x = offs_b < tl.where(pid_z < D, B, 0)  # the layers above project their own input
    if L > 1:
        w_ih = load_slice(choose(w_ih_ptrs, pid_z), start, G, H, BLOCKS[0][1], K_CHUNKS, True)
        b_ih = load_bias(choose(b_ih_ptrs, pid_z), start, HAS_BIAS, G, H, BLOCKS)
        below_ptr = choose(out_ptrs, tl.maximum(pid_z - 1, 0))
    state = to_float(
        load_state(h_0_ptr + first_rows, c_0_ptr + first_rows, mask_b, start, STATES, H, BLOCKS)
    )

    for step in range(T):
        t = time_of(step, T, pid_d)
        published = members * EACH * step
        ctx = (aux_ptr, t, offs_b, mask_b, H, all_columns(start, BLOCKS))
        row = ((pid_d * T + t) * B + offs_b) * (G * H)
        gx = to_float(load_rows(gx_ptr + row, mask_x, start, G, H, BLOCKS))
        if L > 1:
            if pid_z > 0:
                wait(counter_ptr - groups, published + members * EACH, patience)
                x = load_operand(below_ptr + (t * B + offs_b) * H, mask_b, H, K_CHUNKS)
                if HAS_MASK:
                    rows = choose(mask_ptrs, pid_z) + (t * B + offs_b) * H
                    x = masked(x, load_operand(rows, mask_b, H, K_CHUNKS))
                gx = gate_products(x, w_ih, b_ih, (GATES,), 0, INPUT_PRECISION)

        gh = no_tiles(BLOCKS)
        for p in tl.static_range(P):
            if SHARES_H and p == 0:
                t_prev = time_of(tl.maximum(step - 1, 0), T, pid_d)
                # Scalars are chosen, for a choice of vectors loses their alignment (Triton 3.9).
                base = tl.where(step > 0, t_prev * B * (D * H) + pid_d * H, pid_z * B * H)
                rows = tl.where(step > 0, out_ptr, h_0_ptr) + base
                rows += offs_b * tl.where(step > 0, D * H, H)
            else:
                rows = slots_ptr + (((pid_z * 2 + step % 2) * P + p) * B + offs_b) * H
                u = OPERAND(p, ctx, gx, gh, state)
                store_rows(rows, mask_b, start, only((u,), 0), 0, H, BLOCKS)
                publish(counter_ptr)
                published += members
            wait(counter_ptr, published, patience)
            u_all = load_operand(rows, mask_b, H, K_CHUNKS)
            gh = join(gh, gate_products(u_all, w_hh, b_hh, PHASES, p, INPUT_PRECISION))
        state, saved = FORWARD(ctx, gx, gh, state)

        row = (t * B + offs_b) * (D * H) + pid_d * H
        store_rows(out_ptr + row, mask_b, start, only(state, 0), 0, H, BLOCKS)
        publish(counter_ptr)
        if SAVE:  # nobody waits for these
            row = (pid_z * T + t) * B + offs_b
            store_rows(gates_ptr + row * (len(SAVED) * H), mask_b, start, saved, 0, H, BLOCKS)
            if STATES == 2:
                store_rows(cs_ptr + row * H, mask_b, start, only(state, 1), 0, H, BLOCKS)

    store_rows(h_n_ptr + first_rows, mask_b, start, only(state, 0), 0, H, BLOCKS)
    if STATES == 2:
        store_rows(c_n_ptr + first_rows, mask_b, start, only(state, 1), 0, H, BLOCKS)


@triton.jit(do_not_specialize=["T", "B", "first_tile", "patience"])
def _cooperative_bwd_kernel(
    # inputs
    d_out_ptr,  # [T, B, D*H] of the last layer, read when HAS_D_OUT
    d_h_n_ptr,  # [Z, B, H]
    d_c_n_ptr,  # [Z, B, H], read when STATES == 2
    w_ih_ptrs,  # [layer], [G*H, H] each: of layer l+1 for layer l
    w_hh_ptrs,  # [Z], [G*H, H]
    mask_ptrs,  # [layer], [T, B, H], as in the forward kernel
    h_0_ptr,  # [Z, B, H]
    c_0_ptr,
    out_ptrs,  # [Z], [T, B, D*H]
    gates_ptr,  # [Z, T, B, S*H]
    cs_ptr,  # [Z, T, B, H]
    aux_ptr,
    # outputs
    dgates_ptr,  # [Z, T, B, N*H]
    d_h_0_ptr,  # [Z, B, H]
    d_c_0_ptr,
    # workspace
    counters_ptr,  # [Z, cdiv(B, BLOCK_B)], zero
    # run-time sizes
    T,
    B,
    first_tile,  # of the batch tiles of this launch
    patience,
    # the cell
    ADJOINT: tl.constexpr,
    FOLD: tl.constexpr,
    PHASES: tl.constexpr,
    FIRST_TILE: tl.constexpr,  # of each phase, where its gradient tiles are stored
    TILES: tl.constexpr,  # for each gate of each phase, which tile of dgates W multiplies
    GRAD_TILES: tl.constexpr,
    SAVED: tl.constexpr,
    STATES: tl.constexpr,
    # compile-time sizes and switches
    L: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    GATES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCKS: tl.constexpr,
    K_CHUNKS: tl.constexpr,
    HAS_D_OUT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    G: tl.constexpr = len(GATES)
    P: tl.constexpr = len(PHASES)
    # Numbered from the last layer, for whoever waits should come after whom it waits for.
    pid_z = L * D - 1 - tl.program_id(2).to(tl.int64)
    pid_d = pid_z % D
    start = tl.program_id(0) * BLOCKS[0][1]
    pid_b = first_tile + tl.program_id(1)
    offs_b = pid_b.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < B
    members = tl.num_programs(0)
    groups = tl.cdiv(B, BLOCK_B)  # of a layer and direction
    counter_ptr = counters_ptr + pid_z * groups + pid_b
    out_ptr = choose(out_ptrs, pid_z)
    first_rows = (pid_z * B + offs_b) * H

    w_hh = load_slice(choose(w_hh_ptrs, pid_z), start, G, H, BLOCKS[0][1], K_CHUNKS, False)
    if L > 1:
        above = tl.minimum(pid_z + 1, L - 1)
        w_ih = load_slice(choose(w_ih_ptrs, above), start, G, H, BLOCKS[0][1], K_CHUNKS, False)
    d_state = to_float(
        load_state(d_h_n_ptr + first_rows, d_c_n_ptr + first_rows, mask_b, start, STATES, H, BLOCKS)
    )
    last = time_of(T - 1, T, pid_d)
    h_rows = out_ptr + (last * B + offs_b) * (D * H) + pid_d * H
    c_rows = cs_ptr + ((pid_z * T + last) * B + offs_b) * H
    new = to_float(load_state(h_rows, c_rows, mask_b, start, STATES, H, BLOCKS))
    loaded = load_step(
        gates_ptr, cs_ptr, out_ptr, h_0_ptr, c_0_ptr, d_out_ptr,
        T - 1, T, B, pid_z, pid_d, offs_b, mask_b, start,
        SAVED, STATES, HAS_D_OUT, D, H, BLOCKS,
    )  # fmt: skip

    for back in range(T):
        step = T - 1 - back
        t = time_of(step, T, pid_d)
        published = members * P * back
        # On its way through memory while this step waits for the others.
        earlier = load_step(
            gates_ptr, cs_ptr, out_ptr, h_0_ptr, c_0_ptr, d_out_ptr,
            tl.maximum(step - 1, 0), T, B, pid_z, pid_d, offs_b, mask_b, start,
            SAVED, STATES, HAS_D_OUT, D, H, BLOCKS,
        )  # fmt: skip
        saved = to_float(loaded[0])
        prev = to_float(loaded[1])
        ctx = (aux_ptr, t, offs_b, mask_b, H, all_columns(start, BLOCKS))
        rows = dgates_ptr + ((pid_z * T + t) * B + offs_b) * (GRAD_TILES * H)
        if HAS_D_OUT:  # which is of the last layer
            dy = loaded[2][0][0].to(tl.float32)
            d_state = add_first(d_state, (tl.where(pid_z >= (L - 1) * D, dy, 0.0),))
        if L > 1:
            if pid_z < L - 1:
                wait(counter_ptr + groups, published + members * P, patience)
                dy = gradient_product(
                    rows + T.to(tl.int64) * B * (GRAD_TILES * H),
                    mask_b, w_ih, (GATES,), (GATES,), 0, H, K_CHUNKS, INPUT_PRECISION,
                )  # fmt: skip
                if HAS_MASK:
                    mask_rows = choose(mask_ptrs, above) + (t * B + offs_b) * H
                    dy *= to_float(load_rows(mask_rows, mask_b, start, 1, H, BLOCKS))[0][0]
                d_state = add_first(d_state, (dy,))

        du = no_tiles(BLOCKS)
        carry = no_tiles(BLOCKS)
        for p in tl.static_range(P):  # from the last phase to the first
            grads, d_state, carry = ADJOINT(P - 1 - p, ctx, d_state, du, saved, prev, new, carry)
            store_rows(rows, mask_b, start, grads, FIRST_TILE[P - 1 - p], H, BLOCKS)
            publish(counter_ptr)
            wait(counter_ptr, published + members * (p + 1), patience)
            product = gradient_product(
                rows, mask_b, w_hh, TILES, PHASES, P - 1 - p, H, K_CHUNKS, INPUT_PRECISION
            )
            du = (product,)
        d_state = FOLD(ctx, d_state, du)
        new = prev
        loaded = earlier

    store_rows(d_h_0_ptr + first_rows, mask_b, start, only(d_state, 0), 0, H, BLOCKS)
    if STATES == 2:
        store_rows(d_c_0_ptr + first_rows, mask_b, start, only(d_state, 1), 0, H, BLOCKS)


def cooperative_fwd(
    cell: str,
    plan: Plan,
    gx: torch.Tensor,
    weights: Sequence[Weights],
    masks: Sequence[torch.Tensor],
    h_0: torch.Tensor,
    c_0: torch.Tensor | None,
    outs: Sequence[torch.Tensor],
    h_n: torch.Tensor,
    c_n: torch.Tensor | None,
    gates: torch.Tensor | None,
    cs: torch.Tensor | None,
    workspace: Workspace,
    aux: torch.Tensor | None = None,
    patience: int = PATIENCE,
) -> None:
    """Runs the layers of one launch and fills ``outs``, ``h_n``, ``c_n`` and what is saved.

    gx: ``[D, T, B, G*H]``, of the first layer; weights: one entry for each layer and direction
    (Z of them); masks: dropout factors ``[T, B, H]`` between the layers, L - 1 or none; h_0, c_0,
    h_n, c_n: ``[Z, B, H]``; outs: ``[T, B, D*H]`` for each layer; gates ``[Z, T, B, S*H]`` and
    cs ``[Z, T, B, H]``: None when nothing is saved; workspace: of ``exchange.workspace``, fresh for
    each call. All contiguous.
    """
    tiles = plan.forward
    (T, B, _), H = outs[0].shape, h_0.shape[-1]
    D, L = gx.shape[0], len(outs)

    def launch(grid: tuple[int, int, int], first_tile: int) -> None:
        _cooperative_fwd_kernel[grid](
            gx,
            # A pointer that the switches below leave unread is any tensor of that dtype.
            tuple(w.w_ih for w in weights),
            tuple(w.w_hh if w.b_ih is None else w.b_ih for w in weights),
            tuple(w.w_hh for w in weights),
            tuple(w.w_hh if w.b_hh is None else w.b_hh for w in weights),
            mask_of_each_layer(masks, gx, L),
            h_0,
            h_0 if c_0 is None else c_0,
            aux,
            tuple(outs[z // D] for z in range(L * D)),
            gx if gates is None else gates,
            gx if cs is None else cs,
            h_n,
            h_n if c_n is None else c_n,
            workspace.slots,
            workspace.counters,
            T,
            B,
            first_tile,
            patience,
            **fwd_constants(
                cell, plan, L, D, H, weights[0].b_hh is not None, bool(masks), gates is not None
            ),
            **cooperative_options(tiles),
        )

    in_rounds(launch, tiles, gx, B, H, L * D)


def cooperative_bwd(
    cell: str,
    plan: Plan,
    d_out: torch.Tensor | None,
    d_h_n: torch.Tensor,
    d_c_n: torch.Tensor | None,
    weights: Sequence[Weights],
    masks: Sequence[torch.Tensor],
    h_0: torch.Tensor,
    c_0: torch.Tensor | None,
    outs: Sequence[torch.Tensor],
    gates: torch.Tensor,
    cs: torch.Tensor | None,
    dgates: torch.Tensor,
    d_h_0: torch.Tensor,
    d_c_0: torch.Tensor | None,
    workspace: Workspace,
    aux: torch.Tensor | None = None,
    patience: int = PATIENCE,
) -> None:
    """Runs those layers backwards: fills ``dgates [Z, T, B, N*H]``, d_h_0, d_c_0 ``[Z, B, H]``.

    d_out: ``[T, B, D*H]`` of the last layer, None where no gradient reaches it; the rest as in
    ``cooperative_fwd``.
    """
    tiles = plan.backward
    assert tiles is not None
    (T, B, _), (Z, _, H), L = outs[0].shape, h_0.shape, len(outs)

    def launch(grid: tuple[int, int, int], first_tile: int) -> None:
        _cooperative_bwd_kernel[grid](
            gates if d_out is None else d_out,
            d_h_n,
            d_h_n if d_c_n is None else d_c_n,
            tuple(w.w_ih for w in weights),
            tuple(w.w_hh for w in weights),
            mask_of_each_layer(masks, gates, L),
            h_0,
            h_0 if c_0 is None else c_0,
            tuple(outs[z * L // Z] for z in range(Z)),
            gates,
            gates if cs is None else cs,
            aux,
            dgates,
            d_h_0,
            d_h_0 if d_c_0 is None else d_c_0,
            workspace.counters,
            T,
            B,
            first_tile,
            patience,
            **bwd_constants(cell, plan, L, Z // L, H, d_out is not None, bool(masks)),
            **cooperative_options(tiles),
        )

    in_rounds(launch, tiles, gates, B, H, Z)


def fwd_constants(
    cell: str, plan: Plan, L: int, D: int, H: int, has_bias: bool, has_mask: bool, save: bool
) -> dict:
    """The compile-time arguments of the forward kernel; together with dtypes, one binary each."""
    return _constants(cell, plan.forward, L, D, H, has_mask) | {
        "OPERAND": CELLS[cell].operand,
        "FORWARD": CELLS[cell].forward,
        "SHARES_H": SPECS[cell].operands[0] == "h",
        "HAS_BIAS": has_bias,
        "SAVE": save,
    }


def bwd_constants(
    cell: str, plan: Plan, L: int, D: int, H: int, has_d_out: bool, has_mask: bool
) -> dict:
    """The compile-time arguments of the backward kernel."""
    spec = SPECS[cell]
    assert plan.backward is not None
    return _constants(cell, plan.backward, L, D, H, has_mask) | {
        "ADJOINT": CELLS[cell].adjoint,
        "FOLD": CELLS[cell].fold,
        "FIRST_TILE": spec.first_tiles,
        "TILES": tuple(tuple(spec.recurrent[g] for g in gates) for gates in spec.phases),
        "GRAD_TILES": spec.grad_tiles,
        "HAS_D_OUT": has_d_out,
    }


def _constants(cell: str, tiles: Tiles, L: int, D: int, H: int, has_mask: bool) -> dict:
    spec = SPECS[cell]
    return {
        "PHASES": spec.phases,
        "SAVED": tuple(range(spec.saved)),
        "STATES": spec.states,
        "L": L,
        "D": D,
        "H": H,
        "GATES": tuple(range(spec.gates)),
        "BLOCK_B": tiles.block_b,
        "BLOCKS": tiles.blocks,
        "K_CHUNKS": tiles.k_chunks,
        "HAS_MASK": has_mask,
        "INPUT_PRECISION": tiles.input_precision,
    }
