"""Schedule resident against the reference, in the interpreter or on the GPU where there is one."""

import pytest
import torch
from kernel_cases import Shape, differences, resident_plan, results, rows_of, tensors

from fusedrnn.kernels import resident
from fusedrnn.kernels import rows as rows_module
from fusedrnn.kernels.spec import SPECS

CELLS = list(SPECS)
# bf16 products multiply bit patterns in the interpreter, so only a GPU can run them.
HALF = [torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
#: The second tile of 16 sequences has one.
SHAPE = Shape(3, 17, 20)


def run(cell, shape, data, block_b=16):
    plan, rows = resident_plan(shape.H, block_b), rows_of(shape, data.layers.h_0.device)
    resident.forward(cell, plan, data.layers, rows)
    resident.backward(cell, plan, *data, rows)
    return data


def check(cell, shape, device, dtype=torch.float32, **options):
    found = differences(
        cell, shape, run(cell, shape, tensors(cell, shape, dtype, device), **options)
    )
    assert not found, found


def clone(data, **changes):
    """A copy of the tensors of a call, with other tensors of its layers."""

    def copy(tree):
        if isinstance(tree, torch.Tensor):
            return tree.clone()
        return tree if tree is None else type(tree)(map(copy, tree))

    layers = data.layers._replace(**changes)
    out = layers.out[0].clone()
    fresh = layers._make(map(copy, layers))._replace(out=(out,) * len(layers.out))
    return data._replace(layers=fresh, grads=data.grads._make(map(copy, data.grads)))


@pytest.mark.parametrize(
    "shape",
    [SHAPE, SHAPE._replace(D=2, rows="ragged"), SHAPE._replace(D=2, rows="packed", bias=False)],
    ids=lambda shape: shape.rows,
)
@pytest.mark.parametrize("cell", CELLS)
def test_equals_the_reference(cell, shape, device):
    check(cell, shape, device)


@pytest.mark.parametrize(
    ("cell", "shape"),
    [
        ("lstm", Shape(1, 1, 1)),
        ("gru_reset_before", Shape(2, 1, 16, D=2)),
        ("gru", Shape(3, 2, 33, rows="ragged")),  # 31 columns of padding
        ("rnn_tanh", Shape(33, 2, 5)),
    ],
)
def test_odd_sizes(cell, shape, device):
    check(cell, shape, device)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_half_precision(cell, dtype, device):
    """Operands and results are rounded; the states stay in fp32."""
    check(cell, SHAPE._replace(rows="ragged"), device, dtype)


def test_eight_rows_a_program(device):
    check("lstm", Shape(3, 9, 20, D=2), device, block_b=8)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_two_runs_agree_bit_for_bit_and_leave_their_inputs_alone(cell, device):
    shape = SHAPE._replace(D=2, rows="ragged")
    data = tensors(cell, shape, device=device)
    before, again = clone(data), clone(data)
    first, second = (results(cell, shape, run(cell, shape, each)) for each in (data, again))
    assert not [name for name in first if not torch.equal(first[name], second[name])]
    read = ("gx", "h_0", "c_0")
    for name in read:
        old, new = getattr(before.layers, name), getattr(data.layers, name)
        assert old is None or torch.equal(old.nan_to_num(), new.nan_to_num()), name
    assert all(map(torch.equal, before.layers.w_hh, data.layers.w_hh))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_without_gradients_nothing_is_saved_and_the_results_are_the_same(cell, device):
    data = tensors(cell, SHAPE, device=device)
    bare = clone(data, gates=None, cs=None)
    for each in (data, bare):
        resident.forward(cell, resident_plan(20), each.layers, rows_of(SHAPE))
    for name in ("h_n", "c_n"):
        full, without = getattr(data.layers, name), getattr(bare.layers, name)
        assert full is None or torch.equal(full, without)
    assert torch.equal(data.layers.out[0], bare.layers.out[0])


def test_no_gradient_of_the_output_is_one_of_zeros(device):
    data = tensors("gru", SHAPE, device=device)
    zeros = data._replace(grads=data.grads._replace(out=torch.zeros_like(data.grads.out)))
    none = clone(data)
    none = none._replace(grads=none.grads._replace(out=None))
    for each in (zeros, none):
        run("gru", SHAPE, each)
    assert torch.equal(zeros.grads.gates, none.grads.gates)
    assert torch.equal(zeros.grads.h_0, none.grads.h_0)


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_later_inputs_and_other_sequences_change_nothing(cell, device):
    data, rows = tensors(cell, SHAPE, device=device), rows_of(SHAPE)
    other = clone(data)
    of_step = other.layers.gx.view(3, 17, -1)
    of_step[2:] += 1.0  # later
    of_step[:, 5] += 1.0  # another sequence
    for each in (data, other):
        resident.forward(cell, resident_plan(20), each.layers, rows)
    before, after = (each.layers.out[0].view(3, 17, -1) for each in (data, other))
    alone = [b for b in range(17) if b != 5]
    assert torch.equal(before[:2, alone], after[:2, alone])
    assert not torch.equal(before[2, alone], after[2, alone])
    assert not torch.equal(before[0, 5], after[0, 5])


# The interpreter's exp warns where it is inf; its reciprocal is 0, as on a GPU.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("cell", CELLS)
def test_saturated_gates_stay_finite(cell, device):
    shape = Shape(3, 4, 16)
    data = tensors(cell, shape, device=device)
    small = tuple(w * (0.01 if cell == "rnn_relu" else 1.0) for w in data.layers.w_hh)
    data = clone(data, gx=data.layers.gx * 1000.0, w_hh=small)
    found = results(cell, shape, run(cell, shape, data))
    assert all(value.isfinite().all() for value in found.values())


def first_step_for_all(origins):
    return origins[:, :1].expand_as(origins).contiguous()


def padding_counts(origins):
    return origins.masked_fill(origins == rows_module.SKIPPED, rows_module.PREVIOUS)


def resets_lost(origins):
    return origins.masked_fill(origins == rows_module.ZERO, rows_module.PREVIOUS)


def initial_lost(origins):
    return origins.masked_fill(origins == rows_module.INITIAL, rows_module.PREVIOUS)


@pytest.mark.parametrize("bug", [first_step_for_all, padding_counts, resets_lost, initial_lost])
def test_planted_bugs_in_the_origins_are_found(bug, device):
    shape = Shape(5, 6, 16, rows="ragged", D=2)
    data = tensors("gru", shape, device=device)
    data = data._replace(layers=data.layers._replace(origins=bug(data.layers.origins)))
    assert differences("gru", shape, run("gru", shape, data))
