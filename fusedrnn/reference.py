"""The recurrences in plain torch, step by step: the oracle of the kernels and of the loop.

Written from the equations and from the words of the documentation, not from the kernels, and
proved first: against ``torch.nn`` in fp64 and by gradcheck. Autograd can differentiate it as often
as it likes, hence second derivatives come from here. Any dtype, any device. Axes: T time, B batch,
R rows, H hidden, G gates, D directions. Gates stand in torch's order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.rows import Rows, packed_rows
from .kernels.tensors import Weights
from .layout import Layout, Sequences, with_index

State = Any  # a Tensor, or None for the c of a cell without one


def _linear_hh(h: Tensor, w: Weights, rows: slice = slice(None)) -> Tensor:
    return F.linear(h, w.w_hh[rows], None if w.b_hh is None else w.b_hh[rows])


def _lstm_step(gx: Tensor, h: Tensor, c: State, w: Weights):
    """i, f, o = sigmoid(.), g = tanh(.); c' = f c + i g; h' = o tanh(c')."""
    i, f, g, o = (gx + _linear_hh(h, w)).chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * c + i * g
    return o * c.tanh(), c, (i, f, g, o)


def _gru_step(gx: Tensor, h: Tensor, c: State, w: Weights):
    """r, z = sigmoid(.); n = tanh(gx_n + r (W_hn h + b_hn)); h' = (1 - z) n + z h."""
    xr, xz, xn = gx.chunk(3, -1)
    hr, hz, hn = _linear_hh(h, w).chunk(3, -1)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + r * hn).tanh()
    return (1 - z) * n + z * h, None, (r, z, n, hn)


def _gru_reset_before_step(gx: Tensor, h: Tensor, c: State, w: Weights):
    """r, z = sigmoid(.); n = tanh(gx_n + W_hn (r h) + b_hn); h' = (1 - z) n + z h."""
    H = h.shape[-1]
    xr, xz, xn = gx.chunk(3, -1)
    hr, hz = _linear_hh(h, w, slice(0, 2 * H)).chunk(2, -1)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + _linear_hh(r * h, w, slice(2 * H, 3 * H))).tanh()
    return (1 - z) * n + z * h, None, (r, z, n)


def _rnn_tanh_step(gx: Tensor, h: Tensor, c: State, w: Weights):
    """h' = tanh(.)."""
    return (gx + _linear_hh(h, w)).tanh(), None, ()


def _rnn_relu_step(gx: Tensor, h: Tensor, c: State, w: Weights):
    """h' = max(., 0)."""
    return (gx + _linear_hh(h, w)).relu(), None, ()


#: ``step(gx, h, c, weights) -> (h, c, saved tiles)`` of each cell.
_CELLS: dict[str, Callable] = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "gru_reset_before": _gru_reset_before_step,
    "rnn_tanh": _rnn_tanh_step,
    "rnn_relu": _rnn_relu_step,
}


#: What an LSTM's and a GRU's saved tiles are called.
_GATES = {"lstm": "ifgo", "gru": "rzn", "gru_reset_before": "rzn"}


def gates_of(cell: str, gx: Tensor, h: Tensor, w: Weights) -> dict[str, Tensor]:
    """The activated gates of many steps at once, by name.

    gx: ``[R, G*H]``, the input's part; h: ``[R, P]``, the state that entered each step.
    """
    any_c = gx.new_zeros(())  # no gate depends on it
    _, _, saved = _CELLS[cell](gx, h, any_c, w)
    return dict(zip(_GATES.get(cell, ""), saved, strict=False))


def _project(h: Tensor, w: Weights) -> Tensor:
    return h if w.w_hr is None else F.linear(h, w.w_hr)


def _projected(x: Tensor, w: Weights, d: int) -> Tensor:
    """gx of direction d, of an input that holds ``x W_ih^T`` of all directions side by side."""
    columns = w.w_hh.shape[0]
    x = x[..., d * columns : (d + 1) * columns]
    return x if w.b_ih is None else x + w.b_ih


def one_step(cell: str, x: Tensor, h: Tensor, c: State, w: Weights) -> tuple[Tensor, State]:
    """The states after one step with the input ``[B, I]``."""
    h, c, _ = step_of_gx(cell, F.linear(x, w.w_ih, w.b_ih), h, c, w)
    return h, c


def step_of_gx(cell: str, gx: Tensor, h: Tensor, c: State, w: Weights):
    """The states after one step of which the input's part is known, and the tiles that are saved.

    gx: ``[B, G*H]``; tiles: S times ``[B, H]``.
    """
    h, c, tiles = _CELLS[cell](gx, h, c, w)
    return _project(h, w), c, tiles


