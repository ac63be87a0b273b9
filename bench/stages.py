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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from fusedrnn.kernels.measured import shape_of
from fusedrnn.kernels.plan import chip_of

from . import imdb, plots, ragged
from .autotable import Files, problem_of, tune
from .cases import Workload
from .correctness import SCHEDULES
from .disk import mend, write_json
from .gauntlet import CORE, Case, cases_of
from .imdb import Corpus
from .progress import Progress
from .protocol import BLOCK, Prepared, line, measured, values_of
from .providers import TORCH
from .report import training_line
from .results import Loss, Results, Row
from .run import Measured, Settings, Subject, trained

#: What a process says by its exit code. 1 is what Python says of an exception that nobody caught.
DONE, LOST, RED = 0, 3, 4
#: For one comparison. On CUDA a case has four: forward and training, by wall and by device time.
SECONDS = {"lessons": 0.2, "sweep": 0.2, "autotable": 0.4}
#: A batch is what is warmed before any of it is timed. What is cut off costs a batch at most: so
#: many cases, and none is gated after so many seconds or a quarter of what is left.
MOST_IN_BATCH, GATING_SECONDS = 8, 10.0
#: Who trains.
TRAINED = (TORCH, "fusedrnn")
FORCED = {f"fusedrnn {schedule}": schedule for schedule in SCHEDULES}


class Job(NamedTuple):
    """One process: what it does, where to, for how long, and which cases.

    ``left_out`` are schedules that failed their tests; ``skip`` cases behind ``begin`` that are not
    to be done, and ``lost`` providers that broke a process.
    """

    stage: str
    folder: Path
    seconds: float
    device: str = "cuda"
    seed: int = 0
    quick: bool = False
    left_out: frozenset[str] = frozenset()
    begin: int = 0
    skip: frozenset[int] = frozenset()
    lost: frozenset[str] = frozenset()

    @property
    def command(self) -> list[str]:
        words = [sys.executable, "-m", "bench.stages", self.stage, "--folder", str(self.folder)]
        words += ["--seconds", f"{self.seconds:.1f}", "--device", self.device]
        words += ["--seed", str(self.seed), "--begin", str(self.begin)]
        words += ["--without", ",".join(sorted(self.left_out))] if self.left_out else []
        words += ["--skip", ",".join(map(str, sorted(self.skip)))] if self.skip else []
        words += ["--lost", ",".join(sorted(self.lost))] if self.lost else []
        return words + ["--quick"] * self.quick


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


class LostError(RuntimeError):
    """The device answers no more: after an assertion no kernel runs in the same process."""


