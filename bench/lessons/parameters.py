"""The parameters of RNN, GRU and LSTM, by formula and counted."""

from argparse import Namespace

from ..cases import TRAINED, Workload
from ..providers import build
from . import CELLS, Result

LOOK_AT = (
    "T and B, which are not in the formula; LSTM and GRU have 4 and 3 times an RNN's parameters."
)
GATES = {"rnn": 1, "gru": 3, "lstm": 4}


def by_formula(cell: str, workload: Workload) -> int:
    """Returns the sum of G H (I + H + 2) over layers and directions: W_ih, W_hh and two biases.

    A layer above the first has I = D H, because it reads the D directions below it.
    """
    G, H, D = GATES[cell], workload.H, 2 if workload.bidirectional else 1
    widths = [workload.I, *[D * H] * (workload.layers - 1)]
    return sum(D * G * H * (width + H + 2) for width in widths)


def run(options: Namespace) -> Result:
    by_task = {workload.task: workload for workload in TRAINED}
    lines = [f"{'case':<16}{'cell':<6}{'formula':>10}{'module':>10}   shape"]
    for workload in by_task.values():
        for cell in CELLS:
            module = sum(p.numel() for p in build("fusedrnn", cell, workload).parameters())
            formula = by_formula(cell, workload)
            row = f"{workload.name:<16}{cell.upper():<6}{formula:>10,}{module:>10,}"
            lines.append(f"{row}   {workload.shape}")
    return lines, None
