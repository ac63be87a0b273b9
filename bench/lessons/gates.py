"""The gates of an LSTM over time, while it follows a sine."""

from argparse import Namespace
from typing import Any

import torch
from torch import Tensor, nn

import fusedrnn

from ..data import sine, windows
from . import Result

LOOK_AT = (
    "module.states(x, gates=True), which returns them; a sine needs little memory: f stays low."
)
T, H = 20, 8
GATES = {"i": "input gate", "f": "forget gate", "o": "output gate"}


def fit(seed: int, steps: int) -> tuple[fusedrnn.LSTM, nn.Linear, list[float]]:
    """Trains an LSTM and a readout to give the next value of a sine at every step."""
    torch.manual_seed(seed)
    rnn, fc = fusedrnn.LSTM(1, H), nn.Linear(H, 1)
    series = windows(sine(10 * T), T + 1)[0].transpose(0, 1)  # [T + 1, windows, 1]
    optimiser = torch.optim.Adam([*rnn.parameters(), *fc.parameters()], lr=2e-2)
    losses = []
    for _ in range(steps):
        batch = series[:, torch.randint(series.shape[1], (32,))]
        loss = nn.functional.mse_loss(fc(rnn(batch[:-1])[0]), batch[1:])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return rnn, fc, losses


@torch.no_grad()
def run(options: Namespace) -> Result:
    with torch.enable_grad():
        rnn, fc, losses = fit(options.seed, steps=5 if options.quick else 600)
    values = sine(10 * T)[: T + 1].float()
    states = rnn.states(values[:-1].view(T, 1, 1), gates=True)
    assert states.gates is not None
    gates = {name: gate[:, 0] for name, gate in states.gates[0][0].items()}  # each [T, H]
    predicted = fc(states.output)[:, 0, 0]
    lines = [f"LSTM H={H}, {len(losses)} steps: mean square {losses[0]:.4f}, then {losses[-1]:.1e}"]
    for name, title in GATES.items():
        gate = gates[name]
        swing = gate.amax(0) - gate.amin(0)
        lines.append(
            f"{title:<12} {gate.min():.2f} to {gate.max():.2f}, mean {gate.mean():.2f}; "
            f"unit {int(swing.argmax())} moves most, by {swing.max():.2f}"
        )
    return lines, lambda figure: draw(figure, values, predicted, gates)


def draw(figure: Any, values: Tensor, predicted: Tensor, gates: dict[str, Tensor]) -> None:
    """Draws the sine on top, and a panel for each gate below."""
    figure.set_size_inches(7, 7)
    steps = range(1, T + 1)
    top, *panels = figure.subplots(1 + len(GATES), sharex=True)
    top.plot(steps, values[1:], color="#555555", ls=":", label="next value")
    top.plot(steps, predicted, color="#d1495b", label="predicted")
    top.legend(fontsize=7)
    for axis, (name, title) in zip(panels, GATES.items(), strict=True):
        axis.plot(steps, gates[name])
        axis.set_ylim(-0.03, 1.03)
        axis.set_title(f"{title}, {H} units", fontsize=9)
    panels[-1].set_xlabel("step")
