"""Predicted beside published: the arithmetic, the rules, and the published figures."""

import pytest
import torch

from fusedrnn.kernels import expected
from fusedrnn.kernels.expected import PREDICTED, PUBLISHED, find_figure, find_line, judge, read
from fusedrnn.kernels.plan import cooperative, plan_stack
from fusedrnn.kernels.problem import CHIPS, Plan, Problem, Tiles

H100 = CHIPS["sm_90"]
LSTM = Problem("lstm", 64, 8, 1, torch.float16, "tf32", True)
TICK = 1755  # cycles of a microsecond


@pytest.fixture
def tables(monkeypatch):
    """Round numbers: a step takes 1 us forward and 2 us backward; nothing is free but the host."""
    sizes = {("lstm", 64): 64, ("rnn_tanh", 64): 64, ("lstm", 512): 8, ("lstm", 1024): 8}
    shared = {"chip": "sm_90", "products": "16-bit", "layers": 1, "fw_rows": 8, "bw_rows": 8}
    shared |= {"fw_cycles": TICK, "bw_cycles": 2 * TICK, "fw_spills": 0, "bw_spills": 64}
    lines = [
        shared | {"cell": cell, "H": H, "fw_units": units, "bw_units": units}
        | {"schedule": "resident_nvidia" if units == 64 else "cooperative"}
        for (cell, H), units in sizes.items()
    ]  # fmt: skip
    figure = {"cell": "lstm", "precision": "fp16", "algorithm": "small", "source": "X"}
    figures = [figure | {"H": H, "forward": 3.0 * H, "backward": 5.0} for H in (1, 64)]
    monkeypatch.setattr(expected, "read", {PREDICTED: lines, PUBLISHED: figures}.get)
    monkeypatch.setattr(expected, "MEMORY", 1e30)
    monkeypatch.setattr(expected, "START_US", 0.0)
    monkeypatch.setattr(expected, "HOST_US", (0.0, 0.0))


def ours(chip=H100, T=100, **changes):
    problem = LSTM._replace(**changes)
    return judge(problem, plan_stack(problem, chip), chip, T, 0).ours


def test_a_call_worked_out_by_hand(tables, monkeypatch):
    gradient_of_w_hh = expected._products_us(LSTM, H100, 100, 0)
    assert gradient_of_w_hh == pytest.approx(2 * 800 * 256 * 64 / (4 * 4096 / 6.5 * 132 * 1755))
    monkeypatch.setattr(expected, "_products_us", lambda *_: 0.0)
    for us, changes in (
        (300, {}), (3, {"T": 1}), (100, {"needs_grad": False}), (600, {"layers": 2}),
        (360, {"ragged": True}), (300, {"cell": "rnn_relu"}), (300, {"hidden_size": 40}),  # as 64
        (300, {"batch": 8 * 132}), (600, {"batch": 8 * 132 + 1}),  # a second wave
        (600, {"batch": 8 * 66 + 1, "directions": 2}),
    ):  # fmt: skip
        assert ours(**changes) == pytest.approx(us), changes
    monkeypatch.setattr(expected, "HOST_US", (10.0, 20.0))
    monkeypatch.setattr(expected, "START_US", 1.0)
    assert ours() == pytest.approx(300 + 30 + 2)


def test_chips_take_their_familys_cycles_and_their_own_clock(tables):
    slow = H100._replace(name="H100 PCIe", sms=114, mhz=TICK / 2)
    assert ours(chip=slow) == pytest.approx(2 * ours(), rel=0.01)
    b200 = CHIPS["sm_100"]
    assert ours(chip=b200) == pytest.approx(ours() * TICK / 1965, rel=0.01)
    assert ours(chip=CHIPS["sm_80"]) is None
    assert ours(chip=H100._replace(arch="gfx942", warp_size=64)) is None


