"""Schedule *cooperative*: several programs share a batch tile, each owns a slice of hidden units.

Axes: T time, B batch, R rows (``rows.py``), H hidden, G gates, L layers, D directions, Z = L*D,
S saved tiles, N gradient tiles (``spec.py``). Grid ``(cdiv(H, BLOCK_H), cdiv(B, BLOCK_B), Z)``. A
program owns all gates of BLOCK_H units, so c and every gate stay with it; only h (forward) and
dgates (backward) are handed round, by the protocol in ``exchange.py``. Programs wait for those of
their own batch tile alone.

On chip for the whole launch: the rows of W_hh (backward: the columns) that belong to the slice.
h_t is exchanged through ``out`` and the gradients through ``dgates``, which are written anyway and
only once. In each step: loads that do not depend on h, wait, load h, products, cell, store,
publish.

**Wavefront**: with L > 1 (one direction) all layers run in this launch. Layer l at step t needs
h_t of layer l-1 and h_{t-1} of its own, so it runs one step behind: T + L - 1 steps instead of T*L.
It then also holds W_ih, and projects its own input. Backward runs the other way: layer l takes
dy_t out of the dgates of layer l+1. Both directions of one layer (D = 2) share a launch likewise.

With members (an ensemble: equal parts of B with weights of their own) a batch tile has sequences of
one member only, and its programs hold that member's weights.

No float is added atomically: two runs agree bit for bit. Offsets are int64; T and B are run-time
values.

Limits: a launch must fit the chip at once (``launch_cooperative_grid`` refuses it otherwise), so
``plan.py`` puts at most one program on an SM, and larger batches go in rounds; a cell that reduces
over a row of H needs all of it in one program (``CellSpec.rowwise``), and stacked layers with two
directions need the whole of the layer below, hence a launch each.
"""

import triton
import triton.language as tl

from .common import (
    add_tile,
    all_columns,
    join,
    load_bias,
    load_left,
    load_rows,
    load_state,
    load_step,
    no_tiles,
    only,
    store_rows,
    store_state,
    tile_of_member,
    time_of,
    to_float,
)
from .exchange import publish, wait
from .ragged import (
    enter,
    enter_gradient,
    first_row,
    leave,
    load_origins,
    present,
    shown,
)
from .slices import (
    choose,
    gate_products,
    gradient_product,
    load_operand,
    load_previous,
    load_slice,
    masked,
    part,
)


