"""``python -m bench gpu``: everything a CUDA machine can tell, in one command and a fixed time.

First the tests, then compute-sanitizer, the lessons, a sweep of sizes against cuDNN, and which
plans are the fastest. It needs no network and no installation. Whatever computes on the device is a
process of its own with a limit, and every result is on disk before the next is measured: a run that
is cut off has lost nothing but what it was doing. docs/gpu.md says what lands where.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch

from . import correctness, sanitizer
from .correctness import SCHEDULES
from .disk import mend, write_json
from .gauntlet import CORE, cases_of
from .protocol import HEAD, LEGEND, roll, who
from .report import environment, header
from .results import FolderError, other_columns
from .stages import DONE, LOST, RED, Job, now_path
from .supervise import Ended, Signals, Stopped, supervise

#: A stage that ends by itself this long before its limit need not be killed.
_MARGIN_SECONDS = 4.0
#: In less a process has not even imported torch.
_LEAST_SECONDS = 5.0
#: How often a stage is begun again behind a case that took its process with it.
_MOST_RESTARTS = 5
#: Of a long list of cases, how many ``--dry-run`` names.
_SHOWN = 400
#: Complaints in the summary's line of a stage; all of them are in the output.
_TOLD = 3
#: At the end of the run, for the pictures.
_PICTURE_SECONDS = 10.0


class NoDeviceError(RuntimeError):
    """A GPU was asked for and there is none; the message says so in one sentence."""


class OptionError(ValueError):
    """The options contradict each other; the message is one sentence."""


class Stage(NamedTuple):
    """``share`` is of the time; what a stage leaves over goes to those behind it."""

    name: str
    share: float
    what: str
    case_seconds: float = 0.0  # after which a case counts as hung


STAGES = (
    Stage("correctness", 0.35, "the tests that have something to say on a device"),
    Stage("sanitizer", 0.10, "compute-sanitizer over one small case a schedule"),
    Stage("lessons", 0.15, "the lessons by all who are there, and unequal lengths", 120.0),
    Stage("sweep", 0.25, "steps, sizes, batches, dtypes and kinds beside torch.nn", 60.0),
    Stage("autotable", 0.15, "which plan is the fastest at the points of the sweep", 120.0),
)
NAMES = tuple(stage.name for stage in STAGES)


class Options(NamedTuple):
    """What a run does. ``keep_failing``: what failed its tests is measured all the same."""

    minutes: float = 9.0
    only: tuple[str, ...] = NAMES
    quick: bool = False
    seed: int = 0
    keep_failing: bool = False

    @property
    def stages(self) -> list[Stage]:
        return [stage for stage in STAGES if stage.name in self.only]


def parse_only(text: str | None) -> tuple[str, ...]:
    """The stages of ``--only``, names with commas between them.

    Raises:
        OptionError: a name is not one of ``NAMES``.
    """
    names = [name.strip() for name in (text or ",".join(NAMES)).split(",")]
    for name in names:
        if name not in NAMES:
            raise OptionError(f"--only {name!r}: the stages are {', '.join(NAMES)}")
    return tuple(names)


def run(options: Options, folder: Path | None = None) -> int:
    """Tests, measures and writes on the current GPU until done or the time is over.

    Args:
        options: what to do.
        folder: of the results; default ``bench/results/<gpu>-<date>``.

    Returns:
        0; 1 if a test failed, a gate was red or a case broke; 128 and more after a signal.

    Raises:
        NoDeviceError: torch sees no GPU.
        OptionError: the folder has results already, and no stages are named.
    """
    if not torch.cuda.is_available():
        raise NoDeviceError("gpu needs a CUDA device, and torch sees none; nothing was run")
    device = torch.device("cuda", torch.cuda.current_device())
    goes_on = options.only != NAMES
    folder = folder or default_folder(torch.cuda.get_device_name(device), goes_on=goes_on)
    if not goes_on and (folder / "status.json").exists():
        raise OptionError(f"{folder} has results already: name another --out, or --only STAGES")
    return Run(options, folder, device).run()


class Run:
    """One run on one device. A CPU will do as a device where Triton interprets."""

    def __init__(self, options: Options, folder: Path, device: torch.device):
        self.options, self.folder, self.device = options, folder, device
        self.end = time.monotonic() + 60 * options.minutes
        self.failed, self.left_out = False, frozenset[str]()
        self.status: dict = {"state": "running", "stages": {}, "left_out": []}

    @property
    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    def run(self) -> int:
        env = self._begin()
        print(f"{header(env)}\n{roll(self.here)}", flush=True)
        with Signals() as signals:
            self.signals = signals
            try:
                self._stages()
                self._note("done")
                code = 1 if self.failed else 0
            except Stopped as stopped:
                self._note(f"stopped by {stopped}")
                code = 128 + stopped.signum
        print(f"\n{LEGEND}\n\n{self.summary()}", flush=True)
        return code

    def _begin(self) -> dict[str, object]:
        """The folder with its environment. What earlier stages found there still holds."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            status, told = self.folder / "status.json", self.folder / "environment.json"
            if status.exists():
                self.status = json.loads(status.read_text())
                self.left_out = frozenset(self.status["left_out"])
            if (old := other_columns(self.folder)) is not None:
                raise FolderError(f"{old} has other columns than are written now: name another DIR")
            self.here = who(self.device)
            env = environment(self.device, "random input") | self.here | surroundings(self.options)
            if told.exists():  # what it says of the data is the lessons' to say
                env["data"] = json.loads(told.read_text())["data"]
            write_json(told, env)
            self._note("running")
        except OSError as error:
            raise FolderError(
                f"no results can be written to {self.folder}: {error.strerror}"
            ) from error
        return env

    def _note(self, run_state: str, stage: str = "", **found: object) -> None:
        """Writes status.json; ``found`` is of the stage, if one is named, or of the run."""
        self.status["state"], self.status["left_out"] = run_state, sorted(self.left_out)
        self.status["updated"] = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
        target = self.status["stages"].setdefault(stage, {}) if stage else self.status
        target.update(found)
        write_json(self.folder / "status.json", self.status)

    def _stages(self) -> None:
        stages = self.options.stages
        for place, stage in enumerate(stages):
            rest = sum(other.share for other in stages[place:])
            seconds = max(0.0, self.left - _PICTURE_SECONDS) * stage.share / rest
            self._note("running", stage.name, state="running", limit_s=round(seconds, 1))
            print(f"\n{stage.name}: {stage.what}, {seconds:.0f} s", flush=True)
            if seconds < _LEAST_SECONDS:
                self._note("running", stage.name, state="skipped", text="no time was left")
                continue
            started = time.monotonic()
            work = _WORK.get(stage.name, Run._cases)
            try:
                ok, text = work(self, stage, seconds)
            except Stopped as stopped:
                self._note("running", stage.name, state=f"stopped by {stopped}")
                raise
            taken = round(time.monotonic() - started, 1)
            state = "ok" if ok else "failed"
            self._note("running", stage.name, state=state, text=text, seconds=taken)
            print(f"{stage.name}: {state}, {text}", flush=True)
            self.failed |= not ok
        if {"lessons", "sweep"} & set(self.options.only):
            self._pictures()

    def _correctness(self, stage: Stage, seconds: float) -> tuple[bool, str]:
        """Group by group; a schedule that fails is left out from here on."""
        end, groups = time.monotonic() + seconds, {}
        failed = []
        for place, group in enumerate(correctness.GROUPS):
            rest = sum(other.share for other in correctness.GROUPS[place:])
            share = max(0.0, end - time.monotonic()) * group.share / rest
            verdict = correctness.run_group(group, self.folder, share, self.signals)
            print(f"  {group.name}: {verdict.text}", flush=True)
            groups[group.name] = {"failed": verdict.failed, "text": verdict.text}
            if verdict.failed:
                failed.append(group.name)
            if verdict.failed and group.name in SCHEDULES and not self.options.keep_failing:
                self.left_out |= {group.name}
            self._note("running", stage.name, groups=groups)
        texts = "; ".join(f"{name} {found['text']}" for name, found in groups.items())
        return not failed, texts

    def _sanitizer(self, stage: Stage, seconds: float) -> tuple[bool, str]:
        program = sanitizer.find()
        if program is None:
            return True, sanitizer.not_found()
        end, found = time.monotonic() + seconds, []
        todo = sanitizer.batches(self.left_out)
        for place, batch in enumerate(todo):
            left = end - time.monotonic()
            if left <= 0:
                break
            outcomes = sanitizer.run_batch(
                batch, program, self.folder, sanitizer.share_of(place, left), self.signals,
                self.device.type,
            )  # fmt: skip
            print(f"  {batch}: {', '.join(outcomes)}", flush=True)
            found += outcomes
        counts = ", ".join(f"{found.count(o)} {o}" for o in dict.fromkeys(found))
        every = sum(len(batch.schedules) for batch in todo)
        text = f"{len(found)} of {every} cases: {counts or 'none'}"
        return not {"errors", "wrong"} & set(found), text

    def _cases(self, stage: Stage, seconds: float) -> tuple[bool, str]:
        """A stage of ``stages.py``, begun again without whatever breaks its process.

        A provider of others' code goes for the rest of the stage, and its case is done again; of
        what is in every case, the case goes.
        """
        end = time.monotonic() + seconds
        red: list[str] = []
        broken: list[str] = []
        job = Job(
            stage.name, self.folder, 0.0, self.device.type, self.options.seed, self.options.quick,
            self.left_out,
        )  # fmt: skip
        if stage.name != "autotable":
            print(HEAD, flush=True)
        while True:
            now_path(self.folder, stage.name).unlink(missing_ok=True)
            left = max(0.0, end - time.monotonic())
            job = job._replace(seconds=max(0.0, left - _MARGIN_SECONDS))
            ended = supervise(job.command, None, left, self.signals, complaint=self._hangs(stage))
            now, over = self._now(stage.name), ended.why.startswith("stopped after")
            red += now["red"] if now else []
            if over or (not ended.why and ended.code in (DONE, RED)):
                break
            reason = _reason(ended)
            if now is None:
                return False, f"{reason} before the first case"
            where = f"{now['case']} {now['provider']}".strip() or "between cases"
            broken.append(f"{where} ({reason})")
            self._note("running", stage.name, broken=broken)
            print(f"  {broken[-1]}", flush=True)
            job = _without(job, now)
            if len(broken) > _MOST_RESTARTS:
                break
        text = f"{now['begin']} of {now['of']} cases" if now else "no case"
        text += f", broken: {'; '.join(broken)}" if broken else ""
        text += f", red: {_first_of(red)}" if red else ""
        return not (red or broken), text + (f", {ended.why}" if over else "")

    def _now(self, name: str) -> dict | None:
        path = now_path(self.folder, name)
        return json.loads(path.read_text()) if path.exists() else None

    def _hangs(self, stage: Stage) -> Callable[[], str]:
        """Says so when the process has been at one thing for too long."""

        def complaint() -> str:
            now = self._now(stage.name)
            if now is None or not now["case"]:
                return ""
            return "hung" if time.time() - now["since"] > stage.case_seconds else ""

        return complaint

    def _pictures(self) -> None:
        for name in ("results.csv", "losses.csv"):
            mend(self.folder / name)
        if (self.folder / "losses.csv").exists():
            job = Job("pictures", self.folder, 0.0, self.device.type)
            limit = max(_PICTURE_SECONDS, self.left)
            ended = supervise(job.command, None, limit, self.signals)
            if ended.code != 0:
                self._note("running", pictures=_reason(ended))

    def summary(self) -> str:
        """What status.json says, in a line for each stage."""
        lines = [f"{self.status['state']}; results in {self.folder}"]
        for name, found in self.status["stages"].items():
            lines.append(f"{name + ':':<13} {found['state']}; {found.get('text', 'not finished')}")
        if self.left_out:
            lines.append(f"left out:     {', '.join(sorted(self.left_out))} (failed its tests)")
        return "\n".join(lines)


