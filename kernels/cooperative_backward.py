"""Schedule *cooperative*, backward: programs that exchange the gradients of their gates (Gluon).

A program holds the columns of W_hh of its units, with all gates, for the whole launch. A step is:
the adjoint of the cell for its units, dgates put into a slot, publish, wait for the others, load
all dgates into the operands of a product (``slices.py``), multiply, sum over the warps: the
gradient of its units' h. What no program waits for, the stores of dgates and the loads of the next
step, lies between publishing and waiting. A slot has the dgates of each phase, gates side by side.

**Wavefront**: layer l runs one step behind layer l + 1. It computes dy, the gradient of its output,
from the rows of dgates of the layer above, which are stored before publishing. Its wait for its
partners is also one for the next step of that layer, so the two products share their sums.
"""

import triton.language as tl
from triton.experimental import gluon

from . import exchange, slices, steps
from .cells import CELLS, Cell
from .launch import layers_backward, run_together, sizes_of
from .layouts import Slice, slice_of
from .mma import round_operand, squash, widened
from .problem import Plan, Tiles
from .rows import Rows
from .tensors import Grads, Layers
from .tiles import add_gradients, add_to, choose, gradient_before, visible


@gluon.jit
def _load_chunk(w_ptr, PART: tl.constexpr, N: tl.constexpr, CELL: tl.constexpr, TILE: tl.constexpr):
    """The columns of W of this program's units, for a chunk of the gates of a part."""
    H: tl.constexpr = TILE.H
    COUNT: tl.constexpr = len(CELL.parts[PART]) * H
    END: tl.constexpr = TILE.chunks[PART][N][0] + TILE.chunks[PART][N][1] * TILE.groups
    LAYOUT: tl.constexpr = TILE.pairs[PART][N]
    unit = tl.program_id(0) * TILE.block_h + slices.row_of_slice(TILE.block_h, LAYOUT)
    k = slices.columns_of_slice(PART, N, w_ptr.dtype.element_ty.primitive_bitwidth, LAYOUT, TILE)
    ptrs = w_ptr + (CELL.parts[PART][0] * H + k) * H + unit[None, :, None]
    if END <= COUNT and H % TILE.block_h == 0:  # a mask would cost registers
        w = tl.load(ptrs)
    else:
        inside = (k < COUNT) & (unit < H)[None, :, None]
        w = tl.load(ptrs, inside, other=0.0)
    return round_operand(slices.from_pairs(w, TILE))


@gluon.jit
def _load_parts(
    w_ptr, FIRST: tl.constexpr, STOP: tl.constexpr, CELL: tl.constexpr, TILE: tl.constexpr
):
    """``w[part][chunk]`` for the products of some parts."""
    w = ()
    for part in tl.static_range(FIRST, STOP):
        chunks = ()
        for n in tl.static_range(len(TILE.chunks[part])):
            chunk = _load_chunk(w_ptr, part, n, CELL, TILE)
            chunks = chunks + (slices.hold(chunk, part, n, TILE),)
        w = w + (chunks,)
    return w


@gluon.jit
def _fetch_above(grads, program, step, place, CELL: tl.constexpr, TILE: tl.constexpr):
    """The dgates of the layer above in a step, of which rows beyond the last may be any row."""
    P: tl.constexpr = len(CELL.phases)
    COLUMNS: tl.constexpr = len(CELL.gates) * TILE.H
    WIDTH: tl.constexpr = len(CELL.tiles) * TILE.H
    first = steps.row_of(program, tl.maximum(step, 0), place) + program.first_b
    last = (program.R - 1 - first).to(tl.int32)
    z = tl.minimum(program.z + 1, TILE.L - 1).to(tl.int64)
    rows = grads.gates + (z * program.R + first) * WIDTH
    u, rounded = slices.fetch(rows, last, WIDTH, P, False, COLUMNS, TILE), ()
    for n in tl.static_range(len(u)):
        rounded = rounded + (round_operand(u[n]),)
    return rounded


@gluon.jit
def _gradient_above(layers, program, place, total, drop, TILE: tl.constexpr):
    """The gradient of this layer's output, a tile, given the product; zero for the last layer."""
    for n in tl.static_range(len(drop)):
        total *= widened(drop)[n]
    dy = visible(layers, (total,), steps.origins_at(program, place))
    return (tl.where(program.z < TILE.L - 1, dy[0], 0.0),)


@gluon.jit
def _load_next(layers, grads, program, step, places, CELL: tl.constexpr, TILE: tl.constexpr):
    """All that a step reads and that no product computes, and the places of the steps before it."""
    drop = ()
    if layers.masks is not None:
        masks = choose(layers.masks, tl.minimum(program.z + 1, TILE.L - 1))
        rows = masks + steps.row_of(program, tl.maximum(step, 0), places[0]) * TILE.H
        here = steps.readable(layers, program, places[0])
        drop = steps.load(rows, program, here, 1, TILE.H, TILE)
    now = steps.load_step(layers, grads, program, step, (places[0], places[1]), CELL, TILE)
    later = steps.place_of(layers, program, step - 2)
    return now + (drop,), (places[0], places[1], later)


