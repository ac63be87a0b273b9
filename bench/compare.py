"""``python -m bench compare OLD.csv ... NEW.csv``: cases that became slower, wrong or larger.

Ratios to torch.nn are compared, because the times of two runs depend on the load. A case is slower
where the spread of its new ratio lies below those of all old ones by more than the tolerance.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from . import UserError

KEYS = ["case", "cell", "pass", "provider"]
NEEDED = [*KEYS, "gate", "x", "x_low", "x_high"]


def run(options: argparse.Namespace) -> int:
    """Prints the changes; returns 1 if anything became slower, wrong or larger, else 0."""
    *old, new = map(read, options.files)
    if not old:
        raise UserError("compare takes at least two files, the new one last")
    found = list(changes(old, new, options.tolerance))
    print("".join(f"{kind:<8} {line}\n" for kind, line in found), end="")
    bad = sum(kind in ("slower", "wrong", "larger") for kind, _ in found)
    print(f"{bad} of the cases became slower, wrong or larger")
    return 1 if bad else 0


def read(path: Path):
    """Returns a results.csv as a DataFrame; of several rows for one case the last counts."""
    import pandas

    try:
        table = pandas.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if missing := [name for name in NEEDED if name not in table]:
        raise UserError(f"{path} is no results.csv: it has no column {', '.join(missing)}")
    return table.drop_duplicates(KEYS, keep="last").set_index(KEYS)


def changes(old: list, new, tolerance: float) -> Iterator[tuple[str, str]]:
    """Yields (kind, description): slower, faster, wrong, larger, gone or added."""
    import pandas

    before = pandas.concat(old)
    sizes = [c for c in ("kept_mb", "peak_mb") if c in new and c in before]
    before["passed"] = before["gate"].isin(["ok", "reference"])
    ends = {"x_low": "min", "x_high": "max", "passed": "any"} | dict.fromkeys(sizes, "max")
    limits = before.groupby(level=KEYS).agg(ends)
    both = limits.merge(new, "outer", KEYS, suffixes=("_old", ""), indicator="found")
    for key, row in both.iterrows():
        name = " ".join(map(str, key))
        span = f"{name}: {row['x']:.2f} after {row['x_low_old']:.2f} - {row['x_high_old']:.2f}"
        if row["found"] != "both":
            yield ("gone" if row["found"] == "left_only" else "added"), name
        elif row["passed"] and row["gate"] in ("red", "failed"):
            yield "wrong", f"{name}: the gate says {row['gate']}"
        elif row["x_high"] * tolerance < row["x_low_old"]:
            yield "slower", span
        elif row["x_low"] > row["x_high_old"] * tolerance:
            yield "faster", span
        for column in sizes:
            if row[column] > 1.01 * (limit := row[f"{column}_old"]):  # bytes are counted
                yield "larger", f"{name}: {column} {row[column]:g}, at most {limit:g} before"
