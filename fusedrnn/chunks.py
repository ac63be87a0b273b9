"""What the backend ``compiled`` compiles: some steps of the loop as functions of tensors.

Forward is the step of ``reference.py``; here stand the adjoints, of gates that were saved. They
write to nothing that is handed in, as a compiler likes it. Axes: K steps of a chunk, and those of
``loop.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .kernels.spec import SPECS, Weights
from .loop_cells import State
from .reference import step_of_gx

#: ``(saved tiles, state that left, state that entered, dh, dc, weights) -> (dgates, dh, dc)``, the
#: gradients before the step of those after it; the state is c in a cell that has it, else h.
Adjoint = Callable[..., tuple[Tensor, Tensor, State]]


def _lstm_adjoint(tiles, left, entered, dh, dc, w: Weights):
    """dc += dh o (1 - tanh^2 c); di, df, dg = dc (..); do = dh (..); dh = dgates W_hh; dc *= f."""
    i, f, g, o = tiles
    if w.w_hr is not None:
        dh = dh @ w.w_hr
    tanh_c = left.tanh()
    dc = dc + dh * (o * (1 - tanh_c * tanh_c))
    d_i, d_f = dc * (g * (i * (1 - i))), dc * (entered * (f * (1 - f)))
    d_g, d_o = dc * (i * (1 - g * g)), dh * (tanh_c * (o * (1 - o)))
    dgates = torch.cat((d_i, d_f, d_g, d_o), 1)
    return dgates, dgates @ w.w_hh, dc * f


def _gru_adjoint(tiles, left, entered, dh, dc, w: Weights):
    """dz, dn = dh (..); dr = dn (..); dh = dh z + (dr, dz, r dn) W_hh."""
    r, z, n, hn = tiles
    d_z, d_n = dh * ((entered - n) * (z * (1 - z))), dh * ((1 - z) * (1 - n * n))
    d_r, d_hn = d_n * (hn * (r * (1 - r))), d_n * r
    product = torch.cat((d_r, d_z, d_hn), 1) @ w.w_hh
    return torch.cat((d_r, d_z, d_n, d_hn), 1), product + dh * z, None


def _gru_reset_before_adjoint(tiles, left, entered, dh, dc, w: Weights):
    """dz, dn = dh (..); du = dn W_hn; dr = du (..); dh = dh z + du r + (dr, dz) W_hrz."""
    r, z, n = tiles
    w_rz, w_n = w.w_hh.split((2 * n.shape[1], n.shape[1]))
    d_z, d_n = dh * ((entered - n) * (z * (1 - z))), dh * ((1 - z) * (1 - n * n))
    du = d_n @ w_n
    d_r = du * (entered * (r * (1 - r)))
    product = torch.cat((d_r, d_z), 1) @ w_rz
    return torch.cat((d_r, d_z, d_n), 1), product + du * r + dh * z, None


def _rnn_tanh_adjoint(tiles, left, entered, dh, dc, w: Weights):
    """da = dh (1 - h^2); dh = da W_hh."""
    da = dh * (1 - left * left)
    return da, da @ w.w_hh, None


def _rnn_relu_adjoint(tiles, left, entered, dh, dc, w: Weights):
    """da = dh where h > 0; dh = da W_hh."""
    da = dh * (left > 0)
    return da, da @ w.w_hh, None


ADJOINTS: dict[str, Adjoint] = {
    "lstm": _lstm_adjoint,
    "gru": _gru_adjoint,
    "gru_reset_before": _gru_reset_before_adjoint,
    "rnn_tanh": _rnn_tanh_adjoint,
    "rnn_relu": _rnn_relu_adjoint,
}


def forward_chunk(
    cell: str, d: int, saves: bool, keeps_c: bool, gx: Tensor, h: Tensor, c: State, *weights
) -> list[Tensor]:
    """Through some steps of a direction.

    Args:
        saves, keeps_c: whether gates are wanted, and c of each step or of the last one.
        gx: ``[K, n, G*H]``.
        h, c: what enters, ``[n, P]`` and ``[n, H]``.
        weights: W_hh^T, b_hh (zero where it is a part of gx) or None, and W_hr or None.

    Returns:
        What there is of the gates ``[K, n, S*H]``, h ``[K, n, P]``, and c ``[K, n, H]`` or
        ``[n, H]``.
    """
    order, (w_hh_t, *others) = _order(d, len(gx)), weights
    w = _as_weights(w_hh_t.t(), *others)
    of_each = {}
    for k in order:
        h, c, tiles = step_of_gx(cell, gx[k], h, c, w)
        of_each[k] = torch.cat(tiles, 1) if saves and tiles else None, h, c
    gates, hs, cs = (_stacked([of_each[k][i] for k in sorted(order)]) for i in range(3))
    return there(gates, hs, cs if keeps_c else c)


def backward_chunk(
    cell: str,
    d: int,
    gates: Tensor | None,
    left: Tensor,
    first: Tensor,
    d_out: Tensor | None,
    dh: Tensor,
    dc: State,
    *weights,
) -> list[Tensor]:
    """Backwards through some steps of a direction.

    Args:
        gates: ``[K, n, S*H]``, None of a cell that saves none.
        left: the state that left each step, c or, of a cell without, h, ``[K, n, .]``.
        first: that which entered the first of them, ``[n, .]``.
        d_out: what reaches h of each step from outside, ``[K, n, P]``, or None.
        dh, dc: the gradients after the steps, ``[n, P]`` and ``[n, H]``.
        weights: W_hh, None, and W_hr or None.

    Returns:
        dgates ``[K, n, N*H]``, and dh and, in a cell that has it, dc before the steps.
    """
    order, w, dgates = _order(d, len(left)), _as_weights(*weights), {}
    entered = dict(zip(order, [first, *(left[k] for k in order[:-1])], strict=True))
    for k in reversed(order):
        if d_out is not None:
            dh = dh + d_out[k]
        tiles = () if gates is None else gates[k].chunk(SPECS[cell].saved, 1)
        dgates[k], dh, dc = ADJOINTS[cell](tiles, left[k], entered[k], dh, dc, w)
    return there(torch.stack([dgates[k] for k in sorted(order)]), dh, dc)


def _order(d: int, steps: int) -> list[int]:
    return list(range(steps))[:: 1 if d == 0 else -1]


def _as_weights(w_hh: Tensor, b_hh: Tensor | None, w_hr: Tensor | None) -> Weights:
    return Weights(w_hh, w_hh, None, b_hh, w_hr)  # nobody looks at w_ih


def _stacked(tensors: list[State]) -> State:
    return None if tensors[0] is None else torch.stack(tensors)


def there(*tensors: State) -> list[Tensor]:
    """Those that are no None: what a program takes and returns."""
    return [tensor for tensor in tensors if tensor is not None]
