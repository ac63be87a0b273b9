"""Experiments of a course on recurrent networks, one file a lesson: ``python -m bench lesson``.

Of each file the first line is the title, and ``LOOK_AT`` says what to look at. ``run`` takes the
options of the command: ``seed``, ``quick``, ``imdb`` and ``download``.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..cases import Workload
from ..models import Examples, Model, Training, remember, train
from ..providers import build

#: Lines to print, and a function that paints a matplotlib figure, or None without a picture.
Result = tuple[Sequence[str], Callable[[Any], None] | None]
#: One colour for each cell in every picture.
COLOURS = {"rnn": "#555555", "lstm": "#d1495b", "gru": "#2e86ab"}
CELLS = tuple(COLOURS)


def fit(
    cell: str, workload: Workload, examples: Examples, options: Namespace, steps: int = 200, *,
    remembers: bool = False,
) -> tuple[Model, Training]:  # fmt: skip
    """Trains the model of a workload, with ``--quick`` a few steps."""
    torch.manual_seed(options.seed)
    model = Model(build("fusedrnn", cell, workload), workload)
    if remembers:
        remember(model.rnn)
    return model, train(model, workload, examples, 5 if options.quick else steps, options.seed)
