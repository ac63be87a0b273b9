"""Forecasts of series: training curves, the length of the window, and a price in its own units."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cases import PRICE, SINE, Workload, cut_down
from ..models import Examples, Forecast, examples_of
from ..providers import build
from ..series import Scale, prices
from ..train import Training, predict, train
from .lesson import CELLS, COLOURS, DEVICE, Lesson, Numbers, Setting, backend_of

STEPS = 200
LENGTHS = (10, 30, 50, 100)
#: Starts of each length: a single one says little of so small errors.
STARTS = 2


class Fit(NamedTuple):
    """A trained forecast, what it was trained on, and how."""

    model: Forecast
    examples: Examples
    training: Training
    backend: str


def fit(workload: Workload, cell: str, setting: Setting, seed: int) -> Fit:
    """Trains ``STEPS`` steps of ``cell`` on the windows of a series."""
    if setting.quick:
        workload = replace(cut_down(workload), T=workload.T)
    else:
        workload = replace(workload, steps=STEPS)
    setting.progress.at(f"{workload.name} {cell}")
    examples = examples_of(workload, None, setting.seed)
    torch.manual_seed(seed)
    model = Forecast(build("fusedrnn", cell, workload), workload).to(DEVICE)
    backend = backend_of(model.rnn, examples.inputs[: workload.B].to(DEVICE))
    tick = setting.progress.tick
    training = train(model, workload, examples, workload.steps, DEVICE, seed, tick)
    return Fit(model, examples, training, backend)


def _sine(T: int) -> Workload:
    return next(workload for workload in SINE if T == workload.T)


# Curves


def measure_curves(setting: Setting) -> Numbers:
    fits = {cell: fit(_sine(50), cell, setting, setting.seed) for cell in CELLS}
    return {
        "backends": {cell: f.backend for cell, f in fits.items()},
        "losses": {cell: f.training.losses for cell, f in fits.items()},
        "final_loss": {cell: f.training.final_loss for cell, f in fits.items()},
        "test_rmse": {cell: f.training.metric for cell, f in fits.items()},
    }


def table_curves(numbers: Numbers) -> Iterator[str]:
    heads = "".join(f"{head:>14}" for head in ("first loss", "final loss", "test RMSE", "0.01 at"))
    yield f"{'sine, T=50':<12}{heads}"
    for cell, losses in numbers["losses"].items():
        below = next((str(i) for i, loss in enumerate(losses, 1) if loss < 0.01), "never")
        final, rmse = numbers["final_loss"][cell], numbers["test_rmse"][cell]
        yield f"{cell.upper():<12}{losses[0]:>14.4f}{final:>14.1e}{rmse:>14.4f}{below:>14}"


def draw_curves(figure: Any, numbers: Numbers) -> None:
    axis = figure.subplots()
    for cell, losses in numbers["losses"].items():
        axis.semilogy(
            range(1, len(losses) + 1), losses, color=COLOURS[cell], lw=1, label=cell.upper()
        )
    axis.set_xlabel("training step")
    axis.set_ylabel("mean square error of the batch")
    axis.legend()


# Lengths


def measure_lengths(setting: Setting) -> Numbers:
    starts = range(setting.seed, setting.seed + (1 if setting.quick else STARTS))
    errors: dict[str, dict[str, list[float]]] = {cell: {} for cell in CELLS}
    backends: dict[str, dict[str, str]] = {cell: {} for cell in CELLS}
    for cell in CELLS:
        for T in LENGTHS:
            fits = [fit(_sine(T), cell, setting, seed) for seed in starts]
            errors[cell][str(T)] = [f.training.metric for f in fits]
            backends[cell][str(T)] = fits[0].backend
    return {"backends": backends, "lengths": list(LENGTHS), "test_rmse": errors}


def table_lengths(numbers: Numbers) -> Iterator[str]:
    yield "test RMSE of the next value of a sine: mean (least, largest) over the starts"
    yield f"{'':<6}" + "".join(f"{f'T={T}':>24}" for T in numbers["lengths"])
    for cell, errors in numbers["test_rmse"].items():
        shown = (f"{mean(e):.4f} ({min(e):.4f}, {max(e):.4f})" for e in errors.values())
        yield f"{cell.upper():<6}" + "".join(f"{text:>24}" for text in shown)


def draw_lengths(figure: Any, numbers: Numbers) -> None:
    axis = figure.subplots()
    for cell, errors in numbers["test_rmse"].items():
        means = [mean(e) for e in errors.values()]
        axis.plot(numbers["lengths"], means, color=COLOURS[cell], marker="o", label=cell.upper())
        spread = [min(e) for e in errors.values()], [max(e) for e in errors.values()]
        axis.fill_between(numbers["lengths"], *spread, color=COLOURS[cell], alpha=0.15)
    axis.set_yscale("log")
    axis.set_xlabel("length of the window, T")
    axis.set_ylabel("test RMSE")
    axis.legend()


# Price


def errors_of(predicted: Tensor, true: Tensor) -> dict[str, float]:
    """Mean absolute and root mean square error, in the units of both."""
    off = (predicted - true).double()
    return {"mae": off.abs().mean().item(), "rmse": off.square().mean().sqrt().item()}


def measure_price(setting: Setting) -> Numbers:
    model, examples, training, backend = fit(PRICE, "lstm", setting, setting.seed)
    series, known = prices(seed=setting.seed), examples.known
    T = examples.inputs.shape[1]
    # The training windows end with value known + T - 1: later ones would tell of the test.
    scale = Scale.of(series, known + T)
    said, targets = predict(model, examples, DEVICE)
    predicted, true = scale.invert(said.double()), scale.invert(targets.double())
    last = scale.invert(examples.inputs[known:, -1, 0].double())
    average = series[: known + T].mean().expand_as(true)
    return {
        "backends": {"lstm": backend},
        "scale": {"low": scale.low.item(), "high": scale.high.item(), "days": known + T},
        "losses": training.losses,
        "errors": {
            "LSTM": errors_of(predicted, true),
            "yesterday's price": errors_of(last, true),
            "mean of training": errors_of(average, true),
        },
        "days": list(range(known + T, len(series))),
        "predicted": predicted.tolist(),
        "true": true.tolist(),
    }


def table_price(numbers: Numbers) -> Iterator[str]:
    scale = numbers["scale"]
    yield (
        f"scaled by the first {scale['days']} days: {scale['low']:.2f} to {scale['high']:.2f}; "
        f"tested on the {len(numbers['days'])} days after"
    )
    yield f"{'forecast':<20}{'MAE':>8}{'RMSE':>8}   in units of the price"
    for name, errors in numbers["errors"].items():
        yield f"{name:<20}{errors['mae']:>8.2f}{errors['rmse']:>8.2f}"


def draw_price(figure: Any, numbers: Numbers) -> None:
    axis = figure.subplots()
    axis.plot(numbers["days"], numbers["true"], color="#555555", lw=1, label="price")
    axis.plot(
        numbers["days"], numbers["predicted"], color=COLOURS["lstm"], label="LSTM, a day ahead"
    )
    axis.set_xlabel("day")
    axis.set_ylabel("price")
    axis.legend()


CURVES = Lesson(
    "training curves of RNN, LSTM and GRU on the same sine",
    measure_curves,
    table_curves,
    draw_curves,
    steps=len(CELLS) * STEPS,
)
LENGTH = Lesson(
    "the test error of the sine forecast against the length of its window",
    measure_lengths,
    table_lengths,
    draw_lengths,
    steps=len(CELLS) * len(LENGTHS) * STARTS * STEPS,
)
PRICE_LESSON = Lesson(
    "a price a day ahead: MAE and RMSE in its own units, beside forecasts without a model",
    measure_price,
    table_price,
    draw_price,
    steps=STEPS,
)
