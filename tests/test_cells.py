"""Planted bugs in the equations of the cells, and a NaN that stays one."""

import pytest
import torch
from kernel_cases import Shape, differences, tensors
from mutants import rewritten
from test_resident import run

from fusedrnn.kernels.cells import CELLS

BUGS = [
    ("lstm", "forward", "f * state[1]", "i * state[1]"),
    ("lstm", "adjoint", "dc * before[1] * f", "dc * after[1] * f"),
    ("lstm", "adjoint", "(1.0 - tanh_c * tanh_c)", "(1.0 - tanh_c)"),
    ("gru", "forward", "r * gh[2]", "gh[2]"),
    ("gru", "adjoint", "dn * r)", "dn)"),
    ("gru_reset_before", "operand", "both[0] * state[0]", "both[1] * state[0]"),
    ("gru_reset_before", "adjoint", "dh + du * r", "dh"),
    ("rnn_tanh", "adjoint", "after[0] * after[0]", "after[0]"),
    ("rnn_relu", "adjoint", "after[0] > 0.0", "after[0] >= 0.0"),
]


@pytest.mark.parametrize(("cell", "function", "old", "new"), BUGS)
def test_planted_bugs_are_found(cell, function, old, new, monkeypatch):
    of = CELLS[cell]
    mutant = rewritten(getattr(of, function), old, new)
    monkeypatch.setitem(CELLS, cell, of._replace(**{function: mutant}))
    shape = Shape(3, 4, 8)
    data = tensors(cell, shape)
    run(cell, shape, data)
    assert differences(cell, shape, data)


def test_relu_keeps_a_nan():
    """A maximum would hide it, on a GPU at least."""
    shape = Shape(2, 2, 8)
    data = tensors("rnn_relu", shape)
    data.layers.gx[0, 0, 3] = torch.nan
    run("rnn_relu", shape, data)
    out = data.layers.out[0]
    assert out[0, 3].isnan()
    assert out[[1, 3]].isfinite().all()
