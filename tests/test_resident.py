"""Schedule resident against the reference, in the interpreter or on the GPU where there is one."""

import pytest
import torch
from kernel_cases import Data, Shape, differences, resident_plan, results, rows_of, tensors
from mutants import ORIGIN_BUGS

from fusedrnn.kernels import resident
from fusedrnn.kernels.spec import SPECS

CELLS, BOTH = list(SPECS), ("lstm", "gru_reset_before")  # two states; two products a step
# bf16 products multiply bit patterns in the interpreter, so only a GPU can run them.
HALF = [torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
#: The second tile of 16 sequences has one.
SHAPE = Shape(3, 17, 20)


def run(cell, shape, data, block_b=16):
    plan, rows = resident_plan(shape.H, block_b), rows_of(shape, data.layers.h_0.device)
    resident.forward(cell, plan, data.layers, rows)
    resident.backward(cell, plan, *data, rows)
    return data


FP32, RAGGED = torch.float32, SHAPE._replace(rows="ragged")
CASES = [
    *((cell, SHAPE, FP32, 16) for cell in CELLS),
    *((cell, RAGGED._replace(D=2), FP32, 16) for cell in CELLS),
    *((cell, SHAPE._replace(D=2, rows="packed", bias=False), FP32, 16) for cell in BOTH),
    # Operands and results are rounded; the states stay in fp32.
    *((cell, RAGGED, half, 16) for cell in BOTH for half in HALF),
    ("lstm", Shape(1, 1, 1), FP32, 16),
    ("gru_reset_before", Shape(2, 1, 16, D=2), FP32, 16),
    ("gru", Shape(3, 2, 33, rows="ragged"), FP32, 16),  # 31 columns of padding
    ("rnn_tanh", Shape(33, 2, 5), FP32, 16),
    ("lstm", Shape(3, 9, 20, D=2), FP32, 8),
]


@pytest.mark.parametrize(("cell", "shape", "dtype", "block_b"), CASES)
def test_equals_the_reference(cell, shape, dtype, block_b, device):
    data = run(cell, shape, tensors(cell, shape, dtype, device), block_b)
    assert not differences(cell, shape, data)


def test_no_gradient_of_the_output_is_one_of_zeros(device):
    layers, grads = tensors("gru", SHAPE, device=device)
    run("gru", SHAPE, Data(layers, grads._replace(out=None)))
    none = grads.gates.clone(), grads.h_0.clone()
    run("gru", SHAPE, Data(layers, grads._replace(out=torch.zeros_like(grads.out))))
    assert all(map(torch.equal, none, (grads.gates, grads.h_0)))


# The interpreter's exp warns where it is inf; its reciprocal is 0, as on a GPU.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("cell", CELLS)
def test_saturated_gates_stay_finite(cell, device):
    shape = Shape(3, 4, 16)
    data = tensors(cell, shape, device=device)
    small = tuple(w * (0.01 if cell == "rnn_relu" else 1.0) for w in data.layers.w_hh)
    data = data._replace(layers=data.layers._replace(gx=data.layers.gx * 1000.0, w_hh=small))
    found = results(cell, shape, run(cell, shape, data))
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("bug", ORIGIN_BUGS)
def test_planted_bugs_in_the_origins_are_found(bug, device):
    shape = Shape(5, 6, 16, rows="ragged", D=2)
    data = tensors("gru", shape, device=device)
    data = data._replace(layers=data.layers._replace(origins=bug(data.layers.origins)))
    assert differences("gru", shape, run("gru", shape, data))
