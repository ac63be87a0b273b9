"""Schedule resident for NVIDIA: its results in the interpreter.

The interpreter shows neither barriers nor inline assembly; ``test_compile.py`` sees the binaries.
"""

from dataclasses import replace

import gluon_interpreter
import pytest
import torch
from kernel_cases import Shape, differences, expected, resident_plan, results, rows_of, tensors

from fusedrnn.kernels import steps
from fusedrnn.kernels.spec import SPECS
from fusedrnn.testing import assert_budget

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels are imported for the interpreter"
)
SHAPES = {
    "dense": Shape(3, 9, 20),  # an odd T, a second tile of one sequence, 12 columns of padding
    "two directions": Shape(4, 3, 32, D=2, bias=False),
    "ragged": Shape(3, 9, 20, D=2, rows="ragged"),
    "packed": Shape(4, 5, 17, D=2, rows="packed"),
}


@pytest.fixture(scope="module")
def resident():
    from fusedrnn.kernels import resident_nvidia

    return resident_nvidia


def run(resident, cell, shape, dtype=torch.float32, block_b=8):
    """With one direction, a warp has 16 units, and else 8."""
    data = tensors(cell, shape, dtype)
    plan, rows = resident_plan(shape.H, block_b), rows_of(shape)
    tiles = replace(plan.forward, num_warps=plan.forward.block_h // (16 if shape.D == 1 else 8))
    plan = replace(plan, forward=tiles, backward=tiles)
    resident.forward(cell, plan, data.layers, rows)
    resident.backward(cell, plan, *data, rows)
    return data


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("cell", SPECS)
def test_equals_the_reference(resident, cell, shape, monkeypatch):
    """Within the error budget of fp32 if the products are exact."""
    monkeypatch.setattr(gluon_interpreter, "round_to_tf32", lambda x: x)
    assert not differences(cell, shape, run(resident, cell, shape))


@pytest.mark.parametrize("shape", [Shape(1, 2, 5), Shape(2, 2, 128)], ids=["small", "large"])
def test_other_sizes(resident, shape, monkeypatch):
    monkeypatch.setattr(gluon_interpreter, "round_to_tf32", lambda x: x)
    assert not differences("lstm", shape, run(resident, "lstm", shape))


def test_sixteen_sequences_a_program(resident, monkeypatch):
    monkeypatch.setattr(gluon_interpreter, "round_to_tf32", lambda x: x)
    shape = Shape(3, 17, 33, rows="ragged")
    assert not differences("lstm", shape, run(resident, "lstm", shape, block_b=16))


@pytest.mark.parametrize("cell", SPECS)
def test_half_precision(resident, cell):
    shape = Shape(3, 5, 48)
    assert not differences(cell, shape, run(resident, cell, shape, torch.float16))


@pytest.mark.parametrize("cell", SPECS)
def test_operands_rounded_to_tf32(resident, cell):
    shape = Shape(3, 5, 32)
    data = run(resident, cell, shape)
    ref, truth = (expected(cell, shape, data, dtype) for dtype in (torch.float32, torch.float64))
    for name, value in results(cell, shape, data).items():
        assert_budget(name, value, ref[name], truth[name], eps=2**-11)
    assert differences(cell, shape, data)  # they were rounded


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("share", lambda buffer, tile: buffer.store(tile * 1.001)),
        ("visible", lambda layers, tiles, origins: tiles),
        ("zero_where", lambda condition, tiles: tiles),
        ("leaving_state", lambda layers, state, entering, origins: state),
    ],
)
def test_planted_faults_are_found(resident, name, fault, monkeypatch):
    monkeypatch.setattr(gluon_interpreter, "round_to_tf32", lambda x: x)
    for module in (resident, steps):
        monkeypatch.setattr(module, name, fault, raising=module is resident)
    shape = SHAPES["ragged"]
    assert differences("lstm", shape, run(resident, "lstm", shape))
