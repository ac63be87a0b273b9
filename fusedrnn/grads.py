"""The gradients of one layer's weights: library GEMMs and sums over all steps at once.

Every schedule leaves ``dgates``, the gradients of the pre-activations; with what entered each step
they make the gradients of the weights. Axes: T time, B batch, R rows, H hidden, P columns of h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels.rows import SKIPPED
from .kernels.spec import CellSpec, Weights, runs_of
from .layout import Links


def weight_grads(
    spec: CellSpec,
    d: int,
    w: Weights,
    x: Tensor,
    h_0: Tensor,
    out: Tensor,
    gates: Tensor,
    dgates: Tensor,
    links: Links | None,
) -> list[Tensor]:
    """dW_ih, dW_hh and, with biases, db_ih, db_hh of direction d, each summed over all rows.

    x: ``[R, I]`` or ``[T, B, I]``; h_0 ``[B, P]``; out ``[R, D*P]``; gates ``[R, S*H]``; dgates
    ``[R, N*H]``; links: of the rows, or None where they are dense and without origins.
    """
    H, P = w.w_hh.shape[0] // spec.gates, w.w_hh.shape[1]
    dgx = dgates[:, : spec.gates * H]
    dw_ih = dgx.t() @ x.reshape(-1, x.shape[-1])
    dw_hh, db_hh = torch.empty_like(w.w_hh), dgx.new_empty(spec.gates * H)
    entering = _entering(out.flatten(0, -2)[:, d * P : (d + 1) * P], h_0, d, links)
    for phase, operand in zip(spec.phases, spec.operands, strict=True):
        if operand == "r*h":
            operands = [(rows, gates[rows, :H] * h) for rows, h in entering]
        else:
            operands = entering
        for first_gate, first_tile, count in runs_of(phase, spec.recurrent):
            units = slice(first_gate * H, (first_gate + count) * H)
            grads = dgates[:, first_tile * H : (first_tile + count) * H]
            for part, (rows, u) in enumerate(operands):
                target = dw_hh[units]
                torch.addmm(target, grads[rows].t(), u, beta=float(part > 0), out=target)
            torch.sum(grads, 0, out=db_hh[units])
    return [dw_ih, dw_hh] if w.b_ih is None else [dw_ih, dw_hh, dgx.sum(0), db_hh]


def _entering(hs: Tensor, h_0: Tensor, d: int, links: Links | None) -> list[tuple[slice, Tensor]]:
    """The h that entered each step, in parts: some rows, and their h."""
    if links is not None:
        return [(slice(None), links.entering(hs, h_0))]
    # Of all steps but the direction's first it lies in `hs`, one step further on: no copy.
    B, rest = len(h_0), len(hs) - len(h_0)
    if d == 0:
        return [(slice(0, B), h_0), (slice(B, None), hs[:rest])]
    return [(slice(rest, None), h_0), (slice(0, rest), hs[B:])]


def projection_grad(
    d: int,
    w: Weights,
    d_out: Tensor | None,
    d_h_n: Tensor,
    gates: Tensor,
    cs: Tensor,
    dgates: Tensor,
    links: Links,
) -> list[Tensor]:
    """dW_hr.

    The gradient of every h is made again of what reached it: that of out, of h_n, and dgates of the
    step that follows times W_hh, which no schedule keeps.
    """
    assert w.w_hr is not None
    P, H = w.w_hr.shape
    dh = (dgates @ w.w_hh).index_select(0, links.following)
    dh = torch.where(links.goes_on.unsqueeze(1), dh, 0.0)
    dh += torch.where(links.last.unsqueeze(1), d_h_n.index_select(0, links.sequence), 0.0)
    if d_out is not None:
        dh += d_out.flatten(0, -2)[:, d * P : (d + 1) * P]
    dh.masked_fill_((links.origins == SKIPPED).unsqueeze(1), 0.0)  # padding's may be NaN
    return [dh.t() @ (gates[:, 3 * H :] * cs.tanh())]  # o tanh(c)
