"""The recurrence of one layer as a lean loop over time in plain torch: the backend of the CPU.

Axes: T time, B batch, H hidden, P the columns of h (H, but for a projection), D directions, G
gates, S saved tiles, N gradient tiles (``kernels/spec.py``), R rows (``kernels/rows.py``), n the
sequences that a step has.

At B = 32, H = 128 the GEMM of a step takes 40 us on two cores, so an element-wise call of 1 to 20
us counts; with H = 16 only the *number* of calls counts. Therefore:

- The states live in ``h_n`` and ``c_n`` (backward: ``d_h_0`` and ``d_c_0``) and are changed in
  place. Packed sequences stand by falling length, so a step works on the first n rows of them: in
  the forward direction those behind keep their final state, in the backward direction theirs is
  still the initial one. Nothing else has to know of lengths.
- Views of all steps' rows are made by one ``split``, 0.5 us each instead of 1.3 us.
- Backward, all that does not depend on the gradients is computed before, for a chunk of steps at
  a time, straight into ``dgates``: a step only multiplies it by dh (or dc) and by W_hh. A chunk is
  large enough for two threads, which a step is not, and small enough for the cache.

Each cell is two functions that bind its tensors and return its step, so that its equations stand in
one place. They are those of ``reference.py``, which remains the oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernels.rows import INITIAL, SKIPPED, ZERO, Rows
from .kernels.spec import SPECS, Weights

State = Any  # a Tensor, or None for the c of a cell without one

#: Numbers in one tile of a chunk of backward. With T = 500, B = 32, H = 128 on one thread backward
#: takes 79, 70, 65, 63, 61, 62, 69, 73 ms at 2 ** (13, 14, 15, 16, 17, 18, 20, 24) in an LSTM.
CHUNK = 1 << 16


class _Steps:
    """The rows of one direction, cut into steps."""

    def __init__(self, rows: Rows, d: int) -> None:
        self.T, self.d = rows.T, d
        self.sizes = [rows.B] * rows.T if rows.sizes is None else rows.sizes.tolist()
        self.starts = [0, *accumulate(self.sizes)]
        self.chunks: list[tuple[range, slice]] = []
        self.order = range(self.T) if d == 0 else range(self.T - 1, -1, -1)
        kinds = (ZERO, SKIPPED, INITIAL)
        self.zero, self.skipped, self.initial = (self._masks(rows, kind) for kind in kinds)

    def _masks(self, rows: Rows, kind: int) -> list[Tensor | None]:
        """A mask ``[n, 1]`` for each step, or None where the CPU sees that it masks nothing."""
        if rows.origins is None or (rows.sizes is not None and kind != ZERO):
            return [None] * self.T  # what is packed skips nothing, and its order tells INITIAL
        of_all = rows.origins[self.d] == kind
        masks = [m[:n] for m, n in zip(of_all.unsqueeze(2).unbind(0), self.sizes, strict=True)]
        if of_all.is_cuda:  # a look at the values would wait for the device
            return list(masks)
        needed = of_all.any(1).tolist()
        return [mask if need else None for mask, need in zip(masks, needed, strict=True)]

    def split(self, by_row: Tensor) -> tuple[Tensor, ...]:
        """Of what has R rows, those of each step."""
        return by_row.split(self.sizes)

    def prefix(self, state: Tensor) -> list[Tensor]:
        """Of what has B rows, those of each step."""
        views = {n: state[:n] for n in set(self.sizes)}
        return [views[n] for n in self.sizes]

    def cut(self, H: int) -> None:
        """Sets chunks: times and rows of at most CHUNK / H rows, in the order of backward."""
        limit, first = max(CHUNK // H, 1), 0
        for t in range(1, self.T + 1):
            if t == self.T or self.starts[t + 1] - self.starts[first] > limit:
                self.chunks.append((range(first, t), slice(self.starts[first], self.starts[t])))
                first = t
        if self.d == 0:
            self.chunks.reverse()

    def scratch(self, like: Tensor) -> Tensor:
        """A buffer for the rows of the longest chunk."""
        longest = max((rows.stop - rows.start for _, rows in self.chunks), default=0)
        return like.new_empty(longest, like.shape[1])

    def gather(self, initial: Tensor, states: Tensor) -> Callable[[range, slice], Tensor]:
        """What gathers the states that enter a chunk: initial ones, or what a step left behind."""
        buffer, history = self.scratch(initial), self.split(states)

        def before(times: range, rows: slice) -> Tensor:
            pieces = []
            for t in times:
                n, previous = self.sizes[t], t - 1 if self.d == 0 else t + 1
                known = self.sizes[previous] if 0 <= previous < self.T else 0
                if known:
                    pieces.append(history[previous] if known <= n else history[previous][:n])
                if known < n or n == 0:
                    pieces.append(initial[known:n])
            entering = torch.cat(pieces, out=buffer[: rows.stop - rows.start])
            views = entering.split(self.sizes[times.start : times.stop])
            for t, state in zip(times, views, strict=True):
                if (mask := self.initial[t]) is not None:
                    torch.where(mask, initial, state, out=state)
                if (mask := self.zero[t]) is not None:
                    state.masked_fill_(mask, 0)
            return entering

        return before


class _Forward(NamedTuple):
    """What a cell's forward works on."""

    steps: _Steps
    w: Weights
    gx: Tensor  # [R, G*H], which it may overwrite
    h: Tensor  # [B, P], the state
    c: State  # [B, H]
    gates: Tensor | None  # [R, S*H]


