"""Which backend runs a call, and why: the only place that decides, and the one that explains.

Backends, best first:

- ``triton``: the fused kernels, on CUDA tensors (or in Triton's interpreter, if named).
- ``aten``: torch's own operator: cuDNN on CUDA, oneDNN or ATen on the CPU.
- ``torch``: the recurrence step by step in plain torch, ``loop.py``; takes every cell.
- ``compiled``: the same, small steps on the CPU compiled by AOTInductor, ``compiled.py``; only
  where it is named, for the compiling takes tens of seconds.

``auto`` runs the first that does not refuse. A named backend runs, or raises with its refusal.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from . import compiled
from .gemm import uses_onednn
from .kernels.model import cudnn_step
from .kernels.plan import NoPlan, Plan, Problem, chip_of, plan_stack
from .kernels.spec import SPECS
from .onednn import takes as _onednn_steps
from .requested import BACKENDS as BACKENDS
from .requested import precision as precision
from .requested import requested_backend as requested_backend
from .requested import use_backend as use_backend
from .requested import use_precision as use_precision

#: From how many steps and sequences on the loop trains packed input faster than torch's operator:
#: 1.1 to 4.1 times on two cores with T = 50 to 500, B = 32 to 128, H = 16 to 512. With T = 20 or
#: B = 1 it can be slower; forward alone it mostly is.
_PACKED_STEPS, _PACKED_BATCH = 50, 8
#: From how many steps on the loop trains a GRU and an RNN faster: on two cores, fp32, B = 1 to 64,
#: H = 5 to 256, torch 2.13. With T = 8 a GRU takes torch's operator 0.9 to 1.05 times as long, with
#: T = 15 an RNN 0.87 to 1.27 times.
_LOOP_STEPS = {"gru": 10, "rnn_tanh": 20, "rnn_relu": 20}
_LOOP_REASON = {
    "gru": "training of so many steps takes torch's GRU 1.1 to 2.4 times as long",
    "rnn_tanh": "training of so many steps takes torch's RNN 1.0 to 1.8 times as long",
    "rnn_relu": "training of so many steps takes torch's RNN 1.0 to 1.8 times as long",
}
#: From how many steps on the loop is faster without gradients, too: torch's operator takes 0.98 to
#: 1.7 times as long with T = 50 to 200 (GRU, of these sizes), 1.01 to 1.4 with T = 100 and more
#: (RNN, H = 8 to 1024); on one thread and on two, I = 1 to 300, B = 1 to 1000, fp32, torch 2.13.
#: With T = 30 it is 0.9 to 1.5 and 0.75 to 1.05.
_FORWARD_STEPS = {"gru": 50, "rnn_tanh": 100, "rnn_relu": 100}
_FORWARD_REASON = {
    "gru": "so many steps take torch's GRU 0.98 to 1.7 times as long",
    "rnn_tanh": "so many steps take torch's RNN 1.0 to 1.4 times as long",
    "rnn_relu": "so many steps take torch's RNN 1.0 to 1.4 times as long",
}
#: Where one of both is no more: of a larger GRU torch's operator takes 0.76 to 1.1 times as long.
_SMALL_GRU, _SMALL_BATCH = 64, 8
#: Numbers in a GRU's gx, 4 tiles for each step and sequence, from which on it is 32 MiB and asks
#: the system for new pages: torch's operator then took 0.74 and 0.87 times as long.
_MOST_GX = 1 << 23
#: Numbers in the input from which on, if I >= 4 H, oneDNN's LSTM keeps more than the 32 MiB that
#: glibc's malloc holds at hand, and asks the system for new pages in each call, unless the heap of
#: the process has room, which nobody here can know: T = 100, B = 64, I = 300, H = 16 takes it 2.0
#: times our time with 6,427 new pages (`python -m bench cpu`, imdb-one-hot), and took 0.6 in a
#: process that had room (cpu-second.csv of bench/results/cpu-2026-11-28). Twice both if the input
#: requires a gradient.
_WIDE_INPUT = 1_600_000
#: The B of a compiler's choice, which may know none. A choice made with the B of an example would
#: hold for every other as well, or make a guard of it; the operator plans with the sizes it gets.
_COMPILED_BATCH = 16
_SWITCHES = ("packed", "lengths", "reset", "states", "projected", "recompute")
_PREFERENCE = ("triton", "aten", "torch")
# Looked up once, without importing it: TorchDynamo cannot trace the look-up.
_HAS_TRITON = importlib.util.find_spec("triton") is not None


class Request(NamedTuple):
    """What the choice of a backend depends on. Everything but ``plan`` can be checked by hand."""

    cell: str  # "lstm", "gru", "gru_reset_before", "rnn_tanh", "rnn_relu"
    device: torch.device
    dtype: torch.dtype  # of the computation: under autocast, autocast's
    steps: int  # T
    batch: int  # B
    input_size: int  # I
    hidden_size: int  # H
    proj_size: int = 0
    num_layers: int = 1
    directions: int = 1
    packed: bool = False
    lengths: bool = False
    reset: bool = False
    states: bool = False  # what every step leaves is wanted
    needs_grad: bool = False
    autocast: torch.dtype | None = None
    single_step: bool = False  # a module like nn.LSTMCell
    dropout: bool = False  # masks are drawn between layers
    compiled: bool = False  # being traced by torch.compile or torch.export
    transformed: bool = False  # inside vmap, grad, jvp, ... of torch.func
    projected: bool = False  # the input is x W_ih^T of the first layer already
    needs_input_grad: bool = False  # the input requires one, too
    recompute: bool = False  # asked for, and there is a backward to make gates again for

    def __str__(self) -> str:
        parts = [
            f"{self.cell}{' cell' if self.single_step else ''} on {self.device}",
            str(self.dtype).removeprefix("torch."),
            f"T={self.steps} B={self.batch} I={self.input_size} H={self.hidden_size}",
            f"layers={self.num_layers}",
            f"directions={self.directions}",
        ]
        parts += [f"proj_size={self.proj_size}"] if self.proj_size else []
        parts += [name for name in _SWITCHES if getattr(self, name)]
        parts += ["with gradients" if self.needs_grad else "no gradients"]
        return ", ".join(parts)


@dataclass(frozen=True, repr=False)
class Explanation:
    """The choice for one call, in words; prints itself.

    Attributes:
        request: what was asked to run.
        requested: ``"auto"`` or the named backend.
        source: who named it: ``"default"``, ``"use_backend"`` or ``"FUSEDRNN_BACKEND"``.
        backend: the backend that will run, or None if the named one refuses.
        precision: of fp32 dots on triton, else None.
        layers: for triton the schedule and tiles of each launch, by its layers; for torch whose
            steps they are.
        refused: the backends that were tried before, each with its reason.
        compiled: what a compiler makes of the call: the backend inside of the one node, or None if
            a named one refuses.
        floors_us: for triton the microseconds that one step of the whole stack takes at least,
            forward and, with gradients, backward; modelled (``kernels/model.py``), not measured.
    """

    request: Request
    requested: str
    source: str
    backend: str | None
    precision: str | None
    layers: tuple[str, ...]
    refused: tuple[tuple[str, str], ...]
    compiled: str | None = None
    floors_us: tuple[float, ...] = ()

    def __str__(self) -> str:
        chosen = self.backend or "none, the call would raise"
        lines = [
            str(self.request),
            f"backend: {chosen} (asked for: {self.requested}, {self.source})",
        ]
        lines += [f"precision: {self.precision}"] if self.precision else []
        lines += self.layers
        lines += [f"not {backend}: {reason}" for backend, reason in self.refused]
        if self.compiled != self.backend:
            lines.append(f"under torch.compile: {self.compiled or 'none, it would raise'}")
        return "\n".join(lines)

    # So that a prompt or a notebook shows the text and not a dataclass.
    __repr__ = __str__


def choose(request: Request) -> str:
    """The backend that runs ``request``: ``"triton"``, ``"aten"``, ``"torch"`` or ``"compiled"``.

    Raises:
        NotImplementedError: the named backend refuses; the message is the reason.
        ValueError: ``FUSEDRNN_BACKEND`` names no backend.
    """
    requested, _ = requested_backend()
    backend, refused = _weigh(request, requested)
    if backend is None:
        raise NotImplementedError("; ".join(f"backend {name!r}: {why}" for name, why in refused))
    return backend


def explain(module: Any, *inputs: Any, **options: Any) -> Explanation:
    """Says which backend would run ``module(*inputs, **options)`` and why, without running it.

    Args:
        module: one of fusedrnn's modules or cells.
        *inputs: what the module would be called with: the input and, if wanted, hx.
        **options: likewise ``lengths`` and ``reset``.

    Returns:
        An ``Explanation`` whose text names the backend, with triton the schedule and tile sizes,
        and why the better backends were refused. At a prompt it shows itself; in a script write
        ``print(fusedrnn.explain(module, input))``.

    Raises:
        TypeError: the module is not fusedrnn's.
        ValueError, RuntimeError: whatever the call itself would raise for bad input.
    """
    prepare = getattr(module, "_prepare", None)
    if prepare is None:
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        raise TypeError(f"explain takes one of fusedrnn's modules or cells; got {kind}")
    request = prepare(*inputs, **options).request
    requested, source = requested_backend()
    backend, refused = _weigh(request, requested)
    is_triton = backend == "triton"
    plans = _plans(request) if is_triton else ()
    return Explanation(
        request=request,
        requested=requested,
        source=source,
        backend=backend,
        precision=precision() if is_triton and request.dtype == torch.float32 else None,
        layers=_described(plans) or _steps_of(request, backend),
        refused=refused,
        compiled=_weigh(request._replace(compiled=True), requested)[0],
        floors_us=tuple(map(sum, zip(*([f.step for f in p.floors] for p in plans), strict=True))),
    )


def cpu_prefers_loop(request: Request) -> str | None:
    """Why ``auto`` should leave a call on the CPU to the loop although aten takes it.

    Returns:
        The reason, or None where aten is the better choice, or nothing else was measured.
    """
    # Sizes last: a compiler makes guards of what is compared.
    if not request.needs_grad:
        return _forward_prefers_loop(request)
    T, B = request.steps, request.batch
    if request.packed and T >= _PACKED_STEPS and B >= _PACKED_BATCH:
        return "with gradients a PackedSequence takes torch's operator 1.1 to 4.1 times as long"
    if request.dtype != torch.float32 or request.autocast is not None or request.packed:
        return None  # not measured
    least = _LOOP_STEPS.get(request.cell)
    if least is not None and least <= T:
        return _LOOP_REASON[request.cell]
    wide = 2 if request.needs_input_grad else 1
    if (
        request.cell == "lstm"
        and request.num_layers == 1
        and request.input_size >= wide * 4 * request.hidden_size
        and T * B * request.input_size >= wide * _WIDE_INPUT
    ):
        return (
            "training with so wide an input takes oneDNN's LSTM 0.6 to 2.0 times as long, by "
            "whether it needs new memory in each call"
        )
    return None


def _forward_prefers_loop(request: Request) -> str | None:
    """As ``cpu_prefers_loop``, without gradients."""
    if request.compiled or request.packed or request.autocast is not None:
        return None
    T, B, H = request.steps, request.batch, request.hidden_size
    least = _FORWARD_STEPS.get(request.cell)
    if request.dtype != torch.float32 or least is None or least > T:
        return None
    is_large = (H > _SMALL_GRU and B > _SMALL_BATCH) or 4 * T * B * H > _MOST_GX
    return None if request.cell == "gru" and is_large else _FORWARD_REASON[request.cell]


def prefers_identity(cell: str, device: torch.device, trains: bool) -> bool:
    """Whether rows of a table of ``W_ih e`` go to torch's operator, behind an identity for W_ih:
    it takes no projected input. oneDNN's LSTM is still the fastest without gradients."""
    requested, _ = requested_backend()
    by_onednn = cell == "lstm" and device.type == "cpu" and not trains
    return requested == "aten" or (requested == "auto" and by_onednn)


