"""Schedule *cooperative*, forward: several programs share a batch tile (Gluon).

W_hh does not fit one program, so it is cut: a program owns BLOCK_H hidden units with all their
gates and keeps their rows of W_hh for the whole launch. c and the gates of these units stay with
it. The others need h, which goes through slots by the protocol of ``exchange.py``. A step
is: wait for h, load all of it into the operands of a product (``slices.py``), multiply, sum over
the warps, apply the cell, put h into the next slot, publish. What no program waits for, the
stores of out, gates and c, follows the publication, and the loads of gx precede the wait.

What is published is the state that *enters* the next step: zero where a sequence begins. So rows
may be ragged or packed, and the product knows nothing of it. The first publication is h_0.

**Wavefront**: with L > 1 all layers run in the launch, layer l one step behind layer l - 1, which
takes T + L - 1 steps instead of T * L. A layer above the first also holds W_ih, waits for the
counter of the layer below, and reads its input from ``out``, which is stored before publishing.

No float is added atomically, so two runs agree bit for bit. The grid is ``(cdiv(H, BLOCK_H), batch
tiles, L*D)``; all programs of a launch must be on the chip at once, which
``launch_cooperative_grid`` guarantees or refuses; larger batches run in rounds.

Limits: tensors of 16 bits, or fp32 with tf32 products; L > 1 needs D = 1 and 16 units a program.
"""

import triton.language as tl
from triton.experimental import gluon

from . import exchange, slices, steps
from .cells import CELLS, Cell
from .launch import layers_forward, run_together, sizes_of
from .layouts import Slice, slice_of
from .mma import load_bias, round_operand, squash, widened
from .problem import Plan, Tiles
from .rows import Rows
from .tensors import Layers
from .tiles import PREVIOUS, add_to, choose, entering_state, leaving_state


@gluon.jit
def _load_rows(
    w_ptr, PART: tl.constexpr, PHASE: tl.constexpr, CELL: tl.constexpr, TILE: tl.constexpr
):
    """``w[product][chunk]``, the rows of this program's units: a gate each, of 8 units two."""
    H: tl.constexpr = TILE.H
    GATES: tl.constexpr = CELL.parts[PART]
    BITS: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth
    EACH: tl.constexpr = 1 if TILE.block_h > 8 else 2  # gates of a product
    LAYOUT: tl.constexpr = TILE.weight
    row = slices.row_of_slice(TILE.block_h * EACH, LAYOUT)
    if EACH == 1:
        unit = row // 16 * 16 + row % 8 * 2 + row // 8 % 2
    else:
        unit = row % 8
    unit += tl.program_id(0) * TILE.block_h
    w = ()
    for first in tl.static_range(0, len(GATES), EACH):
        gate = row * 0 + GATES[first]
        if first + 1 < len(GATES) and EACH == 2:
            gate = tl.where(row < 8, GATES[first], GATES[first + 1])
        here = (unit < H) & (row < TILE.block_h * (len(GATES) - first))
        each = ()
        for n in tl.static_range(len(TILE.chunks[PHASE])):
            k = slices.columns_of_slice(PHASE, n, BITS, LAYOUT, TILE)
            ptrs = w_ptr + (gate * H + unit)[None, :, None] * H + k
            mask = here[None, :, None] & (k < H)
            x = round_operand(tl.load(ptrs, mask=mask, other=0.0))
            each = each + (slices.hold(x, PHASE, n, TILE),)
        w = w + (each,)
    return w


@gluon.jit
def _input_products(layers, program, step, place, w_ih, CELL: tl.constexpr, TILE: tl.constexpr):
    """``W_ih x`` of every gate, x being the output of the layer below after dropout."""
    first = steps.row_of(program, step, place) + program.first_b
    last = (program.R - 1 - first).to(tl.int32)
    below = choose(layers.out, tl.maximum(program.z - 1, 0))
    x = slices.fetch(below + first * TILE.H, last, TILE.H, 0, False, TILE.H, TILE)
    mask = ()
    if layers.masks is not None:
        masks = choose(layers.masks, program.z) + first * TILE.H
        mask = slices.fetch(masks, last, TILE.H, 0, False, TILE.H, TILE)
    dropped = ()
    for n in tl.static_range(len(x)):
        dropped = dropped + (round_operand(x[n] * mask[n] if len(mask) > 0 else x[n]),)
    out = ()
    zero = slices.zero_acc(TILE.block_h, TILE)
    for g in tl.static_range(len(CELL.gates)):
        out = out + (slices.multiply(w_ih[g], dropped, zero, 0, False, TILE),)
    return out


@gluon.jit
def _phase(
    w, slot, gx, gh, starts, b, buffers, PHASE: tl.constexpr, CELL: tl.constexpr, TILE: tl.constexpr
):
    """The pre-activations of a phase's gates: gx, and gh with these gates behind it.

    ``starts`` are the products with the layer's input, or nothing. Where the two pre-activations of
    a gate are not just added, its start becomes another sum.
    """
    GATES: tl.constexpr = CELL.phases[PHASE]
    begin, apart = (), ()
    for n in tl.static_range(len(w)):
        start = slices.zero_acc(max(TILE.block_h, 16), TILE)
        if len(starts) > 0:
            if CELL.merged[GATES[n]]:
                start = starts[GATES[n]]
            else:
                apart = apart + (starts[GATES[n]],)
        begin = begin + (start,)
    accs = slices.products(w, slot, begin, PHASE, TILE)
    sums, apart = slices.add_up(buffers, accs + apart, TILE), ()
    for n in tl.static_range(len(GATES)):
        if CELL.merged[GATES[n]]:
            gh = gh + (sums[n] + gx[GATES[n]],)
        else:
            gh = gh + (sums[n] + b[GATES[n]] if len(b) > 0 else sums[n],)
            if len(starts) > 0:
                gx = add_to(gx, GATES[n], sums[len(GATES) + len(apart)])
                apart = apart + (0,)
    return gx, gh


