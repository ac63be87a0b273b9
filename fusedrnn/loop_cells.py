"""The equations of each cell as steps of the loop over time (``loop.py``), forward and backward.

Each cell is two functions that bind its tensors and return its step, so that its equations stand in
one place. They are those of ``reference.py``, which remains the oracle. Axes: those of ``loop.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernels.spec import Weights
from .steps import Steps

State = Any  # a Tensor, or None for the c of a cell without one

#: Up to this H a GRU's product of all four tiles, one of them with zeros, is cheaper than one
#: product of two tiles and one of the last.
_ONE_PRODUCT = 64


class ForwardOn(NamedTuple):
    """What a cell's forward works on."""

    steps: Steps
    w: Weights
    gates: Tensor  # [R, max(G, S)*H], whose first G tiles are gx with what b_hh there is for them
    h: Sequence[Tensor]  # of each step [n, P], to be written; empty if only gates are wanted
    c: Sequence[Tensor]  # likewise [n, H]; it may be the tensor that enters
    H: int
    saves: bool  # whether all S tiles of gates are wanted


class BackwardOn(NamedTuple):
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


def _lstm_forward(a: ForwardOn) -> Forward:
    """i, f, o = sigmoid(.), g = tanh(.); c' = f c + i g; h' = o tanh(c'), or W_hr (o tanh(c')).

    tanh calls a library for each row of a tile with gaps, so it gets a copy. 2 sigmoid(2x) - 1
    would be faster for large tiles, and lose tanh's relative precision near 0.
    """
    s, weight, saves = a.steps, a.w.w_hh.t(), a.saves
    project = None if a.w.w_hr is None else a.w.w_hr.t()
    gates, (i, f, g, o) = s.split(a.gates), (s.split(tile) for tile in a.gates.split(a.H, 1))
    scratch = s.prefix(a.gates.new_empty(s.B, a.H))

    def step(t: int, h: Tensor, c: State) -> None:
        g_t, tmp = g[t], scratch[t]
        gates[t].addmm_(h, weight)
        tmp.copy_(g_t).tanh_()
        gates[t].sigmoid_()  # g too, for nothing: still cheaper than two calls for i, f and o
        if saves:
            g_t.copy_(tmp)
        if not a.h:
            return
        c_t = torch.mul(f[t], c, out=a.c[t]).addcmul_(i[t], tmp)
        torch.tanh(c_t, out=tmp)
        if project is None:
            torch.mul(o[t], tmp, out=a.h[t])
        else:
            torch.mm(tmp.mul_(o[t]), project, out=a.h[t])

    return step


def _lstm_backward(a: BackwardOn) -> tuple[Prepare, Backward]:
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


def _gru_forward(a: ForwardOn) -> Forward:
    """r, z = sigmoid(.); n = tanh(gx_n + r (W_hn h + b_hn)); h' = (1 - z) n + z h.

    The fourth tile, W_hn h + b_hn, begins as b_hn; gx has that of r and z.
    """
    s, H, saves, b_hh = a.steps, a.H, a.saves, a.w.b_hh
    a.gates[:, 3 * H :] = 0.0 if b_hh is None else b_hh[-H:]
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
        if saves:
            n[t].copy_(tmp)
        if a.h:
            torch.lerp(tmp, h, z[t], out=a.h[t])

    return step


def _gru_backward(a: BackwardOn) -> tuple[Prepare, Backward]:
    """All four tiles are dh times what is known before; dh = dh z + (dr, dz, r dn) W_hh.

    The product comes first and by itself: added to dh z term by term, it rounds each to dh's size,
    5 times the error with B = 1, H = 256.
    """
    s, H = a.steps, a.dh.shape[1]
    r, z, n, hn = a.gates.chunk(4, 1)
    d_r, d_z, d_n, d_hn = a.dgates.chunk(4, 1)
    dh, dh_wide, z_t = s.prefix(a.dh), s.prefix(a.dh.unsqueeze(1)), s.split(z)
    d_all = s.split(a.dgates.view(-1, 4, H))
    (first, w_first), *more = ((s.split(a.dgates[:, of]), w) for of, w in _gru_products(a.w, H))
    scratch, through_gates = s.scratch(z), s.prefix(torch.empty_like(a.dh))

    def prepare(times: range, rows: slice) -> None:
        r_, z_, n_, to_r, to_z, to_n = (x[rows] for x in (r, z, n, d_r, d_z, d_n))
        _candidate_slopes(z_, n_, a.before(times, rows), to_z, to_n, scratch)
        _sigmoid_slope(r_, to_r).mul_(hn[rows]).mul_(to_n)
        torch.mul(to_n, r_, out=d_hn[rows])

    def step(t: int) -> None:
        dh_t, product = dh[t], through_gates[t]
        d_all[t].mul_(dh_wide[t])
        torch.mm(first[t], w_first, out=product)
        for grads, w in more:
            product.addmm_(grads[t], w)
        torch.addcmul(product, dh_t, z_t[t], out=dh_t)

    return prepare, step


