"""The tables of the cells fit together, and into those of the kernels."""

import pytest

from fusedrnn.kernels.cells import CELLS
from fusedrnn.kernels.spec import SPECS, runs_of


@pytest.mark.parametrize("cell", SPECS)
def test_the_tables_fit_together(cell):
    spec, of = SPECS[cell], CELLS[cell]
    assert sorted(g for gates in spec.phases for g in gates) == list(range(spec.gates))
    assert sorted(n for tiles in spec.grads for n in tiles) == list(range(spec.grad_tiles))
    assert {*range(spec.gates), *spec.recurrent} == set(range(spec.grad_tiles))
    assert spec.operands[0] == "h"
    assert len(spec.operands) == len(spec.phases) == len(spec.grads)
    for gates, tiles, factors in zip(of.parts, of.grads, of.factors, strict=False):
        assert [tiles[n] for n in factors] == [spec.recurrent[g] for g in gates]
    assert of.parts[-1] == of.factors[-1] == tuple(range(spec.gates))


def test_runs_of_neighbouring_tiles():
    assert list(runs_of((0, 1, 2), (0, 1, 3))) == [(0, 0, 2), (2, 3, 1)]
    assert list(runs_of((2,), (0, 1, 2))) == [(2, 2, 1)]
