"""Forecasts of two series: a sine by three cells, and a price in its own units."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..cases import PRICE, SINE, Workload
from ..data import Scale, prices
from ..models import Examples, Forecast, examples_of
from ..providers import build
from ..train import Training, predict, train
from .lesson import CELLS, COLOURS, Lesson, Result, Setting

CPU = torch.device("cpu")


def fit(workload: Workload, cell: str, setting: Setting) -> tuple[Forecast, Examples, Training]:
    """Trains a cell on the windows of a series."""
    steps = 5 if setting.quick else 200
    examples = examples_of(workload, None, setting.seed)
    torch.manual_seed(setting.seed)
    model = Forecast(build("fusedrnn", cell, workload), workload)
    return model, examples, train(model, workload, examples, steps, CPU, setting.seed)


def run_sine(setting: Setting) -> Result:
    workload = next(workload for workload in SINE if workload.T == 50)
    lines = [f"{'T=50':<6}{'first loss':>12}{'final loss':>12}{'test RMSE':>12}{'below 0.01':>12}"]
    curves = {}
    for cell in CELLS:
        _, _, training = fit(workload, cell, setting)
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


def run_price(setting: Setting) -> Result:
    # Tiny sizes keep the length of the window, on which the days depend.
    workload = replace(PRICE, H=8, layers=1, dropout=0.0) if setting.quick else PRICE
    model, examples, _ = fit(workload, "lstm", setting)
    series, end = prices(seed=setting.seed), examples.known + workload.T
    scale = Scale.of(series, end)
    predicted, targets = (scale.invert(values) for values in predict(model, examples, CPU))
    before = scale.invert(examples.inputs[examples.known :, -1, 0])
    lines = [
        f"scaled by the first {end} days: {scale.low:.2f} to {scale.high:.2f}; tested on "
        f"{len(targets)} days after them",
        f"{'forecast':<20}{'MAE':>8}{'RMSE':>8}   in units of the price",
    ]
    mean = series[:end].mean().expand_as(targets)
    named = {"LSTM": predicted, "price of yesterday": before, "mean of training": mean}
    for name, values in named.items():
        mae, rmse = errors(values, targets)
        lines.append(f"{name:<20}{mae:>8.2f}{rmse:>8.2f}")

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        days = range(end, end + len(targets))
        axis.plot(days, targets, color="#555555", lw=1, label="price")
        axis.plot(days, predicted, color=COLOURS["lstm"], label="LSTM, one day ahead")
        axis.set_xlabel("day")
        axis.legend()

    return lines, draw


def errors(predicted: Tensor, true: Tensor) -> tuple[float, float]:
    """Returns the mean absolute and the root mean square error."""
    off = (predicted - true).double()
    return off.abs().mean().item(), off.square().mean().sqrt().item()


SINE_LESSON = Lesson(
    "training curves of RNN, LSTM and GRU on the same sine",
    "the order at the start and at the end: the fastest to start need not end best.",
    run_sine,
)
PRICE_LESSON = Lesson(
    "a price one day ahead, beside forecasts without a model",
    "Scale in bench/data.py: the range comes from the training days alone, or the test would leak.",
    run_price,
)
