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

Each cell is two functions that bind its tensors and return its step, so that its equations stand in
one place. They are those of ``reference.py``, which remains the oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import onednn
from .kernels.rows import Rows
from .kernels.spec import SPECS, Weights
from .steps import Steps

State = Any  # a Tensor, or None for the c of a cell without one

#: Numbers in one tile of a chunk of backward. With T = 500, B = 32, H = 128 on one thread backward
#: takes 79, 70, 65, 63, 61, 62, 69, 73 ms at 2 ** (13, 14, 15, 16, 17, 18, 20, 24) in an LSTM.
CHUNK = 1 << 16
#: Up to this H a GRU's product of all four tiles, one of them with zeros, is cheaper than one
#: product of two tiles and one of the last.
_ONE_PRODUCT = 64


class _Forward(NamedTuple):
    """What a cell's forward works on."""

    steps: Steps
    w: Weights
    gates: Tensor  # [R, max(G, S)*H], whose first G tiles are gx with what b_hh there is for them
    h: Sequence[Tensor]  # of each step [n, P], to be written
    c: Sequence[Tensor]  # likewise [n, H]; it may be the tensor that enters
    H: int
    saves: bool  # whether all S tiles of gates are wanted


class _Backward(NamedTuple):
    """What a cell's backward works on."""

    steps: Steps
    w: Weights
    dh: Tensor  # [B, P], the gradient of the state
    dc: State  # [B, H]
    out: Tensor  # [R, P]
    gates: Tensor  # [R, S*H]
    cs: State  # [R, H]
    dgates: Tensor  # [R, N*H]
    #: Of a chunk the states that entered its steps: c in a cell that has it, else h.
    before: Callable[[range, slice], Tensor]


#: Writes the states that leave step t, from those that enter it.
Forward = Callable[[int, Tensor, State], object]
#: Takes the gradients of the states from after step t to before it.
Backward = Callable[[int], object]
#: Fills dgates of a chunk of steps, in these rows, with all that dh and dc are multiplied by.
Prepare = Callable[[range, slice], object]


def _sigmoid_slope(y: Tensor, out: Tensor) -> Tensor:
    """y (1 - y) of y = sigmoid(x)."""
    return torch.addcmul(y, y, y, value=-1, out=out)


def _lstm_forward(a: _Forward) -> Forward:
    """i, f, o = sigmoid(.), g = tanh(.); c' = f c + i g; h' = o tanh(c'), or W_hr (o tanh(c')).

    tanh calls a library for each row of a tile with gaps, so it gets a copy. 2 sigmoid(2x) - 1
    would be faster for large tiles, and lose tanh's relative precision near 0.
    """
    s, weight, saves = a.steps, a.w.w_hh.t(), a.saves
    project = None if a.w.w_hr is None else a.w.w_hr.t()
    gates, (i, f, g, o) = s.split(a.gates), (s.split(tile) for tile in a.gates.split(a.H, 1))
    scratch = s.prefix(a.gates.new_empty(s.B, a.H))

    def step(t: int, h: Tensor, c: State) -> None:
        g_t, c_t, tmp = g[t], a.c[t], scratch[t]
        gates[t].addmm_(h, weight)
        tmp.copy_(g_t).tanh_()
        gates[t].sigmoid_()  # g too, for nothing: still cheaper than two calls for i, f and o
        torch.mul(f[t], c, out=c_t).addcmul_(i[t], tmp)
        if saves:
            g_t.copy_(tmp)
        torch.tanh(c_t, out=tmp)
        if project is None:
            torch.mul(o[t], tmp, out=a.h[t])
        else:
            torch.mm(tmp.mul_(o[t]), project, out=a.h[t])

    return step


