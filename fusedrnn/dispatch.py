"""Chooses the backend of a call, by the user's settings and what the backends take.

- ``triton``: the fused kernels, on CUDA tensors (or in Triton's interpreter, if named).
- ``aten``: torch's own operator: cuDNN on CUDA, oneDNN or ATen on the CPU.
- ``torch``: the recurrence step by step in plain torch (``loop.py``); takes every call.

``auto`` runs the first that does not refuse. A named backend runs, or raises with its refusal.
"""

import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import distributed

from .kernels import plan as planning
from .kernels.expected import judge
from .kernels.problem import CACHES, NoPlan, Problem, chip_of
from .records import Facts, StackConfig

BACKENDS = ("auto", "triton", "aten", "torch")  # behind auto in the order in which it tries them
PRECISIONS = ("ieee", "tf32", "tf32x3")
_HAS_GROUPS = distributed.is_available()
# TorchDynamo cannot trace the look-up.
_HAS_TRITON = importlib.util.find_spec("triton") is not None


class _Chosen(threading.local):
    """The choices of a thread; TorchDynamo breaks the graph at a ContextVar."""

    backend: str | None = None
    precision: str | None = None


_local = _Chosen()
# A look-up in os.environ raises and catches two exceptions when a variable is not set.
_environ: Any = getattr(os.environ, "_data", {})
_KEY: Any = os.environ.encodekey("FUSEDRNN_BACKEND")
_INTERPRET: Any = os.environ.encodekey("TRITON_INTERPRET")


def use_backend(name: str) -> AbstractContextManager[None]:
    """Chooses the backend of every call of this thread inside the ``with`` block.

    Blocks nest, and take precedence over the environment variable ``FUSEDRNN_BACKEND``.

    Args:
        name: ``"auto"``, or ``"triton"``, ``"torch"`` or ``"aten"``, which run or raise
            ``NotImplementedError`` with the reason.

    Raises:
        ValueError: there is no backend of that name.

    Example:
        >>> with fusedrnn.use_backend("torch"):
        ...     output, h_n = module(input)
    """
    _check_name("backend", name, BACKENDS)
    return _set("backend", name)


def use_precision(name: str) -> AbstractContextManager[None]:
    """Chooses how this thread's triton backend multiplies fp32 inside the ``with`` block.

    Without it torch's own switch decides, ``torch.backends.cudnn.rnn.fp32_precision``: by default
    tf32. It has no effect on other dtypes and other backends.

    Args:
        name: ``"ieee"`` (fp32 throughout), ``"tf32"`` (operands of products rounded to 10 bits of
            mantissa), or ``"tf32x3"`` (three tf32 products: nearly fp32, on tensor cores).

    Raises:
        ValueError: there is no precision of that name.
    """
    _check_name("precision", name, PRECISIONS)
    return _set("precision", name)


def requested_backend() -> tuple[str, str]:
    """Returns the requested backend and its source; raises ValueError for an unknown name."""
    name = _local.backend
    if name is not None:
        return name, "use_backend"
    is_set = torch.compiler.is_compiling() or _KEY in _environ
    name = os.environ.get("FUSEDRNN_BACKEND") if is_set else None
    if not name:
        return "auto", "default"
    _check_name("FUSEDRNN_BACKEND", name, BACKENDS)
    return name, "FUSEDRNN_BACKEND"


def precision() -> str:
    """Returns how triton multiplies fp32, by ``use_precision`` or the switch of torch's RNNs."""
    switch = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    return _local.precision or ("tf32" if switch == "tf32" else "ieee")


@contextmanager
def _set(name: str, value: str) -> Iterator[None]:
    before = getattr(_local, name)
    setattr(_local, name, value)
    try:
        yield
    finally:
        setattr(_local, name, before)


def _check_name(what: str, name: str, allowed: tuple[str, ...]) -> None:
    if name not in allowed:
        raise ValueError(f"{what} is {name!r}; expected one of {', '.join(allowed)}")


#: Milliseconds of the kernels and of torch's operator by kind of call, as ``measured.py`` found
#: them in this process; None where it could not.
MEASURED: dict[tuple[Facts, str], tuple[float, float] | None] = {}


def kind_of(facts: Facts) -> tuple[Facts, str]:
    """Returns what the times of a call depend on: T in three classes, B up to a power of two."""
    steps = 32 if facts.steps <= 32 else 256 if facts.steps <= 256 else 257
    batch = 1 << (facts.batch - 1).bit_length()  # else the last batch of a corpus would be new
    layers = facts.layers._replace(batch_first=False, dropout=0.0, training=False)
    return facts._replace(steps=steps, batch=batch, layers=layers), precision()


def switches(is_gpu: bool) -> Any:
    """Returns the settings that a choice depends on beside the call, for the keys of caches."""
    backend, variable = _local.backend, _environ.get(_KEY)
    if variable is None and backend != "triton" and not is_gpu:
        return backend
    precise = torch._C._get_fp32_precision_getter("cuda", "rnn")
    grouped = _HAS_GROUPS and distributed.is_initialized()  # its collectives keep SMs
    others = _environ.get(_INTERPRET), precise, grouped, torch._C._get_cudnn_benchmark()
    return backend, variable, _local.precision, *others