def differentiable_stack(
    cell: str,
    input: Tensor,
    h_0: Tensor,
    c_0: State,
    weights: Sequence[Sequence[Weights]],
    dropout_masks: Sequence[Tensor],
    sequences: Sequences = Sequences(),  # noqa: B008, it is immutable
) -> tuple[Tensor, Tensor, State, State]:
    """A whole stack of layers out of operations autograd knows, so derivatives of any order exist.

    Args:
        cell: the name of a cell.
        input: ``[T, B, I]``, packed ``[R, I]``.
        h_0: ``[L*D, B, H]``.
        c_0: ``[L*D, B, H]``, or None for a cell without c.
        weights: ``weights[layer][direction]``.
        dropout_masks: for each layer but the last ``[T, B, D*H]``, packed ``[R, D*H]``, scaled; or
            none at all.
        sequences: lengths and resets, or the batch sizes of packed input.

    Returns:
        output ``[T, B, D*H]``, h_n ``[L*D, B, H]``, c_n or None, and c of every step or None,
        ``[L*D, R, H]``.
    """
    packing = _packing(sequences.batch_sizes, input.device)
    input, dropout_masks = packing.to_grid(input), [packing.to_grid(mask) for mask in dropout_masks]
    steps = _Steps(sequences, input.shape[0], input.shape[1], input.device)
    # What stands beyond the end may be NaN, and 0 * NaN would reach the gradient of W_ih.
    input = torch.where(steps.there.unsqueeze(-1), input, 0.0)
    h_n: list[Tensor] = []
    c_n: list[State] = []
    cs: list[Tensor] = []
    for layer, directions in enumerate(weights):
        outputs = []
        for d, w in enumerate(directions):
            row = layer * len(directions) + d
            first = h_0[row], None if c_0 is None else c_0[row]
            out, h, c, every_c = _one_direction(_CELLS[cell], input, *first, w, d, steps)
            outputs.append(out)
            h_n.append(h)
            c_n.append(c)
            cs += [packing.to_rows(every_c).flatten(0, -2)] if every_c is not None else []
        input = torch.cat(outputs, -1)
        if dropout_masks and layer < len(weights) - 1:
            input = input * dropout_masks[layer]
    output = packing.to_rows(input)
    if c_0 is None:
        return output, torch.stack(h_n), None, None
    return output, torch.stack(h_n), torch.stack(c_n), torch.stack(cs)


class _Steps:
    """The steps that are there, and those before which the state is cut, ``[T, B]`` each."""

    def __init__(self, sequences: Sequences, T: int, B: int, device: torch.device):
        lengths, reset = sequences.lengths, sequences.reset
        if sequences.batch_sizes is not None:
            lengths = (sequences.batch_sizes.unsqueeze(1) > torch.arange(B)).sum(0)
        every = torch.ones(T, B, dtype=torch.bool, device=device)
        times = torch.arange(T, device=device).unsqueeze(1)
        self.there = every if lengths is None else every & (times < lengths.to(device))
        begins = torch.zeros_like(every) if reset is None else reset.to(device) & self.there
        # Backwards the state crosses the same border the other way, from t + 1 to t.
        self.cut = begins, torch.cat((begins[1:], torch.zeros_like(begins[:1])))


def _one_direction(
    step: Callable, x: Tensor, h: Tensor, c: State, w: Weights, d: int, steps: _Steps
):
    """Outputs of every step, the final states, and c of every step or None."""
    is_projected = x.shape[-1] > 0 and not w.w_ih.shape[1]
    gx = _projected(x, w, d) if is_projected else F.linear(x, w.w_ih, w.b_ih)
    hs: list[Tensor] = [h] * len(gx)
    cs: list[State] = [c] * len(gx)
    for t in range(len(gx)) if d == 0 else range(len(gx) - 1, -1, -1):
        there, cut = steps.there[t].unsqueeze(-1), steps.cut[d][t].unsqueeze(-1)
        h_in = torch.where(cut, 0.0, h)
        c_in = None if c is None else torch.where(cut, 0.0, c)
        h_out, c_out, _ = step(gx[t], h_in, c_in, w)
        h = torch.where(there, _project(h_out, w), h)
        hs[t] = torch.where(there, h, 0.0)
        if c is not None:
            c = torch.where(there, c_out, c)
            cs[t] = torch.where(there, c, 0.0)
    return torch.stack(hs), h, c, None if c is None else torch.stack(cs)


def _packing(batch_sizes: Tensor | None, device: torch.device) -> Layout:
    """The way from packed rows to ``[T, B]`` and back."""
    if batch_sizes is None:
        return Layout(Rows(0, 0))
    rows = packed_rows(batch_sizes, 1, device)
    there = torch.arange(rows.B) < batch_sizes.unsqueeze(1)
    return with_index(rows, there.flatten().nonzero().squeeze(1), device)
