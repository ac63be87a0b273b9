"""``python -m bench compare OLD.csv NEW.csv``: what became slower, beside torch.nn of its own run.

Times of two runs cannot be compared: the machine was another one, or in another mood. Ratios within
each run can. Of a ratio the spread is taken as wide as its two times allow, from torch.nn's p20
over the provider's p80 to torch.nn's p80 over the provider's p20; it has changed where the spreads
of old and new do not meet.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

from .providers import TORCH

#: What a gate says of who has times, and of who is wrong or breaks.
PASSED, BROKEN = ("yardstick", "ok"), ("red", "failed")

#: What makes two rows the same case.
KEYS = ("workload", "cell", "provider", "dtype", "T", "B", "I", "H", "layers", "directions")
TIMES = ("fw_ms", "fw_ms_p20", "fw_ms_p80", "fwbw_ms", "fwbw_ms_p20", "fwbw_ms_p80")
Key = tuple[str, ...]


class CompareError(ValueError):
    """A file is no results.csv; the message is one sentence."""


class Ratio(NamedTuple):
    """torch.nn's time / the provider's: of the medians, and its spread."""

    x: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.x:.2f} ({self.low:.2f}-{self.high:.2f})"


def read(path: Path) -> dict[Key, dict[str, str]]:
    """The rows by ``KEYS``; the last of each counts.

    Raises:
        CompareError: the file cannot be read, or lacks a column.
    """
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            columns = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CompareError(f"{path} cannot be read: {error}") from error
    missing = [name for name in (*KEYS, "gate", *TIMES) if name not in columns]
    if missing:
        raise CompareError(f"{path} is no results.csv: it has no column {', '.join(missing)}")
    return {tuple(row[name] for name in KEYS): row for row in rows}


def ratios(path: Path, by_key: dict[Key, dict[str, str]]) -> dict[Key, Ratio]:
    """Of every provider but torch.nn; the last part of a key is ``fw`` or ``fwbw``.

    Raises:
        CompareError: a time is no number.
    """
    found: dict[Key, Ratio] = {}
    for key, row in by_key.items():
        yardstick = by_key.get((*key[:2], TORCH, *key[3:]))
        if key[2] == TORCH or yardstick is None:
            continue
        for mode in ("fw", "fwbw"):
            if row[f"{mode}_ms"] and yardstick[f"{mode}_ms"]:
                found[(*key, mode)] = _ratio(path, mode, yardstick, row)
    return found


def _ratio(path: Path, mode: str, yardstick: dict[str, str], row: dict[str, str]) -> Ratio:
    names = (f"{mode}_ms", f"{mode}_ms_p20", f"{mode}_ms_p80")
    try:
        first, this = ([float(line[name]) for name in names] for line in (yardstick, row))
        return Ratio(first[0] / this[0], first[1] / this[2], first[2] / this[1])
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CompareError(
            f"{path} has a time that is none, for {row['workload']} {row['cell']} {row['provider']}"
        ) from error


def run(old_path: Path, new_path: Path) -> int:
    """Prints what changed beyond the spread, what is red or failed now, what is in one file only.

    Returns:
        1 if anything became slower, or passed the gate before and does not now; else 0.

    Raises:
        CompareError: a file is no results.csv.
    """
    old_rows, new_rows = read(old_path), read(new_path)
    old, new = ratios(old_path, old_rows), ratios(new_path, new_rows)
    broken = [
        key for key, row in new_rows.items()
        if row["gate"] in BROKEN and key in old_rows and old_rows[key]["gate"] in PASSED
    ]  # fmt: skip
    for key in broken:
        print(f"{new_rows[key]['gate']:<8} {_name(key)}: it was {old_rows[key]['gate']}")
    both = [key for key in old if key in new]
    slower = [key for key in both if new[key].high < old[key].low]
    faster = [key for key in both if new[key].low > old[key].high]
    for word, keys in (("slower", slower), ("faster", faster)):
        for key in keys:
            print(f"{word}   {_name(key)}: {old[key]} to {new[key]} times as fast as torch.nn")
    for path, mine, theirs in ((old_path, old, new), (new_path, new, old)):
        for key in mine:
            if key not in theirs:
                print(f"only in {path}   {_name(key)}")
    within = len(both) - len(slower) - len(faster)
    print(f"{len(both)} ratios: {len(slower)} slower, {len(faster)} faster, {within} within spread")
    return 1 if slower or broken else 0


def _name(key: Key) -> str:
    workload, cell, provider, dtype, T, B, I, H, layers, directions, *mode = key
    sizes = f"T{T} B{B} I{I} H{H} layers {layers} directions {directions}"
    return " ".join((workload, cell, provider, dtype, sizes, *mode))
