"""Long use: thousands of calls in four threads, interrupted ones, and workers."""

import gc
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of gc's callbacks
@pytest.mark.parametrize("kwargs", [{}, {"recompute": True}, {"num_layers": 2, "dropout": 0.5}])
def test_a_call_that_is_interrupted_leaves_nothing_behind(kwargs, monkeypatch):
    """Ctrl-C at any time of forward or backward: all gradients or none, and no setting."""
    every, module, x = cases(), fusedrnn.GRU(8, 40, **kwargs), torch.randn(150, 2, 8)
    expected, stopped = [result(case) for case in every], 0
    threads, weights = torch.get_num_threads(), list(module.parameters())
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    begin = time.perf_counter()
    module(x)[0].sum().backward()
    took = time.perf_counter() - begin
    for n in range(CALLS // 30):
        module.zero_grad()
        try:
            signal.setitimer(signal.ITIMER_REAL, 1e-4 + random.Random(n).random() * took)
            try:
                with fusedrnn.use_backend("torch"), fusedrnn.use_precision("tf32"):
                    module(x)[0].sum().backward()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:  # in the inner ``finally``, too
            stopped += 1
        assert len({weight.grad is None for weight in weights}) == 1
        assert fusedrnn.explain(module, x).source != "use_backend"
        assert torch.get_num_threads() == threads
        assert all(map(torch.equal, result(every[n % len(every)]), expected[n % len(every)]))
    signal.signal(signal.SIGALRM, before)
    assert stopped > CALLS // 90


def encoded(module, sequences):
    return module(torch.stack(sequences, 1))[0].detach()


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_in_worker_processes(method):
    module, x = fusedrnn.GRU(3, 4), torch.randn(6, 12, 3)
    module(x)[0].sum().backward()  # the parent has trained before it forks
    options = {"collate_fn": partial(encoded, module), "multiprocessing_context": method}
    got = torch.cat(list(DataLoader(list(x), 2, num_workers=2, **options)), 1)
    torch.testing.assert_close(got, encoded(module, list(x)))
