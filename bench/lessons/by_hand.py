"""An LSTM written by hand, equal to the module."""

from argparse import Namespace

import torch
from torch import Tensor

import fusedrnn

from . import Result

LOOK_AT = (
    "lstm_step in bench/lessons/by_hand.py: c is multiplied by f and added to, so it can last."
)


def lstm_step(
    x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
) -> tuple[Tensor, ...]:
    """Computes one step for x ``[B, I]``; returns the gates i, f, g, o and the new h and c.

    The equations are those of ``torch.nn.LSTM`` (Hochreiter and Schmidhuber, 1997; Gers et al.,
    2000): the gates are four blocks of H rows in one product.
    """
    i, f, g, o = (x @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, dim=-1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * c + i * g
    h = o * c.tanh()
    return i, f, g, o, h, c


@torch.no_grad()
def run(options: Namespace) -> Result:
    T, B, I, H = 5 if options.quick else 100, 4, 8, 32
    torch.manual_seed(options.seed)
    module = fusedrnn.LSTM(I, H)
    x = torch.randn(T, B, I)
    output, _ = module(x)
    h, c = torch.zeros(B, H), torch.zeros(B, H)
    heads = "".join(f"{name:>8}" for name in ("i", "f", "g", "o", "c", "h", "module"))
    lines = [f"unit 0 of sequence 0; LSTM I={I} H={H}", f"step{heads}"]
    largest = 0.0
    for t in range(T):
        i, f, g, o, h, c = lstm_step(x[t], h, c, *module.parameters())
        largest = max(largest, (h - output[t]).abs().max().item())
        if t < 4:
            values = (tensor[0, 0].item() for tensor in (i, f, g, o, c, h, output[t]))
            lines.append(f"{t + 1:>4}" + "".join(f"{value:>8.4f}" for value in values))
    lines.append(f"largest difference from the module in {T} steps: {largest:.0e}")
    return lines, None
