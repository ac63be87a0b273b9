"""The stages of ``python -m bench gpu`` that measure, each a process of its own.

A kernel that hangs obeys no signal, and an assertion on the device takes the whole process with it:
``gpu.py`` starts ``python -m bench.stages NAME`` and, where that ends in the middle of a case,
starts it again behind it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fusedrnn.kernels.measured import shape_of
from fusedrnn.kernels.plan import chip_of

from . import imdb, plots, ragged
from .autotable import Files, problem_of, tune
from .cases import CELLS, LESSONS, Workload, cut_down, sweep
from .disk import mend, write_json
from .imdb import Corpus
from .providers import PROVIDERS, TORCH, names_for
from .report import table_line
from .results import Results, Row
from .run import Measured, Settings, Subject, measure

#: What a process says by its exit code.
DONE, RED, LOST = 0, 1, 3
#: In what order the sweep goes along its axes; of H and B it is the order of ``cases.sweep``.
_DTYPES = ("bfloat16", "float32", "float16")


class Case(NamedTuple):
    """Without a workload it is ``bench ragged``."""

    name: str
    workload: Workload | None
    cell: str


class Job(NamedTuple):
    """One process: what it does, where to, for how long, and from which case on."""

    stage: str
    folder: Path
    seconds: float
    device: str = "cuda"
    seed: int = 0
    quick: bool = False
    left_out: frozenset[str] = frozenset()
    begin: int = 0

    @property
    def command(self) -> list[str]:
        words = [sys.executable, "-m", "bench.stages", self.stage, "--folder", str(self.folder)]
        words += ["--seconds", f"{self.seconds:.1f}", "--device", self.device]
        words += ["--seed", str(self.seed), "--begin", str(self.begin)]
        words += ["--without", ",".join(sorted(self.left_out))] if self.left_out else []
        return words + ["--quick"] * self.quick


def cases_of(stage: str, quick: bool = False) -> list[Case]:
    """What a stage measures, in order."""
    if stage == "lessons":
        points = [(workload, cell) for workload in LESSONS for cell in CELLS]
    else:
        points = informative_first()
    cases = [
        Case(f"{workload.name} {cell}", cut_down(workload) if quick else workload, cell)
        for workload, cell in points
    ]
    return cases + [Case("ragged", None, "")] * (stage == "lessons")


def informative_first() -> list[tuple[Workload, str]]:
    """The sweep, so that wherever it is cut off no axis has been left at its first value.

    Each point's rank is the sum of its places along the axes: first the usual case of all, then its
    neighbour along every axis, then theirs.
    """
    points = list(sweep())
    batches = list(dict.fromkeys(w.B for w in points))
    sizes = list(dict.fromkeys(w.H for w in points))

    def rank(point: tuple[Workload, str]) -> int:
        w, cell = point
        places = batches.index(w.B), sizes.index(w.H), _DTYPES.index(w.dtype), CELLS.index(cell)
        return sum(places)

    return sorted(((workload, cell) for workload in points for cell in CELLS), key=rank)


class Continued(Results):
    """Results that are added to those the folder has."""

    def __init__(self, folder: Path):
        env = json.loads((folder / "environment.json").read_text())
        if not (folder / "losses.csv").exists():  # the second of the two that are begun
            super().__init__(folder, env)
        self.folder, self.env = folder, env
        for name in ("results.csv", "losses.csv"):
            mend(folder / name)

    def note(self, environment: dict[str, object]) -> None:
        write_json(self.folder / "environment.json", environment)


def now_path(folder: Path, stage: str) -> Path:
    """The file that says which case a stage is at, and since when."""
    return folder / f"{stage}-now.json"


class Worker:
    """Goes through the cases of a stage while there is time."""

    def __init__(self, job: Job):
        self.job, self.device = job, torch.device(job.device)
        self.end = time.monotonic() + job.seconds
        self.results, self.red = Continued(job.folder), False
        self.settings = Settings(self.device, job.seed, seconds=0.4)
        if job.quick:
            self.settings = Settings(self.device, job.seed, seconds=0.0, least_rounds=2)
        self.corpus = self._corpus() if job.stage == "lessons" else None
        self.files = Files(job.folder) if job.stage == "autotable" else None

    def _corpus(self) -> Corpus:
        words = [case.workload for case in cases_of("lessons", self.job.quick) if case.workload]
        needed = 2 * max(max(w.train, w.test) for w in words)
        corpus = imdb.load(seed=self.job.seed, reviews=min(needed, 25_000))
        self.results.note(self.results.env | {"data": corpus.source})
        return corpus

    def run(self) -> int:
        """``DONE``, ``RED`` if a case failed, or ``LOST``: this process can do no more."""
        cases, longest = cases_of(self.job.stage, self.job.quick), 0.0
        for index in range(self.job.begin, len(cases)):
            if self.end - time.monotonic() < longest:
                self._at(index, len(cases), "")
                break
            started = time.monotonic()
            self._at(index, len(cases), cases[index].name)
            try:
                self.do(cases[index])
            except Exception as error:  # one broken case must not cost the others their turn
                self._failed(cases[index], error)
                if not self._device_answers():
                    return LOST
            longest = max(0.7 * longest, time.monotonic() - started)
        else:
            self._at(len(cases), len(cases), "")
        return RED if self.red else DONE

    def _at(self, index: int, of: int, name: str) -> None:
        now = {"case": name, "index": index, "of": of, "since": time.time()}
        write_json(now_path(self.job.folder, self.job.stage), now)

    def do(self, case: Case) -> None:
        if case.workload is None:
            self._ragged()
        elif self.files:
            self._tune(self.files, case.workload, case.cell)
        else:
            self._measure(case.workload, case.cell)

    def _measure(self, workload: Workload, cell: str) -> None:
        if left_out := self._left_out(workload, cell):
            note = f"schedule {', '.join(left_out)} failed its tests"
            self._add(Measured(self._rows(workload, cell, "refused", note), [], []))
        else:
            self._add(measure(workload, cell, self.settings, self.corpus))

    def _tune(self, files: Files, workload: Workload, cell: str) -> None:
        chip = chip_of(self.device)

        def tell(problem, tried) -> None:
            shape = shape_of(problem, chip)
            assert shape is not None
            files.add_tried(shape, workload.T, tried)

        problem = problem_of(workload, cell, True)
        print(f"{workload.name} {cell} on {chip.name}, H = {problem.hidden_size}", flush=True)
        for line in tune(workload, cell, self.settings, self.job.left_out, tell):
            files.add_winner(line)
            print(
                f"  {line[1].schedule}: {line[2]}, the model's {line[2].model_us:.2f}", flush=True
            )

    def _ragged(self) -> None:
        if self.job.left_out:
            print(f"ragged: left out with {', '.join(sorted(self.job.left_out))}", flush=True)
            return
        job = self.job
        code = ragged.run(job.folder, self.device, quick=job.quick, seed=job.seed, anew=False)
        self.red |= code != 0

    def _left_out(self, workload: Workload, cell: str) -> list[str]:
        """The schedules of this case that are not to be run."""
        if not self.job.left_out:
            return []
        subject = Subject(workload, cell, self.settings, self.corpus)
        told = [subject.explain(name) for name in names_for(workload, self.device)]
        lines = [line for explanation in told if explanation for line in explanation.layers]
        return sorted(self.job.left_out & {line.split(": ")[1] for line in lines})

    def _failed(self, case: Case, error: Exception) -> None:
        text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        complaint = [f"{case.name}: {error}"]
        rows = []
        if case.workload is not None and not self.files:
            rows = self._rows(case.workload, case.cell, "failed", text)
        self._add(Measured(rows, [], complaint))

    def _rows(self, workload: Workload, cell: str, gate: str, note: str) -> list[Row]:
        return [
            Row.of(workload, cell, provider, backend="", gate=gate, note=note)
            for provider in names_for(workload, self.device)
            if provider != TORCH and provider in PROVIDERS
        ]

    def _add(self, measured: Measured) -> None:
        self.results.add(measured.rows, measured.losses)
        for row in measured.rows:
            print(table_line(row), flush=True)
        for complaint in measured.complaints:
            print(complaint, file=sys.stderr, flush=True)
            self.red = True

    def _device_answers(self) -> bool:
        """Whether a failure left the process its device: no kernel runs after an assertion."""
        if self.device.type != "cuda":
            return True
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            return False
        return True


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.stages", description=__doc__)
    add = parser.add_argument
    add("stage", choices=("lessons", "sweep", "autotable", "pictures"))
    add("--folder", type=Path, required=True)
    add("--seconds", type=float, default=60.0)
    add("--device", default="cuda")
    add("--seed", type=int, default=0)
    add("--begin", type=int, default=0)
    add("--without", default="", help="schedules to leave out, with commas between them")
    add("--quick", action="store_true")
    o = parser.parse_args(argv)
    if o.stage == "pictures":
        print(plots.draw(o.folder))
        return DONE
    left_out = frozenset(filter(None, o.without.split(",")))
    return Worker(
        Job(o.stage, o.folder, o.seconds, o.device, o.seed, o.quick, left_out, o.begin)
    ).run()


if __name__ == "__main__":
    sys.exit(main())
