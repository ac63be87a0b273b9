"""``python -m bench report FOLDER``: the table and the pictures of a results folder."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from . import UserError
from .providers import TORCH

COLUMNS = 4


def run(options: argparse.Namespace) -> int:
    """Prints torch.nn's time divided by each provider's, for every case, cell and pass."""
    try:
        print(table(options.folder))
        if options.plot:
            print("\n".join(map(str, draw(options.folder))))
    except (ImportError, OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{options.folder} has no results that can be read: {error}") from error
    return 0


def table(folder: Path) -> str:
    import pandas

    frame = pandas.read_csv(folder / "results.csv")
    env = json.loads((folder / "environment.json").read_text())
    frame = frame[frame.provider != TORCH].dropna(subset=["x"])
    keys = {"index": ["case", "provider"], "columns": ["cell", "pass"], "values": "x"}
    wide = frame.pivot_table(**keys, sort=False).reset_index()
    wide.columns = [" ".join(name).strip() for name in wide.columns]
    caption = f"{env['device']}, {env['threads']} threads, torch {env['torch']}, {env['date']}"
    text = wide.to_markdown(index=False, floatfmt=".2f", missingval="-")
    return f"{text}\n\n{caption}: `{env['command']}`"


def draw(folder: Path) -> list[Path]:
    """Writes speed.png and, where something was trained, losses.png; returns the files."""
    import pandas

    rows = pandas.read_csv(folder / "results.csv").dropna(subset=["ms"])
    drawn = [_panels(rows, ["case", "cell", "pass"], _bars, folder / "speed.png")]
    losses = folder / "losses.csv"
    if losses.exists() and len(curves := pandas.read_csv(losses)):
        drawn.append(_panels(curves, ["case", "cell"], _curves, folder / "losses.png"))
    return drawn


def _bars(group, axis) -> None:
    """Draws the median ms of each provider, and lines from the 20th to the 80th percentile."""
    spread = [(group["ms"] - group["p20"]).clip(0), (group["p80"] - group["ms"]).clip(0)]
    group.plot.barh("provider", "ms", xerr=spread, ax=axis, legend=False, ylabel="")


def _curves(group, axis) -> None:
    """Draws the loss by step. The curves lie on each other, so they are dashed in turn."""
    wide = group.pivot(index="step", columns="provider", values="loss")
    wide.plot(ax=axis, style=["-", "--", ":"] * len(wide.columns), xlabel="").legend(fontsize=6)


def _panels(table, keys: list[str], paint: Callable[..., None], path: Path) -> Path:
    """Writes a picture with a panel for each group of rows, in lines of four."""
    from matplotlib.figure import Figure

    groups = list(table.groupby(keys, sort=False))
    height = -(-len(groups) // COLUMNS)
    figure = Figure(figsize=(13, 0.5 + 2.3 * height), layout="constrained")
    axes = figure.subplots(height, COLUMNS, squeeze=False).flat
    for (title, group), axis in zip(groups, axes, strict=False):
        paint(group, axis)
        axis.set_title(" ".join(title), fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in axes:  # those that are left
        axis.set_axis_off()
    figure.savefig(path, dpi=110)
    return path
