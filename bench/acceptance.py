"""Whether a sweep on a GPU is as fast as was set out: geometric means, the least, and the floor.

Pure functions of the rows of a results.csv; nothing is measured here. A red or refused point counts
as missing, and what is missing keeps an aim from being held.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from .cases import CELLS, DTYPES
from .disk import whole_rows
from .targets import geomean

#: The points: T = 512, one layer in one direction, padded, for every cell and dtype.
SIZES, BATCHES, T = (192, 256, 384, 512, 768, 1024, 2048), (1, 16, 64, 128), 512
MODES = {"fw": "forward", "fwbw": "with backward"}
#: What a user gets; and the kernels by name, for whose plan the floor is.
AUTO, KERNELS = "fusedrnn", "fusedrnn triton"


class Point(NamedTuple):
    """One of the points, as a results.csv spells it."""

    cell: str
    dtype: str
    H: int
    B: int


POINTS = [Point(*values) for values in product(CELLS, DTYPES, SIZES, BATCHES)]


class Aim(NamedTuple):
    """``of`` the values of the points ``meant`` shall be ``limit`` at least, or at most."""

    words: str
    provider: str
    value: str  # "speedup", or "floor": how many times the modelled floor the time is
    of: Callable[[Iterable[float]], float]
    limit: float
    at_least: bool
    meant: Callable[[Point], bool]


AIMS = (
    Aim("geometric mean, bf16", AUTO, "speedup", geomean, 3.0, True,
        lambda p: p.dtype == "bfloat16"),
    Aim("geometric mean, GRU", AUTO, "speedup", geomean, 3.0, True, lambda p: p.cell == "gru"),
    Aim("least of all", AUTO, "speedup", min, 1.0, True, lambda p: True),
    Aim("largest share of the floor, B = 16", KERNELS, "floor", max, 1.5, False,
        lambda p: p.B == 16),
)  # fmt: skip


class Verdict(NamedTuple):
    """What an aim came to in one mode: ``figure`` is None where nothing of it was measured."""

    aim: Aim
    mode: str
    figure: float | None
    measured: int
    points: int

    @property
    def word(self) -> str:
        if self.figure is None:
            return "not measured"
        kept = self.figure >= self.aim.limit if self.aim.at_least else self.figure <= self.aim.limit
        if not kept:
            return "missed"
        return "held" if self.measured == self.points else "incomplete"


def judge(rows: Sequence[dict[str, str]]) -> list[Verdict]:
    """Every aim, forward and with backward; of rows for one point the last counts."""
    found: dict[tuple[str, Point], dict[str, str]] = {}
    for row in rows:
        shape = row["lesson"], row["T"], row["layers"], row["directions"], row["layout"]
        if shape == ("sweep", str(T), "1", "1", "padded"):
            point = Point(row["cell"], row["dtype"], int(row["H"]), int(row["B"]))
            found[row["provider"], point] = row
    verdicts = []
    for aim, mode in product(AIMS, MODES):
        meant = [point for point in POINTS if aim.meant(point)]
        given = (_value(found.get((aim.provider, point)), mode, aim.value) for point in meant)
        values = [value for value in given if value is not None]
        figure = aim.of(values) if values else None
        verdicts.append(Verdict(aim, mode, figure, len(values), len(meant)))
    return verdicts


def _value(row: dict[str, str] | None, mode: str, kind: str) -> float | None:
    if row is None or row["gate"] != "ok":
        return None
    if kind == "speedup":
        return float(row[f"{mode}_speedup"]) if row[f"{mode}_speedup"] else None
    ms, floor = row[f"{mode}_ms"], row[f"{mode}_floor_ms"]
    return float(ms) / float(floor) if ms and floor else None


def table(folder: Path) -> str:
    """The verdicts on a results folder, in Markdown."""
    lines = ["| torch.nn's time / ours | aim | found | points | |", "|---" * 5 + "|"]
    for v in judge(whole_rows(folder / "results.csv")):
        limit = f"{'>=' if v.aim.at_least else '<='} {v.aim.limit}"
        figure = "-" if v.figure is None else f"{v.figure:.2f}"
        lines.append(
            f"| {v.aim.words}, {MODES[v.mode]} | {limit} | {figure} | {v.measured} of {v.points} "
            f"| {v.word} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    """Prints the table; 2 where there is no folder with results."""
    if len(argv) != 1 or not (Path(argv[0]) / "results.csv").is_file():
        print("usage: python -m bench.acceptance FOLDER, with a results.csv in it", file=sys.stderr)
        return 2
    sys.stdout.write(table(Path(argv[0])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
