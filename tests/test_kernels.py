"""Ring 1: every kernel against torch, under the interpreter, or on the GPU where there is one."""

import copy

import pytest
import torch
from models import (
    CELLS,
    WITH_TORCH,
    Op,
    assert_equals_torch,
    double,
    make_inputs,
    torch_module,
)

from fusedrnn import dispatch, launches
from fusedrnn.kernels import chips, cooperative_launch, launch
from fusedrnn.kernels import plan as planning
from fusedrnn.kernels.plan import chip_of
from fusedrnn.loop import loop_fwd
from fusedrnn.testing import CASES, Case, error_budget, run_module

SMALL = Case(6, 5, 3, 20)
# bf16 dots multiply bit patterns under the interpreter, so only a GPU can run them.
HALF = [torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


def check(cell, case, device, *, layers=1, directions=1, dtype=torch.float32, bias=True):
    module = torch_module(
        cell,
        case.I,
        case.H,
        num_layers=layers,
        bidirectional=directions == 2,
        bias=bias,
    ).to(device, dtype)
    inputs = make_inputs(
        cell, case, layers=layers, directions=directions, dtype=dtype, device=device
    )
    assert_equals_torch(module, Op(module, cell, "triton"), *inputs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("cell", CELLS)
def test_kernels_equal_torch(cell, case, device):
    """In fp32, but in fp16 where only 16-bit weights fit one program."""
    check(cell, case, device, dtype=torch.float32 if case.H <= 64 else torch.float16)


def test_two_blocks_in_fp32(device):
    """H = 90 is 64 + 32 columns: each gate is a sum over two blocks."""
    check("rnn_tanh", Case(4, 5, 2, 90), device, directions=2)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("layers", "directions"), [(1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("cell", CELLS)
def test_stacks_and_directions(cell, layers, directions, bias, device):
    check(cell, SMALL, device, layers=layers, directions=directions, bias=bias)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", [CASES[2], CASES[6], CASES[11]], ids=lambda case: case.id)
@pytest.mark.parametrize("cell", WITH_TORCH)
def test_half_precision(cell, case, dtype, device):
    check(cell, case, device, dtype=dtype)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_sixteen_rows_a_program(cell, directions, device, monkeypatch):
    """Where SMs are scarce the plan gives a program 16 rows and not 8."""
    crowded = chip_of(device)._replace(name="crowded", sms=1)
    monkeypatch.setattr(launches, "chip_of", lambda device: crowded)
    check(cell, Case(4, 21, 3, 40), device, directions=directions)


@pytest.mark.parametrize("input_size", [1, 16, 17, 64, 65])
def test_input_projected_inside_and_outside_the_kernel(input_size, device):
    check("gru", Case(4, 3, input_size, 20), device)


@pytest.mark.parametrize("cell", CELLS)
def test_bitwise_deterministic(cell, device):
    op = Op(torch_module(cell, 3, 20, bidirectional=True).to(device), cell, "triton")
    inputs = make_inputs(cell, SMALL, directions=2, device=device)
    first, second = run_module(op, *inputs), run_module(op, *inputs)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="programs overlap only on a GPU")
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_programs_that_share_a_layer_agree_bit_for_bit(cell, layers, device):
    """Twenty runs, in each of which the programs overlap differently."""
    module = torch_module(cell, 64, 384, num_layers=layers).to(device, torch.float16)
    op = Op(module, cell, "triton")
    case = Case(100, 40, 64, 384)
    inputs = make_inputs(cell, case, layers=layers, dtype=torch.float16, device=device)
    first = run_module(op, *inputs)
    for _ in range(19):
        again = run_module(op, *inputs)
        assert not [name for name in first if not torch.equal(first[name], again[name])]


@pytest.mark.parametrize("cell", CELLS)
def test_causal(cell, device):
    """Inputs after t leave outputs up to t alone, bit for bit."""
    op = Op(torch_module(cell, 3, 20).to(device), cell, "triton")
    x, hx, _ = make_inputs(cell, SMALL, device=device)
    changed = x.clone()
    changed[4:] += 1.0
    before, after = op(x, hx)[0], op(changed, hx)[0]
    assert torch.equal(before[:4], after[:4])
    assert not torch.equal(before[4], after[4])


@pytest.mark.parametrize("cell", CELLS)
def test_rows_are_independent(cell, device):
    """A permuted batch gives permuted results, and a sequence alone what it gives in company."""
    op = Op(torch_module(cell, 3, 20).to(device), cell, "triton")
    x, hx, cotangents = make_inputs(cell, Case(5, 19, 3, 20), device=device)
    order = torch.randperm(19, device=device)

    def rows(tree, index):
        return (
            tree[:, index]
            if isinstance(tree, torch.Tensor)
            else type(tree)(rows(t, index) for t in tree)
        )

    whole = run_module(op, x, hx, cotangents)
    for index in (order, torch.tensor([13], device=device)):
        part = run_module(op, rows(x, index), rows(hx, index), rows(cotangents, index))
        for name in ("output", "h_n", "d_h_0"):
            assert torch.equal(part[name], whole[name][:, index]), name


@pytest.mark.parametrize("cell", CELLS)
def test_two_halves_with_carried_state_equal_one_run(cell, device):
    op = Op(torch_module(cell, 3, 20).to(device), cell, "triton")
    x, hx, _ = make_inputs(cell, SMALL, device=device)
    output, final = op(x, hx)
    first, state = op(x[:2], hx)
    second, state = op(x[2:], state)
    assert torch.equal(torch.cat((first, second)), output)
    assert all(map(torch.equal, state, final))


# The interpreter's exp warns where it is inf; the sigmoid of it is 0, as on a GPU.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("cell", CELLS)
def test_saturated_inputs(cell, device):
    """Pre-activations of several hundred: everything stays finite and equal to torch."""
    module = torch_module(cell, 3, 20).to(device)
    with torch.no_grad():
        module.weight_ih_l0.mul_(1000.0)
        module.weight_hh_l0.mul_(0.01 if cell == "rnn_relu" else 1.0)
    inputs = make_inputs(cell, SMALL, device=device)
    got = run_module(Op(module, cell, "triton"), *inputs)
    assert all(tensor.isfinite().all() for tensor in got.values())
    ref = run_module(module, *inputs)
    truth = run_module(copy.deepcopy(module).double().cpu(), *map(double, inputs))
    for name in truth:
        # 1 - tanh^2 is all cancellation here, so torch's relative RMS is as large as ours; the
        # rule on the maximal error still holds.
        budget = error_budget(name, got[name], ref[name], truth[name])
        assert budget.max_err <= budget.allowed, budget


@pytest.mark.parametrize("what", ["expanded", "transposed", "sliced"])
def test_strides_of_every_kind(what, device):
    """x of any strides, and the stride-0 gradient that sum().backward() sends."""
    op = Op(torch_module("lstm", 3, 20).to(device), "lstm", "triton")
    x, hx, _ = make_inputs("lstm", SMALL, device=device)
    odd = {
        "expanded": x[:1].expand(6, -1, -1),
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": torch.stack((x, x), -1)[..., 0],
    }[what]
    assert what == "expanded" or odd.stride() != x.stride()

    def results(x):
        x = x.detach().requires_grad_()
        output, _ = op(x, hx)
        return output, torch.autograd.grad(output.sum(), x)[0]

    for got, want in zip(results(odd), results(odd.contiguous()), strict=True):
        assert torch.equal(got, want)


def test_weights_of_any_strides(device):
    op = Op(torch_module("gru", 3, 20, num_layers=2).to(device), "gru", "triton")
    x, hx, cotangents = make_inputs("gru", SMALL, layers=2, device=device)
    want = run_module(op, x, hx, cotangents)
    for parameter in op.module.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.t().contiguous().t()
            assert not parameter.is_contiguous()
        else:
            parameter.data = torch.stack((parameter.data, parameter.data), -1)[:, 0]
    got = run_module(op, x, hx, cotangents)
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("cell", CELLS)
def test_inputs_and_gradients_are_left_alone(cell, device):
    op = Op(torch_module(cell, 3, 20).to(device), cell, "triton")
    x, hx, cotangents = make_inputs(cell, SMALL, device=device)
    states = list(hx) if isinstance(hx, tuple) else [hx]
    tensors = [x, *states, *cotangents, *(p.data for p in op.module.parameters())]
    copies = [t.clone() for t in tensors]
    run_module(op, x, hx, cotangents)
    assert all(map(torch.equal, tensors, copies))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gradient_of_one_result_alone(cell, device):
    module = torch_module(cell, 3, 20).to(device)
    x, hx, cotangents = make_inputs(cell, SMALL, device=device)
    for alone in range(len(cotangents)):
        only = [c if i == alone else torch.zeros_like(c) for i, c in enumerate(cotangents)]
        assert_equals_torch(module, Op(module, cell, "triton"), x, hx, only)


def test_no_output_gradient_at_all(device):
    """A loss on h_n alone sends no dy; the kernel then reads none."""
    module = torch_module("gru", 3, 20).to(device)
    x, hx, _ = make_inputs("gru", SMALL, device=device)
    x.requires_grad_()
    ours, theirs = (
        torch.autograd.grad(m(x, hx)[1].sum(), [x, *module.parameters()])
        for m in (Op(module, "gru", "triton"), module)
    )
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_dropout_masks_reach_every_layer_but_the_last(device):
    op = Op(torch_module("lstm", 3, 20, num_layers=3).to(device), "lstm", "triton")
    reference = Op(op.module, "lstm", "torch")
    x, hx, _ = make_inputs("lstm", SMALL, layers=3, device=device)
    masks = [torch.rand(6, 5, 20, device=device).round() * 2 for _ in range(2)]

    def gradients(m):
        output, _ = m(x, hx, masks)
        return output, *torch.autograd.grad(output.sin().sum(), list(op.module.parameters()))

    for got, want in zip(gradients(op), gradients(reference), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    unmasked = op(x, hx)[0]
    assert not torch.allclose(unmasked, gradients(op)[0], atol=1e-3)


def test_second_order_through_the_kernels(device):
    """create_graph=True differentiates the reference: right, and not silently wrong."""
    module = torch_module("gru", 3, 5).to(device)
    x, hx, _ = make_inputs("gru", Case(3, 2, 3, 5), device=device)
    x.requires_grad_()

    def penalty(m):
        gradient = torch.autograd.grad(m(x, hx)[0].sin().sum(), x, create_graph=True)[0]
        return torch.autograd.grad(gradient.square().sum(), [x, *module.parameters()])

    with torch.backends.cudnn.flags(enabled=False):  # cuDNN has no second derivative
        want = penalty(module)
    for got, expected in zip(penalty(Op(module, "gru", "triton")), want, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_empty_batch(device):
    op = Op(torch_module("lstm", 3, 20).to(device), "lstm", "triton")
    x, hx, _ = make_inputs("lstm", Case(4, 0, 3, 20), device=device)
    output, (h_n, _) = op(x, hx)
    assert output.shape == (4, 0, 20)
    assert h_n.shape == (1, 0, 20)


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_layers_in_one_launch(cell, layers, dropout, device, monkeypatch):
    """A wavefront through the operator: one program a layer, which the interpreter runs in order.
    What several programs do to each other is `test_cooperative.py`'s."""
    monkeypatch.setattr(launches, "plan_stack", lambda p, chip: (planning.cooperative(p, chip),))
    module = torch_module(cell, 3, 16, num_layers=layers).to(device)
    x, hx, _ = make_inputs(cell, SMALL._replace(H=16), layers=layers, device=device)
    masks = [torch.rand(6, 5, 16, device=device).round() * 2 for _ in range(layers - 1)] * dropout

    def results(backend):
        leaves = [t.detach().requires_grad_() for t in (x, *(hx if cell == "lstm" else (hx,)))]
        state = tuple(leaves[1:]) if cell == "lstm" else leaves[1]
        output, final = Op(module, cell, backend, "tf32")(leaves[0], state, masks)
        final = final if isinstance(final, tuple) else (final,)
        loss = output.sin().sum() + sum((f * f).sum() for f in final)
        return output, *final, *torch.autograd.grad(loss, [*leaves, *module.parameters()])

    bound = 2e-5 if device.type == "cpu" else 2e-2  # the interpreter multiplies tf32 in fp32
    for got, want in zip(results("triton"), results("torch"), strict=True):
        torch.testing.assert_close(got, want, atol=bound, rtol=bound)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before", "rnn_tanh"])
def test_more_units_than_a_program_holds(cell, layers, device):
    """Cooperative on a GPU, where layers share the launch; stepwise in the interpreter."""
    case = Case(50, 20, 40, 512) if device.type == "cuda" else Case(3, 5, 4, 192)
    check(cell, case, device, layers=layers, dtype=torch.float16)


def test_double_precision(device):
    """Step by step, and as exact as torch."""
    module = torch_module("lstm", 3, 70, num_layers=2, bidirectional=True).to(device).double()
    x, hx, cotangents = make_inputs(
        "lstm", SMALL._replace(H=70), layers=2, directions=2, dtype=torch.float64, device=device
    )
    got = run_module(Op(module, "lstm", "triton"), x, hx, cotangents)
    want = run_module(module, x, hx, cotangents)
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-12, rtol=1e-12, msg=name)


@pytest.mark.parametrize("refused", ["forward", "backward"])
def test_a_refused_launch_is_done_another_way(refused, device, monkeypatch):
    """Another process may own part of the SMs. The first refusal is said, and is the last."""
    monkeypatch.setattr(chips, "_REFUSING", set())
    monkeypatch.setattr(
        launches,
        "chip_of",
        lambda d: planning.CHIPS["sm_90"]._replace(cooperates=d not in chips._REFUSING),
    )
    asked = []

    def refuse(grid, first_tile):
        asked.append(grid)
        raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")

    def in_rounds(launch, tiles, *rest):
        return real(refuse, tiles, *rest)

    real = cooperative_launch.in_rounds
    monkeypatch.setattr(cooperative_launch, "in_rounds", in_rounds)
    if refused == "backward":  # all went well until then
        monkeypatch.setattr(cooperative_launch, "cooperative_fwd", like_the_reference)
    module = torch_module("gru", 3, 192).to(device)
    inputs = make_inputs("gru", Case(3, 2, 3, 192), device=device)
    with (
        dispatch.use_precision("tf32"),
        pytest.warns(RuntimeWarning, match="refused a cooperative launch .*too many blocks"),
    ):
        assert_equals_torch(module, Op(module, "gru", "triton", "tf32"), *inputs)
    assert len(asked) == 1
    assert {device} == chips._REFUSING


def like_the_reference(cell, plan, gx, weights, masks, h_0, c_0, outs, *results):
    *results, _ = results  # the workspace
    loop_fwd(cell, gx, weights, h_0, c_0, outs[0], *results)


def test_other_errors_of_a_launch_are_not_taken_for_a_refusal():
    def fail(grid, first_tile):
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    tiles = planning.cooperative(
        planning.Problem("gru", 8, 256, 16, 1, torch.float16, "ieee", True),
        planning.CHIPS["sm_90"],
    ).forward
    with pytest.raises(RuntimeError, match="illegal memory access") as caught:
        launch.in_rounds(fail, tiles, torch.empty(0), 1, 256, 1)
    assert type(caught.value) is RuntimeError
