"""One workload and cell from the gate to the rows: equality, then speed, then training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn
from fusedrnn.dispatch import precision

from .cases import Workload
from .gate import Gate
from .imdb import Corpus
from .memory import kept
from .models import MODELS, Examples, Input, examples_of
from .peer import Peer
from .progress import Progress
from .providers import PROVIDERS, TORCH, build, names_for
from .report import matmul_fp32
from .results import Loss, Row
from .timing import Call, Times, interleaved
from .train import Training, metric_name, train

#: The gate of the sweep looks at the first steps only: no kernel knows T, and 512 steps of fp64 at
#: H=1024 would take longer than all timings together.
_SWEEP_GATE_STEPS = 64


@dataclass(frozen=True)
class Settings:
    """How a run measures. ``seconds`` is for one comparison of forward or forward+backward."""

    device: torch.device
    seed: int = 0
    seconds: float = 0.7
    least_rounds: int = 3


class Measured(NamedTuple):
    rows: list[Row]
    losses: list[Loss]
    complaints: list[str]  # of a red gate, one line a tensor


def measure(
    workload: Workload,
    cell: str,
    settings: Settings,
    corpus: Corpus | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Gates, times and trains every provider on one workload.

    Args:
        workload: a lesson, or a point of the sweep.
        cell: ``"lstm"`` or ``"gru"``.
        settings: device, seed and time.
        corpus: the reviews, for the workloads that read them.
        progress: told what is being done.
    """
    progress = progress or Progress(None)
    subject = Subject(workload, cell, settings, corpus)
    rows: dict[str, Row] = {}
    complaints: list[str] = []
    progress.at(f"{workload.name} {cell}: gate")
    gate = Gate(workload, cell, subject.weights, subject.gate_input())
    for provider in names_for(workload, settings.device):
        row, failures = judged(gate, subject, provider)
        rows[provider] = row
        complaints += [f"{workload.name} {cell} {provider}: {line}" for line in failures]
    del gate
    able = [provider for provider, row in rows.items() if row.has_numbers]

    progress.at(f"{workload.name} {cell}: speed")
    for mode in ("fw", "fwbw"):
        for provider, times in subject.times(able, mode).items():
            enter_times(rows[provider], mode, times)
    if settings.device.type == "cuda":
        for provider in able:
            rows[provider].peak_mb = subject.peak_mb(provider)
    losses = trained(subject, able, rows, progress) if subject.steps else []
    return Measured(list(rows.values()), losses, complaints)


def judged(gate: Gate, subject: Subject, provider: str) -> tuple[Row, list[str]]:
    """The provider's row with the gate's verdict, and what failed."""
    workload, cell = subject.workload, subject.cell

    def row(**values) -> Row:
        row = Row.of(workload, cell, provider, backend="", **values)
        told = subject.explain(provider)
        row.precision = fp32_of(provider, told, subject)
        if told is not None:
            row.backend = told.backend or ""
            row.plan = "; ".join(line.partition(": forward")[0] for line in told.layers)
            if len(told.floors_us) == 2:  # of a step, forward and backward
                forward, backward = (us * workload.T / 1000 for us in told.floors_us)
                row.fw_floor_ms, row.fwbw_floor_ms = forward, forward + backward
        return row

    if provider == TORCH:
        return row(gate="yardstick"), []
    try:
        verdict = gate.judge(provider)
    except NotImplementedError as error:
        return Row.of(workload, cell, provider, backend="", gate="refused", note=str(error)), []
    if verdict.ok:
        return row(gate="ok", share=verdict.share, error=verdict.error), []
    note = f"{len(verdict.failures)} tensors are over the error budget: no speed is shown"
    return row(gate="red", share=verdict.share, note=note), verdict.failures


def fp32_of(provider: str, told: fusedrnn.dispatch.Explanation | None, subject: Subject) -> str:
    """How a provider multiplies fp32: "ieee", "tf32", ...; "" in other dtypes, or if not known.

    Args:
        provider: whose word on it counts, where it has one.
        told: of what is ours, what runs.
        subject: the case.
    """
    if subject.dtype != torch.float32:
        return ""
    entry = PROVIDERS[provider]
    own = entry.precision(subject.dtype, subject.settings.device, subject.cell)
    if told is None or subject.settings.device.type == "cpu":
        return own
    # Of ours, what runs; the loop multiplies by torch.mm, and follows its switch.
    loop = matmul_fp32() if told.backend == "torch" else precision()
    return told.precision or loop


