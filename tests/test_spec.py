"""The table of the cells; that its tiles fit together is seen in every kernel and loop."""

from fusedrnn.kernels.spec import runs_of


def test_runs_of_neighbouring_tiles():
    assert list(runs_of((0, 1, 2), (0, 1, 3))) == [(0, 0, 2), (2, 3, 1)]
    assert list(runs_of((2,), (0, 1, 2))) == [(2, 2, 1)]
