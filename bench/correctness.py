"""The first stage of ``python -m bench gpu``: the tests that have something to say on a device.

Schedule by schedule, in an order of falling risk per line of code: what shares one program's
registers, what waits for other programs, what only launches. A schedule with a red test is left
out of the later stages.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from .disk import whole_rows
from .streamed import GROUP, PATH
from .supervise import Signals, supervise

SCHEDULES = ("resident", "cooperative", "stepwise")
_TOGETHER = "layers_in_one_launch or more_units or share_a_layer or refused_launch"
#: Longer than any test takes with the compiling of its kernels.
HANGS_AFTER = 90.0
#: After an assertion on the device every test of that process fails: enough is known by then.
_MOST_FAILURES = 8


class Group(NamedTuple):
    """Some of the tests: files, what ``-k`` selects in them, and a share of the stage's time."""

    name: str
    files: tuple[str, ...]
    keyword: str
    share: float
    ignored: tuple[str, ...] = ()


GROUPS = (
    Group(
        "resident",
        ("tests/test_kernels.py", "tests/test_extending.py"),
        f"not ({_TOGETHER} or double_precision)",
        0.35,
    ),
    Group("cooperative", ("tests/test_kernels.py",), _TOGETHER, 0.25),
    Group(
        "stepwise",
        ("tests/test_stepwise.py", "tests/test_kernels.py"),
        "test_stepwise or double_precision",
        0.2,
    ),
    Group(
        "rest",
        ("tests",),
        "",
        0.2,
        ("tests/test_kernels.py", "tests/test_extending.py", "tests/test_stepwise.py"),
    ),
)


class Verdict(NamedTuple):
    """``failed`` is False for a group that ran out of time with nothing red."""

    failed: bool
    text: str


def command_of(group: Group) -> list[str]:
    """pytest for one group. In several processes where there are cores: compiling takes longest."""
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", *group.files]
    command += ["-p", "bench.streamed", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    command += [f"--maxfail={_MOST_FAILURES}", *(f"--ignore={path}" for path in group.ignored)]
    command += ["-k", group.keyword] if group.keyword else []
    processes = min(8, (os.cpu_count() or 1) // 2)
    if processes > 1 and importlib.util.find_spec("xdist"):
        command += ["-n", str(processes)]
    return command


def run_group(group: Group, folder: Path, seconds: float, signals: Signals) -> Verdict:
    """Runs a group into tests.csv and tests.txt of the folder."""
    if importlib.util.find_spec("pytest") is None:
        return Verdict(False, "not run: pytest is not installed")
    table, begun = folder / "tests.csv", time.time()

    def complaint() -> str:
        last = max(begun, table.stat().st_mtime if table.exists() else 0.0)
        return "hung" if time.time() - last > HANGS_AFTER else ""

    extra = {PATH: str(table), GROUP: group.name}
    ended = supervise(
        command_of(group), folder / "tests.txt", seconds, signals, extra=extra, complaint=complaint
    )
    counts = Counter(row["outcome"] for row in whole_rows(table) if row["group"] == group.name)
    text = ", ".join(f"{counts[o]} {o}" for o in ("passed", "failed", "skipped") if counts[o])
    if ended.why:
        text = f"{ended.why}: {text or 'no test ended'}"
    elif ended.code not in (0, 1):
        text = f"pytest left with code {ended.code}, see tests.txt; {text}".rstrip("; ")
    broke = ended.why == "hung" or (not ended.why and ended.code != 0)
    return Verdict(bool(counts["failed"]) or broke, text)
