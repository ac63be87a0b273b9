"""Schedule *cooperative*: several programs share a batch tile, each owns BLOCK_H hidden units.

The weights do not fit one program, so they are cut: a program holds the rows of W_hh (backward: the
columns) of its units for the whole launch. It owns all gates of these units, so c and the gates
stay with it. What the others need, h (forward) and dgates (backward), goes through the tensors
``out`` and ``dgates``, which are written anyway, by the protocol of ``exchange.py``. A step is:
load what does not depend on h, wait, load h, multiply, apply the cell, store, publish.

**Wavefront**: with L > 1 all layers run in the launch, layer l one step behind layer l - 1, which
takes T + L - 1 steps instead of T * L. A layer above the first also holds W_ih and projects its own
input. Backward mirrors this: layer l computes its dy from the dgates of layer l + 1.

The sum over H is cut into chunks of KS pieces with KC columns. A chunk is one batched product
``[KS, BLOCK_B, KC] x [KS, KC, BLOCK_H]``, so that KS warps work on it side by side, each with a
short chain of dependent instructions. The pieces are added at the end, always in one order. No
float is added atomically, so two runs agree bit for bit.

The grid is ``(cdiv(H, BLOCK_H), batch tiles, L*D)``. All programs of a launch must be on the chip
at once, which ``launch_cooperative_grid`` guarantees or refuses; larger batches run in rounds.

Limits: a cell sees BLOCK_H units of a row, and L > 1 needs D = 1.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .cells import CELLS
from .exchange import Workspace, publish, wait, workspace
from .launch import cdiv, constants, in_rounds, on_device
from .problem import Plan, Tiles
from .rows import Rows
from .tensors import Grads, Layers
from .tiles import (
    INITIAL,
    PREVIOUS,
    Program,
    add_gradients,
    add_to,
    choose,
    entering_state,
    first_row,
    gradient_before,
    h_rows_before,
    is_present,
    is_stored,
    leaving_state,
    load,
    load_bias,
    load_origins,
    load_state,
    load_state_after,
    load_step,
    out_rows,
    row_ptrs,
    store,
    store_h,
    store_saved,
    store_state,
    time_of,
    visible,
)

#: Polls of one wait before it traps: about ten seconds.
PATIENCE = 1 << 24
#: ``max_num_imprecise_acc`` of a product that begins an accumulator: unless it is 0, the compiler
#: does not fold the sum so far into the product.
_NEW = tl.constexpr(1 << 20)


@triton.jit
def _program(layers, z, T, B, R, first_tile, TILE: tl.constexpr):
    """The batch tile and the hidden units of this program, in layer and direction z."""
    cols = tl.program_id(0) * TILE.block_h + tl.arange(0, TILE.block_h)
    tile = (first_tile + tl.program_id(1)).to(tl.int64)
    offs_b = tile * TILE.block_b + tl.arange(0, TILE.block_b)
    return Program(z, z % TILE.D, choose(layers.out, z), T, B, R, offs_b, offs_b < B, cols)


@triton.jit
def _counter(counters, z, B, first_tile, TILE: tl.constexpr):
    """The counter of this program's group; a layer's counters are ``cdiv(B, BLOCK_B)`` apart."""
    return counters + z * tl.cdiv(B, TILE.block_b) + first_tile + tl.program_id(1)


# Products over whole rows of H, of which other programs wrote most.


@triton.jit
def _chunk(N: tl.constexpr, TILE: tl.constexpr):
    """The columns of chunk N, ``[KS, KC]``."""
    pieces = tl.arange(0, TILE.chunks[N][1])[:, None] * TILE.chunks[N][2]
    return TILE.chunks[N][0] + pieces + tl.arange(0, TILE.chunks[N][2])[None, :]


@triton.jit
def _load_slice(w_ptr, cols, TRANSPOSE: tl.constexpr, CELL: tl.constexpr, TILE: tl.constexpr):
    """``w[gate][chunk]``, tiles ``[KS, KC, BLOCK_H]``: rows of W if TRANSPOSE, else columns."""
    H: tl.constexpr = TILE.H
    unit = cols[None, None, :]
    w = ()
    for g in tl.static_range(len(CELL.gates)):
        tiles = ()
        for n in tl.static_range(len(TILE.chunks)):
            k = _chunk(n, TILE)[:, :, None]
            if TRANSPOSE:
                ptrs = w_ptr + (g * H + unit) * H + k
            else:
                ptrs = w_ptr + (g * H + k) * H + unit
            tiles = tiles + (tl.load(ptrs, mask=(unit < H) & (k < H), other=0.0),)
        w = w + (tiles,)
    return w


@triton.jit
def _load_chunk(rows, mask_b, N: tl.constexpr, TILE: tl.constexpr):
    """Chunk N of whole rows, ``[KS, BLOCK_B, KC]``, past L1."""
    k = _chunk(N, TILE)[:, None, :]
    mask = mask_b[None, :, None]
    if TILE.chunks[N][0] + TILE.chunks[N][1] * TILE.chunks[N][2] > TILE.H:
        mask = mask & (k < TILE.H)
    return tl.load(rows[None, :, None] + k, mask, other=0.0, cache_modifier=".cg")


@triton.jit
def _load_operand(rows, mask_b, TILE: tl.constexpr):
    """``u[chunk]``, whole rows."""
    u = ()
    for n in tl.static_range(len(TILE.chunks)):
        u = u + (_load_chunk(rows, mask_b, n, TILE),)
    return u


@triton.jit
def _load_h(layers, program, step, origins, TILE: tl.constexpr):
    """``u[chunk]``, whole rows of the h that enters a step."""
    if layers.origins is not None:
        t_before = time_of(tl.maximum(step - 1, 0), program)
        previous_rows = out_rows(program, first_row(layers, program, t_before), TILE)
        initial_rows = row_ptrs(layers.h_0, program.z * program.B, program, TILE.H)
        u = ()
        for n in tl.static_range(len(TILE.chunks)):
            previous = _load_chunk(previous_rows, origins == PREVIOUS, n, TILE)
            initial = _load_chunk(initial_rows, origins == INITIAL, n, TILE)
            u = u + (previous + initial,)  # at most one of them is not zero
        return u
    else:
        rows = h_rows_before(layers, program, step, TILE)
        return _load_operand(rows, program.mask_b, TILE)


@triton.jit
def _load_input(layers, program, first, here, TILE: tl.constexpr):
    """``u[chunk]``, whole rows of a layer's input: the output of the layer below, after dropout."""
    below = choose(layers.out, tl.maximum(program.z - 1, 0))
    x = _load_operand(row_ptrs(below, first, program, TILE.H), here, TILE)
    if layers.masks is not None:
        masks = choose(layers.masks, program.z)
        mask = _load_operand(row_ptrs(masks, first, program, TILE.H), here, TILE)
        dropped = ()
        for n in tl.static_range(len(x)):
            dropped = dropped + (x[n] * mask[n],)
        return dropped
    else:
        return x