def enter_times(row: Row, mode: str, times: Times, clock: str = "ms") -> None:
    """Writes times into the fields of a mode; ``clock`` is ``"ms"`` or ``"device_ms"``."""
    for field, value in (
        (clock, times.p50),
        (f"{clock}_p20", times.p20),
        (f"{clock}_p80", times.p80),
        (f"{clock.removesuffix('ms')}speedup", times.speedup),
    ):
        setattr(row, f"{mode}_{field}", value)


def trained(
    subject: Subject, providers: list[str], rows: dict[str, Row], progress: Progress
) -> list[Loss]:
    """The losses of every step of each provider's short training; what it came to is in the row."""
    workload, cell = subject.workload, subject.cell
    losses: list[Loss] = []
    yardstick: list[float] = []
    for provider in providers:
        if not subject.trains(provider):
            continue
        progress.at(f"{workload.name} {cell}: training {provider}")
        training = subject.train(provider, progress.tick)
        yardstick = training.losses if provider == TORCH else yardstick
        row = rows[provider]
        row.steps, row.train_s = subject.steps, training.seconds
        row.final_loss = training.final_loss
        row.metric, row.test = metric_name(workload), training.metric
        if provider != TORCH:
            pairs = zip(training.losses, yardstick, strict=True)
            row.loss_difference = max(abs(ours - theirs) for ours, theirs in pairs)
        losses += [
            Loss(workload.name, cell, provider, step, loss)
            for step, loss in enumerate(training.losses)
        ]
    return losses


class Subject:
    """A workload and a cell with their weights and inputs, from which all providers start."""

    def __init__(
        self, workload: Workload, cell: str, settings: Settings, corpus: Corpus | None = None
    ):
        self.workload, self.cell, self.settings = workload, cell, settings
        self.dtype = getattr(torch, workload.dtype)
        self.steps = workload.steps_on(settings.device)
        self.examples: Examples | None = None
        torch.manual_seed(settings.seed)
        if workload.task == "none":
            rnn = build(TORCH, cell, workload)
            self.input: Input = random_input(workload, settings.device)
        else:
            self.examples = examples_of(workload, corpus, settings.seed)
            model = MODELS[workload.task](build(TORCH, cell, workload), workload)
            self.start = model.state_dict()
            rnn = model.rnn
            rows = torch.arange(workload.B)
            batch = self.examples.batch(rows, settings.device)
            with torch.no_grad():
                self.input = model.to(settings.device).features(batch)
        # Rounded here, so that the fp64 truth of the gate starts from the very same weights.
        self.weights = {name: weight.to(self.dtype) for name, weight in rnn.state_dict().items()}

    def gate_input(self) -> Input:
        """The input, of the sweep only its first steps."""
        if self.workload.lesson != "sweep":
            return self.input
        if isinstance(self.input, Tensor):
            return self.input[:, :_SWEEP_GATE_STEPS]
        return first_steps(self.input, _SWEEP_GATE_STEPS)

    def rnn(self, provider: str) -> nn.Module:
        rnn = build(provider, self.cell, self.workload)
        rnn.load_state_dict(self.weights)
        return rnn.to(self.settings.device, self.dtype)

    def explain(self, provider: str, mode: str = "fwbw") -> fusedrnn.dispatch.Explanation | None:
        """What of fusedrnn runs the provider's ``call`` of a mode; None for others."""
        if PROVIDERS[provider].classes is not fusedrnn:
            return None
        training = mode == "fwbw"
        with PROVIDERS[provider].context(), torch.set_grad_enabled(training):
            input = self.differentiable()[0] if training else self.input
            return fusedrnn.explain(self.rnn(provider).train(training), input)

    def differentiable(self) -> tuple[Input, list[Tensor]]:
        """The input of the timed backward, and of it the leaf that is differentiated, if any."""
        if not self.workload.needs_input_grad:
            return self.input, []
        leaf = self.input.data.detach().clone().requires_grad_()
        if isinstance(self.input, PackedSequence):
            return self.input._replace(data=leaf), [leaf]
        return leaf, [leaf]

    def call(self, provider: str, mode: str) -> Call:
        """What is timed: ``"fw"`` in eval() and without gradients, ``"fwbw"`` in train().

        Each call starts from the final state of the one before, so that none can be left out.
        """
        rnn, context, input = self.rnn(provider), PROVIDERS[provider].context, self.input
        if isinstance(rnn, Peer):
            own = rnn.timed(mode, input, self.workload.needs_input_grad)
            if own is not None:
                return own
        wanted: list[Tensor] = rnn.fix() if isinstance(rnn, Peer) else list(rnn.parameters())
        if mode == "fwbw":
            input, leaves = self.differentiable()
            wanted += leaves
        return chained(rnn, input, wanted, mode, context)

    def times(self, providers: list[str], mode: str) -> dict[str, Times]:
        return interleaved(
            {provider: self.call(provider, mode) for provider in providers},
            self.settings.device,
            seconds=self.settings.seconds,
            least=self.settings.least_rounds,
        )

    def peak_mb(self, provider: str) -> float:
        """CUDA memory of one forward+backward beyond what stood before, in MB."""
        call = self.call(provider, "fwbw")
        call()
        torch.cuda.reset_peak_memory_stats(self.settings.device)
        before = torch.cuda.memory_allocated(self.settings.device)
        call()
        return (torch.cuda.max_memory_allocated(self.settings.device) - before) / 1e6

    def kept_mb(self, provider: str) -> float:
        """What autograd keeps for backward, in MB."""
        rnn = self.rnn(provider)
        weights = rnn.fix() if isinstance(rnn, Peer) else []
        with PROVIDERS[provider].context():
            return kept(rnn, self.input, weights) / 1e6

    def trains(self, provider: str) -> bool:
        return self.workload.train_reference or provider != "fusedrnn torch"

    def train(self, provider: str, tick: Callable[[], object]) -> Training:
        """The short training, from the same start for every provider."""
        if self.examples is None:
            raise ValueError(f"{self.workload.name} is only timed: it has no examples")
        model = MODELS[self.workload.task](build(provider, self.cell, self.workload), self.workload)
        model.load_state_dict(self.start)
        model.to(self.settings.device)
        with PROVIDERS[provider].context():
            return train(
                model,
                self.workload,
                self.examples,
                self.steps,
                self.settings.device,
                self.settings.seed,
                tick,
            )


