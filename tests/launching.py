"""Goes the launchers' own way through Triton up to the launch, for a GPU that is not there.

The compile ring hands the compiler a signature of its own making; this hands it what the
launchers pass. A stand-in for the driver names the target, and ``warmup`` stops before the launch.
"""

import json
import sys

import torch
import triton
from models import Op, make_inputs, torch_module
from triton.backends.compiler import GPUTarget

from fusedrnn.kernels import resident
from fusedrnn.kernels.spec import SPECS
from fusedrnn.testing import Case, run_module


class Driver:
    """What Triton asks of a driver before it loads a binary."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    compiled: list = []

    def stop_before_launch(kernel):
        run = kernel.run
        kernel.run = lambda *args, **kwargs: compiled.append(
            run(*args, **{**kwargs, "warmup": True})
        )

    stop_before_launch(resident._resident_fwd_kernel)
    stop_before_launch(resident._resident_bwd_kernel)
    for cell in SPECS:
        for case, bias, bidirectional in (
            (Case(3, 2, 1, 5), True, True),
            (Case(4, 9, 70, 20), False, False),
            (Case(1, 1, 70, 20), False, False),  # other T and B: no other binary
        ):
            module = torch_module(cell, case.I, case.H, bias=bias, bidirectional=bidirectional)
            inputs = make_inputs(cell, case, directions=1 + bidirectional, dtype=torch.float32)
            run_module(Op(module, cell, "triton"), *inputs)
    print(json.dumps([kernel.metadata.name for kernel in compiled]))  # noqa: T201
    print(len({id(kernel) for kernel in compiled}))  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