@gluon.jit
def _with_bias(gx, b, b_ih, z, CELL: tl.constexpr):
    """gx with the biases that no product multiplies."""
    out = ()
    for g in tl.static_range(len(gx)):
        x = gx[g]
        if len(b) > 0 and CELL.merged[g]:
            x += b[g]
        if len(b_ih) > 0:
            x += tl.where(z > 0, b_ih[g], 0.0)  # the first layer's is in gx
        out = out + (x,)
    return out


@gluon.jit(do_not_specialize=["T", "B", "R", "first_tile", "patience"])
def _cooperative_fwd_kernel(
    layers, shared, T, B, R, first_tile, patience, CELL: tl.constexpr, TILE: tl.constexpr
):
    P: tl.constexpr = len(CELL.phases)
    G: tl.constexpr = len(CELL.gates)
    z = tl.program_id(2)
    program = exchange.program_of(layers, z, T, B, R, first_tile, TILE)
    counter, slots = exchange.group_of(shared, z, B, first_tile, TILE)
    counter_below, _ = exchange.group_of(shared, z - 1, B, first_tile, TILE)
    partners = tl.num_programs(0)

    w_hh = ()
    for p in tl.static_range(P):
        w_hh = w_hh + (_load_rows(choose(layers.w_hh, z), p, p, CELL, TILE),)
    b_hh, b_ih = load_bias(choose(layers.b_hh, z), program.cols, CELL, TILE), ()
    if TILE.L > 1:
        w_ih = _load_rows(choose(layers.w_ih, z), P, 0, CELL, TILE)
        b_ih = load_bias(choose(layers.b_ih, z), program.cols, CELL, TILE)
    buffers = slices.sum_buffers(2 * G if TILE.L > 1 else G, TILE)

    places = (steps.place_of(layers, program, 0), steps.place_of(layers, program, 1))
    gx_next = steps.load_gx(layers, program, 0, places[0], CELL, TILE)
    state = widened(steps.load_ends(layers.h_0, layers.c_0, program, TILE))
    state = entering_state(layers, state, steps.origins_at(program, places[0]))
    exchange.put(exchange.slot_of(slots, 0, TILE), program.cols, state[0], TILE)
    exchange.publish(counter)
    for step in range(T):
        published = P * step + 1
        gx = _with_bias(widened(gx_next), b_hh, b_ih, z, CELL)
        gx_next = steps.load_gx(layers, program, step + 1, places[1], CELL, TILE)
        later = steps.place_of(layers, program, step + 2)
        starts = ()
        if TILE.L > 1:
            starts = _zero_accs(G, TILE)
            if z > 0:
                exchange.wait(counter_below, partners * (published + P), patience)
                starts = _input_products(layers, program, step, places[0], w_ih, CELL, TILE)
        gh = ()
        for p in tl.static_range(P):
            slot = exchange.slot_of(slots, published - 1 + p, TILE)
            if p > 0:
                exchange.put(slot, program.cols, CELL.operand(p, gh, state, squash), TILE)
                exchange.publish(counter)
            exchange.wait(counter, partners * (published + p), patience)
            gx, gh = _phase(w_hh[p], slot, gx, gh, starts, b_hh, buffers, p, CELL, TILE)
        left, saved = CELL.forward(gx, gh, state, squash)
        left = leaving_state(layers, left, state, steps.origins_at(program, places[0]))
        origins = steps.origins_at(program, places[1])
        if layers.origins is not None:  # behind the last step no sequence begins
            origins = tl.where(step + 1 < T, origins, PREVIOUS)
        state = entering_state(layers, left, origins)

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
def _zero_accs(N: tl.constexpr, TILE: tl.constexpr):
    out = ()
    for _ in tl.static_range(N):
        out = out + (slices.zero_acc(TILE.block_h, TILE),)
    return out


def tile_of(cell: Cell, layers: Layers, tiles: Tiles) -> Slice:
    """The sizes and layouts of a launch."""
    columns = (layers.h_0.shape[-1],) * len(cell.phases)
    itemsize = layers.h_0.element_size()
    return slice_of(*sizes_of(layers, tiles), tiles.num_warps, itemsize, columns, tiles.halved)


def forward(cell: str, plan: Plan, layers: Layers, rows: Rows) -> None:
    """Runs the layers of one launch: writes out, h_n, c_n and what is to be saved.

    Raises:
        LaunchRefused: the device does not hold all programs of a launch at once.
    """
    tensors = (layers_forward(layers, plan.layers),)
    run_together(_cooperative_fwd_kernel, CELLS[cell], tensors, rows, plan.forward, tile_of)