class Worker:
    """Goes through the cases of a stage while there is time.

    Lessons and sweep go in batches by the protocol of ``protocol.py``; the rows of a case are on
    disk before the next one is timed.
    """

    def __init__(self, job: Job):
        self.job, self.device = job, torch.device(job.device)
        self.end = time.monotonic() + job.seconds
        self.results = Continued(job.folder)
        self.red: list[str] = []  # what was wrong, a sentence each
        self.settings = Settings(self.device, job.seed, seconds=SECONDS[job.stage])
        if job.quick:
            self.settings = Settings(self.device, job.seed, seconds=0.0, least_rounds=2)
        self.corpus = self._corpus() if job.stage == "lessons" else None
        self.files = Files(job.folder) if job.stage == "autotable" else None
        self.cases = cases_of(job.stage, job.quick)
        self.todo = [n for n in range(job.begin, len(self.cases)) if n not in job.skip]
        self.now: tuple[int | None, str] = (None, "")
        self.place: dict[str, object] = {}

    def _corpus(self) -> Corpus:
        words = [case.workload for case in cases_of("lessons", self.job.quick) if case.workload]
        needed = 2 * max(max(w.train, w.test) for w in words)
        corpus = imdb.load(seed=self.job.seed, reviews=min(needed, 25_000))
        self.results.note(self.results.env | {"data": corpus.source})
        return corpus

    def run(self) -> int:
        """``DONE``, ``RED`` if a case failed, or ``LOST``: this process can do no more."""
        longest = 0.0
        try:
            self._at(None)
            while self.todo and self.end - time.monotonic() >= longest:
                started, before = time.monotonic(), len(self.todo)
                self.do(self._batch())
                cases = before - len(self.todo)
                if not cases:  # the time ended before any of them was timed
                    break
                longest = max(0.7 * longest, (time.monotonic() - started) / cases)
            self._at(None)
        except LostError as error:
            index, provider = self.now
            if index in self.todo and (not provider or provider in CORE):
                self._failed(self.cases[index], error)
            return LOST
        return RED if self.red else DONE

    def _batch(self) -> list[int]:
        """The next cases: some that fit into memory together, or one that goes alone."""
        batch: list[int] = []
        values = 0
        for index in self.todo[:MOST_IN_BATCH]:
            workload = self.cases[index].workload
            values += values_of(workload) if workload else 0
            alone = workload is None or self.files
            if batch and (alone or values > BLOCK):
                break
            batch.append(index)
            if alone:
                break
        return batch

    def do(self, batch: list[int]) -> None:
        """Does some cases, and takes off the list what is done."""
        workload = self.cases[batch[0]].workload
        if workload is None or self.files:
            with self._guard(batch[0]):
                if self.files and workload:
                    self._tune(self.files, workload, self.cases[batch[0]].cell)
                else:
                    self._ragged()
                self.todo.remove(batch[0])
            return
        prepare = [partial(self._prepared, index) for index in batch]
        gating = min(GATING_SECONDS, (self.end - time.monotonic()) / 4)
        for n, prepared in measured(
            prepare, self.end, gating, lambda n, stage: self._guard(batch[n])
        ):
            self._finish(prepared, self.cases[batch[n]].late)
            self.todo.remove(batch[n])

    def _at(self, index: int | None, provider: str = "") -> None:
        """Writes down what is run from here on, and what is done.

        Raises:
            LostError: what ran before has cost us the device; the file still names that.
        """
        if not self._device_answers():
            raise LostError("the device answers no more")
        self.now = index, provider
        begin = self.todo[0] if self.todo else len(self.cases)
        ahead = range(begin, min(begin + MOST_IN_BATCH, len(self.cases)))
        self.place = {
            "case": "" if index is None else self.cases[index].name,
            "provider": provider,
            "index": begin if index is None else index,
            "begin": begin,
            "done": sorted(set(ahead) - set(self.todo)),
            "of": len(self.cases),
            "since": time.time(),
        }
        self._write_down()

    def _write_down(self) -> None:
        now = self.place | {"red": self.red}
        write_json(now_path(self.job.folder, self.job.stage), now)

    def _complain(self, complaint: str) -> None:
        """Tells and writes down at once: a process that is killed leaves no exit code."""
        print(complaint, file=sys.stderr, flush=True)
        self.red.append(complaint)
        self._write_down()

    @contextmanager
    def _guard(self, index: int) -> Iterator[None]:
        """Around a part of a case: one that breaks must not cost the others their turn."""
        self._at(index)
        try:
            yield
        except LostError:
            raise
        except Exception as error:
            self._failed(self.cases[index], error)
            self.todo.remove(index)
            if not self._device_answers():
                raise LostError("the device answers no more") from error

    def _prepared(self, index: int) -> Prepared:
        """A case, gated; the rows of those who do not take part say why."""
        case = self.cases[index]
        workload = case.workload
        assert workload is not None
        names = case.providers(self.device)
        out = {
            name: Row.of(workload, case.cell, name, backend="", gate="refused", note=note)
            for name, note in self._left_out(workload, case.cell, names).items()
        }
        for name in self.job.lost & set(names):
            note = "took its process with it at an earlier case, see status.json"
            out[name] = Row.of(workload, case.cell, name, backend="", gate="failed", note=note)
        prepared = Prepared(
            workload, case.cell, self.settings, [name for name in names if name not in out],
            self.corpus, partial(self._at, index),
        )  # fmt: skip
        made = prepared.rows | out
        prepared.rows = {name: made[name] for name in names}
        return prepared

    def _finish(self, prepared: Prepared, late: bool) -> None:
        """The short training of torch.nn and fusedrnn, if it is a lesson's, and the rows."""
        subject, rows, complaints = prepared.subject, prepared.rows, [*prepared.complaints]
        takes_part = subject.steps and not late
        able = [name for name in TRAINED if takes_part and rows[name].has_numbers]
        losses: list[Loss] = []
        try:
            if TORCH in able:
                losses = trained(subject, able, rows, Progress(None))
        except Exception as error:  # the times stand
            complaints.append(f"{subject.workload.name} {subject.cell}: training: {error}")
        shown = [row for name, row in rows.items() if not (late and name == TORCH)]
        self._add(Measured(shown, losses, complaints))

    def _tune(self, files: Files, workload: Workload, cell: str) -> None:
        chip = chip_of(self.device)

        def tell(problem, tried) -> None:
            shape = shape_of(problem, chip)
            assert shape is not None
            files.add_tried(shape, workload.T, tried)

        problem = problem_of(workload, cell, True)
        print(f"{workload.name} {cell} on {chip.name}, H = {problem.hidden_size}", flush=True)
        for winner in tune(workload, cell, self.settings, self.job.left_out, tell):
            files.add_winner(winner)
            _, cut, found = winner
            print(f"  {cut.schedule}: {found}, the model's {found.model_us:.2f}", flush=True)

    def _ragged(self) -> None:
        if self.job.left_out:
            print(f"ragged: left out with {', '.join(sorted(self.job.left_out))}", flush=True)
            return
        job = self.job
        code = ragged.run(job.folder, self.device, quick=job.quick, seed=job.seed, anew=False)
        if code != 0:
            self._complain("ragged: a gate is red, see ragged.csv")

    def _left_out(self, workload: Workload, cell: str, names: Iterable[str]) -> dict[str, str]:
        """Who is not to be run, because of a schedule that failed its tests."""
        if not self.job.left_out:
            return {}
        subject, found = Subject(workload, cell, self.settings, self.corpus), {}
        for name in names:
            told = None if name in FORCED else subject.explain(name)
            lines = told.layers if told else []
            taken = {FORCED[name]} if name in FORCED else {line.split(": ")[1] for line in lines}
            if failed := sorted(self.job.left_out & taken):
                found[name] = f"schedule {', '.join(failed)} failed its tests"
        return found

    def _failed(self, case: Case, error: Exception) -> None:
        text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        rows = []
        if case.workload is not None and not self.files:
            rows = [
                Row.of(case.workload, case.cell, name, backend="", gate="failed", note=text)
                for name in case.providers(self.device)
                if name != TORCH
            ]
        self._add(Measured(rows, [], [f"{case.name}: {error}"]))

    def _add(self, found: Measured) -> None:
        self.results.add(found.rows, found.losses)
        for row in found.rows:
            print(line(row), flush=True)
            if row.steps and row.final_loss is not None:
                print(f"{'':<20}{training_line(row)}", flush=True)
        for complaint in found.complaints:
            self._complain(complaint)

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
    add("--skip", default="", help="cases not to do, by their numbers")
    add("--lost", default="", help="providers not to run: they ended a process before")
    add("--quick", action="store_true")
    o = parser.parse_args(argv)
    if o.stage == "pictures":
        print(plots.draw(o.folder))
        return DONE
    without, lost, skip = (
        frozenset(filter(None, words.split(","))) for words in (o.without, o.lost, o.skip)
    )
    job = Job(o.stage, o.folder, o.seconds, o.device, o.seed, o.quick, without, o.begin)
    return Worker(job._replace(skip=frozenset(map(int, skip)), lost=lost)).run()


if __name__ == "__main__":
    sys.exit(main())
