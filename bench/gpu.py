"""``python -m bench gpu``: tests and measurements on a CUDA device, in a fixed time.

Every step is a process with a time limit, so a crash or a hang costs that step only. Outcomes are
on disk before the next step begins; a second run in the same folder leaves out the steps that
succeeded. A red test leaves nothing out: it is reported, and each number has its own gate.
"""

import argparse
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from . import UserError, report

ROOT = Path(__file__).resolve().parents[1]
#: A command with {minutes} gets this much less than its limit, so that it can end by itself.
MARGIN_SECONDS = 10
#: A process that crashed is started again this often; it goes on behind the case it was at.
MOST_STARTS = 4
BENCH = (sys.executable, "-m", "bench")
PYTEST = (
    *(sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider"),
    "--continue-on-collection-errors",  # a package that a test imports may be missing
)
OURS = "fusedrnn,fusedrnn triton,fusedrnn resident,fusedrnn cooperative,fusedrnn stepwise"
KERNEL_TESTS = ("tests/test_resident.py", "tests/test_cooperative.py", "tests/test_stepwise.py")


class Step(NamedTuple):
    """A command with its part of the time."""

    name: str
    minutes: float
    command: tuple[str, ...]  # {out} and {minutes} are replaced
    restarts: bool = False  # after a crash


def steps() -> list[Step]:
    """Returns the steps of a run, the most important first."""

    def bench(*command: str, out: str = "{out}") -> tuple[str, ...]:
        limits = ("--minutes", "{minutes}", "--resume")
        return (*BENCH, *command, "--device", "cuda", "--out", out, *limits)

    def cases(names: str, providers: str, *options: str, **folder: str) -> tuple[str, ...]:
        return bench("cases", names, "--providers", providers, *options, **folder)

    # Without the compiled loop, which takes minutes to compile.
    peers = f"{OURS},eager loop,flashrnn,haste,torchrl"
    # Compiling takes most of the time of a test.
    workers = ("-n", str(min(8, os.cpu_count() or 1))) if find_spec("xdist") else ()
    first = cases("first", "fusedrnn triton", "--gate-only", out="{out}/first")
    gate = cases("lessons,sweep", OURS, "--gate-only", out="{out}/gate")
    sweep = cases("sweep", "fusedrnn,fusedrnn triton")
    others = (*PYTEST, *workers, "tests", *(f"--ignore={path}" for path in KERNEL_TESTS))
    found = [
        Step("machine", 0.1, ("nvidia-smi",)),
        Step("first", 0.4, first),
        Step("gate", 1.0, gate, restarts=True),
        Step("kernelbench", 0.8, cases("kernelbench,deepbench", peers), restarts=True),
        Step("lessons", 1.5, bench("demo"), restarts=True),
        Step("sweep", 2.1, sweep, restarts=True),
        Step("kernel-tests", 1.0, (*PYTEST, *workers, *KERNEL_TESTS)),
        Step("tests", 1.5, others),
        Step("ragged", 0.3, bench("ragged"), restarts=True),
    ]
    # The allocator's large blocks would hide an access beyond a tensor's end.
    for tool in ("memcheck", "racecheck"):
        watched = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool", tool)
        checked = cases("first", "fusedrnn triton", "--gate-only", out=f"{{out}}/{tool}")
        found.append(Step(tool, 0.4, (*watched, "--error-exitcode", "86", *checked)))
    return found


def run(options: argparse.Namespace) -> int:
    """Runs the steps; returns 0, or 1 where a step failed."""
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
    folder = options.out
    if folder is None:  # a second run of a day goes on in the same folder
        gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
        folder = ROOT / "bench" / "results" / f"{gpu}-{datetime.now(timezone.utc):%Y-%m-%d}"
    folder = folder.resolve()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        run_steps(chosen, folder, 60 * (9.0 if math.isinf(options.minutes) else options.minutes))
    finally:
        print(summary(folder))
    # nvidia-smi or compute-sanitizer may be missing.
    return 0 if {row["outcome"] for row in outcomes(folder).values()} <= {"ok", "not found"} else 1


def run_steps(chosen: Sequence[Step], folder: Path, seconds: float) -> None:
    """Runs the steps that have not succeeded in this folder yet, for some seconds altogether.

    Time that a step leaves over goes to those behind it. The folder gets a log of each step.
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
        last = _text(folder / f"{step.name}.log").rstrip().split("\n")[-1]
        row = {"step": step.name, "outcome": outcome, "seconds": f"{spent:.0f}"}
        row |= {"command": shlex.join(step.command), "last_line": last[:200]}
        report.append(folder / "steps.csv", row, [row])
        print(f"{step.name:<13} {outcome:<12} {spent:>4.0f} s  {row['last_line'][:90]}", flush=True)


def run_step(step: Step, folder: Path, limit: float) -> str:
    """Runs a step; returns ``"ok"``, ``"timed out"``, ``"not found"`` or its exit code in words."""
    end = time.monotonic() + limit
    python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin"))
    environment = {**os.environ, "PYTHONPATH": python_path, "PATH": path}
    log_path, out = folder / f"{step.name}.log", str(folder)
    log_path.unlink(missing_ok=True)
    for _ in range(MOST_STARTS if step.restarts else 1):
        left = end - time.monotonic()
        minutes = f"{max(1.0, left - MARGIN_SECONDS) / 60:.2f}"
        words = [w.replace("{out}", out).replace("{minutes}", minutes) for w in step.command]
        with open(log_path, "ab") as log:
            try:
                process = subprocess.Popen(
                    words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
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
        if code in (0, 1, 127):
            break
    return {0: "ok", 1: "red", 127: "not found"}.get(code, f"code {code}")


def outcomes(folder: Path) -> dict[str, dict[str, str]]:
    """Returns the last row of ``steps.csv`` for each step."""
    return {row["step"]: row for row in report.read(folder / "steps.csv")}


def _text(log: Path) -> str:
    return log.read_text(errors="replace") if log.exists() else ""


def summary(folder: Path) -> str:
    """Returns the steps with their outcomes, the red tests and gates, and the mean gains."""
    lines = [f"\nresults in {folder}"]
    for name, row in outcomes(folder).items():
        lines.append(f"{name:<13} {row['outcome']:<12} {row['last_line']}")
        log = _text(folder / f"{name}.log")
        found = re.findall(r"FAILED (tests/\S+)|(tests/\S+) FAILED", log)
        lines += [f"  red test: {test}" for test in sorted({a or b for a, b in found})]
    gains: dict[str, list[float]] = {}
    for path in (folder / "gate" / "results.csv", folder / "results.csv"):
        for row in report.read(path):
            if row["gate"] in ("red", "failed"):
                lines.append(f"gate {row['gate']}: {row['case']} {row['cell']} {row['note']}")
            elif row["x"] and row["provider"] == "fusedrnn":
                gains.setdefault(f"{row['pass']} {row['cell']}", []).append(float(row["x"]))
    for name, values in gains.items():
        speed = f"{statistics.geometric_mean(values):.2f} times torch.nn's speed"
        lines.append(f"{name}: {speed} in {len(values)} cases")
    return "\n".join(lines)
