"""``python -m bench plot FOLDER``: pictures of a results folder, from its CSV files alone."""

import argparse
from collections.abc import Callable
from pathlib import Path

from . import UserError

COLOURS = {"torch.nn": "#555555", "fusedrnn": "#d1495b", "fusedrnn torch": "#e8a33d"}
OTHERS = ("#3b6ea5", "#5b8c5a", "#8e6c8a", "#2a9d8f", "#b5838d", "#6d6875", "#a98467")
COLUMNS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="with a results.csv in it")


def run(options: argparse.Namespace) -> int:
    """Draws what the folder has; returns 0."""
    try:
        drawn = draw(options.folder)
    except ImportError as error:
        raise UserError(f"plot needs pandas and matplotlib: {error}") from error
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{options.folder} has no results that can be drawn: {error}") from error
    print("\n".join(map(str, drawn)))
    return 0


def draw(folder: Path) -> list[Path]:
    """Writes speed.png and, where something was trained, losses.png; returns the files."""
    import pandas

    rows = pandas.read_csv(folder / "results.csv").dropna(subset=["ms"])
    losses = folder / "losses.csv"
    curves = pandas.read_csv(losses) if losses.exists() else rows[:0]
    drawn = []
    for name, table, keys, paint in (
        ("speed.png", rows, ["case", "cell", "pass"], _bars),
        ("losses.png", curves, ["case", "cell"], _curves),
    ):
        if len(table):
            drawn.append(folder / name)
            _panels(table, keys, paint).savefig(drawn[-1], dpi=110)
    return drawn


def _panels(table, keys: list[str], paint: Callable[..., None]):
    """Returns a figure with a panel for each group of rows, in lines of four."""
    from matplotlib.figure import Figure

    others = sorted(set(table["provider"]) - set(COLOURS))
    palette = COLOURS | {name: OTHERS[n % len(OTHERS)] for n, name in enumerate(others)}
    groups = list(table.groupby(keys, sort=False))
    height = -(-len(groups) // COLUMNS)
    figure = Figure(figsize=(13, 0.5 + 2.3 * height), layout="constrained")
    axes = list(figure.subplots(height, COLUMNS, squeeze=False).flat)
    for axis, (title, group) in zip(axes, groups, strict=False):
        axis.set_title(" ".join(title), fontsize=8)
        axis.tick_params(labelsize=7)
        paint(axis, group, palette)
    for axis in axes[len(groups) :]:
        axis.set_axis_off()
    return figure


def _bars(axis, group, palette: dict[str, str]) -> None:
    """Draws the median ms of each provider, and lines from the 20th to the 80th percentile."""
    spread = [(group["ms"] - group["p20"]).clip(0), (group["p80"] - group["ms"]).clip(0)]
    axis.barh(group["provider"], group["ms"], xerr=spread, color=group["provider"].map(palette))
    axis.set_xlabel("ms", fontsize=7)
    axis.invert_yaxis()


def _curves(axis, group, palette: dict[str, str]) -> None:
    """Draws the loss by step. The curves lie on each other, so each is thinner than the last."""
    for n, (provider, curve) in enumerate(group.groupby("provider", sort=False)):
        style = {"color": palette[provider], "lw": 3 / (n + 1), "label": provider}
        axis.plot(curve["step"], curve["loss"], **style)
    axis.legend(fontsize=6)
