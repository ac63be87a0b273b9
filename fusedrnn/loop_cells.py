"""The cells as steps of a loop in plain torch, in place: the equations of ``reference.py``.

A cell is two functions. Each binds its tensors once and returns the function that runs one step, so
that the loop (``loop.py``) makes no views and allocates nothing that it does not need. Before its
loop, backward fills dgates with all factors that do not depend on the gradients.
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
#: ``slope(dy, y, grad_input=out)`` fills out with dy y (1 - y), dy (1 - y^2), or dy where y > 0.
_sigmoid_slope = torch.ops.aten.sigmoid_backward.grad_input
_tanh_slope = torch.ops.aten.tanh_backward.grad_input
_relu = partial(torch.clamp_min, min=0)
_relu_slope = partial(torch.ops.aten.threshold_backward.grad_input, threshold=0)


class Direction(NamedTuple):
    """The tensors of one direction, of which a pass cuts what it needs into steps."""

    gates: Tensor  # [R, max(G, S)*H] with gx, which forward turns into the gates [R, S*H]
    w_hh: Tensor  # [G*H, H]
    b_hh: Tensor | None  # [G*H], of which gx has all but a GRU's b_hn
    scratch: Sequence[Tensor]  # of each step [n, H], room that all steps share
    split: Split
    h: Sequence[Tensor]  # of each step [n, H], written; backward: its gradient, carried in place
    c: Any = None  # the same of c, in a cell that has it
    # Read by backward alone:
    dgates: Any = None  # [R, N*H], written
    left: Any = None  # [R, H], the c, or without one the h, that left each step
    entered: Any = None  # computes the one that entered each step

    def transposed(self, weight: Tensor) -> Tensor:
        """Returns ``weight^T``; for many steps a copy, whose products are faster than a view's."""
        return weight.t().contiguous() if len(self.scratch) >= _MANY_STEPS else weight.t()


def _lstm_forward(a: Direction) -> Callable:
    """i, f, o = sigmoid(.), g = tanh(.); c' = f c + i g; h' = o tanh(c')."""
    w_hh = a.transposed(a.w_hh)
    gates, (i, f, g, o) = a.split(a.gates), map(a.split, a.gates.chunk(4, 1))

    def step(t: int, h: Tensor, c: Tensor) -> None:
        gates[t].addmm_(h, w_hh)
        candidate = torch.tanh(g[t], out=a.scratch[t])
        gates[t].sigmoid_()  # g too, for nothing: cheaper than two calls for i, f and o
        g[t].copy_(candidate)
        new = torch.mul(f[t], c, out=a.c[t]).addcmul_(i[t], candidate)
        torch.mul(o[t], torch.tanh(new, out=candidate), out=a.h[t])

    return step


def _lstm_backward(a: Direction) -> Callable:
    """dc += dh o (1 - tanh^2 c); di, df, dg = dc (..); do = dh (..); dh = dgates W_hh; dc *= f."""
    i, f, g, o = a.gates.chunk(4, 1)
    d_i, d_f, d_g, d_o = a.dgates.chunk(4, 1)
    tanh_c = torch.tanh(a.left)
    _sigmoid_slope(g, i, grad_input=d_i)
    _sigmoid_slope(a.entered(), f, grad_input=d_f)
    _tanh_slope(i, g, grad_input=d_g)
    _sigmoid_slope(tanh_c, o, grad_input=d_o)
    slopes = a.split(_tanh_slope(o, tanh_c, grad_input=tanh_c))
    dgates, d_ifg = a.split(a.dgates), a.split(a.dgates.unflatten(1, (4, -1))[:, :3])
    d_os, fs = a.split(d_o), a.split(f)

    def step(t: int) -> None:
        dh, dc = a.h[t], a.c[t]
        dc.addcmul_(dh, slopes[t])
        d_ifg[t].mul_(dc.unsqueeze(1))
        d_os[t].mul_(dh)
        dc.mul_(fs[t])
        torch.mm(dgates[t], a.w_hh, out=dh)

    return step


def _gru_products(w_hh: Tensor) -> list[tuple[slice, Tensor]]:
    """Returns W_hh by columns of the tiles (r, z, n, W_hn h), of which n has no part in h."""
    H = w_hh.shape[1]
    w_rz, w_n = w_hh.split((2 * H, H))
    if H <= _ONE_PRODUCT:
        return [(slice(0, 4 * H), torch.cat([w_rz, torch.zeros_like(w_n), w_n]))]
    return [(slice(0, 2 * H), w_rz), (slice(3 * H, 4 * H), w_n)]


def _gru_forward(a: Direction) -> Callable:
    """r, z = sigmoid(.); n = tanh(gx_n + r (W_hn h + b_hn)); h' = (1 - z) n + z h."""
    H = a.w_hh.shape[1]
    products = [(a.split(a.gates[:, tiles]), a.transposed(w)) for tiles, w in _gru_products(a.w_hh)]
    rz, (r, z, n, hn) = a.split(a.gates[:, : 2 * H]), map(a.split, a.gates.chunk(4, 1))
    a.gates[:, 3 * H :] = 0 if a.b_hh is None else a.b_hh[2 * H :]

    def step(t: int, h: Tensor) -> None:
        for tiles, w in products:
            tiles[t].addmm_(h, w)
        rz[t].sigmoid_()
        candidate = torch.addcmul(n[t], r[t], hn[t], out=a.scratch[t]).tanh_()
        n[t].copy_(candidate)
        torch.lerp(candidate, h, z[t], out=a.h[t])

    return step