def prefers_table(
    vocabulary: int, features: int | None, tokens: int, columns: int, by_identity: bool
) -> bool:
    """Whether tokens are looked up in a table of ``W_ih e`` and not multiplied one by one.

    features: None for one-hot rows, whose table is W_ih itself; columns: D*G*H; by_identity: see
    ``prefers_identity``; then it multiplies rows of so many columns.
    """
    if by_identity and columns >= (features or vocabulary):
        return False
    return features is None or vocabulary <= tokens


def runs_as_one_node(request: Request) -> bool:
    """Whether torch's operator can run inside ours, which compilers leave alone: without autograd,
    for which it would have to hand over what it saves."""
    return not (request.needs_grad or request.dropout or request.packed)


def _weigh(request: Request, requested: str) -> tuple[str | None, tuple[tuple[str, str], ...]]:
    """The first backend that does not refuse, or None, and the refusals before it."""
    refused: list[tuple[str, str]] = []
    for backend in _PREFERENCE if requested == "auto" else (requested,):
        reason = _REFUSALS[backend](request, requested)
        if reason is None:
            return backend, tuple(refused)
        refused.append((backend, reason))
    return None, tuple(refused)


def _triton_refusal(request: Request, requested: str) -> str | None:
    """Why triton cannot run the request, or under ``auto`` should not; cheapest test first."""
    named, device = requested == "triton", request.device.type
    if device != "cuda" and not (device == "cpu" and named and _interpreting()):
        hint = (
            " (TRITON_INTERPRET=1 and a named backend run CPU tensors)" if device == "cpu" else ""
        )
        return f"the kernels need CUDA tensors, these are on {request.device}{hint}"
    if not _HAS_TRITON:
        return "the package triton is not installed"
    if request.dtype == torch.bfloat16 and _interpreting():
        return "Triton's interpreter multiplies the bit patterns of bfloat16"
    if request.batch == 0:
        return "an empty batch leaves nothing to launch"
    judged = not named and _aten_refusal(request, requested) is None
    return _planned_refusal(tuple(_problem(request)), request.device, judged)


