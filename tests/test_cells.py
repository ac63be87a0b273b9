"""The tables of the cells, and planted bugs in their equations."""

import pytest
import torch
from kernel_cases import Shape, differences, tensors
from mutants import rewritten
from test_resident import run

from fusedrnn.kernels.cells import CELLS
from fusedrnn.kernels.spec import SPECS, runs_of


@pytest.mark.parametrize("cell", SPECS)
def test_the_tables_fit_together(cell):
    spec, of = SPECS[cell], CELLS[cell]
    assert sorted(g for gates in spec.phases for g in gates) == list(range(spec.gates))
    assert sorted(n for tiles in spec.grads for n in tiles) == list(range(spec.grad_tiles))
    assert spec.operands[0] == "h"
    assert len(spec.operands) == len(spec.phases) == len(spec.grads)
    for gates, tiles, factors in zip(of.parts, of.grads, of.factors, strict=False):
        assert [tiles[n] for n in factors] == [spec.recurrent[g] for g in gates]
    assert of.parts[-1] == of.factors[-1] == tuple(range(spec.gates))


def test_runs_of_neighbouring_tiles():
    assert list(runs_of((0, 1, 2), (0, 1, 3))) == [(0, 0, 2), (2, 3, 1)]
    assert list(runs_of((2,), (0, 1, 2))) == [(2, 2, 1)]


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