def chained(
    rnn: nn.Module,
    input: Any,
    wanted: Sequence[Tensor],
    mode: str,
    context: Callable[[], AbstractContextManager] = nullcontext,
    **options: Any,
) -> Call:
    """A call that starts from the final state of the one before.

    Args:
        rnn: what is called, as ``rnn(input, state, **options)``.
        input: whatever it takes.
        wanted: of ``"fwbw"``, what is differentiated.
        mode: ``"fw"`` in eval() and without gradients, ``"fwbw"`` in train().
        context: is entered around every call.
        **options: of every call.
    """
    state = None
    rnn.train(mode == "fwbw")

    def forward() -> object:
        nonlocal state
        with context(), torch.no_grad():
            output, state = rnn(input, state, **options)
        return output, state

    cotangents: list[Tensor] = []

    def forward_and_backward() -> object:
        nonlocal state
        with context():
            result = rnn(input, state, **options)
            outputs = _tensors(result)
            if not cotangents:  # the first call only, which is never timed
                cotangents.extend(torch.randn_like(output) for output in outputs)
            gradients = torch.autograd.grad(outputs, wanted, cotangents)
        final = result[1]
        state = final.detach() if isinstance(final, Tensor) else tuple(s.detach() for s in final)
        return gradients

    return forward if mode == "fw" else forward_and_backward


def random_input(workload: Workload, device: torch.device) -> Input:
    """``[B, T, I]``, or packed with lengths from T/2 to T, the longest T; drawn on the CPU."""
    input = torch.randn(workload.B, workload.T, workload.I)
    input = input.to(device, getattr(torch, workload.dtype))
    if not workload.ragged:
        return input
    lengths = random_lengths(workload.T, workload.B)
    return pack_padded_sequence(input, lengths, batch_first=True, enforce_sorted=False)


def random_lengths(T: int, B: int) -> Tensor:
    """``[B]``, uniform in T/2 to T, the first T."""
    lengths = torch.randint((T + 1) // 2, T + 1, (B,))
    lengths[0] = T
    return lengths


def first_steps(packed: PackedSequence, steps: int) -> PackedSequence:
    """A packed sequence cut off: its data lie step by step."""
    sizes = packed.batch_sizes[:steps]
    return packed._replace(data=packed.data[: int(sizes.sum())], batch_sizes=sizes)


def _tensors(result: tuple) -> list[Tensor]:
    """Output and final states of an RNN, flat."""
    output, final = result
    output = output.data if isinstance(output, PackedSequence) else output  # a Tensor's detaches
    return [output, *((final,) if isinstance(final, Tensor) else final)]