class _Backward(NamedTuple):
    """What a cell's backward works on."""

    steps: _Steps
    w: Weights
    dh: Tensor  # [B, P], the gradient of the state
    dc: State  # [B, H]
    out: Tensor  # [R, P]
    gates: Tensor  # [R, S*H]
    cs: State  # [R, H]
    dgates: Tensor  # [R, N*H]
    #: Of a chunk the states that entered its steps: c in a cell that has it, else h.
    before: Callable[[range, slice], Tensor]


#: Takes the states of a step from before to after it (backward: their gradients the other way).
Step = Callable[[int], object]
#: Fills dgates of a chunk of steps, in these rows, with all that dh and dc are multiplied by.
Prepare = Callable[[range, slice], object]


def _sigmoid_slope(y: Tensor, out: Tensor) -> Tensor:
    """y (1 - y) of y = sigmoid(x)."""
    return torch.addcmul(y, y, y, value=-1, out=out)


def _lstm_forward(a: _Forward) -> Step:
    """i, f, o = sigmoid(.), g = tanh(.); c' = f c + i g; h' = o tanh(c'), or W_hr (o tanh(c')).

    tanh calls a library for each row of a tile with gaps: 25 us at B = 32, H = 128, and 10 us on a
    copy. 2 sigmoid(2x) - 1 is not faster, since an operation with a number takes 2 us to begin.
    """
    s, weight, saves = a.steps, a.w.w_hh.t(), a.gates is not None
    project = None if a.w.w_hr is None else a.w.w_hr.t()
    _gates = a.gx if a.gates is None else a.gates
    gx, gates, h, c = s.split(a.gx), s.split(_gates), s.prefix(a.h), s.prefix(a.c)
    i, f, g, o = (s.split(tile) for tile in _gates.chunk(4, 1))
    scratch = s.prefix(torch.empty_like(a.c))

    def step(t: int) -> None:
        g_t, c_t, tmp = g[t], c[t], scratch[t]
        torch.addmm(gx[t], h[t], weight, out=gates[t])
        tmp.copy_(g_t).tanh_()
        gates[t].sigmoid_()  # g too, for nothing: still cheaper than two calls for i, f and o
        c_t.mul_(f[t]).addcmul_(i[t], tmp)
        if saves:
            g_t.copy_(tmp)
        torch.tanh(c_t, out=tmp)
        if project is None:
            torch.mul(o[t], tmp, out=h[t])
        else:
            torch.mm(tmp.mul_(o[t]), project, out=h[t])

    return step


