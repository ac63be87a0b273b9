"""What peers that need a GPU compute, in plain torch: equations, axes and gates as they document.

Written from haste_pytorch's and flashrnn's documentation and torchrl's docstrings, not from our
adapters: an adapter with another order of gates, or a transposed matrix, does not agree with them.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch
from torch import nn


class HasteRNN(nn.Module):
    """haste_pytorch: ``kernel [I, G H]``, ``recurrent_kernel [H, G H]``; states ``[1, B, H]``."""

    gates = 0
    built = 0

    def __init__(self, input_size, hidden_size, batch_first=False):
        super().__init__()
        assert batch_first
        type(self).built += 1
        self.modes = []
        width = self.gates * hidden_size
        self.kernel = nn.Parameter(torch.randn(input_size, width))
        self.recurrent_kernel = nn.Parameter(torch.randn(hidden_size, width))
        self.bias = nn.Parameter(torch.randn(width))


class HasteLSTM(HasteRNN):
    """Gates i, g, f, o; one bias."""

    gates = 4

    def forward(self, input, state):
        self.modes.append(self.training)
        (h,), (c,) = state
        outputs = []
        for x in input.unbind(1):
            v = x @ self.kernel + h @ self.recurrent_kernel + self.bias
            i, g, f, o = v.chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs, 1), (h[None], c[None])


class HasteGRU(HasteRNN):
    """Gates z, r, h; the reset gate is applied behind the product, which has a bias of its own."""

    gates = 3

    def __init__(self, input_size, hidden_size, batch_first=False):
        super().__init__(input_size, hidden_size, batch_first)
        self.recurrent_bias = nn.Parameter(torch.randn(3 * hidden_size))

    def forward(self, input, state):
        self.modes.append(self.training)
        (h,) = state
        outputs = []
        for x in input.unbind(1):
            z, r, n = (x @ self.kernel + self.bias).chunk(3, 1)
            z_h, r_h, n_h = (h @ self.recurrent_kernel + self.recurrent_bias).chunk(3, 1)
            z = (z + z_h).sigmoid()
            h = z * h + (1 - z) * (n + (r + r_h).sigmoid() * n_h).tanh()
            outputs.append(h)
        return torch.stack(outputs, 1), h[None]


def flashrnn(Wx, R, b, states=None, function="lstm", backend="cuda_fused", dtype="bfloat16"):  # noqa: N803
    """Wx ``[B, T, G, N, D]``, R ``[G, N, D, P]`` from P to D, b ``[G, N, D]``, ``[S, B, 1, N, D]``.

    Of N heads. LSTM: gates i, f, z, o. GRU: R has g, r, z, Wx has r, z, n, and b all four.
    """
    assert backend == "cuda_fused"
    assert dtype == str(Wx.dtype).removeprefix("torch.")
    now = list(states[:, :, 0])
    steps = []
    for w in Wx.unbind(1):
        recurrent = torch.einsum("gndp,bnp->gbnd", R, now[0])
        w = w.movedim(1, 0)
        if function == "lstm":
            i, f, z, o = w + recurrent + b[:, None]
            now[1] = f.sigmoid() * now[1] + i.sigmoid() * z.tanh()
            now[0] = o.sigmoid() * now[1].tanh()
        else:
            g, r, z = recurrent + b[:3, None]
            z = (w[1] + z).sigmoid()
            n = w[2] + b[3] + (w[0] + r).sigmoid() * g
            now[0] = z * now[0] + (1 - z) * n.tanh()
        steps.append(torch.stack(now))
    return torch.stack(steps, 2), steps[-1].unsqueeze(2)


def _torchrl(mode, x, given, weights, is_init):
    """torch's weights; states ``[B, T, H]``, of which the first is initial. No resets here."""
    assert is_init.shape == x.shape[:2]
    assert not is_init.any()
    rnn = getattr(nn, mode)(x.shape[2], given[0].shape[2], batch_first=True)
    hx = tuple(states[None, :, 0].contiguous() for states in given)
    names = [name for name, _ in rnn.named_parameters()]
    arguments = x, hx if mode == "LSTM" else hx[0]
    output, final = torch.func.functional_call(rnn, dict(zip(names, weights)), arguments)  # noqa: B905
    return output, [state[0] for state in (final if mode == "LSTM" else (final,))]


def lstm_triton(x, hidden, cell, w_ih, w_hh, b_ih, b_hh, is_init, *, input_precision=None):
    """Output, cells of every step (not read by ours), and the final h and c."""
    weights = w_ih, w_hh, b_ih, b_hh
    output, final = _torchrl("LSTM", x, (hidden, cell), weights, is_init)
    return output, torch.full_like(output, float("nan")), *final


def gru_triton(x, hidden, w_ih, w_hh, b_ih, b_hh, is_init, *, input_precision=None):
    """Output and the final h."""
    output, final = _torchrl("GRU", x, (hidden,), (w_ih, w_hh, b_ih, b_hh), is_init)
    return output, *final


def _module(name: str, **contents) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(contents)
    return module


def install(monkeypatch) -> None:
    """Puts them where ``import`` finds them, for one test."""
    kernels = _module("_rnn_triton", lstm_triton=lstm_triton, gru_triton=gru_triton)
    inner = "torchrl.modules.tensordict_module"
    for name, module in {
        "haste_pytorch": _module("haste_pytorch", LSTM=HasteLSTM, GRU=HasteGRU),
        "flashrnn": _module("flashrnn", flashrnn=flashrnn),
        "torchrl": _module("torchrl"),
        "torchrl.modules": _module("torchrl.modules"),
        inner: _module(inner, _rnn_triton=kernels),
        f"{inner}._rnn_triton": kernels,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    for rnn_class in (HasteLSTM, HasteGRU):
        monkeypatch.setattr(rnn_class, "built", 0)
