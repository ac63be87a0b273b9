"""``python -m bench cpu``: speed and memory beside torch.nn on the CPU, under ``auto``.

Tables, but for the last measured in turns in one process from the same weights:

- every workload of the lessons, LSTM, GRU and RNN, forward and forward with backward;
- decoding one step at a time, packed sequences, and tokens instead of one-hot rows;
- memory: bytes kept for backward, and what it costs to make the gates again (``recompute=True``);
- the host's part of a kernel's launch (``bench/host.py``).

``x`` is the median over the rounds of torch.nn's time divided by fusedrnn's: above 1 is faster.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn

from . import host
from .cases import CHARACTER, ONE_HOT, RAGGED, Workload, cut_down, named
from .memory import kept
from .report import environment, header
from .results import begin
from .timing import interleaved

CELLS = ("lstm", "gru", "rnn")
CPU = torch.device("cpu")
FIELDS = ("case", "cell", "what", "backend", "torch_ms", "fusedrnn_ms", "x")


class Row(NamedTuple):
    """One line: milliseconds of torch.nn (or of the default) and of fusedrnn, and their ratio."""

    case: str
    cell: str
    what: str
    backend: str
    torch_ms: float
    fusedrnn_ms: float
    x: float


def pair(cell: str, *args: Any, **kwargs: Any) -> tuple[nn.RNNBase, Any]:
    """torch.nn's module and ours with the same weights."""
    theirs, ours = (getattr(library, cell.upper())(*args, **kwargs) for library in (nn, fusedrnn))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def forward(module: Callable, *inputs: Any, **options: Any) -> Callable[[], object]:
    """A call without gradients."""

    def call() -> object:
        with torch.no_grad():
            return module(*inputs, **options)

    return call


def training(module: nn.Module, *inputs: Any, **options: Any) -> Callable[[], object]:
    """A forward and a backward into the weights and, if it requires one, into the input."""
    leaves = [*module.parameters(), *(t for t in inputs if getattr(t, "requires_grad", False))]

    def call() -> object:
        output = module(*inputs, **options)[0]
        data = output if isinstance(output, Tensor) else output.data
        return torch.autograd.grad(data.sum(), leaves)

    return call


def compared(
    row: tuple[str, str, str, str], theirs: Callable, ours: Callable, seconds: float
) -> Row:
    """Both in turns."""
    times = interleaved({"torch": theirs, "fusedrnn": ours}, CPU, seconds=seconds, least=5)
    return Row(*row, times["torch"].p50, times["fusedrnn"].p50, times["fusedrnn"].speedup)


def lessons(workloads: Iterable[Workload], seconds: float) -> Iterable[Row]:
    """Every workload, cell and pass under ``auto``."""
    for w in workloads:
        for cell in CELLS:
            kwargs = {"num_layers": w.layers, "bidirectional": w.bidirectional}
            theirs, ours = pair(cell, w.I, w.H, **kwargs)
            x = torch.randn(w.T, w.B, w.I)
            if w.task == "one-hot":
                x = F.one_hot(torch.randint(w.I, (w.T, w.B)), w.I).float()
            for what, way in (("forward", forward), ("training", training)):
                given = x.clone().requires_grad_(what == "training" and w.needs_input_grad)
                with torch.set_grad_enabled(what == "training"):
                    backend = fusedrnn.explain(ours, given).backend or ""
                row = (w.name, cell, what, backend)
                yield compared(row, way(theirs, given), way(ours, given), seconds)