def _lstm_backward(a: _Backward) -> tuple[Prepare, Step]:
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


def _gru_forward(a: _Forward) -> Step:
    """r, z = sigmoid(.); n = tanh(gx_n + r (W_hn h + b_hn)); h' = (1 - z) n + z h.

    gx cannot be the addend of the product: of n its part comes after the multiplication by r.
    """
    s, weight, saves, (B, H) = a.steps, a.w.w_hh.t(), a.gates is not None, a.h.shape
    bias = a.gx.new_zeros(3 * H) if a.w.b_hh is None else a.w.b_hh
    _gates = a.gx if a.gates is None else a.gates
    _product = a.gx.new_empty(B, 3 * H)
    product, new, h = s.prefix(_product), s.prefix(torch.empty_like(a.h)), s.prefix(a.h)
    product_rz, product_n = (s.prefix(part) for part in _product.split((2 * H, H), 1))
    gx_rz, gx_n = (s.split(part) for part in a.gx.split((2 * H, H), 1))
    rz = s.split(_gates[:, : 2 * H])
    r, z, n, *hn = (s.split(tile) for tile in _gates.split(H, 1))

    def step(t: int) -> None:
        h_t, n_t, hn_t = h[t], new[t], product_n[t]
        torch.addmm(bias, h_t, weight, out=product[t])
        torch.add(gx_rz[t], product_rz[t], out=rz[t]).sigmoid_()
        torch.addcmul(gx_n[t], r[t], hn_t, out=n_t).tanh_()
        torch.lerp(n_t, h_t, z[t], out=h_t)
        if saves:
            n[t].copy_(n_t)
            hn[0][t].copy_(hn_t)

    return step


def _gru_backward(a: _Backward) -> tuple[Prepare, Step]:
    """All four tiles are dh times what is known before; dh = dh z + (dr, dz, r dn) W_hh."""
    s, H = a.steps, a.dh.shape[1]
    w_rz, w_n = a.w.w_hh.split((2 * H, H))
    r, z, n, hn = a.gates.chunk(4, 1)
    d_r, d_z, d_n, d_hn = a.dgates.chunk(4, 1)
    dh, dh_wide, z_t = s.prefix(a.dh), s.prefix(a.dh.unsqueeze(1)), s.split(z)
    d_all, d_hn_t = s.split(a.dgates.view(-1, 4, H)), s.split(d_hn)
    d_rz = s.split(a.dgates[:, : 2 * H])

    def prepare(times: range, rows: slice) -> None:
        r_, z_, n_, to_r, to_z, to_n = (x[rows] for x in (r, z, n, d_r, d_z, d_n))
        _candidate_slopes(z_, n_, a.before(times, rows), to_z, to_n)
        _sigmoid_slope(r_, to_r).mul_(hn[rows]).mul_(to_n)
        torch.mul(to_n, r_, out=d_hn[rows])

    def step(t: int) -> None:
        d_all[t].mul_(dh_wide[t])
        dh[t].mul_(z_t[t]).addmm_(d_rz[t], w_rz).addmm_(d_hn_t[t], w_n)

    return prepare, step


def _candidate_slopes(z: Tensor, n: Tensor, h_before: Tensor, to_z: Tensor, to_n: Tensor) -> None:
    """Of h' = (1 - z) n + z h: (h - n) z (1 - z), and (1 - z) (1 - n^2). Overwrites h_before."""
    torch.mul(n, n, out=to_n).sub_(1)
    torch.addcmul(to_n, to_n, z, value=-1, out=to_n).neg_()
    _sigmoid_slope(z, to_z).mul_(h_before.sub_(n))


