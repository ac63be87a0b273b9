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


def run_case(
    cell: str, case: Case, bias: bool, stacked: dict, dtype: torch.dtype | None = None
) -> None:
    dtype = dtype or (torch.float16 if case.H > 64 else torch.float32)
    module = torch_module(cell, case.I, case.H, bias=bias, **stacked).to(dtype)
    directions, layers = 1 + module.bidirectional, module.num_layers
    inputs = make_inputs(cell, case, layers=layers, directions=directions, dtype=dtype)
    run_module(Op(module, cell, "triton"), *inputs)


#: Two layers in a launch each, which get parts of the stack's tensors: H, directions and dtype, and
#: whether every part begins at a multiple of 16 bytes whatever T and B are.
PARTED = [
    (24, 1, torch.float16, True),  # resident, of 8 columns 16 bytes each
    (12, 1, torch.float32, True),  # of 4
    (200, 2, torch.float16, True),  # cooperative
    (20, 1, torch.float16, False),
]
NEW_SIZES = (3, 2), (5, 2), (4, 7), (1, 1), (7, 3)  # T, B: all within the tiles of the first


def binaries_of_new_sizes(H: int, D: int, dtype: torch.dtype, compiled: list) -> list[int]:
    """How many binaries there are after each of NEW_SIZES."""
    before, counts = len(compiled), []
    for T, B in NEW_SIZES:
        stacked = {"num_layers": 2, "bidirectional": D == 2}
        run_case("lstm", Case(T, B, 70, H), True, stacked, dtype)
        counts.append(len({id(kernel) for kernel in compiled[before:]}))
    return counts


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
    counts = [(p[-1], binaries_of_new_sizes(*p[:-1], compiled)) for p in PARTED]
    print(json.dumps(counts))  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
