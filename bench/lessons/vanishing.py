"""How much of the gradient at the last step arrives at the first.

The loss is a random linear function of h_T. A step back multiplies its gradient by dh_t/dh_{t-1}:
in an RNN by W_hh and the slope of tanh, in an LSTM along c by the forget gate f alone, in a GRU
mainly by z. As torch initialises them f and z are near 1/2, so LSTM and GRU forget as well; it is
an open gate (``models.remember``) that carries the gradient. Bengio et al., "Learning long-term
dependencies with gradient descent is difficult", 1994; Jozefowicz et al., "An empirical exploration
of recurrent network architectures", 2015 (the bias of f).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import fusedrnn

from ..models import final_hidden, remember
from .lesson import COLOURS, DEVICE, Lesson, Numbers, Setting, backend_of

I, H, B = 8, 32, 16
LENGTHS = (10, 30, 50, 100)
#: The name of a curve, its cell, and whether its gate begins open.
STARTS = (
    ("RNN", "rnn", False),
    ("LSTM", "lstm", False),
    ("GRU", "gru", False),
    ("LSTM f open", "lstm", True),
    ("GRU z open", "gru", True),
)


def gradient_norms(rnn: nn.RNNBase, T: int, seed: int) -> list[float]:
    """``|d loss_T / d x_t|`` for t = 1 to T: the norm over I, averaged over B random sequences."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, B, I, generator=generator).to(DEVICE).requires_grad_()
    direction = torch.randn(H, generator=generator).to(DEVICE)
    loss = (final_hidden(rnn(x))[-1] @ direction).sum()
    (dx,) = torch.autograd.grad(loss, x)
    return dx.double().norm(dim=-1).mean(1).tolist()


def measure(setting: Setting) -> Numbers:
    lengths = LENGTHS[:2] if setting.quick else LENGTHS
    norms: dict[str, dict[str, list[float]]] = {}
    backends = {}
    for name, cell, is_open in STARTS:
        torch.manual_seed(setting.seed)
        rnn = getattr(fusedrnn, cell.upper())(I, H).to(DEVICE)
        if is_open:
            remember(rnn)
        norms[name] = {str(T): gradient_norms(rnn, T, setting.seed) for T in lengths}
        example = torch.zeros(lengths[-1], B, I, device=DEVICE, requires_grad=True)
        backends[name] = backend_of(rnn, example)
    # Of the first step against the last: what the first input still counts.
    ratios = {name: {T: n[0] / n[-1] for T, n in of.items()} for name, of in norms.items()}
    return {"backends": backends, "lengths": list(lengths), "norms": norms, "ratios": ratios}


def table(numbers: Numbers) -> Iterator[str]:
    yield "|d loss_T / d x_1| as a part of |d loss_T / d x_T|"
    yield f"{'':<14}" + "".join(f"{f'T={T}':>10}" for T in numbers["lengths"])
    for name, ratios in numbers["ratios"].items():
        yield f"{name:<14}" + "".join(f"{ratio:>10.1e}" for ratio in ratios.values())


def draw(figure: Any, numbers: Numbers) -> None:
    """A panel for each T: the norms over t, as parts of the last."""
    panels = figure.subplots(1, len(numbers["lengths"]), sharey=True, squeeze=False)[0]
    for axis, T in zip(panels, numbers["lengths"], strict=True):
        for name, cell, is_open in STARTS:
            norms = numbers["norms"][name][str(T)]
            relative = [norm / norms[-1] for norm in norms]
            axis.semilogy(
                range(1, T + 1), relative, color=COLOURS[cell], ls="-" if is_open else "--",
                label=name,
            )  # fmt: skip
        axis.set_title(f"T = {T}", fontsize=9)
        axis.set_xlabel("t")
    panels[0].set_ylabel("|d loss_T / d x_t|, of the last 1")
    panels[0].legend(fontsize=7)
    figure.set_size_inches(10, 4)


LESSON = Lesson(
    "the gradient that reaches back over 10 to 100 steps, in RNN, LSTM and GRU",
    measure,
    table,
    draw,
)
