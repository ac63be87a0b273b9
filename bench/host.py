"""Measures Python's part of a call without a GPU: the launch of the kernel is a stub.

``python -m bench.host CALLS`` prints the medians as JSON; ``python -m bench cpu`` runs it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

import fusedrnn
from fusedrnn.kernels import resident

T, B, I, H = 4, 2, 8, 16


class _Stub:
    """A kernel whose launch notes the time."""

    at = 0.0

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: object, **kwargs: object) -> None:
        self.at = time.perf_counter()


def overhead(cell: str, calls: int) -> dict[str, Any]:
    """Returns the microseconds from a call, and from ``grad``, to the launch."""
    module, input = getattr(fusedrnn, cell.upper())(I, H), torch.randn(T, B, I)
    leaves, d_output, samples = list(module.parameters()), torch.ones(T, B, H), []
    for _ in range(calls // 10 + calls):
        begin = time.perf_counter()
        output, _ = module(input)
        launched, start = stub.at, time.perf_counter()
        torch.autograd.grad(output, leaves, d_output)
        samples.append((launched - begin, stub.at - start))
    forward, backward = (1e6 * median(c) for c in zip(*samples[calls // 10 :], strict=True))
    return {"cell": cell, "forward us": round(forward, 1), "backward us": round(backward, 1)}


if __name__ == "__main__":
    stub = _Stub()
    for name in ("_resident_fwd_kernel", "_resident_bwd_kernel"):
        if not hasattr(resident, name):
            sys.exit(f"kernels/resident.py has no {name}")
        setattr(resident, name, stub)
    torch.set_num_threads(1)
    with fusedrnn.use_backend("triton"), fusedrnn.use_precision("ieee"):
        print(json.dumps([overhead(cell, int(sys.argv[1])) for cell in ("lstm", "gru", "rnn")]))
