"""What ``python -m bench cpu`` shall find, and whether it did."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from .cases import LESSONS, ONE_HOT
from .cpu_rows import Row


def geomean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


class Target(NamedTuple):
    """``of`` the ratios of the rows that are ``meant`` shall be at least ``least``."""

    words: str
    least: float
    of: Callable[[list[float]], float]
    meant: Callable[[Row], bool]


LESSON_NAMES = frozenset(w.name for w in LESSONS)


def _training_of(cell: str) -> Callable[[Row], bool]:
    return lambda r: (r.case in LESSON_NAMES) and (r.cell, r.what) == (cell, "training")


TARGETS = (
    Target("every lesson, cell and pass", 0.95, min, lambda r: r.case in LESSON_NAMES),
    Target("LSTM training, geometric mean", 1.1, geomean, _training_of("lstm")),
    Target(
        "IMDB one-hot, LSTM training", 1.8, min,
        lambda r: r.case == ONE_HOT.name and _training_of("lstm")(r),
    ),
    Target("GRU training, geometric mean", 1.6, geomean, _training_of("gru")),
    Target("a step of T=1 by stream", 1.0, min, lambda r: r.backend == "stream"),
    Target(
        "a step of T=1 by the module", 1.0, min,
        lambda r: r.what == "step" and r.backend != "stream",
    ),
    Target(
        "lengths beside packed, training", 3.0, min,
        lambda r: r.case.startswith("lengths") and r.what == "training",
    ),
    Target(
        "tokens beside one-hot rows, forward", 2.0, min,
        lambda r: r.case.startswith("tokens") and r.what == "forward"
        and not r.case.endswith("from tokens"),
    ),
    Target(
        "tokens beside making one-hot rows, forward", 2.0, min,
        lambda r: r.case.endswith("from tokens") and r.what == "forward",
    ),
)  # fmt: skip


def verdict_on(target: Target, rows: Sequence[Row]) -> str:
    """A line: the target, the value, and whether it holds; it does not where a gate is red."""
    meant = [row for row in rows if target.meant(row)]
    found = [row.x for row in meant if row.x is not None]
    value = target.of(found) if found else None
    holds = value is not None and len(found) == len(meant) and value >= target.least
    shown = "-" if value is None else f"{value:.2f}"
    where = ""
    if value is not None and target.of is min:
        worst = next(row for row in meant if row.x == value)
        where = f" ({worst.case} {worst.cell} {worst.what})"
    return f"{target.words} >= {target.least:g}: {shown} {'holds' if holds else 'missed'}{where}"
