"""``python -m bench gpu``: everything a CUDA machine can tell, in one command and a fixed time.

First the kernel tests, then the lessons, then a sweep of sizes against cuDNN. It needs no network
and no installation, and every result is on disk before the next is measured, so a run that is cut
off has lost nothing but what it was doing.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from . import imdb, plots, ragged
from .cases import CELLS, LESSONS, Workload, cut_down, sweep
from .providers import TORCH, names_for
from .report import LEGEND, environment, header, table_head, table_line
from .results import Results, Row
from .run import Measured, Settings, measure

ROOT = Path(__file__).resolve().parent.parent
#: Part of the time that the kernel tests may take.
_TEST_SHARE = 0.4
#: The pictures take a second and can be drawn again from the CSV: not after every case.
_REDRAW_SECONDS = 20
#: For what cannot be stopped between two cases, above all a kernel that never ends.
_GRACE_SECONDS = 20


class NoDeviceError(RuntimeError):
    """A GPU was asked for and there is none; the message says so in one sentence."""


class Deadline:
    """Seconds left of the run."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return max(0.0, self._end - time.monotonic())


def run(minutes: float, folder: Path | None = None, *, quick: bool = False, seed: int = 0) -> int:
    """Tests, gates, times and writes on the current GPU until done or the time is over.

    Args:
        minutes: for all of it.
        folder: of the results; default ``bench/results/<gpu>-<date>``.
        quick: tiny sizes, which measure nothing.
        seed: of weights and data.

    Returns:
        0, or 1 if a test failed, a gate was red or a case broke.

    Raises:
        NoDeviceError: torch sees no GPU.
    """
    if not torch.cuda.is_available():
        raise NoDeviceError("gpu needs a CUDA device, and torch sees none; nothing was run")
    device = torch.device("cuda", torch.cuda.current_device())
    folder = folder or default_folder(torch.cuda.get_device_name(device))
    deadline = Deadline(60 * minutes)
    workloads = [*LESSONS, *sweep()]
    if quick:
        workloads = [cut_down(workload) for workload in (*LESSONS, *sweep())]
    _start_watchdog(deadline, folder)
    code = _unequal_lengths(folder, device, quick, seed)
    return session(device, folder, deadline, workloads, seed) or code


def _unequal_lengths(folder: Path, device: torch.device, quick: bool, seed: int) -> int:
    """Half a minute of ``bench ragged``; what breaks there must not cost the rest its turn."""
    try:
        return ragged.run(folder, device, quick=quick, seed=seed)
    except Exception as error:
        print(f"ragged: {error}", file=sys.stderr)
        return 1


def session(
    device: torch.device,
    folder: Path,
    deadline: Deadline,
    workloads: Sequence[Workload],
    seed: int = 0,
) -> int:
    """The kernel tests and then the workloads, for both cells; see ``run``."""
    corpus = imdb.load(seed=seed)
    env = environment(device, corpus.source)
    results = Results(folder, env)
    print(header(env), flush=True)

    tests_ok, env["tests"] = run_tests(results.folder, _TEST_SHARE * deadline.left)
    print(f"tests    {env['tests']}\n\n{table_head()}", flush=True)
    results.note(env)

    settings = Settings(device, seed, seconds=0.4)
    cases = [(workload, cell) for workload in workloads for cell in CELLS]
    failed = not tests_ok
    last_drawn = 0.0
    for done, measured in enumerate(measure_all(cases, deadline, settings, corpus), start=1):
        env["cases"] = f"{done} of {len(cases)} cases"
        results.add(measured.rows, measured.losses)
        results.note(env)
        for row in measured.rows:
            print(table_line(row), flush=True)
        for complaint in measured.complaints:
            print(complaint, file=sys.stderr)
            failed = True
        if time.monotonic() - last_drawn > _REDRAW_SECONDS:
            plots.draw(folder)
            last_drawn = time.monotonic()
    print(f"\n{LEGEND}\n\n{env.get('cases', 'no case')}; {plots.draw(folder)}")
    return 1 if failed else 0


def default_folder(gpu: str, today: str | None = None) -> Path:
    """``bench/results/<gpu>-<date>``, the GPU's name in plain letters."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return Path(__file__).parent / "results" / f"{name}-{today or _today()}"


def _today() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d")


def measure_all(
    cases: list[tuple[Workload, str]], deadline: Deadline, settings: Settings, corpus: imdb.Corpus
) -> Iterator[Measured]:
    """Measures case after case while there is time. A case that breaks is a row that says so."""
    for workload, cell in cases:
        if not deadline.left:
            return
        try:
            yield measure(workload, cell, settings, corpus)
        except Exception as error:  # one broken case must not cost the others their turn
            note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            yield Measured(
                [
                    Row.of(workload, cell, provider, backend="", gate="failed", note=note)
                    for provider in names_for(workload, settings.device)
                    if provider != TORCH
                ],
                [],
                [f"{workload.name} {cell}: {error}"],
            )


def run_tests(folder: Path, seconds: float) -> tuple[bool, str]:
    """Runs ``pytest -m gpu tests`` into tests.txt; returns whether nothing failed, and a line."""
    if importlib.util.find_spec("pytest") is None:
        return True, "not run: pytest is not installed"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    command += ["-p", "no:cacheprovider"]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    output = folder / "tests.txt"
    with open(output, "w") as file:
        try:
            code = subprocess.run(
                command,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=seconds,
            ).returncode
        except subprocess.TimeoutExpired:
            return False, f"stopped after {seconds:.0f} s, see {output}"
    lines = output.read_text().strip().splitlines()
    return code == 0, (lines[-1].strip("= ") if lines else f"pytest left with code {code}")


def _start_watchdog(deadline: Deadline, folder: Path) -> None:
    """Ends the process if a case outlives the deadline: a kernel that hangs obeys no signal."""

    def end() -> None:
        print(
            f"\nthe time is over in the middle of a case; what was done is in {folder}", flush=True
        )
        os._exit(1)

    timer = threading.Timer(deadline.left + _GRACE_SECONDS, end)
    timer.daemon = True
    timer.start()