def test_a_cooperative_step_is_a_hop_and_what_a_program_computes(tables, monkeypatch):
    monkeypatch.setattr(expected, "_products_us", lambda *_: 0.0)
    large = LSTM._replace(hidden_size=512, needs_grad=False)
    for changes, larger, T in (({}, 1, 100), ({"batch": 4096}, 1, 100), ({"layers": 2}, 2, 101)):
        problem = large._replace(**changes)
        (plan,) = plan_stack(problem, H100)
        tiles = plan.forward
        us = 0.65 + larger * 0.35 * (tiles.block_b / 8) * (tiles.block_h / 8)
        rounds = -(-problem.batch // (tiles.block_b * tiles.at_once))
        assert ours(**problem._asdict()) == pytest.approx(rounds * T * us)


def test_theirs_and_the_margin(tables):
    verdict = judge(LSTM, plan_stack(LSTM, H100), H100, 100, 0)
    assert verdict.theirs == pytest.approx(100 * (192 + 5), rel=0.01)
    assert verdict.sources[1] == "X"
    for margin, favours in ((1.25, True), (1.24, False)):
        assert verdict._replace(theirs=margin * verdict.ours).favours_ours is favours
    assert not verdict._replace(theirs=None).favours_ours
    assert not verdict._replace(ours=None).favours_ours


BIG, HALF, FP32 = {"hidden_size": 256}, {"dtype": torch.bfloat16}, {"dtype": torch.float32}


def test_cudnn_runs_layers_and_without_a_persistent_kernel_directions_in_turn():
    def theirs(**changes):
        problem = LSTM._replace(**changes)
        return judge(problem, plan_stack(problem, H100), H100, 1000, 64).theirs

    one = theirs(dtype=torch.bfloat16)
    assert one == pytest.approx(1000 * 13.5, rel=0.02)
    assert theirs(dtype=torch.bfloat16, directions=2) == pytest.approx(2 * one, rel=0.02)
    assert theirs(layers=3) == pytest.approx(3 * theirs(), rel=0.02)
    assert theirs(directions=2) == pytest.approx(theirs(), rel=0.02)


@pytest.mark.parametrize(
    ("algorithm", "I", "changes"),
    [
        ("small", 64, {}), ("small", 64, {"hidden_size": 192}), ("small", 64, FP32),
        ("small", 64, {"cell": "rnn_relu", "hidden_size": 384}),
        ("standard", 64, {"hidden_size": 193}), ("standard", 64, HALF),
        ("standard", 64, {"ragged": True}),  # packed
        ("static", 128, BIG), ("standard", 64, BIG), ("standard", 128, BIG | {"ragged": True}),
        ("standard", 128, BIG | {"batch": 7}), ("standard", 128, BIG | {"batch": 136}),
        ("standard", 128, BIG | {"layers": 2}), ("standard", 128, BIG | FP32),
        ("standard", 128, BIG | {"cell": "gru"}),
        (None, 64, FP32 | {"precision": "ieee"}), (None, 64, {"dtype": torch.float64}),
        (None, 64, {"cell": "gru_reset_before"}),
    ],
)  # fmt: skip
def test_cudnns_algorithm(algorithm, I, changes):
    figure = find_figure(LSTM._replace(**changes), I)
    assert (figure and figure["algorithm"]) == algorithm


def test_published_figures_hold_from_their_h_on():
    sizes = (16, 64, 65, 79, 80, 128)
    at = [find_figure(LSTM._replace(hidden_size=H), 64)["H"] for H in sizes]
    assert at == [1, 1, 65, 65, 80, 80]
    for figure in read(PUBLISHED):
        assert figure["source"].startswith(("published: ", "derived: "))
        assert 0 < figure["forward"] < figure["backward"]


def test_the_next_larger_line_stands_for_a_size_between():
    for H, line in ((65, 128), (128, 128), (200, 256), (300, 512)):
        problem = LSTM._replace(hidden_size=H)
        plan, *_ = plan_stack(problem, H100)
        assert find_line(problem, plan, H100)["H"] == line
    assert find_line(problem._replace(hidden_size=4097), plan, H100) is None
    wavefront = LSTM._replace(hidden_size=256, layers=3)
    assert find_line(wavefront, cooperative(wavefront, H100), H100)["layers"] == 2


LARGE = Problem("lstm", 1024, 16, 1, torch.bfloat16, "ieee", True)
MMA = 4 * 4096 / 6.5  # operations of a cycle


def floor(schedule="cooperative", problem=LARGE, forward=True, units=16, rows=16) -> float:
    tiles = Tiles(rows, units, 8, None, "ieee", 0, at_once=2)
    plan = Plan(schedule, tiles, tiles, problem.layers)
    return expected.floor_us(plan, problem, H100, "forward" if forward else "backward")


def test_a_step_of_an_lstm_worked_out_by_hand():
    """H = 1024 in bf16 on 64 programs of 16 units each, a batch of 16 rows."""
    products, fixed = 2 * 16 * 4 * 16 * 1024 / MMA, 0.65 + (100 + 150 + 270) / 1755
    assert floor() == pytest.approx(products / 1755 + fixed)
    read = 64 * 4 * 16 * 1024 * 2 / 132 / 24  # every gate's gradients from L2
    assert floor(forward=False) == pytest.approx(read / 1755 + fixed)
    two, six = (floor(problem=LARGE._replace(batch=B)) for B in (32, 96))
    assert six == pytest.approx(3 * two)  # rounds of batch tiles
    assert floor(problem=LARGE._replace(layers=2)) == pytest.approx(2 * products / 1755 + fixed)
    two_hops = floor(problem=LARGE._replace(cell="gru_reset_before"))
    assert two_hops == pytest.approx((read / 4 + 350) / 1755 + 2 * (0.65 + 270 / 1755))


def test_weights_in_registers_are_not_read():
    """The floor must be below what ``predicted.csv`` has: 0.63 us for H = 128 on sm_90."""
    reading, products = 4 * 128 * 128 * 2 / 128, 2 * 8 * 4 * 128 * 128 / MMA
    assert products < 8 * 128 * 10 / 16 < reading  # special functions lie between
    found = [floor(name, units=128, rows=8) for name in ("resident", "resident_nvidia")]
    assert found == pytest.approx([(reading + 250) / 1755, (640 + 250) / 1755])


def test_stepwise_reads_the_weights_from_l2_and_launches():
    large = LARGE._replace(hidden_size=2048)
    reading = 4 * 2048 * 2048 * 2 / 24 / H100.sms
    assert floor("stepwise", large) == pytest.approx(reading / 1755 + 2 * 1.3)  # a GEMM and a cell
