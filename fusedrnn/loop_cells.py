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
from .steps import Part

State = Any  # a Tensor, or None for the c of a cell without one

#: Up to this H a GRU's product of all four tiles, one of them with zeros, is cheaper than one
#: product of two tiles and one of the last.
_ONE_PRODUCT = 64
#: From how many steps on a transposed copy of W_hh pays: it takes 4 to 90 us, and MKL 1.0 to 1.6
#: times as long a step with a view (by a script; B = 1 to 128, H = 5 to 256, a Xeon of two cores).
_MANY_STEPS = 48


class ForwardOn(NamedTuple):
    """What a cell's forward works on."""

    steps: Part
    w: Weights
    gates: Tensor  # [R, max(G, S)*H], whose first G tiles are gx with what b_hh there is for them
    h: Sequence[Tensor]  # of each step [n, P], to be written; empty if only gates are wanted
    c: Sequence[Tensor]  # likewise [n, H]; it may be the tensor that enters
    H: int
    saves: bool  # whether all S tiles of gates are wanted

    def room(self, tiles: int) -> Tensor:
        """Room for one step, ``[most, tiles*H]``.

        Gates that nobody saves are made in it: it stays in the cache and takes no views, 3 to 8 %
        of a GRU's time, by a prototype.
        """
        return self.gates.new_empty(self.steps.most, tiles * self.H)


class BackwardOn(NamedTuple):
    """What a cell's backward works on: some steps, of r rows."""

    steps: Part
    w: Weights
    dh: Tensor  # [B, P], the gradient of the state
    dc: State  # [B, H]
    out: Tensor  # [r, P]
    gates: Tensor  # [r, S*H]
    cs: State  # [r, H]
    dgates: Tensor  # [r, N*H], to be written
    #: Gathers the states ``[r, .]`` that entered the steps: c in a cell that has it, else h.
    before: Callable[[], Tensor]


def _transposed(weight: Tensor, steps: Part) -> Tensor:
    """``weight^T``, by which every step multiplies: over many steps as rows of its own."""
    transposed = weight.t()
    return transposed.contiguous() if len(steps.sizes) >= _MANY_STEPS else transposed


#: Writes the states that leave step t, from those that enter it.
Forward = Callable[[int, Tensor, State], object]
#: Takes the gradients of the states from after the step to before it, by its number in the part.
Backward = Callable[[int], object]


def _sigmoid_slope(y: Tensor, out: Tensor) -> Tensor:
    """y (1 - y) of y = sigmoid(x)."""
    return torch.addcmul(y, y, y, value=-1, out=out)


def _lstm_forward(a: ForwardOn) -> Forward:
    """i, f, o = sigmoid(.), g = tanh(.); c' = f c + i g; h' = o tanh(c'), or W_hr (o tanh(c')).

    tanh calls a library for each row of a tile with gaps, so it gets a copy. 2 sigmoid(2x) - 1
    would be faster for large tiles, and lose tanh's relative precision near 0.
    """
    s, weight, saves = a.steps, _transposed(a.w.w_hh, a.steps), a.saves
    project = None if a.w.w_hr is None else _transposed(a.w.w_hr, s)
    gx = s.split(a.gates)
    room, views = (a.gates, s.split) if saves else (a.room(4), s.prefix)
    gates = gx if saves else views(room)  # the same views: into others addmm would copy first
    i, f, g, o = map(views, room.chunk(4, 1))
    scratch = s.prefix(a.room(1))

    def step(t: int, h: Tensor, c: State) -> None:
        g_t, tmp = g[t], scratch[t]
        torch.addmm(gx[t], h, weight, out=gates[t])
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


def _lstm_backward(a: BackwardOn) -> Backward:
    """dc += dh o (1 - tanh^2 c); di, df, dg = dc (..); do = dh (..); dh = dgates W_hh; dc *= f."""
    s, w_hh, w_hr, H = a.steps, a.w.w_hh, a.w.w_hr, a.dc.shape[1]
    i, f, g, o = a.gates.chunk(4, 1)
    d_i, d_f, d_g, d_o = a.dgates.chunk(4, 1)
    tanh_c = torch.tanh(a.cs)
    slope = o * tanh_c
    torch.addcmul(slope, slope, o, value=-1, out=d_o)
    torch.addcmul(o, slope, tanh_c, value=-1, out=slope)  # o (1 - tanh^2 c)
    _sigmoid_slope(i, d_i).mul_(g)
    _sigmoid_slope(f, d_f).mul_(a.before())
    torch.mul(i, g, out=tanh_c)
    torch.addcmul(i, tanh_c, g, value=-1, out=d_g)

    dh, dc, dc_wide = s.prefix(a.dh), s.prefix(a.dc), s.prefix(a.dc.unsqueeze(1))
    dh_out = dh if w_hr is None else s.prefix(torch.empty_like(a.dc))
    dgates, d_ifg = s.split(a.dgates), s.split(a.dgates.view(-1, 4, H)[:, :3])
    d_o_t, f_t, slopes = s.split(d_o), s.split(f), s.split(slope)

    def step(k: int) -> None:
        dh_k, dc_k = dh_out[k], dc[k]
        if w_hr is not None:
            torch.mm(dh[k], w_hr, out=dh_k)
        dc_k.addcmul_(dh_k, slopes[k])
        d_ifg[k].mul_(dc_wide[k])
        d_o_t[k].mul_(dh_k)
        dc_k.mul_(f_t[k])
        torch.mm(dgates[k], w_hh, out=dh[k])

    return step


