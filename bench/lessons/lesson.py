"""The form of a lesson."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

#: One colour for each cell in every picture.
COLOURS = {"rnn": "#555555", "lstm": "#d1495b", "gru": "#2e86ab"}
CELLS = tuple(COLOURS)


#: Lines to print, and a function that paints a matplotlib figure, or None without a picture.
Result = tuple[Sequence[str], Callable[[Any], None] | None]


class Lesson(NamedTuple):
    """An experiment: a title, a sentence on what to look at, and the function that runs it.

    The function takes the options of the command: ``seed``, ``quick``, ``imdb`` and ``download``.
    """

    title: str
    look_at: str
    run: Callable[[Namespace], Result]
