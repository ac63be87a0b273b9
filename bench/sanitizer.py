"""The second stage of ``python -m bench gpu``: compute-sanitizer over one small case a schedule.

memcheck finds accesses outside of what was allocated, racecheck what two threads of a program do to
each other in shared memory. Neither sees a race between programs through global memory. So that
torch is started under a tool once, a process runs every schedule, forward and backward:
``python -m bench.sanitizer SCHEDULE,SCHEDULE CELL DEVICE``, under any tool.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch

from fusedrnn.dispatch import precision
from fusedrnn.kernels import plan as planning
from fusedrnn.kernels.plan import Problem, chip_of

from .cases import CELLS, Workload
from .disk import Table
from .forcing import forced
from .gate import Gate
from .run import Settings, Subject
from .supervise import Signals, supervise

TOOLS = ("memcheck", "racecheck")
COLUMNS = ("tool", "schedule", "cell", "outcome", "errors", "seconds", "note")
#: By what can be wrong in them: programs that wait, one program, launches.
ORDER = ("cooperative", "resident", "stepwise")
#: For one process, where there is as much.
LONGEST_SECONDS = 120.0
_FOUND = 86  # the exit code by which the tool says that it found something
#: The fewest units of which each schedule has something to show: several blocks, several programs.
_SIZES = {"resident": 48, "cooperative": 256, "stepwise": 48}


class Batch(NamedTuple):
    """One process: a tool over the schedules of a cell."""

    tool: str
    cell: str
    schedules: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.tool} {self.cell}: {', '.join(self.schedules)}"


def batches(left_out: frozenset[str] = frozenset()) -> list[Batch]:
    """Both tools over the LSTM, then over the GRU; the schedule with most to be wrong first."""
    schedules = tuple(name for name in ORDER if name not in left_out)
    return [Batch(tool, cell, schedules) for cell in CELLS for tool in TOOLS if schedules]


def share_of(place: int, left: float) -> float:
    """Seconds for the batch at a place: no tool over the first cell may cost the next its turn."""
    return min(left / max(1, len(TOOLS) - place), LONGEST_SECONDS)


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


def run_batch(
    batch: Batch, program: str, folder: Path, seconds: float, signals: Signals, device: str = "cuda"
) -> list[str]:
    """Runs one batch into sanitizer.csv, and what the tool said into sanitizer.txt.

    The tool counts what it finds for the whole process; whose it was is told by the kernels' names
    in its report, and where that names none of ours, it is everybody's who had begun.

    Returns:
        For each schedule ``"clean"``, ``"errors"``, ``"wrong"`` (the numbers), ``"stopped"`` or
        ``"not run"``.
    """
    report = folder / f"sanitizer-{batch.tool}-{batch.cell}.txt"
    log = folder / "sanitizer.txt"
    command = [program, "--tool", batch.tool, "--error-exitcode", str(_FOUND)]
    command += ["--log-file", str(report), sys.executable, "-m", "bench.sanitizer"]
    command += [",".join(batch.schedules), batch.cell, device]
    # The allocator's one large block would hide an access beyond a tensor's end.
    extra = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    before = log.stat().st_size if log.exists() else 0
    ended = supervise(command, log, seconds, signals, extra=extra)
    said = dict(_VERDICT.findall(log.read_bytes()[before:].decode(errors="replace")))
    text = report.read_text(errors="replace") if report.exists() else ""
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
    errors = re.search(r"(\d+) (?:errors?|hazards?)", summary[0]) if summary else None
    note = ended.why or (summary[0] if summary else f"code {ended.code}, see sanitizer.txt")
    verdicts = {name: said.get(f"{name} {batch.cell}") for name in batch.schedules}
    begun = [*(name for name in verdicts if verdicts[name])]
    begun += [name for name in verdicts if not verdicts[name]][:1]
    found = ended.code == _FOUND or bool(errors and int(errors[1]))
    guilty = [name for name in begun if f"_{name}_" in text] or begun if found else []
    outcomes = []
    for schedule, verdict in verdicts.items():
        if schedule in guilty:
            outcome = "errors"
        elif verdict == "wrong":
            outcome = "wrong"
        elif ended.why:  # the tool had not come to its summary
            outcome = "stopped"
        else:
            outcome = "clean" if verdict and errors else "not run"
        row = (batch.tool, schedule, batch.cell, outcome, errors[1] if errors else "")
        Table(folder / "sanitizer.csv", COLUMNS).add((*row, f"{ended.seconds:.1f}", note))
        outcomes.append(outcome)
    return outcomes


#: What ``main`` prints behind each schedule.
_VERDICT = re.compile(r"^(\w+ \w+): (right|wrong), ", re.MULTILINE)


def main(schedules: str, cell: str, device: str) -> int:
    """Forward and backward once by each schedule; 1 if numbers are wrong."""
    right = [_right(schedule, cell, torch.device(device)) for schedule in schedules.split(",")]
    return 0 if all(right) else 1


def _right(schedule: str, cell: str, device: torch.device) -> bool:
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
    word = "right" if verdict.ok else "wrong"
    print(f"{schedule} {cell}: {word}, {verdict.share:.2f} of the error budget", flush=True)
    return verdict.ok


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
