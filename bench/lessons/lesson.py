"""The form of a lesson."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..data import Corpus

#: One colour for each cell in every picture.
COLOURS = {"rnn": "#555555", "lstm": "#d1495b", "gru": "#2e86ab"}
CELLS = tuple(COLOURS)


class Setting(NamedTuple):
    """The seed, whether sizes are tiny, and the reviews: ``corpus(how many of each split)``."""

    seed: int
    quick: bool
    corpus: Callable[[int], Corpus]


#: Lines to print, and a function that paints a matplotlib figure, or None without a picture.
Result = tuple[Sequence[str], Callable[[Any], None] | None]


class Lesson(NamedTuple):
    """An experiment: a title, a sentence on what to look at, and the function that runs it."""

    title: str
    look_at: str
    run: Callable[[Setting], Result]
