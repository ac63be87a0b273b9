"""Sequences of unequal length: padding changes the result, packing and lengths= do not."""

from argparse import Namespace

import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn

from ..models import final_hidden
from . import Result

LOOK_AT = "h_n of the padded input: zeros are inputs like others; the state goes on through them."


@torch.no_grad()
def run(options: Namespace) -> Result:
    T, B, I, H = 50, 8, 16, 32
    torch.manual_seed(options.seed)
    rnn = fusedrnn.GRU(I, H, bidirectional=True)
    lengths = torch.randint(1, T + 1, (B,))
    lengths[0] = T
    x = torch.randn(T, B, I)
    x[torch.arange(T).unsqueeze(1) >= lengths] = 0.0  # padding, [T, B]
    # The truth: every sequence by itself.
    alone = [final_hidden(rnn(x[:length, b])) for b, length in enumerate(lengths.tolist())]
    truth = torch.stack(alone, 1)  # [directions, B, H]
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    ways = {
        "padded": (rnn(x), T * B),
        "PackedSequence": (rnn(packed), int(lengths.sum())),
        "lengths=": (rnn(x, lengths=lengths), int(lengths.sum())),
    }
    lines = [
        f"bidirectional GRU, lengths {', '.join(map(str, lengths.tolist()))}",
        f"{'input':<16}{'steps':>7}{'h_n forward':>14}{'h_n backward':>14}   largest error",
    ]
    for name, (result, steps) in ways.items():
        forward, backward = (final_hidden(result) - truth).abs().amax((1, 2)).tolist()
        lines.append(f"{name:<16}{steps:>7}{forward:>14.1e}{backward:>14.1e}")
    return lines, None
