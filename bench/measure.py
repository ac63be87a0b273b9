"""Times and memory of one workload and cell: several providers in turns, on the same numbers."""

from __future__ import annotations

import multiprocessing
import pickle
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.benchmark import Timer

import fusedrnn

from .cases import Workload
from .data import Corpus
from .models import MODELS, examples_of
from .providers import PROVIDERS, TORCH, Adapter, build

PASSES = ("forward", "training")
#: Steps that the gate compares in cases that are only timed: kernels do not depend on T.
_GATED_STEPS = 64


class Settings(NamedTuple):
    """The device, the seed, and the seconds spent on the times of one pass."""

    device: torch.device
    seed: int = 0
    seconds: float = 0.7
    least_rounds: int = 3


class Call(NamedTuple):
    """A function that is timed, and the context that is entered before the clock starts."""

    run: Callable[[], object]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __call__(self) -> object:
        with self.context():
            return self.run()


class Times(NamedTuple):
    """Milliseconds of a call over the rounds, and how many times as fast it is as the first."""

    p50: float
    p20: float
    p80: float
    x: float
    rounds: int


class BenchmarkCase(NamedTuple):
    """A workload and a cell with the weights and the input from which all providers start."""

    workload: Workload
    cell: str
    weights: dict[str, Tensor]
    x: Tensor  # [B, T, I]
    lengths: Tensor | None  # [B], on the CPU
    start: dict[str, Tensor] | None = None  # of the whole model that is trained
    examples: Any = None  # models.Examples, of what is trained

    @classmethod
    def of(
        cls, workload: Workload, cell: str, settings: Settings, corpus: Corpus | None = None
    ) -> BenchmarkCase:
        torch.manual_seed(settings.seed)
        start = examples = lengths = None
        rnn = build(TORCH, cell, workload)
        if workload.task == "none":
            x: Any = torch.randn(workload.B, workload.T, workload.I)
            if workload.ragged:  # uniform in T/2 to T, the longest T
                lengths = torch.randint((workload.T + 1) // 2, workload.T + 1, (workload.B,))
                lengths[0] = workload.T
        else:
            examples = examples_of(workload, corpus, settings.seed)
            model = MODELS[workload.task](rnn, workload)
            start = model.state_dict()
            with torch.no_grad():
                x = model.features(examples.batch(torch.arange(workload.B), torch.device("cpu")))
            if isinstance(x, PackedSequence):
                x, lengths = pad_packed_sequence(x, batch_first=True)
        # Rounded to the tested dtype, so that the gate's fp64 truth starts from the same weights.
        dtype = getattr(torch, workload.dtype)
        weights = {name: weight.to(dtype) for name, weight in rnn.state_dict().items()}
        return cls(workload, cell, weights, x.to(settings.device, dtype), lengths, start, examples)

    def shortened(self) -> BenchmarkCase:
        """The case that the gate runs."""
        if self.examples is not None or len(self.x[0]) <= _GATED_STEPS:
            return self
        lengths = None if self.lengths is None else self.lengths.clamp(max=_GATED_STEPS)
        return self._replace(x=self.x[:, :_GATED_STEPS], lengths=lengths)

    def rnn(self, provider: str, dtype: torch.dtype | None = None, **options: Any) -> Any:
        rnn = build(provider, self.cell, self.workload, **options)
        rnn.load_state_dict(self.weights)
        return rnn.to(self.x.device, dtype or self.x.dtype)

    def inputs(self, provider: str, x: Tensor) -> tuple[Any, dict[str, Any]]:
        """Returns the input and the options of a provider's call for a padded ``x``."""
        layout = PROVIDERS[provider].layout
        if self.lengths is None or layout:
            return x, {"lengths": self.lengths} if layout == "lengths" else {}
        return pack_padded_sequence(x, self.lengths, batch_first=True, enforce_sorted=False), {}

    def prepared(self, provider: str, mode: str) -> tuple[Any, dict[str, Any], list[Tensor]]:
        """Returns input, options, and what of the input is differentiated: data are not."""
        input, options = self.inputs(provider, self.x)
        if mode == "forward" or self.workload.task not in ("embedding", "none"):
            return input, options, []
        leaf = input.data.detach().clone().requires_grad_()
        packed = isinstance(input, PackedSequence)
        return input._replace(data=leaf) if packed else leaf, options, [leaf]

    def call(self, provider: str, mode: str) -> Call:
        """Returns what is timed: ``"forward"`` in eval(), or ``"training"`` with gradients."""
        rnn, context = self.rnn(provider), PROVIDERS[provider].context
        if PROVIDERS[provider].step:
            stream, step = rnn.stream(batch_size=len(self.x)), self.x[:, 0]
            return Call(lambda: stream(step), context)
        weights = rnn.fix() if isinstance(rnn, Adapter) else list(rnn.parameters())
        input, options, leaves = self.prepared(provider, mode)
        return Call(chained(rnn, input, [*weights, *leaves], mode, **options), context)

    def explain(self, provider: str, mode: str) -> Any:
        """Returns ``fusedrnn.explain`` of the timed call, or None for other implementations."""
        if not provider.startswith("fusedrnn"):
            return None
        training = mode == "training"
        with PROVIDERS[provider].context(), torch.set_grad_enabled(training):
            input, options, _ = self.prepared(provider, mode)
            return fusedrnn.explain(self.rnn(provider).train(training), input, **options)

    def kept_mb(self, provider: str) -> float:
        """Returns the MB that autograd keeps for backward, without weights and input."""
        rnn = self.rnn(provider).train()
        weights = rnn.fix() if isinstance(rnn, Adapter) else list(rnn.parameters())
        input, options, _ = self.prepared(provider, "training")
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with PROVIDERS[provider].context(), hooks:
            result = rnn(input, **options)  # kept until the sizes are known
        known = {tensor.untyped_storage().data_ptr() for tensor in (input.data, *weights)}
        del result
        return sum(size for pointer, size in sizes.items() if pointer not in known) / 1e6

    def peak_mb(self, provider: str) -> float:
        """Returns the MB of CUDA memory that a training step adds."""
        call = self.call(provider, "training")
        call()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6


def chained(
    rnn: nn.Module,
    input: Any,
    wanted: Sequence[Tensor],
    mode: str,
    **options: Any,
) -> Callable[[], object]:
    """Returns a function that starts from the final state of the call before.

    So no call can be left out, or overlap with the one before. ``wanted`` is differentiated.
    """
    state: Any = None
    cotangents: list[Tensor] = []
    rnn.train(mode == "training")

    def forward() -> object:
        nonlocal state
        with torch.no_grad():
            output, state = rnn(input, state, **options)
        return output

    def training() -> object:
        nonlocal state
        output, final = rnn(input, state, **options)
        outputs = [output.data if isinstance(output, PackedSequence) else output]
        outputs += [final] if isinstance(final, Tensor) else final
        if not cotangents:
            cotangents.extend(torch.randn_like(tensor) for tensor in outputs)
        gradients = torch.autograd.grad(outputs, wanted, cotangents)
        state = final.detach() if isinstance(final, Tensor) else tuple(s.detach() for s in final)
        return gradients

    return forward if mode == "forward" else training


def interleaved(
    calls: dict[str, Call], device: torch.device, *, seconds: float, least: int = 3
) -> dict[str, Times]:
    """Times all calls once a round, beginning with another one each round.

    Args:
        calls: by name, and called before; the others are compared with the first.
        device: on the CPU torch's Timer measures, on CUDA Triton's ``do_bench`` with a cold L2.
        seconds: when to stop, after ``least`` rounds.
    """
    names, samples = list(calls), {name: list[float]() for name in calls}
    slice = min(0.02, seconds / least)  # of a round for each call, filled with repetitions
    deadline = time.perf_counter() + seconds
    while len(samples[names[-1]]) < least or time.perf_counter() < deadline:
        first = len(samples[names[-1]]) % len(names)
        for name in names[first:] + names[:first]:
            with calls[name].context():
                samples[name].append(_milliseconds(calls[name].run, device, slice))
    times = {}
    for name, taken in samples.items():
        p20, p50, p80 = torch.tensor(taken).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        x = median(a / b for a, b in zip(samples[names[0]], taken, strict=True))
        times[name] = Times(p50, p20, p80, x, len(taken))
    return times


def _milliseconds(call: Callable, device: torch.device, seconds: float) -> float:
    """Returns the median of calls that are repeated for some seconds."""
    if device.type == "cpu":
        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        return 1e3 * timer.blocked_autorange(min_run_time=seconds).median
    from triton.testing import do_bench

    return do_bench(call, warmup=5, rep=max(1, int(1e3 * seconds)), return_mode="median")


def graph_ms(call: Call) -> float:
    """Returns the time of a call in a CUDA graph, where no Python runs.

    Raises:
        RuntimeError: the call cannot be captured.
    """
    from triton.testing import do_bench_cudagraph

    with call.context():
        return do_bench_cudagraph(call.run, rep=20, return_mode="median")


def in_fresh_process(function: Callable, *args: Any) -> Any:
    """Runs a function of a module in a new process, whose memory has no history.

    Raises:
        RuntimeError: the process ended without a result.
    """
    # A fork server is as clean as spawn, and imports torch only once.
    has_server = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if has_server else "spawn")
    if has_server:
        context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, context) as pool:
        # Pickled here, because multiprocessing would move tensors to shared memory.
        return pool.submit(_call, pickle.dumps((function, args))).result()


def _call(pickled: bytes) -> Any:
    function, args = pickle.loads(pickled)
    return function(*args)
