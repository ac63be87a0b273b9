"""``python -m bench cpu``: speed and memory beside torch.nn on the CPU, under ``auto``.

- every lesson as it is (layers, dropout, lengths), LSTM, GRU and RNN, forward and with backward;
- decoding one step at a time, ``lengths`` beside packing, and tokens instead of one-hot rows;
- the targets, each with what was measured;
- memory: bytes kept for backward, and what it costs to make the gates again (``recompute=True``);
- the host's part of a kernel's launch (``bench/host.py``).

Every case is gated, once for each cell, with the backends that are timed. Then each is timed in
three processes of its own (``apart.py``): all of it is warmed, then each pair is timed in turns.
``x`` is the median over the rounds of torch.nn's time divided by fusedrnn's, of the process in the
middle: above 1 is faster. Behind it stand those of the other two, and the pages of memory that one
call has to ask the system for, if there are hundreds: they cost more than the arithmetic
(``memory.new_pages``).
"""

from __future__ import annotations

import copy
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusedrnn

from . import host, ragged
from .apart import apart
from .cases import CELLS, CHARACTER, EVERY_CELL, LESSONS, ONE_HOT, Workload, cut_down
from .cpu_rows import Row, cells, median_of, shown
from .disk import Table
from .gate import Gate, Verdict, outcome, verdict
from .imdb import Corpus
from .memory import kept, new_pages
from .providers import TORCH, build
from .report import environment, header
from .results import FolderError, begin
from .run import Settings, Subject, chained
from .targets import LESSON_NAMES, TARGETS, geomean, verdict_on
from .timing import Call, interleaved, warm

CPU = torch.device("cpu")
#: A second holds thousands of rounds of a short call, and the more there are, the less the median
#: of their ratios depends on those that were interrupted.
MOST_ROUNDS = 5000
PASSES = {"fw": "forward", "fwbw": "training"}
MEMORY = ("case", "cell", "torch_MiB", "default_MiB", "recompute_MiB", "recompute_x_time")
#: How many processes time a case: where a heap lies and which CPUs a process gets holds for all of
#: it, so that two of them were up to 1.6 times apart.
PROCESSES = 3
#: How many steps of a decoder are gated.
_DECODED = 20


class Pair(NamedTuple):
    """What one row times, and for about how long."""

    case: str
    what: str
    backend: str
    theirs: Call
    ours: Call
    seconds: float


class Case(NamedTuple):
    """A case and cell: what is timed, if what the gate says is green."""

    cell: str
    pairs: Sequence[Pair]
    judge: Callable[[], Sequence[Verdict]]


#: Makes a case, and the same one in another process.
Make = Callable[[], Case]


def workloads(quick: bool) -> tuple[Workload, ...]:
    """The lessons."""
    return tuple(map(cut_down, LESSONS)) if quick else LESSONS


def lesson(workload: Workload, cell: str, settings: Settings, corpus: Corpus | None) -> Case:
    """As the main job and ``--cases`` run it."""
    subject = Subject(workload, cell, settings, corpus)
    pairs = []
    for mode, what in PASSES.items():
        told = subject.explain("fusedrnn", mode)
        assert told is not None
        backend = told.backend or ""
        theirs, ours = (subject.call(name, mode) for name in (TORCH, "fusedrnn"))
        pairs.append(Pair(workload.name, what, backend, theirs, ours, settings.seconds))

    def judge() -> list[Verdict]:
        gate = Gate(workload, cell, subject.weights, subject.gate_input())
        # By name: of the gate's input all is differentiated, for which auto may take another one.
        trained = f"fusedrnn {pairs[-1].backend}"
        return [gate.judge("fusedrnn", inference=True), gate.judge(trained)]

    return Case(cell, pairs, judge)


def couple(cell: str, I: int, H: int) -> tuple[nn.RNNBase, Any]:
    """torch.nn's module and ours with the same weights."""
    theirs, ours = (getattr(library, cell.upper())(I, H) for library in (nn, fusedrnn))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@torch.no_grad()
