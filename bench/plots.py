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
#: For the other providers, in the order of their names.
_OTHERS = ("#3b6ea5", "#5b8c5a", "#8e6c8a", "#2a9d8f", "#b5838d", "#6d6875", "#a98467")
#: Of a call, as the columns name them and as the pictures do.
MODES = {"fw": "forward", "fwbw": "training"}


class PlotError(ValueError):
    """The folder holds no results; the message is one sentence."""


def colours(providers: Iterable[str]) -> dict[str, str]:
    """A colour for each provider."""
    others = sorted(set(providers) - set(COLOURS))
    return COLOURS | {name: _OTHERS[n % len(_OTHERS)] for n, name in enumerate(others)}


def redraw(folder: Path) -> str:
    """``draw``, of a folder that somebody names.

    Raises:
        PlotError: it holds no results.
    """
    try:
        return draw(folder)
    except (OSError, KeyError, ValueError) as error:
        raise PlotError(f"{folder} holds no results that can be drawn: {error}") from error


def draw(folder: Path) -> str:
    """Writes a picture of each kind there is data for; says what it did in words.

    speed.png and losses.png of the lessons; of a sweep sweep.png, axes.png (time against T, B and
    H) and maps.png (ratios over H and B); roofline.png where floors were modelled. Each shows
    forward and training.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"CSV in {folder} (no pictures: matplotlib is not installed)"
    rows = [row for row in _read(folder / "results.csv") if row["gate"] in ("yardstick", "ok")]
    env = json.loads((folder / "environment.json").read_text())
    caption = f"{env['device']}, torch {env['torch']}, triton {env['triton']}; {env['data']}"
    lesson_rows = [row for row in rows if row["lesson"] != "sweep"]
    sweep_rows = [row for row in rows if row["lesson"] == "sweep" and row["provider"] != "torch.nn"]
    losses = _read(folder / "losses.csv")
    for name, data, painter in (
        ("speed.png", lesson_rows, _speed),
        ("losses.png", losses, _losses),
        ("sweep.png", [row for row in sweep_rows if row["fwbw_speedup"]], _sweep),
        ("axes.png", [r for r in rows if r["lesson"] == "sweep" and r["fw_ms"]], _axes),
        ("maps.png", [row for row in sweep_rows if row["fw_speedup"]], _maps),
        ("roofline.png", [r for r in rows if r["fw_floor_ms"]], _roofline),
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
    palette = colours(row["provider"] for row in rows)
    columns = 4
    figure.set_size_inches(13, 2.3 * -(-len(panels) // columns))
    axes = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flat
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        axis.set_title(" ".join(title), fontsize=9)
        for position, row in enumerate(lines):
            colour = palette[row["provider"]]
            for offset, mode, fade in ((-0.2, "fw", 0.5), (0.2, "fwbw", 1.0)):
                if not row[f"{mode}_ms"]:  # only infers
                    continue
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
    palette = colours(point["provider"] for point in points)
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
                color=palette[provider],
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
    """Ratio to torch.nn over H, a panel for each cell, mode and dtype; of whom and of what most
    points are."""
    keys = ("provider", "T", "layout", "layers", "directions")
    groups = _groups(sorted(rows, key=lambda row: [row[k] for k in keys]), *keys)
    where, rows = max(groups.items(), key=lambda item: len(item[1]))
    panels = _groups(rows, "cell", "dtype")
    figure.set_size_inches(3.2 * len(panels), 6)
    grid = figure.subplots(2, max(1, len(panels)), squeeze=False)
    for column, (title, lines) in enumerate(panels.items()):
        for axis, mode in zip(grid[:, column], MODES, strict=True):
            axis.set_title(f"{' '.join(title)}, {mode}", fontsize=9)
            for (batch,), points in _groups(sorted(lines, key=_batch), "B").items():
                points = sorted(points, key=lambda row: int(row["H"]))
                points = [row for row in points if row[f"{mode}_speedup"]]
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
    shape = " ".join(f"{k}={v}" for k, v in zip(keys, where, strict=True))
    figure.suptitle(f"times as fast as torch.nn, over H; {shape}", fontsize=8)


def _axes(figure, rows: list[dict[str, str]]) -> None:
    """Ms against T, B and H, forward and training; the other sizes held where most points are."""
    figure.set_size_inches(12, 8)
    palette = colours(row["provider"] for row in rows)
    rest = ("cell", "dtype", "layout", "layers", "directions", "T", "B", "H")
    grid = figure.subplots(len(MODES), 3, squeeze=False)
    for (mode, words), axes in zip(MODES.items(), grid, strict=True):
        timed = [row for row in rows if row[f"{mode}_ms"]]
        for axis, size in zip(axes, ("T", "B", "H"), strict=True):
            held = [name for name in rest if name != size]
            groups = _groups(sorted(timed, key=lambda row: [row[n] for n in held]), *held)
            if not groups:
                axis.set_axis_off()
                continue
            where, points = max(groups.items(), key=lambda item: _values(item[1], size))
            for provider in sorted({row["provider"] for row in points}):
                line = [row for row in points if row["provider"] == provider]
                line.sort(key=lambda row: int(row[size]))
                axis.plot(
                    [int(row[size]) for row in line],
                    [float(row[f"{mode}_ms"]) for row in line],
                    marker="o",
                    color=palette[provider],
                    label=provider,
                )
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xlabel(size)
            shape = " ".join(f"{n}={v}" for n, v in zip(held, where, strict=True))
            axis.set_title(f"{words}; {shape}", fontsize=6)
            axis.legend(fontsize=7)
    figure.suptitle("ms, wall time", fontsize=10)


def _values(points: list[dict[str, str]], size: str) -> tuple[int, int]:
    """How much a line over a size tells: its points, and all who are on it."""
    return len({row[size] for row in points}), len(points)


def _maps(figure, rows: list[dict[str, str]]) -> None:
    """Ratio to torch.nn over H and B, a panel for each mode and each of the other keys."""
    keys = ("provider", "cell", "dtype", "T", "layout", "layers", "directions")
    ordered = sorted(rows, key=lambda row: [row[k] for k in keys])
    panels = {
        (words, mode, *title): points
        for mode, words in MODES.items()
        for title, points in _groups([r for r in ordered if r[f"{mode}_speedup"]], *keys).items()
    }
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure.set_size_inches(3.4 * columns, 2.8 * lines)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis, ((words, mode, *title), points) in zip(axes, panels.items(), strict=False):
        heights, widths = (sorted({int(row[k]) for row in points}) for k in ("H", "B"))
        grid = [[float("nan")] * len(widths) for _ in heights]
        for row in points:
            x = float(row[f"{mode}_speedup"])
            at = heights.index(int(row["H"])), widths.index(int(row["B"]))
            grid[at[0]][at[1]] = x
            axis.text(at[1], at[0], f"{x:.2f}", ha="center", va="center", fontsize=6)
        axis.imshow(grid, cmap="RdYlGn", vmin=0, vmax=2, aspect="auto")
        axis.set_xticks(range(len(widths)), widths, fontsize=6)
        axis.set_yticks(range(len(heights)), heights, fontsize=6)
        axis.set_title(f"{words}: {' '.join(title)}", fontsize=6)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.suptitle("times as fast as torch.nn, over B (across) and H (up)", fontsize=10)


def _roofline(figure, rows: list[dict[str, str]]) -> None:
    """Measured times over the modelled floors of the same plans, a panel for each mode."""
    figure.set_size_inches(11, 5)
    for axis, (mode, words) in zip(figure.subplots(1, len(MODES)), MODES.items(), strict=True):
        points = [row for row in rows if row[f"{mode}_floor_ms"] and row[f"{mode}_ms"]]
        if not points:
            axis.set_axis_off()
            continue
        floors = [float(row[f"{mode}_floor_ms"]) for row in points]
        times = [float(row[f"{mode}_ms"]) for row in points]
        axis.scatter(floors, times, s=12, color=COLOURS["fusedrnn"])
        ends = [min(floors), max(floors)]
        axis.plot(ends, ends, color=COLOURS["torch.nn"], label="floor (modelled, not measured)")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("floor, ms (modelled, not measured)")
        axis.set_ylabel(f"{words}, ms (measured)")
        axis.legend(fontsize=7)


def _batch(row: dict[str, str]) -> int:
    return int(row["B"])
