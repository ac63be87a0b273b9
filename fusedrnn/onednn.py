"""A small LSTM layer on the CPU by oneDNN's own steps, forward and backward, behind our GEMMs.

oneDNN runs the steps of a small LSTM faster than any loop of calls can. But its backward multiplies
the input as well, and keeps it several times: 48 MB for I = 300, H = 16, T = 100, B = 64, which as
new pages of the system cost more than the arithmetic. So it is given gx instead of the input,
behind an identity for W_ih; then the gradient of its input is that of gx, and all it needs is 13
MB. Kept for backward are gx and h. Backward runs the steps again, a segment at a time, to have what
oneDNN keeps for it; a segment's needs stay below what malloc takes from the system anew.

Timed once beside the loop in a prototype (two cores, T = 100, forward and backward), it took 0.3 of
the loop's time at H = 16, B = 1, 0.5 at B = 16, 0.8 at B = 64, and at H = 32 0.7 (B = 16) and 1.1
(B = 64).

Axes: T time, B batch, H hidden, D directions, R = T*B rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .gemm import uses_onednn
from .grads import Recurrent
from .kernels.rows import Rows
from .kernels.spec import Weights

#: Up to this H, whatever B: the identity makes gx a product of 4H columns more.
MOST = 32
#: Numbers of gx in one segment, for each of which oneDNN keeps 8: 16 MiB. malloc asks the system
#: for everything beyond 32 MiB.
SEGMENT = 1 << 19
_LSTM = 2  # oneDNN's number for the cell


def takes(request: Any) -> bool:
    """Whether the backend torch leaves a ``dispatch.Request`` to oneDNN's steps: dense ones of a
    small fp32 LSTM without a projection of h, whose states nobody wants of every step."""
    is_ragged = request.packed or request.lengths or request.reset
    return (
        request.cell == "lstm"
        and request.hidden_size <= MOST
        and request.dtype == torch.float32
        and request.device.type == "cpu"
        and not (is_ragged or request.states or request.proj_size)
        and uses_onednn()
    )


@lru_cache
def _nothing_to_do(columns: int) -> tuple[Tensor, Tensor]:
    """W_ih and both biases for an input that is gx; kept, for they take 40 us to make."""
    # Of this dtype and device, whatever the defaults are by now.
    identity = torch.eye(columns, dtype=torch.float32, device="cpu")
    return identity, identity.new_zeros(columns)


class _Steps:
    """One direction of a layer, whose steps oneDNN runs some at a time."""

    def __init__(self, gx: Tensor, w: Weights, d: int, rows: Rows) -> None:
        self.H, self.d = w.w_hh.shape[1], d
        self.gx = gx.view(rows.T, rows.B, 4 * self.H)
        identity, none = _nothing_to_do(4 * self.H)
        self.weights = identity, w.w_hh, none, none

    def segments(self) -> list[slice]:
        """Steps, in the order of the direction."""
        T = len(self.gx)
        each = max(SEGMENT // max(self.gx[0].numel(), 1), 1) if T else 1
        found = [slice(start, min(start + each, T)) for start in range(0, T, each)]
        return found if self.d == 0 else found[::-1]

    def forward(self, steps: slice, h: Tensor, c: Tensor, trains: bool) -> Sequence[Tensor]:
        """h of every step ``[t, B, H]``, h_n and c_n ``[B, H]``, and what oneDNN keeps."""
        sizes = self.H, 1, True, False, False, trains  # layers, biases, both ways, batch_first
        # Without gradients torch keeps nothing, whatever it is told; no graph is made below
        # autograd.
        with torch.set_grad_enabled(trains):
            return torch.ops.aten.mkldnn_rnn_layer(
                self.gx[steps], *self.weights, h, c, self.d == 1, [], _LSTM, *sizes
            )

    def backward(
        self, steps: slice, h: Tensor, c: Tensor, d_out: Tensor | None, d_h: Tensor, d_c: Tensor
    ) -> Sequence[Tensor]:
        """Of d_h and d_c after some steps: those before them, d_gx ``[t, B, 4*H]``, dW_hh, db."""
        out, h_n, c_n, kept = self.forward(steps, h, c, True)
        sizes = _LSTM, self.H, 1, True, True, False  # layers, biases, training, both ways
        states, grads = (h, c, out, h_n, c_n), (d_out, d_h, d_c)
        d_gx, _, dw_hh, db, _, d_h, d_c = torch.ops.aten.mkldnn_rnn_layer_backward(
            self.gx[steps], *self.weights, *states, *grads, self.d == 1, *sizes, [], False, kept
        )
        return d_h, d_c, d_gx, dw_hh, db


def _directions(
    gx: Tensor, weights: Sequence[Weights], rows: Rows, *outs: Tensor | None
) -> Iterator[tuple[int, _Steps, list[Tensor | None]]]:
    """Each direction's number, steps, and of ``[R, D*H]`` its columns ``[T, B, H]``."""
    for d, w in enumerate(weights):
        H = w.w_hh.shape[1]
        shape = rows.T, rows.B, len(weights) * H
        columns = [
            None if out is None else out.view(*shape)[..., d * H : (d + 1) * H] for out in outs
        ]
        yield d, _Steps(gx[d], w, d, rows), columns


