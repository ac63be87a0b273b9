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
#: Bytes are counted and not timed, so little more is already a change.
LARGER = 1.01


def run(options: argparse.Namespace) -> int:
    """Prints the changes; returns 1 if anything became slower, wrong or larger, else 0."""
    *old, new = map(read, options.files)
    if not old:
        raise UserError("compare takes at least two files, the new one last")
    found = list(changes(old, new, options.tolerance))
    for kind, line in found:
        print(f"{kind:<8} {line}")
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
    first = before.groupby(level=KEYS, sort=False)
    lowest, highest = first["x_low"].min(), first["x_high"].max()
    passed = before["gate"].isin(["ok", "reference"]).groupby(level=KEYS).any()
    sizes = [c for c in ("kept_mb", "peak_mb") if c in new and c in before]
    limits = {column: LARGER * first[column].max() for column in sizes}
    for key in before.index.unique().union(new.index, sort=False):
        name = " ".join(map(str, key))
        if key not in new.index or key not in lowest.index:
            yield ("gone" if key not in new.index else "added"), name
            continue
        row = new.loc[key]
        if passed[key] and row["gate"] in ("red", "failed"):
            yield "wrong", f"{name}: the gate says {row['gate']}"
            continue
        span = f"{name}: {row['x']:.2f} after {lowest[key]:.2f} - {highest[key]:.2f}"
        if row["x_high"] * tolerance < lowest[key]:
            yield "slower", span
        elif row["x_low"] > highest[key] * tolerance:
            yield "faster", span
        for column, limit in limits.items():
            if row[column] > limit[key]:
                yield "larger", f"{name}: {column} {row[column]:g}, at most {limit[key]:g} before"
