"""What a lesson is: numbers measured from a seed, a short table of them, and a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fusedrnn

from ..imdb import Corpus
from ..progress import Progress

#: Lessons are small: a GPU would not be faster, and equal seeds give equal numbers on the CPU.
DEVICE = torch.device("cpu")
#: One colour for each cell in every picture.
COLOURS = {"rnn": "#555555", "lstm": "#d1495b", "gru": "#2e86ab"}
CELLS = tuple(COLOURS)

#: What ``measure`` found: str, numbers, lists and dicts of them, as JSON has them.
Numbers = dict[str, Any]


class LessonError(ValueError):
    """The lesson cannot be run; the message is one sentence."""


@dataclass(frozen=True)
class Setting:
    """What a lesson is run with.

    Attributes:
        seed: of weights, examples and their order.
        quick: tiny sizes: tests the machinery.
        corpus: gives the reviews; the argument is how many made-up ones a split has.
        words: Keras' ``imdb_word_index.json``, to name tokens by their words.
        progress: told what is being done.
    """

    seed: int = 0
    quick: bool = False
    corpus: Callable[[int], Corpus] = field(default=lambda reviews: _no_reviews())
    words: Path | None = None
    progress: Progress = field(default_factory=lambda: Progress(None))


def _no_reviews() -> Corpus:
    raise LessonError("this lesson reads reviews, and was given none")


@dataclass(frozen=True)
class Lesson:
    """One experiment.

    Attributes:
        sentence: what it shows.
        measure: runs it; equal seeds give equal numbers.
        table: its lines on stdout.
        draw: paints the picture into a ``matplotlib.figure.Figure``.
        fault: what the numbers prove wrong, in a sentence, or "".
        steps: training steps of the whole, for the progress bar; None: too few to wait for.
    """

    sentence: str
    measure: Callable[[Setting], Numbers]
    table: Callable[[Numbers], Iterable[str]]
    draw: Callable[[Any, Numbers], None]
    fault: Callable[[Numbers], str] = lambda numbers: ""
    steps: int | None = None


def backend_of(rnn: nn.Module, input: Tensor | PackedSequence) -> str:
    """The backend that trains ``rnn`` on ``input``: ``"triton"``, ``"aten"`` or ``"torch"``."""
    return fusedrnn.explain(rnn, input).backend or ""
