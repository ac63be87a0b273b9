"""The recurrences in plain torch: the oracle of the kernels and the pure-torch backend.

Written from the equations, not from the kernels, and proved first: against ``torch.nn`` in fp64
and by gradcheck. Any dtype, any device. Axes: T time, B batch, H hidden, G gates, D directions,
S saved tiles, N gradient tiles (``kernels/spec.py``). Gates stand in torch's order.

Each cell has two functions: ``step``, which autograd can differentiate as often as it likes, and
its hand-written adjoint ``bwd`` for the backend. c is None in a cell without one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.spec import Weights

State = Any  # a Tensor, or None for the c of a cell without one


def _linear_hh(h: Tensor, w: Weights, rows: slice = slice(None)) -> Tensor:
    return F.linear(h, w.w_hh[rows], None if w.b_hh is None else w.b_hh[rows])


def _lstm_step(gx: Tensor, h: Tensor, c: State, w: Weights):
    """i, f, o = sigmoid(.), g = tanh(.); c' = f c + i g; h' = o tanh(c')."""
    i, f, g, o = (gx + _linear_hh(h, w)).chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * c + i * g
    return o * c.tanh(), c, (i, f, g, o)


def _lstm_bwd(dh: Tensor, dc: Tensor, saved: Tensor, h_prev, c_prev, h, c, w: Weights):
    i, f, g, o = saved.chunk(4, -1)
    tanh_c = c.tanh()
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    di, df = dc * g * i * (1 - i), dc * c_prev * f * (1 - f)
    dg, do = dc * i * (1 - g * g), dh * tanh_c * o * (1 - o)
    dgates = torch.cat((di, df, dg, do), -1)
    return dgates, dgates @ w.w_hh, dc * f


def _gru_step(gx: Tensor, h: Tensor, c: State, w: Weights):
    """r, z = sigmoid(.); n = tanh(gx_n + r (W_hn h + b_hn)); h' = (1 - z) n + z h."""
    xr, xz, xn = gx.chunk(3, -1)
    hr, hz, hn = _linear_hh(h, w).chunk(3, -1)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + r * hn).tanh()
    return (1 - z) * n + z * h, None, (r, z, n, hn)


def _gru_bwd(dh: Tensor, dc, saved: Tensor, h_prev, c_prev, h, c, w: Weights):
    r, z, n, hn = saved.chunk(4, -1)
    dn = dh * (1 - z) * (1 - n * n)
    dz = dh * (h_prev - n) * z * (1 - z)
    dr = dn * hn * r * (1 - r)
    recurrent = torch.cat((dr, dz, dn * r), -1)
    dgates = torch.cat((dr, dz, dn, dn * r), -1)
    return dgates, recurrent @ w.w_hh + dh * z, None


def _gru_reset_before_step(gx: Tensor, h: Tensor, c: State, w: Weights):
    """r, z = sigmoid(.); n = tanh(gx_n + W_hn (r h) + b_hn); h' = (1 - z) n + z h."""
    H = h.shape[-1]
    xr, xz, xn = gx.chunk(3, -1)
    hr, hz = _linear_hh(h, w, slice(0, 2 * H)).chunk(2, -1)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + _linear_hh(r * h, w, slice(2 * H, 3 * H))).tanh()
    return (1 - z) * n + z * h, None, (r, z, n)


def _gru_reset_before_bwd(dh: Tensor, dc, saved: Tensor, h_prev, c_prev, h, c, w: Weights):
    H = h.shape[-1]
    r, z, n = saved.chunk(3, -1)
    dn = dh * (1 - z) * (1 - n * n)
    dz = dh * (h_prev - n) * z * (1 - z)
    du = dn @ w.w_hh[2 * H :]
    dr = du * h_prev * r * (1 - r)
    dgates = torch.cat((dr, dz, dn), -1)
    return dgates, dgates[..., : 2 * H] @ w.w_hh[: 2 * H] + du * r + dh * z, None


def _rnn_tanh_step(gx: Tensor, h: Tensor, c: State, w: Weights):
    """h' = tanh(.)."""
    return (gx + _linear_hh(h, w)).tanh(), None, ()


def _rnn_tanh_bwd(dh: Tensor, dc, saved, h_prev, c_prev, h, c, w: Weights):
    da = dh * (1 - h * h)
    return da, da @ w.w_hh, None


def _rnn_relu_step(gx: Tensor, h: Tensor, c: State, w: Weights):
    """h' = max(., 0)."""
    return (gx + _linear_hh(h, w)).relu(), None, ()


def _rnn_relu_bwd(dh: Tensor, dc, saved, h_prev, c_prev, h, c, w: Weights):
    da = dh * (h > 0)
    return da, da @ w.w_hh, None


