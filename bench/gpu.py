"""``python -m bench gpu``: tests and measurements on a CUDA device, in a fixed time.

Every step is a process with a time limit, so a crash or a hang costs that step only. Outcomes are
on disk before the next step begins; a second run in the same folder leaves out the steps that
succeeded. A red test leaves nothing out: it is reported, and each number has its own gate.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

import fusedrnn

from . import UserError

ROOT = Path(__file__).resolve().parents[1]
#: A command with {minutes} gets this much less than its limit, so that it can end by itself.
MARGIN_SECONDS = 10
#: A process that crashed is started again this often; it goes on behind the case it was at.
MOST_STARTS = 4
COLUMNS = ("step", "outcome", "seconds", "command", "last_line")
BENCH = (sys.executable, "-m", "bench")
PYTEST = (
    *(sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider"),
    "--continue-on-collection-errors",  # a package that a test imports may be missing
)
OURS = "fusedrnn,fusedrnn triton,fusedrnn resident,fusedrnn cooperative,fusedrnn stepwise"
KERNEL_TESTS = ("tests/test_resident.py", "tests/test_cooperative.py", "tests/test_stepwise.py")


class Step(NamedTuple):
    """A command with its part of the time.

    ``{out}`` and ``{minutes}`` in the command are replaced. A step with ``restarts`` is started
    again after a crash. ``environment`` has variables to set.
    """

    name: str
    minutes: float
    command: tuple[str, ...]
    restarts: bool = False
    environment: tuple[tuple[str, str], ...] = ()


def steps() -> list[Step]:
    """Returns the steps of a run, the most important first."""
    limited = ("--minutes", "{minutes}", "--resume")
    cases = (*BENCH, "--device", "cuda", "--out", "{out}", *limited)
    gate = (*BENCH, "--device", "cuda", "--out", "{out}/gate", *limited, "--gate-only")
    # Without the compiled loop, which takes minutes to compile.
    published, ours = "kernelbench,deepbench", "fusedrnn,fusedrnn triton"
    peers = f"{OURS},eager loop,flashrnn,haste,torchrl"
    first = (sys.executable, "-m", "bench.gpu")
    # Compiling takes most of the time of a test.
    workers = ("-n", str(min(8, os.cpu_count() or 1))) if find_spec("xdist") else ()
    pytest = (*PYTEST, *workers)
    found = [
        Step("machine", 0.1, ("nvidia-smi",)),
        Step("first", 0.4, first),
        Step("gate", 1.0, (*gate, "--cases", "lessons,sweep", "--providers", OURS), restarts=True),
        Step(
            "kernelbench", 0.8, (*cases, "--cases", published, "--providers", peers), restarts=True
        ),
        Step("lessons", 1.5, (*BENCH, "--device", "cuda", "--out", "{out}", *limited[:2])),
        Step("sweep", 1.6, (*cases, "--cases", "sweep", "--providers", ours), restarts=True),
        Step("kernel-tests", 1.0, (*pytest, *KERNEL_TESTS)),
        Step("tune", 1.0, (*BENCH, "tune", "--out", "{out}", "--minutes", "{minutes}")),
        Step("tests", 1.0, (*pytest, "tests", *(f"--ignore={path}" for path in KERNEL_TESTS))),
        Step("ragged", 0.3, (*BENCH, "ragged", "--device", "cuda", "--out", "{out}")),
    ]
    # The allocator's large blocks would hide an access beyond a tensor's end.
    uncached = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    for tool in ("memcheck", "racecheck"):
        command = (sanitizer() or "compute-sanitizer", "--tool", tool, "--error-exitcode", "86")
        found.append(Step(tool, 0.4, (*command, *first), environment=uncached))
    return found


def sanitizer() -> str | None:
    """Returns the path of compute-sanitizer, from PATH, CUDA's folders or NVIDIA's wheels."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    site = Path(sysconfig.get_path("purelib"))
    places += map(str, site.glob("nvidia/**/compute-sanitizer"))
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--minutes", type=float, default=9.0, help="of the whole run; default 9")
    add("--only", metavar="STEPS", help=f"with commas: {', '.join(s.name for s in steps())}")
    add("--out", type=Path, metavar="DIR", help="default: bench/results/GPU-DATE")
    add("--dry-run", action="store_true", help="print the steps; needs no GPU")


def run(options: argparse.Namespace) -> int:
    """Runs the steps; returns 0, or 1 where a step failed.

    Raises:
        UserError: there is no GPU, or an option makes no sense.
    """
    if not (options.minutes > 0 and math.isfinite(options.minutes)):
        raise UserError(f"--minutes is a number above 0, and not {options.minutes:g}")
    chosen = steps()
    if options.only:
        names = options.only.split(",")
        if unknown := set(names) - {step.name for step in chosen}:
            raise UserError(f"--only: there is no step {', '.join(sorted(unknown))}")
        chosen = [step for step in chosen if step.name in names]
    if options.dry_run:
        for step in chosen:
            print(f"{step.name:<13} {step.minutes:>4.1f} min  {shlex.join(step.command)}")
        return 0
    if not torch.cuda.is_available():
        raise UserError("gpu needs a CUDA device, and torch finds none; --dry-run needs none")
    folder = (options.out or default_folder(torch.cuda.get_device_name())).resolve()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        run_steps(chosen, folder, 60 * options.minutes)
    finally:
        print(summary(folder))
    # nvidia-smi or compute-sanitizer may be missing.
    return 0 if {row["outcome"] for row in outcomes(folder).values()} <= {"ok", "not found"} else 1