def decoding(workload: Workload, cell: str, seconds: float) -> Case:
    """A step from the state before, by ``stream`` and by the module itself."""
    theirs, ours = couple(cell, workload.I, workload.H)
    stream = ours.stream(batch_size=1)
    xs = torch.randn(_DECODED, 1, workload.I)
    x = xs[:1]
    backend = fusedrnn.explain(ours, x).backend or ""
    name, step = f"decode {workload.shape}", chained(theirs, x, (), "fw")
    ways = {"stream": _without_gradients(stream, x[0]), backend: chained(ours, x, (), "fw")}
    pairs = [Pair(name, "step", way, step, call, seconds) for way, call in ways.items()]

    @torch.no_grad()
    def judge() -> list[Verdict]:
        truth = copy.deepcopy(theirs).double()(xs.double())[0]
        reference, by_module = (_step_by_step(module, xs) for module in (theirs, ours))
        return [
            verdict({"output": got}, {"output": reference}, {"output": truth}, ("output",))
            for got in (torch.stack([stream(x) for x in xs]), by_module)
        ]

    return Case(cell, pairs, judge)


def _step_by_step(module: nn.Module, xs: Tensor) -> Tensor:
    outputs, state = [], None
    for x in xs.split(1):
        output, state = module(x, state)
        outputs.append(output)
    return torch.cat(outputs)


def _without_gradients(function: Callable, *inputs: Tensor) -> Call:
    def call() -> object:
        with torch.no_grad():
            return function(*inputs)

    return call


def with_lengths(sizes: ragged.Sizes, cell: str, seconds: float) -> Case:
    """``lengths`` beside torch.nn's PackedSequence: two ways of ``bench ragged``."""
    problem = ragged.make(cell, sizes, CPU, torch.float32)
    ours = "fusedrnn lengths"
    name = f"lengths T{sizes.T} B{sizes.B} I{sizes.I} H{sizes.H}"
    pairs = []
    for mode, what in PASSES.items():
        with torch.set_grad_enabled(mode == "fwbw"):
            backend = ragged.backend_of(problem, ours)
        theirs_call, ours_call = (ragged.call(problem, w, mode) for w in (ragged.PACKED, ours))
        pairs.append(Pair(name, what, backend, theirs_call, ours_call, 4 * seconds))
    return Case(cell, pairs, lambda: [ragged.gate(problem, ours)])


def with_tokens(workload: Workload, cell: str, seconds: float) -> Case:
    """``TokenLSTM`` or ``TokenGRU`` beside torch.nn on one-hot rows that are there, or are made."""
    T, B, words, H = workload.T, workload.B, workload.vocabulary, workload.H
    theirs, _ = couple(cell, words, H)
    ours = (fusedrnn.TokenLSTM if cell == "lstm" else fusedrnn.TokenGRU).of(None, theirs)
    tokens = torch.randint(words, (T, B))
    rows = F.one_hot(tokens, words).float()
    name, pairs = f"tokens T{T} B{B} V{words} H{H}", []
    for mode, what in PASSES.items():
        with torch.set_grad_enabled(mode == "fwbw"):
            backend = fusedrnn.explain(ours, tokens).backend or ""
        call = partial(chained, wanted=[*theirs.parameters()], mode=mode)
        for case, module, input in (
            (name, theirs, rows),
            (f"{name} from tokens", _OneHot(theirs, words), tokens),
        ):
            theirs_call, ours_call = call(module, input), call(ours, tokens)
            pairs.append(Pair(case, what, backend, theirs_call, ours_call, seconds))

    def judge() -> list[Verdict]:
        double = copy.deepcopy(theirs).double()
        truth, reference, got = (
            outcome(module, input, dict(module.named_parameters()))
            for module, input in ((double, rows.double()), (theirs, rows), (ours, tokens))
        )
        return [verdict(got, reference, truth, truth)]

    return Case(cell, pairs, judge)