def _candidate_slopes(
    z: Tensor, n: Tensor, h_before: Tensor, to_z: Tensor, to_n: Tensor, scratch: Tensor
) -> None:
    """Of h' = (1 - z) n + z h: (h - n) z (1 - z), and (1 - z) (1 - n^2)."""
    torch.mul(n, n, out=to_n).sub_(1)
    torch.addcmul(to_n, to_n, z, value=-1, out=to_n).neg_()
    _sigmoid_slope(z, to_z).mul_(torch.sub(h_before, n, out=scratch[: len(n)]))


def _gru_reset_before_forward(a: ForwardOn) -> Forward:
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
        if a.h:
            torch.lerp(tmp, h, z[t], out=a.h[t])

    return step


def _gru_reset_before_backward(a: BackwardOn) -> tuple[Prepare, Backward]:
    """dz, dn = dh (..); du = dn W_hn; dr = du (..); dh = dh z + du r + (dr, dz) W_hrz."""
    s, H = a.steps, a.dh.shape[1]
    w_rz, w_n = a.w.w_hh.split((2 * H, H))
    r, z, n = a.gates.chunk(3, 1)
    d_r, d_z, d_n = a.dgates.chunk(3, 1)
    dh, dh_wide, r_t, z_t = s.prefix(a.dh), s.prefix(a.dh.unsqueeze(1)), s.split(r), s.split(z)
    d_rz, d_zn = s.split(a.dgates[:, : 2 * H]), s.split(a.dgates.view(-1, 3, H)[:, 1:])
    d_r_t, d_n_t = s.split(d_r), s.split(d_n)
    scratch, through_gates = (s.prefix(torch.empty_like(a.dh)) for _ in range(2))
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
        product = torch.mm(d_rz[t], w_rz, out=through_gates[t]).addcmul_(du, r_t[t])
        torch.addcmul(product, dh[t], z_t[t], out=dh[t])

    return prepare, step


def _rnn_forward(a: ForwardOn, function: Callable) -> Forward:
    """h' = tanh(.) or max(., 0)."""
    weight, gx = a.w.w_hh.t(), a.steps.split(a.gates)

    def step(t: int, h: Tensor, _: State) -> None:
        function(gx[t].addmm_(h, weight), out=a.h[t])

    return step


def _rnn_backward(
    a: BackwardOn, slope: Callable[[Tensor, Tensor], object]
) -> tuple[Prepare, Backward]:
    """da = dh (..); dh = da W_hh. The slope of either function follows from h alone."""
    w, dh, dgates = a.w.w_hh, a.steps.prefix(a.dh), a.steps.split(a.dgates)

    def prepare(_: range, rows: slice) -> None:
        slope(a.out[rows], a.dgates[rows])

    def step(t: int) -> None:
        torch.mm(dgates[t].mul_(dh[t]), w, out=dh[t])

    return prepare, step


class Cell(NamedTuple):
    """The two functions of a cell; each binds its tensors and returns the step."""

    forward: Callable[[ForwardOn], Forward]
    backward: Callable[[BackwardOn], tuple[Prepare, Backward]]
    #: Of how many gates, the last, it adds b_hh itself, because something comes before gx is added.
    own_biases: int = 0


CELLS = {
    "lstm": Cell(_lstm_forward, _lstm_backward),
    "gru": Cell(_gru_forward, _gru_backward, own_biases=1),
    "gru_reset_before": Cell(_gru_reset_before_forward, _gru_reset_before_backward),
    "rnn_tanh": Cell(
        partial(_rnn_forward, function=torch.tanh),
        partial(_rnn_backward, slope=lambda h, to: torch.mul(h, h, out=to).neg_().add_(1)),
    ),
    "rnn_relu": Cell(
        partial(_rnn_forward, function=partial(torch.clamp_min, min=0)),
        partial(_rnn_backward, slope=lambda h, to: to.copy_(h > 0)),
    ),
}
