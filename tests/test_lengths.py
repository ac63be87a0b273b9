"""Lengths, resets and packed input beyond `test_ragged.py`: other forms, dtypes and derivatives.

There everything equals the sequences one by one; here, with the same oracle, are batches of several
tiles, what no gradient needs, projections, second derivatives, what must not be read, and traps in
every route through the package.
"""

from __future__ import annotations

import copy

import pytest
import test_modules_inputs as inputs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import one_by_one
from test_ragged import (
    BACKENDS,
    KINDS,
    LENGTHS,
    MODULES,
    RESET,
    T,
    as_hx,
    build,
    check,
    check_budget,
    everything,
    first_step_for_all,
    from_the_end_of_all,
    oracle,
    ours,
    padded_with_nan,
    padding_counts,
    resets_lost,
    states_for,
)
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fusedrnn
from fusedrnn import known, layout, segments, stack
from fusedrnn.kernels import resident
from fusedrnn.kernels import rows as rows_module
from fusedrnn.kernels.rows import PREVIOUS, ZERO, packed_rows
from fusedrnn.kernels.spec import SPECS
from fusedrnn.testing import assert_budget

CPU = torch.device("cpu")
BEYOND = torch.arange(T).unsqueeze(1) >= LENGTHS
DTYPES = {"resident": torch.float32, "stepwise": torch.float64}  # the schedule of small sizes


def assert_all_close(got, want, tolerance=1e-11):
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=tolerance, rtol=tolerance, msg=name)


def zeros_for(module, batch):
    return tuple(torch.zeros_like(state) for state in states_for(module, batch))


# Dense input with lengths and resets.


@pytest.mark.parametrize("schedule", DTYPES)
def test_the_schedules_are_those_that_are_meant(schedule):
    x = torch.zeros(T, 5, 3, dtype=DTYPES[schedule])
    with fusedrnn.use_backend("triton"):
        text = str(fusedrnn.explain(build("gru", 1, 2, x.dtype), x, lengths=LENGTHS, reset=RESET))
    assert f"layer 0: {schedule}" in text
    assert "directions=2, lengths, reset, with gradients" in text


@pytest.mark.parametrize("cell", MODULES)
def test_resets_alone_in_the_resident_kernels(cell):
    """No step is skipped there: another form of the same kernels."""
    check_budget(build(cell, 1, 2, torch.float32), KINDS["reset"], CPU)


@pytest.mark.parametrize(("cell", "H"), [("lstm", 64), ("gru_reset_before", 33)])
def test_several_tiles_of_the_batch(cell, H):
    """Whole tiles without a sequence that goes on, and one that is not full."""
    steps, batch = 3, 35
    lengths = torch.arange(batch) * 2 % (steps + 1)
    lengths[16:32] = torch.tensor([0, 1] * 8)
    kind = {"lengths": lengths, "reset": torch.rand(steps, batch) < 0.3}
    module = build(cell, 1, 2, torch.float32, H=H)
    x = torch.randn(steps, batch, 3, dtype=torch.float64).float()
    hx, double = states_for(module, batch, torch.float32), copy.deepcopy(module).double()
    truth = everything(oracle(**kind), double, x, hx, torch.float64)
    ref = everything(oracle(**kind), module, x, hx, torch.float32)
    with fusedrnn.use_precision("ieee"):
        got = everything(ours("triton", **kind), module, x, hx, torch.float32)
    for name in truth:
        assert_budget(name, got[name], ref[name], truth[name])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", MODULES)
