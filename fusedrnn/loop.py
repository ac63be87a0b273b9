"""The recurrence of one layer as a lean loop over time in plain torch: the backend of the CPU.

Axes: T time, B batch, H hidden, P the columns of h (H, but for a projection), D directions, G
gates, S saved tiles, N gradient tiles (``kernels/spec.py``), R rows (``kernels/rows.py``), n the
sequences that a step has.

At B = 32, H = 128 the GEMM of a step takes 20 us on two cores, so an element-wise call of 1 to 20
us counts; with H = 16 only the *number* of calls counts, and that of views, 0.5 us each. Therefore:

- A step's state is the row of the history that it writes anyway (``steps.py``), so no state is
  copied: h lies in ``out``, c in ``cs``. Missing steps of packed sequences cost nothing.
- The input part gx is written where the gates will be, and the product is added to it in place:
  2.6 us at B = 64, H = 16, where ``addmm`` with another result takes 4.1.
- Views of all steps' rows are made by one ``split``, 0.5 us each instead of 1.3 us.
- Autograd's dispatch keys are left out while the loop runs: 0.12 us a call, a tenth of the small
  ones.
- Backward, all that does not depend on the gradients is computed before, for a chunk of steps at
  a time, straight into ``dgates``: a step only multiplies it by dh (or dc) and by W_hh. A chunk is
  large enough for two threads, which a step is not, and small enough for the cache.
- The gradients of weights and input are made of ``dgates`` a segment at a time, while those are in
  the cache; they are never there of all steps.

The equations of the cells stand in ``loop_cells.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import compiled
from .kernels.rows import Rows
from .kernels.spec import SPECS, Weights
from .loop_cells import CELLS, BackwardOn, ForwardOn, State
from .steps import Part, Steps
from .threads import alone, are_few

#: Numbers in one tile of a chunk of backward, whose element-wise part is computed at once. With
#: T = 500, B = 32, H = 128 on one thread backward takes 79, 70, 65, 63, 61, 62, 69, 73 ms at
#: 2 ** (13, 14, 15, 16, 17, 18, 20, 24) in an LSTM.
CHUNK = 1 << 16
#: Numbers of dgates in a segment of backward, some chunks: 4 MiB.
SEGMENT = 1 << 20


def room_of(cell: str, H: int) -> int:
    """The columns of a buffer that holds gx and, in place of it, the gates: max(G, S)*H."""
    return max(SPECS[cell].gates, SPECS[cell].saved) * H


def _by_row(x: Tensor, rows: Rows) -> Tensor:
    """``[R, .]`` of what may be ``[T, B, .]``."""
    return x.view(rows.total, x.shape[-1])


def _columns(of_directions: Tensor, d: int, P: int) -> Tensor:
    """Of ``[R, D*P]`` those of a direction."""
    return of_directions if of_directions.shape[1] == P else of_directions[:, d * P : (d + 1) * P]


def _put_back(mask: Tensor, kept: Sequence[Tensor], states: Sequence[Tensor]) -> None:
    """The masked rows of the states become again what they were, whatever a step made of them."""
    for old, state in zip(kept, states, strict=True):
        torch.where(mask, old, state, out=state)


def _room(gx: Tensor, gates: Tensor | None, columns: int) -> Tensor:
    """One direction's gx in a buffer with ``columns``, which is gates where those are kept."""
    if gates is None or not gates.shape[1]:
        if gx.shape[1] == columns:
            return gx
        gates = gx.new_empty(len(gx), columns)
    if gates.data_ptr() != gx.data_ptr():
        gates[:, : gx.shape[1]] = gx
    return gates


def with_one_bias(cell: str, w: Weights) -> Weights:
    """b_hh as a part of b_ih, but for what the cell adds itself: a pass less over gx."""
    if w.b_ih is None or w.b_hh is None:
        return w
    shared = _shared_bias(cell, w)
    if shared == len(w.b_hh):
        return w._replace(b_ih=w.b_ih + w.b_hh, b_hh=None)
    b_ih = w.b_ih.clone()
    b_ih[:shared].add_(w.b_hh[:shared])  # += would copy the slice to where it is
    return w._replace(b_ih=b_ih, b_hh=w.b_hh[shared:])


def _shared_bias(cell: str, w: Weights) -> int:
    """How many numbers of b_hh, the first, are added where those of b_ih are."""
    assert w.b_hh is not None
    H = w.w_hh.shape[0] // SPECS[cell].gates
    return len(w.b_hh) - CELLS[cell].own_biases * H


def _add_b_hh(cell: str, w: Weights, gx: Tensor) -> None:
    if w.b_hh is not None and (shared := _shared_bias(cell, w)):
        gx[:, :shared].add_(w.b_hh[:shared])


