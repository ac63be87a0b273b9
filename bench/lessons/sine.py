"""A sine: training curves of RNN, LSTM and GRU, and the gates of the LSTM over time."""

from argparse import Namespace
from typing import Any

import torch
from torch import Tensor

from ..cases import SINE
from ..models import Examples, Model, examples_of
from . import CELLS, COLOURS, Result, fit

LOOK_AT = "the order at the start and at the end, and what becomes of forecasts that are fed back."
GATES = {"i": "input gate", "f": "forget gate", "o": "output gate"}


@torch.no_grad()
def fed_back(model: Model, examples: Examples) -> Tensor:
    """Forecasts the test part from its first window alone: each forecast enters the window."""
    batch, made = examples.batch(torch.tensor([examples.known])), []
    for _ in examples.targets[examples.known :]:
        made.append(model(batch))
        window = torch.cat((batch.inputs[:, 1:], made[-1].view(1, 1, 1)), 1)
        batch = batch._replace(inputs=window)
    return torch.cat(made)


def run(options: Namespace) -> Result:
    workload = next(workload for workload in SINE if workload.T == 50)
    heads = ("first loss", "final loss", "below 0.01", "test RMSE", "fed back")
    lines = [f"{'T=50':<6}" + "".join(f"{head:>12}" for head in heads)]
    examples = examples_of(workload, None, options.seed)
    truth = examples.targets[examples.known :]
    curves, fits = {}, dict[str, Any]()
    for cell in CELLS:
        model, training = fits[cell] = fit(cell, workload, examples, options)
        losses, curves[cell] = training.losses, fed_back(model, examples)
        error = (curves[cell] - truth).square().mean().sqrt()
        below = next((f"step {n}" for n, loss in enumerate(losses, 1) if loss < 0.01), "never")
        row = f"{losses[0]:>12.4f}{training.final_loss:>12.1e}{below:>12}{training.metric:>12.4f}"
        lines.append(f"{cell.upper():<6}{row}{error:>12.4f}")
    states = fits["lstm"][0].rnn.states(examples.inputs[:1], gates=True)
    gates = {name: states.gates[0][0][name].detach().squeeze() for name in GATES}  # each [T, H]
    for name, gate in gates.items():
        unit, swing = max(enumerate(gate.amax(0) - gate.amin(0)), key=lambda pair: pair[1])
        reach = f"{gate.min():.2f} to {gate.max():.2f}, mean {gate.mean():.2f}"
        lines.append(f"{GATES[name]:<12} {reach}; unit {unit} moves most, by {swing:.2f}")

    def draw(figure: Any) -> None:
        figure.set_size_inches(7, 8)
        top, below, *panels = figure.subplots(2 + len(GATES))
        for cell, colour in COLOURS.items():
            top.semilogy(fits[cell][1].losses, color=colour, lw=1, label=cell.upper())
            below.plot(curves[cell], color=colour, lw=1)
        below.plot(truth, ":", color="#555555")
        top.set_title("mean square error of each training step", fontsize=9)
        below.set_title("forecasts that are fed back; dotted: the sine", fontsize=9)
        top.legend(fontsize=7)
        for axis, (name, gate) in zip(panels, gates.items(), strict=True):
            axis.plot(range(1, workload.T + 1), gate[:, :8])
            axis.plot(range(1, workload.T + 1), examples.inputs[0] / 2 + 0.5, ":", color="#555555")
            axis.set_title(f"{GATES[name]} of the LSTM, 8 units; dotted: the sine", fontsize=9)
        axis.set_xlabel("step of the sequence")

    return lines, draw