def decide(facts: Facts) -> tuple[str, StackConfig]:
    """Returns the backend that runs a call, and how the operator does.

    Raises:
        NotImplementedError: the named backend refuses; the message is the reason.
        ValueError: ``FUSEDRNN_BACKEND`` names no backend.
    """
    # A compiler has symbols for sizes, which have no hash.
    found = _decide(facts) if facts.compiled else _decided(facts, switches(_is_gpu(facts.device)))
    choice, refused = found
    if choice is None:
        raise NotImplementedError("; ".join(f"backend {name!r}: {why}" for name, why in refused))
    return choice


class Explanation(NamedTuple):
    """The choice for one call; prints itself in words."""

    backend: str | None  # the backend that will run, or None if the named one refuses
    requested: str  # "auto" or the named backend
    source: str  # "default", "use_backend" or "FUSEDRNN_BACKEND"
    layers: tuple[str, ...]  # for triton the schedule and tiles of each launch, and the times
    refused: tuple[tuple[str, str], ...]  # the backends tried before, each with its reason
    text: str

    def __repr__(self) -> str:
        return self.text  # in a prompt or a notebook, too


def explain(module: Any, *inputs: Any, **options: Any) -> Explanation:
    """Says which backend would run ``module(*inputs, **options)`` and why, without running it.

    Args:
        module: one of fusedrnn's modules or cells.
        *inputs: the arguments of the module: the input and, if wanted, hx.
        **options: ``lengths`` and ``reset``.

    Returns:
        An ``Explanation`` whose text names the backend, with triton the schedule and tile sizes,
        and why the better backends were refused; a prompt shows it.

    Raises:
        TypeError: the module is not fusedrnn's.
        ValueError, RuntimeError: the call itself would raise them for bad input.
    """
    prepare = getattr(module, "_prepare", None)
    if prepare is None:
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        raise TypeError(f"explain takes one of fusedrnn's modules or cells; got {kind}")
    facts = prepare(*inputs, **options).facts
    requested, source = requested_backend()
    choice, refused = _decide(facts)
    compiled, _ = _decide(facts._replace(compiled=True, eager=False))
    backend, inside = (found[0] if found else None for found in (choice, compiled))
    layers: list[str] = []
    if backend == "triton":
        problem, chip, first = _problem(facts), chip_of(facts.device), 0
        plans = planning.plan_stack(problem, chip)
        for plan in plans:
            last = first + plan.layers - 1
            name = f"layer {first}" if last == first else f"layers {first}-{last}"
            layers.append(f"{name}: {plan.describe()}")
            first = last + 1
        layers.append(f"expected: {judge(problem, plans, chip, facts.steps, facts.input_size)}")
    chosen = backend or "none, the call would raise"
    lines = [f"{facts}\nbackend: {chosen} (asked for: {requested}, {source})"]
    if layers and facts.dtype == torch.float32:
        lines.append(f"precision: {precision()}")
    lines += [*layers, *(f"not {name}: {reason}" for name, reason in refused)]
    if times := MEASURED.get(kind_of(facts)):
        lines.append(f"measured: the kernels {times[0]:.3g} ms, torch's operator {times[1]:.3g} ms")
    if inside != backend:
        lines.append(f"under torch.compile: {inside or 'none, it would raise'}")
    return Explanation(backend, requested, source, tuple(layers), refused, "\n".join(lines))


def runs_as_one_node(facts: Facts) -> bool:
    """Returns whether torch's operator can run inside ours, where it has no autograd."""
    return not (facts.needs_grad or facts.drops_out or "packed" in facts.ragged)


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _decide(facts: Facts, _switches: Any = None) -> tuple[Any, tuple[tuple[str, str], ...]]:
    """Returns the first backend that does not refuse, and those before it with their reasons."""
    if facts.compiled:  # the sizes of a compiler's example must not become guards
        facts = facts._replace(batch=16, steps=256)
    requested = requested_backend()[0]
    refused: list[tuple[str, str]] = []
    for backend in BACKENDS[1:] if requested == "auto" else (requested,):
        if backend == "triton":
            reason = _triton_refusal(facts, requested)
        elif backend == "aten":
            reason = _aten_refusal(facts, requested)
        elif facts.device.type in ("cpu", "cuda", "meta"):
            reason = None
        else:
            reason = f"the operators are registered for the CPU and CUDA, not for {facts.device}"
        if reason is None:
            layers, name, products = facts.layers, backend, "ieee"
            if backend == "triton":
                name, products = requested, _problem(facts).precision
            sizes = layers.bias, layers.num_layers, bool(layers.bidirectional)
            config = StackConfig(facts.cell, name, *sizes, products, facts.recompute)
            return (backend, config), tuple(refused)
        refused.append((backend, reason))
    return None, tuple(refused)


_decided = lru_cache(maxsize=4096)(_decide)
CACHES.append(_decided.cache_clear)