def lstm_forward(
    gx: Tensor,
    weights: Sequence[Weights],
    h_0: Tensor,
    c_0: Tensor,
    out: Tensor,
    h_n: Tensor,
    c_n: Tensor,
    rows: Rows,
) -> None:
    """One layer: fills ``out [R, D*H]``, h_n and c_n.

    gx: ``x W_ih^T + b_ih + b_hh``, ``[D, R, 4*H]``; h_0 and the other states ``[D, B, H]``.
    """
    with torch._C._AutoDispatchBelowAutograd():
        for d, layer, (hs,) in _directions(gx, weights, rows, out):
            assert hs is not None
            h, c = h_0[d].contiguous(), c_0[d].contiguous()
            for steps in layer.segments() if hs.numel() else ():
                left, h, c, _ = layer.forward(steps, h, c, False)
                hs[steps] = left
            h_n[d], c_n[d] = h, c


def lstm_backward(
    d_out: Tensor | None,
    d_h_n: Tensor,
    d_c_n: Tensor,
    weights: Sequence[Weights],
    h_0: Tensor,
    c_0: Tensor,
    out: Tensor,
    gx: Tensor,
    dgates: Tensor,
    d_h_0: Tensor,
    d_c_0: Tensor,
    rows: Rows,
) -> list[Recurrent]:
    """One layer backwards: fills dgates ``[D, R, 4*H]``, d_h_0 and d_c_0, and returns what else it
    has found of each direction; the rest as forward."""
    found = []
    with torch._C._AutoDispatchBelowAutograd():
        for d, layer, (hs, d_hs) in _directions(gx, weights, rows, out, d_out):
            assert hs is not None
            grads, segments = dgates[d].view(layer.gx.shape), layer.segments()
            d_h, d_c = d_h_n[d], d_c_n[d]
            total: list[Tensor] = []
            first = h_0[d].contiguous(), c_0[d].contiguous()
            entering = _entering(layer, segments, hs, *first) if hs.numel() else ()
            for steps, h, c in reversed(list(entering)):
                given = None if d_hs is None else d_hs[steps].contiguous()
                d_h, d_c, grads[steps], *sums = layer.backward(steps, h, c, given, d_h, d_c)
                total = [a + b for a, b in zip(total, sums, strict=True)] if total else sums
            d_h_0[d], d_c_0[d] = d_h, d_c
            w_hh = weights[d].w_hh
            found.append(Recurrent(*(total or (torch.zeros_like(w_hh), w_hh.new_zeros(len(w_hh))))))
    return found


def _entering(
    layer: _Steps, segments: Sequence[slice], hs: Tensor, h: Tensor, c: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Each segment with the states that enter it. c was not kept: steps run again but the last."""
    for steps in segments:
        yield steps, h, c
        if steps is not segments[-1]:
            c = layer.forward(steps, h, c, False)[2]
            h = hs[steps.stop - 1 if layer.d == 0 else steps.start].contiguous()