def _lstm_backward(a: _Backward) -> tuple[Prepare, Backward]:
    """dc += dh o (1 - tanh^2 c); di, df, dg = dc (..); do = dh (..); dh = dgates W_hh; dc *= f."""
    s, cs, w_hh, w_hr, H = a.steps, a.cs, a.w.w_hh, a.w.w_hr, a.dc.shape[1]
    i, f, g, o = a.gates.chunk(4, 1)
    d_i, d_f, d_g, d_o = a.dgates.chunk(4, 1)
    dh, dc, dc_wide = s.prefix(a.dh), s.prefix(a.dc), s.prefix(a.dc.unsqueeze(1))
    dh_out = dh if w_hr is None else s.prefix(torch.empty_like(a.dc))
    dgates, d_ifg = s.split(a.dgates), s.split(a.dgates.view(-1, 4, H)[:, :3])
    d_o_t, f_t = s.split(d_o), s.split(f)
    _tanh_c, _slope = s.scratch(cs), s.scratch(cs)
    slopes: dict[int, Tensor] = {}

    def prepare(times: range, rows: slice) -> None:
        n = rows.stop - rows.start
        tanh_c, slope = _tanh_c[:n], _slope[:n]
        torch.tanh(cs[rows], out=tanh_c)
        torch.mul(o[rows], tanh_c, out=slope)  # o tanh c
        torch.addcmul(slope, slope, o[rows], value=-1, out=d_o[rows])
        torch.addcmul(o[rows], slope, tanh_c, value=-1, out=slope)  # o (1 - tanh^2 c)
        slopes.update(zip(times, slope.split(s.sizes[times.start : times.stop]), strict=True))
        _sigmoid_slope(i[rows], d_i[rows]).mul_(g[rows])
        _sigmoid_slope(f[rows], d_f[rows]).mul_(a.before(times, rows))
        torch.mul(i[rows], g[rows], out=tanh_c)
        torch.addcmul(i[rows], tanh_c, g[rows], value=-1, out=d_g[rows])

    def step(t: int) -> None:
        dh_t, dc_t = dh_out[t], dc[t]
        if w_hr is not None:
            torch.mm(dh[t], w_hr, out=dh_t)
        dc_t.addcmul_(dh_t, slopes[t])
        d_ifg[t].mul_(dc_wide[t])
        d_o_t[t].mul_(dh_t)
        dc_t.mul_(f_t[t])
        torch.mm(dgates[t], w_hh, out=dh[t])

    return prepare, step


def _gru_products(w: Weights, H: int) -> list[tuple[slice, Tensor]]:
    """W_hh by columns of the tiles (r, z, n, W_hn h), of which n has no part in h: in one product
    with zeros for it, or in two without."""
    w_rz, w_n = w.w_hh.split((2 * H, H))
    if H <= _ONE_PRODUCT:
        return [(slice(0, 4 * H), torch.cat([w_rz, torch.zeros_like(w_n), w_n]))]
    return [(slice(0, 2 * H), w_rz), (slice(3 * H, 4 * H), w_n)]


def _gru_forward(a: _Forward) -> Forward:
    """r, z = sigmoid(.); n = tanh(gx_n + r (W_hn h + b_hn)); h' = (1 - z) n + z h.

    The fourth tile, W_hn h + b_hn, begins as b_hn; gx has that of r and z.
    """
    s, H, saves, b_hh = a.steps, a.H, a.saves, a.w.b_hh
    a.gates[:, 3 * H :] = 0.0 if b_hh is None else b_hh[2 * H :]
    if b_hh is not None:
        a.gates[:, : 2 * H] += b_hh[: 2 * H]
    products = [(s.split(a.gates[:, to]), w.t()) for to, w in _gru_products(a.w, H)]
    rz = s.split(a.gates[:, : 2 * H])
    r, z, n, hn = (s.split(tile) for tile in a.gates.split(H, 1))
    scratch = s.prefix(a.gates.new_empty(s.B, H))

    def step(t: int, h: Tensor, _: State) -> None:
        tmp = scratch[t]
        for to, weight in products:
            to[t].addmm_(h, weight)
        rz[t].sigmoid_()
        torch.addcmul(n[t], r[t], hn[t], out=tmp).tanh_()
        torch.lerp(tmp, h, z[t], out=a.h[t])
        if saves:
            n[t].copy_(tmp)

    return step