def test_nothing_saved_gives_the_same(cell, backend, dtype):
    """Without gradients no gate is kept; also without a bias and from zero states. Not a bit is
    another, but for the loop of a GRU, whose products have other columns then."""
    is_other = cell == "gru" and backend == "torch" and dtype == torch.float64
    near = {"rtol": 1e-14, "atol": 1e-14} if is_other else {"rtol": 0, "atol": 0}
    module = build(cell, 1, 2, dtype, bias=False)
    x = padded_with_nan(torch.randn(T, 5, 3, dtype=dtype), LENGTHS)
    with fusedrnn.use_backend(backend), fusedrnn.use_precision("ieee"):
        output, final = module(x, **KINDS["both"])
        with torch.no_grad():
            bare, bare_final = module(x, **KINDS["both"])
    zero = tuple(state.to(dtype) for state in zeros_for(module, 5))
    want, states = one_by_one(module, x, zero, **KINDS["both"])
    assert output.requires_grad
    torch.testing.assert_close(output, bare, **near)
    for got, other, state in zip(
        *(f if isinstance(f, tuple) else (f,) for f in (final, bare_final)), states, strict=True
    ):
        torch.testing.assert_close(got, other, **near)
        torch.testing.assert_close(got, state)
    torch.testing.assert_close(output, want)


