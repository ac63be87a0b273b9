"""The recurrences in plain torch, step by step: the oracle of the kernels and of the loop.

Written from the equations and torch's documentation, not from the kernels, for any dtype and
device. Autograd can differentiate it any number of times. Gates are in torch's order.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.tensors import Weights
from .layout import to_grid
from .records import Sequences

State = Any  # a Tensor, or None for the c of a cell without one


def _linear_hh(h: Tensor, w: Weights, rows: slice = slice(None)) -> Tensor:
    return F.linear(h, w.w_hh[rows], None if w.b_hh is None else w.b_hh[rows])


def _lstm_step(gx: Tensor, h: Tensor, c: State, w: Weights):
    """i, f, o = sigmoid(.), g = tanh(.); c' = f c + i g; h' = o tanh(c')."""
    i, f, g, o = (gx + _linear_hh(h, w)).chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * c + i * g
    return o * c.tanh(), c, (i, f, g, o)


def _gru_step(gx: Tensor, h: Tensor, c: State, w: Weights, reset_after: bool = True):
    """r, z = sigmoid(.); n = tanh(gx_n + r (W_hn h + b_hn)); h' = (1 - z) n + z h.

    Without ``reset_after`` n = tanh(gx_n + W_hn (r h) + b_hn).
    """
    H = h.shape[-1]
    r, z = (gx[..., : 2 * H] + _linear_hh(h, w, slice(2 * H))).sigmoid().chunk(2, -1)
    hn = _linear_hh(h if reset_after else r * h, w, slice(2 * H, None))
    n = (gx[..., 2 * H :] + (r * hn if reset_after else hn)).tanh()
    return (1 - z) * n + z * h, None, (r, z, n, hn)


def _rnn_step(function: Callable, gx: Tensor, h: Tensor, c: State, w: Weights):
    """h' = tanh(.) or max(., 0)."""
    return function(gx + _linear_hh(h, w)), None, ()


#: ``step(gx, h, c, weights) -> (h, c, saved tiles)`` of each cell.
CELLS: dict[str, Callable] = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "gru_reset_before": partial(_gru_step, reset_after=False),
    "rnn_tanh": partial(_rnn_step, torch.tanh),
    "rnn_relu": partial(_rnn_step, torch.relu),
}


def differentiable_stack(
    cell: str, input: Tensor, h_0: Tensor, c_0: State, weights: Sequence[Sequence[Weights]],
    dropout_masks: Sequence[Tensor], sequences: Sequences,
) -> tuple[Tensor, Tensor, State, State]:  # fmt: skip
    """Runs a stack of layers by operations of autograd, so derivatives of any order exist.

    The tensors are those of ``StackInputs``, but under a projection h_0 is ``[L*D, B, P]``, the
    masks have P columns, and weights, ``weights[layer][direction]``, have w_hr.

    Returns:
        output ``[T, B, D*P]``, h_n ``[L*D, B, P]``, c_n or None, and c of every step
        ``[L*D, T, B, H]`` or None.
    """
    (lengths, reset, sizes, _), B, device = sequences, h_0.shape[1], input.device
    T = input.shape[0] if sizes is None else len(sizes)
    if sizes is not None:
        lengths = (sizes.unsqueeze(1) > torch.arange(B, device=sizes.device)).sum(0)
    # bool [T, B]: the steps that are there, and by direction those before which h is cut.
    every = torch.ones(T, B, dtype=torch.bool, device=device)
    times = torch.arange(T, device=device).unsqueeze(1)
    there = every if lengths is None else every & (times < lengths.to(device))
    begins = torch.zeros_like(every) if reset is None else reset.to(device) & there
    # Backwards the state crosses the same border the other way, from t + 1 to t.
    cuts = begins, torch.cat((begins[1:], torch.zeros_like(begins[:1])))
    if sizes is not None:
        index = there.flatten().nonzero().squeeze(1)
        input, *dropout_masks = (to_grid(x, index, T, B) for x in (input, *dropout_masks))
    # Padding may be NaN, and 0 * NaN would reach the gradient of W_ih.
    input = torch.where(there.unsqueeze(-1), input, 0.0)
    finals: list[tuple[Tensor, State]] = []
    cs: list[State] = []
    for layer, directions in enumerate(weights):
        outputs = []
        for d, w in enumerate(directions):
            row = layer * len(directions) + d
            first = h_0[row], None if c_0 is None else c_0[row]
            out, *final, every_c = _one_direction(CELLS[cell], input, *first, w, d, there, cuts[d])
            outputs.append(out)
            finals.append(final)
            cs.append(every_c)
        input = torch.cat(outputs, -1)
        if dropout_masks and layer < len(weights) - 1:
            input = input * dropout_masks[layer]
    h_n, c_n = zip(*finals, strict=True)
    input = input if sizes is None else input.flatten(0, 1)[index]
    if c_0 is None:
        return input, torch.stack(h_n), None, None
    cs = cs if sizes is None else [c.flatten(0, 1)[index] for c in cs]
    return input, torch.stack(h_n), torch.stack(c_n), torch.stack(cs)


def _one_direction(
    step: Callable, x: Tensor, h: Tensor, c: State, w: Weights, d: int, there: Tensor, cut: Tensor
):
    """Runs one direction of a layer: h of every step, the final states, c of every step or None."""
    gx = F.linear(x, w.w_ih, w.b_ih)
    hs: list[Tensor] = [h] * len(gx)
    cs: list[State] = [c] * len(gx)
    for t in range(len(gx)) if d == 0 else range(len(gx) - 1, -1, -1):
        is_there, is_cut = there[t].unsqueeze(-1), cut[t].unsqueeze(-1)
        h_in = torch.where(is_cut, 0.0, h)
        c_in = None if c is None else torch.where(is_cut, 0.0, c)
        h_out, c_out, _ = step(gx[t], h_in, c_in, w)
        h = torch.where(is_there, h_out if w.w_hr is None else F.linear(h_out, w.w_hr), h)
        hs[t] = torch.where(is_there, h, 0.0)
        if c is not None:
            c = torch.where(is_there, c_out, c)
            cs[t] = torch.where(is_there, c, 0.0)
    return torch.stack(hs), h, c, None if c is None else torch.stack(cs)