def _planned_refusal(fields: tuple, device: torch.device, judged: bool) -> str | None:
    """Why no kernel takes the ``Problem`` of these fields; if ``judged``, why one should not."""
    problem = Problem(*fields)
    try:
        plans = plan_stack(problem, chip_of(device))
    except NoPlan as no_plan:
        return str(no_plan)
    return _expected_slower(problem, plans) if judged else None


# A compiler calls it while tracing and keeps the answer: the planner caches, and reads a file. It
# is what torch.compiler.assume_constant_result sets, which would import TorchDynamo for it.
_planned_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _expected_slower(problem: Problem, plans: tuple[Plan, ...]) -> str | None:
    """Why torch's own operator is the better choice on a GPU, or None; a measurement decides."""
    found = [plan.measured for plan in plans if plan.measured]
    if len(found) == len(plans):
        us, torch_us = sum(m.us for m in found), sum(m.torch_us for m in found)
        if us <= torch_us:
            return None
        return f"a step took {us:.2f} us and torch.nn's {torch_us:.2f} us, as {found[0].where}"
    if any(plan.schedule == "stepwise" for plan in plans):
        return "schedule stepwise reads all weights in each step (no speed is measured yet)"
    ours, theirs = sum(plan.step for plan in plans), cudnn_step(problem)
    if theirs is not None and ours > theirs:
        return (
            f"a step takes {ours:.1f} us at least (modelled), and cuDNN's is reported at "
            f"{theirs:.1f} us"
        )
    return None


