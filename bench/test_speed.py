"""``pytest bench``: the lessons' workloads through pytest-benchmark.

Each provider passes the equality gate before it is timed. A GPU is used where there is one.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from . import imdb
from .cases import CELLS, LESSONS, Workload
from .gate import Gate
from .providers import TORCH, names_for
from .run import Settings, Subject

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@lru_cache(maxsize=1)
def _corpus() -> imdb.Corpus:
    return imdb.load()


@lru_cache(maxsize=1)
def _subject(workload: Workload, cell: str) -> tuple[Subject, Gate]:
    subject = Subject(workload, cell, Settings(DEVICE), _corpus() if workload.vocabulary else None)
    return subject, Gate(workload, cell, subject.weights, subject.gate_input())


@lru_cache
def _failures(workload: Workload, cell: str, provider: str) -> list[str]:
    return _subject(workload, cell)[1].judge(provider).failures


CASES = [
    pytest.param(workload, cell, provider, id=f"{workload.name}-{cell}-{provider}")
    for workload in LESSONS
    for cell in CELLS
    for provider in names_for(workload, DEVICE)
]


@pytest.mark.benchmark(min_rounds=3, max_time=0.2, warmup=True, warmup_iterations=1)
@pytest.mark.parametrize("mode", ["fw", "fwbw"])
@pytest.mark.parametrize(("workload", "cell", "provider"), CASES)
def test_speed(benchmark, workload: Workload, cell: str, provider: str, mode: str):
    if provider != TORCH:
        failures = _failures(workload, cell, provider)
        assert not failures, failures
    call = _subject(workload, cell)[0].call(provider, mode)

    def timed():
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{workload.name} {cell} {mode}"
    benchmark(timed)
