"""A sine: training curves of RNN, LSTM and GRU, and the gates of the LSTM over time."""

from argparse import Namespace
from typing import Any

import torch

from ..cases import SINE
from ..models import Model, examples_of, train
from ..providers import build
from . import CELLS, COLOURS, Result

LOOK_AT = "the order at the start and at the end; rnn.states(x, gates=True) returns every gate."
GATES = {"i": "input gate", "f": "forget gate", "o": "output gate"}


def run(options: Namespace) -> Result:
    workload = next(workload for workload in SINE if workload.T == 50)
    lines = [f"{'T=50':<6}{'first loss':>12}{'final loss':>12}{'test RMSE':>12}{'below 0.01':>12}"]
    examples = examples_of(workload, None, options.seed)
    curves, models = {}, {}
    for cell in CELLS:
        torch.manual_seed(options.seed)
        model = models[cell] = Model(build("fusedrnn", cell, workload), workload)
        steps = 5 if options.quick else 200
        training = train(model, workload, examples, steps, options.seed)
        losses = curves[cell] = training.losses
        below = next((f"step {n}" for n, loss in enumerate(losses, 1) if loss < 0.01), "never")
        row = f"{losses[0]:>12.4f}{training.final_loss:>12.1e}{training.metric:>12.4f}"
        lines.append(f"{cell.upper():<6}{row}{below:>12}")
    with torch.no_grad():
        rnn: Any = models["lstm"].rnn
        states = rnn.states(examples.inputs[:1], gates=True)
    gates = {name: states.gates[0][0][name].squeeze() for name in GATES}  # of each [T, H]
    for name, gate in gates.items():
        unit, swing = max(enumerate(gate.amax(0) - gate.amin(0)), key=lambda pair: pair[1])
        reach = f"{gate.min():.2f} to {gate.max():.2f}, mean {gate.mean():.2f}"
        lines.append(f"{GATES[name]:<12} {reach}; unit {unit} moves most, by {swing:.2f}")

    def draw(figure: Any) -> None:
        figure.set_size_inches(7, 7)
        top, *panels = figure.subplots(1 + len(GATES))
        for cell, losses in curves.items():
            top.semilogy(losses, color=COLOURS[cell], lw=1, label=cell.upper())
        top.set_title("mean square error of each training step", fontsize=9)
        top.legend(fontsize=7)
        for axis, (name, gate) in zip(panels, gates.items(), strict=True):
            axis.plot(range(1, workload.T + 1), gate[:, :8])
            axis.plot(range(1, workload.T + 1), examples.inputs[0] / 2 + 0.5, ":", color="#555555")
            axis.set_title(f"{GATES[name]} of the LSTM, 8 units; dotted: the sine", fontsize=9)
        axis.set_xlabel("step of the sequence")

    return lines, draw
