"""``pytest bench``: the cases of the main job through pytest-benchmark.

A provider is timed only if it passes the gate. A GPU is used where there is one.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from . import data
from .cases import CELLS, LESSONS, Workload
from .gate import Gate
from .measure import PASSES, BenchmarkCase, Settings
from .providers import TORCH

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@lru_cache(maxsize=1)
def _case(workload: Workload, cell: str) -> tuple[BenchmarkCase, Gate]:
    corpus = data.load() if workload.vocabulary else None
    case = BenchmarkCase.of(workload, cell, Settings(DEVICE), corpus)
    return case, Gate(case)


@pytest.mark.benchmark(min_rounds=3, max_time=0.2, warmup=True, warmup_iterations=1)
@pytest.mark.parametrize("mode", PASSES)
@pytest.mark.parametrize("provider", [TORCH, "fusedrnn"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("workload", LESSONS, ids=lambda workload: workload.name)
def test_speed(benchmark, workload: Workload, cell: str, provider: str, mode: str):
    case, gate = _case(workload, cell)
    if provider != TORCH:
        verdict = gate.judge(provider)
        assert verdict.ok, verdict.failures
    call = case.call(provider, mode)

    def timed():
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{workload.name} {cell} {mode}"
    benchmark(timed)