def _gru_backward(a: _Backward) -> tuple[Prepare, Backward]:
    """All four tiles are dh times what is known before; dh = dh z + (dr, dz, r dn) W_hh."""
    s, H = a.steps, a.dh.shape[1]
    r, z, n, hn = a.gates.chunk(4, 1)
    d_r, d_z, d_n, d_hn = a.dgates.chunk(4, 1)
    dh, dh_wide, z_t = s.prefix(a.dh), s.prefix(a.dh.unsqueeze(1)), s.split(z)
    d_all = s.split(a.dgates.view(-1, 4, H))
    products = [(s.split(a.dgates[:, of]), w) for of, w in _gru_products(a.w, H)]
    scratch = s.scratch(z)

    def prepare(times: range, rows: slice) -> None:
        r_, z_, n_, to_r, to_z, to_n = (x[rows] for x in (r, z, n, d_r, d_z, d_n))
        _candidate_slopes(z_, n_, a.before(times, rows), to_z, to_n, scratch)
        _sigmoid_slope(r_, to_r).mul_(hn[rows]).mul_(to_n)
        torch.mul(to_n, r_, out=d_hn[rows])

    def step(t: int) -> None:
        dh_t = dh[t]
        d_all[t].mul_(dh_wide[t])
        dh_t.mul_(z_t[t])
        for grads, w in products:
            dh_t.addmm_(grads[t], w)

    return prepare, step


def _candidate_slopes(
    z: Tensor, n: Tensor, h_before: Tensor, to_z: Tensor, to_n: Tensor, scratch: Tensor
) -> None:
    """Of h' = (1 - z) n + z h: (h - n) z (1 - z), and (1 - z) (1 - n^2)."""
    torch.mul(n, n, out=to_n).sub_(1)
    torch.addcmul(to_n, to_n, z, value=-1, out=to_n).neg_()
    _sigmoid_slope(z, to_z).mul_(torch.sub(h_before, n, out=scratch[: len(n)]))


def _gru_reset_before_forward(a: _Forward) -> Forward:
    """r, z = sigmoid(.); n = tanh(gx_n + W_hn (r h) + b_hn); h' = (1 - z) n + z h."""
    s, H, saves = a.steps, a.H, a.saves
    w_rz, w_n = a.w.w_hh.t().split((2 * H, H), 1)
    rz, (r, z, n) = s.split(a.gates[:, : 2 * H]), (s.split(tile) for tile in a.gates.split(H, 1))
    scratch = s.prefix(a.gates.new_empty(s.B, H))

    def step(t: int, h: Tensor, _: State) -> None:
        n_t, tmp = n[t], scratch[t]
        rz[t].addmm_(h, w_rz).sigmoid_()
        torch.mul(r[t], h, out=tmp)
        tmp.copy_(n_t.addmm_(tmp, w_n)).tanh_()
        if saves:
            n_t.copy_(tmp)
        torch.lerp(tmp, h, z[t], out=a.h[t])

    return step


def _gru_reset_before_backward(a: _Backward) -> tuple[Prepare, Backward]:
    """dz, dn = dh (..); du = dn W_hn; dr = du (..); dh = dh z + du r + (dr, dz) W_hrz."""
    s, H = a.steps, a.dh.shape[1]
    w_rz, w_n = a.w.w_hh.split((2 * H, H))
    r, z, n = a.gates.chunk(3, 1)
    d_r, d_z, d_n = a.dgates.chunk(3, 1)
    dh, dh_wide, r_t, z_t = s.prefix(a.dh), s.prefix(a.dh.unsqueeze(1)), s.split(r), s.split(z)
    d_rz, d_zn = s.split(a.dgates[:, : 2 * H]), s.split(a.dgates.view(-1, 3, H)[:, 1:])
    d_r_t, d_n_t, scratch = s.split(d_r), s.split(d_n), s.prefix(torch.empty_like(a.dh))
    differences = s.scratch(z)

    def prepare(times: range, rows: slice) -> None:
        h_before = a.before(times, rows)
        _sigmoid_slope(r[rows], d_r[rows]).mul_(h_before)
        _candidate_slopes(z[rows], n[rows], h_before, d_z[rows], d_n[rows], differences)

    def step(t: int) -> None:
        du = scratch[t]
        d_zn[t].mul_(dh_wide[t])
        torch.mm(d_n_t[t], w_n, out=du)
        d_r_t[t].mul_(du)
        dh[t].mul_(z_t[t]).addcmul_(du, r_t[t]).addmm_(d_rz[t], w_rz)

    return prepare, step


