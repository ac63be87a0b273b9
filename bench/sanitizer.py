"""The second stage of ``python -m bench gpu``: compute-sanitizer over one small case a schedule.

memcheck finds accesses outside of what was allocated, racecheck what two threads of a program do to
each other in shared memory. Neither sees a race between programs through global memory.
``python -m bench.sanitizer SCHEDULE CELL`` is one such case, to be run under any tool.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from fusedrnn.dispatch import precision
from fusedrnn.kernels import plan as planning
from fusedrnn.kernels.plan import Problem, chip_of

from .cases import CELLS, Workload
from .correctness import SCHEDULES
from .disk import Table
from .forcing import forced
from .gate import Gate
from .run import Settings, Subject
from .supervise import Signals, supervise

TOOLS = ("memcheck", "racecheck")
COLUMNS = ("tool", "schedule", "cell", "outcome", "errors", "seconds", "note")
#: A case takes seconds without the tool; most of it under the tool is the start of torch.
CASE_SECONDS = 60.0
_FOUND = 86  # the exit code by which the tool says that it found something
#: The fewest units of which each schedule has something to show: several blocks, several programs.
_SIZES = {"resident": 48, "cooperative": 256, "stepwise": 48}


class Case(NamedTuple):
    tool: str
    schedule: str
    cell: str

    def __str__(self) -> str:
        return " ".join(self)


def cases(left_out: frozenset[str] = frozenset()) -> Iterator[Case]:
    """LSTM first, both tools, of every schedule."""
    for cell in CELLS:
        for schedule in SCHEDULES:
            for tool in TOOLS:
                if schedule not in left_out:
                    yield Case(tool, schedule, cell)


def places() -> list[str]:
    """Where the program may be, in the order of looking; an entry per folder."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    found = [*os.environ.get("PATH", "").split(os.pathsep)]
    for home in filter(None, [*homes, "/usr/local/cuda"]):
        found += [f"{home}/bin", f"{home}/compute-sanitizer", f"{home}/extras/compute-sanitizer"]
    site = Path(sysconfig.get_path("purelib"))
    found.append(str(Path(torch.__file__).parent / "bin"))
    found += map(str, sorted(site.glob("nvidia/**/compute-sanitizer")))
    found += map(str, sorted(site.glob("nvidia/*/bin")))
    return [place for place in dict.fromkeys(found) if place]


def find() -> str | None:
    """The program's path."""
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places()))


def not_found() -> str:
    return f"compute-sanitizer not found: looked in {', '.join(places())}"


def run_case(
    case: Case, program: str, folder: Path, seconds: float, signals: Signals, device: str = "cuda"
) -> str:
    """Runs one case into sanitizer.csv, and what the tool said into sanitizer.txt.

    Returns:
        ``"clean"``, ``"errors"``, ``"wrong"`` (the numbers), ``"stopped"`` or ``"not run"``.
    """
    report = folder / f"sanitizer-{'-'.join(case)}.txt"
    command = [program, "--tool", case.tool, "--error-exitcode", str(_FOUND)]
    command += ["--log-file", str(report), sys.executable, "-m", "bench.sanitizer"]
    command += [case.schedule, case.cell, device]
    # The allocator's one large block would hide an access beyond a tensor's end.
    extra = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    ended = supervise(
        command, folder / "sanitizer.txt", min(seconds, CASE_SECONDS), signals, extra=extra
    )
    text = report.read_text(errors="replace") if report.exists() else ""
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
    errors = re.search(r"(\d+) (?:errors?|hazards?)", summary[0]) if summary else None
    if ended.why:
        outcome = "stopped"
    elif ended.code == _FOUND or (errors and int(errors[1])):
        outcome = "errors"
    elif ended.code == 1:
        outcome = "wrong"
    else:
        outcome = "clean" if ended.code == 0 and errors else "not run"
    note = ended.why or (summary[0] if summary else f"code {ended.code}, see sanitizer.txt")
    row = (*case, outcome, errors[1] if errors else "", f"{ended.seconds:.1f}", note)
    Table(folder / "sanitizer.csv", COLUMNS).add(row)
    return outcome


def main(schedule: str, cell: str, device_name: str) -> int:
    """Forward and backward once by one schedule; 1 if the numbers are wrong."""
    device = torch.device(device_name)
    half = device.type == "cuda"  # cooperative kernels have tiles for it on every chip
    workload = Workload(
        f"{schedule}-small", "sweep", "none", T=3, B=4, I=16, H=_SIZES[schedule],
        dtype="float16" if half else "float32",
    )  # fmt: skip
    dtype = torch.float16 if half else torch.float32
    problem = Problem(cell, workload.I, workload.H, workload.B, 1, dtype, precision(), True)
    plan = getattr(planning, schedule)(problem, chip_of(device))
    subject = Subject(workload, cell, Settings(device))
    with forced(plan):
        verdict = Gate(workload, cell, subject.weights, subject.gate_input()).judge(
            "fusedrnn triton"
        )
    print(f"{schedule} {cell}: {verdict.share:.2f} of the error budget")
    return 0 if verdict.ok else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
