"""The layers of one launch: the input GEMM and the recurrence, forward and backward.

Forward computes ``gx = x W_ih^T + b_ih`` for all steps in one product and runs a schedule of the
kernels, or the loop. Backward runs it in reverse, which leaves ``dgates``, and computes from them
the gradients of weights and input. Where gates were not saved (``recompute``), it computes them
again, of some steps at a time (Chen et al. 2016, arXiv 1604.06174).
"""

import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from . import loop
from .grads import input_grad, weight_grads
from .kernels import plan as planning
from .kernels.problem import KernelFailed, LaunchRefused, Plan
from .kernels.rows import Rows
from .kernels.tensors import Grads, Layers
from .layout import entering, rows_by_sequence, without_padding
from .records import StackConfig

#: Numbers of gates that are computed again at once: 8 MiB in fp32 on the CPU; more on a GPU, where
#: launches cost more.
_SEGMENT, _SEGMENT_ON_GPU = 1 << 21, 1 << 24
#: The fields that a launch writes.
_WRITTEN = {"forward": ("out", "h_n", "c_n", "gates", "cs"), "backward": ("gates", "h_0", "c_0")}
#: The errors after which a CUDA context takes no more calls.
_STICKY = re.compile(
    r"illegal|misaligned|assert|launch failure|timed out|ECC|hardware stack|invalid address space"
    r"|program counter|context is destroyed|NVLink"
)


class Launch(NamedTuple):
    """Layers that run together, and their plan; None for the loop."""

    layers: range
    plan: Plan | None


@dataclass(slots=True)
class Kind:
    """A kind of call whose checks have passed, and what was decided about it since."""

    facts: Any = None  # ``Facts``
    batched: bool = True
    zeros: Sequence[tuple[int, ...]] = ()  # the shapes of initial states that are not given
    rows: Rows | None = None  # of calls without sequences of their own
    is_plain: bool = True  # autograd alone has to see the call
    cast: torch.dtype | None = None  # of autocast, once it is known that the choice casts
    choice: tuple[str, StackConfig] | None = None
    launches: Sequence[Launch] = ()  # () until they are planned, and again after ``forget``
    shapes: Sequence[Any] = ()  # of the results, planned with them


def launches_of(config: StackConfig, h_0: Tensor, needs_grad: bool, rows: Rows) -> Sequence[Launch]:
    """Returns the launches of a stack, from the first layer up."""
    # A process group takes SMs; every other change of a chip empties the cache.
    grouped = distributed.is_available() and distributed.is_initialized()
    sizes = h_0.shape, h_0.dtype, h_0.device
    return _launches(config, sizes, needs_grad, rows.origins is not None, grouped)


@lru_cache(maxsize=4096)
def _launches(
    config: StackConfig, sizes: tuple, needs_grad: bool, ragged: bool, grouped: bool
) -> Sequence[Launch]:
    if config.is_loop:
        return tuple(Launch(range(n, n + 1), None) for n in range(config.num_layers))
    (_, B, H), dtype, device = sizes
    problem = planning.Problem(
        config.cell, H, B, config.directions, dtype, config.precision, needs_grad,
        config.num_layers, ragged, config.recompute,
    )  # fmt: skip
    plans = planning.plan_stack(problem, planning.chip_of(device))
    ends = accumulate(plan.layers for plan in plans)
    pairs = zip(plans, ends, strict=True)
    return tuple(Launch(range(end - plan.layers, end), plan) for plan, end in pairs)


planning.CACHES.append(_launches.cache_clear)


@cache
def _schedule(name: str) -> Any:
    """Imports a module of the kernels, which needs Triton, on first use."""
    return import_module(f".kernels.{name}", __package__)


