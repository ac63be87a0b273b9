"""The plan is a pure function: its tiles cover H, fit the chip, and its refusals are sentences."""

import itertools
from dataclasses import replace

import pytest
import torch
from compiling import COOPERATIVE_H, every_plan

from fusedrnn.kernels.limits import operand_columns
from fusedrnn.kernels.model import dependent_mma, kind_of
from fusedrnn.kernels.plan import (
    CHIPS,
    NoPlan,
    Problem,
    blocks_of,
    cooperative,
    k_chunks,
    plan,
    plan_stack,
    resident,
    stepwise,
)
from fusedrnn.kernels.spec import SPECS


def problem(**changes) -> Problem:
    base = Problem("lstm", 8, 64, 32, 1, torch.float16, "tf32", True)
    return base._replace(**changes)


@pytest.mark.parametrize(
    ("cell", "dtype", "largest"),
    [
        ("lstm", torch.float16, 1056),
        ("gru", torch.float16, 1056),
        ("rnn_tanh", torch.float16, 2048),
        ("lstm", torch.float32, 512),
        ("gru", torch.float32, 512),
        ("rnn_tanh", torch.float32, 1056),
    ],
)
def test_reach_of_ragged_rows(cell, dtype, largest):
    """As docs/design.md says: beyond, a step is a GEMM and a launch."""
    asked = problem(cell=cell, dtype=dtype, ragged=True)
    found = [
        H
        for H in range(32, 2304, 32)
        if plan(asked._replace(hidden_size=H), CHIPS["sm_90"]).schedule != "stepwise"
    ]
    assert max(found) == largest


def test_a_projection_of_ragged_rows_is_refused():
    with pytest.raises(NoPlan, match="of dense sequences only"):
        plan(problem(proj_size=4, ragged=True), CHIPS["sm_90"])


