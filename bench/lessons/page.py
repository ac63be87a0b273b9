"""``python -m bench.lessons.page [NAME ...]``: docs/lessons.md's tables and pictures anew.

Every lesson is run with seed 0 on generated reviews. Its table stands in the page between comments,
its picture in docs/figures/lessons, and its row of the first table says how long it took, by which
backends, where and when.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from decimal import Decimal
from itertools import zip_longest
from pathlib import Path

import torch

from ..imdb import Corpus, generate
from ..report import environment
from ..text import DEFAULT_FOLDER
from .command import LESSONS, listing, run
from .lesson import DEVICE, Numbers, Setting

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "lessons.md"
FIGURES = DOCS / "figures" / "lessons"
TABLE, END = "<!-- lessons -->\n", "<!-- end -->\n"
HEAD = "| lesson | code in `bench/` | seconds | trained by | measured on |\n" + "|---" * 5 + "|\n"
#: What a test holds to the page: these take seconds, and rounding does not reach what they quote.
HELD = ("vanishing", "gates", "parameters", "numpy", "price")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?")


def begin(name: str) -> str:
    """The line behind which a lesson's table stands."""
    return f"<!-- lesson {name} -->\n"


def block(name: str, numbers: Numbers) -> str:
    """The table as the page quotes it."""
    lines = "\n".join(line.rstrip() for line in LESSONS[name].table(numbers))
    return f"```\n{lines}\n```\n"


def written(text: str, before: str) -> str:
    """What the page has behind a line now."""
    return text.partition(before)[2].partition(END)[0]


def put(text: str, before: str, new: str) -> str:
    """The page with that replaced.

    Raises:
        ValueError: it has no such line.
    """
    head, found, tail = text.partition(before)
    if not found or END not in tail:
        raise ValueError(f"the page has no line {before.strip()}, or no {END.strip()} behind it")
    return head + before + new + END + tail.partition(END)[2]


def drift(quoted: str, fresh: str) -> Iterator[str]:
    """Lines in which the two part: in a word, or a number by more than one of its last digit.

    So much can two roundings part that are no difference. What has no digits behind a point is
    counted, and must be equal.
    """
    for old, new in zip_longest(quoted.splitlines(), fresh.splitlines(), fillvalue=""):
        same = _NUMBER.sub("#", old).split() == _NUMBER.sub("#", new).split()
        pairs = zip(_NUMBER.findall(old), _NUMBER.findall(new), strict=False)
        if not same or not all(_close(*pair) for pair in pairs):
            yield f"the page has {old!r}, and the lesson says {new!r}"


def _close(left: str, right: str) -> bool:
    a, b = (Decimal(text.replace(",", "")) for text in (left, right))
    last = max(int(number.as_tuple().exponent) for number in (a, b))
    return abs(a - b) <= Decimal(1).scaleb(last) if last < 0 else a == b


def row(name: str, numbers: Numbers, seconds: float) -> str:
    """The lesson's line in the table of all."""
    env = environment(DEVICE, "")
    ran = (
        of.values() if isinstance(of, dict) else [of] for of in numbers.get("backends", {}).values()
    )
    backends = dict.fromkeys(backend for some in ran for backend in some)
    code = LESSONS[name].measure.__module__.rpartition(".")[2]
    where = f"{str(env['device']).removeprefix('CPU, ')}, torch {torch.__version__}, "
    where += str(env["date"])[:10]
    return (
        f"| [{name}](#{name}) | `lessons/{code}.py` | {max(1, round(seconds))} "
        f"| {' and '.join(sorted(backends)) or '-'} | {where} |\n"
    )


def rows(text: str) -> dict[str, str]:
    """The lines of that table as the page has them, by lesson."""
    lines = written(text, TABLE).splitlines(keepends=True)
    return {found[1]: line for line in lines if (found := re.match(r"\| \[(\w+)\]", line))}


def renew(names: Sequence[str], page: Path = PAGE, figures: Path = FIGURES) -> int:
    """Runs lessons, and writes of each the table, the picture and the row as soon as it is done.

    Returns:
        0, or 1 if the numbers of one are wrong; those are not written.

    Raises:
        FolderError: something cannot be written.
    """
    code = 0
    for name in names:
        # Not those at hand: the page is of the reviews that everybody has.
        setting = Setting(corpus=lambda n: Corpus(generate(n, n, seed=0), "generated reviews"))
        started = time.monotonic()
        if run(name, setting, DEFAULT_FOLDER, figures / f"{name}.svg"):
            code = 1
            continue
        seconds = time.monotonic() - started
        numbers = json.loads((DEFAULT_FOLDER / f"lesson-{name}.json").read_text())
        text = page.read_text(encoding="utf-8")
        found = rows(text) | {name: row(name, numbers, seconds)}
        table = HEAD + "".join(found[each] for each in LESSONS if each in found)
        page.write_text(put(put(text, TABLE, table), begin(name), block(name, numbers)), "utf-8")
    return code


if __name__ == "__main__":
    chosen = sys.argv[1:] or list(LESSONS)
    if wrong := [name for name in chosen if name not in LESSONS]:
        print(f"there is no lesson {wrong[0]!r}\n{listing()}", file=sys.stderr)
        sys.exit(2)
    sys.exit(renew(chosen))
