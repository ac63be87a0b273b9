"""Schedule *cooperative*, backward: programs that exchange the gradients of their gates (Gluon).

A program holds the columns of W_hh of its units, with all gates, for the whole launch. In a step it
computes the adjoint of the cell for its units, puts dgates into its part of a slot, publishes, waits
for the others, and multiplies all dgates by its columns: the gradient of its units' h. What nobody
waits for, the stores of dgates and the loads of the next step, lies between publishing and waiting.

A row of a slot has a tile of dgates for each product, side by side: first those that only the layer
below reads, then those of phase 0 and of phase 1. So what one product needs is one run of columns.

**Wavefront**: layer l computes dy, the gradient of its output, from the dgates of layer l + 1, one
step behind. Its wait for its partners is also one for that layer's next step, and one for the layer
below to have read the slot that it writes next.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import triton.language as tl
from triton.experimental import gluon

from .cells import CELLS, Cell
from .exchange import (
    PATIENCE,
    Workspace,
    group_of,
    launch_together,
    publish,
    put,
    slot_of,
    wait,
    wait_for_three,
)
from .mma import round_operand, squash, widened
from .problem import Plan
from .rows import Rows
from .slices import (
    Slice,
    add_up,
    columns_of_slice,
    fetch,
    multiply,
    program_of,
    row_of_slice,
    slice_of,
    sum_buffers,
    zero_acc,
)
from .steps import (
    load,
    load_ends,
    load_left,
    load_step,
    origins_at,
    place_of,
    readable,
    row_of,
    store,
    store_ends,
)
from .tensors import Grads, Layers
from .tiles import (
    INITIAL,
    PREVIOUS,
    add_to,
    choose,
    gradient_before,
    is_stored,
    visible,
    where,
    zero_where,
)


@gluon.jit
def _load_slice(w_ptr, PART: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr):
    """The columns of W of this program's units, as the first operand of each chunk of a part."""
    H: tl.constexpr = TILE.H
    PADDED: tl.constexpr = (H + 15) // 16 * 16
    m = row_of_slice(TILE.block_h, TILE)
    unit = tl.program_id(0) * TILE.block_h + m // 16 * 16 + m % 8 * 2 + m // 8 % 2
    unit = unit[None, :, None]
    w = ()
    for n in tl.static_range(len(TILE.chunks[PART])):
        k = columns_of_slice(PART, n, w_ptr.dtype.element_ty.primitive_bitwidth, TILE)
        tile, row = k // PADDED, k % PADDED
        gate = tile * 0
        for g in tl.static_range(len(PARTS.gates[PART])):
            gate = tl.where(tile == g, PARTS.gates[PART][g], gate)
        inside = (tile < len(PARTS.gates[PART])) & (row < H) & (unit < H)
        x = tl.load(w_ptr + ((gate * H + row) * H + unit), inside, other=0.0)
        w = w + (round_operand(x),)
    return w


@gluon.jit
def _fetch(slot, PART: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr):
    """The dgates that a part multiplies."""
    LAST: tl.constexpr = TILE.block_b - 1
    return fetch(slot + PARTS.first[PART], LAST, TILE.pitch, PART, TILE.pitch, TILE)