def _gru_products(w: Weights, H: int) -> list[tuple[slice, Tensor]]:
    """W_hh by columns of the tiles (r, z, n, W_hn h), of which n has no part in h: in one product
    with zeros for it, or in two without."""
    w_rz, w_n = w.w_hh.split_with_sizes((2 * H, H))
    if H <= _ONE_PRODUCT:
        return [(slice(0, 4 * H), torch.cat([w_rz, torch.zeros_like(w_n), w_n]))]
    return [(slice(0, 2 * H), w_rz), (slice(3 * H, 4 * H), w_n)]


def _gru_forward(a: ForwardOn) -> Forward:
    """r, z = sigmoid(.); n = tanh(gx_n + r (W_hn h + b_hn)); h' = (1 - z) n + z h.

    The tile W_hn h + b_hn begins as b_hn; gx has that of r and z.
    """
    return (_gru_saving if a.saves else _gru_passing)(a)


def _set_b_hn(of_hn: Tensor, b_hh: Tensor | None) -> None:
    of_hn.zero_() if b_hh is None else of_hn.copy_(b_hh[-of_hn.shape[1] :])


def _gru_saving(a: ForwardOn) -> Forward:
    """The tiles are r, z, n and W_hn h + b_hn, of which the products have no n."""
    s, H = a.steps, a.H
    _set_b_hn(a.gates[:, 3 * H :], a.w.b_hh)
    products = [(s.split(a.gates[:, of]), _transposed(w, s)) for of, w in _gru_products(a.w, H)]
    rz, (r, z, n, hn) = s.split(a.gates[:, : 2 * H]), map(s.split, a.gates.chunk(4, 1))
    scratch = s.prefix(a.room(1))

    def step(t: int, h: Tensor, _: State) -> None:
        tmp = scratch[t]
        for tiles, weight in products:
            tiles[t].addmm_(h, weight)
        rz[t].sigmoid_()
        torch.addcmul(n[t], r[t], hn[t], out=tmp).tanh_()
        n[t].copy_(tmp)
        if a.h:
            torch.lerp(tmp, h, z[t], out=a.h[t])

    return step


def _gru_passing(a: ForwardOn) -> Forward:
    """The tiles are r, z, W_hn h + b_hn and gx_n: one product of the first three."""
    s, H = a.steps, a.H
    of_hn, of_n = a.gates[:, 2 * H : 3 * H], a.gates[:, 3 * H :]
    of_n.copy_(of_hn)
    _set_b_hn(of_hn, a.w.b_hh)
    weight, gx, gx_n = _transposed(a.w.w_hh, s), s.split(a.gates[:, : 3 * H]), s.split(of_n)
    room = a.room(3)
    gates, rz = s.prefix(room), s.prefix(room[:, : 2 * H])
    r, z, hn = map(s.prefix, room.chunk(3, 1))
    scratch = s.prefix(a.room(1))

    def step(t: int, h: Tensor, _: State) -> None:
        tmp = scratch[t]
        torch.addmm(gx[t], h, weight, out=gates[t])
        rz[t].sigmoid_()
        torch.addcmul(gx_n[t], r[t], hn[t], out=tmp).tanh_()
        torch.lerp(tmp, h, z[t], out=a.h[t])

    return step