@pytest.mark.parametrize("backend", ["torch", "resident", "stepwise"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_the_gradient_of_padding_is_zero_though_it_holds_nan(backend, batch_first):
    """The padding of the leaf itself, not of what a mask was laid over: 0 and neither NaN nor -."""
    layers = 2 if backend == "torch" else 1
    dtype = DTYPES.get(backend, torch.float64)
    module = build("lstm", layers, 2, dtype, batch_first=batch_first)
    x = padded_with_nan(torch.randn(T, 5, 3), LENGTHS).to(dtype)
    x = (x.transpose(0, 1) if batch_first else x).detach().requires_grad_()
    with fusedrnn.use_backend("torch" if backend == "torch" else "triton"):
        output, _ = module(x, lengths=LENGTHS)
    beyond = BEYOND.t() if batch_first else BEYOND
    arriving = torch.where(beyond.unsqueeze(-1), torch.nan, torch.ones_like(output))
    d_x, *d_params = torch.autograd.grad(output, (x, *module.parameters()), arriving)
    assert not output[beyond].any()
    assert not d_x[beyond].any()
    assert d_x[~beyond].all()
    assert all(grad.isfinite().all() for grad in d_params)


@pytest.mark.parametrize("kind", KINDS)
def test_a_projection_with_lengths_and_resets(kind):
    module = build("lstm", 2, 2, proj_size=2)
    x = torch.randn(T, 5, 3, dtype=torch.float64)
    hx = tuple(torch.randn(4, 5, n, dtype=torch.float64) for n in (2, 5))
    want = everything(oracle(**KINDS[kind]), module, x, hx, torch.float64)
    assert_all_close(everything(ours("torch", **KINDS[kind]), module, x, hx, torch.float64), want)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_calls_of_the_resident_kernels(data):
    steps, batch = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    batch_first = data.draw(st.booleans())
    kind = {}
    if data.draw(st.booleans()):
        lengths = st.lists(st.integers(0, steps), min_size=batch, max_size=batch)
        kind["lengths"] = torch.tensor(data.draw(lengths))
    if not kind or data.draw(st.booleans()):
        row = st.lists(st.booleans(), min_size=batch, max_size=batch)
        kind["reset"] = torch.tensor(data.draw(st.lists(row, min_size=steps, max_size=steps)))
    torch.manual_seed(0)
    cell, bias = data.draw(st.sampled_from(sorted(MODULES))), data.draw(st.booleans())
    directions = data.draw(st.integers(1, 2))
    module = build(cell, 1, directions, torch.float32, bias=bias, batch_first=batch_first)
    x, hx = torch.randn(steps, batch, 3), states_for(module, batch, torch.float32)

    def run(module, x, hx):
        given = dict(kind)
        if batch_first:
            x = x.transpose(0, 1)
            given |= {"reset": kind["reset"].t()} if "reset" in kind else {}
        with fusedrnn.use_backend("triton"), fusedrnn.use_precision("ieee"):
            output, final = module(x, as_hx(hx), **given)
        return output.transpose(0, 1) if batch_first else output, final

    got = everything(run, module, padded_with_nan(x, kind.get("lengths")), hx, torch.float32)
    double = copy.deepcopy(module).double()
    truth = everything(oracle(**kind), double, x, hx, torch.float64)
    ref = everything(oracle(**kind), module, x, hx, torch.float32)
    for name in truth:
        assert_budget(name, got[name], ref[name], truth[name])


# PackedSequence and nested tensors.


@pytest.mark.parametrize(
    ("name", "stacked", "is_sorted"),
    [
        ("LSTM", {"num_layers": 2, "bidirectional": True}, False),
        ("LSTM", {}, True),
        ("GRU", {"bidirectional": True}, False),
        ("GRU", {"num_layers": 2, "bias": False}, True),
        ("RNN", {"bidirectional": True}, False),
        ("RNN relu", {"num_layers": 2, "batch_first": True}, False),
    ],
)
def test_packed_input_of_the_stepwise_kernels(name, stacked, is_sorted):
    theirs, own = inputs.build(name, **stacked)
    input = inputs.packed(is_sorted, (2, 4, 1, 4))
    inputs.assert_same("triton", theirs, own, input, inputs.states_for(own, 4))
    with fusedrnn.use_backend("triton"), torch.no_grad():
        output, _ = own(input)
    assert isinstance(output, PackedSequence)
    assert output.batch_sizes is input.batch_sizes
    assert output.sorted_indices is input.sorted_indices
    assert output.unsorted_indices is input.unsorted_indices


@pytest.mark.parametrize("is_sorted", [False, True], ids=["unsorted", "sorted"])
@pytest.mark.parametrize("name", inputs.NAMES)
def test_packed_input_that_auto_gives_to_the_loop(name, is_sorted):
    theirs, own = inputs.build(name, num_layers=2, bidirectional=True)
    input = inputs.packed(is_sorted, (50, 1, 7, 50, 3, 49, 20, 2))
    hx = inputs.states_for(own, 8)
    expected = inputs.run(theirs, input, hx)
    assert fusedrnn.explain(own, input, hx).backend == "torch"
    for got, want in zip(inputs.run(own, input, hx), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_dropout_between_packed_layers_is_torchs():
    theirs, own = inputs.build("GRU", num_layers=2, dropout=0.4)
    input, hx = inputs.packed(False, (2, 4, 1)), inputs.states_for(own, 3)
    inputs.assert_same("triton", theirs, own, input, hx)
    assert not torch.allclose(inputs.run(own, input, hx)[0], inputs.run(own.eval(), input, hx)[0])


def behind_nan(tensor):
    """The same numbers, contiguous, with NaN right before and behind them."""
    room = torch.full((len(tensor) + 40, *tensor.shape[1:]), torch.nan, dtype=tensor.dtype)
    view = room[4 : 4 + len(tensor)]
    view.copy_(tensor)
    return view


@pytest.mark.parametrize("cell", MODULES)
def test_packed_kernels_touch_exactly_the_packed_rows(cell, monkeypatch):
    """One launch a layer and way, and R rows of all that has rows; nothing beside them is read."""
    module = build(cell, 2, 2, torch.float32)
    lengths, hx = torch.tensor([2, 4, 1, 4]), states_for(module, 4, torch.float32)
    padded = torch.randn(4, 4, 3)
    packed = pack_padded_sequence(padded, lengths, enforce_sorted=False)
    data = behind_nan(packed.data).requires_grad_()
    total, spec = int(lengths.sum()), SPECS[cell]
    calls = {"resident_fwd": [], "resident_bwd": []}

    def watch(name, real):
        monkeypatch.setattr(
            resident, name, lambda *args: calls[name].append(args[2:]) or real(*args)
        )

    for name in calls:
        watch(name, getattr(resident, name))
    with fusedrnn.use_backend("triton"), fusedrnn.use_precision("ieee"):
        output, final = module(packed._replace(data=data), as_hx(hx))
        final = final if isinstance(final, tuple) else (final,)
        cotangent = behind_nan(torch.randn_like(output.data))
        got = torch.autograd.grad(
            (output.data, *final),
            (data, *module.parameters()),
            (cotangent, *map(torch.ones_like, final)),
        )
    assert [len(of_name) for of_name in calls.values()] == [2, 2]
    # What was read is what lies between NaNs, and no copy.
    assert calls["resident_fwd"][0][0].data_ptr() == data.data_ptr()
    assert calls["resident_bwd"][0][0].data_ptr() == cotangent.data_ptr()
    for *_, out, _, _, gates, cs, rows in calls["resident_fwd"]:
        assert rows.total == total == len(out)
        assert gates.numel() == 2 * total * spec.saved * 5
        assert cs is None or cs.shape == (2, total, 5)
    for *_, dgates, _, _, rows in calls["resident_bwd"]:
        assert rows.total == total
        assert dgates.shape == (2, total, spec.grad_tiles * 5)
    others = []
    for dtype in (torch.float32, torch.float64):
        same = copy.deepcopy(module).to(dtype)
        x = padded.to(dtype).requires_grad_()
        want, states = one_by_one(same, x, tuple(s.to(dtype) for s in hx), lengths)
        d_out = pad_packed_sequence(packed._replace(data=cotangent.detach()))[0].to(dtype)
        grads = torch.autograd.grad(
            (want, *states),
            (x, *same.parameters()),
            (d_out, *map(torch.ones_like, states)),
        )
        d_x = pack_padded_sequence(grads[0], lengths, enforce_sorted=False).data
        want = pack_padded_sequence(want, lengths, enforce_sorted=False).data
        others.append((want, *states, d_x, *grads[1:]))
    for i, tensors in enumerate(zip((output.data, *final, *got), *others, strict=True)):
        assert_budget(f"tensor {i}", *tensors)


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_nested_tensors_are_the_sequences_alone(backend):
    theirs, own = inputs.build("GRU", bidirectional=True)
    sequences = [torch.randn(n, 3, dtype=torch.float64) for n in (1, 4, 2)]
    hx = inputs.states_for(own, 3).requires_grad_()
    nested = torch.nested.nested_tensor(sequences, layout=torch.jagged, requires_grad=True)
    with fusedrnn.use_backend(backend):
        output, h_n = own(nested, hx)
    assert output.layout == torch.jagged
    assert torch.equal(output.offsets(), nested.offsets())
    grads = torch.autograd.grad(
        output.values().square().sum() + h_n.sum(), (nested, hx, *own.parameters())
    )
    leaves = [s.requires_grad_() for s in sequences]
    alone = [theirs(s, hx[:, b]) for b, s in enumerate(leaves)]
    want = torch.autograd.grad(
        sum(o.square().sum() + h.sum() for o, h in alone), (*leaves, hx, *theirs.parameters())
    )
    for got, (out, _) in zip(output.unbind(), alone, strict=True):
        torch.testing.assert_close(got, out)
    torch.testing.assert_close(h_n, torch.stack([h for _, h in alone], 1))
    for got, grad in zip((*grads[0].unbind(), *grads[1:]), want, strict=True):
        torch.testing.assert_close(got, grad)


# Forms of the arguments.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_single_step_and_sequences_without_any(cell, backend):
    module = build(cell, 1, 2)
    here = torch.tensor([1, 0, 1])
    check(module, {"lengths": here, "reset": torch.tensor([[True, True, False]])}, backend, 3, 1)
    got = check(module, {"lengths": torch.zeros(2, dtype=torch.long)}, backend, 2, 3)
    assert not got["output"].any()
    assert not got["d_weight_hh_l0"].any()
    assert got["h_n"].all()  # hx as it came


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_hx_for_all_with_lengths_packed_and_nested(backend):
    """Its gradient is the sum over the sequences."""
    module = build("lstm", 1, 2)
    one = tuple(state.requires_grad_() for state in states_for(module, 1))
    lengths = torch.tensor([2, 4, 1])
    x = torch.randn(4, 3, 3, dtype=torch.float64)
    sequences = [x[:n, b] for b, n in enumerate(lengths)]
    forms = (
        (x, {"lengths": lengths}),
        (pack_padded_sequence(x, lengths, enforce_sorted=False), {}),
        (torch.nested.nested_tensor(sequences, layout=torch.jagged), {}),
    )
    _, want = one_by_one(module, x, tuple(s.expand(-1, 3, -1) for s in one), lengths)
    want_grads = torch.autograd.grad(want[0].sum() + want[1].square().sum(), one)
    for input, options in forms:
        with fusedrnn.use_backend(backend):
            _, (h_n, c_n) = module(input, one, **options)
        torch.testing.assert_close(h_n, want[0])
        grads = torch.autograd.grad(h_n.sum() + c_n.square().sum(), one)
        for got, grad in zip(grads, want_grads, strict=True):
            assert got.shape[1] == 1
            torch.testing.assert_close(got, grad)


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.uint16, torch.int32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_of_every_integer_dtype(backend, kind):
    module = build("rnn_tanh", 1, 2)
    x = torch.randn(T, 5, 3, dtype=torch.float64)
    with fusedrnn.use_backend(backend), torch.no_grad():
        want = module(x, lengths=LENGTHS)[0]
        assert torch.equal(module(x, lengths=LENGTHS.to(kind))[0], want)


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8])
def test_narrow_lengths_of_an_input_longer_than_they_can_count(kind):
    module, x = fusedrnn.RNN(3, 5), torch.randn(300, 2, 3)
    lengths = torch.tensor([100, 3])
    assert torch.equal(module(x, lengths=lengths.to(kind))[0], module(x, lengths=lengths)[0])


def test_empty_batch_with_lengths_and_reset():
    module = build("lstm", 2, 2)
    x = torch.zeros(T, 0, 3, dtype=torch.float64)
    none = torch.zeros(T, 0, dtype=torch.bool)
    for lengths in (torch.zeros(0, dtype=torch.long), []):
        output, (h_n, _) = module(x, lengths=lengths, reset=none)
        assert output.shape == (T, 0, 10)
        assert h_n.shape == (4, 0, 5)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("hx_dtype", [torch.float32, torch.bfloat16])
def test_autocast_with_lengths_computes_in_its_dtype(cell, hx_dtype):
    module = build(cell, 2, 2, torch.float32)
    half = copy.deepcopy(module).bfloat16()
    x, hx = torch.randn(T, 5, 3), states_for(module, 5, hx_dtype)
    x = padded_with_nan(x, LENGTHS)
    with fusedrnn.use_backend("torch"):
        want, _ = half(x.bfloat16(), as_hx(tuple(s.bfloat16() for s in hx)), **KINDS["both"])
        with torch.autocast("cpu", torch.bfloat16):
            got, _ = module(x, as_hx(hx), **KINDS["both"])
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)
    got.float().sum().backward()
    for parameter in module.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


