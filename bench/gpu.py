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
from .progress import progress, say

ROOT = Path(__file__).resolve().parents[1]
OURS = "fusedrnn,fusedrnn triton,fusedrnn resident,fusedrnn cooperative,fusedrnn stepwise"
#: Without the compiled loop, which takes minutes to compile.
PEERS = f"{OURS},eager loop,flashrnn,haste,torchrl"
KERNEL_TESTS = "tests/test_resident.py tests/test_stepwise.py tests/test_on_cuda.py"


class Step(NamedTuple):
    """A command with its part of the time."""

    name: str
    minutes: float
    command: Sequence[str]  # {out} and {minutes} are replaced
    restarts: bool = False  # after a crash


def steps() -> list[Step]:
    """Returns the steps of a run, the most important first."""
    python, limits = shlex.quote(sys.executable), "--device cuda --minutes {minutes} --resume"
    bench, out = f"{python} -m bench", f"{limits} --out {{out}}"
    cases, gate = f"{bench} cases", f"--gate-only {out}"
    first = f"{cases} first --providers 'fusedrnn triton' {gate}"
    # Compiling takes most of the time of a test. A package that a test imports may be missing.
    workers = f"-n {min(8, os.cpu_count() or 1)}" if find_spec("xdist") else ""
    options = f"-v -m gpu -p no:cacheprovider --continue-on-collection-errors {workers}"
    pytest = f"{python} -m pytest {options}"
    others = KERNEL_TESTS.replace("tests/", "--ignore=tests/")
    # The allocator's large blocks would hide an access beyond a tensor's end.
    sanitizer = "env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 86 --tool"
    table = [
        ("machine", 0.1, False, "nvidia-smi"),
        ("first", 0.4, False, f"{first}/first"),
        ("gate", 1.0, True, f"{cases} lessons,sweep --providers '{OURS}' {gate}/gate"),
        ("kernelbench", 0.8, True, f"{cases} kernelbench,deepbench --providers '{PEERS}' {out}"),
        ("lessons", 1.5, True, f"{bench} demo {out}"),
        ("sweep", 2.1, True, f"{cases} sweep --providers 'fusedrnn,fusedrnn triton' {out}"),
        ("kernel-tests", 1.0, False, f"{pytest} {KERNEL_TESTS}"),
        ("tests", 1.5, False, f"{pytest} tests {others}"),
        ("ragged", 0.3, True, f"{bench} ragged {out}"),
        ("memcheck", 0.4, False, f"{sanitizer} memcheck {first}/memcheck"),
        ("racecheck", 0.4, False, f"{sanitizer} racecheck {first}/racecheck"),
    ]
    return [Step(name, time, shlex.split(text), again) for name, time, again, text in table]


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
    for number, step in enumerate(progress(chosen, lambda step: step.name)):
        left = end - time.monotonic()
        limit = left * step.minutes / sum(s.minutes for s in chosen[number:])
        started = time.monotonic()
        outcome = run_step(step, folder, limit)
        spent = time.monotonic() - started
        log = (folder / f"{step.name}.log").read_text(errors="replace")
        last = log.rstrip().split("\n")[-1]
        row = {"step": step.name, "outcome": outcome, "seconds": f"{spent:.0f}"}
        row |= {"command": shlex.join(step.command), "last_line": last[:200]}
        report.append(folder / "steps.csv", row, [row])
        say(f"{step.name:<13} {outcome:<12} {spent:>4.0f} s  {row['last_line'][:90]}")


def run_step(step: Step, folder: Path, limit: float) -> str:
    """Runs a step; returns ``"ok"``, ``"timed out"``, ``"not found"`` or its exit code in words."""
    end = time.monotonic() + limit
    python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin"))
    environment = {**os.environ, "PYTHONPATH": python_path, "PATH": path}
    log_path, out = folder / f"{step.name}.log", str(folder)
    log_path.unlink(missing_ok=True)
    for _ in range(4 if step.restarts else 1):  # it goes on behind the case at which it crashed
        left = end - time.monotonic()
        minutes = f"{max(1.0, left - 10) / 60:.2f}"  # so that it can end by itself
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


def summary(folder: Path) -> str:
    """Returns the steps with their outcomes, the red tests and gates, and the mean gains."""
    lines = [f"\nresults in {folder}"]
    for name, row in outcomes(folder).items():
        lines.append(f"{name:<13} {row['outcome']:<12} {row['last_line']}")
        log = "".join(p.read_text(errors="replace") for p in folder.glob(f"{name}.log"))
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
