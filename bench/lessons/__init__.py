"""Experiments of a course on recurrent networks, one file a lesson: ``python -m bench lesson``.

Of each file the first line is the title, and ``LOOK_AT`` says what to look at. ``run`` takes the
options of the command: ``seed``, ``quick``, ``imdb`` and ``download``.
"""

from collections.abc import Callable, Sequence
from typing import Any

#: Lines to print, and a function that paints a matplotlib figure, or None without a picture.
Result = tuple[Sequence[str], Callable[[Any], None] | None]
#: One colour for each cell in every picture.
COLOURS = {"rnn": "#555555", "lstm": "#d1495b", "gru": "#2e86ab"}
CELLS = tuple(COLOURS)