def _gru_backward(a: BackwardOn) -> Backward:
    """All four tiles are dh times what is known before; dh = dh z + (dr, dz, r dn) W_hh.

    The product comes first and by itself: added to dh z term by term, it rounds each to dh's size,
    5 times the error with B = 1, H = 256.
    """
    s, H = a.steps, a.dh.shape[1]
    r, z, n, hn = a.gates.chunk(4, 1)
    d_r, d_z, d_n, d_hn = a.dgates.chunk(4, 1)
    _candidate_slopes(z, n, a.before(), d_z, d_n)
    _sigmoid_slope(r, d_r).mul_(hn).mul_(d_n)
    torch.mul(d_n, r, out=d_hn)

    dh, dh_wide, z_t = s.prefix(a.dh), s.prefix(a.dh.unsqueeze(1)), s.split(z)
    d_all = s.split(a.dgates.view(-1, 4, H))
    (first, w_first), *more = ((s.split(a.dgates[:, of]), w) for of, w in _gru_products(a.w, H))
    through_gates = s.prefix(torch.empty_like(a.dh))

    def step(k: int) -> None:
        dh_k, product = dh[k], through_gates[k]
        d_all[k].mul_(dh_wide[k])
        torch.mm(first[k], w_first, out=product)
        for grads, w in more:
            product.addmm_(grads[k], w)
        torch.addcmul(product, dh_k, z_t[k], out=dh_k)

    return step


def _candidate_slopes(z: Tensor, n: Tensor, h_before: Tensor, to_z: Tensor, to_n: Tensor) -> None:
    """Of h' = (1 - z) n + z h: (h - n) z (1 - z), and (1 - z) (1 - n^2)."""
    torch.mul(n, n, out=to_n).sub_(1)
    torch.addcmul(to_n, to_n, z, value=-1, out=to_n).neg_()
    _sigmoid_slope(z, to_z).mul_(h_before - n)


def _gru_reset_before_forward(a: ForwardOn) -> Forward:
    """r, z = sigmoid(.); n = tanh(gx_n + W_hn (r h) + b_hn); h' = (1 - z) n + z h."""
    s, H, saves = a.steps, a.H, a.saves
    w_rz, w_n = (_transposed(w, s) for w in a.w.w_hh.split((2 * H, H)))
    rz, (r, z, n) = s.split(a.gates[:, : 2 * H]), (s.split(tile) for tile in a.gates.chunk(3, 1))
    scratch = s.prefix(a.room(1))

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


def _gru_reset_before_backward(a: BackwardOn) -> Backward:
    """dz, dn = dh (..); du = dn W_hn; dr = du (..); dh = dh z + du r + (dr, dz) W_hrz."""
    s, H = a.steps, a.dh.shape[1]
    w_rz, w_n = a.w.w_hh.split((2 * H, H))
    r, z, n = a.gates.chunk(3, 1)
    d_r, d_z, d_n = a.dgates.chunk(3, 1)
    h_before = a.before()
    _sigmoid_slope(r, d_r).mul_(h_before)
    _candidate_slopes(z, n, h_before, d_z, d_n)

    dh, dh_wide, r_t, z_t = s.prefix(a.dh), s.prefix(a.dh.unsqueeze(1)), s.split(r), s.split(z)
    d_rz, d_zn = s.split(a.dgates[:, : 2 * H]), s.split(a.dgates.view(-1, 3, H)[:, 1:])
    d_r_t, d_n_t = s.split(d_r), s.split(d_n)
    scratch, through_gates = (s.prefix(torch.empty_like(a.dh)) for _ in range(2))

    def step(k: int) -> None:
        du = scratch[k]
        d_zn[k].mul_(dh_wide[k])
        torch.mm(d_n_t[k], w_n, out=du)
        d_r_t[k].mul_(du)
        product = torch.mm(d_rz[k], w_rz, out=through_gates[k]).addcmul_(du, r_t[k])
        torch.addcmul(product, dh[k], z_t[k], out=dh[k])

    return step


def _rnn_forward(a: ForwardOn, function: Callable) -> Forward:
    """h' = tanh(.) or max(., 0)."""
    weight, gx = _transposed(a.w.w_hh, a.steps), a.steps.split(a.gates)

    def step(t: int, h: Tensor, _: State) -> None:
        function(gx[t].addmm_(h, weight), out=a.h[t])

    return step


def _rnn_backward(a: BackwardOn, slope: Callable[[Tensor, Tensor], object]) -> Backward:
    """da = dh (..); dh = da W_hh. The slope of either function follows from h alone."""
    slope(a.out, a.dgates)
    w, dh, dgates = a.w.w_hh, a.steps.prefix(a.dh), a.steps.split(a.dgates)

    def step(k: int) -> None:
        torch.mm(dgates[k].mul_(dh[k]), w, out=dh[k])

    return step


class Cell(NamedTuple):
    """The two functions of a cell; each binds its tensors and returns the step.

    Before, backward fills dgates with all that dh and dc will be multiplied by.
    """

    forward: Callable[[ForwardOn], Forward]
    backward: Callable[[BackwardOn], Backward]
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
