"""The model is arithmetic: checked against figures worked out by hand, and for its directions."""

import pytest
import torch

from fusedrnn.kernels.model import Floors, cudnn_step, floors_of
from fusedrnn.kernels.plan import CHIPS, Problem, Tiles, cooperative, resident

CHIP = CHIPS["sm_90"]
LSTM = Problem("lstm", 1024, 16, 1, torch.bfloat16, "ieee", True)


def tiles(units=16, at_once=2, chunks=((0, 8, 128),), folded=0) -> Tiles:
    return Tiles(16, units, 8, None, "ieee", 0, chunks, at_once, folded)


def floors(problem=LSTM, forward=True, **changes) -> Floors:
    return floors_of("cooperative", problem, CHIP, tiles(**changes), forward)


def test_a_step_of_an_lstm_worked_out_by_hand():
    """H = 1024 in bf16 on 64 programs of 16 units each, a batch of 16 rows."""
    found = floors()
    weights = 4 * 16 * 1024  # of one program
    assert found.products == pytest.approx(2 * 16 * weights / 4.5e6)
    assert found.shared == pytest.approx(weights * 2 / 128 / 1755)
    assert found.specials == pytest.approx(16 * 16 * 10 / 16 / 1755)
    assert found.l2 == pytest.approx(64 * 16 * 1024 * 2 / 5.5e6)
    assert found.mma == pytest.approx(8 * 24 / 1755)  # 128 columns, 16 an instruction
    assert found.chain == pytest.approx((100 + 150) / 1755)
    assert found.sync == pytest.approx(0.65 + 0.15)
    assert found.step == pytest.approx(found.shared + found.chain + found.sync)


def test_floors_follow_the_work():
    forward, backward = floors(), floors(forward=False)
    assert backward.l2 == pytest.approx(4 * forward.l2)  # every gate
    assert backward.specials == pytest.approx(forward.specials / 5)
    one, three = floors(LSTM._replace(batch=32)), floors(LSTM._replace(batch=96))
    assert three == pytest.approx(Floors(*(3 * floor for floor in one)))  # rounds of tiles
    one, two = floors(units=8), floors(LSTM._replace(layers=2), units=8)
    assert two.products == pytest.approx(2 * one.products)
    assert two.sync == one.sync  # the layers exchange at the same time
    assert floors(LSTM._replace(cell="gru_reset_before")).sync == pytest.approx(2 * 0.8)
    assert floors(folded=2).mma == forward.mma


def test_a_resident_program_exchanges_nothing():
    plan = resident(LSTM._replace(hidden_size=64), CHIP)
    assert all(floors.sync == floors.l2 == 0 for floors in plan.floors)


def test_stepwise_reads_the_weights_from_l2_and_launches():
    large = LSTM._replace(hidden_size=2048)
    found = floors_of("stepwise", large, CHIP, tiles(), True)
    assert found.l2 == pytest.approx(4 * 2048 * 2048 * 2 / 5.5e6)
    assert found.sync == pytest.approx(2 * 1.3)  # a GEMM and a cell


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_more_of_anything_is_never_faster(arch):
    chip = CHIPS[arch]
    steps = [cooperative(LSTM._replace(hidden_size=H), chip).step for H in (256, 512, 1024)]
    assert steps == sorted(steps)
    steps = [cooperative(LSTM._replace(batch=B), chip).step for B in (16, 64, 256)]
    assert steps == sorted(steps)


def test_reports_for_cudnn():
    assert cudnn_step(LSTM) == 15.5
    assert cudnn_step(LSTM._replace(dtype=torch.float16)) == 5.1  # its one persistent kernel
    assert cudnn_step(LSTM._replace(dtype=torch.float16, cell="gru")) == 15.5
    assert cudnn_step(LSTM._replace(needs_grad=False, layers=3)) == 19.5
    assert cudnn_step(LSTM._replace(dtype=torch.float32)) is None  # in ieee there is no report
    assert cudnn_step(LSTM._replace(dtype=torch.float64, precision="tf32")) is None