@triton.jit
def _dot(u, w, ALONE: tl.constexpr, TILE: tl.constexpr):
    """``u w`` for each piece in fp32; the compiler adds to it what follows, but not if ALONE."""
    return tl.dot(
        u.to(w.dtype),
        w,
        input_precision=TILE.precision,
        max_num_imprecise_acc=_NEW if ALONE else 0,
    )


@triton.jit
def _products(u, w, b, CELL: tl.constexpr, PART: tl.constexpr, TILE: tl.constexpr):
    """``u W[gate]^T + b[gate]`` for the gates of a part, ``[BLOCK_B, BLOCK_H]`` in fp32."""
    COUNT: tl.constexpr = len(TILE.chunks)
    RUN: tl.constexpr = TILE.folded if TILE.folded > 0 else COUNT
    out = ()
    for i in tl.static_range(len(CELL.parts[PART])):
        done = ()
        for n in tl.static_range(COUNT):
            dot = _dot(u[n], w[CELL.parts[PART][i]][n], n % RUN == 0 and RUN < COUNT, TILE)
            if n == 0:
                total = dot
            elif n % RUN == 0:
                done, total = done + (total,), dot
            else:
                total = total + dot
        for j in tl.static_range(len(done)):
            total = done[j] + total
        out = out + (tl.sum(total, 0) + b[CELL.parts[PART][i]],)
    return out


