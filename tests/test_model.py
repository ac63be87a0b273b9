"""The model is arithmetic: checked against figures worked out by hand, and for its directions."""

import pytest
import torch

from fusedrnn.kernels.model import (
    Floors,
    cudnn_step,
    dependent_mma,
    floors_on_chip,
    floors_stepwise,
    kind_of,
)
from fusedrnn.kernels.plan import CHIPS, Problem, Tiles, cooperative, k_chunks, resident

CHIP = CHIPS["sm_90"]
LSTM = Problem("lstm", 1024, 1024, 16, 1, torch.bfloat16, "ieee", True)


def tiles(units=16, at_once=2, **changes) -> Tiles:
    chunks = k_chunks(1024, "16-bit", 1024)
    settings = {"block_b": 16, "blocks": ((0, units),), "num_warps": 8, "max_registers": None,
                "input_precision": "ieee", "shared_bytes": 0, "k_chunks": chunks,
                "at_once": at_once}  # fmt: skip
    return Tiles(**settings | changes)


def test_a_step_of_an_lstm_worked_out_by_hand():
    """H = 1024 in bf16 on 64 programs of 16 units each, a batch of 16 rows."""
    floors = floors_on_chip(LSTM, CHIP, tiles(), 1, "forward")
    weights = 4 * 16 * 1024  # of one program
    assert floors.products == pytest.approx(2 * 16 * weights / 4.5e6)
    assert floors.shared == pytest.approx(weights * 2 / 128 / 1755)
    assert floors.specials == pytest.approx(16 * 16 * 10 / 16 / 1755)
    assert floors.l2 == pytest.approx(64 * 16 * 1024 * 2 / 5.5e6)
    assert floors.mma == pytest.approx(8 * 24 / 1755)  # 128 columns, 16 an instruction
    assert floors.chain == pytest.approx((100 + 150) / 1755)
    assert floors.sync == pytest.approx(0.65 + 0.15)
    assert floors.step == pytest.approx(floors.shared + floors.chain + floors.sync)


def test_backward_reads_every_gate_and_activates_little():
    forward, backward = (floors_on_chip(LSTM, CHIP, tiles(), 1, d) for d in ("forward", "backward"))
    assert backward.l2 == pytest.approx(4 * forward.l2)
    assert backward.specials == pytest.approx(forward.specials / 5)
    assert backward.products == forward.products


TWO = ((0, 8, 64), (512, 8, 32))  # chunks of H = 768


@pytest.mark.parametrize(
    ("cell", "kind", "chunks", "layers", "direction", "chains"),
    [
        ("lstm", "16-bit", ((0, 8, 64),), 1, "forward", (4,)),  # 64 columns, 16 an instruction
        ("lstm", "16-bit", ((0, 8, 64),), 1, "backward", (16,)),  # all four gates
        ("lstm", "16-bit", TWO, 1, "forward", (6,)),  # both chunks
        ("lstm", "16-bit", TWO, 1, "backward", (16,)),  # of all gates the longer chunk
        ("rnn_tanh", "16-bit", TWO, 1, "backward", (6,)),  # one gate: both chunks
        ("gru_reset_before", "16-bit", TWO, 1, "backward", (8, 6)),  # two gates, then one
        ("gru_reset_before", "16-bit", TWO, 1, "forward", (6, 6)),
        ("lstm", "tf32", ((0, 8, 64),), 1, "backward", (32,)),  # 8 columns an instruction
        ("lstm", "tf32x3", TWO, 1, "backward", (24,)),  # three products of 64 columns
        ("lstm", "16-bit", ((0, 8, 64),), 2, "forward", (4,)),
        ("gru", "16-bit", ((0, 8, 64),), 2, "backward", (12, 12)),  # the layer above as well
    ],
)
def test_chains_of_a_slice(cell, kind, chunks, layers, direction, chains):
    found = dependent_mma(LSTM._replace(cell=cell), kind, tiles(k_chunks=chunks), layers, direction)
    assert found == chains