def _launch(
    config: StackConfig, plan: Plan, direction: str, tensors: Sequence[Any], rows: Rows
) -> None:
    """Runs a schedule on Layers and, backward, Grads; its own failures become KernelFailed."""
    # A stack's own tensors are aligned, but not the parts of some layers or steps.
    is_cut = plan.layers < config.num_layers or config.recompute
    given = _aligned(tensors) if is_cut else tensors
    try:
        getattr(_schedule(plan.schedule), direction)(config.cell, plan, *given, rows)
    except (LaunchRefused, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and _STICKY.search(str(error)):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise KernelFailed(f"{type(error).__name__}: {lines[0] if lines else ''}") from error
    for name in _WRITTEN[direction] if is_cut else ():
        pairs: Any = [getattr(each[-1], name) for each in (tensors, given)]
        pairs = zip(*pairs, strict=True) if type(pairs[0]) is tuple else [pairs]
        for tensor, copy in pairs:
            if copy is not tensor:
                tensor.copy_(copy)


def _aligned(tensors: Sequence[Any]) -> list[Any]:
    """Copies tensors that begin elsewhere than at a multiple of 16 bytes, each once.

    A kernel is compiled again for every mixture of aligned and other pointers, as which the parts
    of a buffer, one for each layer, would come.
    """
    copies: dict[int, Tensor] = {}

    def own(value: Any) -> Any:
        if type(value) is tuple:
            return tuple(map(own, value))
        if value is None or value.data_ptr() % 16 == 0:
            return value
        if id(value) not in copies:
            copies[id(value)] = value.clone()
        return copies[id(value)]

    return [fields._make(map(own, fields)) for fields in tensors]


def forward(config: StackConfig, plan: Plan | None, x: Tensor, layers: Layers, rows: Rows) -> None:
    """Runs the layers of one launch: fills out, h_n, c_n and, where given, gates and cs.

    ``x [R, I]``, or dense ``[T, B, I]`` of any strides, is the input of the first layer. ``layers``
    has no gx yet.
    """
    D = 2 if config.bidirectional else 1
    biases: Sequence[Any] = layers.b_ih or (None,) * D
    if plan is None:
        room, (columns, H) = layers.gates, layers.w_hh[0].shape
        if room is None or not room.shape[-1]:
            room = x.new_empty(D, rows.total, max(config.spec.gates, config.spec.saved) * H)
        if layers.b_hh is not None:
            pairs = zip(biases, layers.b_hh, strict=True)
            biases = [loop.folded_bias(config.cell, *pair) for pair in pairs]
        _input_products(x, layers.w_ih, biases, room[..., :columns])
        loop.forward(config.cell, layers._replace(gx=room), rows)
        return
    with gemm_precision(config.precision, x):
        if D == 1 and x.is_contiguous():  # a kernel reads gx in the form of x
            gx = F.linear(x, layers.w_ih[0], biases[0])
        else:
            gx = x.new_empty(D, rows.total, layers.w_hh[0].shape[0])
            _input_products(x, layers.w_ih[:D], biases[:D], gx)
        read = layers.read(plan.layers, rows.origins, rows.starts, gx)
        _launch(config, plan, "forward", (read,), rows)


def _input_products(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], gx: Tensor
) -> None:
    """Fills gx ``[D, R, G*H]`` with ``x W_ih^T + b_ih``."""
    by_sequence = rows_by_sequence(x, gx.shape[-1])
    rows = x.reshape(-1, x.shape[-1]) if by_sequence is None else by_sequence
    for out, weight, bias in zip(gx.unbind(), weights, biases, strict=True):
        if by_sequence is None:
            F.linear(rows, weight, bias, out=out)  # type: ignore[call-arg]
        else:
            product = F.linear(rows, weight, bias).unflatten(0, x.shape[:2][::-1])
            out.unflatten(0, x.shape[:2]).copy_(product.transpose(0, 1))


