"""The plan is a pure function: its tiles cover H, fit the chip, and its refusals are sentences."""

import itertools

import pytest
import torch
from compiling import every_plan

from fusedrnn.kernels.plan import CHIPS, NoPlan, Problem, blocks_of, plan
from fusedrnn.kernels.spec import SPECS


def problem(**changes) -> Problem:
    base = Problem("lstm", 8, 64, 32, 1, torch.float16, "tf32", True)
    return base._replace(**changes)


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
        for tiles in (chosen.forward, chosen.backward):
            assert tiles.shared_bytes <= chip.shared_bytes
            assert sum(width for _, width in tiles.blocks) >= p.hidden_size


@pytest.mark.parametrize("cell", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_h_from_one_up_to_a_bound_has_a_plan(cell, dtype):
    fits = []
    for H in range(1, 300):
        try:
            plan(problem(cell=cell, hidden_size=H, dtype=dtype), CHIPS["sm_90"])
        except NoPlan:
            continue
        fits.append(H)
    assert fits == list(range(1, len(fits) + 1))
    assert len(fits) >= (64 if dtype == torch.float32 else 128)


def test_refusals_name_what_is_missing():
    with pytest.raises(NoPlan, match=r"not torch\.float64"):
        plan(problem(dtype=torch.float64), CHIPS["sm_90"])
    with pytest.raises(NoPlan, match="no kernel knows the cell 'peephole'"):
        plan(problem(cell="peephole"), CHIPS["sm_90"])
    with pytest.raises(NoPlan, match=r"ends at H=128; H is 129"):
        plan(problem(hidden_size=129), CHIPS["sm_90"])
    small = CHIPS["sm_90"]._replace(name="toy", shared_bytes=20_000)
    with pytest.raises(NoPlan, match="toy has 20,000"):
        plan(problem(), small)


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


def test_inference_plans_no_backward():
    assert plan(problem(needs_grad=False), CHIPS["sm_90"]).backward is None


def test_description_says_that_it_is_modelled():
    text = plan(problem(), CHIPS["sm_90"]).describe()
    assert text.startswith("resident: forward 8 rows x 64 units, 4 warps; backward")
    assert "modelled, not measured" in text


def test_specs_are_consistent():
    for spec in SPECS.values():
        gates = [gate for phase in spec.phases for gate in phase]
        assert gates == list(range(spec.gates))
        stored = sorted(tile for tiles in spec.grads for tile in tiles)
        assert stored == list(range(spec.grad_tiles))
        assert all(list(t) == list(range(t[0], t[0] + len(t))) for t in spec.grads)
        assert len(spec.operands) == len(spec.phases) == len(spec.grads)