def _aten_refusal(request: Request, requested: str) -> str | None:
    if request.cell == "gru_reset_before":
        return "torch has no operator for GRU(reset_after=False)"
    if request.lengths or request.reset:
        return "torch's operator takes no lengths and no reset"
    if request.states:
        return "torch's operator keeps no state but the last"
    if request.projected:
        return "torch's operator takes no projected input"
    if request.recompute:
        return "torch's operator saves whatever its backward needs"
    if requested == "auto" and request.transformed:
        return "torch.func has no rules for torch's operator"
    if requested == "auto" and request.compiled and not runs_as_one_node(request):
        # And AOTAutograd fails on what oneDNN's LSTM saves for its backward (torch 2.11 to 2.13).
        return "torch.compile unrolls torch's operator over T, and would for each T again"
    if request.device.type != "cpu":
        return None
    # Under autocast torch hands every LSTM to oneDNN, which raises where the CPU lacks the dtype.
    in_onednn = request.autocast == request.dtype and request.cell == "lstm"
    if in_onednn and not request.single_step and uses_onednn():  # else ATen's own loop runs
        if not _onednn_takes(request.dtype):
            return f"oneDNN's LSTM under autocast needs a CPU with {_name(request.dtype)}"
        if request.dtype == torch.float16 and request.needs_grad:
            return "oneDNN's LSTM under autocast does not train in float16"
    if requested == "auto" and _torch_refusal(request, requested) is None:
        return cpu_prefers_loop(request)
    return None


