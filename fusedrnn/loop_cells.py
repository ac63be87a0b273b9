"""The cells as steps of a loop in plain torch, in place: the equations of ``reference.py``.

A cell is two functions. Each binds its tensors once and returns the function that runs one step, so
that the loop (``loop.py``) makes no views and allocates nothing that it does not need.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MANY_STEPS = 16  # from so many steps on a transposed copy of W_hh pays
#: Up to this H one product of all four tiles of a GRU, one of them with zeros, is faster than two.
_ONE_PRODUCT = 64
Split = Callable[[Tensor], Sequence[Tensor]]  # cuts rows [R, .] into those of each step


class Forward(NamedTuple):
    """The tensors of a forward pass over one direction; its steps write h, c and the gates."""

    gates: Tensor  # [R, max(G, S)*H], first gx
    h: Sequence[Tensor]  # of each step [n, H]
    c: Any  # of each step [n, H], None in a cell without c
    w_hh: Tensor  # [G*H, H]
    b_hh: Tensor | None  # [G*H], of which gx has all but a GRU's b_hn
    scratch: Sequence[Tensor]  # of each step [n, H], room that all steps share
    split: Split


class Backward(NamedTuple):
    """The tensors of a backward pass over one direction; its steps write dgates, dh and dc."""

    gates: Tensor  # [R, S*H]
    dgates: Tensor  # [R, N*H]
    h: Tensor  # [R, H], the state that left each step
    c: Any  # [R, H], None in a cell without c
    before: Tensor  # [R, H], the c, or without one the h, that entered each step
    dh: Sequence[Tensor]  # of each step [n, H], the gradient of h, carried in place
    dc: Any  # of each step [n, H], None in a cell without c
    w_hh: Tensor
    scratch: Sequence[Tensor]  # of each step [n, H], room that all steps share
    split: Split


def _transposed(weight: Tensor, steps: Sequence[Tensor]) -> Tensor:
    """Returns ``weight^T``; for many steps as a copy, whose products are faster than a view's."""
    return weight.t().contiguous() if len(steps) >= _MANY_STEPS else weight.t()


def _sigmoid_slope(y: Tensor, out: Tensor) -> Tensor:
    """y (1 - y)."""
    return torch.addcmul(y, y, y, value=-1, out=out)


def _lstm_forward(a: Forward) -> Callable:
    """i, f, o = sigmoid(.), g = tanh(.); c' = f c + i g; h' = o tanh(c')."""
    w_hh = _transposed(a.w_hh, a.h)
    gates, (i, f, g, o) = a.split(a.gates), map(a.split, a.gates.chunk(4, 1))

    def step(t: int, h: Tensor, c: Tensor) -> None:
        gates[t].addmm_(h, w_hh)
        candidate = torch.tanh(g[t], out=a.scratch[t])
        gates[t].sigmoid_()  # g too, for nothing: cheaper than two calls for i, f and o
        g[t].copy_(candidate)
        torch.mul(f[t], c, out=a.c[t]).addcmul_(i[t], candidate)
        torch.tanh(a.c[t], out=candidate)
        torch.mul(o[t], candidate, out=a.h[t])

    return step


def _lstm_backward(a: Backward) -> Callable:
    """dc += dh o (1 - tanh^2 c); di, df, dg = dc (..); do = dh (..); dh = dgates W_hh; dc *= f."""
    i, f, g, o = a.gates.chunk(4, 1)
    d_i, d_f, d_g, d_o = a.dgates.chunk(4, 1)
    tanh_c = torch.tanh(a.c)
    slope = o * (1 - tanh_c * tanh_c)
    _sigmoid_slope(o, d_o).mul_(tanh_c)
    _sigmoid_slope(i, d_i).mul_(g)
    _sigmoid_slope(f, d_f).mul_(a.before)
    torch.mul(g, g, out=d_g).sub_(1).neg_().mul_(i)
    H = tanh_c.shape[1]
    dgates, d_ifg = a.split(a.dgates), a.split(a.dgates.view(-1, 4, H)[:, :3])
    d_o_t, f_t, slopes = a.split(d_o), a.split(f), a.split(slope)

    def step(t: int) -> None:
        dh, dc = a.dh[t], a.dc[t]
        dc.addcmul_(dh, slopes[t])
        d_ifg[t].mul_(dc.unsqueeze(1))
        d_o_t[t].mul_(dh)
        dc.mul_(f_t[t])
        torch.mm(dgates[t], a.w_hh, out=dh)

    return step


def _gru_products(w_hh: Tensor) -> list[tuple[slice, Tensor]]:
    """Returns W_hh by columns of the tiles (r, z, n, W_hn h), of which n has no part in h."""
    H = w_hh.shape[1]
    w_rz, w_n = w_hh.split((2 * H, H))
    if H <= _ONE_PRODUCT:
        return [(slice(0, 4 * H), torch.cat([w_rz, torch.zeros_like(w_n), w_n]))]
    return [(slice(0, 2 * H), w_rz), (slice(3 * H, 4 * H), w_n)]


def _gru_forward(a: Forward) -> Callable:
    """r, z = sigmoid(.); n = tanh(gx_n + r (W_hn h + b_hn)); h' = (1 - z) n + z h."""
    H = a.w_hh.shape[1]
    products = [
        (a.split(a.gates[:, tiles]), _transposed(w, a.h)) for tiles, w in _gru_products(a.w_hh)
    ]
    rz, (r, z, n, hn) = a.split(a.gates[:, : 2 * H]), map(a.split, a.gates.chunk(4, 1))
    a.gates[:, 3 * H :] = 0 if a.b_hh is None else a.b_hh[2 * H :]

    def step(t: int, h: Tensor, _: Any) -> None:
        for tiles, w in products:
            tiles[t].addmm_(h, w)
        rz[t].sigmoid_()
        candidate = torch.addcmul(n[t], r[t], hn[t], out=a.scratch[t]).tanh_()
        n[t].copy_(candidate)
        torch.lerp(candidate, h, z[t], out=a.h[t])

    return step