def _rnn_forward(a: _Forward, function: Callable) -> Forward:
    """h' = tanh(.) or max(., 0)."""
    weight, gx = a.w.w_hh.t(), a.steps.split(a.gates)

    def step(t: int, h: Tensor, _: State) -> None:
        function(gx[t].addmm_(h, weight), out=a.h[t])

    return step


def _rnn_backward(
    a: _Backward, slope: Callable[[Tensor, Tensor], object]
) -> tuple[Prepare, Backward]:
    """da = dh (..); dh = da W_hh. The slope of either function follows from h alone."""
    w, dh, dgates = a.w.w_hh, a.steps.prefix(a.dh), a.steps.split(a.dgates)

    def prepare(_: range, rows: slice) -> None:
        slope(a.out[rows], a.dgates[rows])

    def step(t: int) -> None:
        torch.mm(dgates[t].mul_(dh[t]), w, out=dh[t])

    return prepare, step


class _Cell(NamedTuple):
    """The two functions of a cell; each binds its tensors and returns the step."""

    forward: Callable[[_Forward], Forward]
    backward: Callable[[_Backward], tuple[Prepare, Backward]]
    #: Whether it adds b_hh itself, because something comes between that and gx.
    own_bias: bool = False


_CELLS = {
    "lstm": _Cell(_lstm_forward, _lstm_backward),
    "gru": _Cell(_gru_forward, _gru_backward, own_bias=True),
    "gru_reset_before": _Cell(_gru_reset_before_forward, _gru_reset_before_backward),
    "rnn_tanh": _Cell(
        partial(_rnn_forward, function=torch.tanh),
        partial(_rnn_backward, slope=lambda h, to: torch.mul(h, h, out=to).neg_().add_(1)),
    ),
    "rnn_relu": _Cell(
        partial(_rnn_forward, function=partial(torch.clamp_min, min=0)),
        partial(_rnn_backward, slope=lambda h, to: to.copy_(h > 0)),
    ),
}


def room_of(cell: str, H: int) -> int:
    """The columns of a buffer that holds gx and, in place of it, the gates: max(G, S)*H."""
    return max(SPECS[cell].gates, SPECS[cell].saved) * H


