"""Pictures of a results folder, drawn from its CSV files alone."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

#: One colour for each provider in every picture.
COLOURS = {
    "torch.nn": "#555555",
    "fusedrnn": "#d1495b",
    "fusedrnn triton": "#d1495b",
    "fusedrnn torch": "#e8a33d",
}


def draw(folder: Path) -> str:
    """Writes speed.png, losses.png and, after a sweep, sweep.png; says what it did in words."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"CSV in {folder} (no pictures: matplotlib is not installed)"
    rows = [row for row in _read(folder / "results.csv") if row["gate"] in ("yardstick", "ok")]
    env = json.loads((folder / "environment.json").read_text())
    caption = f"{env['device']}, torch {env['torch']}, triton {env['triton']}; {env['data']}"
    lesson_rows = [row for row in rows if row["lesson"] != "sweep"]
    sweep_rows = [row for row in rows if row["lesson"] == "sweep"]
    losses = _read(folder / "losses.csv")
    for name, data, painter in (
        ("speed.png", lesson_rows, _speed),
        ("losses.png", losses, _losses),
        ("sweep.png", sweep_rows, _sweep),
    ):
        if data:
            figure = Figure(layout="constrained")
            painter(figure, data)
            figure.supxlabel(caption, fontsize=7)
            figure.savefig(folder / name, dpi=110)
    return f"CSV and PNG in {folder}"


def _read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _groups(rows: Iterable[dict[str, str]], *keys: str) -> dict[tuple[str, ...], list[dict]]:
    """Rows by the values of some columns, in the order of their first appearance."""
    found: dict[tuple[str, ...], list[dict]] = {}
    for key, group in groupby(rows, lambda row: tuple(row[k] for k in keys)):
        found.setdefault(key, []).extend(group)
    return found


def _speed(figure, rows: list[dict[str, str]]) -> None:
    """Bars of the median with the 20th to 80th percentile, a panel for each workload and cell."""
    panels = _groups(rows, "workload", "cell")
    columns = 4
    figure.set_size_inches(13, 2.3 * -(-len(panels) // columns))
    axes = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flat
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        axis.set_title(" ".join(title), fontsize=9)
        for position, row in enumerate(lines):
            colour = COLOURS[row["provider"]]
            for offset, mode, fade in ((-0.2, "fw", 0.5), (0.2, "fwbw", 1.0)):
                p50, p20, p80 = (float(row[f"{mode}_ms{q}"]) for q in ("", "_p20", "_p80"))
                axis.barh(
                    position + offset,
                    p50,
                    0.38,
                    xerr=[[max(0, p50 - p20)], [max(0, p80 - p50)]],
                    color=colour,
                    alpha=fade,
                )
        axis.set_yticks(range(len(lines)), [row["provider"] for row in lines], fontsize=7)
        axis.tick_params(axis="x", labelsize=7)
        axis.invert_yaxis()
    for axis in list(axes):
        axis.set_axis_off()
    figure.suptitle("ms, forward (pale) and forward+backward", fontsize=10)


def _losses(figure, points: list[dict[str, str]]) -> None:
    """Loss curves of all providers on top of each other, a panel for each workload and cell."""
    panels = _groups(points, "workload", "cell")
    columns = 4
    figure.set_size_inches(13, 2.3 * -(-len(panels) // columns))
    axes = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flat
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        axis.set_title(" ".join(title), fontsize=9)
        for width, ((provider,), curve) in zip(
            (3.0, 1.5, 0.7), _groups(lines, "provider").items(), strict=False
        ):
            axis.plot(
                [int(point["step"]) for point in curve],
                [float(point["loss"]) for point in curve],
                color=COLOURS[provider],
                linewidth=width,
                label=provider,
            )
        axis.tick_params(labelsize=7)
        if not title[0].startswith("imdb"):
            axis.set_yscale("log")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    for axis in figure.axes:
        if not axis.has_data():
            axis.set_axis_off()
    figure.suptitle("training loss by step", fontsize=10)


def _sweep(figure, rows: list[dict[str, str]]) -> None:
    """Speed of fusedrnn against torch.nn over H, a panel for each cell, mode and dtype."""
    ours = [row for row in rows if row["provider"] != "torch.nn"]
    modes = ("fw", "fwbw")
    panels = _groups(ours, "cell", "dtype")
    figure.set_size_inches(3.2 * len(panels), 6)
    grid = figure.subplots(2, max(1, len(panels)), squeeze=False)
    for column, (title, lines) in enumerate(panels.items()):
        for axis, mode in zip(grid[:, column], modes, strict=True):
            axis.set_title(f"{' '.join(title)}, {mode}", fontsize=9)
            for (batch,), points in _groups(sorted(lines, key=_batch), "B").items():
                points = sorted(points, key=lambda row: int(row["H"]))
                axis.plot(
                    [int(row["H"]) for row in points],
                    [float(row[f"{mode}_speedup"]) for row in points],
                    marker="o",
                    label=f"B={batch}",
                )
            axis.axhline(1, color="#555555", linewidth=0.8)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            axis.legend(fontsize=7)
    figure.suptitle("times as fast as torch.nn, over H", fontsize=10)


def _batch(row: dict[str, str]) -> int:
    return int(row["B"])
