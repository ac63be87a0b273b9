"""torch.nn's module for each cell, and random inputs of it."""

import torch
from torch import Tensor, nn

from bench.lessons.by_hand import gru_step
from fusedrnn.kernels.spec import SPECS

CELLS = tuple(SPECS)


class LoopGRU(nn.GRU):
    """The textbook's GRU, stepwise and differentiable, since torch has no operator for it."""

    def forward(self, input, hx):
        finals, names = [], ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        for layer in range(self.num_layers):
            outputs = []
            for d in range(1 + self.bidirectional):
                suffix = f"_l{layer}" + ("_reverse" if d else "")
                weights = [getattr(self, name + suffix) for name in names[: 4 if self.bias else 2]]
                weights += [input.new_zeros(3 * self.hidden_size)] * (4 - len(weights))
                h, hs = hx[len(finals)], []
                for x in input.flip(0) if d else input:
                    h = gru_step(x, h, *weights)
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


def make_inputs(cell, T, B, I, H, layers=1, directions=1, dtype=torch.float32):
    """x, hx and cotangents of output and final states, all random."""
    rows, states = layers * directions, SPECS[cell].states

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    x = randn(T, B, I)
    hx = tuple(randn(rows, B, H) for _ in range(states))
    cotangents = [randn(T, B, directions * H)]
    cotangents += [randn(rows, B, H) for _ in range(states)]
    return x, hx if states == 2 else hx[0], cotangents


def double(tree):
    return tree.double().cpu() if isinstance(tree, Tensor) else type(tree)(map(double, tree))
