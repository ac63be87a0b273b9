"""How many parameters a recurrent network has: by formula, and counted in the module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..cases import TRAINED, Workload
from ..providers import build
from .lesson import CELLS, COLOURS, Lesson, Numbers, Setting

#: G: how many blocks of H rows W_ih and W_hh have.
GATES = {"rnn": 1, "gru": 3, "lstm": 4}


def by_formula(cell: str, workload: Workload) -> int:
    """Of each layer and direction G H (I + H + 2): W_ih, W_hh and the two biases.

    The I of a layer above the first is what the directions below it put out: D H.
    """
    G, H, D = GATES[cell], workload.H, 2 if workload.bidirectional else 1
    widths = [workload.I, *[D * H] * (workload.layers - 1)]
    return sum(D * G * H * (width + H + 2) for width in widths)


def by_module(cell: str, workload: Workload) -> int:
    rnn = build("fusedrnn", cell, workload)
    return sum(parameter.numel() for parameter in rnn.parameters())


def measure(setting: Setting) -> Numbers:
    # Sequence lengths do not matter: of the five sines one is enough.
    seen, chosen = set(), []
    for workload in TRAINED:
        if workload.task not in seen:
            seen.add(workload.task)
            chosen.append(workload)
    return {
        "shapes": {w.name: w.shape for w in chosen},
        "formula": {w.name: {cell: by_formula(cell, w) for cell in CELLS} for w in chosen},
        "module": {w.name: {cell: by_module(cell, w) for cell in CELLS} for w in chosen},
    }


def table(numbers: Numbers) -> Iterator[str]:
    yield f"{'workload':<16}{'cell':<6}{'formula':>10}{'module':>10}{'of RNN':>8}   shape"
    for name, counts in numbers["formula"].items():
        for cell, count in counts.items():
            module, times = numbers["module"][name][cell], count / counts["rnn"]
            shape = numbers["shapes"][name]
            yield f"{name:<16}{cell.upper():<6}{count:>10,}{module:>10,}{times:>8.2f}   {shape}"


def draw(figure: Any, numbers: Numbers) -> None:
    axis = figure.subplots()
    names = list(numbers["module"])
    for i, cell in enumerate(CELLS):
        places = [place + (i - 1) * 0.27 for place in range(len(names))]
        counts = [numbers["module"][name][cell] for name in names]
        bars = axis.bar(places, counts, 0.25, color=COLOURS[cell], label=cell.upper())
        axis.bar_label(bars, fmt="{:,.0f}", fontsize=7)
    axis.set_yscale("log")
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel("parameters of the recurrent layers")
    axis.legend()


def fault(numbers: Numbers) -> str:
    if numbers["formula"] == numbers["module"]:
        return ""
    return "the formula and the modules disagree about the number of parameters"


LESSON = Lesson(
    "the parameters of RNN, GRU and LSTM, by formula and counted", measure, table, draw, fault
)