# Derivatives of second order.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", MODULES)
def test_second_derivatives_with_nan_in_the_padding(cell, backend):
    module = build(cell, 1, 2, H=3)
    x, hx = torch.randn(4, 3, 3, dtype=torch.float64), states_for(module, 3)
    lengths, reset = torch.tensor([4, 0, 2]), torch.zeros(4, 3, dtype=torch.bool)
    reset[[0, 2, 3], [2, 0, 0]] = True
    kind = {"lengths": lengths, "reset": reset}

    def second(run):
        leaves = [t.detach().requires_grad_() for t in (x, *hx)]
        output, final = run(module, leaves[0], tuple(leaves[1:]))
        final = final if isinstance(final, tuple) else (final,)
        leaves += module.parameters()
        loss = output.square().sum() + sum(f.square().sum() for f in final)
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        again = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return dict(enumerate((*first, *again)))

    assert_all_close(second(ours(backend, **kind)), second(oracle(**kind)), 1e-9)


def test_packed_second_derivatives():
    theirs, own = inputs.build("LSTM", num_layers=2, bidirectional=True)
    packed = inputs.packed(False, (2, 3, 1))
    grads = []
    for module, backend in ((theirs, "auto"), (own, "torch")):
        data = packed.data.detach().requires_grad_()
        with fusedrnn.use_backend(backend):
            output, _ = module(packed._replace(data=data))
        (first,) = torch.autograd.grad(output.data.square().sum(), data, create_graph=True)
        grads.append(torch.autograd.grad(first.square().sum(), (data, module.weight_hh_l0)))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