def _by_row(x: Tensor, rows: Rows) -> Tensor:
    """``[R, .]`` of what may be ``[T, B, .]``."""
    return x.view(rows.total, x.shape[-1])


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
    """
    P, spec = h_0.shape[2], SPECS[cell]
    H = weights[0].w_hh.shape[0] // spec.gates
    with torch._C._AutoDispatchBelowAutograd():
        for d, w in enumerate(weights):
            s, saved = Steps(rows, d), None if gates is None else _by_row(gates[d], rows)
            room = _room(_by_row(gx[d], rows), saved, room_of(cell, H))
            if w.b_hh is not None and not _CELLS[cell].own_bias:
                room[:, : spec.gates * H] += w.b_hh
            hs = _by_row(out, rows)[:, d * P : (d + 1) * P]
            c_left = None if cs is None else _by_row(cs[d], rows)
            if c_0 is not None and c_left is None and not s.is_dense:
                c_left = c_0.new_empty(rows.total, H)  # nothing carries c of those that ended
            entering: tuple[Tensor, State] = h_0[d], None if c_0 is None else c_0[d]
            if c_left is not None and cs is not None and onednn.takes(s, w, room):
                onednn.lstm_forward(s, w, room, *entering, hs, c_left)
            else:
                final = None if c_n is None else c_n[d]
                _forwards(cell, s, w, room, saved, *entering, hs, c_left, final)
            s.finish(h_0[d], hs, h_n[d])
            if c_left is not None:
                s.finish(c_0[d], c_left, c_n[d])


def _forwards(
    cell: str,
    s: Steps,
    w: Weights,
    room: Tensor,
    saved: Tensor | None,
    h_0: Tensor,
    c_0: State,
    hs: Tensor,
    c_left: Tensor | None,
    c_n: State,
) -> None:
    """Through the steps of one direction.

    room: ``[R, .]``, as of ``_room``; saved: it, if gates are kept; hs and c_left: h and c that
    leave each step, ``[R, P]`` and ``[R, H]``; without c_left c is carried in c_n.
    """
    h, H = s.split(hs), w.w_hh.shape[0] // SPECS[cell].gates
    c: Sequence[Tensor] = ()
    entering_c: Iterable[State] = [None] * s.T
    if c_left is not None:
        c = s.split(c_left)
        entering_c = s.entering(c_0, c)
    elif c_0 is not None:
        c = entering_c = [c_n.copy_(c_0)] * s.T
    written = [h, c, () if saved is None else s.split(saved)] if s.skips else []
    step = _CELLS[cell].forward(_Forward(s, w, room, h, c, H, saved is not None))
    for t, h_t, c_t in zip(s.order, s.entering(h_0, h), entering_c, strict=True):
        step(t, h_t, c_t)
        if (skipped := s.skipped[t]) is not None:
            for to in written:
                if to:
                    to[t].masked_fill_(skipped, 0)


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
    dgates: Tensor,
    d_h_0: Tensor,
    d_c_0: State,
    rows: Rows,
) -> None:
    """One layer backwards: fills dgates ``[D, R, N*H]``, d_h_0 and d_c_0.

    Shapes as in ``loop_fwd``. d_out (``[R, D*P]``) and d_cs (``[D, R, H]``), the gradients that
    reach h and c of each step from outside, may be None.
    """
    P = h_0.shape[2]
    with torch._C._AutoDispatchBelowAutograd():
        for d, w in enumerate(weights):
            s, columns = Steps(rows, d), slice(d * P, (d + 1) * P)
            s.cut(max(CHUNK * SPECS[cell].grad_tiles // dgates.shape[-1], 1))
            dh, hs, dc, c = d_h_0[d].copy_(d_h_n[d]), _by_row(out, rows)[:, columns], None, None
            saved = _by_row(gates[d], rows)
            to, states, arriving = _by_row(dgates[d], rows), [dh], []
            if d_out is not None:
                arriving.append((s.prefix(dh), s.split(_by_row(d_out, rows)[:, columns])))
            if cs is None:
                before = s.gather(h_0[d], hs)
            else:
                dc, c = d_c_0[d].copy_(d_c_n[d]), _by_row(cs[d], rows)
                states.append(dc)
                if d_cs is not None:
                    arriving.append((s.prefix(dc), s.split(_by_row(d_cs[d], rows))))
                before = s.gather(c_0[d], c)
            prepare, step = _CELLS[cell].backward(_Backward(s, w, dh, dc, hs, saved, c, to, before))
            _backwards(s, prepare, step, states, arriving, s.split(to) if s.skips else ())


def _backwards(
    s: Steps,
    prepare: Prepare,
    step: Backward,
    states: Sequence[Tensor],
    arriving: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]],
    written: Sequence[Tensor],
) -> None:
    """Backwards through the steps of one direction.

    states: the gradients that are carried; arriving: prefixes of them, and of each step what is
    added from outside; written: dgates of each step.
    """
    for times, chunk in s.chunks:
        prepare(times, chunk)
        for t in times[::-1] if s.d == 0 else times:
            if (skipped := s.skipped[t]) is not None:
                kept = [state.clone() for state in states]
            for state, grad in arriving:
                state[t].add_(grad[t])
            step(t)
            if skipped is not None:
                _put_back(skipped, kept, states)
                written[t].masked_fill_(skipped, 0)
            if (new := s.zero[t]) is not None:
                for carried in states:  # whatever they hold: 0 times inf is NaN
                    carried[: len(new)].masked_fill_(new, 0)
