"""What the gates of a small LSTM do while it follows a sine.

Eight units are trained for a few seconds to say the next value; then twenty values of the sine run
through them, and ``module.states(..., gates=True)`` says what every gate did at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fusedrnn

from ..series import sine, windows
from .lesson import Lesson, Numbers, Setting, backend_of

T, H = 20, 8
#: Of ten periods: one takes as many values as are watched.
POINTS = 10 * T
#: The three gates of the picture; g, the candidate, is no gate but what i lets in.
GATES = {"i": "input gate", "f": "forget gate", "o": "output gate"}
#: Of c computed from the gates against c itself, both fp32; measured 1.8e-7.
TOLERANCE = 1e-5


def fit(seed: int, steps: int) -> tuple[fusedrnn.LSTM, nn.Linear, list[float]]:
    """An LSTM and a readout that say the next value of the sine at every step; and the losses."""
    torch.manual_seed(seed)
    rnn, fc = fusedrnn.LSTM(1, H), nn.Linear(H, 1)
    series = windows(sine(POINTS), T + 1).inputs.transpose(0, 1)  # [T + 1, windows, 1]
    optimiser = torch.optim.Adam([*rnn.parameters(), *fc.parameters()], lr=2e-2)
    losses = []
    for _ in range(steps):
        rows = torch.randint(series.shape[1], (32,))
        batch = series[:, rows]
        optimiser.zero_grad()
        loss = nn.functional.mse_loss(fc(rnn(batch[:-1])[0]), batch[1:])
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return rnn, fc, torch.stack(losses).tolist()


@torch.no_grad()
def watch(rnn: Any, fc: nn.Linear, values: Tensor) -> dict[str, Any]:
    """What the LSTM does with ``values [T]``: numbers for JSON, each gate ``[T, H]``.

    ``residual`` is the largest difference between the cell state and the one that the gates make,
    ``f c + i g``: the gates are those of this run, or it is not small.
    """
    states = rnn.states(values.view(-1, 1, 1), gates=True)
    gates = {name: gate[:, 0] for name, gate in states.gates[0][0].items()}
    c = states.c[0][0][:, 0]
    before = torch.cat((torch.zeros_like(c[:1]), c[:-1]))
    made = gates["f"] * before + gates["i"] * gates["g"]
    return {
        "input": values.tolist(),
        "prediction": fc(states.output)[:, 0, 0].tolist(),
        "gates": {name: gates[name].tolist() for name in ("i", "f", "g", "o")},
        "c": c.tolist(),
        "h": states.h[0][0][:, 0].tolist(),
        "residual": (made - c).abs().max().item(),
    }


def measure(setting: Setting) -> Numbers:
    rnn, fc, losses = fit(setting.seed, steps=5 if setting.quick else 600)
    series = sine(POINTS)[: T + 1].float()
    return {
        "backends": {"training": backend_of(rnn, torch.zeros(T, 32, 1))},
        "hidden_size": H,
        "steps": len(losses),
        "first_loss": losses[0],
        "final_loss": losses[-1],
        "target": series[1:].tolist(),
        **watch(rnn, fc, series[:-1]),
    }


def table(numbers: Numbers) -> Iterator[str]:
    first, final = numbers["first_loss"], numbers["final_loss"]
    yield f"LSTM H={H}, {numbers['steps']} steps: mean square {first:.4f}, then {final:.1e}"
    for name, title in GATES.items():
        gate = torch.tensor(numbers["gates"][name])
        swing = gate.amax(0) - gate.amin(0)
        yield (
            f"{title:<12} {gate.min():.2f} to {gate.max():.2f}, mean {gate.mean():.2f}; "
            f"unit {int(swing.argmax())} moves most, by {swing.max():.2f}"
        )


def draw(figure: Any, numbers: Numbers) -> None:
    """The sine on top, a panel for each gate below."""
    figure.set_size_inches(7, 8)
    steps = range(1, len(numbers["input"]) + 1)
    top, *panels = figure.subplots(1 + len(GATES), sharex=True, height_ratios=(1, 2, 2, 2))
    top.plot(steps, numbers["input"], color="#555555", marker=".", label="input")
    top.plot(steps, numbers["target"], color="#555555", ls=":", label="next value")
    top.plot(steps, numbers["prediction"], color="#d1495b", label="predicted")
    top.legend(fontsize=7)
    for axis, (name, title) in zip(panels, GATES.items(), strict=True):
        for unit, line in enumerate(zip(*numbers["gates"][name], strict=True)):
            axis.plot(steps, line, label=f"unit {unit}")
        axis.set_ylim(-0.03, 1.03)
        axis.set_title(title, fontsize=9)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7
    )
    panels[-1].set_xticks(list(steps)[::2])
    panels[-1].set_xlabel("step")


def fault(numbers: Numbers) -> str:
    """The gates must make the cell state."""
    residual = numbers["residual"]
    return "" if residual <= TOLERANCE else f"f c + i g is {residual:.1e} from c"


LESSON = Lesson(
    "the gates of an LSTM over time, while it follows a sine", measure, table, draw, fault
)
