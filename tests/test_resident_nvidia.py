"""Schedule resident for NVIDIA: its results in the interpreter, and its compiled binaries.

The interpreter shows neither barriers nor inline assembly; the binaries do.
"""

import os
import subprocess
import sys

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
    data = tensors(cell, shape, dtype)
    plan, rows = resident_plan(shape.H, block_b), rows_of(shape)
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
        ("entering_state", lambda layers, state, origins: state),
        ("gradient_before", lambda layers, d_entering, d_leaving, origins: d_entering),
    ],
)
def test_planted_faults_are_found(resident, name, fault, monkeypatch):
    monkeypatch.setattr(gluon_interpreter, "round_to_tf32", lambda x: x)
    for module in (resident, steps):
        monkeypatch.setattr(module, name, fault, raising=module is resident)
    shape = SHAPES["ragged"]
    assert differences("lstm", shape, run(resident, "lstm", shape))


@pytest.mark.parametrize(
    "arch",
    [
        "sm_90",
        *(
            pytest.param(arch, marks=pytest.mark.slow)
            for arch in ("sm_80", "sm_86", "sm_89", "sm_100", "sm_120")
        ),
    ],
)
def test_compiled_kernels(arch):
    """No spills, tensor cores, and one barrier for each product of a step."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, __file__, arch], check=True, env=env)


def check_compiled(arch):
    from fusedrnn.kernels.compile import compile_plan, count_kinds
    from fusedrnn.kernels.plan import CHIPS, Plan, Problem, Tiles
    from fusedrnn.kernels.sass import trace

    for cell, H, dtype, ragged in (
        ("lstm", 128, torch.bfloat16, False),
        ("gru", 64, torch.float32, False),
        ("gru_reset_before", 64, torch.float16, True),
        ("rnn_tanh", 32, torch.bfloat16, True),
    ):
        tiles = Tiles(8, H, H // 16, 255, "tf32", 0)
        plan = Plan("resident_nvidia", tiles, tiles)
        problem = Problem(cell, H, 8, 1 + ragged, dtype, "tf32", True, ragged=ragged)
        for kernel in compile_plan(problem, plan, CHIPS[arch]):
            turn = count_kinds(trace(kernel.instructions))
            assert kernel.spills == 0, (problem, kernel.direction)
            assert turn["tensor core"] >= 2, (problem, kernel.direction)
            assert turn["barrier"] == 2 * len(SPECS[cell].phases), (problem, kernel.direction)


if __name__ == "__main__":
    check_compiled(sys.argv[1])