def _gru_reset_before_forward(a: _Forward) -> Step:
    """r, z = sigmoid(.); n = tanh(gx_n + W_hn (r h) + b_hn); h' = (1 - z) n + z h."""
    s, H = a.steps, a.h.shape[1]
    w_rz, w_n = a.w.w_hh.t().split((2 * H, H), 1)
    _gates = a.gx if a.gates is None else a.gates
    gx_rz, gx_n = (s.split(part) for part in a.gx.split((2 * H, H), 1))
    rz, h = s.split(_gates[:, : 2 * H]), s.prefix(a.h)
    r, z, n = (s.split(tile) for tile in _gates.chunk(3, 1))
    scratch, new = s.prefix(torch.empty_like(a.h)), s.prefix(torch.empty_like(a.h))

    def step(t: int) -> None:
        h_t, n_t, rh = h[t], new[t], scratch[t]
        torch.addmm(gx_rz[t], h_t, w_rz, out=rz[t]).sigmoid_()
        torch.mul(r[t], h_t, out=rh)
        torch.addmm(gx_n[t], rh, w_n, out=n_t).tanh_()
        n[t].copy_(n_t)
        torch.lerp(n_t, h_t, z[t], out=h_t)

    return step


def _gru_reset_before_backward(a: _Backward) -> tuple[Prepare, Step]:
    """dz, dn = dh (..); du = dn W_hn; dr = du (..); dh = dh z + du r + (dr, dz) W_hrz."""
    s, H = a.steps, a.dh.shape[1]
    w_rz, w_n = a.w.w_hh.split((2 * H, H))
    r, z, n = a.gates.chunk(3, 1)
    d_r, d_z, d_n = a.dgates.chunk(3, 1)
    dh, dh_wide, r_t, z_t = s.prefix(a.dh), s.prefix(a.dh.unsqueeze(1)), s.split(r), s.split(z)
    d_rz, d_zn = s.split(a.dgates[:, : 2 * H]), s.split(a.dgates.view(-1, 3, H)[:, 1:])
    d_r_t, d_n_t, scratch = s.split(d_r), s.split(d_n), s.prefix(torch.empty_like(a.dh))

    def prepare(times: range, rows: slice) -> None:
        h_before = a.before(times, rows)
        _sigmoid_slope(r[rows], d_r[rows]).mul_(h_before)
        _candidate_slopes(z[rows], n[rows], h_before, d_z[rows], d_n[rows])

    def step(t: int) -> None:
        du = scratch[t]
        d_zn[t].mul_(dh_wide[t])
        torch.mm(d_n_t[t], w_n, out=du)
        d_r_t[t].mul_(du)
        dh[t].mul_(z_t[t]).addcmul_(du, r_t[t]).addmm_(d_rz[t], w_rz)

    return prepare, step


def _rnn_forward(a: _Forward, function: Callable) -> Step:
    """h' = tanh(.) or max(., 0)."""
    s, weight = a.steps, a.w.w_hh.t()
    gx, h = s.split(a.gx), s.prefix(a.h)

    def step(t: int) -> None:
        function(gx[t].addmm_(h[t], weight), out=h[t])

    return step


def _rnn_backward(a: _Backward, slope: Callable[[Tensor, Tensor], object]) -> tuple[Prepare, Step]:
    """da = dh (..); dh = da W_hh. The slope of either function follows from h alone."""
    w, dh, dgates = a.w.w_hh, a.steps.prefix(a.dh), a.steps.split(a.dgates)

    def prepare(_: range, rows: slice) -> None:
        slope(a.out[rows], a.dgates[rows])

    def step(t: int) -> None:
        torch.mm(dgates[t].mul_(dh[t]), w, out=dh[t])

    return prepare, step


class _Cell(NamedTuple):
    """The two functions of a cell; each binds its tensors and returns the step."""

    forward: Callable[[_Forward], Step]
    backward: Callable[[_Backward], tuple[Prepare, Step]]
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


def _by_row(x: Tensor, rows: Rows) -> Tensor:
    """``[R, .]`` of what may be ``[T, B, .]``."""
    return x.view(rows.total, x.shape[-1])


