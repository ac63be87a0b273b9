"""Times and memory of one workload and cell: several providers in turns, on the same numbers."""

import multiprocessing
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.benchmark import Timer

import fusedrnn

from .cases import Workload
from .data import Corpus
from .models import Model, examples_of
from .providers import PROVIDERS, TORCH, Adapter, build, rnn_fp32

PASSES = ("forward", "training")
#: Steps that the gate compares in cases that are only timed: kernels do not depend on T.
_GATED_STEPS = 64


class Settings(NamedTuple):
    """The device, the seed, and the seconds spent on the times of one pass."""

    device: torch.device
    seed: int = 0
    seconds: float = 0.7
    least_rounds: int = 3


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
    ) -> "BenchmarkCase":
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
            model = Model(rnn, workload)
            start = model.state_dict()
            with torch.no_grad():
                x = model.features(examples.batch(torch.arange(workload.B)))
            if isinstance(x, PackedSequence):
                x, lengths = pad_packed_sequence(x, batch_first=True)
        # Rounded to the tested dtype, so that the gate's fp64 truth starts from the same weights.
        dtype = getattr(torch, workload.dtype)
        weights = {name: weight.to(dtype) for name, weight in rnn.state_dict().items()}
        return cls(workload, cell, weights, x.to(settings.device, dtype), lengths, start, examples)

    def shortened(self) -> "BenchmarkCase":
        """The case that the gate runs."""
        if self.examples is not None or len(self.x[0]) <= _GATED_STEPS:
            return self
        lengths = None if self.lengths is None else self.lengths.clamp(max=_GATED_STEPS)
        return self._replace(x=self.x[:, :_GATED_STEPS], lengths=lengths)

    def precision(self) -> str:
        """Returns how fp32 is multiplied on CUDA, where torch.nn takes tf32 by default."""
        return rnn_fp32() if self.x.is_cuda and self.x.dtype == torch.float32 else ""

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

    def prepared(self, provider: str, mode: str) -> tuple[Any, Any, dict[str, Any], list[Tensor]]:
        """Returns module, input, options, and what is differentiated; data are not."""
        rnn = self.rnn(provider).train(mode == "training")
        wanted = rnn.fix() if isinstance(rnn, Adapter) else list(rnn.parameters())
        input, options = self.inputs(provider, self.x)
        if mode == "training" and self.workload.task in ("embedding", "none"):
            leaf = input.data.detach().clone().requires_grad_()
            wanted.append(leaf)
            input = input._replace(data=leaf) if isinstance(input, PackedSequence) else leaf
        return rnn, input, options, wanted

    def call(self, provider: str, mode: str) -> Callable[[], object]:
        """Returns what is timed: ``"forward"`` in eval(), or ``"training"`` with gradients.

        Each call starts from the final state of the one before, so none can be left out or overlap.
        """
        if PROVIDERS[provider].step:
            stream, step = self.rnn(provider).stream(batch_size=len(self.x)), self.x[:, 0]
            return lambda: stream(step)
        rnn, input, options, wanted = self.prepared(provider, mode)
        state: Any = None
        cotangents: list[Tensor] = []

        def forward() -> object:
            nonlocal state
            with torch.no_grad():
                output, state = rnn(input, state, **options)
            return output

        def training() -> object:
            nonlocal state
            output, final = rnn(input, state, **options)
            finals = (final,) if isinstance(final, Tensor) else final
            outputs = [output.data if isinstance(output, PackedSequence) else output, *finals]
            if not cotangents:
                cotangents.extend(map(torch.randn_like, outputs))
            gradients = torch.autograd.grad(outputs, wanted, cotangents)
            detached = tuple(s.detach() for s in finals)
            state = detached if isinstance(final, tuple) else detached[0]
            return gradients

        return forward if mode == "forward" else training

    def explain(self, provider: str, mode: str) -> Any:
        """Returns ``fusedrnn.explain`` of the timed call, or None for other implementations."""
        if not provider.startswith("fusedrnn"):
            return None
        with PROVIDERS[provider].context(), torch.set_grad_enabled(mode == "training"):
            rnn, input, options, _ = self.prepared(provider, mode)
            return fusedrnn.explain(rnn, input, **options)

    def kept_mb(self, provider: str) -> float:
        """Returns the MB that autograd keeps for backward, without weights and input."""
        rnn, input, options, wanted = self.prepared(provider, "training")
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with PROVIDERS[provider].context(), hooks:
            result = rnn(input, **options)  # kept until the sizes are known
        for tensor in (input.data, *wanted):
            sizes.pop(tensor.untyped_storage().data_ptr(), None)
        del result
        return sum(sizes.values()) / 1e6


def interleaved(calls: dict[str, Callable], settings: Settings) -> dict[str, dict[str, float]]:
    """Times all calls once a round, in changing order; x is a ratio to the first."""
    names, samples = list(calls), {name: list[float]() for name in calls}
    slice = min(0.02, settings.seconds / settings.least_rounds)  # of a call in a round
    deadline, rounds = time.perf_counter() + settings.seconds, 0
    while calls and (rounds < settings.least_rounds or time.perf_counter() < deadline):
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            with PROVIDERS[name].context():
                samples[name].append(_milliseconds(calls[name], settings.device, slice))
        rounds += 1
    times = {}
    for name, taken in samples.items():
        p20, p50, p80 = torch.tensor(taken).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        x = median(a / b for a, b in zip(samples[names[0]], taken, strict=True))
        times[name] = {"ms": p50, "p20": p20, "p80": p80, "x": x, "rounds": rounds}
    return times


def _milliseconds(call: Callable, device: torch.device, seconds: float) -> float:
    """Returns the median of calls that are repeated for some seconds.

    On the CPU by torch's Timer, on CUDA by Triton's ``do_bench``, with a cold L2 cache.
    """
    if device.type == "cpu":
        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        return 1e3 * timer.blocked_autorange(min_run_time=seconds).median
    from triton.testing import do_bench

    return do_bench(call, warmup=5, rep=max(1, int(1e3 * seconds)), return_mode="median")


def on_cuda(call: Callable[[], object]) -> dict[str, Any]:
    """Returns the MB that a call adds, and its time in a CUDA graph, where no Python runs."""
    from triton.testing import do_bench_cudagraph

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    found: dict[str, Any] = {"peak_mb": (torch.cuda.max_memory_allocated() - before) / 1e6}
    try:
        found["device_ms"] = do_bench_cudagraph(call, rep=20, return_mode="median")
    except RuntimeError as error:
        found["note"] = f"not captured in a CUDA graph: {error}".partition("\n")[0]
    return found


def in_fresh_processes(count: int, function: Callable, *args: Any) -> list[Any]:
    """Runs a function of a module in some new processes, one after another.

    Their memory has no history. All have imported torch before the first runs the function.
    """
    # Pickled here, because multiprocessing would move tensors to shared memory.
    imports, call = map(pickle.dumps, ((callable, (function,)), (function, args)))
    with ExitStack() as stack:
        context = multiprocessing.get_context("spawn")
        pools = [stack.enter_context(ProcessPoolExecutor(1, context)) for _ in range(count)]
        for started in [pool.submit(_call, imports) for pool in pools]:
            started.result()
        return [pool.submit(_call, call).result() for pool in pools]


def _call(pickled: bytes) -> Any:
    function, args = pickle.loads(pickled)
    return function(*args)