def _gru_backward(a: Direction) -> Callable:
    """All four tiles are dh times what is known before; dh = dh z + (dr, dz, r dn) W_hh."""
    r, z, n, hn = a.gates.chunk(4, 1)
    d_r, d_z, d_n, d_hn = a.dgates.chunk(4, 1)
    _sigmoid_slope(a.entered() - n, z, grad_input=d_z)
    _tanh_slope(1 - z, n, grad_input=d_n)
    _sigmoid_slope(hn * d_n, r, grad_input=d_r)
    torch.mul(d_n, r, out=d_hn)
    d_all, zs = a.split(a.dgates.unflatten(1, (4, -1))), a.split(z)
    products = [(a.split(a.dgates[:, tiles]), w) for tiles, w in _gru_products(a.w_hh)]
    (first, w_first), *more = products

    def step(t: int) -> None:
        dh = a.h[t]
        d_all[t].mul_(dh.unsqueeze(1))
        # Added to dh z term by term, the product would round each to the size of dh.
        product = torch.mm(first[t], w_first, out=a.scratch[t])
        for grads, w in more:
            product.addmm_(grads[t], w)
        torch.addcmul(product, dh, zs[t], out=dh)

    return step


def _gru_reset_before_forward(a: Direction) -> Callable:
    """r, z = sigmoid(.); n = tanh(gx_n + W_hn (r h) + b_hn); h' = (1 - z) n + z h."""
    H = a.w_hh.shape[1]
    w_rz, w_n = map(a.transposed, a.w_hh.split((2 * H, H)))
    rz, (r, z, n) = a.split(a.gates[:, : 2 * H]), map(a.split, a.gates.chunk(3, 1))

    def step(t: int, h: Tensor) -> None:
        rz[t].addmm_(h, w_rz).sigmoid_()
        n[t].addmm_(torch.mul(r[t], h, out=a.scratch[t]), w_n).tanh_()
        torch.lerp(n[t], h, z[t], out=a.h[t])

    return step


def _gru_reset_before_backward(a: Direction) -> Callable:
    """dz, dn = dh (..); du = dn W_hn; dr = du (..); dh = dh z + du r + (dr, dz) W_hrz."""
    r, z, n = a.gates.chunk(3, 1)
    d_r, d_z, d_n = a.dgates.chunk(3, 1)
    entered, H = a.entered(), z.shape[1]
    _sigmoid_slope(entered, r, grad_input=d_r)
    _sigmoid_slope(entered - n, z, grad_input=d_z)
    _tanh_slope(1 - z, n, grad_input=d_n)
    w_rz, w_n = a.w_hh.split((2 * H, H))
    d_rz = a.split(a.dgates[:, : 2 * H])
    d_zn = a.split(a.dgates.unflatten(1, (3, H))[:, 1:])
    d_rs, d_ns, rs, zs = map(a.split, (d_r, d_n, r, z))

    def step(t: int) -> None:
        dh = a.h[t]
        d_zn[t].mul_(dh.unsqueeze(1))
        du = torch.mm(d_ns[t], w_n, out=a.scratch[t])
        d_rs[t].mul_(du)
        product = torch.mm(d_rz[t], w_rz).addcmul_(du, rs[t])
        torch.addcmul(product, dh, zs[t], out=dh)

    return step


def _rnn_forward(function: Callable, a: Direction) -> Callable:
    """h' = tanh(.) or max(., 0)."""
    w_hh, gx = a.transposed(a.w_hh), a.split(a.gates)

    def step(t: int, h: Tensor) -> None:
        function(gx[t].addmm_(h, w_hh), out=a.h[t])

    return step


def _rnn_backward(slope: Callable, a: Direction) -> Callable:
    """da = dh (..); dh = da W_hh. The slope of either function follows from h alone."""
    slope(a.left.new_ones(1).expand_as(a.left), a.left, grad_input=a.dgates)
    dgates = a.split(a.dgates)

    def step(t: int) -> None:
        torch.mm(dgates[t].mul_(a.h[t]), a.w_hh, out=a.h[t])

    return step


#: The functions of each cell, forward and backward.
CELLS: dict[str, tuple[Callable[[Direction], Callable], ...]] = {
    "lstm": (_lstm_forward, _lstm_backward),
    "gru": (_gru_forward, _gru_backward),
    "gru_reset_before": (_gru_reset_before_forward, _gru_reset_before_backward),
    "rnn_tanh": (partial(_rnn_forward, torch.tanh), partial(_rnn_backward, _tanh_slope)),
    "rnn_relu": (partial(_rnn_forward, _relu), partial(_rnn_backward, _relu_slope)),
}