@triton.jit
def _product_sum(rows, mask_b, w, CELL: tl.constexpr, PART: tl.constexpr, TILE: tl.constexpr):
    """The sum over the gates of a part of ``dgates W[gate]``; the rows begin at its first tile."""
    G: tl.constexpr = len(CELL.parts[PART])
    COUNT: tl.constexpr = len(TILE.chunks) * G
    RUN: tl.constexpr = TILE.folded if TILE.folded > 0 else (COUNT if G == 1 else G)
    done = ()
    for n in tl.static_range(COUNT):
        tile = rows + CELL.factors[PART][n % G] * TILE.H
        u = _load_chunk(tile, mask_b, n // G, TILE)
        dot = _dot(u, w[CELL.parts[PART][n % G]][n // G], n % RUN == 0 and RUN < COUNT, TILE)
        if n == 0:
            total = dot
        elif n % RUN == 0:
            done, total = done + (total,), dot
        else:
            total = total + dot
    for j in tl.static_range(len(done)):
        total = done[j] + total
    return tl.sum(total, 0)


@triton.jit
def _gradient_above(
    layers, grads, program, first, origins, w_ih, CELL: tl.constexpr, TILE: tl.constexpr
):
    """The gradient of this layer's output, computed from the dgates of the layer above."""
    P: tl.constexpr = len(CELL.phases)
    N: tl.constexpr = len(CELL.tiles)
    row = (program.z + 1) * program.R + first
    rows = row_ptrs(grads.gates, row, program, N * TILE.H)
    dy = _product_sum(rows, program.mask_b, w_ih, CELL, P, TILE)
    if layers.masks is not None:
        masks = row_ptrs(choose(layers.masks, program.z + 1), first, program, TILE.H)
        here = is_stored(layers, program, origins)
        dy *= load(masks, here, program.cols, 1, TILE.H)[0]
    return visible(layers, (dy,), origins)[0]


@triton.jit(do_not_specialize=["T", "B", "R", "first_tile", "patience"])
def _cooperative_fwd_kernel(
    layers, shared, T, B, R, first_tile, patience, CELL: tl.constexpr, TILE: tl.constexpr
):
    H: tl.constexpr = TILE.H
    G: tl.constexpr = len(CELL.gates)
    P: tl.constexpr = len(CELL.phases)
    z = tl.program_id(2).to(tl.int64)
    program = _program(layers, z, T, B, R, first_tile, TILE)
    mask_b, cols = program.mask_b, program.cols
    partners = tl.num_programs(0)
    counter = _counter(shared.counters, z, B, first_tile, TILE)
    counter_below = _counter(shared.counters, z - 1, B, first_tile, TILE)

    w_hh = _load_slice(choose(layers.w_hh, z), cols, True, CELL, TILE)
    b_hh = load_bias(choose(layers.b_hh, z), cols, CELL, H)
    if TILE.L > 1:
        w_ih = _load_slice(choose(layers.w_ih, z), cols, True, CELL, TILE)
        b_ih = load_bias(choose(layers.b_ih, z), cols, CELL, H)
    state = load_state(layers.h_0, layers.c_0, program, mask_b, H)

    for step in range(T):
        published = partners * P * step  # a step publishes h and each operand that is not h
        t = time_of(step, program)
        first = first_row(layers, program, t)
        origins = load_origins(layers, program, t)
        here = is_present(layers, program, origins)
        reads_gx = here & (program.offs_b < tl.where(z < TILE.D, B, 0))  # the first layer alone
        rows = row_ptrs(layers.gx, program.d * R + first, program, G * H)
        gx = load(rows, reads_gx, cols, G, H)
        if TILE.L > 1:
            if z > 0:
                wait(counter_below, published + partners * P, patience)
                x = _load_input(layers, program, first, here, TILE)
                gx = _products(x, w_ih, b_ih, CELL, P, TILE)

        entering = entering_state(layers, state, origins)
        gh = ()
        for p in tl.static_range(P):
            if p == 0:
                wait(counter, published, patience)
                u = _load_h(layers, program, step, origins, TILE)
            else:
                slot = row_ptrs(shared.slots, (z * (P - 1) + p - 1) * B, program, H)
                store(slot, mask_b, cols, (CELL.operand(p, gx, gh, entering),), H)
                publish(counter)
                wait(counter, published + partners * p, patience)
                u = _load_operand(slot, mask_b, TILE)
            gh = gh + _products(u, w_hh, b_hh, CELL, p, TILE)
        state, saved = CELL.forward(gx, gh, entering)
        state = leaving_state(layers, state, entering, origins)

        store_h(layers, program, first, origins, state, TILE)
        publish(counter)
        # Stored after publishing, because no other program reads it.
        store_saved(layers, program, first, origins, state, saved, CELL, TILE)

    store_state(layers.h_n, layers.c_n, program, state, H)


@triton.jit(do_not_specialize=["T", "B", "R", "first_tile", "patience"])
def _cooperative_bwd_kernel(
    layers, grads, shared, T, B, R, first_tile, patience, CELL: tl.constexpr, TILE: tl.constexpr
):
    H: tl.constexpr = TILE.H
    N: tl.constexpr = len(CELL.tiles)
    P: tl.constexpr = len(CELL.phases)
    LAST: tl.constexpr = TILE.L * TILE.D - 1
    # Numbered from the last layer down, so that a program is scheduled after those it waits for.
    z = LAST - tl.program_id(2).to(tl.int64)
    program = _program(layers, z, T, B, R, first_tile, TILE)
    mask_b, cols = program.mask_b, program.cols
    partners = tl.num_programs(0)
    counter = _counter(shared.counters, z, B, first_tile, TILE)
    counter_above = _counter(shared.counters, z + 1, B, first_tile, TILE)

    w_hh = _load_slice(choose(layers.w_hh, z), cols, False, CELL, TILE)
    if TILE.L > 1:
        w_ih = _load_slice(choose(layers.w_ih, tl.minimum(z + 1, LAST)), cols, False, CELL, TILE)
    d_state = load_state(grads.h_n, grads.c_n, program, mask_b, H)
    after = load_state_after(layers, program, time_of(T - 1, program), TILE)
    loaded = load_step(layers, grads, program, T - 1, CELL, TILE)

    for back in range(T):
        step = T - 1 - back
        published = partners * P * back
        # Loaded while this step waits for its partners.
        loaded_next = load_step(layers, grads, program, tl.maximum(step - 1, 0), CELL, TILE)
        saved, before, after_previous, d_out, d_cs, origins = loaded
        first = first_row(layers, program, time_of(step, program))
        here = is_stored(layers, program, origins)
        rows = row_ptrs(grads.gates, z * R + first, program, N * H)

        d_state = add_gradients(d_state, d_out, d_cs)
        if TILE.L > 1:
            if z < LAST:
                wait(counter_above, published + partners * P, patience)
                dy = _gradient_above(layers, grads, program, first, origins, w_ih, CELL, TILE)
                d_state = add_to(d_state, 0, dy)

        d_leaving, carry = d_state, ()
        du = tl.zeros_like(d_state[0])
        for p in tl.static_range(P - 1, -1, -1):
            dgates, d_state, carry = CELL.adjoint(p, d_state, du, saved, before, after, carry)
            dgates = visible(layers, dgates, origins)
            tiles = rows + CELL.grads[p][0] * H
            store(tiles, here, cols, dgates, H)
            publish(counter)
            wait(counter, published + partners * (P - p), patience)
            du = _product_sum(tiles, mask_b, w_hh, CELL, p, TILE)
        d_state = add_to(d_state, 0, du)
        d_state = gradient_before(layers, d_state, d_leaving, origins)
        after, loaded = after_previous, loaded_next

    store_state(grads.h_0, grads.c_0, program, d_state, H)


def forward(
    cell: str,
    plan: Plan,
    layers: Layers,
    rows: Rows,
    *,
    shared: Workspace | None = None,
    patience: int = PATIENCE,
) -> None:
    """Runs the layers of one launch: writes out, h_n, c_n and what is to be saved.

    Args:
        shared: a fresh workspace; by default one is allocated.
        patience: the polls of one wait before it traps.

    Raises:
        LaunchRefused: the device does not hold all programs of a launch at once.
    """
    tensors = (layers_forward(layers, plan.layers),)
    _launch(_cooperative_fwd_kernel, cell, plan.forward, tensors, rows, shared, patience)


def backward(
    cell: str,
    plan: Plan,
    layers: Layers,
    grads: Grads,
    rows: Rows,
    *,
    shared: Workspace | None = None,
    patience: int = PATIENCE,
) -> None:
    """Runs these layers backwards: writes the gradients of their gates, h_0 and c_0.

    If the rows are packed, ``grads.gates`` has ``SLACK`` more rows of memory behind it. The rest as
    in ``forward``.
    """
    tensors = layers_backward(layers, plan.layers), grads
    _launch(_cooperative_bwd_kernel, cell, plan.backward, tensors, rows, shared, patience)


def _launch(
    kernel: Any,
    cell: str,
    tiles: Tiles,
    tensors: tuple,
    rows: Rows,
    shared: Workspace | None,
    patience: int,
) -> None:
    """Launches a kernel in rounds of batch tiles."""
    h_0, out = tensors[0].h_0, tensors[0].out[0]
    Z, B, H = h_0.shape
    D = out.shape[-1] // H
    cell_, tile, options = constants(CELLS[cell], tiles, Z // D, D, H)
    if shared is None:
        shared = workspace(cell, h_0, Z, cdiv(B, tile.block_b), B, H)

    def launch(first_tile: int, count: int) -> None:
        kernel[cdiv(H, tile.block_h), count, Z](
            *tensors, shared, rows.T, B, rows.total, first_tile, patience, cell_, tile, **options
        )

    with on_device(h_0):
        in_rounds(launch, B, tiles)


def layers_forward(layers: Layers, L: int) -> Layers:
    """The tensors that the forward kernel reads; the others are None and cost no time."""
    return layers if L > 1 else layers._replace(w_ih=None, b_ih=None, masks=None)


def layers_backward(layers: Layers, L: int) -> Layers:
    """The tensors that the backward kernel reads."""
    layers = layers_forward(layers, L)
    return layers._replace(gx=None, b_ih=None, b_hh=None, h_n=None, c_n=None)