@gluon.jit
def _put(
    slot,
    p: tl.constexpr,
    program,
    dgates,
    CELL: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Stores the dgates of a phase into this program's part of a slot."""
    PADDED: tl.constexpr = (TILE.H + 15) // 16 * 16
    for n in tl.static_range(len(PARTS.order)):
        for i in tl.static_range(len(CELL.grads[p])):
            if PARTS.order[n] == CELL.grads[p][i]:
                put(slot + n * PADDED, program.cols, dgates[i], TILE)


@gluon.jit
def _gradient_above(layers, program, step, place, total, drop, TILE: tl.constexpr):
    """The gradient of this layer's output in a step, given its sum; zero for the last layer."""
    for n in tl.static_range(len(drop)):
        total *= widened(drop)[n]
    total = visible(layers, (total,), origins_at(program, place))[0]
    return tl.where(program.z < TILE.L - 1, total, 0.0)


@gluon.jit
def _load_drop(layers, program, step, place, TILE: tl.constexpr):
    """The dropout factors of this layer's output in a step, or nothing."""
    if layers.masks is not None:
        masks = choose(layers.masks, tl.minimum(program.z + 1, TILE.L - 1))
        row = row_of(program, tl.maximum(step, 0), place)
        return load(
            masks + row * TILE.H, program, readable(layers, program, place), 1, TILE.H, TILE
        )
    else:
        return ()


@gluon.jit(do_not_specialize=["T", "B", "R", "first_tile", "patience"])
def _cooperative_bwd_kernel(
    layers, grads, shared, T, B, R, first_tile, patience,
    CELL: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    H: tl.constexpr = TILE.H
    N: tl.constexpr = len(CELL.tiles)
    P: tl.constexpr = len(CELL.phases)
    LAST: tl.constexpr = TILE.L * TILE.D - 1
    # Numbered from the last layer down, so that a program is scheduled after those it waits for.
    z = LAST - tl.program_id(2)
    program = program_of(layers, z, T, B, R, first_tile, TILE)
    partners = tl.num_programs(0)
    counter, slots = group_of(shared, z, B, first_tile, TILE)
    buffers = sum_buffers(2 if TILE.L > 1 else 1, TILE)
    w = ()
    for p in tl.static_range(P):
        w = w + (_load_slice(choose(layers.w_hh, z), p, PARTS, TILE),)

    places = (
        place_of(layers, program, T - 1), place_of(layers, program, T - 2),
        place_of(layers, program, T - 3),
    )  # fmt: skip
    initial = widened(load_ends(layers.h_0, layers.c_0, program, TILE))
    d_state = widened(load_ends(grads.h_n, grads.c_n, program, TILE))
    left = widened(load_left(layers, program, T - 1, places[0], TILE))
    now = load_step(layers, grads, program, T - 1, (places[0], places[1]), CELL, TILE)
    if TILE.L > 1:
        w_ih = _load_slice(choose(layers.w_ih, tl.minimum(z + 1, LAST)), P, PARTS, TILE)
        # Of the last and the first layer their own group, for which they do not wait.
        counter_above, slots_above = group_of(shared, tl.minimum(z + 1, LAST), B, first_tile, TILE)
        counter_below, _ = group_of(shared, tl.maximum(z - 1, 0), B, first_tile, TILE)
        drop = _load_drop(layers, program, T - 1, places[0], TILE)
        wait(counter_above, tl.where(z < LAST, partners * P, 0), patience)
        acc = multiply(
            w_ih, _fetch(slots_above, P, PARTS, TILE), zero_acc(TILE.block_h, TILE), TILE
        )
        (dy,) = add_up(buffers, (acc,), TILE)
        dy = _gradient_above(layers, program, T - 1, places[0], dy, drop, TILE)

    for back in range(T):
        step = T - 1 - back
        published = partners * P * back
        slot = slot_of(slots, back, TILE)
        saved, left_before, d_out, d_cs = now
        saved, left_before = widened(saved), widened(left_before)
        origins = origins_at(program, places[0])
        entered = left_before
        if layers.origins is not None:
            first = zero_where(origins != INITIAL, initial)
            entered = where(origins == PREVIOUS, left_before, first)
        if grads.out is not None:
            d_state = add_to(d_state, 0, widened(d_out)[0])
        if grads.cs is not None:
            d_state = add_to(d_state, 1, widened(d_cs)[0])
        if TILE.L > 1:
            d_state = add_to(d_state, 0, dy)
        d_leaving, carry = d_state, ()
        du = d_state[0]  # not read by the last phase
        here = is_stored(layers, program, origins)
        row = program.z.to(tl.int64) * R + row_of(program, step, places[0])
        for p in tl.static_range(P - 1, -1, -1):
            dgates, d_state, carry = CELL.adjoint(
                p, d_state, du, saved, entered, left, carry, squash
            )
            if layers.starts is None:
                dgates = visible(layers, dgates, origins)
            _put(slot, p, program, dgates, CELL, PARTS, TILE)
            publish(counter)
            rows = grads.gates + row * (N * H) + CELL.grads[p][0] * H
            store(rows, program, here, dgates, N * H, TILE)
            target = published + partners * (P - p)
            if p == 0:
                now = load_step(
                    layers, grads, program, step - 1, (places[1], places[2]), CELL, TILE
                )
                if TILE.L > 1:
                    drop = _load_drop(layers, program, step - 1, places[1], TILE)
                later = (places[1], places[2], place_of(layers, program, step - 3))
            if p == 0 and TILE.L > 1:
                next_above = tl.where(
                    z < LAST, tl.minimum(published + 2 * partners * P, partners * P * T), 0
                )
                read_below = tl.where(z > 0, published - partners * (P - 1), 0)
                wait_for_three(
                    counter, target, counter_above, next_above, counter_below, read_below, patience
                )
                u = _fetch(slot, 0, PARTS, TILE)
                x = _fetch(slot_of(slots_above, back + 1, TILE), P, PARTS, TILE)
                acc = multiply(w[0], u, zero_acc(TILE.block_h, TILE), TILE)
                acc_above = multiply(w_ih, x, zero_acc(TILE.block_h, TILE), TILE)
                du, dy = add_up(buffers, (acc, acc_above), TILE)
                dy = _gradient_above(layers, program, step - 1, places[1], dy, drop, TILE)
            else:
                wait(counter, target, patience)
                u = _fetch(slot, p, PARTS, TILE)
                (du,) = add_up(
                    buffers, (multiply(w[p], u, zero_acc(TILE.block_h, TILE), TILE),), TILE
                )
        d_state = add_to(d_state, 0, du)
        d_state = gradient_before(layers, d_state, d_leaving, origins)
        left, places = left_before, later
    store_ends(grads.h_0, grads.c_0, program, d_state, TILE)


class Parts(NamedTuple):
    """The columns of a row of a slot."""

    order: tuple[int, ...]  # the tiles of dgates, side by side
    first: tuple[int, ...]  # for each phase, and the product with W_ih, the first column
    gates: tuple[tuple[int, ...], ...]  # and the gates


@lru_cache(maxsize=1024)
def slots_of(
    cell: Cell, L: int, D: int, H: int, block_b: int, block_h: int, warps: int, itemsize: int
) -> tuple[Parts, Slice]:
    """Returns the compile-time arguments of the kernel besides the cell."""
    phases = zip(cell.grads, cell.factors[: len(cell.phases)], strict=True)
    own = [[grads[i] for i in factors] for grads, factors in phases]
    order, gates = tuple(chain(*own)), cell.phases
    if L > 1:
        order = (*(t for t in cell.gates if t not in order), *order)
        own.append([t for t in order if t in cell.gates])
        gates = (*gates, tuple(own[-1]))
    padded = -(-H // 16) * 16
    first = tuple(order.index(tiles[0]) * padded for tiles in own)
    columns = tuple(len(each) * padded for each in gates)
    tile = slice_of(L, D, H, block_b, block_h, warps, itemsize, columns)
    ends = (
        start + sum(width for _, width in chunks) * warps
        for start, chunks in zip(first, tile.chunks, strict=True)
    )
    return Parts(order, first, gates), tile._replace(pitch=max(ends))


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

    Args:
        shared: a fresh workspace; by default one is allocated.
        patience: the polls of one wait before it fails.

    Raises:
        LaunchRefused: the device does not hold all programs of a launch at once.
    """
    Z, _, H = layers.h_0.shape
    D, tiles = layers.out[0].shape[-1] // H, plan.backward
    sizes = tiles.block_b, tiles.block_h, tiles.num_warps, layers.h_0.element_size()
    constants = CELLS[cell], *slots_of(CELLS[cell], Z // D, D, H, *sizes)
    tensors = layers_backward(layers, Z // D), grads
    launch_together(_cooperative_bwd_kernel, tensors, rows, tiles, constants, shared, patience)


def layers_backward(layers: Layers, L: int) -> Layers:
    """The tensors that the kernel reads; the others are None and cost no time."""
    layers = layers if L > 1 else layers._replace(w_ih=None, masks=None)
    return layers._replace(gx=None, b_ih=None, b_hh=None, h_n=None, c_n=None)