_WORK = {"correctness": Run._correctness, "sanitizer": Run._sanitizer}


def _without(job: Job, now: dict) -> Job:
    """The rest of the job, without what the process was at when it broke."""
    skip = job.skip | set(now["done"])
    provider = now["provider"]
    if provider and provider not in CORE:
        return job._replace(begin=now["begin"], skip=skip, lost=job.lost | {provider})
    return job._replace(begin=now["begin"], skip=skip | {now["index"]})


def _first_of(complaints: list[str]) -> str:
    """The first few, in one line, and how many there are beside them."""
    told = [" ".join(complaint.split())[:200] for complaint in complaints[:_TOLD]]
    more = [f"{len(complaints) - _TOLD} more"] * (len(complaints) > _TOLD)
    return "; ".join([*told, *more])


def _reason(ended: Ended) -> str:
    if ended.why:
        return ended.why
    return "the device was lost" if ended.code == LOST else f"its process left with {ended.code}"


def surroundings(options: Options) -> dict[str, object]:
    """What ``report.environment`` does not know: the driver, the clocks, options and switches."""
    prefixes = ("FUSEDRNN_", "TRITON_", "CUDA_", "PYTORCH_", "NVIDIA_TF32")
    return {
        "nvidia_smi": _nvidia_smi(),
        "options": options._asdict(),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(prefixes)},
    }