@pytest.mark.parametrize(
    ("cell", "kind", "blocks", "direction", "chains"),
    [
        ("lstm", "16-bit", ((0, 128),), "forward", (8,)),
        ("lstm", "16-bit", ((0, 128),), "backward", (32,)),  # all four gates
        ("lstm", "16-bit", ((0, 64), (64, 32)), "forward", (6,)),  # both blocks
        ("lstm", "16-bit", ((0, 64), (64, 32)), "backward", (6,)),  # likewise, for each gate
        ("gru_reset_before", "tf32", ((0, 64),), "backward", (16, 8)),
        ("gru", "tf32x3", ((0, 64), (64, 32)), "backward", (24,)),
    ],
)
def test_chains_of_a_whole_row(cell, kind, blocks, direction, chains):
    whole = tiles(k_chunks=(), blocks=blocks)
    assert dependent_mma(LSTM._replace(cell=cell), kind, whole, 1, direction) == chains


def test_the_longest_chain_of_mma_runs_beside_the_throughputs():
    whole = tiles(units=64, k_chunks=())
    floors = floors_on_chip(LSTM._replace(hidden_size=64), CHIP, whole, 1, "backward")
    assert floors.mma == pytest.approx(4 * 4 * 24 / 1755)  # of four gates 64 columns each
    assert floors.mma > max(floors[:4])
    assert floors.step == pytest.approx(floors.mma + floors.chain + floors.sync)


def test_rounds_of_batch_tiles_add_up():
    one = floors_on_chip(LSTM._replace(batch=32), CHIP, tiles(at_once=2), 1, "forward")
    three = floors_on_chip(LSTM._replace(batch=96), CHIP, tiles(at_once=2), 1, "forward")
    assert three == pytest.approx(Floors(*(3 * floor for floor in one)))


def test_a_layer_above_the_first_multiplies_twice():
    one = floors_on_chip(LSTM, CHIP, tiles(units=8), 1, "forward")
    two = floors_on_chip(LSTM, CHIP, tiles(units=8), 2, "forward")
    assert two.products == pytest.approx(2 * one.products)
    assert two.l2 == pytest.approx(4 * one.l2)  # twice the programs, twice the operands
    assert two.sync == one.sync  # the layers wait at the same time


def test_a_second_phase_is_a_second_hop():
    gru = LSTM._replace(cell="gru_reset_before")
    floors = floors_on_chip(gru, CHIP, tiles(), 1, "forward")
    assert floors.sync == pytest.approx(2 * 0.8)


def test_a_resident_program_waits_for_nobody():
    plan = resident(LSTM._replace(hidden_size=64), CHIP)
    assert all(floors.sync == floors.l2 == 0 for floors in plan.floors)


def test_stepwise_reads_the_weights_from_l2_and_launches():
    floors = floors_stepwise(LSTM._replace(hidden_size=2048), CHIP, "forward")
    assert floors.l2 == pytest.approx(4 * 2048 * 2048 * 2 / 5.5e6)
    assert floors.sync == pytest.approx(2 * 1.3)  # a GEMM and a cell


def test_kinds_of_products():
    wide = LSTM._replace(dtype=torch.float32, precision="tf32x3")
    assert kind_of(LSTM, CHIP) == "16-bit"
    assert kind_of(wide, CHIP) == "tf32x3"
    assert kind_of(wide, CHIPS["gfx942"]) == "ieee"
    assert kind_of(wide._replace(dtype=torch.float64, precision="tf32"), CHIP) == "ieee"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_more_of_anything_is_never_faster(arch):
    chip = CHIPS[arch]
    steps = [cooperative(LSTM._replace(hidden_size=H), chip).step for H in (256, 512, 1024)]
    assert steps == sorted(steps)
    steps = [cooperative(LSTM._replace(batch=B), chip).step for B in (16, 64, 256)]
    assert steps == sorted(steps)


def test_what_is_reported_for_cudnn():
    assert cudnn_step(LSTM) == 15.5
    assert cudnn_step(LSTM._replace(dtype=torch.float16)) == 5.1  # its one persistent kernel
    assert cudnn_step(LSTM._replace(dtype=torch.float16, cell="gru")) == 15.5
    assert cudnn_step(LSTM._replace(needs_grad=False, layers=3)) == 19.5
    assert cudnn_step(LSTM._replace(dtype=torch.float32)) is None  # ieee: nobody says
    assert cudnn_step(LSTM._replace(dtype=torch.float64, precision="tf32")) is None


def test_floors_print_what_is_not_zero():
    assert str(Floors(0.1, 0.0, 0.25, 0.0, 0.3, 0.2, 0.0)) == (
        "0.50 us a step (products 0.10, specials 0.25, mma 0.30, chain 0.20)"
    )
