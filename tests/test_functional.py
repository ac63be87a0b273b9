"""Every form of input through every backend, against torch's modules on the same weights."""

import copy
import warnings
from contextlib import contextmanager, nullcontext
from itertools import pairwise

import pairs
import pytest
import torch
from pairs import B, H, I, T, assert_close, assert_same, batch, build, leaves, packed, states_for
from torch.nn.utils.rnn import pad_sequence

import fusedrnn
from fusedrnn import arguments, functional
from fusedrnn.kernels.problem import forget

BACKENDS = ("aten", "torch")
STACKS = {
    "one layer": {},
    "bidirectional": {"num_layers": 2, "bidirectional": True, "bias": False},
    "batch first": {"batch_first": True, "num_layers": 2},
}
backends = pytest.mark.parametrize("backend", BACKENDS)
stacks = pytest.mark.parametrize("stack", STACKS)
names = pytest.mark.parametrize("name", [*pairs.NAMES, "RNN relu"])


@backends
@stacks
@names
def test_dense_unbatched_and_empty_input(backend, stack, name):
    theirs, ours = build(name, **STACKS[stack])
    shape, empty = ((B, T), (0, T)) if theirs.batch_first else ((T, B), (T, 0))
    x, one, none = (torch.randn(*size, I, dtype=torch.float64) for size in (shape, (T,), empty))
    assert_same(backend, theirs, ours, none)
    for hx, alone in ((None, None), (states_for(ours, B), states_for(ours))):
        assert_same(backend, theirs, ours, x, hx)
        assert_same(backend, theirs, ours, one, alone)


@backends
@stacks
@names
def test_packed_input(backend, stack, name):
    theirs, ours = build(name, **STACKS[stack])
    for enforce_sorted in (False, True):
        input = packed(enforce_sorted)
        assert_same(backend, theirs, ours, input)
        assert_same(backend, theirs, ours, input, states_for(ours, 3))
        with fusedrnn.use_backend(backend):
            output, _ = ours(input)
        assert output.batch_sizes is input.batch_sizes
        assert output.sorted_indices is input.sorted_indices
        assert output.unsorted_indices is input.unsorted_indices


@pytest.mark.parametrize("name", pairs.NAMES)
def test_jagged_input_is_that_with_lengths(name):
    _, ours = build(name, num_layers=2, bidirectional=True)
    sequences = [torch.randn(n, I, dtype=torch.float64) for n in (2, 4, 1)]
    hx = states_for(ours, 3)
    output, states = ours(torch.nested.nested_tensor(sequences, layout=torch.jagged), hx)
    assert output.is_nested
    want, finals = ours(pad_sequence(sequences), hx, lengths=[2, 4, 1])
    assert_close(output.unbind(), [want[: len(s), i] for i, s in enumerate(sequences)])
    assert_close(states, finals)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@backends
def test_projection(backend, bias):
    """By torch's operator, or by the reference."""
    theirs, ours = build("LSTM", num_layers=2, bidirectional=True, proj_size=2, bias=bias)
    for input in (packed(), batch()):
        assert_same(backend, theirs, ours, input)
        assert_same(backend, theirs, ours, input, states_for(ours, 3))


FUNCTIONS = [
    (fusedrnn.lstm, fusedrnn.LSTM, {}),
    (fusedrnn.gru, fusedrnn.GRU, {}),
    (fusedrnn.gru, fusedrnn.GRU, {"reset_after": False}),
    (fusedrnn.rnn, fusedrnn.RNN, {"nonlinearity": "relu"}),
]


@pytest.mark.parametrize(("function", "kind", "equations"), FUNCTIONS)
def test_functions_are_the_modules(function, kind, equations):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False}
    module, x = kind(I, H, **options, **equations), torch.randn(B, T, I)
    got = function(x, None, list(module.parameters()), **options, **equations)
    assert all(map(torch.equal, leaves(got), leaves(module(x))))


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", [*pairs.CELLS, "RNNCell relu"])
def test_cells(backend, bias, name):
    theirs, ours = build(name, bias=bias)
    for size in ((6,), (0,), ()):
        x, h, c = (torch.randn(*size, n, dtype=torch.float64) for n in (I, H, H))
        for hx in (None, (h, c) if name == "LSTMCell" else h):
            assert_same("torch" if backend == "auto" else backend, theirs, ours, x, hx)
            if backend == "auto":
                assert all(map(torch.equal, pairs.run(ours, x, hx), pairs.run(theirs, x, hx)))


