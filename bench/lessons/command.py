"""``python -m bench lesson NAME``: numbers as JSON, a picture, and a short table."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import imdb
from ..archives import DataError
from ..progress import Progress
from ..results import FolderError
from ..text import DEFAULT_FOLDER, folder_for
from . import by_hand, forecasts, gates, parameters, reviews, temperature, vanishing
from .lesson import Lesson, LessonError, Numbers, Setting

LESSONS: dict[str, Lesson] = {
    "vanishing": vanishing.LESSON,
    "gates": gates.LESSON,
    "curves": forecasts.CURVES,
    "length": forecasts.LENGTH,
    "parameters": parameters.LESSON,
    "sentiment": reviews.SENTIMENT,
    "embeddings": reviews.EMBEDDINGS,
    "temperature": temperature.LESSON,
    "numpy": by_hand.LESSON,
    "price": forecasts.PRICE_LESSON,
}
FORMATS = (".png", ".svg")


def execute(options: argparse.Namespace) -> int:
    """Returns the exit code: 0, 1 if a lesson's numbers are wrong, 2 for what the user can mend."""
    name = options.name
    if name is None:
        print(listing())
        return 0
    if name not in LESSONS:
        print(f"{options.prog}: there is no lesson {name!r}\n{listing()}", file=sys.stderr)
        return 2
    if options.figure and options.figure.suffix not in FORMATS:
        print(f"{options.prog}: a figure ends in {' or '.join(FORMATS)}", file=sys.stderr)
        return 2

    def corpus(count: int) -> imdb.Corpus:
        return imdb.load(
            options.imdb,
            download=options.download,
            seed=options.seed,
            reviews=min(count, 25_000),
        )

    progress = Progress(None if options.quick else LESSONS[name].steps)
    setting = Setting(options.seed, options.quick, corpus, options.words, progress)
    try:
        return run(name, setting, options.out, options.figure)
    except (DataError, FolderError, LessonError) as error:
        print(f"{options.prog}: {error}", file=sys.stderr)
        return 2


def listing() -> str:
    """The lessons' names with a sentence each."""
    return "\n".join(f"{name:<12} {lesson.sentence}" for name, lesson in LESSONS.items())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that are a lesson's own."""
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="which; without one they are listed")
    add("--figure", type=Path, metavar="FILE", help="the picture, .png or .svg by its name")
    add("--words", type=Path, metavar="FILE", help="Keras' imdb_word_index.json, for embeddings")


def run(name: str, setting: Setting, out: Path | None = None, figure: Path | None = None) -> int:
    """Measures, prints, and leaves ``lesson-NAME.json`` and ``lesson-NAME.png`` in the folder.

    Args:
        name: one of ``LESSONS``.
        setting: seed, size and data.
        out: the folder; None means ``bench/results/local``.
        figure: another place for the picture; its suffix is the format.

    Returns:
        0, or 1 if the numbers are wrong.

    Raises:
        FolderError: the folder or the picture cannot be written.
        LessonError: the lesson cannot be run.
        DataError: the reviews cannot be read.
    """
    started = time.monotonic()
    lesson, folder = LESSONS[name], folder_for(out or DEFAULT_FOLDER)
    print(f"lesson   {name}: {lesson.sentence}")
    if setting.quick:
        print("quick    tiny sizes: none of these numbers means anything")
    try:
        with one_thread():
            measured = lesson.measure(setting)
    except NotImplementedError as error:  # of a backend that FUSEDRNN_BACKEND names
        raise LessonError(f"{name} cannot be run so: {error}") from error
    setting.progress.close()
    numbers = {
        "lesson": name,
        "seed": setting.seed,
        "quick": setting.quick,
        "torch": torch.__version__,
        **measured,
    }
    if "backends" in numbers:
        print(f"backend  {_backends(numbers['backends'])}")
    for line in lesson.table(numbers):
        print(line)
    path = folder / f"lesson-{name}.json"
    path.write_text(json.dumps(numbers, indent=1, allow_nan=False) + "\n")
    said = picture(lesson, numbers, figure or path.with_suffix(".png"))
    print(f"{time.monotonic() - started:.0f} s; {path} and {said}")
    if complaint := lesson.fault(numbers):
        print(complaint, file=sys.stderr)
        return 1
    return 0


@contextmanager
def one_thread() -> Iterator[None]:
    """So small steps only wait for a second thread, and sums do not depend on how many there are.

    On two cores that others used as well, ``curves`` took 150 s with two threads and 6 s with one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _backends(backends: dict[str, Any]) -> str:
    """fusedrnn's backends, and where several ran, by what each ran."""
    ran: dict[str, list[str]] = {}
    for name, of in backends.items():
        by_length = of if isinstance(of, dict) else {"": of}
        for backend in dict.fromkeys(by_length.values()):
            lengths = ", ".join(T for T, other in by_length.items() if other == backend and T)
            ran.setdefault(backend, []).append(f"{name} T={lengths}" if lengths else name)
    if len(ran) == 1:
        return f"fusedrnn {next(iter(ran))}"
    return "; ".join(f"fusedrnn {backend}: {', '.join(names)}" for backend, names in ran.items())


def picture(lesson: Lesson, numbers: Numbers, path: Path) -> str:
    """Draws into a file, whose suffix is the format; says which, or why there is none.

    An SVG has no date and no random names: equal numbers give equal files.

    Raises:
        FolderError: it cannot be written.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return "no picture: matplotlib is not installed"
    figure = Figure(figsize=(7, 4), layout="constrained")
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context({"svg.hashsalt": "fusedrnn", "svg.fonttype": "none", "path.simplify": True}):
        lesson.draw(figure, numbers)
        try:
            figure.savefig(path, dpi=110, metadata=nothing if path.suffix == ".svg" else None)
        except OSError as error:
            raise FolderError(f"no picture can be written to {path}: {error.strerror}") from error
    return str(path)
