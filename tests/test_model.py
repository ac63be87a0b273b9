"""The floor of a step is arithmetic: worked out by hand, and for its directions."""

import pytest
import torch

from fusedrnn.kernels.model import floor_us, step_us
from fusedrnn.kernels.plan import CHIPS, Problem, Tiles, cooperative, resident, resident_nvidia

CHIP = CHIPS["sm_90"]
LSTM = Problem("lstm", 1024, 16, 1, torch.bfloat16, "ieee", True)


def floor(schedule="cooperative", problem=LSTM, forward=True, units=16) -> float:
    tiles = Tiles(16, units, 8, None, "ieee", 0, 2)
    return floor_us(schedule, problem, CHIP, tiles, forward)


def test_a_step_of_an_lstm_worked_out_by_hand():
    """H = 1024 in bf16 on 64 programs of 16 units each, a batch of 16 rows."""
    products = 2 * 16 * 4 * 16 * 1024 / (4 * 4096 / 6.5)  # cycles, the slowest part
    fixed = 0.65 + (100 + 150 + 270) / 1755
    assert floor() == pytest.approx(products / 1755 + fixed)
    read = 4 * 16 * 1024 * 2 / 64  # every gate's gradients from L2
    assert floor(forward=False) == pytest.approx(read / 1755 + fixed)
    assert floor(problem=LSTM._replace(batch=96)) == pytest.approx(3 * floor())  # rounds of tiles
    assert floor(problem=LSTM._replace(layers=2)) == pytest.approx(2 * products / 1755 + fixed)
    two_hops = floor(problem=LSTM._replace(cell="gru_reset_before"))
    assert two_hops == pytest.approx((0.75 * products + 350) / 1755 + 2 * (0.65 + 270 / 1755))


def test_weights_in_registers_are_not_read():
    """The floor must be below what ``predicted.csv`` has: 0.63 us for H = 128 on sm_90."""
    small = LSTM._replace(hidden_size=128, needs_grad=False)
    floors = [step_us(choose(small, CHIP), small, CHIP) for choose in (resident, resident_nvidia)]
    assert floors[0] == pytest.approx((1024 + 250) / 1755)
    products = 2 * 8 * 4 * 128 * 128 / (4 * 4096 / 6.5)
    assert floors[1] == pytest.approx((max(products, 8 * 128 * 10 / 16) + 250) / 1755)
    assert floors[1] < 0.63


def test_stepwise_reads_the_weights_from_l2_and_launches():
    large = LSTM._replace(hidden_size=2048)
    reading = 4 * 2048 * 2048 * 2 / 64 / CHIP.sms
    assert floor("stepwise", large) == pytest.approx(reading / 1755 + 2 * 1.3)  # a GEMM and a cell


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_more_of_anything_is_never_faster(arch):
    chip = CHIPS[arch]
    for name, values in (("hidden_size", (256, 512, 1024)), ("batch", (16, 64, 256))):
        problems = [LSTM._replace(**{name: value}) for value in values]
        steps = [step_us(cooperative(problem, chip), problem, chip) for problem in problems]
        assert steps == sorted(steps)