def others(seconds: float, quick: bool) -> Iterable[Row]:
    """Decoding, packed sequences, tokens."""
    decode, ragged, reviews = (cut_down(w) if quick else w for w in (CHARACTER, RAGGED, ONE_HOT))
    T, B, H = ragged.T, ragged.B, ragged.H
    for cell in CELLS:
        theirs, ours = pair(cell, decode.I, decode.H)
        x, states = torch.randn(1, 1, decode.I), [None, None]
        stream = ours.stream(batch_size=1)

        def step(module: nn.Module, n: int, x=x, states=states) -> None:
            with torch.no_grad():
                states[n] = module(x, states[n])[1]

        row = (f"decode {decode.shape}", cell, "step", "stream")
        yield compared(row, partial(step, theirs, 0), forward(stream, x[0]), seconds)
        row = (f"decode {decode.shape}", cell, "step", fusedrnn.explain(ours, x).backend or "")
        yield compared(row, partial(step, theirs, 0), partial(step, ours, 1), seconds)
    lengths = torch.randint(T // 2, T + 1, (B,))
    for cell in CELLS:
        theirs, ours = pair(cell, ragged.I, H)
        x = torch.randn(T, B, ragged.I)
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        for what, way in (("forward", forward), ("training", training)):
            row = (f"lengths {ragged.shape}", cell, what, "torch")
            yield compared(row, way(theirs, packed), way(ours, x, lengths=lengths), 4 * seconds)
    T, B, words, H = reviews.T, reviews.B, reviews.vocabulary, reviews.H
    for cell in CELLS[:2]:
        theirs, _ = pair(cell, words, H)
        ours = (fusedrnn.TokenLSTM if cell == "lstm" else fusedrnn.TokenGRU).of(None, theirs)
        tokens = torch.randint(words, (T, B))
        rows = F.one_hot(tokens, words).float()
        for what, way in (("forward", forward), ("training", training)):
            with torch.set_grad_enabled(what == "training"):
                backend = fusedrnn.explain(ours, tokens).backend or ""
            row = (f"tokens T{T} B{B} V{words} H{H}", cell, what, backend)
            yield compared(row, way(theirs, rows), way(ours, tokens), seconds)
            row = (f"{row[0]} from tokens", *row[1:])
            from_tokens = _OneHot(theirs, words)
            yield compared(row, way(from_tokens, tokens), way(ours, tokens), seconds)


class _OneHot(nn.Module):
    """What torch.nn needs to take tokens without an embedding."""

    def __init__(self, rnn: nn.Module, words: int) -> None:
        super().__init__()
        self.rnn, self.words = rnn, words

    def forward(self, tokens: Tensor) -> Any:
        return self.rnn(F.one_hot(tokens, self.words).float())


def memory(workloads: Iterable[Workload], seconds: float) -> Iterable[tuple[str, ...]]:
    """Kept bytes by torch.nn, by default and with recompute, and the latter's time."""
    for w in workloads:
        for cell in CELLS[:2]:
            kwargs = {"num_layers": w.layers, "bidirectional": w.bidirectional}
            theirs, ours = pair(cell, w.I, w.H, **kwargs)
            again = getattr(fusedrnn, cell.upper())(w.I, w.H, recompute=True, **kwargs)
            x = torch.randn(w.T, w.B, w.I)
            with fusedrnn.use_backend("torch"):
                sizes = [kept(module, x) / 2**20 for module in (theirs, ours, again)]
                calls = {"default": training(ours, x), "again": training(again, x)}
                times = interleaved(calls, CPU, seconds=seconds, least=5)
            yield w.name, cell, *(f"{s:.2f}" for s in sizes), f"{1 / times['again'].speedup:.2f}"


def geomean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def run(out: Path, *, quick: bool = False, seed: int = 0) -> int:
    """Prints the tables, and writes them with ``environment.json`` into ``out``.

    Raises:
        FolderError: it cannot be written.
    """
    torch.manual_seed(seed)
    env = environment(CPU, "random numbers")
    begin(out, env)
    workloads = list(named("lessons"))
    if quick:
        workloads = list(map(cut_down, workloads))
    seconds = 0.0 if quick else 1.0
    print(f"{header(env)}\n\n{'case':34} {'cell':5} what      backend  torch ms  ours ms     x")
    rows: list[Row] = []
    for part in (lessons(workloads, seconds), others(seconds, quick)):
        for row in part:
            rows.append(row)
            print(
                f"{row.case:34} {row.cell:5} {row.what:9} {row.backend:8} "
                f"{row.torch_ms:8.2f} {row.fusedrnn_ms:8.2f} {row.x:5.2f}",
                flush=True,
            )
    names = {w.name for w in workloads}
    for cell in CELLS:
        for what in ("forward", "training"):
            found = [r.x for r in rows if r.case in names and (r.cell, r.what) == (cell, what)]
            print(f"{cell} {what}: geometric mean {geomean(found):.2f}, least {min(found):.2f}")
    _write(out / "cpu.csv", FIELDS, rows)
    fields = ("case", "cell", "torch_MiB", "default_MiB", "recompute_MiB", "recompute_x_time")
    lines = list(memory([w for w in workloads if w.T >= 100 or quick], seconds))
    _show(out / "memory.csv", fields, lines)
    if find_spec("triton"):
        _show(out / "host.csv", host.FIELDS, host.measured(20 if quick else 2000))
    return 0


def _show(path: Path, fields: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Prints a table and writes it."""
    _write(path, fields, rows)
    widths = [max(map(len, column)) for column in zip(fields, *rows, strict=True)]
    print()
    for row in (fields, *rows):
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def _write(path: Path, fields: tuple[str, ...], rows: Iterable[Iterable[object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(fields)
        writer.writerows([f"{v:.3f}" if isinstance(v, float) else v for v in row] for row in rows)
