"""torch.nn's module for each cell, and random inputs of it."""

import torch
from torch import Tensor, nn

from fusedrnn.kernels.spec import SPECS

CELLS = tuple(SPECS)


class LoopGRU(nn.GRU):
    """The textbook's GRU, stepwise and differentiable, since torch has no operator for it."""

    def forward(self, input, hx):
        finals = []
        for layer in range(self.num_layers):
            outputs = []
            for d in range(1 + self.bidirectional):
                suffix = f"_l{layer}" + ("_reverse" if d else "")
                w_ih, w_hh = (
                    getattr(self, "weight_ih" + suffix),
                    getattr(self, "weight_hh" + suffix),
                )
                b_ih = getattr(self, "bias_ih" + suffix) if self.bias else 0.0
                b_hh = getattr(self, "bias_hh" + suffix) if self.bias else torch.zeros(())
                b_hh = b_hh.expand(w_hh.shape[0])
                w_rz, w_n = w_hh[: -self.hidden_size], w_hh[-self.hidden_size :]
                b_rz, b_n = b_hh[: -self.hidden_size], b_hh[-self.hidden_size :]
                h = hx[len(finals)]
                hs = []
                for x in input.flip(0) if d else input:
                    x_r, x_z, x_n = (x @ w_ih.T + b_ih).chunk(3, -1)
                    h_r, h_z = (h @ w_rz.T + b_rz).chunk(2, -1)
                    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
                    n = torch.tanh(x_n + (r * h) @ w_n.T + b_n)
                    h = (1 - z) * n + z * h
                    hs.append(h)
                finals.append(h)
                outputs.append(torch.stack(hs[::-1] if d else hs))
            input = torch.cat(outputs, -1)
        return input, torch.stack(finals)


def torch_module(cell: str, input_size: int, hidden_size: int, **kwargs) -> nn.RNNBase:
    if cell.startswith("rnn"):
        return nn.RNN(input_size, hidden_size, nonlinearity=cell[4:], **kwargs)
    classes = {"lstm": nn.LSTM, "gru": nn.GRU, "gru_reset_before": LoopGRU}
    return classes[cell](input_size, hidden_size, **kwargs)


def make_inputs(cell, case, *, layers=1, directions=1, dtype=torch.float32, device="cpu"):
    """x, hx and cotangents of output and final states, all random."""
    rows, states = layers * directions, SPECS[cell].states

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(device, dtype)

    x = randn(case.T, case.B, case.I)
    hx = tuple(randn(rows, case.B, case.H) for _ in range(states))
    cotangents = [randn(case.T, case.B, directions * case.H)]
    cotangents += [randn(rows, case.B, case.H) for _ in range(states)]
    return x, hx if states == 2 else hx[0], cotangents


def double(tree):
    return tree.double().cpu() if isinstance(tree, Tensor) else type(tree)(map(double, tree))
