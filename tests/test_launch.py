"""The host's side of a launch."""

from itertools import product
from unittest.mock import MagicMock, Mock

import pytest
import torch

from fusedrnn.kernels import launch
from fusedrnn.kernels.cells import CELLS
from fusedrnn.kernels.problem import LaunchRefused, Tiles
from fusedrnn.kernels.rows import Rows
from fusedrnn.kernels.tensors import Layers

RESIDENT = Tiles(16, 64, 8, 255, "tf32", 0)
COOPERATIVE = Tiles(16, 16, 8, 255, "tf32", 0, 3)


@pytest.mark.parametrize(("L", "D"), [(1, 2), (3, 1)])
def test_sizes_of_a_launch(L, D):
    layers = Layers(h_0=torch.empty(L * D, 7, 50), out=(torch.empty(9, D * 50),) * (L * D))
    assert launch.tile_of(CELLS["lstm"], layers, RESIDENT) == (L, D, 50, 16, 64, "tf32")


def test_options_of_the_compiler():
    plain = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": True}
    assert launch.options_of(RESIDENT) == plain | {"maxnreg": 255}
    assert launch.options_of(Tiles(16, 64, 8, None, "ieee", 0)) == plain


def run_together(B, *errors):
    """Returns the first batch tile of each round, and how many it has."""
    kernel, tile = MagicMock(), Mock(block_b=16, block_h=16, pitch=64)
    kernel.__getitem__.return_value.side_effect = errors or None
    layers = Layers(h_0=torch.zeros(1, B, 48), out=(torch.zeros(3, B, 48),))
    given = (layers,), Rows(3, B), COOPERATIVE, Mock(return_value=tile)
    launch.run_together(kernel, CELLS["lstm"], *given)
    grids, calls = kernel.__getitem__.call_args_list, kernel.__getitem__.return_value.call_args_list
    return [(call.args[-4], grid.args[0][1]) for grid, call in zip(grids, calls, strict=True)]


@pytest.mark.parametrize(
    ("B", "rounds"),
    [(1, [(0, 1)]), (48, [(0, 3)]), (49, [(0, 3), (3, 1)]), (97, [(0, 3), (3, 3), (6, 1)])],
)
def test_rounds_of_batch_tiles(B, rounds):
    assert run_together(B) == rounds


def test_a_refusal_is_told_from_other_errors():
    with pytest.raises(LaunchRefused, match="too many blocks"):
        run_together(16, RuntimeError("Triton Error: too many blocks in cooperative launch"))
    with pytest.raises(RuntimeError, match="illegal memory access") as caught:
        run_together(16, RuntimeError("Triton Error: an illegal memory access was encountered"))
    assert type(caught.value) is RuntimeError


def test_constants_of_a_launch_are_made_once_for_sizes_and_dtype():
    kernel, made = MagicMock(), Mock(side_effect=range(9))
    for B, H, dtype in product((7, 40), (50, 48), (torch.float32, torch.float16)):
        layers = Layers(h_0=torch.zeros(1, B, H, dtype=dtype), out=(torch.zeros(3, B, H),))
        launch.run(kernel, CELLS["lstm"], (layers,), Rows(3, B), RESIDENT, made)
    calls = kernel.run.call_args_list
    assert [call.args[-1] for call in calls] == [0, 1, 2, 3] * 2