def loop_gates(cell: str, gates: Tensor, weights: Sequence[Weights], h: Sequence[Tensor]) -> None:
    """Turns gx into gates where it lies, of r steps of which the h that entered is known.

    gates: ``[D, r, S*H]``, of which the first G tiles are gx; h: of each direction ``[r, P]``.
    """
    H = weights[0].w_hh.shape[0] // SPECS[cell].gates
    with torch._C._AutoDispatchBelowAutograd():
        for d, w in enumerate(weights):
            _add_b_hh(cell, w, gates[d])
            one = Steps(Rows(1, len(h[d])), d)
            CELLS[cell].forward(ForwardOn(one.whole, w, gates[d], (), (), H, True))(0, h[d], None)


def loop_fwd(
    cell: str,
    gx: Tensor,
    weights: Sequence[Weights],
    h_0: Tensor,
    c_0: State,
    out: Tensor,
    h_n: Tensor,
    c_n: State,
    gates: Tensor | None,
    cs: Tensor | None,
    rows: Rows,
    compiles: bool = False,
) -> None:
    """One layer, all directions. What has an axis R may have axes T, B instead.

    Args:
        cell: the name of a cell.
        gx: ``x W_ih^T + b_ih``, ``[D, R, G*H]``; overwritten. With ``room_of`` columns, of which it
            is the first, nothing is copied; it may be gates itself.
        weights: of each direction.
        h_0: ``[D, B, P]``, and h_n; c_0 and c_n ``[D, B, H]``, or None in a cell without c.
        out: ``[R, D*P]``.
        gates: ``[D, R, S*H]``, or None if nothing is to be saved; likewise cs ``[D, R, H]``.
        rows: which steps there are.
        compiles: whether those that can be are run compiled (``compiled.py``).
    """
    P, spec = h_0.shape[2], SPECS[cell]
    H = weights[0].w_hh.shape[0] // spec.gates
    with torch._C._AutoDispatchBelowAutograd():
        for d, w in enumerate(weights):
            s, saved = Steps(rows, d), None if gates is None else _by_row(gates[d], rows)
            room = saved
            if room is None or gx is not gates:
                room = _room(_by_row(gx[d], rows), saved, room_of(cell, H))
            _add_b_hh(cell, w, room)
            hs = _columns(_by_row(out, rows), d, P)
            c_left = None if cs is None else _by_row(cs[d], rows)
            if c_0 is not None and c_left is None and not s.is_dense:
                c_left = c_0.new_empty(rows.total, H)  # nothing carries c of those that ended
            of_c_0, of_c_n = (None, None) if c_0 is None else (c_0[d], c_n[d])
            part, h, c = s.whole, h_0[d], of_c_0
            with alone(are_few(s.T, s.B, w.w_hh)):
                if compiles:
                    kept = room, saved is not None
                    part, h, c = compiled.forward_steps(cell, s, w, *kept, h, c, hs, c_left)
                _forwards(cell, s, part, w, room, saved, h, c, hs, c_left, of_c_n)
            s.finish(h_0[d], hs, h_n[d])
            if c_left is not None:
                s.finish(c_0[d], c_left, c_n[d])


def _forwards(
    cell: str,
    s: Steps,
    part: Part,
    w: Weights,
    room: Tensor,
    saved: Tensor | None,
    h_0: Tensor,
    c_0: State,
    hs: Tensor,
    c_left: Tensor | None,
    c_n: State,
) -> None:
    """Through the steps of a part of one direction: of all, or of dense ones the last.

    room: ``[R, .]``, as of ``_room``; saved: it, if gates are kept; h_0 and c_0: what enters the
    part; hs and c_left: h and c that leave each step, ``[R, P]`` and ``[R, H]``; without c_left c
    is carried in c_n.
    """
    own, count, H = part.rows, len(part.sizes), w.w_hh.shape[0] // SPECS[cell].gates
    h = part.split(hs[own])
    c: Sequence[Tensor] = ()
    entering_c: Iterable[State] = [None] * count
    if c_left is not None:
        c = part.split(c_left[own])
        entering_c = s.entering(c_0, c)
    elif c_0 is not None:
        c = entering_c = [c_n.copy_(c_0)] * count
    if not count:
        return
    written = [h, c, () if saved is None else part.split(saved)] if s.skips else []
    step = CELLS[cell].forward(ForwardOn(part, w, room[own], h, c, H, saved is not None))
    order = range(count) if s.d == 0 else range(count - 1, -1, -1)
    for k, h_k, c_k in zip(order, s.entering(h_0, h), entering_c, strict=True):
        step(k, h_k, c_k)
        if (skipped := s.skipped[part.times[k]]) is not None:
            for to in written:
                if to:
                    to[k].masked_fill_(skipped, 0)


class Segment(NamedTuple):
    """What backward has found of some steps of a direction. Its tensors are overwritten later."""

    d: int
    part: Part
    dgates: Tensor  # [r, N*H]
    entering: Callable[[], list[Tensor]]  # h that entered each row, in pieces by their order