def _torch_refusal(request: Request, requested: str) -> str | None:
    if request.device.type not in ("cpu", "cuda", "meta"):
        return f"the operators are registered for the CPU and CUDA, not for {request.device}"
    return None


def _compiled_refusal(request: Request, requested: str) -> str | None:
    if request.device.type != "cpu":
        return f"the loop's steps are compiled for the CPU, not for {request.device}"
    return compiled.missing()


_REFUSALS = {
    "triton": _triton_refusal,
    "aten": _aten_refusal,
    "torch": _torch_refusal,
    "compiled": _compiled_refusal,
}


def _plans(request: Request) -> tuple[Plan, ...]:
    """The plan of each launch; raises ``NoPlan``."""
    return plan_stack(_problem(request), chip_of(request.device))


def _steps_of(request: Request, backend: str | None) -> tuple[str, ...]:
    if backend == "compiled":
        reason = _not_compiled(request)
        found = f"{compiled.STEPS} at a time compiled" if reason is None else f"a loop: {reason}"
        return (f"steps: {found}",)
    if backend != "torch":
        return ()
    return ("steps: oneDNN's",) if _onednn_steps(request) else ("steps: a loop",)


def _not_compiled(request: Request) -> str | None:
    """Why none of the steps is compiled, or None."""
    if request.packed or request.lengths or request.reset:
        return "only those of full sequences are compiled"
    columns = SPECS[request.cell].gates * request.hidden_size
    products = request.batch * columns * (request.proj_size or request.hidden_size)
    return compiled.refusal(request.cell, request.steps, products, request.dtype)


def _described(plans: tuple[Plan, ...]) -> tuple[str, ...]:
    """``layer 0: ...``, or ``layers 0-2: ...`` for a launch of three."""
    lines, first = [], 0
    for plan in plans:
        last = first + plan.layers - 1
        name = f"layer {first}" if last == first else f"layers {first}-{last}"
        lines.append(f"{name}: {plan.describe()}")
        first = last + 1
    return tuple(lines)


def _problem(request: Request) -> Problem:
    return Problem(
        request.cell,
        0 if request.projected else request.input_size,
        request.hidden_size,
        _COMPILED_BATCH if request.compiled else request.batch,
        request.directions,
        request.dtype,
        precision(),
        request.needs_grad,
        1 if request.states else request.num_layers,
        request.proj_size,
        request.packed or request.lengths or request.reset,
        layer_by_layer=request.recompute,
    )


def _onednn_takes(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter; the values are the ones it accepts."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
