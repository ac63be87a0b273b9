"""``python -m bench host``: the host's time of a call, up to its launches, and of cells.

It needs no GPU: tensors are on the CPU, and neither a launch nor a product computes anything.
"""

import argparse
import os
from collections.abc import Callable
from functools import partial
from itertools import product
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

import fusedrnn
from fusedrnn import dispatch, grads
from fusedrnn.kernels import problem

from .measure import PASSES, in_fresh_processes

CELLS, SIZES = ("LSTMCell", "GRUCell", "RNNCell"), ((4, 10, 12), (60, 24, 24), (32, 64, 128))


def run(options: argparse.Namespace) -> int:
    for lines in (stack_lines, cell_lines):
        print("\n".join(*in_fresh_processes(1, lines)))
    return 0


def stack_lines() -> list[str]:
    """Times a layer of T = 3, B = 2, I = 8, H = 64 as on an H100; changes the process for good.

    "Launched" is the time until the recurrence is launched, "whole" until the call returns: in
    backward the products for the weights follow while the GPU is busy.
    """
    os.environ.pop("TRITON_INTERPRET", None)
    from triton.runtime.jit import JITFunction

    def empty_product(*factors: Tensor, out: Any = None, **options: Any) -> Tensor:
        left, right = factors[-2:]
        return left.new_empty(left.shape[0], right.shape[1]) if out is None else out

    def empty_linear(x: Tensor, weight: Tensor, bias: Any = None, out: Any = None) -> Tensor:
        return x.new_empty(*x.shape[:-1], weight.shape[0]) if out is None else out

    launched = [0.0]
    torch.mm = torch.addmm = empty_product  # type: ignore[assignment]
    torch.nn.functional.linear = empty_linear  # type: ignore[assignment]
    JITFunction.run = lambda self, *args, **options: launched.__setitem__(0, process_time())
    dispatch._is_gpu = lambda device: True
    problem._chip_of = lambda device: problem.CHIPS["sm_90"]  # type: ignore[assignment]
    grads._NARROW = range(0)  # a matter of the CPU
    found = ["us           forward: launched   whole   backward: launched   whole"]
    for name in ("plain", "autocast", "lengths"):
        dtype = torch.float32 if name == "autocast" else torch.bfloat16
        module, x = fusedrnn.LSTM(8, 64, dtype=dtype), torch.randn(3, 2, 8, dtype=dtype)
        given: Any = {"lengths": torch.tensor([3, 2])} if name == "lengths" else {}
        call, weights = partial(module, x, **given), list(module.parameters())
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast")
        with autocast, fusedrnn.use_backend("triton"):
            y = call()[0]
            back = partial(torch.autograd.grad, y, weights, y, retain_graph=True)
            us = (*_launched_and_whole(launched, call), *_launched_and_whole(launched, back))
        found.append("{:12} {:17.0f} {:7.0f} {:20.0f} {:7.0f}".format(name, *us))
    return found


def cell_lines() -> list[str]:
    """Compares the cells with torch's, from the same weights."""
    found = ["cell       B   I   H  pass     torch (us)  times as fast"]
    for name, (B, I, H), mode in product(CELLS, SIZES, PASSES):
        theirs, ours = getattr(nn, name)(I, H), getattr(fusedrnn, name)(I, H)
        ours.load_state_dict(theirs.state_dict())
        x, h, c = torch.randn(B, I), torch.randn(B, H), torch.randn(B, H)
        given = x, (h, c) if name == "LSTMCell" else h
        calls = [partial(_run, module, given, mode) for module in (theirs, ours)]
        with torch.set_grad_enabled(mode == "training"):
            torch.testing.assert_close(*(call() for call in calls))
            us = [min(ts) for ts in zip(*([_us(c) for c in calls] for _ in range(5)), strict=True)]
        found.append(f"{name:8} {B:3} {I:3} {H:3}  {mode:8} {us[0]:10.1f} {us[0] / us[1]:14.2f}")
    return found


def _run(module: nn.Module, given: tuple[Any, ...], mode: str) -> Any:
    result = module(*given)
    if mode == "forward":
        return result
    h = result[0] if isinstance(result, tuple) else result
    return torch.autograd.grad(h, list(module.parameters()), h.detach())


def _us(call: Callable[[], object]) -> float:
    """Returns microseconds of this process, in which one thread runs; others do not count."""
    timer = Timer("call()", globals={"call": call}, timer=process_time, num_threads=1)
    return 1e6 * min(timer.blocked_autorange(min_run_time=0.1).times)


def _launched_and_whole(launched: list[float], call: Callable[[], object]) -> list[float]:
    """Returns microseconds until the time that a call leaves in ``launched``, and until its end."""
    found = []
    for _ in range(2000):
        start, _ = process_time(), call()
        found.append((launched[0] - start, process_time() - start))
    return [1e6 * min(times) for times in zip(*found, strict=True)]
