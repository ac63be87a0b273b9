"""Training curves of RNN, LSTM and GRU on the same sine."""

from argparse import Namespace
from typing import Any

import torch

from ..cases import SINE
from ..models import Model, examples_of, train
from ..providers import build
from . import CELLS, COLOURS, Result

LOOK_AT = "the order at the start and at the end: the fastest to start need not end best."


def run(options: Namespace) -> Result:
    workload = next(workload for workload in SINE if workload.T == 50)
    lines = [f"{'T=50':<6}{'first loss':>12}{'final loss':>12}{'test RMSE':>12}{'below 0.01':>12}"]
    examples = examples_of(workload, None, options.seed)
    curves = {}
    for cell in CELLS:
        torch.manual_seed(options.seed)
        model = Model(build("fusedrnn", cell, workload), workload)
        steps = 5 if options.quick else 200
        training = train(model, workload, examples, steps, options.seed)
        losses = curves[cell] = training.losses
        below = next((f"step {n}" for n, loss in enumerate(losses, 1) if loss < 0.01), "never")
        row = f"{losses[0]:>12.4f}{training.final_loss:>12.1e}{training.metric:>12.4f}"
        lines.append(f"{cell.upper():<6}{row}{below:>12}")

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for cell, losses in curves.items():
            axis.semilogy(losses, color=COLOURS[cell], lw=1, label=cell.upper())
        axis.set_xlabel("training step")
        axis.set_ylabel("mean square error of the batch")
        axis.legend()

    return lines, draw
