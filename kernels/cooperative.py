"""Schedule *cooperative*: several programs share a batch tile (Gluon).

W_hh does not fit one program, so it is cut: a program owns BLOCK_H hidden units with all their
gates and keeps their rows of W_hh (backward: columns) for the whole launch. c and the gates of
these units stay with it. The others need h, and backward dgates, which go through slots by the
protocol of ``exchange.py``. A step forward is: wait for h, load all of it into the operands of a
product (``slices.py``), multiply, sum over the warps, apply the cell, put h into the next slot,
publish. A step backward begins with the adjoint of the cell and ends with the product, the gradient
of its units' h. What no program waits for lies between publishing and waiting: the stores of
results, and the loads of the next step. Where these would spill registers (``is_full``, backward),
they are behind the product.

What forward publishes is the state that *enters* the next step: zero where a sequence begins. So
rows may be ragged or packed, and the product knows nothing of it. The first publication is h_0.

**Wavefront**: with L > 1 all layers run in the launch, layer l one step behind layer l - 1, which
takes T + L - 1 steps instead of T * L. A layer above the first also holds W_ih, waits for the
counter of the layer below, and reads its input from ``out``, which is stored before publishing.
Backward, layer l is one step behind layer l + 1 and computes the gradient of its output from the
rows of dgates of that layer. Its wait for its partners is also one for the next step of that layer,
so the two products share their sums.

No float is added atomically, so two runs agree bit for bit. The grid is ``(cdiv(H, BLOCK_H), batch
tiles, L*D)``; all programs of a launch must be on the chip at once, which
``launch_cooperative_grid`` guarantees or refuses; larger batches run in rounds.

Limits: tensors of 16 bits, or fp32 with tf32 products; L > 1 needs D = 1 and 16 units a program.
"""

from functools import partial

import triton.language as tl
from triton.experimental import gluon

from . import exchange, slices, steps, tiles
from .cells import CELLS, Cell
from .launch import run_together, sizes_of
from .layouts import Slice, slice_of
from .mma import load_bias, squash, widened
from .problem import Plan, Tiles
from .rows import Rows
from .tensors import Grads, Layers
from .tiles import add_to, choose


@gluon.jit
def _with_bias(gx, b_hh, b_ih, CELL: tl.constexpr):
    """gx with the biases that no product multiplies."""
    for g in tl.static_range(len(b_hh)):
        if CELL.merged[g]:
            gx = add_to(gx, g, b_hh[g])
        if len(b_ih) > 0:
            gx = add_to(gx, g, b_ih[g])
    return gx


@gluon.jit
def _phase(w, slot, gx, gh, inputs, b, PHASE: tl.constexpr, CELL: tl.constexpr, TILE: tl.constexpr):
    """The pre-activations of a phase's gates: gx, and gh with these gates behind it.

    ``inputs`` are the products with the output of the layer below. The recurrent products are added
    to them; where a gate's two pre-activations are not just added, they are a sum of their own.
    """
    GATES: tl.constexpr = CELL.phases[PHASE]
    accs, apart = (), ()
    for n in tl.static_range(len(w)):
        if CELL.merged[GATES[n]]:
            accs = accs + (inputs[GATES[n]],)
        else:
            accs = accs + slices.zero_accs(1, TILE)
            if TILE.L > 1:
                apart = apart + (inputs[GATES[n]],)
    sums = slices.add_up(slices.products(w, slot, accs, PHASE, TILE) + apart, TILE)
    apart = sums[len(GATES) :]
    for n in tl.static_range(len(GATES)):
        if CELL.merged[GATES[n]]:
            gh = gh + (sums[n] + gx[GATES[n]],)
        else:
            gh = gh + (sums[n] + b[GATES[n]] if len(b) > 0 else sums[n],)
            if TILE.L > 1:
                gx, apart = add_to(gx, GATES[n], apart[0]), apart[1:]
    return gx, gh


