"""Tests of long use: thousands of calls in four threads, worker processes, an interrupted call."""

import gc
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

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


class Encoded(Dataset):
    """A dataset that runs a module in its worker process."""

    def __init__(self):
        self.module, self.x = fusedrnn.GRU(3, 4), torch.randn(6, 12, 3)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, n):
        return self.module(self.x[n])[0].detach()


@pytest.mark.parametrize("method", ["fork", "spawn"])
# Python warns of fork in a process with threads.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_in_worker_processes(method):
    data = Encoded()
    data.module(data.x[0])[0].sum().backward()  # the parent has trained before it forks
    got = torch.cat(list(DataLoader(data, 2, num_workers=2, multiprocessing_context=method)))
    torch.testing.assert_close(got, torch.stack([data[n] for n in range(len(data))]))


INTERRUPTED = """
import _thread, signal, sys, threading
import torch, fusedrnn

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
module = fusedrnn.LSTM(8, 40, recompute=sys.argv[1] == "True")
x, long = torch.randn(5, 2, 8), torch.randn(200_000, 2, 8)
weights = list(module.parameters())
want = torch.autograd.grad(module(x)[0].sum(), weights)
caught = threading.Event()


def interrupt():
    # Again if Python dropped it, but not while the first one still unwinds.
    while not caught.wait(3):
        _thread.interrupt_main()


threading.Thread(target=interrupt).start()
try:
    with fusedrnn.use_backend("torch"):
        module(long)[0].sum().backward()
    caught.set()
except KeyboardInterrupt:
    caught.set()
    assert all(weight.grad is None for weight in weights)
    got = torch.autograd.grad(module(x)[0].sum(), weights)
    for left, right in zip(got, want, strict=True):
        torch.testing.assert_close(left, right)
    assert fusedrnn.explain(module, x).source != "use_backend"
    print("usable")
"""


@pytest.mark.parametrize("recompute", [False, True])
def test_an_interrupted_call_leaves_a_usable_module(recompute):
    """Runs a new process, because Python drops exceptions in callbacks, which other tests add."""
    command = [sys.executable, "-c", INTERRUPTED, str(recompute)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "usable\n", done.stderr