# What is refused.


BAD = {
    "lengths, complex": ({"lengths": LENGTHS.to(torch.complex64)}, "lengths is torch.complex64"),
    "lengths, floats in a list": ({"lengths": [1.0] * 5}, "lengths is torch.float32"),
    "lengths, 2-D": ({"lengths": LENGTHS.unsqueeze(0)}, r"lengths has shape \(1, 5\)"),
    "lengths, too many": ({"lengths": [1] * 6}, r"lengths has shape \(6,\); expected \(5,\)"),
    "reset, floats": ({"reset": RESET.double()}, "reset is torch.float64"),
    "reset, of one sequence": ({"reset": RESET[:, 0]}, r"reset has shape \(6,\); expected \(6, 5"),
    "both, the second bad": ({"lengths": LENGTHS, "reset": RESET[:2]}, r"reset has shape \(2, 5\)"),
}


@pytest.mark.parametrize("call", ["forward", "states", "explain"])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_change_nothing(case, call):
    options, message = BAD[case]
    module = fusedrnn.LSTM(3, 4, num_layers=2, dropout=0.5)
    x, hx = torch.randn(T, 5, 3), tuple(torch.randn(2, 5, 4) for _ in range(2))
    before = copy.deepcopy((x, hx, module.state_dict(), options))
    generator = torch.get_rng_state()
    run = {"forward": module, "states": module.states}.get(call)
    with pytest.raises(ValueError, match=message):
        fusedrnn.explain(module, x, hx, **options) if run is None else run(x, hx, **options)
    assert torch.equal(torch.get_rng_state(), generator)
    torch.testing.assert_close((x, hx, module.state_dict(), options), before, rtol=0, atol=0)
    module(x, hx, lengths=LENGTHS, reset=RESET)


