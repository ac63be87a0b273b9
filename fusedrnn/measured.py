"""Times a new kind of call by the kernels and by torch's operator on the user's GPU.

It does where ``torch.backends.cudnn.benchmark`` is set, by which a user asks cuDNN for the same, or
``FUSEDRNN_BENCHMARK=1``; ``FUSEDRNN_BENCHMARK=0`` forbids it. ``auto`` follows the times for the
rest of the process, instead of what it would expect.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .kernels.problem import KernelFailed, LaunchRefused, forget
from .testing import error_budget

#: "1", "0" or None; not read again, for that takes as long as some of the checks of a call.
_FORCED = os.environ.get("FUSEDRNN_BENCHMARK")
_BACKENDS = ("triton", "aten")
_ROUNDS = 5
#: What the call itself will meet again and report; of memory it may have enough.
_EXPECTED = (KernelFailed, LaunchRefused, NotImplementedError, torch.OutOfMemoryError)

_Run = Callable[[Any], tuple[Any, Any]]


def consider(call: Any, run: _Run) -> bool:
    """Measures a call by ``run`` if that is wanted, possible and not done.

    Returns False if it will be possible later, so that the present choice is not the last one.
    """
    facts = call.facts
    is_wanted = torch._C._get_cudnn_benchmark() if _FORCED is None else _FORCED == "1"
    if not is_wanted or not dispatch._is_gpu(facts.device):
        return True
    kind, is_auto = dispatch.kind_of(facts), dispatch.requested_backend()[0] == "auto"
    is_plain = facts.eager and not facts.transformed and facts.steps > 1
    if not is_auto or not is_plain or kind in dispatch.MEASURED:
        return True
    if torch.cuda.is_current_stream_capturing():
        return False
    dispatch.MEASURED[kind] = None
    with suppress(*_EXPECTED):
        dispatch.MEASURED[kind] = _times(_detached(call), run)
    forget()
    return True


def _times(call: Any, run: _Run) -> tuple[float, float]:
    """Compares the results of both backends, then times them in turns."""
    ref, got = (_results(call, run, backend) for backend in reversed(_BACKENDS))
    with torch.autocast(call.facts.device.type, enabled=False):
        truth = _results(_detached(call, torch.float64), run, "aten")
    is_coarse = call.facts.dtype == torch.float32 and dispatch.precision() == "tf32"
    for i, of in enumerate(zip(got, ref, truth, strict=True)):
        verdict = error_budget(f"result {i}", *of, eps=2.0**-11 if is_coarse else None)
        if not verdict.ok:
            message = f"fusedrnn's kernels are wrong here ({verdict}); torch's operator runs it: "
            warnings.warn(f"{message}{call.facts}", RuntimeWarning, stacklevel=2)
            return float("inf"), 0.0
    rounds = [[_milliseconds(call, run, backend) for backend in _BACKENDS] for _ in range(_ROUNDS)]
    ours, theirs = map(min, zip(*rounds, strict=True))
    return ours, theirs


def _detached(call: Any, dtype: torch.dtype | None = None) -> Any:
    """Returns a call without history and dropout; in another dtype without autocast."""
    facts = call.facts._replace(layers=call.facts.layers._replace(dropout=0.0))
    facts = facts._replace(dtype=dtype, autocast=None) if dtype else facts

    def own(tensor: Tensor) -> Tensor:
        needs_grad = facts.needs_grad and tensor.requires_grad
        return tensor.detach().to(dtype or tensor.dtype).requires_grad_(needs_grad)

    tensors = {"states": tuple(map(own, call.states)), "params": list(map(own, call.params))}
    return call._replace(facts=facts, kind=None, input=own(call.input), **tensors)


def _results(call: Any, run: _Run, backend: str) -> Sequence[Tensor]:
    """Returns output, final states and gradients, the output's own being the output."""
    with torch.set_grad_enabled(call.facts.needs_grad), dispatch.use_backend(backend):
        output, hx = run(call._replace(nested=None))
        output = output if isinstance(output, Tensor) else output.data
        results = [output, *((hx,) if isinstance(hx, Tensor) else hx)]
        if call.facts.needs_grad:
            leaves = [t for t in (call.input, *call.states, *call.params) if t.requires_grad]
            results += torch.autograd.grad(output, leaves, output.detach())
    return [result.detach() for result in results]


def _milliseconds(call: Any, run: _Run, backend: str) -> float:
    stream = torch.cuda.current_stream(call.input.device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(stream)
    _results(call, run, backend)
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end)
