"""A plan is a pure function: its tiles fit the chip, and its refusals are sentences."""

import itertools

import pytest
import torch

from fusedrnn.kernels import plan as planning
from fusedrnn.kernels.plan import cooperative, plan, plan_stack, resident, stepwise
from fusedrnn.kernels.problem import CHIPS, NoPlan, Problem, chip_of

H100, BF16, FP32 = CHIPS["sm_90"], torch.bfloat16, torch.float32
AMD = H100._replace(name="MI300", arch="gfx942", shared_bytes=65_536, warp_size=64)
ALONE = H100._replace(concurrent=False)


def problem(**changes) -> Problem:
    return Problem("lstm", 64, 32, 1, torch.float16, "tf32", True)._replace(**changes)


#: Each side of the borders between schedules and tiles.
SIZES = (1, 16, 17, 64, 65, 128, 129, 200, 256, 257, 512, 1000, 1024, 1025, 2048, 4096)


@pytest.mark.parametrize("H", SIZES)
@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before", "rnn_relu"])
def test_every_plan_fits_its_chip(cell, H):
    kinds = ((BF16, "ieee"), (FP32, "tf32"), (FP32, "tf32x3"), (torch.float64, "ieee"))
    for chip, (dtype, precision), ragged, layers, B in itertools.product(
        (*CHIPS.values(), AMD, ALONE), kinds, (False, True), (1, 3), (1, 300)
    ):
        p = problem(cell=cell, hidden_size=H, dtype=dtype, precision=precision, batch=B)
        p = p._replace(ragged=ragged, layers=layers, directions=1 if layers > 1 else 2)
        plans = plan_stack(p, chip)
        assert sum(each.layers for each in plans) == layers
        for each in plans:
            check(each, p._replace(layers=each.layers), chip)


def check(chosen, p, chip):
    for tiles in (chosen.forward, chosen.backward):
        assert tiles.shared_bytes <= chip.shared_bytes
        partners = -(-p.hidden_size // tiles.block_h)
        if chosen.schedule.startswith("resident"):
            assert partners == 1
            assert tiles.block_b >= chip.warp_size // 4
        if chosen.schedule == "cooperative":
            programs = partners * p.directions * p.layers * tiles.at_once
            assert programs <= chip.sms
            assert chip.warp_size == 32
            assert chip.concurrent


def test_schedules_by_size():
    def schedules(**changes):
        sizes = (64, 128, 256, 512, 1024, 2048, 4096)
        return [plan(problem(hidden_size=H, **changes), H100).schedule[:4] for H in sizes]

    assert schedules() == ["resi"] * 2 + ["coop"] * 4 + ["step"]
    assert schedules(cell="gru") == ["resi"] * 2 + ["coop"] * 4 + ["step"]
    assert schedules(cell="rnn_tanh") == ["resi"] * 3 + ["coop"] * 4
    assert schedules(dtype=FP32) == ["resi"] + ["coop"] * 4 + ["step"] * 2
    assert schedules(dtype=FP32, precision="tf32x3") == ["resi"] + ["step"] * 6
    assert set(schedules(dtype=torch.float64)) == {"step"}


def test_refusals_name_what_is_missing():
    small, tiny = (H100._replace(name="toy", shared_bytes=n) for n in (20_000, 2_000))
    for choose, p, chip, message in (
        (plan, problem(dtype=torch.int64), H100, r"no schedule computes in torch\.int64"),
        (plan, problem(cell="peephole"), H100, "no kernel knows the cell 'peephole'"),
        (resident, problem(dtype=torch.float64), H100, r"no products of torch\.float64"),
        (resident, problem(hidden_size=129), H100, "ends at H=128; H is 129"),
        (resident, problem(), small, "toy has 20,000"),
        (cooperative, problem(hidden_size=512), tiny, "no slices of W_hh that toy holds"),
        (cooperative, problem(dtype=FP32, precision="ieee"), H100, "no products in ieee"),
        (cooperative, problem(), AMD, "NVIDIA's GPUs alone"),
        (cooperative, problem(directions=2, layers=2), H100, "one direction"),
        (plan_stack, problem(), H100._replace(arch="sm_75"), "below sm_80"),
        (plan_stack, problem(), AMD._replace(name="R", warp_size=32), "64 threads; R has 32"),
    ):
        with pytest.raises(NoPlan, match=message):
            choose(p, chip)


def test_larger_batches_go_in_rounds():
    chosen = cooperative(problem(hidden_size=1024, batch=128), H100)
    partners = 1024 // chosen.forward.block_h
    assert chosen.forward.at_once == 132 // partners < 128 // chosen.forward.block_b


def test_layers_share_a_launch_where_the_model_finds_it_faster():
    def launches(H, layers, **changes):
        stack = problem(hidden_size=H, layers=layers, **changes)
        return [(p.schedule, p.layers) for p in plan_stack(stack, H100)]

    assert launches(256, 2) == [("cooperative", 2)]
    assert launches(64, 2) == [("resident_nvidia", 1)] * 2  # a hop takes longer than a layer
    assert launches(256, 2, directions=2) == [("cooperative", 1)] * 2
    assert launches(256, 2, layer_by_layer=True) == [("cooperative", 1)] * 2
    assert launches(256, 40)[0][1] < 40  # as many as the chip holds
    assert launches(512, 2, batch=128) == [("cooperative", 1)] * 2


def test_tiles_are_chosen_for_latency_while_programs_are_few():
    assert resident(problem(batch=8 * H100.sms), H100).forward.block_b == 8
    assert resident(problem(batch=8 * H100.sms + 1), H100).forward.block_b == 16
    assert plan(problem(batch=16 * H100.sms), H100).forward.block_b == 8  # two programs an SM
    assert plan(problem(batch=16 * H100.sms + 1), H100).forward.block_b == 16
    assert plan(problem(batch=9999, hidden_size=128), H100).forward.block_b == 8
    assert plan(problem(batch=1), AMD).forward.block_b == 16
    assert resident(problem(), H100).forward.precision == "ieee"  # 16-bit products are exact
    assert resident(problem(dtype=FP32), H100).forward.precision == "tf32"
    padded = [resident(problem(hidden_size=H), H100).forward.block_h for H in (1, 16, 17, 65)]
    assert padded == [16, 16, 32, 128]


def test_who_runs_the_kernels_in_gluon():
    assert plan(problem(), H100).schedule == "resident_nvidia"
    assert plan(problem(dtype=FP32, precision="ieee"), H100).schedule == "resident"
    assert plan(problem(), AMD).schedule == "resident"
    assert plan(problem(), chip_of(torch.device("cpu"))).schedule == "resident"  # the interpreter


def test_forced_planners_last_for_a_context(monkeypatch):
    forgotten = []
    monkeypatch.setattr("fusedrnn.kernels.problem.CACHES", [lambda: forgotten.append(1)])
    before = plan_stack(problem(), H100)
    with planning.forced(lambda p, chip: (stepwise(p, chip),)):
        assert plan_stack(problem(), H100)[0].schedule == "stepwise"
        assert len(forgotten) == 1
    assert plan_stack(problem(), H100) == before
    assert len(forgotten) == 2