def backward(
    config: StackConfig, plan: Plan | None, xs: Sequence[Tensor], layers: Layers, grads: Grads,
    rows: Rows, needs_input: bool, needs_params: bool,
) -> tuple[Tensor | None, list[Tensor]]:  # fmt: skip
    """Runs the layers of one launch backwards.

    ``xs`` has the input of each layer, as of ``forward``; ``layers.gates`` is None if they are
    computed again. ``grads`` has the gradients of out, cs, h_n and c_n; h_0 and c_0 are filled.

    Returns:
        dx ``[R, I]`` of the first layer or None, and the gradients of the weights in torch's order.
    """
    D, (Z, _, H) = config.directions, layers.h_0.shape
    parts: Iterable[tuple] = [(None, layers, grads, rows)]
    if layers.gates is None:
        xs = [_as_factor(xs[0], layers, rows).reshape(-1, xs[0].shape[-1])]
        parts = _segments(config, xs[0], layers, grads, rows)
    dx = layers.h_0.new_empty(rows.total, xs[0].shape[-1]) if needs_input else None
    total: list[Tensor] = []
    for own, part, part_grads, part_rows in parts:
        dgates = layers.h_0.new_empty(Z, part_rows.total, config.spec.grad_tiles * H)
        d_out, d_cs, d_h_n, d_c_n, _, d_h_0, d_c_0 = part_grads
        part_grads = Grads(d_out, d_cs, d_h_n, d_c_n, dgates, d_h_0, d_c_0)
        with gemm_precision(config.precision, dgates):
            if plan is None:
                loop.backward(config.cell, part, part_grads, part_rows)
            else:
                read = part.read(plan.layers, part_rows.origins, part_rows.starts)
                _launch(config, plan, "backward", (read, part_grads), part_rows)
            found: list[Tensor] = []
            if dx is not None:
                input_grad(dgates[:D], layers.w_ih[:D], dx if own is None else dx[own])
            if needs_params:
                of_part = [_as_factor(x if own is None else x[own], layers, rows) for x in xs]
                for z, of_z in enumerate(dgates.unbind()):
                    found += weight_grads(config.cell, z, of_part[z // D], part, of_z, part_rows)
        total = [a.add_(b) for a, b in zip(total, found, strict=True)] if total else found
    return dx, total


def _as_factor(x: Tensor, layers: Layers, rows: Rows) -> Tensor:
    """Returns the input of a layer as a factor of products: in their dtype, without padding."""
    return without_padding(x.to(layers.h_0.dtype), rows)


def _segments(
    config: StackConfig, x: Tensor, layers: Layers, grads: Grads, rows: Rows
) -> Iterator[tuple[slice, Layers, Grads, Rows]]:
    """Yields some rows of a layer as a layer with gates, the last steps first.

    A slice of rows does not hold the same steps of both directions or of all sequences, so only
    dense rows of one direction are cut.
    """
    D, B, H = layers.h_0.shape
    left = layers.out[0].unflatten(1, (D, H)).transpose(0, 1)
    pairs = [(layers.h_0, left)] + ([] if layers.cs is None else [(layers.c_0, layers.cs)])
    states = [
        torch.stack([entering(rows, d, first[d], last[d]) for d in range(D)])
        for first, last in pairs
    ]
    size = _SEGMENT_ON_GPU if x.is_cuda else _SEGMENT
    most = max(size // max(config.spec.gates * H * B, 1), 1) * B
    if is_whole := D == 2 or rows.origins is not None or not B:
        most = max(rows.total, 1)
    for stop in range(max(rows.total, 1), 0, -most):
        own = slice(max(stop - most, 0), stop)
        of_own = [state[:, own] for state in states]
        first = [layers.h_0, layers.c_0] if is_whole else [*(s[:, :B] for s in of_own), None]
        part = layers._replace(
            h_0=first[0],
            c_0=first[1],
            out=(layers.out[0][own],) * D,
            gates=_gates(config, x[own], layers, of_own),
            cs=None if layers.cs is None else layers.cs[:, own],
        )
        part_grads = grads._replace(
            out=None if grads.out is None else grads.out[own],
            cs=None if grads.cs is None else grads.cs[:, own],
        )
        part_rows = rows if is_whole else Rows((stop - own.start) // B, B)
        yield own, part, part_grads, part_rows
        # What leaves this segment reaches the one before it.
        c_n = None if grads.c_0 is None else grads.c_0.clone()
        grads = grads._replace(h_n=grads.h_0.clone(), c_n=c_n)


def _gates(config: StackConfig, x: Tensor, layers: Layers, states: Sequence[Tensor]) -> Tensor:
    """Computes the gates ``[D, r, S*H]`` of r rows as those of one step of r sequences.

    states: h, and c of a cell that has it, which entered the rows, ``[D, r, H]`` each.
    """
    D, r, H = states[0].shape
    h_0, *c_0 = (state.contiguous() for state in states)
    step = layers._replace(
        h_0=h_0,
        c_0=c_0[0] if c_0 else None,
        h_n=torch.empty_like(h_0),
        c_n=torch.empty_like(h_0) if c_0 else None,
        out=(x.new_empty(r, D * H),) * D,
        gates=x.new_empty(D, r, config.spec.saved * H),
        cs=None,
    )
    plan = None
    if not config.is_loop:
        problem = planning.Problem(config.cell, H, r, D, x.dtype, config.precision, True)
        plan = planning.stepwise(problem, planning.chip_of(x.device))
    forward(config, plan, x, step, Rows(1, r))
    return step.gates


def gemm_precision(precision: str, like: Tensor) -> AbstractContextManager[None]:
    """Makes the library's fp32 products on CUDA as exact as the kernels' (tf32x3: ieee)."""
    return _switched(precision) if like.is_cuda and like.dtype == torch.float32 else _NOTHING


_NOTHING = nullcontext()

_switch = threading.Lock()
_users: list[str] = []  # what the switch was, once for each thread within ``_switched``


@contextmanager
def _switched(precision: str) -> Iterator[None]:
    """Sets the switch; the last of several threads puts back what the first has found."""
    matmul, wanted = torch.backends.cuda.matmul, "tf32" if precision == "tf32" else "ieee"
    with _switch:
        found = matmul.fp32_precision
        _users.append(_users[0] if _users else found)
        if found != wanted:
            matmul.fp32_precision = wanted
    try:
        yield
    finally:
        with _switch:
            before = _users.pop()
            if not _users and matmul.fp32_precision != before:
                matmul.fp32_precision = before
