"""``python -m bench lesson NAME``: runs one experiment, prints its table and draws its picture."""

import argparse
from types import ModuleType

import torch

from .. import DEFAULT_FOLDER, UserError
from . import by_hand, lengths, price, reviews, sine, temperature, vanishing

_MODULES = by_hand, vanishing, sine, price, lengths, reviews, temperature
LESSONS: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2].replace("_", "-"): module for module in _MODULES
}


def run(options: argparse.Namespace) -> int:
    """Runs a lesson on one thread of the CPU; returns 0.

    The picture is ``lesson-NAME.png`` in the folder of ``--out`` unless ``--figure`` names a file.
    """
    titles = {name: (module.__doc__ or "").splitlines()[0][:-1] for name, module in LESSONS.items()}
    if options.lesson is None:
        print("\n".join(f"{name:<12} {title}" for name, title in titles.items()))
        return 0
    if options.lesson not in LESSONS:
        raise UserError(f"there is no lesson {options.lesson!r}: they are {', '.join(LESSONS)}")
    print(f"{options.lesson}: {titles[options.lesson]}\n")
    before = torch.get_num_threads()
    # The steps are so small that a second thread costs more than it computes.
    torch.set_num_threads(1)
    try:
        lines, draw = LESSONS[options.lesson].run(options)
    finally:
        torch.set_num_threads(before)
    print("\n".join(lines))
    print(f"\nLook at: {LESSONS[options.lesson].LOOK_AT}")
    if draw is None:
        return 0
    file = options.figure or (options.out or DEFAULT_FOLDER) / f"lesson-{options.lesson}.png"
    try:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        draw(figure)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=80)
    except (ImportError, OSError, ValueError) as error:
        raise UserError(f"the picture cannot be written to {file}: {error}") from error
    print(f"Picture: {file}")
    return 0