def test_shapes_of_reset_follow_the_form_of_the_input():
    for options, input, expected in (
        ({"batch_first": True}, torch.zeros(5, T, 3), r"\(5, 6\)"),
        ({}, torch.zeros(T, 3), r"\(6,\)"),
    ):
        wrong = torch.zeros(T, 5 if input.dim() == 3 else 1, dtype=torch.bool)
        with pytest.raises(ValueError, match=rf"reset has shape \(6, .\); expected {expected}"):
            fusedrnn.GRU(3, 4, **options)(input, reset=wrong)


def test_nested_tensors_of_another_form_are_refused():
    jagged = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged)
    with pytest.raises(ValueError, match="lengths was given with an input that has lengths"):
        fusedrnn.GRU(3, 4)(jagged, lengths=torch.tensor([1, 1]))
    deeper = [torch.ones(2, 3, 3), torch.ones(1, 3, 3)]
    deeper = torch.nested.nested_tensor(deeper, layout=torch.jagged)
    with pytest.raises(ValueError, match="nested tensor with holes or of other than"):
        fusedrnn.GRU(3, 4)(deeper)


def test_a_transposed_nested_tensor_is_refused():
    """With as many rows as features its values have a shape that fits, and mean another thing."""
    jagged = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged)
    with pytest.raises(ValueError, match="nested tensor"):
        fusedrnn.GRU(3, 4)(jagged.transpose(1, 2))


@pytest.mark.parametrize("option", ["lengths", "reset"])
def test_aten_refuses_and_auto_does_not_choose_it(option):
    module, x, options = fusedrnn.LSTM(3, 4), torch.zeros(T, 5, 3), KINDS[option]
    assert fusedrnn.explain(module, x, **options).backend == "torch"
    assert "takes no lengths and no reset" in str(fusedrnn.explain(module, x, **options))
    with (
        fusedrnn.use_backend("aten"),
        pytest.raises(NotImplementedError, match=r"'aten'.*takes no lengths and no reset"),
    ):
        module(x, **options)


