"""``python -m bench host``: the host's time from a call to its launches, and of cells.

No GPU is needed: tensors are on the CPU, and neither a launch nor a product computes anything. What
remains is Python's and torch's time.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import product
from time import process_time
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

import fusedrnn
from fusedrnn import dispatch
from fusedrnn.kernels import problem

from .measure import PASSES, in_fresh_process

#: Goals in microseconds, forward and backward.
GOALS = {"plain": (60, 80), "autocast": (60, 80), "lengths": (150, 150)}
CELLS, SIZES = ("LSTMCell", "GRUCell", "RNNCell"), ((4, 10, 12), (60, 24, 24), (32, 64, 128))


def run(options: argparse.Namespace) -> int:
    for lines in (stack_lines, cell_lines):
        print("\n".join(in_fresh_process(lines)), flush=True)
    return 0


def stack_lines() -> list[str]:
    """Times a layer of T = 3, B = 2, I = 8, H = 64 as on an H100."""
    os.environ.pop("TRITON_INTERPRET", None)
    from triton.runtime.jit import JITFunction

    torch.set_num_threads(1)
    found = ["from call to launch (us)    forward goal backward goal"]
    with ExitStack() as stack, fusedrnn.use_backend("triton"):
        for owner, name, value in (
            (JITFunction, "run", lambda *args, **options: None),
            (torch, "mm", _empty_product),
            (torch, "addmm", _empty_product),
            (dispatch, "_is_gpu", lambda device: True),
            (problem, "_chip_of", lambda device: problem.CHIPS["sm_90"]),
        ):
            stack.enter_context(patch.object(owner, name, value))
        for name, goals in GOALS.items():
            dtype = torch.float32 if name == "autocast" else torch.bfloat16
            module, x = fusedrnn.LSTM(8, 64, dtype=dtype), torch.randn(3, 2, 8, dtype=dtype)
            given: Any = {"lengths": torch.tensor([3, 2])} if name == "lengths" else {}
            with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
                call = partial(module, x, **given)
                output, weights = call()[0], list(module.parameters())
                grad = partial(torch.autograd.grad, output, weights, output, retain_graph=True)
                found.append(
                    f"{name:27} {_us(call):7.0f} {goals[0]:4} {_us(grad):8.0f} {goals[1]:4}"
                )
    return found


def cell_lines() -> list[str]:
    """Compares the cells with torch's, from the same weights."""
    torch.set_num_threads(1)
    found = ["cell       B   I   H  pass     torch (us)  times as fast"]
    for name, (B, I, H), mode in product(CELLS, SIZES, PASSES):
        theirs, ours = getattr(nn, name)(I, H), getattr(fusedrnn, name)(I, H)
        ours.load_state_dict(theirs.state_dict())
        x, h = torch.randn(B, I), torch.randn(B, H)
        hx = (h, torch.randn(B, H)) if name == "LSTMCell" else h
        calls = [_call(module, x, hx, mode) for module in (theirs, ours)]
        torch.testing.assert_close(*(call() for call in calls))
        us = [
            min(times) for times in zip(*([_us(c) for c in calls] for _ in range(5)), strict=True)
        ]
        found.append(f"{name:8} {B:3} {I:3} {H:3}  {mode:8} {us[0]:10.1f} {us[0] / us[1]:14.2f}")
    return found


def _empty_product(*factors: Tensor, out: Tensor | None = None, **options: Any) -> Tensor:
    shape = len(factors[-2]), factors[-1].shape[1]
    return factors[-1].new_empty(shape) if out is None else out


def _call(module: nn.Module, x: Tensor, hx: Any, mode: str) -> Callable[[], Any]:
    def forward() -> Any:
        with torch.no_grad():
            return module(x, hx)

    def training() -> Any:
        result = module(x, hx)
        h = result[0] if isinstance(result, tuple) else result
        return torch.autograd.grad(h, list(module.parameters()), h.detach())

    return forward if mode == "forward" else training


def _us(call: Callable[[], object]) -> float:
    # Of the process, in which one thread runs: other programs do not count.
    timer = Timer("call()", globals={"call": call}, timer=process_time, num_threads=1)
    return 1e6 * min(timer.blocked_autorange(min_run_time=0.1).times)
