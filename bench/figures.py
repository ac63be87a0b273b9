"""``python -m bench.figures``: the pictures of docs/kernels.md, one for each way to run a step.

Sizes and counts in them are the planner's, for the layers that the text follows, so a picture that
differs from the one in docs/figures means that the plan has changed. The same matplotlib draws the
same text: no date, no version, and identifiers from a fixed salt.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fusedrnn.kernels import plan
from fusedrnn.kernels.launch import cdiv
from fusedrnn.kernels.plan import CHIPS, Problem
from fusedrnn.kernels.spec import SPECS

FOLDER = Path(__file__).parent.parent / "docs" / "figures"
CHIP = CHIPS["sm_90"]
SMALL = Problem("lstm", 128, 128, 64, 1, torch.bfloat16, "tf32", True)
LARGE = SMALL._replace(input_size=512, hidden_size=512)
#: What torch runs for one step of an LSTM written as its equations; views are no launches.
EAGER = (
    "addmm",
    "add",
    "sigmoid",
    "sigmoid",
    "tanh",
    "sigmoid",
    "mul",
    "mul",
    "add",
    "tanh",
    "mul",
)
#: From the top: name, lower edge, height, colour.
BANDS = (
    ("host", 46, 9, "#eeeeee"),
    ("SMs", 22, 22, "#fdf0d5"),
    ("L2", 11, 9, "#e3edf7"),
    ("HBM", 0, 9, "#d5dde5"),
)
LEFT, RIGHT, TOP = 9, 100, 60
RED, GREY = "#d1495b", "#555555"
#: On matplotlib's defaults: text stays text, and identifiers are the same in every run.
STYLE: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": "fusedrnn"}
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def main(argv: Sequence[str] | None = None) -> int:
    """Draws all figures; the exit code is 0, or 2 without matplotlib or a folder."""
    parser = argparse.ArgumentParser(prog="python -m bench.figures", description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="the folder (docs/figures)")
    folder = parser.parse_args(argv).out
    try:
        for path in draw(folder):
            print(path)
    except ImportError:
        print(f"{parser.prog}: matplotlib is not installed", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{parser.prog}: {folder} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def draw(folder: Path) -> list[Path]:
    """Writes every figure into the folder, which is made, and returns the paths.

    Raises:
        ImportError: matplotlib is missing.
        OSError: the folder cannot be written.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, painter in FIGURES.items():
        with style.context(["default", STYLE]):
            figure = Figure(figsize=(9, 5.4), facecolor="white")
            axis = figure.add_axes((0, 0, 1, 1))
            axis.set_axis_off()
            axis.set_xlim(-1, RIGHT + 1)
            axis.set_ylim(-1, TOP + 1)
            for band, bottom, height, colour in BANDS:
                _box(axis, 0, bottom, RIGHT, height, "", colour, edge=colour)
                axis.text(1, bottom + height / 2, band, va="center", fontsize=10, weight="bold")
            painter(axis)
            path = folder / f"{name}.svg"
            figure.savefig(path, format="svg", metadata=NO_METADATA)
        # matplotlib ends lines of paths with a space.
        lines = path.read_text(encoding="utf-8").splitlines()
        path.write_text("".join(f"{line.rstrip()}\n" for line in lines), encoding="utf-8")
        paths.append(path)
    return paths


def _operations(axis: Any) -> None:
    _title(axis, f"1. A launch for each operation: {len(EAGER)} launches a step", SMALL)
    width = (RIGHT - LEFT) / len(EAGER)
    for n, name in enumerate(EAGER):
        middle = LEFT + (n + 0.5) * width
        _box(axis, middle - 3.7, 48, 7.4, 5, name, "white", size=8)
        _arrow(axis, (middle, 48), (middle, 40))
        _box(axis, middle - 3.7, 33, 7.4, 7, "kernel", "white", size=8)
        _arrow(axis, (middle - 1.5, 18), (middle - 1.5, 33), RED)
        _arrow(axis, (middle + 1.5, 33), (middle + 1.5, 18), RED)
    _box(axis, LEFT, 13, 24, 5, f"W_hh, {_size(_weight_bytes(SMALL))}, every step", "white")
    text = "h, c, sums, gates, products: operands are read here, each result written"
    _box(axis, 36, 13, 62, 5, text, "white")
    _box(axis, LEFT, 2, 89, 5, "W_hh, gx, out, and what autograd keeps", "white")


