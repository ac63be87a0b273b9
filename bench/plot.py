"""``python -m bench plot FOLDER``: pictures of a results folder, from its CSV files alone."""

from __future__ import annotations

import argparse
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
    """Writes speed.png, axes.png and losses.png where there are data for them; returns the files.

    Raises:
        ImportError: pandas or matplotlib is not installed.
        KeyError, OSError, ValueError: results.csv is missing or has other columns.
    """
    import pandas

    rows = pandas.read_csv(folder / "results.csv")
    rows = rows[rows["ms"].notna()]
    losses = folder / "losses.csv"
    tables = {
        "speed.png": (_speed, rows),
        "axes.png": (_axes, rows),
        "losses.png": (_losses, pandas.read_csv(losses) if losses.exists() else rows[:0]),
    }
    drawn = []
    for name, (painter, table) in tables.items():
        figure = painter(table) if len(table) else None
        if figure is not None:
            drawn.append(folder / name)
            figure.savefig(drawn[-1], dpi=110)
    return drawn


def colours(providers) -> dict[str, str]:
    """Returns a colour for each provider."""
    others = sorted(set(providers) - set(COLOURS))
    return COLOURS | {name: OTHERS[n % len(OTHERS)] for n, name in enumerate(others)}


def _panels(count: int, title: str):
    """Returns a figure and ``count`` axes in rows of four."""
    from matplotlib.figure import Figure

    lines = -(-count // COLUMNS)
    figure = Figure(figsize=(13, 0.5 + 2.3 * lines), layout="constrained")
    axes = list(figure.subplots(lines, COLUMNS, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_axis_off()
    figure.suptitle(title, fontsize=10)
    return figure, axes[:count]


def _speed(rows):
    """Draws bars of the median with p20 to p80: a panel for each case, cell and pass."""
    groups = list(rows.groupby(["case", "cell", "pass"], sort=False))
    figure, axes = _panels(len(groups), "ms: median, 20th to 80th percentile")
    palette = colours(rows["provider"])
    for axis, (title, group) in zip(axes, groups, strict=True):
        axis.set_title(" ".join(title), fontsize=8)
        spread = [(group["ms"] - group["p20"]).clip(0), (group["p80"] - group["ms"]).clip(0)]
        colour = group["provider"].map(palette)
        axis.barh(group["provider"], group["ms"], xerr=spread, color=colour)
        axis.tick_params(labelsize=7)
        axis.invert_yaxis()
    return figure


def _losses(points):
    """Draws the training losses: a panel for each case and cell."""
    groups = list(points.groupby(["case", "cell"], sort=False))
    figure, axes = _panels(len(groups), "training loss by step")
    palette = colours(points["provider"])
    for axis, (title, group) in zip(axes, groups, strict=True):
        axis.set_title(" ".join(title), fontsize=8)
        # The curves lie on each other, so each is thinner than the one before.
        for n, (provider, curve) in enumerate(group.groupby("provider", sort=False)):
            style = {"color": palette[provider], "lw": 3 / (n + 1), "label": provider}
            axis.plot(curve["step"], curve["loss"], **style)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=6)
    return figure


def _axes(rows):
    """Draws times against T, B and H where results differ in one of them alone; None if none do."""
    sizes = ["T", "B", "H"]
    fixed = ["cell", "pass", "dtype", "layout", "layers", "directions"]
    groups = []
    for size in sizes:
        held = fixed + [name for name in sizes if name != size]
        # Of a sweep I = H; the named cases differ in more than one size.
        swept = rows[rows["I"] == rows["H"]]
        found = [g for g in swept.groupby(held, sort=False) if g[1][size].nunique() > 2]
        groups += [(size, title, group) for title, group in found[: 2 * COLUMNS]]
    if not groups:
        return None
    figure, axes = _panels(len(groups), "ms against one size, the others held")
    palette = colours(rows["provider"])
    for axis, (size, title, group) in zip(axes, groups, strict=True):
        for provider, line in group.sort_values(size).groupby("provider", sort=False):
            axis.loglog(line[size], line["ms"], "o-", color=palette[provider], label=provider)
        axis.set_title(" ".join(map(str, title)), fontsize=6)
        axis.set_xlabel(size, fontsize=7)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=6)
    return figure