def _triton_refusal(facts: Facts, requested: str) -> str | None:
    """Returns why triton cannot run the call, or under ``auto`` should not, or None."""
    device = facts.device
    if not _HAS_TRITON:
        return "the package triton is not installed"
    if not (_is_gpu(device) or (device.type == "cpu" and requested != "auto" and _interpreting())):
        hint = " (TRITON_INTERPRET=1 and a named backend run CPU tensors)" * (device.type == "cpu")
        return f"the kernels need CUDA tensors, these are on {device}{hint}"
    if facts.dtype == torch.bfloat16 and _interpreting():
        return "Triton's interpreter multiplies the bit patterns of bfloat16"
    if facts.proj_size:
        return "the kernels have no projection"
    if facts.batch == 0:
        return "an empty batch leaves nothing to launch"
    judged = requested == "auto" and _aten_refusal(facts, requested) is None
    if judged and facts.steps == 1:
        return "a single step leaves no step to keep the weights for"
    times = MEASURED and judged and not facts.compiled and MEASURED.get(kind_of(facts))
    sizes = (facts.steps, facts.input_size) if judged and not times else None
    refusal = _planned_refusal(tuple(_problem(facts)), device, sizes)
    was_slower = times and times[0] > times[1]
    return refusal or ("it was slower when both were measured" if was_slower else None)


def _planned_refusal(fields: tuple, device: torch.device, judged: Any) -> str | None:
    """Returns why no kernel takes a ``Problem`` of these fields or, judged by T and I, should."""
    problem, chip = Problem(*fields), chip_of(device)
    try:
        plans = planning.plan_stack(problem, chip)
    except NoPlan as no_plan:
        return str(no_plan)
    verdict = judge(problem, plans, chip, *judged) if judged else None
    is_slower = verdict is not None and not verdict.favours_ours
    return f"it is not expected to be faster: {verdict}" if is_slower else None


# A compiler calls it while tracing and keeps the answer, for the planner caches. This is what
# torch.compiler.assume_constant_result sets, which would import TorchDynamo.
_planned_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _aten_refusal(facts: Facts, requested: str) -> str | None:
    """Returns why torch's operator cannot run the call, or under ``auto`` should not, or None."""
    is_auto, is_cut = requested == "auto", bool({"lengths", "reset"} & {*facts.ragged})
    unrolls = is_auto and facts.compiled and not runs_as_one_node(facts)
    for refuses, reason in (
        (facts.cell == "gru_reset_before", "torch has no operator for GRU(reset_after=False)"),
        (is_cut, "torch's operator takes no lengths and no reset"),
        (facts.states, "torch's operator keeps no state but the last"),
        (facts.recompute, "torch's operator saves all that its backward needs"),
        (is_auto and facts.transformed, "torch.func has no rules for torch's operator"),
        # And AOTAutograd fails on what oneDNN's LSTM saves for its backward (torch 2.11 to 2.13).
        (unrolls, "torch.compile unrolls torch's operator over T, and would for each T again"),
    ):
        if refuses:
            return reason
    if facts.device.type != "cpu" or _is_gpu(facts.device):
        return None
    # Under autocast torch hands every LSTM to oneDNN, which raises where the CPU lacks the dtype.
    if facts.autocast == facts.dtype and facts.cell == "lstm" and not facts.single_step:
        if not _onednn_takes(facts.dtype):
            return f"oneDNN's LSTM under autocast needs a CPU with {facts.dtype}"
        if facts.dtype == torch.float16 and facts.needs_grad:
            return "oneDNN's LSTM under autocast does not train in float16"
    trains = is_auto and facts.needs_grad and facts.dtype == torch.float32
    if not trains or facts.autocast or facts.proj_size:
        return None
    # Calls that the loop trains faster, by ``python -m bench cpu``.
    T, B, I, H = facts.steps, facts.batch, facts.input_size, facts.hidden_size
    if "packed" in facts.ragged:
        return "torch's operator trains packed input more slowly" if T >= 50 and B > 1 else None
    if facts.cell == "lstm":
        is_wide = I >= 4 * H and T * B * I >= 1_600_000 and facts.layers.num_layers == 1
        return "torch's LSTM trains on so wide an input more slowly" if is_wide else None
    least = 10 if facts.cell == "gru" else 20
    return "torch's operator trains so many steps more slowly" if least <= T else None


def _problem(facts: Facts) -> Problem:
    layers = 1 if facts.states else facts.layers.num_layers
    sizes = facts.hidden_size, facts.batch, facts.layers.directions, facts.dtype
    products = precision() if facts.dtype == torch.float32 else "ieee"
    needs = facts.needs_grad, layers, bool(facts.ragged), facts.recompute
    return Problem(facts.cell, *sizes, products, *needs)


def _onednn_takes(dtype: torch.dtype) -> bool:
    """Returns whether oneDNN computes in a dtype on this CPU; without it ATen's own loop runs."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return True
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    return getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()


_onednn_takes._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _interpreting() -> bool:
    """Returns whether Triton runs its kernels in its interpreter; it accepts these values."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