def _stepwise(axis: Any) -> None:
    chosen = plan.stepwise(SMALL, CHIP)
    tiles = chosen.forward
    units = tiles.blocks[0][1]
    programs = cdiv(SMALL.batch, tiles.block_b) * cdiv(SMALL.hidden_size, units)
    _title(axis, "2. Stepwise: a GEMM and one fused launch a step", SMALL)
    _box(axis, 18, 48, 20, 5, "torch.mm", "white")
    _box(axis, 56, 48, 26, 5, "_stepwise_fwd_kernel", "white")
    axis.text(98, 50.5, f"{chosen.graph_steps} steps\na CUDA graph", ha="right", va="center",
              fontsize=8)  # fmt: skip
    _arrow(axis, (28, 48), (28, 42))
    _arrow(axis, (69, 48), (69, 42))
    _box(axis, 14, 30, 28, 12, "library GEMM\ngh = u W_hhᵀ\nweights into the SMs, again", "white")
    text = f"{programs} programs of {tiles.block_b} rows x {units} units\n"
    text += "sums, gates, c, h in registers;\nnothing stays for the next step"
    _box(axis, 50, 30, 38, 12, text, "white")
    _box(axis, 10, 13, 22, 5, f"W_hh, {_size(_weight_bytes(SMALL))}", "white")
    _box(axis, 35, 13, 27, 5, "u, gh", "white")
    _box(axis, 64, 13, 14, 5, "h, c in fp32", "white")
    _arrow(axis, (21, 18), (21, 30), RED, "all of it")
    _arrow(axis, (36, 18), (36, 30), RED, "u")
    _arrow(axis, (40, 30), (40, 18), RED, "gh")
    _arrow(axis, (52, 18), (52, 30), RED, "gh")
    _arrow(axis, (56, 30), (56, 18), RED, "next u")
    _arrow(axis, (67, 18), (67, 30), RED, "c")
    _arrow(axis, (71, 30), (71, 18), RED, "h, c")
    _box(axis, 10, 2, 22, 5, "W_hh", "white")
    _box(axis, 35, 2, 63, 5, "gx of the step in; out, gates, c of the step out", "white")
    _arrow(axis, (81, 7), (81, 30), GREY, "gx")
    _arrow(axis, (86, 30), (86, 7), GREY, "out, gates, c")


def _resident(axis: Any) -> None:
    tiles = plan.resident(SMALL, CHIP).forward
    programs = cdiv(SMALL.batch, tiles.block_b)
    _title(axis, "3. Resident: one launch for all steps, weights stay", SMALL)
    _box(axis, 35, 48, 36, 5, "_resident_fwd_kernel, once", "white")
    for n in range(3):
        left, name = LEFT + n * 30.5, n if n < 2 else programs - 1
        middle = left + 14
        _arrow(axis, (53, 48), (middle, 43.5))
        _box(axis, left, 24, 28, 19.5, "", "white")
        rows = f"rows {name * tiles.block_b} to {(name + 1) * tiles.block_b - 1}"
        axis.text(middle, 41.5, f"program {name}: {rows}", ha="center", va="center", fontsize=9)
        text = f"W_hh, {_size(_weight_bytes(SMALL))}, for all T"
        _box(axis, left + 1.5, 34, 25, 5, text, "#f6d7a7")
        _box(axis, left + 1.5, 25.5, 25, 5, "h, c in fp32", "#f6d7a7")
        _arrow(axis, (left + 10, 30.5), (left + 10, 34), RED, "h")
        _arrow(axis, (left + 18, 34), (left + 18, 30.5), RED, "gates")
        _arrow(axis, (left + 8, 7), (left + 8, 24), GREY, "gx", at=0.5)
        _arrow(axis, (left + 20, 24), (left + 20, 7), GREY, "out, gates, c", at=0.5)
    axis.text(LEFT + 59.7, 33, "…", ha="center", fontsize=12)
    _box(axis, LEFT, 2, 89, 5, "gx of the next step in; out, gates and c of this step out", "white")


