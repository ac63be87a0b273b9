"""The forward pass of a small LSTM layer on the CPU by oneDNN, with gates for our own backward.

oneDNN runs the steps of a small LSTM faster than any loop of calls can (T = 100, B = 64, H = 16 on
two cores: 0.8 ms, the loop 2.8), but keeps its gates to itself, and its backward is slow for wide
inputs. So it makes h of every step from gx, which it is given behind an identity for W_ih. Then all
gates are one product and one pass over all steps (0.4 ms), and c is one call a step (0.25 ms).

Axes: T time, B batch, H hidden, R = T*B rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels.spec import Weights
from .steps import Steps

#: Up to this H; the identity makes gx a product of 4H columns more. On two cores with T = 100 it
#: takes 0.5 of the loop's time at H = 16, 0.7 at H = 32, and 1.7 at H = 64 (B = 64).
_MOST = 32
_LSTM = 2  # oneDNN's number for the cell


def takes(s: Steps, w: Weights, gx: Tensor) -> bool:
    """Whether a layer's direction can and should go this way."""
    return (
        s.is_dense
        and gx.dtype == torch.float32
        and gx.device.type == "cpu"
        and w.w_hr is None
        and w.w_hh.shape[1] <= _MOST
        and gx.numel() > 0
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )


def lstm_forward(
    s: Steps, w: Weights, gates: Tensor, h_0: Tensor, c_0: Tensor, hs: Tensor, cs: Tensor
) -> None:
    """Fills ``hs [R, H]`` and ``cs [R, H]``, and turns gx ``[R, 4*H]`` into gates where it lies.

    gx has the sum of both biases; h_0 and c_0 are ``[B, H]``.
    """
    (B, H), is_reverse = h_0.shape, s.d == 1
    none = gates.new_zeros(4 * H)  # b_ih and b_hh
    gx, identity = gates.view(s.T, B, 4 * H), torch.eye(4 * H, dtype=gates.dtype, device="cpu")
    sizes = H, 1, True, False, False, False  # layers, biases, bidirectional, batch_first, training
    out, *_ = torch.ops.aten.mkldnn_rnn_layer(
        gx, identity, w.w_hh, none, none, h_0, c_0, is_reverse, [], _LSTM, *sizes
    )
    hs.copy_(out.view(-1, H))
    weight, first = w.w_hh.t(), slice(-B, None) if is_reverse else slice(0, B)
    rest, before = (slice(0, -B), slice(B, None)) if is_reverse else (slice(B, None), slice(0, -B))
    gates[first].addmm_(h_0, weight)
    gates[rest].addmm_(hs[before], weight)
    i, f, g, _ = gates.split(H, 1)
    tanh = g.clone(memory_format=torch.contiguous_format).tanh_()  # of one row contiguous() is g
    gates.sigmoid_()
    g.copy_(tanh)
    torch.mul(i, tanh, out=cs)
    left, of_step, c = s.split(cs), s.split(f), c_0
    for t in s.order:
        c = left[t].addcmul_(of_step[t], c)