def default_folder(gpu: str) -> Path:
    """Returns ``bench/results/<gpu>-<date>``; a second run of a day goes on in the same folder."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return ROOT / "bench" / "results" / f"{name}-{datetime.now(timezone.utc):%Y-%m-%d}"


def run_steps(chosen: Sequence[Step], folder: Path, seconds: float) -> None:
    """Runs the steps that have not succeeded in this folder yet.

    Args:
        chosen: the steps, in order. Time that a step leaves over goes to those behind it.
        folder: of the results, of ``steps.csv``, and of a log for each step.
        seconds: the time for all of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = {name for name, row in outcomes(folder).items() if row["outcome"] == "ok"}
    chosen = [step for step in chosen if step.name not in done]
    end = time.monotonic() + seconds
    for number, step in enumerate(chosen):
        left = end - time.monotonic()
        limit = left * step.minutes / sum(s.minutes for s in chosen[number:])
        started = time.monotonic()
        outcome = run_step(step, folder, limit)
        spent = time.monotonic() - started
        line = _last_line(folder / f"{step.name}.log")
        row = (step.name, outcome, f"{spent:.0f}", shlex.join(step.command), line)
        append(folder / "steps.csv", COLUMNS, row)
        print(f"{step.name:<13} {outcome:<12} {spent:>4.0f} s  {line[:90]}", flush=True)


def run_step(step: Step, folder: Path, limit: float) -> str:
    """Runs a step; returns ``"ok"``, ``"timed out"``, ``"not found"`` or its exit code in words."""
    end = time.monotonic() + limit
    python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": python_path, **dict(step.environment)}
    path = folder / f"{step.name}.log"
    path.unlink(missing_ok=True)
    for _ in range(MOST_STARTS if step.restarts else 1):
        left = end - time.monotonic()
        minutes = f"{max(1.0, left - MARGIN_SECONDS) / 60:.2f}"
        command = [
            word.replace("{out}", str(folder)).replace("{minutes}", minutes)
            for word in step.command
        ]
        with open(path, "ab") as log:
            try:
                process = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL, start_new_session=True,
                )  # fmt: skip
            except OSError:
                return "not found"
            try:
                code = process.wait(max(1.0, left))
            except subprocess.TimeoutExpired:
                return "timed out"
            finally:
                # The session has what the process started: compilers, and processes of pytest.
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if code in (0, 1):
            return "ok" if code == 0 else "red"
    return f"code {code}"


def append(path: Path, columns: Sequence[str], row: Sequence[object]) -> None:
    """Adds a row to a CSV file and has it on disk before it returns."""
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if file.tell() == 0:
            writer.writerow(columns)
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())


def outcomes(folder: Path) -> dict[str, dict[str, str]]:
    """Returns the last row of ``steps.csv`` for each step."""
    path = folder / "steps.csv"
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        return {row["step"]: row for row in csv.DictReader(file)}


def _text(log: Path) -> str:
    return log.read_text(errors="replace") if log.exists() else ""


def _last_line(log: Path) -> str:
    return next((line for line in reversed(_text(log).split("\n")) if line.strip()), "")[:200]


def summary(folder: Path) -> str:
    """Returns the steps with their outcomes, the red tests and gates, and the mean gains."""
    lines = [f"\nresults in {folder}"]
    for name, row in outcomes(folder).items():
        lines.append(f"{name:<13} {row['outcome']:<12} {row['last_line']}")
        log = _text(folder / f"{name}.log")
        found = re.findall(r"FAILED (tests/\S+)|(tests/\S+) FAILED", log)
        lines += [f"  red test: {test}" for test in sorted({a or b for a, b in found})]
    gains: dict[tuple[str, str], list[float]] = {}
    for path in (folder / "gate" / "results.csv", folder / "results.csv"):
        for row in csv.DictReader(path.read_text().splitlines()) if path.exists() else ():
            if row["gate"] in ("red", "failed"):
                lines.append(f"gate {row['gate']}: {row['case']} {row['cell']} {row.get('note')}")
            elif row.get("x") and row["provider"] == "fusedrnn":
                gains.setdefault((row["pass"], row["cell"]), []).append(float(row["x"]))
    for (direction, cell), values in gains.items():
        mean = math.exp(sum(map(math.log, values)) / len(values))
        lines.append(
            f"{direction} {cell}: {mean:.2f} times torch.nn's speed in {len(values)} cases"
        )
    return "\n".join(lines)


def first(device: str = "cuda") -> int:
    """Runs each cell at H = 128 by the kernels, the least that must work; returns 1 if wrong."""
    wrong = 0
    for name in ("LSTM", "GRU", "RNN"):
        torch.manual_seed(0)
        ours = getattr(fusedrnn, name)(64, 128, device=device)
        theirs = getattr(torch.nn, name)(64, 128, device=device)
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(20, 16, 64, device=device)
        results = []
        for module in (ours, theirs):
            with fusedrnn.use_backend("triton"):
                output = module(x)[0]
                grads = torch.autograd.grad(output.sum(), tuple(module.parameters()))
            results.append((output, *grads))
        pairs = zip(*results, strict=True)
        # Loose enough for tf32 on both sides: the gate has the exact bounds.
        worst = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
        wrong += not worst < 1e-2
        verdict = "right" if worst < 1e-2 else "WRONG"
        print(f"{name} H=128: {verdict}, at most {worst:.1e} of a norm from torch.nn", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(first())
