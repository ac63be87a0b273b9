"""An LSTM and the classic GRU written by hand, equal to the modules."""

from argparse import Namespace

import torch
from torch import Tensor

import fusedrnn

from . import Result

LOOK_AT = "lstm_step in by_hand.py: c is multiplied by f and added to, so it can last."
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


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


def gru_step(
    x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
) -> Tensor:
    """Computes one step of the GRU of Cho et al., 2014; returns the new h.

    In ``torch.nn.GRU`` the reset gate comes after the product: n = tanh(x_n + r (W_n h + b_n)).
    """
    (x_r, x_z, x_n), (w_r, w_z, w_n) = (x @ w_ih.T + b_ih).chunk(3, dim=-1), w_hh.chunk(3)
    b_r, b_z, b_n = b_hh.chunk(3)
    r, z = (x_r + h @ w_r.T + b_r).sigmoid(), (x_z + h @ w_z.T + b_z).sigmoid()
    n = (x_n + (r * h) @ w_n.T + b_n).tanh()
    return (1 - z) * n + z * h


def parameters(cell: str, I: int, H: int, layers: int = 1, directions: int = 1) -> int:
    """Returns the sum of G H (I + H + 2) over layers and directions: W_ih, W_hh and two biases.

    A layer above the first has I = D H, because it reads the D directions below it.
    """
    widths = [I, *[directions * H] * (layers - 1)]
    return sum(directions * GATES[cell] * H * (width + H + 2) for width in widths)


@torch.no_grad()
def run(options: Namespace) -> Result:
    T, B, I, H = 5 if options.quick else 100, 4, 8, 32
    torch.manual_seed(options.seed)
    lstm, x = fusedrnn.LSTM(I, H), torch.randn(T, B, I)
    output, largest = lstm(x)[0], 0.0
    h, c = torch.zeros(B, H), torch.zeros(B, H)
    heads = "".join(f"{name:>8}" for name in ("i", "f", "g", "o", "c", "h", "module"))
    lines = [f"unit 0 of sequence 0; LSTM I={I} H={H}", f"step{heads}"]
    for t in range(T):
        i, f, g, o, h, c = lstm_step(x[t], h, c, *lstm.parameters())
        largest = max(largest, (h - output[t]).abs().max().item())
        if t < 4:
            values = (tensor[0, 0].item() for tensor in (i, f, g, o, c, h, output[t]))
            lines.append(f"{t + 1:>4}" + "".join(f"{value:>8.4f}" for value in values))
    lines.append(f"largest difference from the module in {T} steps: {largest:.0e}")
    classic, usual, h = fusedrnn.GRU(I, H, reset_after=False), fusedrnn.GRU(I, H), h * 0
    usual.load_state_dict(classic.state_dict())
    for x_t in x:
        h = gru_step(x_t, h, *classic.parameters())
    for name, gru in (("GRU(reset_after=False)", classic), ("torch's GRU", usual)):
        lines.append(f"the classic GRU differs from {name} by {(gru(x)[1][0] - h).abs().max():.0e}")
    lines += [f"{cell:<4} has G H (I + H + 2) = {parameters(cell, I, H):,}" for cell in GATES]
    return lines, None
