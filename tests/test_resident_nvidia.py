"""Schedule resident for NVIDIA in the interpreter, which shows no barriers and no assembly.

``test_compile.py`` has the binaries, and ``test_on_cuda.py`` runs them.
"""

from dataclasses import replace

import pytest
import torch
from kernel_cases import Shape, differences, resident_plan, rows_of, tensors

from fusedrnn.kernels import resident_nvidia, steps
from fusedrnn.kernels.spec import SPECS

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels are imported for the interpreter"
)
FP32, FP16 = torch.float32, torch.float16
RAGGED = Shape(3, 9, 20, D=2, rows="ragged")
BOTH = ("lstm", "gru_reset_before")  # two states; two products a step
CASES = [
    # An odd T, a second tile of one sequence, 12 columns of padding.
    *((cell, Shape(3, 9, 20), FP32, 8) for cell in SPECS),
    *((cell, Shape(4, 3, 32, D=2, bias=False), FP32, 8) for cell in BOTH),
    *((cell, RAGGED, FP32, 8) for cell in BOTH),
    *((cell, Shape(4, 5, 17, D=2, rows="packed"), FP32, 8) for cell in BOTH),
    *((cell, Shape(3, 5, 48), FP16, 8) for cell in BOTH),
    ("lstm", Shape(1, 2, 5), FP32, 8),
    ("lstm", Shape(2, 2, 128), FP32, 8),
    ("lstm", Shape(3, 17, 33, rows="ragged"), FP32, 16),
]


def run(cell, shape, dtype=FP32, block_b=8):
    """A warp has 16 units in one direction, 8 in two."""
    data = tensors(cell, shape, dtype)
    plan, rows = resident_plan(shape.H, block_b), rows_of(shape)
    tiles = replace(plan.forward, num_warps=plan.forward.block_h // (16 if shape.D == 1 else 8))
    plan = replace(plan, forward=tiles, backward=tiles)
    resident_nvidia.forward(cell, plan, data.layers, rows)
    resident_nvidia.backward(cell, plan, *data, rows)
    return data


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize(("cell", "shape", "dtype", "block_b"), CASES)
def test_equals_the_reference(cell, shape, dtype, block_b):
    """Within the error budget of fp32, too, if the products are exact."""
    assert not differences(cell, shape, run(cell, shape, dtype, block_b))


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("visible", lambda layers, tiles, origins: tiles),
        ("_carried", lambda layers, state, before, origins, backward: state),
    ],
)
def test_planted_faults_are_found(name, fault, monkeypatch):
    for module in (resident_nvidia, steps):
        monkeypatch.setattr(module, name, fault, raising=False)
    assert differences("lstm", RAGGED, run("lstm", RAGGED))