def loop_bwd(
    cell: str,
    d_out: Tensor | None,
    d_cs: Tensor | None,
    d_h_n: Tensor,
    d_c_n: State,
    weights: Sequence[Weights],
    h_0: Tensor,
    c_0: State,
    out: Tensor,
    gates: Tensor,
    cs: State,
    dgates: Tensor | None,
    d_h_0: Tensor,
    d_c_0: State,
    rows: Rows,
    compiles: bool = False,
    take: Callable[[Segment], object] = lambda segment: None,
) -> None:
    """One layer backwards: fills dgates ``[D, R, N*H]``, d_h_0 and d_c_0.

    Shapes as in ``loop_fwd``. d_out (``[R, D*P]``) and d_cs (``[D, R, H]``), the gradients that
    reach h and c of each step from outside, may be None. dgates may be None, if all that is wanted
    of them is what ``take`` makes of each segment as it is found: then only a segment's are there.
    compiles: as of ``loop_fwd``.
    """
    P, tiles = h_0.shape[2], SPECS[cell].grad_tiles
    H = weights[0].w_hh.shape[0] // SPECS[cell].gates
    limit = max(CHUNK // max(H, 1), 1)  # of what is not much more, one chunk is made
    with torch._C._AutoDispatchBelowAutograd():
        for d, w in enumerate(weights):
            s, dh = Steps(rows, d), d_h_0[d].copy_(d_h_n[d])
            hs = _columns(_by_row(out, rows), d, P)
            of_out = None if d_out is None else _columns(_by_row(d_out, rows), d, P)
            dc = c = of_cs = None
            if cs is not None:
                dc, c = d_c_0[d].copy_(d_c_n[d]), _by_row(cs[d], rows)
                of_cs = None if d_cs is None else _by_row(d_cs[d], rows)
            h_entered = s.entered(h_0[d], hs)
            entered = h_entered if c is None else s.entered(c_0[d], c)
            saved, segments = _by_row(gates[d], rows), s.cut(s.whole, _rows_of_segment(cell, H))
            if dgates is None:  # one buffer for all segments
                most = max((part.total for part in segments), default=0)
                room = saved.new_empty(most, tiles * H)
            for part in segments:
                to = _by_row(dgates[d], rows)[part.rows] if dgates is not None else room
                to, rest = to[: part.total], part
                if compiles and of_cs is None:
                    states = (h_0[d], hs) if c is None else (c_0[d], c)
                    given = *states, saved, of_out, to, dh, dc
                    with alone(are_few(s.T, s.B, w.w_hh)):
                        rest = compiled.backward_steps(cell, s, part, w, *given)
                for chunk in s.cut(rest, limit if rest.total > 2 * limit else 2 * limit):
                    own = chunk.rows
                    on = BackwardOn(
                        chunk, w, dh, dc, hs[own], saved[own], None if c is None else c[own],
                        to[chunk.within(part)], partial(_in_one, entered, chunk),
                    )  # fmt: skip
                    arriving = [
                        (chunk.prefix(state), chunk.split(grad[own]))
                        for state, grad in ((dh, of_out), (dc, of_cs))
                        if state is not None and grad is not None
                    ]
                    with alone(are_few(len(chunk.sizes), s.B, w.w_hh)):
                        _backwards(s, cell, on, arriving)
                take(Segment(d, part, to, partial(h_entered, part)))


def _in_one(entered: Callable[[Part], list[Tensor]], part: Part) -> Tensor:
    pieces = entered(part)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _rows_of_segment(cell: str, H: int) -> int:
    """Few enough for the cache, and enough for adding a segment's dW to the others' to be little
    beside the product that it is of: 4 H rows."""
    return max(SEGMENT // max(SPECS[cell].grad_tiles * H, 1), 4 * H)


def _backwards(
    s: Steps,
    cell: str,
    on: BackwardOn,
    arriving: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]],
) -> None:
    """Backwards through the steps of a chunk.

    arriving: prefixes of the gradients that are carried, and of each step what is added to them
    from outside.
    """
    part = on.steps
    states = [on.dh] if on.dc is None else [on.dh, on.dc]
    written = part.split(on.dgates) if s.skips else ()
    step = CELLS[cell].backward(on)
    order = range(len(part.sizes))
    for k in order[::-1] if s.d == 0 else order:
        t = part.times[k]
        if (skipped := s.skipped[t]) is not None:
            kept = [state.clone() for state in states]
        for state, grad in arriving:
            state[k].add_(grad[k])
        step(k)
        if skipped is not None:
            _put_back(skipped, kept, states)
            written[k].masked_fill_(skipped, 0)
        if (new := s.zero[t]) is not None:
            for carried in states:  # whatever they hold: 0 times inf is NaN
                carried[: len(new)].masked_fill_(new, 0)
