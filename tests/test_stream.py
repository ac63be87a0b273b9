"""Tests of ``module.stream()``: steps equal the module, and the state can be changed."""

import copy

import pytest
import torch
from pairs import assert_close, leaves, states_for
from torch import nn
from torch.nn.utils import parametrizations, prune

import fusedrnn
from fusedrnn import Stream

T, B, I, H = 9, 3, 5, 6
MODULES = {
    "lstm-3": ("LSTM", {"num_layers": 3}),
    "lstm-proj": ("LSTM", {"proj_size": 4, "num_layers": 3}),
    "lstm-no-bias": ("LSTM", {"bias": False, "batch_first": True}),
    "gru": ("GRU", {"num_layers": 2}),
    "gru-reset-before": ("GRU", {"num_layers": 2, "reset_after": False}),
    "rnn-relu": ("RNN", {"num_layers": 3, "nonlinearity": "relu"}),
}


def make(name, dtype=torch.float64, **options):
    kind, kwargs = MODULES[name]
    return getattr(fusedrnn, kind)(I, H, dtype=dtype, **kwargs | options)


def sequence(dtype=torch.float64):
    return torch.randn(T, B, I, dtype=dtype)


@torch.no_grad()
def whole(module, inputs, hx=None):
    """Returns the output ``[T, B, H]`` and the final state of one call in eval()."""
    twin = copy.deepcopy(module).eval()
    output, final = twin(inputs.transpose(0, 1) if twin.batch_first else inputs, hx)
    return (output.transpose(0, 1) if twin.batch_first else output), final


def streamed(stream, inputs):
    return torch.stack([stream(x) for x in inputs])


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("backend", ["auto", "torch", "aten", "triton"])
def test_steps_equal_one_call_over_the_sequence(name, backend):
    dtype, T, tolerance = torch.float64, 9, 1e-12
    if backend == "triton":
        dtype, T, tolerance = torch.float32, 2, 1e-5
    module, inputs = make(name, dtype), sequence(dtype)[:T]
    hx = states_for(module, B)
    stream, refused = Stream(module, B, hx), {"aten": "gru-reset-before", "triton": "lstm-proj"}
    with fusedrnn.use_backend(backend):
        if refused.get(backend) == name:
            with pytest.raises(NotImplementedError):
                stream(inputs[0])
            assert_close(stream.state, hx, 0)
            return
        outputs = streamed(stream, inputs)
    expected, final = whole(module, inputs, hx)
    assert_close(outputs, expected, tolerance)
    assert_close(stream.state, final, tolerance)


@pytest.mark.parametrize("name", ["lstm-3", "gru", "gru-reset-before"])
def test_autocast_is_that_of_the_module(name):
    """The state keeps the dtype of the weights."""
    module, inputs = make(name, torch.float32), sequence(torch.float32)
    stream, carried, expected = Stream(module, B), None, []
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        outputs = streamed(stream, inputs)
        for x in inputs:
            output, carried = module(x.unsqueeze(0), carried)
            expected.append(output[0])
        with pytest.raises(ValueError, match=r"input is torch\.int64"):
            stream(torch.zeros(B, I, dtype=torch.int64))
    torch.testing.assert_close(outputs, torch.stack(expected), rtol=0, atol=0)
    assert {s.dtype for s in leaves(stream.state)} == {torch.float32}


def test_no_dropout_and_no_history_in_training():
    module, inputs = make("lstm-3", dropout=0.9), sequence().requires_grad_()
    stream = Stream(module, B, tuple(s.requires_grad_() for s in states_for(module, B)))
    state = stream.state
    outputs = streamed(stream, inputs)
    assert_close(outputs, whole(module, inputs, state)[0])
    assert outputs.requires_grad is stream.state[0].requires_grad is False
    assert torch.is_grad_enabled()


def test_inference_mode_may_come_and_go():
    module, inputs = make("lstm-3"), sequence()
    with torch.inference_mode():
        stream, outputs = Stream(module, B), []
    for t, x in enumerate(inputs):
        with torch.inference_mode(t % 2 == 0):
            outputs.append(stream(x).clone())
            stream.state = stream.state
            stream.reset(torch.zeros(B, dtype=torch.bool))
    assert_close(torch.stack([o.clone() for o in outputs]), whole(module, inputs)[0])