def _cooperative(axis: Any) -> None:
    tiles = plan.cooperative(LARGE, CHIP).forward
    units = tiles.blocks[0][1]
    members = cdiv(LARGE.hidden_size, units)
    title = f"4. Cooperative: {members} programs share {tiles.block_b} rows, one launch"
    _title(axis, title, LARGE)
    _box(axis, 35, 48, 36, 5, "_cooperative_fwd_kernel, once", "white")
    weights = _size(_weight_bytes(LARGE) // members)
    for n in range(3):
        left, name = LEFT + n * 30.5, n if n < 2 else members - 1
        middle = left + 14
        _arrow(axis, (53, 48), (middle, 43.5))
        _box(axis, left, 28, 28, 15.5, "", "white")
        slice_of = f"units {name * units} to {(name + 1) * units - 1}"
        axis.text(middle, 41.5, f"program {name}: {slice_of}", ha="center", va="center", fontsize=9)
        _box(axis, left + 1.5, 34.5, 25, 5, f"W_hh's rows, {weights}, all T", "#f6d7a7")
        _box(axis, left + 1.5, 29, 25, 4.5, "c of the slice, all T", "#f6d7a7")
        _arrow(axis, (left + 3.5, 28), (left + 3.5, 18), RED, "h slice")
        _arrow(axis, (left + 11, 28), (left + 11, 18), RED, "+1")
        _arrow(axis, (left + 17, 18), (left + 17, 28), RED, "poll")
        _arrow(axis, (left + 24, 18), (left + 24, 28), RED, "all of h")
    axis.text(LEFT + 59.7, 35, "…", ha="center", fontsize=12)
    counters = cdiv(LARGE.batch, tiles.block_b)
    text = f"out: h of all units, a row for each step; {counters} counters, one a batch tile"
    _box(axis, LEFT, 13, 89, 5, text, "white")
    _box(axis, LEFT, 2, 89, 5, "gx in; gates and c out: nobody waits for these", "white")


#: The files of docs/figures, without .svg.
FIGURES: dict[str, Callable[[Any], None]] = {
    "operations": _operations,
    "stepwise": _stepwise,
    "resident": _resident,
    "cooperative": _cooperative,
}


def _weight_bytes(problem: Problem) -> int:
    return SPECS[problem.cell].gates * problem.hidden_size**2 * problem.dtype.itemsize


def _size(count: int) -> str:
    return f"{count / 1024:g} KiB"


def _title(axis: Any, text: str, problem: Problem) -> None:
    p = problem
    axis.text(0, 57.5, text, fontsize=12, weight="bold", va="center")
    shape = f"{p.cell.upper()}, H = {p.hidden_size}, B = {p.batch}, bf16, forward"
    axis.text(RIGHT, 57.5, shape, fontsize=9, ha="right", va="center")


def _box(
    axis: Any, left: float, bottom: float, width: float, height: float, text: str, colour: str,
    edge: str = GREY, size: float = 9,
) -> None:  # fmt: skip
    from matplotlib.patches import Rectangle

    axis.add_patch(
        Rectangle((left, bottom), width, height, facecolor=colour, edgecolor=edge, linewidth=0.8)
    )
    if text:
        axis.text(
            left + width / 2, bottom + height / 2, text, ha="center", va="center", fontsize=size
        )


def _arrow(
    axis: Any, start: tuple[float, float], end: tuple[float, float], colour: str = GREY,
    text: str = "", at: float = 0.5,
) -> None:  # fmt: skip
    style = {"arrowstyle": "->", "color": colour, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", xy=end, xytext=start, arrowprops=style)
    if text:
        x, y = (a + at * (b - a) for a, b in zip(start, end, strict=True))
        axis.text(x + 0.6, y, text, fontsize=8, color=colour, va="center")


if __name__ == "__main__":
    raise SystemExit(main())