def test_the_older_gru_cell_is_one_step_of_the_gru():
    gru, cell = fusedrnn.GRU(I, H, reset_after=False), fusedrnn.GRUCell(I, H, reset_after=False)
    cell.load_state_dict({n.removesuffix("_l0"): p for n, p in gru.state_dict().items()})
    x, h = torch.randn(6, I), torch.randn(6, H)
    assert torch.equal(cell(x, h), gru(x.unsqueeze(0), h.unsqueeze(0))[0][0])


def cudnn(op):
    """torch's operator on the CPU with the checks and the warning of cuDNN's."""

    def run(*args):
        packed = args[1].dtype == torch.long if isinstance(args[1], torch.Tensor) else False
        hx, is_training = args[1 + packed], args[6 + packed]
        assert all(state.is_contiguous() for state in leaves(hx)), "rnn: hx is not contiguous"
        warnings.warn("RNN module weights are not part of single contiguous chunk", stacklevel=2)
        results = op(*args)
        if results[0].requires_grad:
            results[0].register_hook(lambda grad: check(is_training))
        return results

    def check(is_training):
        assert is_training, "cudnn RNN backward can only be called in training mode"

    return run


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("name", pairs.NAMES)
def test_promises_are_kept_on_cudnn(name, is_packed, monkeypatch):
    """hx given once for all sequences, backward in eval(), and no advice about flat weights."""
    theirs, ours = build(name, num_layers=2, dropout=0.5)
    theirs.eval(), ours.eval()
    input, hx = packed() if is_packed else batch(), states_for(ours, 1)
    spread = tuple(state.expand(-1, B, -1).contiguous() for state in leaves(hx))
    want = pairs.run(theirs, input, spread if len(spread) == 2 else spread[0])
    ops = {key: cudnn(op) for key, op in functional.ATEN.items()}
    monkeypatch.setattr(functional, "ATEN", ops)
    with fusedrnn.use_backend("aten"):
        got = pairs.run(ours, input, hx)
    states = slice(len(leaves(hx)) + 2, 2 * len(leaves(hx)) + 2)  # their gradients are sums
    assert_close(got[: states.start], want[: states.start], 0)
    assert_close(got[states], [grad.sum(1, keepdim=True) for grad in want[states]])
    assert_close(got[states.stop :], want[states.stop :], 0)


@contextmanager
def flattening():
    """torch's flatten_parameters() with a CPU in place of the GPU and of cuDNN."""

    def flatten(weights, *_):
        buffer = torch.cat([weight.flatten() for weight in weights])
        for weight, part in zip(weights, buffer.split([w.numel() for w in weights]), strict=True):
            weight.set_(part.view_as(weight))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_cudnn_rnn_flatten_weight", flatten)
        patch.setattr(torch, "_use_cudnn_rnn_flatten_weight", lambda: True)
        patch.setattr(torch.backends.cudnn, "is_acceptable", lambda _: True)
        patch.setattr(torch.backends.cudnn.rnn, "get_cudnn_mode", lambda _: 0)
        patch.setattr(torch.cuda, "device_of", lambda _: nullcontext())
        patch.setattr(torch.Tensor, "is_cuda", True)
        yield


