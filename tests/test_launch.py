"""The host's side of a launch."""

import pytest

from fusedrnn.kernels import launch
from fusedrnn.kernels.cells import CELLS
from fusedrnn.kernels.plan import LaunchRefused, Tiles

RESIDENT = Tiles(16, 64, 8, 255, "tf32", 0)
COOPERATIVE = Tiles(16, 16, 8, 255, "tf32", 0, 3)


def test_constants_are_made_once():
    first = launch.constants(CELLS["lstm"], RESIDENT, 1, 2, 50)
    again = launch.constants(CELLS["lstm"], RESIDENT, 1, 2, 50)
    assert all(one is other for one, other in zip(first, again, strict=True))
    assert first[1] == (1, 2, 50, 16, 64, "tf32")
    assert launch.constants(CELLS["lstm"], RESIDENT, 1, 1, 50)[1].D == 1


def test_a_cell_that_takes_the_name_of_another_is_not_taken_for_it(monkeypatch):
    before = launch.constants(CELLS["gru"], RESIDENT, 1, 1, 50)[0]
    monkeypatch.setitem(CELLS, "gru", CELLS["lstm"])
    assert launch.constants(CELLS["gru"], RESIDENT, 1, 1, 50)[0] is CELLS["lstm"]
    assert before is not CELLS["lstm"]


def test_the_cache_of_constants_is_bounded(monkeypatch):
    monkeypatch.setattr(launch, "_CONSTANTS", {})
    for H in range(4100):
        launch.constants(CELLS["lstm"], RESIDENT, 1, 1, H)
    assert len(launch._CONSTANTS) < 4096


def test_options_of_the_compiler():
    plain = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": True}
    assert launch.options_of(RESIDENT) == plain | {"maxnreg": 255}
    assert launch.options_of(Tiles(16, 64, 8, None, "ieee", 0)) == plain


@pytest.mark.parametrize(
    ("B", "rounds"),
    [(1, [(0, 1)]), (48, [(0, 3)]), (49, [(0, 3), (3, 1)]), (97, [(0, 3), (3, 3), (6, 1)])],
)
def test_rounds_of_batch_tiles(B, rounds):
    found = []
    launch.in_rounds(lambda first, count: found.append((first, count)), B, COOPERATIVE)
    assert found == rounds


def test_a_refusal_is_told_from_other_errors():
    def refuse(first, count):
        raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")

    def fail(first, count):
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    with pytest.raises(LaunchRefused, match="too many blocks"):
        launch.in_rounds(refuse, 16, COOPERATIVE)
    with pytest.raises(RuntimeError, match="illegal memory access") as caught:
        launch.in_rounds(fail, 16, COOPERATIVE)
    assert type(caught.value) is RuntimeError