@triton.jit(do_not_specialize=["T", "B", "R", "first_tile", "patience", "each"])
def _cooperative_fwd_kernel(
    # inputs
    gx_ptr,  # [D, R, G*H] = x @ W_ih.T + b_ih of the first layer
    w_ih_ptrs,  # [layer], [G*H, H] each, read by the layers above the first
    b_ih_ptrs,  # [layer], [G*H]
    w_hh_ptrs,  # [Z], [G*H, H]
    b_hh_ptrs,  # [Z], [G*H]
    mask_ptrs,  # [layer], [R, H]: the factor of each layer's input, read when HAS_MASK
    h_0_ptr,  # [Z, B, H]
    c_0_ptr,  # [Z, B, H], read when STATES == 2
    origins_ptr,  # [D, T, B], read when RAGGED
    starts_ptr,  # [T], read when PACKED
    aux_ptr,  # what the cell's own functions read
    # outputs
    out_ptrs,  # [Z], [R, D*H]
    gates_ptr,  # [Z, R, S*H], written when SAVE == 2
    cs_ptr,  # [Z, R, H], written when SAVE > 0 and STATES == 2
    h_n_ptr,  # [Z, B, H]
    c_n_ptr,  # [Z, B, H]
    # workspace
    slots_ptr,  # [Z, 2, P, B, H]: operands that are not h itself
    counters_ptr,  # [Z, batch tiles], zero
    # run-time sizes
    T,
    B,
    R,  # rows of a layer and direction
    first_tile,  # of the batch tiles of this launch
    patience,
    each,  # sequences of a member, read when MEMBERS
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
    RAGGED: tl.constexpr,
    PACKED: tl.constexpr,
    DOT: tl.constexpr,  # of ``slices.py``
    MEMBERS: tl.constexpr,  # whether weights and biases are [members, ...]
):
    G: tl.constexpr = len(GATES)
    P: tl.constexpr = len(PHASES)
    EACH: tl.constexpr = P if SHARES_H else P + 1  # publications: h, and operands that are not h
    pid_z = tl.program_id(2).to(tl.int64)
    pid_d = pid_z % D
    start = tl.program_id(0) * BLOCKS[0][1]
    pid_b = first_tile + tl.program_id(1)
    offs_b = pid_b.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b, member = offs_b < B, 0
    partners, groups = tl.num_programs(0), tl.cdiv(B, BLOCK_B)  # groups of a layer and direction
    if MEMBERS:
        offs_b, mask_b, groups, member = tile_of_member(pid_b, B, each, BLOCK_B)
    counter_ptr = counters_ptr + pid_z * groups + pid_b
    out_ptr = choose(out_ptrs, pid_z)
    first_rows = (pid_z * B + offs_b) * H

    w_hh = load_slice(w_hh_ptrs, pid_z, member, start, G, H, BLOCKS, K_CHUNKS, True, MEMBERS)
    b_hh = load_bias(part(b_hh_ptrs, pid_z, member, G * H, MEMBERS), start, HAS_BIAS, G, H, BLOCKS)
    own_gx = offs_b < tl.where(pid_z < D, B, 0)  # the layers above project their own input
    if L > 1:
        w_ih = load_slice(w_ih_ptrs, pid_z, member, start, G, H, BLOCKS, K_CHUNKS, True, MEMBERS)
        b_ih_ptr = part(b_ih_ptrs, pid_z, member, G * H, MEMBERS)
        b_ih = load_bias(b_ih_ptr, start, HAS_BIAS, G, H, BLOCKS)
        below_ptr = choose(out_ptrs, tl.maximum(pid_z - 1, 0))
    state = to_float(
        load_state(h_0_ptr + first_rows, c_0_ptr + first_rows, mask_b, start, STATES, H, BLOCKS)
    )

    for step in range(T):
        t = time_of(step, T, pid_d)
        published = partners * EACH * step
        ctx = (aux_ptr, t, offs_b, mask_b, H, all_columns(start, BLOCKS))
        origins = load_origins(origins_ptr, t, T, B, pid_d, offs_b, mask_b, RAGGED)
        here = present(origins, mask_b, RAGGED)
        first = first_row(starts_ptr, t, B, PACKED)
        row = first + offs_b
        gx_rows = gx_ptr + (pid_d * R + first + offs_b) * (G * H)
        gx = to_float(load_rows(gx_rows, here & own_gx, start, G, H, BLOCKS))
        if L > 1:
            if pid_z > 0:
                wait(counter_ptr - groups, published + partners * EACH, patience)
                x = load_operand(below_ptr + row * H, here, H, K_CHUNKS)
                if HAS_MASK:
                    mask_rows = choose(mask_ptrs, pid_z) + row * H
                    x = masked(x, load_operand(mask_rows, here, H, K_CHUNKS))
                gx = gate_products(x, w_ih, b_ih, (GATES,), 0, DOT)

        entered, gh = enter(state, origins, RAGGED), no_tiles(BLOCKS)
        for p in tl.static_range(P):
            if SHARES_H and p == 0:
                wait(counter_ptr, published, patience)
                u_all = load_previous(
                    out_ptr, h_0_ptr, origins, starts_ptr, step, T, B, pid_z, pid_d, offs_b, mask_b,
                    RAGGED, PACKED, D, H, K_CHUNKS,
                )  # fmt: skip
            else:
                slots = slots_ptr + (((pid_z * 2 + step % 2) * P + p) * B + offs_b) * H
                u = OPERAND(p, ctx, gx, gh, entered)
                store_rows(slots, mask_b, start, only((u,), 0), 0, H, BLOCKS)
                publish(counter_ptr)
                published += partners
                wait(counter_ptr, published, patience)
                u_all = load_operand(slots, mask_b, H, K_CHUNKS)
            gh = join(gh, gate_products(u_all, w_hh, b_hh, PHASES, p, DOT))
        state, saved = FORWARD(ctx, gx, gh, entered)
        state = leave(state, entered, origins, RAGGED)

        here = present(origins, mask_b, PACKED)
        out = shown(state, origins, RAGGED)
        store_rows(out_ptr + row * (D * H) + pid_d * H, here, start, only(out, 0), 0, H, BLOCKS)
        publish(counter_ptr)
        if SAVE:  # nobody waits for these
            row = pid_z * R + first + offs_b
            if SAVE == 2:
                saved = shown(saved, origins, RAGGED)
                store_rows(gates_ptr + row * (len(SAVED) * H), here, start, saved, 0, H, BLOCKS)
            if STATES == 2:
                store_rows(cs_ptr + row * H, here, start, only(out, 1), 0, H, BLOCKS)

    store_state(h_n_ptr + first_rows, c_n_ptr + first_rows, mask_b, start, state, STATES, H, BLOCKS)


