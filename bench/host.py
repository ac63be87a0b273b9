"""``python -m bench.host``: Python's part of a call, from the call to the kernel's launch.

A small RNN on a GPU is bound by it. It is measured on the CPU: the kernels' launch is replaced by
one that only reads the clock, so nothing of Triton's own launching is in it (it is measured on
neither side), and the GEMMs beside the recurrence really run, for which the sizes are tiny.

Forward: from the module's call to the launch of the recurrence. Backward: likewise, from
``torch.autograd.grad``. ``whole``: until the call returns, with the GEMMs of the weights'
gradients. Medians in microseconds, of one layer with T = 4, B = 2, I = 8, H = 16.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import torch

import fusedrnn

T, B, I, H = 4, 2, 8, 16
FIELDS = ("cell", "fwd_launch_us", "fwd_whole_us", "bwd_launch_us", "bwd_whole_us")


class _Clock:
    """Stands for a kernel: its launch notes the time and does nothing."""

    at = 0.0

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: object, **kwargs: object) -> None:
        self.at = time.perf_counter()


def overhead(cell: str, calls: int) -> tuple[float, ...]:
    """The four times of ``FIELDS``.

    Raises:
        RuntimeError: this process compiles kernels, so they do not take CPU tensors.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("set TRITON_INTERPRET=1 before Triton is imported")
    from fusedrnn.kernels import resident

    clock = _Clock()
    kernels = resident._resident_fwd_kernel, resident._resident_bwd_kernel
    resident._resident_fwd_kernel = resident._resident_bwd_kernel = clock
    try:
        module = getattr(fusedrnn, cell.upper())(I, H)
        leaves, input = list(module.parameters()), torch.randn(T, B, I)
        d_output, samples = torch.ones(T, B, H), []
        with fusedrnn.use_backend("triton"), fusedrnn.use_precision("ieee"):
            for _ in range(calls // 10 + calls):
                begin = time.perf_counter()
                output, _ = module(input)
                end, launched = time.perf_counter(), clock.at
                start = time.perf_counter()
                torch.autograd.grad(output, leaves, d_output)
                done = time.perf_counter()
                samples.append((launched - begin, end - begin, clock.at - start, done - start))
    finally:
        resident._resident_fwd_kernel, resident._resident_bwd_kernel = kernels
    return tuple(1e6 * median(column) for column in zip(*samples[calls // 10 :], strict=True))


def measured(calls: int) -> list[tuple[str, ...]]:
    """A row of ``FIELDS`` for each cell, from a process of its own, whose kernels are interpreted.

    Raises:
        subprocess.CalledProcessError: that process failed; its message is on stderr.
    """
    said = subprocess.run(
        [sys.executable, "-m", "bench.host", str(calls)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    return [tuple(row) for row in csv.reader(said.splitlines())][1:]


def main(calls: int) -> None:
    torch.set_num_threads(1)
    cells = "lstm", "gru", "rnn"
    # In turns: a machine's bad second falls on one of three, and not on a cell.
    turns = [[overhead(cell, calls // 3) for cell in cells] for _ in range(3)]
    print(",".join(FIELDS))
    for cell, found in zip(cells, zip(*turns, strict=True), strict=True):
        middle = map(median, zip(*found, strict=True))
        print(",".join([cell, *(f"{us:.0f}" for us in middle)]))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
