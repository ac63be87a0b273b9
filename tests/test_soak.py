"""Tests of long use: thousands of calls in four threads, worker processes, an interrupted call."""

import gc
import os
import random
import subprocess
import sys
import threading
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
    torch.manual_seed(0)
    made = []
    for kind in ("LSTM", "GRU", "RNN"):
        for backend in ("auto", "torch"):
            for kwargs in ({}, {"num_layers": 2}, {"bidirectional": True}, {"recompute": True}):
                module = getattr(fusedrnn, kind)(3, 5, **kwargs)
                T, B = random.randint(1, 9), random.randint(1, 4)
                options = {}
                if backend == "torch":
                    options["lengths"] = torch.randint(T + 1, (B,))
                made.append((backend, module, torch.randn(T, B, 3), options))
    return made


def result(case):
    """Returns the output and the gradients of one call."""
    backend, module, x, options = case
    with fusedrnn.use_backend(backend):
        output = module(x, **options)[0]
        return [output.detach(), *torch.autograd.grad(output.sum(), list(module.parameters()))]


def resident_bytes():
    gc.collect()
    return int(STATM.read_text().split()[1]) * 4096


@pytest.mark.skipif(not STATM.exists(), reason="reads the process's memory from /proc")
def test_thousands_of_calls_in_four_threads():
    """Every call gives the same bits, each thread has its own backend, and memory does not grow."""
    random.seed(0)
    every = cases()
    expected = [result(case) for case in every]
    start = threading.Barrier(THREADS)

    def work(seed, calls):
        chosen = random.Random(seed)
        start.wait()
        for _ in range(calls):
            n = chosen.randrange(len(every))
            got = result(every[n])
            if not all(map(torch.equal, got, expected[n])):
                return n
        return None

    def round_of(calls):
        with ThreadPoolExecutor(THREADS) as pool:
            assert list(pool.map(work, range(THREADS), [calls] * THREADS)) == [None] * THREADS

    round_of(CALLS // THREADS // 4)  # allocators and caches find their size
    before = resident_bytes()
    round_of(3 * CALLS // THREADS // 4)
    grown = resident_bytes() - before
    assert grown < 8 << 20, f"{grown:,} bytes more after {3 * CALLS // 4:,} calls"


class Encoded(Dataset):
    """A dataset that runs a module in its worker process."""

    def __init__(self):
        torch.manual_seed(0)
        self.module = fusedrnn.GRU(3, 4)
        self.x = torch.randn(6, 5, 3)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, n):
        with torch.no_grad():
            return self.module(self.x[n], lengths=None)[0]


@pytest.mark.parametrize("method", ["fork", "spawn"])
# Python warns of fork in a process with threads.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_in_worker_processes(method):
    data = Encoded()
    data[0]  # the process has run a module before it forks
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context=method)
    got = torch.cat(list(loader))
    torch.testing.assert_close(got, torch.stack([data[n] for n in range(len(data))]))


INTERRUPTED = """
import _thread, signal, sys, threading
import torch, fusedrnn

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
torch.manual_seed(0)
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
    with fusedrnn.use_backend("torch"):
        got = torch.autograd.grad(module(x)[0].sum(), weights)
    for left, right in zip(got, want, strict=True):
        torch.testing.assert_close(left, right)
    assert fusedrnn.explain(module, x).source != "use_backend"
    print("usable")
"""


@pytest.mark.parametrize("recompute", [False, True])
def test_an_interrupted_call_leaves_a_usable_module(recompute):
    """Runs a new process, because Python drops exceptions in callbacks, which other tests add."""
    said = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(recompute)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert said.stdout == "usable\n", said.stderr
