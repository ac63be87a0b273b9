"""Long use: thousands of calls in four threads."""

import gc
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import fusedrnn

pytestmark = pytest.mark.slow
CALLS, THREADS = int(os.environ.get("FUSEDRNN_SOAK", "3000")), 4
STATM = Path("/proc/self/statm")


def cases():
    """Returns calls of every cell and form, on both CPU backends."""
    made, random_ints = [], random.Random(0)
    for kind in ("LSTM", "GRU", "RNN"):
        for backend in ("auto", "torch"):
            for kwargs in ({}, {"num_layers": 2}, {"bidirectional": True}, {"recompute": True}):
                T, B = random_ints.randint(1, 9), random_ints.randint(1, 4)
                options = {"lengths": torch.randint(T + 1, (B,))} if backend == "torch" else {}
                module = getattr(fusedrnn, kind)(3, 5, **kwargs)
                made.append((backend, module, torch.randn(T, B, 3), options))
    return made


def result(case):
    """Returns the output and the gradients of one call."""
    backend, module, x, options = case
    with fusedrnn.use_backend(backend):
        output = module(x, **options)[0]
        return [output.detach(), *torch.autograd.grad(output.sum(), list(module.parameters()))]


@pytest.mark.skipif(not STATM.exists(), reason="there is no /proc/self/statm")
def test_thousands_of_calls_in_four_threads():
    """Every call gives the same bits, each thread has its own backend, and memory does not grow."""
    every, used = cases(), []
    expected = [result(case) for case in every]

    def work(seed):
        for n in random.Random(seed).choices(range(len(every)), k=CALLS // THREADS // 2):
            assert all(map(torch.equal, result(every[n]), expected[n])), n

    for _ in range(2):  # in the first round allocators and caches find their size
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(work, range(THREADS)))
        gc.collect()
        used.append(int(STATM.read_text().split()[1]) * 4096)
    assert used[1] - used[0] < 8 << 20, used
