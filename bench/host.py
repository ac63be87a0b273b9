"""Python's part of a call: the time from the call to the launch of the kernel.

It is measured without a GPU: the launch is replaced by a stub that reads the clock.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

T, B, I, H = 4, 2, 8, 16


class _Stub:
    """A kernel whose launch notes the time."""

    at = 0.0

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: object, **kwargs: object) -> None:
        self.at = time.perf_counter()


def overhead(cell: str, calls: int) -> dict[str, Any]:
    """Returns the medians of one cell in microseconds.

    Raises:
        AttributeError: the resident kernels do not have the expected names.
    """
    import torch

    import fusedrnn
    from fusedrnn.kernels import resident

    names = "_resident_fwd_kernel", "_resident_bwd_kernel"
    stub, kernels = _Stub(), [getattr(resident, name) for name in names]
    try:
        for name in names:
            setattr(resident, name, stub)
        module = getattr(fusedrnn, cell.upper())(I, H)
        leaves, input = list(module.parameters()), torch.randn(T, B, I)
        d_output, samples = torch.ones(T, B, H), []
        with fusedrnn.use_backend("triton"), fusedrnn.use_precision("ieee"):
            for _ in range(calls // 10 + calls):
                begin = time.perf_counter()
                output, _ = module(input)
                launched, start = stub.at, time.perf_counter()
                torch.autograd.grad(output, leaves, d_output)
                samples.append((launched - begin, stub.at - start))
    finally:
        for name, kernel in zip(names, kernels, strict=True):
            setattr(resident, name, kernel)
    forward, backward = (1e6 * median(c) for c in zip(*samples[calls // 10 :], strict=True))
    return {"cell": cell, "forward us": round(forward, 1), "backward us": round(backward, 1)}


def measured(calls: int) -> list[dict[str, Any]] | str:
    """Returns a row for each cell, or a sentence that says why there are none."""
    # Kernels take CPU tensors only if Triton interprets, which is chosen when it is imported.
    child = subprocess.run(
        [sys.executable, "-m", __name__, str(calls)],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    if child.returncode:
        return f"not measured: {(child.stderr.strip() or 'no message').splitlines()[-1]}"
    return json.loads(child.stdout)


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    print(json.dumps([overhead(cell, int(sys.argv[1])) for cell in ("lstm", "gru", "rnn")]))