@pytest.mark.parametrize("size", range(1, 300))
def test_blocks_cover_without_padding_to_the_next_power_of_two(size):
    blocks = blocks_of(size)
    assert blocks[0][0] == 0
    for (start, width), (following, _) in itertools.pairwise(blocks):
        assert start + width == following
    padded = sum(width for _, width in blocks)
    assert size <= padded < size + 16
    assert all(width & (width - 1) == 0 and 16 <= width <= 128 for _, width in blocks)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_every_plan_fits_its_chip(chip):
    plans = list(every_plan(chip))
    assert {p.cell for p, _ in plans} == set(SPECS)
    for p, chosen in plans:
        assert (chosen.backward is not None) == p.needs_grad
        for direction, tiles in (("forward", chosen.forward), ("backward", chosen.backward)):
            if tiles is None:
                continue
            units = sum(width for _, width in tiles.blocks)
            partners = -(-p.hidden_size // units)
            assert tiles.shared_bytes <= chip.shared_bytes
            if chosen.schedule == "resident":
                assert partners == 1
            if chosen.schedule == "cooperative":
                assert partners * p.directions * p.layers * tiles.at_once <= chip.sms
                # The longest chain of dependent mma that a step may wait for.
                assert max(dependent_mma(p, kind_of(p, chip), tiles, chosen.layers, direction)) <= 8


@pytest.mark.parametrize("cell", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_h_from_one_up_to_a_bound_is_resident(cell, dtype):
    fits = [
        H
        for H in range(1, 300)
        if plan(problem(cell=cell, hidden_size=H, dtype=dtype), CHIPS["sm_90"]).schedule
        == "resident"
    ]
    assert fits == list(range(1, len(fits) + 1))
    assert len(fits) >= (64 if dtype == torch.float32 else 128)


def test_refusals_name_what_is_missing():
    chip = CHIPS["sm_90"]
    with pytest.raises(NoPlan, match=r"no schedule computes in torch\.int64"):
        plan(problem(dtype=torch.int64), chip)
    with pytest.raises(NoPlan, match="no kernel knows the cell 'peephole'"):
        plan(problem(cell="peephole"), chip)
    with pytest.raises(NoPlan, match=r"not torch\.float64"):
        resident(problem(dtype=torch.float64), chip)
    with pytest.raises(NoPlan, match=r"ends at H=128; H is 129"):
        resident(problem(hidden_size=129), chip)
    small = chip._replace(name="toy", shared_bytes=20_000)
    with pytest.raises(NoPlan, match="toy has 20,000"):
        resident(problem(), small)
    with pytest.raises(NoPlan, match="no slices of W_hh that toy holds on its 132 SMs"):
        cooperative(problem(hidden_size=512), small)
    with pytest.raises(NoPlan, match="in ieee, which tensor cores do not"):
        cooperative(problem(hidden_size=512, dtype=torch.float32, precision="ieee"), chip)
    with pytest.raises(NoPlan, match="does not give to the matrix units of gfx942"):
        cooperative(problem(hidden_size=512), CHIPS["gfx942"])
    with pytest.raises(NoPlan, match="one direction"):
        cooperative(problem(hidden_size=512, directions=2, layers=2), chip)


def test_a_cell_that_reduces_over_a_row_stays_in_one_program(monkeypatch):
    monkeypatch.setitem(SPECS, "normed", replace(SPECS["rnn_tanh"], rowwise=True))
    normed = problem(cell="normed", hidden_size=512)
    assert plan(normed._replace(hidden_size=200), CHIPS["sm_90"]).schedule == "resident"
    for schedule in (cooperative, stepwise):
        with pytest.raises(NoPlan, match="cuts a row of H"):
            schedule(normed, CHIPS["sm_90"])


@pytest.mark.parametrize("H", range(1, 2100, 7))
@pytest.mark.parametrize("gates", [1, 4])
@pytest.mark.parametrize("kind", ["16-bit", "tf32"])
def test_chunks_cover_h_in_short_chains(H, kind, gates):
    chunks = k_chunks(H, kind, operand_columns(kind, gates, 1, "backward", H, False))
    assert len({pieces for _, pieces, _ in chunks}) == 1
    ends = [start + pieces * width for start, pieces, width in chunks]
    assert [start for start, _, _ in chunks] == [0, *ends[:-1]]
    padding = ends[-1] - H
    assert 0 <= padding < 64 + H // 4 or (kind == "tf32" and padding < 512 < H)
    deep = 16 if kind == "16-bit" else 8  # columns of one mma
    assert all(16 <= width <= 8 * deep for _, _, width in chunks)


def test_schedule_by_size():
    """What the table promises on an H100, for one layer in training."""

    def schedules(**changes):
        return [
            plan(problem(hidden_size=H, **changes), CHIPS["sm_90"]).schedule[:4]
            for H in (128, *COOPERATIVE_H)
        ]

    assert schedules() == ["resi", *["coop"] * 6, *["step"] * 2]
    assert schedules(cell="gru") == ["resi", *["coop"] * 6, *["step"] * 2]
    assert schedules(dtype=torch.float32) == [*["coop"] * 7, *["step"] * 2]
    assert schedules(dtype=torch.float32, precision="tf32x3") == [*["coop"] * 3, *["step"] * 6]
    assert set(schedules(dtype=torch.float32, precision="ieee")) == {"step"}
    assert set(schedules(dtype=torch.float64)) == {"step"}


def test_larger_batches_go_in_rounds():
    one, many = (
        cooperative(problem(hidden_size=1024, batch=batch), CHIPS["sm_90"]) for batch in (16, 128)
    )
    members = 1024 // many.forward.blocks[0][1]
    assert many.forward.at_once == 132 // members
    assert one.floors[0].step == pytest.approx(1.6, abs=0.1)


def test_layers_share_a_launch_where_the_model_finds_it_faster():
    def launches(H, layers, **changes):
        stack = problem(hidden_size=H, layers=layers, **changes)
        return [(p.schedule, p.layers) for p in plan_stack(stack, CHIPS["sm_90"])]

    assert launches(256, 2) == [("cooperative", 2)]
    assert launches(64, 2) == [("resident", 1)] * 2  # a hop takes longer than a layer
    assert launches(64, 6) == [("cooperative", 6)]
    assert launches(256, 2, directions=2) == [("cooperative", 1)] * 2
    assert launches(256, 40)[0][1] < 40  # as many as the chip holds
    assert sum(layers for _, layers in launches(256, 40)) == 40
    assert launches(512, 2, batch=128) == [("cooperative", 1)] * 2


def test_no_program_waits_where_only_one_runs():
    """In the interpreter, which runs the layers of a wavefront in order."""
    alone = CHIPS["sm_90"]._replace(concurrent=False)
    assert plan(problem(hidden_size=256), alone).schedule == "stepwise"
    wave = plan_stack(problem(hidden_size=16, layers=6), alone)
    assert [(p.schedule, p.forward.blocks) for p in wave] == [("cooperative", ((0, 16),))]


def test_tiles_are_chosen_for_latency_while_programs_are_few():
    chip = CHIPS["sm_90"]
    assert plan(problem(batch=8 * chip.sms), chip).forward.block_b == 8
    assert plan(problem(batch=8 * chip.sms + 1), chip).forward.block_b == 16
    assert plan(problem(batch=8 * chip.sms, directions=2), chip).forward.block_b == 16


def test_amd_gets_the_rows_of_its_matrix_instruction():
    assert plan(problem(batch=1), CHIPS["gfx942"]).forward.block_b == 16


def test_small_inputs_are_projected_in_the_kernel():
    chip = CHIPS["sm_90"]
    assert plan(problem(input_size=1), chip).i_blocks == ((0, 16),)
    assert plan(problem(input_size=64), chip).i_blocks == ((0, 64),)
    assert plan(problem(input_size=65), chip).i_blocks == ()
    assert plan(problem(input_size=1, hidden_size=65), chip).i_blocks == ()


def test_precision_concerns_fp32_alone():
    chip = CHIPS["sm_90"]
    assert plan(problem(), chip).forward.input_precision == "ieee"
    wide = problem(dtype=torch.float32)
    assert plan(wide, chip).forward.input_precision == "tf32"
    assert plan(wide._replace(hidden_size=32), CHIPS["gfx942"]).forward.input_precision == "ieee"


def test_a_device_that_refused_is_not_asked_again():
    """Not even for a wavefront of one program a layer: its programs wait for each other too."""
    small = problem(hidden_size=16, layers=6)
    assert [p.schedule for p in plan_stack(small, CHIPS["sm_90"])] == ["cooperative"]
    refusing = CHIPS["sm_90"]._replace(cooperates=False)
    assert [p.schedule for p in plan_stack(small, refusing)] == ["resident"] * 6
    with pytest.raises(NoPlan, match="sm_90 has refused a cooperative launch"):
        cooperative(small, refusing)


def test_a_projection_goes_step_by_step():
    projected = problem(proj_size=8, layers=2)
    assert [p.schedule for p in plan_stack(projected, CHIPS["sm_90"])] == ["stepwise"] * 2
    with pytest.raises(NoPlan, match="only schedule stepwise has a projection"):
        resident(projected, CHIPS["sm_90"])


def test_inference_plans_no_backward():
    assert plan(problem(needs_grad=False), CHIPS["sm_90"]).backward is None


def test_description_says_that_it_is_modelled():
    text = plan(problem(), CHIPS["sm_90"]).describe()
    assert text.startswith("resident: forward 8 rows x 64 units, 4 warps; backward")
    assert "forward at least 0." in text
    assert "modelled, not measured" in text


def test_specs_are_consistent():
    for spec in SPECS.values():
        gates = [gate for phase in spec.phases for gate in phase]
        assert gates == list(range(spec.gates))
        stored = sorted(tile for tiles in spec.grads for tile in tiles)
        assert stored == list(range(spec.grad_tiles))
        assert all(list(t) == list(range(t[0], t[0] + len(t))) for t in spec.grads)
        assert len(spec.operands) == len(spec.phases) == len(spec.grads)