CHANGES = {
    "made": lambda module: module,
    "moved": lambda module: module.double(),
    "copied": copy.deepcopy,
    "torch's": lambda _: fusedrnn.replace_modules(torch.nn.LSTM(I, H, 2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_cudnn_gets_the_weights_as_one_buffer(change, monkeypatch):
    """Else it copies all of them at every call."""
    with flattening():
        module = CHANGES[change](fusedrnn.LSTM(I, H, 2))
    places, x = [], torch.randn(T, B, I, dtype=module.weight_hh_l0.dtype)

    def recording(input, hx, params, *flags):
        places.extend((p.data_ptr(), p.data_ptr() + p.nbytes) for p in params)
        return op(input, hx, params, *flags)

    op = functional.ATEN["lstm"]
    monkeypatch.setitem(functional.ATEN, "lstm", recording)
    module(x)
    assert len(places) == 8
    assert all(a[1] == b[0] for a, b in pairwise(places))


def test_computed_weights_are_neither_flattened_nor_computed_for_it():
    """The power iteration of spectral_norm would go on."""
    module = torch.nn.utils.parametrizations.spectral_norm(fusedrnn.LSTM(I, H), "weight_hh_l0")
    before = copy.deepcopy(module.state_dict())
    with flattening():
        module.to(torch.float32).flatten_parameters()
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    module(batch().float())[0].sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_a_known_kind_of_call_skips_the_checks_and_no_other_does(monkeypatch):
    module, x = fusedrnn.LSTM(3, 4, batch_first=True), torch.randn(2, 5, 3)
    first = module(x)

    def checked(*arguments):
        raise AssertionError("checked")

    monkeypatch.setattr(arguments, "_sizes", checked)
    torch.testing.assert_close(module(x), first, rtol=0, atol=0)
    for other in (x[:1], x.double(), x[:, :, :2]):
        with pytest.raises(AssertionError, match="checked"):
            module(other)
    module.weight_hh_l0 = torch.nn.Parameter(torch.ones(1, 4))
    with pytest.raises(AssertionError, match="checked"):
        module(x)


def test_settings_and_modes_make_another_kind_of_call(monkeypatch):
    module, x, ran, run = fusedrnn.GRU(3, 4), torch.randn(12, 2, 3), [], functional.rnn_stack

    def running(inputs, sequences, config, dtype, kind):
        if kind is not None:
            ran.append((config.backend, kind.facts.needs_grad, dtype))
        return run(inputs, sequences, config, dtype, kind=kind)

    monkeypatch.setattr(functional, "rnn_stack", running)
    for _ in range(2):
        module(x)
        with torch.no_grad():
            module(x)
            with fusedrnn.use_backend("torch"):
                module(x)
                for half in (torch.bfloat16, torch.float16):
                    with torch.autocast("cpu", half):
                        assert module(x)[0].dtype == half
        with torch.profiler.profile():
            module(x)
    half = [("torch", False, dtype) for dtype in (torch.bfloat16, torch.float16)]
    assert ran == [("torch", True, None), ("torch", False, None), *half] * 2


CHANGES_OF_WEIGHTS = {
    "replaced": lambda m: setattr(m, "weight_hh_l0", torch.nn.Parameter(m.weight_hh_l0 + 1)),
    "data": lambda m: setattr(m.weight_hh_l0, "data", torch.randn(2, 4 * H, H)[1]),
    "in place": lambda m: m.weight_hh_l0.data.mul_(2),
    "cast": lambda m: m.double(),
}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("change", CHANGES_OF_WEIGHTS)
def test_what_a_kind_of_call_keeps_follows_the_weights(change, backend):
    module, x, found = fusedrnn.LSTM(I, H), batch(), []
    with fusedrnn.use_backend(backend):
        # The first call is not yet on the road of those after it.
        for act in (id, CHANGES_OF_WEIGHTS[change], lambda _: forget(), id):
            loss = module(x.to(module.weight_hh_l0.dtype))[0].sum()
            found.append([loss, *torch.autograd.grad(loss, list(module.parameters()))])
            act(module)
    assert_close(found[2], found[3], 0)
    assert not torch.equal(found[1][0], found[2][0])


def test_forgotten_decisions_leave_no_launch_behind():
    """Not in a graph that waits for its backward either, which has them from its kind."""
    module, x = fusedrnn.LSTM(I, H), batch().float()
    arguments.KINDS.clear()
    with fusedrnn.use_backend("triton"):
        loss = module(x)[0].sum()
        (kind,) = arguments.KINDS.values()
        assert kind.launches
        forget()
        assert not [*kind.launches, *arguments.KINDS]
        loss.backward()
