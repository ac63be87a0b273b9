"""The gradient that reaches back over 10 to 100 steps, in RNN, LSTM and GRU.

One step back multiplies the gradient by dh_t/dh_{t-1}: in an RNN by W_hh and the slope of tanh, in
an LSTM along c by the forget gate, in a GRU mainly by the update gate (Bengio et al., 1994;
Jozefowicz et al., 2015, on the bias of the forget gate).
"""

from argparse import Namespace
from typing import Any

import torch
from torch import nn

import fusedrnn

from ..models import final_hidden, remember
from . import COLOURS, Result

LOOK_AT = "the two open gates: as torch initialises them, LSTM and GRU forget too, only later."
I, H, B = 8, 32, 16
STARTS = "RNN", "LSTM", "GRU", "LSTM, f open", "GRU, z open"


def gradient_norms(rnn: nn.RNNBase, T: int, seed: int) -> list[float]:
    """Returns ``|d loss / d x_t|`` for t = 1 to T and a loss that is linear in h_T."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, B, I, generator=generator).requires_grad_()
    direction = torch.randn(H, generator=generator)
    loss = (final_hidden(rnn(x))[-1] @ direction).sum()
    (dx,) = torch.autograd.grad(loss, x)
    return dx.double().norm(dim=-1).mean(1).tolist()


def run(options: Namespace) -> Result:
    lengths = (10, 30) if options.quick else (10, 30, 50, 100)
    lines = ["|d loss_T / d x_1| divided by |d loss_T / d x_T|"]
    lines.append(f"{'':<14}" + "".join(f"{f'T={T}':>10}" for T in lengths))
    curves = {}
    for name in STARTS:
        torch.manual_seed(options.seed)
        cell, is_open = name.partition(",")[0], name.endswith("open")
        rnn = getattr(fusedrnn, cell)(I, H)
        if is_open:
            remember(rnn)
        norms = {T: gradient_norms(rnn, T, options.seed) for T in lengths}
        ratios = "".join(f"{norms[T][0] / norms[T][-1]:>10.1e}" for T in lengths)
        lines.append(f"{name:<14}{ratios}")
        curves[name] = norms[lengths[-1]], COLOURS[cell.lower()], "-" if is_open else "--"

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for name, (norms, colour, style) in curves.items():
            relative = [norm / norms[-1] for norm in norms]
            axis.semilogy(range(1, len(norms) + 1), relative, style, color=colour, label=name)
        axis.set_xlabel("t")
        axis.set_ylabel("|d loss_T / d x_t|, relative to t = T")
        axis.legend(fontsize=8)

    return lines, draw
