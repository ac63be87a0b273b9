"""Published times of other people's runs, beside which the report prints ours."""

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import UserError
from .report import read

PATH = Path(__file__).with_name("references.csv")
HEADER = f"{'case':<20} {'GPU':<27} {'dtype':<8} {'forward ms':>15} {'backward ms':>12}  library"
NOTE = """Published by others, not measured here; sources and commits are in bench/references.csv.
KernelBench: torch.nn in eager mode, forward without gradients, the input product included.
DeepBench: cuDNN or MIOpen, the recurrence alone, without the input product."""


def same_gpu(published: str, name: str) -> bool:
    """Tells whether torch's name of a GPU has all words of a published one, as of ``V100``."""
    short, long = (set(re.findall(r"[a-z0-9]+", text.lower())) for text in (published, name))
    return short <= long


def lines(cases: Sequence[str] = (), gpu: str | None = None) -> Iterator[str]:
    """Yields a line for each case, GPU and dtype: the range of the published times.

    Without names all cases are listed. ``gpu``, as torch names it, selects one model.
    """
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in read(PATH):
        if (not cases or row["case"] in cases) and (gpu is None or same_gpu(row["gpu"], gpu)):
            groups.setdefault((row["case"], row["gpu"], row["dtype"]), []).append(row)
    for (case, name, dtype), rows in groups.items():
        times = f"{_range(rows, 'forward_ms'):>15} {_range(rows, 'backward_ms'):>12}"
        libraries = "; ".join(dict.fromkeys(row["library"] for row in rows))
        yield f"{case:<20} {name:<27} {dtype:<8} {times}  {libraries}"
    if groups:
        yield NOTE


def _range(rows: Sequence[dict[str, str]], column: str) -> str:
    times = [float(row[column]) for row in rows if row[column]]
    return " - ".join(f"{n:g}" for n in sorted({min(times), max(times)})) if times else "-"


def run(options: argparse.Namespace) -> int:
    names = options.names.split(",") if options.names else ()
    if not (found := list(lines(names, options.gpu))):
        raise UserError("there are no published times of these; `references` alone prints all")
    print("\n".join((HEADER, *found)))
    return 0