class _OneHot(nn.Module):
    """What torch.nn needs to take tokens without an embedding."""

    def __init__(self, rnn: nn.Module, words: int) -> None:
        super().__init__()
        self.rnn, self.words = rnn, words

    def forward(self, tokens: Tensor, hx: Any = None) -> Any:
        return self.rnn(F.one_hot(tokens, self.words).float(), hx)


def makers(settings: Settings, corpus: Corpus | None, quick: bool) -> Iterator[Make]:
    """Of every case and cell."""
    for workload in workloads(quick):
        read = corpus if workload.vocabulary else None
        for cell in EVERY_CELL:
            yield partial(lesson, workload, cell, settings, read)
    decode, reviews = (cut_down(w) if quick else w for w in (CHARACTER, ONE_HOT))
    sizes = ragged.QUICK if quick else ragged.Sizes()
    for cell in EVERY_CELL:
        yield partial(decoding, decode, cell, settings.seconds)
    for cell in EVERY_CELL:
        yield partial(with_lengths, sizes, cell, settings.seconds)
    for cell in CELLS:
        yield partial(with_tokens, reviews, cell, settings.seconds)


class Gated(NamedTuple):
    """A case behind its gate."""

    make: Make
    verdicts: Sequence[Verdict]
    rows: Sequence[Row]  # without times

    @property
    def is_green(self) -> bool:
        return all(found.ok for found in self.verdicts)


def gated(make: Make) -> Gated:
    case = make()
    verdicts = case.judge()
    gate = "ok" if all(found.ok for found in verdicts) else "red"
    share = max(found.share for found in verdicts)
    rows = [
        Row(case=p.case, cell=case.cell, what=p.what, backend=p.backend, gate=gate, share=share)
        for p in case.pairs
    ]
    return Gated(make, verdicts, rows)


def timed(
    make: Make, rows: Sequence[Row], least: int, seed: int, beside_thread: bool = False
) -> Sequence[Row]:
    """The rows of a green case with times: all of it is warmed before any is timed.

    beside_thread: see ``run``.
    """
    if beside_thread:
        _compute_in_another_thread()
    torch.manual_seed(seed)
    pairs = make().pairs
    for pair in pairs:
        warm({"torch": pair.theirs, "fusedrnn": pair.ours})
    for row, pair in zip(rows, pairs, strict=True):
        calls = {"torch": pair.theirs, "fusedrnn": pair.ours}
        times = interleaved(
            calls, CPU, seconds=pair.seconds, least=least, most=MOST_ROUNDS, warmed=True
        )
        for who, found in times.items():
            for field in ("p50", "p20", "p80"):
                tail = "" if field == "p50" else f"_{field}"
                setattr(row, f"{who}_ms{tail}", getattr(found, field))
        row.x, row.rounds = times["fusedrnn"].speedup, times["fusedrnn"].rounds
        row.torch_pages, row.fusedrnn_pages = map(new_pages, calls.values())
    return rows


def _compute_in_another_thread() -> None:
    """Once; then it waits, as a worker without work does."""
    done = threading.Event()

    def compute() -> None:
        torch.ones(1 << 20).tanh()
        done.set()
        threading.Event().wait()

    threading.Thread(target=compute, daemon=True).start()
    done.wait()


def memory(workload: Workload, cell: str, settings: Settings, corpus: Corpus | None) -> tuple:
    """A line of ``MEMORY``: by torch.nn, by our loop, and with recompute, and the latter's time."""
    subject = Subject(workload, cell, settings, corpus)
    again = build("fusedrnn", cell, workload, recompute=True)
    again.load_state_dict(subject.weights)
    modules = subject.rnn(TORCH), subject.rnn("fusedrnn"), again
    input, leaves = subject.differentiable()
    with fusedrnn.use_backend("torch"):
        sizes = [kept(module, input) / 2**20 for module in modules]
        calls = {
            name: chained(module, input, [*module.parameters(), *leaves], "fwbw")
            for name, module in zip(("default", "again"), modules[1:], strict=True)
        }
        limits = {"least": settings.least_rounds, "most": MOST_ROUNDS}
        times = interleaved(calls, CPU, seconds=settings.seconds, **limits)  # type: ignore[arg-type]
    x_time = 1 / times["again"].speedup
    return workload.name, cell, *(f"{size:.2f}" for size in sizes), f"{x_time:.2f}"


