"""The lines of ``cpu.csv``: what each says, and how it is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

#: New pages of memory that a line of the table tells of: a page takes 1.5 us.
MANY_PAGES = 300


@dataclass(kw_only=True)
class Row:
    """A line of cpu.csv; where the gate is red there are no times.

    It is of the process whose ``x`` is the median of all that timed it.
    """

    case: str
    cell: str
    what: str
    backend: str
    gate: str
    share: float
    torch_ms: float | None = None
    torch_ms_p20: float | None = None
    torch_ms_p80: float | None = None
    fusedrnn_ms: float | None = None
    fusedrnn_ms_p20: float | None = None
    fusedrnn_ms_p80: float | None = None
    x: float | None = None
    x_low: float | None = None  # of the processes
    x_high: float | None = None
    rounds: int | None = None
    torch_pages: int | None = None
    fusedrnn_pages: int | None = None


def median_of(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """Of the same rows timed by several processes those of the median one, each for itself."""
    found = []
    for rows in zip(*runs, strict=True):
        ordered = sorted(rows, key=lambda row: row.x or 0.0)
        median = ordered[len(ordered) // 2]
        found.append(replace(median, x_low=ordered[0].x, x_high=ordered[-1].x))
    return found


def cells(row: Row) -> list[object]:
    values = ("" if value is None else value for value in asdict(row).values())
    return [f"{value:.6g}" if isinstance(value, float) else value for value in values]


def shown(row: Row) -> str:
    """One line of the table."""
    names = f"{row.case:34} {row.cell:5} {row.what:9} {row.backend:8}"
    start = f"{names} {row.gate:>3} {row.share:4.2f}"
    if row.x is None:
        return start
    times = (
        f"{p50:8.2f} {f'{p20:.2f}-{p80:.2f}':>13}"
        for p50, p20, p80 in (
            (row.torch_ms, row.torch_ms_p20, row.torch_ms_p80),
            (row.fusedrnn_ms, row.fusedrnn_ms_p20, row.fusedrnn_ms_p80),
        )
    )
    pages = [row.torch_pages or 0, row.fusedrnn_pages or 0]
    told = f"  new pages {pages[0]}, {pages[1]}" if max(pages) >= MANY_PAGES else ""
    spread = "" if row.x_low is None else f"{f'{row.x_low:.2f}-{row.x_high:.2f}':>12}"
    return f"{start} {' '.join(times)} {row.x:5.2f}{spread}{told}"