def _clear(mask: Tensor, states: Sequence[Tensor]) -> None:
    """Zeroes the masked rows, whatever they hold: a product with 0 would keep inf and NaN."""
    for state in states:
        state[: len(mask)].masked_fill_(mask, 0)


def _put_back(mask: Tensor, kept: Sequence[Tensor], states: Sequence[Tensor]) -> None:
    """The masked rows of the states become again what they were, whatever a step made of them."""
    for old, state in zip(kept, states, strict=True):
        torch.where(mask, old, state, out=state)


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
        gx: ``x W_ih^T + b_ih``, ``[D, R, G*H]``; overwritten. It may be gates itself if S == G.
        weights: of each direction.
        h_0: ``[D, B, P]``, and h_n; c_0 and c_n ``[D, B, H]``, or None in a cell without c.
        out: ``[R, D*P]``.
        gates: ``[D, R, S*H]``, or None if nothing is to be saved; likewise cs ``[D, R, H]``.
        rows: which steps there are.
    """
    P = h_0.shape[2]
    for d, w in enumerate(weights):
        s = _Steps(rows, d)
        h, c = h_n[d].copy_(h_0[d]), None
        x, hs = _by_row(gx[d], rows), _by_row(out, rows)[:, d * P : (d + 1) * P]
        saved = None if gates is None else _by_row(gates[d], rows)
        states, histories = [h], [hs]
        if c_0 is not None:
            c = c_n[d].copy_(c_0[d])
            states.append(c)
            if cs is not None:
                histories.append(_by_row(cs[d], rows))
        if w.b_hh is not None and not _CELLS[cell].own_bias:
            x += w.b_hh
        step = _CELLS[cell].forward(_Forward(s, w, x, h, c, saved))
        written = [s.split(to) for to in histories]
        store = list(zip(written, map(s.prefix, states), strict=False))  # cs may be None
        if saved is not None:
            written.append(s.split(saved))
        for t in s.order:
            if (new := s.zero[t]) is not None:
                _clear(new, states)
            if (skipped := s.skipped[t]) is not None:
                kept = [state.clone() for state in states]
            step(t)
            for to, state_t in store:
                to[t].copy_(state_t[t])
            if skipped is not None:
                _put_back(skipped, kept, states)
                for to in written:
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
    for d, w in enumerate(weights):
        s = _Steps(rows, d)
        s.cut(dgates.shape[-1] // SPECS[cell].grad_tiles)
        columns = slice(d * P, (d + 1) * P)
        dh, hs, dc, c = d_h_0[d].copy_(d_h_n[d]), _by_row(out, rows)[:, columns], None, None
        saved = _by_row(gates[d], rows)
        to, states, arriving = _by_row(dgates[d], rows), [dh], []
        if d_out is not None:
            arriving.append((s.prefix(dh), s.split(_by_row(d_out, rows)[:, columns])))
        before = s.gather(h_0[d], hs)
        if cs is not None:
            dc, c = d_c_0[d].copy_(d_c_n[d]), _by_row(cs[d], rows)
            states.append(dc)
            if d_cs is not None:
                arriving.append((s.prefix(dc), s.split(_by_row(d_cs[d], rows))))
            before = s.gather(c_0[d], c)
        prepare, step = _CELLS[cell].backward(_Backward(s, w, dh, dc, hs, saved, c, to, before))
        written = s.split(to)
        for times, chunk in s.chunks:
            prepare(times, chunk)
            for t in times[::-1] if d == 0 else times:
                if (skipped := s.skipped[t]) is not None:
                    kept = [state.clone() for state in states]
                for state, grad in arriving:
                    state[t].add_(grad[t])
                step(t)
                if skipped is not None:
                    _put_back(skipped, kept, states)
                    written[t].masked_fill_(skipped, 0)
                if (new := s.zero[t]) is not None:
                    _clear(new, states)
