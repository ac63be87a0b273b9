"""``python -m bench gates``: what the gates of a small LSTM do while it follows a sine.

Eight units are trained for a few seconds to say the next value; then twenty values of the sine run
through them, and ``module.states(..., gates=True)`` says what every gate did at every step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fusedrnn

from .series import sine, windows
from .text import folder_for

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


def run(out: Path | None, *, seed: int, quick: bool) -> int:
    """Trains, watches, and leaves gates.json and gates.png in the folder.

    Args:
        out: the folder; None means ``bench/results/local``.
        seed: of weights and batches.
        quick: hardly trained: tests the machinery.

    Returns:
        0, or 1 if the gates do not make the cell state.

    Raises:
        results.FolderError: the folder cannot be written.
    """
    folder = folder_for(out)
    rnn, fc, losses = fit(seed, steps=5 if quick else 600)
    series = sine(POINTS)[: T + 1].float()
    seen = watch(rnn, fc, series[:-1])
    seen |= {"target": series[1:].tolist(), "first_loss": losses[0], "final_loss": losses[-1]}
    seen |= {"seed": seed, "steps": len(losses), "hidden_size": H}
    (folder / "gates.json").write_text(json.dumps(seen, indent=1) + "\n")
    print(f"LSTM H={H}, {len(losses)} steps: mean square {losses[0]:.4f}, then {losses[-1]:.1e}")
    for name, title in GATES.items():
        gate = torch.tensor(seen["gates"][name])
        swing = gate.amax(0) - gate.amin(0)
        print(
            f"{title:<12} {gate.min():.2f} to {gate.max():.2f}, mean {gate.mean():.2f}; "
            f"unit {int(swing.argmax())} moves most, by {swing.max():.2f}"
        )
    print(draw(folder))
    if not seen["residual"] <= TOLERANCE:
        print(f"f c + i g is {seen['residual']:.1e} from c", file=sys.stderr)
        return 1
    return 0


def draw(folder: Path) -> str:
    """Writes gates.png from gates.json: the sine on top, a panel for each gate below."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"JSON in {folder} (no picture: matplotlib is not installed)"
    seen = json.loads((folder / "gates.json").read_text())
    steps = range(1, len(seen["input"]) + 1)
    figure = Figure(figsize=(7, 8), layout="constrained")
    top, *panels = figure.subplots(1 + len(GATES), sharex=True, height_ratios=(1, 2, 2, 2))
    top.plot(steps, seen["input"], color="#555555", marker=".", label="input")
    top.plot(steps, seen["target"], color="#555555", ls=":", label="next value")
    top.plot(steps, seen["prediction"], color="#d1495b", label="predicted")
    top.legend(fontsize=7)
    for axis, (name, title) in zip(panels, GATES.items(), strict=True):
        for unit, line in enumerate(zip(*seen["gates"][name], strict=True)):
            axis.plot(steps, line, label=f"unit {unit}")
        axis.set_ylim(-0.03, 1.03)
        axis.set_title(title, fontsize=9)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7
    )
    panels[-1].set_xticks(list(steps)[::2])
    panels[-1].set_xlabel("step")
    figure.savefig(folder / "gates.png", dpi=110)
    return f"JSON and PNG in {folder}"