class _Cell(NamedTuple):
    """The two functions of a cell."""

    step: Callable  # (gx, h, c, weights) -> (h, c, saved tiles)
    bwd: Callable  # (dh, dc, saved, h_prev, c_prev, h, c, weights) -> (dgates, dh_prev, dc_prev)


_CELLS = {
    "lstm": _Cell(_lstm_step, _lstm_bwd),
    "gru": _Cell(_gru_step, _gru_bwd),
    "gru_reset_before": _Cell(_gru_reset_before_step, _gru_reset_before_bwd),
    "rnn_tanh": _Cell(_rnn_tanh_step, _rnn_tanh_bwd),
    "rnn_relu": _Cell(_rnn_relu_step, _rnn_relu_bwd),
}


def _project(h: Tensor, w: Weights) -> Tensor:
    return h if w.w_hr is None else F.linear(h, w.w_hr)


def _times(T: int, d: int) -> range:
    """The times in the order direction d runs through them."""
    return range(T) if d == 0 else range(T - 1, -1, -1)


def reference_fwd(
    cell: str,
    gx: Tensor,
    weights: Sequence[Weights],
    h_0: Tensor,
    c_0: State,
    out: Tensor,
    h_n: Tensor,
    c_n: State,
    gates: State,
    cs: State,
) -> None:
    """One layer, all directions; the arguments of ``resident_fwd``, with gx ``[D, T, B, G*H]``."""
    step = _CELLS[cell].step
    P = h_0.shape[-1]
    for d, w in enumerate(weights):
        h, c = h_0[d], None if c_0 is None else c_0[d]
        columns = out[..., d * P : (d + 1) * P]
        for t in _times(gx.shape[1], d):
            h, c, saved = step(gx[d, t], h, c, w)
            columns[t] = h = _project(h, w)
            if gates is not None and saved:
                torch.cat(saved, -1, out=gates[d, t])
            if cs is not None:
                cs[d, t] = c
        h_n[d] = h
        if c_n is not None:
            c_n[d] = c


def reference_bwd(
    cell: str,
    d_out: Tensor | None,
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
) -> None:
    """One layer backwards; the arguments of ``resident_bwd``."""
    bwd = _CELLS[cell].bwd
    P = h_0.shape[-1]
    for d, w in enumerate(weights):
        hs = out[..., d * P : (d + 1) * P]
        dh, dc = d_h_n[d], None if d_c_n is None else d_c_n[d]
        times = _times(out.shape[0], d)
        for step in reversed(range(len(times))):
            t = times[step]
            if d_out is not None:
                dh = dh + d_out[t, :, d * P : (d + 1) * P]
            if w.w_hr is not None:
                dh = dh @ w.w_hr
            h_prev = hs[times[step - 1]] if step else h_0[d]
            c_prev = None if cs is None else cs[d, times[step - 1]] if step else c_0[d]
            c = None if cs is None else cs[d, t]
            dgates[d, t], dh, dc = bwd(dh, dc, gates[d, t], h_prev, c_prev, hs[t], c, w)
        d_h_0[d] = dh
        if d_c_0 is not None:
            d_c_0[d] = dc


def differentiable_stack(
    cell: str,
    input: Tensor,
    h_0: Tensor,
    c_0: State,
    weights: Sequence[Sequence[Weights]],
    dropout_masks: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A whole stack of layers out of operations autograd knows, so derivatives of any order exist.

    Args:
        cell: the name of a cell.
        input: ``[T, B, I]``.
        h_0: ``[L*D, B, H]``; c_0 likewise, or None for a cell without c.
        weights: ``weights[layer][direction]``.
        dropout_masks: for each layer but the last ``[T, B, D*H]``, scaled; or none at all.

    Returns:
        output ``[T, B, D*H]``, h_n ``[L*D, B, H]``, and c_n or None.
    """
    step = _CELLS[cell].step
    h_n: list[Tensor] = []
    c_n: list[State] = []
    for layer, directions in enumerate(weights):
        outputs = []
        for d, w in enumerate(directions):
            row = layer * len(directions) + d
            gx = F.linear(input, w.w_ih, w.b_ih)
            h, c = h_0[row], None if c_0 is None else c_0[row]
            hs: list[Tensor] = [h] * len(gx)
            for t in _times(len(gx), d):
                h, c, _ = step(gx[t], h, c, w)
                hs[t] = h = _project(h, w)
            outputs.append(torch.stack(hs))
            h_n.append(h)
            c_n.append(c)
        input = torch.cat(outputs, -1)
        if dropout_masks and layer < len(weights) - 1:
            input = input * dropout_masks[layer]
    return input, torch.stack(h_n), None if c_0 is None else torch.stack(c_n)