@gluon.jit
def _publish(
    layers, grads, program, step, place, part, counter, dgates,
    p: tl.constexpr, CELL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Publishes the dgates of a phase of a step, and stores them."""
    H: tl.constexpr = TILE.H
    for i in tl.static_range(len(CELL.phases[p])):
        exchange.put(part + i * H, program.cols, dgates[CELL.factors[p][i]], TILE)
    if TILE.L > 1:  # the layer below reads it
        steps.store_dgates(layers, grads, program, step, place, dgates, p, CELL, TILE)
    exchange.publish(counter)
    if TILE.L == 1:
        steps.store_dgates(layers, grads, program, step, place, dgates, p, CELL, TILE)


@gluon.jit(do_not_specialize=["T", "B", "R", "first_tile", "patience"])
def _cooperative_bwd_kernel(
    layers, grads, shared, T, B, R, first_tile, patience, CELL: tl.constexpr, TILE: tl.constexpr
):
    P: tl.constexpr = len(CELL.phases)
    LAST: tl.constexpr = TILE.L * TILE.D - 1
    # Numbered from the last layer down, so that a program is scheduled after those it waits for.
    z = LAST - tl.program_id(2)
    program = exchange.program_of(layers, z, T, B, R, first_tile, TILE)
    partners = tl.num_programs(0)
    counter, slots = exchange.group_of(shared, z, B, first_tile, TILE)
    buffers = slices.sum_buffers(2 if TILE.L > 1 else 1, TILE)
    zero = slices.zero_acc(TILE.block_h, TILE)
    w = _load_parts(choose(layers.w_hh, z), 0, P, CELL, TILE)

    places = (steps.place_of(layers, program, T - 1), steps.place_of(layers, program, T - 2))
    initial = widened(steps.load_ends(layers.h_0, layers.c_0, program, TILE))
    d_state = widened(steps.load_ends(grads.h_n, grads.c_n, program, TILE))
    left = widened(steps.load_left(layers, program, T - 1, places[0], TILE))
    now, places = _load_next(layers, grads, program, T - 1, places, CELL, TILE)
    dy = ()
    if TILE.L > 1:
        (w_ih,) = _load_parts(choose(layers.w_ih, tl.minimum(z + 1, LAST)), P, P + 1, CELL, TILE)
        above, _ = exchange.group_of(shared, tl.minimum(z + 1, LAST), B, first_tile, TILE)
        per_step = tl.where(z < LAST, partners * P, 0)  # publications to wait for
        exchange.wait(above, per_step, patience)
        x = _fetch_above(grads, program, T - 1, places[0], CELL, TILE)
        dy = slices.add_up(buffers, (slices.multiply(w_ih, x, zero, P, False, TILE),), TILE)[0]
        dy = _gradient_above(layers, program, places[0], dy, now[4], TILE)

    for back in range(T):
        step = T - 1 - back
        slot = exchange.slot_of(slots, back, TILE)
        saved, left_before = widened(now[0]), widened(now[1])
        origins = steps.origins_at(program, places[0])
        before = steps.entered(layers, origins, left_before, initial)
        d_state = add_gradients(d_state, widened(now[2]), widened(now[3]))
        d_state = add_gradients(d_state, dy, ())
        d_leaving, carry = d_state, ()
        du = d_state[0]  # not read by the last phase
        for p in tl.static_range(P - 1, -1, -1):
            dgates, d_state, carry = CELL.adjoint(
                p, d_state, du, saved, before, left, carry, squash
            )
            part = slot + p * (TILE.pitch // P)
            _publish(layers, grads, program, step, places[0], part, counter, dgates, p, CELL, TILE)
            target = partners * (P * back + P - p)
            if p == 0:
                now, places = _load_next(layers, grads, program, step - 1, places[1:], CELL, TILE)
            if p == 0 and TILE.L > 1:
                exchange.wait(counter, target, patience, above, tl.minimum(back + 2, T) * per_step)
                x = _fetch_above(grads, program, step - 1, places[0], CELL, TILE)
                (du,) = slices.products((w[0],), part, (zero,), p, TILE)
                dy = slices.multiply(w_ih, x, zero, P, False, TILE)
                du, dy = slices.add_up(buffers, (du, dy), TILE)
                dy = _gradient_above(layers, program, places[0], dy, now[4], TILE)
            else:
                exchange.wait(counter, target, patience)
                accs = slices.products((w[p],), part, (zero,), p, TILE)
                (du,) = slices.add_up(buffers, accs, TILE)
        d_state = gradient_before(layers, add_to(d_state, 0, du), d_leaving, origins)
        left = left_before
    steps.store_ends(grads.h_0, grads.c_0, program, d_state, TILE)


def tile_of(cell: Cell, layers: Layers, tiles: Tiles) -> Slice:
    """The sizes and layouts of a launch; a slot has the columns of each phase side by side."""
    sizes, itemsize = sizes_of(layers, tiles), layers.h_0.element_size()
    L, _, H, *_ = sizes
    columns = tuple(len(gates) * H for gates in (cell.parts if L > 1 else cell.phases))
    tile = slice_of(*sizes, tiles.num_warps, itemsize, columns, tiles.halved)
    return tile._replace(pitch=tile.pitch * len(cell.phases))


def backward(cell: str, plan: Plan, layers: Layers, grads: Grads, rows: Rows) -> None:
    """Runs these layers backwards: writes the gradients of their gates, h_0 and c_0.

    Raises:
        LaunchRefused: the device does not hold all programs of a launch at once.
    """
    tensors = layers_backward(layers, plan.layers), grads
    run_together(_cooperative_bwd_kernel, CELLS[cell], tensors, rows, plan.backward, tile_of)