def _candidate_slopes(z: Tensor, n: Tensor, h: Tensor, d_z: Tensor, d_n: Tensor) -> None:
    """Fills d_z and d_n with the slopes of h': (h - n) z (1 - z), and (1 - z) (1 - n^2)."""
    _sigmoid_slope(z, d_z).mul_(h - n)
    torch.mul(n, n, out=d_n).sub_(1)
    torch.addcmul(d_n, d_n, z, value=-1, out=d_n).neg_()


def _gru_backward(a: Backward) -> Callable:
    """All four tiles are dh times what is known before; dh = dh z + (dr, dz, r dn) W_hh."""
    r, z, n, hn = a.gates.chunk(4, 1)
    d_r, d_z, d_n, d_hn = a.dgates.chunk(4, 1)
    _candidate_slopes(z, n, a.before, d_z, d_n)
    _sigmoid_slope(r, d_r).mul_(hn).mul_(d_n)
    torch.mul(d_n, r, out=d_hn)
    d_all, z_t = a.split(a.dgates.view(-1, 4, z.shape[1])), a.split(z)
    (first, w_first), *more = [(a.split(a.dgates[:, of]), w) for of, w in _gru_products(a.w_hh)]

    def step(t: int) -> None:
        dh = a.dh[t]
        d_all[t].mul_(dh.unsqueeze(1))
        # Added to dh z term by term, the product would round each to the size of dh.
        product = torch.mm(first[t], w_first, out=a.scratch[t])
        for grads, w in more:
            product.addmm_(grads[t], w)
        torch.addcmul(product, dh, z_t[t], out=dh)

    return step


def _gru_reset_before_forward(a: Forward) -> Callable:
    """r, z = sigmoid(.); n = tanh(gx_n + W_hn (r h) + b_hn); h' = (1 - z) n + z h."""
    H = a.w_hh.shape[1]
    w_rz, w_n = (_transposed(w, a.h) for w in a.w_hh.split((2 * H, H)))
    rz, (r, z, n) = a.split(a.gates[:, : 2 * H]), map(a.split, a.gates.chunk(3, 1))

    def step(t: int, h: Tensor, _: Any) -> None:
        rz[t].addmm_(h, w_rz).sigmoid_()
        candidate = torch.addmm(n[t], r[t] * h, w_n).tanh_()
        n[t].copy_(candidate)
        torch.lerp(candidate, h, z[t], out=a.h[t])

    return step


def _gru_reset_before_backward(a: Backward) -> Callable:
    """dz, dn = dh (..); du = dn W_hn; dr = du (..); dh = dh z + du r + (dr, dz) W_hrz."""
    r, z, n = a.gates.chunk(3, 1)
    d_r, d_z, d_n = a.dgates.chunk(3, 1)
    _sigmoid_slope(r, d_r).mul_(a.before)
    _candidate_slopes(z, n, a.before, d_z, d_n)
    H = z.shape[1]
    w_rz, w_n = a.w_hh.split((2 * H, H))
    d_rz, d_zn = a.split(a.dgates[:, : 2 * H]), a.split(a.dgates.view(-1, 3, H)[:, 1:])
    d_r_t, d_n_t, r_t, z_t = map(a.split, (d_r, d_n, r, z))

    def step(t: int) -> None:
        dh = a.dh[t]
        d_zn[t].mul_(dh.unsqueeze(1))
        du = d_n_t[t] @ w_n
        d_r_t[t].mul_(du)
        product = torch.mm(d_rz[t], w_rz).addcmul_(du, r_t[t])
        torch.addcmul(product, dh, z_t[t], out=dh)

    return step


def _rnn_forward(a: Forward, function: Callable) -> Callable:
    """h' = tanh(.) or max(., 0)."""
    w_hh, gx = _transposed(a.w_hh, a.h), a.split(a.gates)

    def step(t: int, h: Tensor, _: Any) -> None:
        function(gx[t].addmm_(h, w_hh), out=a.h[t])

    return step


def _rnn_backward(a: Backward, slope: Callable) -> Callable:
    """da = dh (..); dh = da W_hh. The slope of either function follows from h alone."""
    slope(a.h, a.dgates)
    dgates = a.split(a.dgates)

    def step(t: int) -> None:
        torch.mm(dgates[t].mul_(a.dh[t]), a.w_hh, out=a.dh[t])

    return step


class Cell(NamedTuple):
    """The two functions of a cell."""

    forward: Callable[[Forward], Callable]
    backward: Callable[[Backward], Callable]


CELLS = {
    "lstm": Cell(_lstm_forward, _lstm_backward),
    "gru": Cell(_gru_forward, _gru_backward),
    "gru_reset_before": Cell(_gru_reset_before_forward, _gru_reset_before_backward),
    "rnn_tanh": Cell(
        partial(_rnn_forward, function=torch.tanh),
        partial(_rnn_backward, slope=lambda h, out: torch.mul(h, h, out=out).neg_().add_(1)),
    ),
    "rnn_relu": Cell(
        partial(_rnn_forward, function=partial(torch.clamp_min, min=0)),
        partial(_rnn_backward, slope=lambda h, out: out.copy_(h > 0)),
    ),
}
