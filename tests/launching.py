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

from fusedrnn import launches
from fusedrnn.kernels import cooperative, resident, stepwise
from fusedrnn.kernels.plan import CHIPS
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


def run_case(cell: str, case: Case, bias: bool, stacked: dict) -> None:
    dtype = torch.float16 if case.H > 64 else torch.float32
    module = torch_module(cell, case.I, case.H, bias=bias, **stacked).to(dtype)
    directions, layers = 1 + module.bidirectional, module.num_layers
    inputs = make_inputs(cell, case, layers=layers, directions=directions, dtype=dtype)
    run_module(Op(module, cell, "triton"), *inputs)


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    compiled: list = []

    for module in (resident, cooperative, stepwise):
        for direction in ("fwd", "bwd"):
            kernel = getattr(module, f"_{module.__name__.rpartition('.')[2]}_{direction}_kernel")
            kernel.run = lambda *args, run=kernel.run, **kwargs: compiled.append(
                run(*args, **{**kwargs, "warmup": True})
            )
    launches.chip_of = lambda device: CHIPS["sm_90"]
    for cell in SPECS:
        for case, bias, stacked in (
            (Case(3, 2, 1, 5), True, {"bidirectional": True}),
            (Case(4, 9, 70, 20), False, {}),
            (Case(1, 1, 70, 20), False, {}),  # other T and B: no other binary
            (Case(3, 2, 70, 256), True, {"num_layers": 2}),  # a wavefront
            (Case(1, 1, 70, 256), True, {"num_layers": 2}),
        ):
            run_case(cell, case, bias, stacked)
    run_case("lstm", Case(1, 2, 3, 2048), True, {})  # stepwise
    print(json.dumps([kernel.metadata.name for kernel in compiled]))  # noqa: T201
    print(len({id(kernel) for kernel in compiled}))  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