@gluon.jit(do_not_specialize=["T", "B", "R", "first_tile", "patience"])
def _cooperative_fwd_kernel(
    layers, shared, T, B, R, first_tile, patience, CELL: tl.constexpr, TILE: tl.constexpr
):
    P: tl.constexpr = len(CELL.phases)
    z = tl.program_id(2)
    program = exchange.program_of(layers, z, T, B, R, first_tile, TILE)
    counter, slots = exchange.group_of(shared, z, B, first_tile, TILE)
    counter_below, _ = exchange.group_of(shared, z - 1, B, first_tile, TILE)
    partners = tl.num_programs(0)

    w_hh = slices.load_slices(choose(layers.w_hh, z), 0, P, CELL, TILE)
    b_hh, b_ih = load_bias(choose(layers.b_hh, z), program.cols, CELL, TILE), ()
    if TILE.L > 1:
        (w_ih,) = slices.load_slices(choose(layers.w_ih, z), P, P + 1, CELL, TILE)
        below, masks = choose(layers.out, tl.maximum(z - 1, 0)), choose(layers.masks, z)
        above_0 = tl.where(z > 0, program.cols, TILE.H)  # the first layer's is in gx
        b_ih = load_bias(choose(layers.b_ih, z), above_0, CELL, TILE)

    places = (steps.place_of(layers, program, 0), steps.place_of(layers, program, 1))
    gx_next = steps.load_gx(layers, program, 0, places[0], CELL, TILE)
    state = widened(steps.load_ends(layers.h_0, layers.c_0, program, TILE))
    state = tiles.entering_state(layers, state, steps.origins_at(program, places[0]))
    exchange.put(exchange.slot_of(slots, 0, TILE), program.cols, state[0], TILE)
    exchange.publish(counter)
    for step in range(T):
        published = P * step + 1
        gx, gh = _with_bias(widened(gx_next), b_hh, b_ih, CELL), ()
        inputs = slices.zero_accs(len(CELL.gates), TILE)
        gx_next = steps.load_gx(layers, program, step + 1, places[1], CELL, TILE)
        later = steps.place_of(layers, program, step + 2)
        if TILE.L > 1:
            if z > 0:
                exchange.wait(counter_below, partners * (published + P), patience)
                x = slices.fetch_rows(below, masks, program, step, places[0], TILE.H, TILE)
                inputs = slices.multiply(w_ih, x, inputs, 0, TILE)
        for p in tl.static_range(P):
            slot = exchange.slot_of(slots, published - 1 + p, TILE)
            if p > 0:
                exchange.put(slot, program.cols, CELL.operand(p, gh, state, squash), TILE)
                exchange.publish(counter)
            exchange.wait(counter, partners * (published + p), patience)
            gx, gh = _phase(w_hh[p], slot, gx, gh, inputs, b_hh, p, CELL, TILE)
        left, saved = CELL.forward(gx, gh, state, squash)
        left = tiles.leaving_state(layers, left, state, steps.origins_at(program, places[0]))
        origins = steps.origins_at(program, places[1])
        if layers.origins is not None:  # behind the last step no sequence begins
            origins = tl.where(step + 1 < T, origins, tiles.PREVIOUS)
        state = tiles.entering_state(layers, left, origins)

        exchange.put(exchange.slot_of(slots, published + P - 1, TILE), program.cols, state[0], TILE)
        if TILE.L > 1:  # the layer above reads it
            steps.store_h(layers, program, step, places[0], left, TILE)
        exchange.publish(counter)
        # Stored after publishing, because no other program reads it.
        if TILE.L == 1:
            steps.store_h(layers, program, step, places[0], left, TILE)
        steps.store_saved(layers, program, step, places[0], left, saved, CELL, TILE)
        places = (places[1], later)

    steps.store_ends(layers.h_n, layers.c_n, program, state, TILE)


@gluon.jit
def _gradient_above(program, sums, drop, TILE: tl.constexpr):
    """The gradient of this layer's output, given its product or none; zero for the last layer."""
    dy = ()
    for n in tl.static_range(len(sums)):
        total = sums[n] * widened(drop)[n] if len(drop) > 0 else sums[n]
        dy = dy + (tl.where(program.z < TILE.L - 1, total, 0.0),)
    return dy


@gluon.jit
def _load_next(layers, grads, program, step, places, CELL: tl.constexpr, TILE: tl.constexpr):
    """All that a step reads and that no product computes, and the places of the steps before it."""
    drop = ()
    if layers.masks is not None:
        masks = choose(layers.masks, tl.minimum(program.z + 1, TILE.L - 1))
        rows = steps.rows_of(program, tl.maximum(step, 0), places[0])
        drop = steps.load(masks, program, rows, (), 1, TILE.H, TILE)
    now = steps.load_step(layers, grads, program, step, (places[0], places[1]), CELL, TILE)
    later = steps.place_of(layers, program, step - 2)
    return now + (drop,), (places[0], places[1], later)