_QUERY = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "power.limit", "temperature.gpu", "memory.total",
)  # fmt: skip


def _nvidia_smi() -> dict[str, str] | str:
    """The driver and the clocks as they stand; nothing is set."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "not found"
    command = [program, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader", "--id=0"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"failed: {error}"
    values = [value.strip() for value in found.stdout.strip().split(",")]
    if found.returncode or len(values) != len(_QUERY):
        return f"failed: {(found.stderr or found.stdout).strip()}"
    return dict(zip(_QUERY, values, strict=True))


def describe(options: Options) -> str:
    """What a run would do, for ``--dry-run``: stages, their time, and every case in order."""
    total = sum(stage.share for stage in options.stages)
    seconds = 60 * options.minutes - _PICTURE_SECONDS
    lines = [f"{options.minutes:g} minutes; what a stage leaves over goes to those behind it"]
    for stage in options.stages:
        lines.append(f"\n{stage.name}: {seconds * stage.share / total:.0f} s; {stage.what}")
        lines += [f"  {line}" for line in _plan_of(stage, options)]
    return "\n".join(lines)


def _plan_of(stage: Stage, options: Options) -> list[str]:
    if stage.name == "correctness":
        return [
            f"{group.name} ({group.share:.0%}): {' '.join(correctness.command_of(group)[1:])}"
            for group in correctness.GROUPS
        ]
    if stage.name == "sanitizer":
        program = sanitizer.find()
        found = f"with {program}" if program else sanitizer.not_found()
        return [found, *map(str, sanitizer.batches())]
    cases = cases_of(stage.name, options.quick)
    rows = whole_lines([case.name for case in cases[:_SHOWN]])
    more = [f"and {len(cases) - _SHOWN} more"] * (len(cases) > _SHOWN)
    return [f"{len(cases)} cases, as many as the time allows, in this order:", *rows, *more]


def whole_lines(words: Sequence[str], width: int = 110) -> list[str]:
    """Words with commas between them, in lines of at most ``width`` characters."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) + 2 > width:
            lines.append("")
        lines[-1] += f"{', ' if lines[-1] else ''}{word}"
    return lines


def default_folder(gpu: str, today: str | None = None, *, goes_on: bool = False) -> Path:
    """``bench/results/<gpu>-<date>``, the GPU's name in plain letters, and a number if need be.

    With ``goes_on`` it is the last one of the day, else one that has no results yet.
    """
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    today = today or datetime.now(timezone.utc).strftime("%Y-%m-%d")
    first = last = Path(__file__).parent / "results" / f"{name}-{today}"
    number = 1
    folder = first
    while (folder / "status.json").exists():
        last, number = folder, number + 1
        folder = first.with_name(f"{first.name}-{number}")
    return last if goes_on else folder