@triton.jit(do_not_specialize=["T", "B", "R", "first_tile", "patience", "each"])
def _cooperative_bwd_kernel(
    # inputs
    d_out_ptr,  # [R, D*H] of the last layer, read when HAS_D_OUT
    d_cs_ptr,  # [Z, R, H], read when HAS_D_CS
    d_h_n_ptr,  # [Z, B, H]
    d_c_n_ptr,  # [Z, B, H], read when STATES == 2
    w_ih_ptrs,  # [layer], [G*H, H] each: of layer l+1 for layer l
    w_hh_ptrs,  # [Z], [G*H, H]
    mask_ptrs,  # [layer], [R, H], as in the forward kernel
    h_0_ptr,  # [Z, B, H]
    c_0_ptr,
    out_ptrs,  # [Z], [R, D*H]
    gates_ptr,  # [Z, R, S*H]
    cs_ptr,  # [Z, R, H]
    origins_ptr,
    starts_ptr,
    aux_ptr,
    # outputs
    dgates_ptr,  # [Z, R, N*H], and when PACKED ``SLACK`` rows more to read in
    d_h_0_ptr,  # [Z, B, H]
    d_c_0_ptr,
    # workspace
    counters_ptr,  # [Z, batch tiles], zero
    # run-time sizes
    T,
    B,
    R,  # rows of a layer and direction
    first_tile,  # of the batch tiles of this launch
    patience,
    each,  # sequences of a member, read when MEMBERS
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
    HAS_D_CS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    RAGGED: tl.constexpr,
    PACKED: tl.constexpr,
    DOT: tl.constexpr,  # of ``slices.py``
    MEMBERS: tl.constexpr,  # whether weights and biases are [members, ...]
):
    G: tl.constexpr = len(GATES)
    P: tl.constexpr = len(PHASES)
    # Numbered from the last layer, for whoever waits should come after whom it waits for.
    pid_z = L * D - 1 - tl.program_id(2).to(tl.int64)
    pid_d = pid_z % D
    start = tl.program_id(0) * BLOCKS[0][1]
    pid_b = first_tile + tl.program_id(1)
    offs_b = pid_b.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b, member = offs_b < B, 0
    partners, groups = tl.num_programs(0), tl.cdiv(B, BLOCK_B)  # groups of a layer and direction
    if MEMBERS:
        offs_b, mask_b, groups, member = tile_of_member(pid_b, B, each, BLOCK_B)
    counter_ptr = counters_ptr + pid_z * groups + pid_b
    out_ptr = choose(out_ptrs, pid_z)
    first_rows = (pid_z * B + offs_b) * H

    w_hh = load_slice(w_hh_ptrs, pid_z, member, start, G, H, BLOCKS, K_CHUNKS, False, MEMBERS)
    if L > 1:
        above = tl.minimum(pid_z + 1, L - 1)
        w_ih = load_slice(w_ih_ptrs, above, member, start, G, H, BLOCKS, K_CHUNKS, False, MEMBERS)
    d_state = to_float(
        load_state(d_h_n_ptr + first_rows, d_c_n_ptr + first_rows, mask_b, start, STATES, H, BLOCKS)
    )
    new = to_float(load_left(
        out_ptr, cs_ptr, origins_ptr, starts_ptr, time_of(T - 1, T, pid_d), T, B, R, pid_z, pid_d,
        offs_b, mask_b, start, STATES, RAGGED, PACKED, D, H, BLOCKS,
    ))  # fmt: skip
    loaded = load_step(
        gates_ptr, cs_ptr, out_ptr, h_0_ptr, c_0_ptr, d_out_ptr, d_cs_ptr, origins_ptr, starts_ptr,
        T - 1, T, B, R, pid_z, pid_d, offs_b, mask_b, start,
        SAVED, STATES, HAS_D_OUT, HAS_D_CS, RAGGED, PACKED, D, H, BLOCKS,
    )  # fmt: skip

    for back in range(T):
        step = T - 1 - back
        t = time_of(step, T, pid_d)
        published = partners * P * back
        # On its way through memory while this step waits for the others.
        earlier = load_step(
            gates_ptr, cs_ptr, out_ptr, h_0_ptr, c_0_ptr, d_out_ptr, d_cs_ptr, origins_ptr,
            starts_ptr, tl.maximum(step - 1, 0), T, B, R, pid_z, pid_d, offs_b, mask_b, start,
            SAVED, STATES, HAS_D_OUT, HAS_D_CS, RAGGED, PACKED, D, H, BLOCKS,
        )  # fmt: skip
        saved, prev, origins = to_float(loaded[0]), to_float(loaded[1]), loaded[5]
        here = present(origins, mask_b, PACKED)
        ctx = (aux_ptr, t, offs_b, mask_b, H, all_columns(start, BLOCKS))
        first = first_row(starts_ptr, t, B, PACKED)
        rows = dgates_ptr + (pid_z * R + first + offs_b) * (GRAD_TILES * H)
        if HAS_D_OUT:  # which is of the last layer
            dy = loaded[2][0][0].to(tl.float32)
            d_state = add_tile(d_state, ((tl.where(pid_z >= (L - 1) * D, dy, 0.0),),), 0)
        d_state = add_tile(d_state, to_float(loaded[3]), 1)
        if L > 1:
            if pid_z < L - 1:
                wait(counter_ptr + groups, published + partners * P, patience)
                dy = gradient_product(
                    rows + R.to(tl.int64) * (GRAD_TILES * H),
                    mask_b, w_ih, (GATES,), (GATES,), 0, H, K_CHUNKS, DOT,
                )  # fmt: skip
                if HAS_MASK:
                    mask_rows = choose(mask_ptrs, above) + (first + offs_b) * H
                    dy *= to_float(load_rows(mask_rows, here, start, 1, H, BLOCKS))[0][0]
                d_state = add_tile(d_state, shown(((dy,),), origins, RAGGED), 0)
        d_left = d_state
        du, carry = no_tiles(BLOCKS), no_tiles(BLOCKS)
        for p in tl.static_range(P):  # from the last phase to the first
            grads, d_state, carry = ADJOINT(P - 1 - p, ctx, d_state, du, saved, prev, new, carry)
            grads = shown(grads, origins, RAGGED)
            store_rows(rows, here, start, grads, FIRST_TILE[P - 1 - p], H, BLOCKS)
            publish(counter_ptr)
            wait(counter_ptr, published + partners * (p + 1), patience)
            du = (gradient_product(
                rows, mask_b, w_hh, TILES, PHASES, P - 1 - p, H, K_CHUNKS, DOT
            ),)  # fmt: skip
        d_state = enter_gradient(FOLD(ctx, d_state, du), d_left, origins, RAGGED)
        new = to_float(loaded[4]) if RAGGED else prev
        loaded = earlier

    ends = d_h_0_ptr + first_rows, d_c_0_ptr + first_rows
    store_state(*ends, mask_b, start, d_state, STATES, H, BLOCKS)