@gluon.jit
def _publish(
    layers, grads, program, step, place, slot, counter, dgates,
    p: tl.constexpr, CELL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Publishes the dgates of a phase of a step, gates side by side, and stores them."""
    for i in tl.static_range(len(CELL.phases[p])):
        exchange.put(slot + i * TILE.H, program.cols, dgates[CELL.factors[p][i]], TILE)
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
    W: tl.constexpr = len(CELL.tiles) * TILE.H  # of a row of dgates
    LAST: tl.constexpr = TILE.L * TILE.D - 1
    # Numbered from the last layer down, so that a program is scheduled after those it waits for.
    program = exchange.program_of(layers, LAST - tl.program_id(2), T, B, R, first_tile, TILE)
    partners = tl.num_programs(0)
    counter, slots = exchange.group_of(shared, program.z, B, first_tile, TILE)
    w_hh = slices.load_slices(choose(layers.w_hh, program.z), 0, P, CELL, TILE)

    places = (steps.place_of(layers, program, T - 1), steps.place_of(layers, program, T - 2))
    d_state = widened(steps.load_ends(grads.h_n, grads.c_n, program, TILE))
    left = widened(steps.load_left(layers, program, T - 1, places[0], (), TILE))
    now, places = _load_next(layers, grads, program, T - 1, places, CELL, TILE)
    dy = ()
    if TILE.L > 1:
        z_above = tl.minimum(program.z + 1, LAST)
        (w_ih,) = slices.load_slices(choose(layers.w_ih, z_above), P, P + 1, CELL, TILE)
        above, _ = exchange.group_of(shared, z_above, B, first_tile, TILE)
        rows_above = grads.gates + z_above.to(tl.int64) * R * W
        per_step = tl.where(program.z < LAST, partners * P, 0)  # publications to wait for
        exchange.wait(above, per_step, patience)
        x = slices.fetch_rows(rows_above, None, program, T - 1, places[0], W, TILE)
        dy = slices.multiply(w_ih, x, slices.zero_accs(1, TILE), 0, TILE)
        dy = _gradient_above(program, slices.add_up(dy, TILE), now[4], TILE)

    for back in range(T):
        step = T - 1 - back
        saved, left_before = widened(now[0]), widened(now[1])
        origins = steps.origins_at(program, places[0])
        before = tiles.entering_state(layers, left_before, origins)
        d_leaving, carry = d_state, ()  # a step that is skipped adds nothing
        d_state = tiles.add_gradients(d_state, widened(now[2]), widened(now[3]))
        d_state = tiles.add_gradients(d_state, dy, ())
        du = d_state[0]  # not read by the last phase
        for p in tl.static_range(P - 1, -1, -1):
            dgates, d_state, carry = CELL.adjoint(
                p, d_state, du, saved, before, left, carry, squash
            )
            published = P * (back + 1) - p
            slot = exchange.slot_of(slots, published, TILE)
            _publish(layers, grads, program, step, places[0], slot, counter, dgates, p, CELL, TILE)
            if p == 0 and not TILE.is_full:
                now, places = _load_next(layers, grads, program, step - 1, places[1:], CELL, TILE)
            if p == 0 and TILE.L > 1:
                end = tl.minimum(back + 2, T) * per_step
                exchange.wait(counter, partners * published, patience, above, end)
                x = slices.fetch_rows(rows_above, None, program, step - 1, places[0], W, TILE)
            else:
                exchange.wait(counter, partners * published, patience)
            accs = slices.products(w_hh[p], slot, slices.zero_accs(1, TILE), p, TILE)
            if p == 0 and TILE.L > 1:
                accs = accs + slices.multiply(w_ih, x, slices.zero_accs(1, TILE), 0, TILE)
            if p == 0 and TILE.is_full:  # the operand has left its registers
                now, places = _load_next(layers, grads, program, step - 1, places[1:], CELL, TILE)
            sums = slices.add_up(accs, TILE)
            du, dy = sums[0], _gradient_above(program, sums[1:], now[4], TILE)
        d_state = tiles.gradient_before(layers, add_to(d_state, 0, du), d_leaving, origins)
        left = left_before
    steps.store_ends(grads.h_0, grads.c_0, program, d_state, TILE)


def tile_of(cell: Cell, layers: Layers, tiles: Tiles, is_forward: bool = True) -> Slice:
    """The sizes and layouts of a launch, whose products have H columns, backward H of each gate."""
    sizes, itemsize = sizes_of(layers, tiles), layers.h_0.element_size()
    parts = cell.parts if sizes[0] > 1 else cell.phases
    columns = tuple(sizes[2] * (1 if is_forward else len(gates)) for gates in parts)
    held = len(cell.gates) * len(cell.phases) * tiles.elements  # with 16 no registers are left
    is_full = sizes[0] == 1 and not is_forward and held >= 16
    return slice_of(
        *sizes, tiles.num_warps, itemsize, columns, not is_forward, tiles.halved, is_full
    )


_tile_of_backward = partial(tile_of, is_forward=False)


def forward(cell: str, plan: Plan, layers: Layers, rows: Rows) -> None:
    """Runs the layers of one launch: writes out, h_n, c_n and what is to be saved.

    Raises:
        LaunchRefused: the device does not hold all programs of a launch at once.
    """
    run_together(_cooperative_fwd_kernel, CELLS[cell], (layers,), rows, plan.forward, tile_of)


def backward(cell: str, plan: Plan, layers: Layers, grads: Grads, rows: Rows) -> None:
    """Runs these layers backwards: writes the gradients of their gates, h_0 and c_0.

    Raises:
        LaunchRefused: the device does not hold all programs of a launch at once.
    """
    tensors = layers, grads
    run_together(
        _cooperative_bwd_kernel, CELLS[cell], tensors, rows, plan.backward, _tile_of_backward
    )