# Traps: what would be wrong must be found, on every route.


TRAPS = [first_step_for_all, from_the_end_of_all, padding_counts, resets_lost]


@pytest.mark.parametrize("trap", TRAPS)
def test_traps_in_the_resident_kernels_are_found(trap, monkeypatch):
    monkeypatch.setattr(layout, "origins_of", trap)
    with pytest.raises(AssertionError):
        check_budget(build("lstm", 1, 2, torch.float32), KINDS["both"], CPU)


def test_lost_resets_are_found_in_the_loop(monkeypatch):
    monkeypatch.setattr(rows_module, "origins_of", resets_lost)  # what packs lengths on the CPU
    with pytest.raises(AssertionError):
        check(build("gru", 1, 2), KINDS["both"], "torch")


@pytest.mark.parametrize("backend", BACKENDS)
def test_resets_that_cut_the_other_side_are_found(backend, monkeypatch):
    """The reverse direction zero before step t, where a sequence begins, and not before t - 1."""
    real = rows_module.origins_of

    def late(T, B, D, device, lengths=None, reset=None):
        origins = real(T, B, D, device, lengths, reset)
        begins = origins[0] == ZERO
        origins[1][origins[1] == ZERO] = PREVIOUS
        origins[1][begins & (origins[1] == PREVIOUS)] = ZERO
        return origins

    monkeypatch.setattr(layout, "origins_of", late)
    monkeypatch.setattr(rows_module, "origins_of", late)
    with pytest.raises(AssertionError):
        check(build("gru", 1, 2), KINDS["both"], backend)


def test_padding_in_the_products_is_found(monkeypatch):
    monkeypatch.setattr(stack, "without_padding", lambda x, rows: x)
    with pytest.raises(AssertionError, match="d_weight_ih"):
        check(build("rnn_tanh", 1, 1), KINDS["lengths"], "triton")


def test_states_across_a_reset_in_the_products_are_found(monkeypatch):
    """dW_hh alone would be wrong: it is made of what entered each step."""
    real = layout.Links.entering

    def blind(self, left, initial):
        before = torch.arange(1, 1 + len(left))  # of dense rows, behind initial and the row of 0
        source = torch.where(self.origins == ZERO, before, self.source)
        return real(self._replace(source=source), left, initial)

    def begins_with_something(pieces):
        return in_parts([h.masked_fill((h == 0).all(1, keepdim=True), 0.5) for h in pieces])

    in_parts = segments.in_parts
    monkeypatch.setattr(layout.Links, "entering", blind)
    monkeypatch.setattr(segments, "in_parts", begins_with_something)
    for backend in BACKENDS:
        with pytest.raises(AssertionError, match="d_weight_hh"):
            check(build("gru", 1, 1), KINDS["reset"], backend)


def test_rows_of_another_step_are_found(monkeypatch):
    def late(*args):
        rows = packed_rows(*args)
        return rows._replace(starts=torch.cat((rows.starts[:1], rows.starts[:-1])))

    theirs, own = inputs.build("GRU")
    inputs.assert_same("triton", theirs, own, inputs.packed(False, (2, 3, 1)))
    monkeypatch.setattr(layout, "packed_rows", late)
    with pytest.raises(AssertionError):
        inputs.assert_same("triton", theirs, own, inputs.packed(False, (2, 3, 1)))


def test_indices_that_are_not_applied_are_found(monkeypatch):
    theirs, own = inputs.build("GRU")
    prepare = known.prepare

    def forgetful(*args):
        call = prepare(*args)
        return call._replace(packing=call.packing._replace(unsorted_indices=None))

    monkeypatch.setattr(known, "prepare", forgetful)
    with pytest.raises(AssertionError):
        inputs.assert_same("torch", theirs, own, inputs.packed(False, (2, 3, 1)))