def run(
    out: Path,
    corpus: Corpus | None,
    *,
    quick: bool = False,
    seed: int = 0,
    beside_thread: bool = False,
) -> int:
    """Prints the tables, and writes them with ``environment.json`` into ``out``.

    beside_thread: in each timing process another thread has computed before, as a server's worker
    or a loader does.

    Returns:
        1 if a gate was red, else 0.

    Raises:
        FolderError: it cannot be written.
    """
    torch.manual_seed(seed)
    started = time.monotonic()
    data = corpus.source if corpus else "random numbers"
    env = environment(CPU, data)
    begin(out, env | {"beside_thread": beside_thread})
    tables = _tables(out)
    seconds, least = (0.0, 2) if quick else (0.25, 6)  # each is first as often as second
    settings = Settings(CPU, seed, seconds, least)
    told = "another thread of each timing process has computed before\n" if beside_thread else ""
    print(f"{header(env)}\n{told}\ngate of every case", flush=True)
    cases = [gated(make) for make in makers(settings, corpus, quick)]
    print(f"\n{'case':34} {'cell':5} {'what':9} {'backend':8} {'gate':>8} {'torch ms':>22} "
          f"{'ours ms':>22} {'x':>5}")  # fmt: skip
    rows: list[Row] = []
    for case in cases:
        timing = timed, case.make, case.rows, least, seed, beside_thread
        of_case = case.rows
        if case.is_green:
            of_case = median_of([apart(*timing) for _ in range(1 if quick else PROCESSES)])
        for row in of_case:
            rows.append(row)
            tables["cpu.csv"].add(cells(row))
            print(shown(row), flush=True)
    print()
    for cell in EVERY_CELL:
        for what in PASSES.values():
            found = [
                r.x for r in rows if r.case in LESSON_NAMES and (r.cell, r.what) == (cell, what)
            ]
            good = [x for x in found if x is not None]
            if good:
                print(f"{cell} {what}: geometric mean {geomean(good):.2f}, least {min(good):.2f}")
    print("\ntargets")
    for target in TARGETS:
        print(verdict_on(target, rows))
    long = [w for w in workloads(quick) if w.T >= 100 or quick]
    lines = (memory(w, cell, settings, corpus) for w in long for cell in CELLS)
    _show(tables["memory.csv"], MEMORY, lines)
    if find_spec("triton"):
        _show(tables["host.csv"], host.FIELDS, iter(host.measured(20 if quick else 2000)))
    print(f"\n{time.monotonic() - started:.0f} s; CSV in {out}")
    return _complain(cases)


def _complain(cases: Sequence[Gated]) -> int:
    red = [case for case in cases if not case.is_green]
    for case in red:
        for found in case.verdicts:
            for line in found.failures:
                print(f"{case.rows[0].case} {case.rows[0].cell}: {line}", file=sys.stderr)
    return 1 if red else 0


def _tables(out: Path) -> dict[str, Table]:
    """The files anew."""
    columns = {
        "cpu.csv": [field.name for field in fields(Row)],
        "memory.csv": MEMORY,
        "host.csv": host.FIELDS,
    }
    try:
        for name in columns:
            (out / name).unlink(missing_ok=True)
        return {name: Table(out / name, row) for name, row in columns.items()}
    except OSError as error:
        raise FolderError(f"no results can be written to {out}: {error.strerror}") from error


def _show(table: Table, names: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> None:
    """Writes each row as it comes, and prints all when they are there."""
    lines = [names]
    for row in rows:
        table.add(row)
        lines.append(row)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print()
    for row in lines:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
