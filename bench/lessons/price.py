"""A share price a day ahead: the error in its own units, beside forecasts without a model."""

from argparse import Namespace
from typing import Any

from torch import Tensor

from ..cases import PRICE
from ..data import prices
from ..models import examples_of, predict
from . import CELLS, COLOURS, Result, fit

LOOK_AT = "yesterday's price, the forecast to beat; and the noise of 3, which nothing can forecast."


def run(options: Namespace) -> Result:
    series, examples = prices(seed=options.seed), examples_of(PRICE, None, options.seed)
    # The scale is that of the days that training knows: later ones would tell of the test.
    low, high = series[: examples.known + PRICE.T].aminmax()
    forecasts: dict[str, Tensor] = {}
    for cell in CELLS:
        model, _ = fit(cell, PRICE, examples, options)
        forecasts[cell.upper()], targets = predict(model, examples)
    forecasts["yesterday's price"] = examples.inputs[examples.known :, -1, 0]
    forecasts["mean of training"] = examples.targets[: examples.known].mean().expand_as(targets)
    lines = [f"{'in units of the price':<24}{'MAE':>8}{'RMSE':>8}"]
    for name, forecast in forecasts.items():
        off = (forecast - targets) * (high - low)
        lines.append(f"{name:<24}{off.abs().mean():>8.2f}{off.square().mean().sqrt():>8.2f}")

    def draw(figure: Any) -> None:
        axis, days = figure.subplots(), range(len(series) - len(targets), len(series))
        axis.plot(days, targets * (high - low) + low, color="#bbbbbb", label="price")
        known = forecasts["LSTM"] * (high - low) + low
        axis.plot(days, known, color=COLOURS["lstm"], label="LSTM, a day ahead")
        axis.set_xlabel("day")
        axis.legend(fontsize=8)

    return lines, draw