@pytest.mark.parametrize("name", ["lstm-3", "gru-reset-before"])
def test_weights_are_those_of_the_module_at_each_call(name):
    """Follows weights that an optimizer changes, that are replaced, and cast."""
    module, inputs = make(name), sequence()
    stream, hx = Stream(module, B), None

    def follows(part, tolerance=1e-12):
        nonlocal hx
        expected, hx = whole(module, part, hx)
        assert_close(streamed(stream, part), expected, tolerance)

    follows(inputs[:2])
    module(inputs.transpose(0, 1) if module.batch_first else inputs)[0].sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.5).step()
    follows(inputs[2:4])
    module.weight_hh_l0 = nn.Parameter(torch.randn_like(module.weight_hh_l0))
    follows(inputs[4:8])
    module.float()
    hx = tuple(s.float() for s in hx) if isinstance(hx, tuple) else hx.float()
    follows(inputs[8:].float(), 1e-5)


@pytest.mark.parametrize("change", [parametrizations.weight_norm, prune.random_unstructured])
def test_computed_weights_are_computed_at_each_call(change):
    module, inputs = make("lstm-3"), sequence()
    change(module, "weight_hh_l0", 0.5 if change is prune.random_unstructured else 0)
    stream, seen = Stream(module, B), []
    module.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.5)
    assert_close(streamed(stream, inputs), whole(module, inputs)[0])
    assert seen[:T] == [{}] * T


@pytest.mark.parametrize("name", ["lstm-3", "rnn-relu"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_state_and_output_are_copies(name, backend):
    module, inputs = make(name), sequence()
    hx, outputs = states_for(module, B), []
    expected, _ = whole(module, inputs, hx)
    stream = Stream(module, B, hx)
    with fusedrnn.use_backend(backend):
        for x in inputs:
            for given in leaves(hx):
                given.fill_(float("nan"))
            output = stream(x)
            outputs.append(output.clone())
            output.fill_(float("nan"))
            hx = stream.state
            stream.state = hx
    assert_close(torch.stack(outputs), expected)


@pytest.mark.parametrize(
    "rows",
    [None, torch.tensor([True, False, True]), torch.tensor([2, 0]).int()],
    ids=["all", "mask", "indices"],
)
def test_reset_rows_start_afresh(rows):
    """Resets also NaN; the other rows go on."""
    module, inputs = make("lstm-3"), sequence()
    stream, chosen = Stream(module, B), [0, 1, 2] if rows is None else [0, 2]
    inputs[1, 0] = float("nan")
    streamed(stream, inputs[:4])
    before = stream.state
    stream.reset(rows)
    outputs = streamed(stream, inputs[4:])
    assert_close(outputs[:, chosen], whole(module, inputs[4:])[0][:, chosen])
    if rows is not None:
        assert_close(outputs[:, 1], whole(module, inputs[4:], before)[0][:, 1])


def test_wrong_arguments_of_the_constructor():
    with pytest.raises(ValueError, match="the module is bidirectional; a stream cannot run it"):
        Stream(fusedrnn.LSTM(I, H, bidirectional=True))
    for size in (0, -1, 2.0, True, None):
        with pytest.raises(ValueError, match="expected a positive integer"):
            Stream(make("gru"), size)
    assert repr(Stream(make("gru"), 2)) == "Stream(GRU(5, 6, num_layers=2), batch_size=2)"


zeros = torch.zeros
CALL, STATE, RESET = Stream.__call__, Stream.state.fset, Stream.reset
WRONG = {
    "a list": (CALL, [1.0], AttributeError, "input is a list; expected a tensor"),
    "1-D": (CALL, zeros(I).double(), ValueError, r"float64 \[5\] .* expected .* \[3, 5\]"),
    "dtype": (CALL, zeros(B, I), ValueError, r"input is torch.float32 .* expected torch.float64"),
    "features": (CALL, zeros(B, 7).double(), RuntimeError, r"\[3, 7\] .* expected .* \[3, 5\]"),
    "batch": (CALL, zeros(1, I).double(), RuntimeError, r"\[1, 5\] .* expected .* \[3, 5\]"),
    "device": (CALL, zeros(B, I, device="meta").double(), RuntimeError, "on meta; expected .* cpu"),
    "no state": (STATE, None, TypeError, r"use reset\(\)"),
    "state's dtype": (STATE, (zeros(3, B, H),) * 2, RuntimeError, r"hx\[0\] is torch.float32"),
    "rows": (RESET, [0], TypeError, "rows is list; expected a tensor"),
    "float rows": (RESET, torch.tensor([0.0]), TypeError, "rows is torch.float32"),
    "mask": (RESET, torch.tensor([True]), ValueError, r"rows has shape \[1\]; expected \[3\]"),
    "index": (RESET, torch.tensor([3]), IndexError, "3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_raise_one_sentence_and_leave_the_state(case):
    method, argument, error, sentence = WRONG[case]
    stream = Stream(make("lstm-3"), B)
    stream(sequence()[0])
    kept = stream.state
    with pytest.raises(error, match=sentence) as caught:
        method(stream, argument)
    assert "\n" not in str(caught.value)
    assert_close(stream.state, kept, 0)
