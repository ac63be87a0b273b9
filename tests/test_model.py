"""The floor of a step is arithmetic: worked out by hand, and for its directions."""

import pytest
import torch

from fusedrnn.kernels.model import floor_us
from fusedrnn.kernels.problem import CHIPS, Plan, Problem, Tiles

CHIP = CHIPS["sm_90"]
LSTM = Problem("lstm", 1024, 16, 1, torch.bfloat16, "ieee", True)
MMA = 4 * 4096 / 6.5  # operations of a cycle


def floor(schedule="cooperative", problem=LSTM, forward=True, units=16, rows=16) -> float:
    tiles = Tiles(rows, units, 8, None, "ieee", 0, at_once=2)
    plan = Plan(schedule, tiles, tiles, problem.layers)
    return floor_us(plan, problem, CHIP, "forward" if forward else "backward")


def test_a_step_of_an_lstm_worked_out_by_hand():
    """H = 1024 in bf16 on 64 programs of 16 units each, a batch of 16 rows."""
    products, fixed = 2 * 16 * 4 * 16 * 1024 / MMA, 0.65 + (100 + 150 + 270) / 1755
    assert floor() == pytest.approx(products / 1755 + fixed)
    read = 64 * 4 * 16 * 1024 * 2 / 132 / 24  # every gate's gradients from L2
    assert floor(forward=False) == pytest.approx(read / 1755 + fixed)
    two, six = (floor(problem=LSTM._replace(batch=B)) for B in (32, 96))
    assert six == pytest.approx(3 * two)  # rounds of batch tiles
    assert floor(problem=LSTM._replace(layers=2)) == pytest.approx(2 * products / 1755 + fixed)
    two_hops = floor(problem=LSTM._replace(cell="gru_reset_before"))
    assert two_hops == pytest.approx((read / 4 + 350) / 1755 + 2 * (0.65 + 270 / 1755))


def test_weights_in_registers_are_not_read():
    """The floor must be below what ``predicted.csv`` has: 0.63 us for H = 128 on sm_90."""
    reading, products = 4 * 128 * 128 * 2 / 128, 2 * 8 * 4 * 128 * 128 / MMA
    assert products < 8 * 128 * 10 / 16 < reading  # special functions lie between
    found = [floor(name, units=128, rows=8) for name in ("resident", "resident_nvidia")]
    assert found == pytest.approx([(reading + 250) / 1755, (640 + 250) / 1755])


def test_stepwise_reads_the_weights_from_l2_and_launches():
    large = LSTM._replace(hidden_size=2048)
    reading = 4 * 2048 * 2048 * 2 / 24 / CHIP.sms
    assert floor("stepwise", large) == pytest.approx(reading / 1755 + 2 * 1.3)  # a GEMM and a cell
