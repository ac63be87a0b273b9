"""Streams: every step is the module's own, the state is the user's to read, set and reset.

The CUDA graph runs here with a stand-in, which records operations and replays them on the tensors
it recorded, as a graph does: what is not copied into its buffers is not seen.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

import fusedrnn
from fusedrnn import streaming
from fusedrnn.streaming import Stream

# torch's, once a process, when the module itself runs a projection in fp32.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")

T, B, I, H = 9, 3, 5, 6

MODULES = {
    "lstm": ("LSTM", {}),
    "lstm-3": ("LSTM", {"num_layers": 3}),
    "lstm-proj": ("LSTM", {"proj_size": 4, "num_layers": 3}),
    "lstm-proj-no-bias": ("LSTM", {"proj_size": 4, "num_layers": 2, "bias": False}),
    "lstm-no-bias": ("LSTM", {"bias": False, "num_layers": 2}),
    "lstm-batch-first": ("LSTM", {"batch_first": True}),
    "gru": ("GRU", {"num_layers": 2}),
    "gru-no-bias": ("GRU", {"num_layers": 2, "bias": False}),
    "gru-reset-before": ("GRU", {"num_layers": 2, "reset_after": False}),
    "rnn": ("RNN", {"num_layers": 2}),
    "rnn-relu": ("RNN", {"num_layers": 3, "nonlinearity": "relu"}),
}
every_module = pytest.mark.parametrize("name", MODULES)


def make(name: str, dtype: torch.dtype = torch.float64, **options) -> nn.RNNBase:
    cls, kwargs = MODULES[name]
    return getattr(fusedrnn, cls)(I, H, dtype=dtype, **kwargs | options)


def sequence(dtype: torch.dtype = torch.float64, batch: int = B, steps: int = T) -> torch.Tensor:
    return torch.randn(steps, batch, I, dtype=dtype)


def some_state(module: nn.RNNBase, batch: int = B):
    dtype, L = module.weight_ih_l0.dtype, module.num_layers
    sizes = [module.proj_size or H, H] if module.mode == "LSTM" else [H]
    states = [torch.randn(L, batch, size, dtype=dtype) for size in sizes]
    return states[0] if len(states) == 1 else tuple(states)


@torch.no_grad()
def whole(module: nn.RNNBase, inputs: torch.Tensor, hx=None):
    """One call over ``[T, B, I]`` in eval(); output ``[T, B, P]`` and the state after."""
    training = module.training
    module.eval()
    output, final = module(inputs.transpose(0, 1) if module.batch_first else inputs, hx)
    module.train(training)
    return (output.transpose(0, 1) if module.batch_first else output), final


def streamed(stream: Stream, inputs: torch.Tensor) -> torch.Tensor:
    return torch.stack([stream(x) for x in inputs])


def assert_same(got, expected, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# Equality


@every_module
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
def test_steps_are_one_run_over_the_sequence(name, given):
    module, inputs = make(name), sequence()
    hx = some_state(module) if given else None
    stream = Stream(module, B, hx)
    outputs, (expected, final) = streamed(stream, inputs), whole(module, inputs, hx)
    assert_same(outputs, expected)
    assert_same(stream.state, final)


@every_module
@pytest.mark.parametrize("backend", ["torch", "aten", "triton"])
def test_a_named_backend_runs(name, backend, monkeypatch):
    """aten refuses what torch has no operator for; triton runs in the interpreter."""
    if backend == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    module = make(name, torch.float32)
    inputs = sequence(torch.float32, steps=2)
    stream = Stream(module, B)
    with fusedrnn.use_backend(backend):
        if backend == "aten" and name == "gru-reset-before":
            with pytest.raises(NotImplementedError, match="torch has no operator"):
                stream(inputs[0])
            return
        outputs = streamed(stream, inputs)
    assert_same(outputs, whole(module, inputs)[0], 1e-5)


@pytest.mark.parametrize("backend", ["auto", "torch", "aten"])
def test_the_backend_is_the_one_that_is_asked_for_at_the_call(backend, monkeypatch):
    ran = []
    for name in ("_cell_by_cell", "_by_reference"):
        original = getattr(streaming, name)
        monkeypatch.setattr(
            streaming, name, lambda *a, n=name, f=original: (ran.append(n), f(*a))[1]
        )
    stream = Stream(make("lstm"), B)
    stream(sequence()[0])
    monkeypatch.setenv("FUSEDRNN_BACKEND", backend)
    stream(sequence()[0])
    second = "_by_reference" if backend == "torch" else "_cell_by_cell"
    assert ran == ["_cell_by_cell", second]


def test_a_large_batch_goes_to_the_fused_operator(monkeypatch):
    """Beyond 64 sequences oneDNN's LSTM is the faster one; the results stay."""
    module, inputs = make("lstm-3", torch.float32), sequence(torch.float32, batch=65)
    stream = Stream(module, 65)
    monkeypatch.setattr(streaming, "_cell_by_cell", None)
    assert_same(streamed(stream, inputs), whole(module, inputs)[0], 1e-5)
    with pytest.raises(TypeError, match="NoneType"):  # the single-step operators
        Stream(module, 64)(inputs[0, :64])


@pytest.mark.parametrize("name", ["lstm-3", "gru", "gru-reset-before"])
def test_autocast_is_the_modules_own(name):
    """The state stays in the weights' dtype, which loses nothing."""
    module, inputs = make(name, torch.float32), sequence(torch.float32)
    stream = Stream(module, B)
    carried, expected = None, []
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        outputs = streamed(stream, inputs)
        for x in inputs:
            output, carried = module(x.unsqueeze(0), carried)
            expected.append(output[0])
    assert outputs.dtype == expected[0].dtype
    torch.testing.assert_close(outputs, torch.stack(expected), rtol=0, atol=0)
    states = stream.state if isinstance(stream.state, tuple) else (stream.state,)
    assert {s.dtype for s in states} == {torch.float32}


@every_module
def test_no_dropout_whatever_training_says(name):
    module, inputs = make(name, dropout=0.0), sequence()
    module.dropout = 0.9
    module.train()
    assert_same(streamed(Stream(module, B), inputs), whole(module, inputs)[0])
    with fusedrnn.use_backend("torch"):
        assert_same(streamed(Stream(module, B), inputs), whole(module, inputs)[0])
    with torch.autocast("cpu", torch.bfloat16):
        cast = make(name, torch.float32, dropout=0.0)
        once = streamed(Stream(cast, B), inputs.float())
        cast.dropout = 0.9
        assert torch.equal(streamed(Stream(cast.train(), B), inputs.float()), once)


def test_nothing_has_a_history():
    module = make("gru")
    hx = some_state(module).requires_grad_()
    stream = Stream(module, B, hx)
    output = stream(sequence()[0].requires_grad_())
    assert not output.requires_grad
    assert not stream.state.requires_grad
    assert torch.is_grad_enabled()


def test_inference_mode_may_come_and_go():
    module, inputs = make("lstm-3"), sequence()
    stream = Stream(module, B)
    outputs = []
    for t, x in enumerate(inputs):
        with torch.inference_mode(t % 2 == 0):
            outputs.append(stream(x).clone())
            if t == 3:
                stream.state = stream.state
            stream.reset(torch.zeros(B, dtype=torch.bool))
    assert_same(torch.stack([o.clone() for o in outputs]), whole(module, inputs)[0])


# Weights


@every_module
def test_weights_are_the_modules_at_each_call(name):
    """Written in place by an optimizer, loaded, and replaced: each time a new truth."""
    module, inputs = make(name), sequence()
    stream, hx = Stream(module, B), None

    def follows(part):
        nonlocal hx
        expected, hx = whole(module, part, hx)
        assert_same(streamed(stream, part), expected)

    follows(inputs[:2])
    module(inputs)[0].sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.5).step()
    follows(inputs[2:4])
    module.load_state_dict(make(name).state_dict())
    follows(inputs[4:6])
    module.weight_hh_l0 = nn.Parameter(torch.randn_like(module.weight_hh_l0))
    follows(inputs[6:])


def weight_norm(module):
    return parametrizations.weight_norm(module, "weight_hh_l0")


def pruned(module):
    return prune.l1_unstructured(module, "weight_hh_l0", 0.5)


@pytest.mark.parametrize("change", [weight_norm, pruned], ids=["weight_norm", "pruned"])
def test_computed_weights_are_computed_at_each_call(change):
    module, inputs = make("lstm-3"), sequence()
    change(module)
    stream = Stream(module, B)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.5)
    outputs = streamed(stream, inputs)
    assert_same(outputs, whole(module, inputs)[0])


def test_a_hook_with_keywords_is_called_with_them():
    module, seen = make("gru"), []
    module.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    x = sequence()[0]
    Stream(module, B)(x)
    assert seen == [((x,), {})]


def test_the_state_follows_a_module_that_is_cast():
    module, inputs = make("gru"), sequence()
    stream = Stream(module, B)
    stream(inputs[0])
    before = stream.state
    module.float()
    expected, _ = whole(module, inputs[1:2].float(), before.float())
    assert_same(stream(inputs[1].float()), expected[0], 1e-5)
    assert stream.state.dtype == torch.float32


# The state


@every_module
def test_state_round_trip(name):
    module, inputs = make(name), sequence()
    stream = Stream(module, B)
    streamed(stream, inputs[:4])
    kept = stream.state
    first = streamed(stream, inputs[4:])
    stream.state = kept
    assert_same(streamed(stream, inputs[4:]), first, 0)
    other = Stream(module, B, kept)
    assert_same(streamed(other, inputs[4:]), first, 0)


@every_module
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_state_and_output_are_copies(name, backend):
    """Whoever writes into what he got, or into what he gave, writes into nothing of ours."""
    module, inputs = make(name), sequence()
    hx = some_state(module)
    expected, _ = whole(module, inputs, hx)
    stream = Stream(module, B, hx)
    outputs = []
    with fusedrnn.use_backend(backend):
        for x in inputs:
            for given in [hx] if isinstance(hx, torch.Tensor) else hx:
                given.fill_(float("nan"))
            output = stream(x)
            outputs.append(output.clone())
            output.fill_(float("nan"))
            hx = stream.state
            stream.state = hx
    assert_same(torch.stack(outputs), expected)


@every_module
@pytest.mark.parametrize("kind", ["mask", "indices", "int32", "all"])
def test_reset_rows_start_afresh(name, kind):
    """Also out of NaN; the others go on as if nothing had happened."""
    module, inputs = make(name), sequence()
    rows = {
        "mask": torch.tensor([True, False, True]),
        "indices": torch.tensor([0, 2]),
        "int32": torch.tensor([2, 0], dtype=torch.int32),
        "all": None,
    }[kind]
    stream = Stream(module, B)
    inputs[1, 0] = float("nan")
    streamed(stream, inputs[:4])
    before = stream.state
    stream.reset(rows)
    outputs = streamed(stream, inputs[4:])
    fresh, _ = whole(module, inputs[4:])
    went_on, _ = whole(module, inputs[4:], before)
    chosen = [0, 1, 2] if rows is None else [0, 2]
    assert_same(outputs[:, chosen], fresh[:, chosen])
    if rows is not None:
        assert_same(outputs[:, 1], went_on[:, 1])
        assert not torch.equal(fresh[:, 1], went_on[:, 1])


def test_one_state_for_all_sequences():
    module, inputs = make("lstm-3"), sequence()
    hx = some_state(module, batch=1)
    expected, _ = whole(module, inputs, tuple(s.expand(-1, B, -1).contiguous() for s in hx))
    assert_same(streamed(Stream(module, B, hx), inputs), expected)


# Errors


def test_both_directions_are_refused():
    module = fusedrnn.LSTM(I, H, bidirectional=True)
    with pytest.raises(ValueError, match="the module is bidirectional; a stream cannot run it"):
        Stream(module)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, None])
def test_batch_sizes(size):
    with pytest.raises(ValueError, match="expected a positive integer"):
        Stream(make("gru"), size)


zeros = torch.zeros
BAD_INPUT = {
    "a list": ([1.0], AttributeError, "input is a list; expected a tensor"),
    "1-D": (zeros(I), ValueError, "input is 1-D; expected 2-D"),
    "3-D": (zeros(1, B, I), ValueError, "input is 3-D; expected 2-D"),
    "dtype": (zeros(B, I), ValueError, "input is torch.float32, the weights are torch.float64"),
    "integer": (zeros(B, I, dtype=torch.int64), ValueError, "input is torch.int64, the weights"),
    "features": (zeros(B, 7).double(), RuntimeError, "7 features .* expected input_size, 5"),
    "batch": (zeros(1, I).double(), RuntimeError, "input has a batch of 1; expected 3"),
    "device": (zeros(B, I, device="meta").double(), RuntimeError, "input is on meta; expected cpu"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence_and_costs_no_state(case):
    """The exception types are the module's own, which the same input gets there."""
    bad, error, sentence = BAD_INPUT[case]
    module, inputs = make("lstm-3"), sequence()
    stream = Stream(module, B)
    stream(inputs[0])
    kept = stream.state
    with pytest.raises(error, match=sentence) as caught:
        stream(bad)
    assert "\n" not in str(caught.value)
    assert_same(stream.state, kept, 0)
    if case not in ("1-D", "3-D"):  # a sequence without a batch; too many dimensions for unsqueeze
        as_sequence = bad.unsqueeze(0) if isinstance(bad, torch.Tensor) else bad
        with pytest.raises(error):
            module(as_sequence, kept)


def test_autocast_takes_floats_of_any_kind_and_nothing_else():
    stream = Stream(make("lstm", torch.float32), B)
    with torch.autocast("cpu", torch.bfloat16):
        assert stream(zeros(B, I, dtype=torch.bfloat16)).shape == (B, H)
        with pytest.raises(ValueError, match=r"input is torch\.int64"):
            stream(zeros(B, I, dtype=torch.int64))


def test_a_backend_that_refuses_costs_no_state(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    stream = Stream(make("lstm"), B)
    stream(sequence()[0])
    kept = stream.state
    with fusedrnn.use_backend("triton"), pytest.raises(NotImplementedError, match="need CUDA"):
        stream(sequence()[1])
    assert_same(stream.state, kept, 0)


BAD_STATES = {
    "batch": (lambda: (zeros(3, 2, H).double(),) * 2, RuntimeError, r"expected \(3, 3, 6\)"),
    "unbatched": (lambda: (zeros(3, H).double(),) * 2, RuntimeError, r"expected \(3, 3, 6\)"),
    "dtype": (lambda: (zeros(3, B, H),) * 2, RuntimeError, r"hx\[0\] is torch.float32"),
    "one tensor": (lambda: zeros(3, B, H).double(), RuntimeError, "expected a tuple of two"),
    "a list of one": (lambda: [zeros(3, B, H).double()], IndexError, "expected a tuple of two"),
    "second only": (
        lambda: (zeros(3, B, H).double(), zeros(3, B, 7).double()),
        RuntimeError,
        r"hx\[1\] has shape",
    ),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_bad_states_are_the_modules_errors(case):
    bad, error, sentence = BAD_STATES[case]
    module = make("lstm-3")
    with pytest.raises(error, match=sentence):
        Stream(module, B, bad())
    stream = Stream(module, B)
    stream(sequence()[0])
    kept = stream.state
    with pytest.raises(error, match=sentence):
        stream.state = bad()
    assert_same(stream.state, kept, 0)


def test_no_state_is_not_a_reset():
    with pytest.raises(TypeError, match=r"use reset\(\)"):
        Stream(make("gru"), B).state = None


@pytest.mark.parametrize(
    ("rows", "error", "sentence"),
    [
        ([0], TypeError, "rows is list; expected a tensor"),
        (torch.tensor([0.0]), TypeError, "rows is torch.float32"),
        (torch.tensor([True]), ValueError, r"rows has shape \[1\]; expected \[3\]"),
        (torch.tensor(0), ValueError, "expected 1-D indices"),
        (torch.tensor([3]), IndexError, "3"),
    ],
)
def test_bad_rows(rows, error, sentence):
    stream = Stream(make("lstm"), B)
    stream(sequence()[0])
    kept = stream.state
    with pytest.raises(error, match=sentence):
        stream.reset(rows)
    assert_same(stream.state, kept, 0)


def test_it_says_what_it_is():
    assert repr(Stream(make("gru"), 2)) == "Stream(GRU(5, 6, num_layers=2), batch_size=2)"


# The graph, with a stand-in for CUDA's


class Recorder(TorchDispatchMode):
    """Records operations as a capture does: nothing that existed before is written."""

    def __init__(self, graph: StandInGraph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = args[0] if func._schema.is_mutable else func(*args, **kwargs)
        self.graph.operations.append((func, args, kwargs, result))
        return result


class StandInGraph:
    """What torch.cuda.CUDAGraph does, on the CPU: replays on the tensors that it recorded."""

    made = 0

    def __init__(self):
        type(self).made += 1
        self.operations = []

    def replay(self):
        for func, args, kwargs, result in self.operations:
            if func._schema.is_mutable:
                func(*args, **kwargs)
                continue
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(t)]
            inside = {t.untyped_storage().data_ptr() for t in tensors}
            again = func(*args, **kwargs)
            pairs = zip(
                torch.utils._pytree.tree_leaves(result),
                torch.utils._pytree.tree_leaves(again),
                strict=True,
            )
            for old, new in pairs:
                if not torch.is_tensor(old):
                    continue
                if old.untyped_storage().data_ptr() not in inside:  # else a view, which has it
                    old.copy_(new)


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda's names for capture on the CPU, and a log of what was called in which order."""
    log = []

    class SideStream:
        def __init__(self, device=None):
            log.append("side stream")

        def wait_stream(self, other):
            log.append("wait")

    @contextlib.contextmanager
    def on_stream(stream):
        log.append("on side stream")
        yield

    @contextlib.contextmanager
    def capture(graph, *, stream, capture_error_mode):
        assert isinstance(stream, SideStream)
        log.append("capture")
        with Recorder(graph):
            yield

    class Graph(StandInGraph):
        made = 0

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", SideStream)
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SideStream())
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(streaming, "_captures", lambda _: True)
    return SimpleNamespace(graph=Graph, log=log)


def addresses(stream: Stream) -> list[int]:
    replay = stream._replay
    return [t.data_ptr() for t in [replay.input, *(s for layers in replay.states for s in layers)]]


@every_module
def test_one_capture_serves_all_steps(name, cuda):
    """And its outputs may be kept: none is the buffer that the next step writes."""
    module, inputs = make(name), sequence()
    hx = some_state(module)
    stream = Stream(module, B, hx)
    outputs, seen = [], set()
    for x in inputs:
        outputs.append(stream(x))
        seen.add((*addresses(stream), stream._replay.output.data_ptr()))
    expected, final = whole(module, inputs, hx)
    assert_same(torch.stack(outputs), expected)
    assert_same(stream.state, final)
    assert cuda.graph.made == 1
    assert len(seen) == 1


def test_capture_waits_warms_up_and_then_records(cuda, monkeypatch):
    steps, cached = [], []
    original = Stream._step

    def step(self, *args):
        steps.append(len(cuda.log))
        cached.append(torch.is_autocast_cache_enabled())
        return original(self, *args)

    monkeypatch.setattr(Stream, "_step", step)
    stream = Stream(make("lstm", torch.float32), B)
    with torch.autocast("cpu", torch.bfloat16):
        stream(sequence(torch.float32)[0])
    assert not any(cached)  # a weight from autocast's cache is gone when its block is left
    made = [entry for entry in cuda.log if entry != "side stream"]
    assert made == ["wait", "on side stream", "wait", "capture"]
    warm_up, captured = steps[:-1], steps[-1]
    assert len(warm_up) == 3
    assert {cuda.log[n - 1] for n in warm_up} == {"on side stream"}
    assert cuda.log[captured - 1] == "capture"


def test_the_state_and_resets_reach_the_graph(cuda):
    module, inputs = make("lstm-3"), sequence()
    stream = Stream(module, B)
    stream(inputs[0])
    where = addresses(stream)
    hx = some_state(module)
    stream.state = hx
    expected, after = whole(module, inputs[1:2], hx)
    assert_same(stream(inputs[1]), expected[0])
    stream.reset(torch.tensor([True, False, True]))
    for state in after:
        state[:, [0, 2]] = 0
    assert_same(stream(inputs[2]), whole(module, inputs[2:3], after)[0][0])
    stream.reset()
    assert_same(stream(inputs[3]), whole(module, inputs[3:4])[0][0])
    assert addresses(stream) == where
    assert cuda.graph.made == 1


def test_values_written_in_place_need_no_capture_and_new_tensors_do(cuda):
    module, inputs = make("rnn"), sequence()
    stream, hx = Stream(module, B), None

    def captures_after(part):
        nonlocal hx
        expected, hx = whole(module, part, hx)
        assert_same(streamed(stream, part), expected)
        return cuda.graph.made

    assert captures_after(inputs[:2]) == 1
    module.load_state_dict(make("rnn").state_dict())
    assert captures_after(inputs[2:4]) == 1
    where = addresses(stream)
    module.weight_hh_l1 = nn.Parameter(torch.randn_like(module.weight_hh_l1))
    assert captures_after(inputs[4:6]) == 2
    module.weight_hh_l0.data = module.weight_hh_l0.data.t()  # where it was, with other strides
    assert captures_after(inputs[6:8]) == 3
    assert addresses(stream) == where


def test_choices_that_are_baked_in_capture_anew(cuda):
    module, inputs = make("lstm", torch.float32), sequence(torch.float32)
    stream = Stream(module, B)
    stream(inputs[0])
    for context in (
        fusedrnn.use_backend("torch"),
        fusedrnn.use_precision("tf32x3"),
        torch.autocast("cpu", torch.bfloat16),
    ):
        made = cuda.graph.made
        with context:
            state = stream.state
            output = stream(inputs[1])
            stream(inputs[2])
            assert cuda.graph.made == made + 1
            with torch.no_grad():
                expected = module(inputs[1:2], state)[0][0]
        torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-2)
        assert output.dtype == expected.dtype
        stream(inputs[3])
        assert cuda.graph.made == made + 2


def test_a_cast_module_gets_new_buffers(cuda):
    module, inputs = make("gru"), sequence()
    stream = Stream(module, B)
    stream(inputs[0])
    before = stream.state.float()
    module.float()
    expected, _ = whole(module, inputs[1:2].float(), before)
    assert_same(stream(inputs[1].float()), expected[0], 1e-5)
    assert cuda.graph.made == 2


def test_computed_weights_run_without_a_graph(cuda):
    module, inputs = make("lstm-3"), sequence()
    weight_norm(module)
    stream = Stream(module, B)
    buffers = [s.data_ptr() for s in stream._replay.states[0]]
    assert_same(streamed(stream, inputs), whole(module, inputs)[0])
    assert cuda.graph.made == 0
    assert [s.data_ptr() for s in stream._states[0]] == buffers


def test_inside_a_capture_of_the_callers_the_step_is_a_part_of_it(cuda, monkeypatch):
    module, inputs = make("lstm"), sequence()
    stream = Stream(module, B)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert_same(streamed(stream, inputs), whole(module, inputs)[0])
    assert cuda.graph.made == 0


def _out_of_memory(*_, **__):
    raise RuntimeError("out of memory")


def test_a_capture_that_fails_leaves_the_state_and_no_graph(cuda, monkeypatch):
    module, inputs = make("gru"), sequence()
    stream = Stream(module, B)
    stream(inputs[0])
    kept = stream.state
    old = module.weight_hh_l0
    module.weight_hh_l0 = nn.Parameter(torch.randn_like(old))
    with monkeypatch.context() as patch:
        patch.setattr(streaming._Replay, "store", _out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            stream(inputs[1])
    assert_same(stream.state, kept, 0)
    module.weight_hh_l0 = old  # for which there was a graph
    assert_same(stream(inputs[1]), whole(module, inputs[1:2], kept)[0][0])


def test_a_graph_made_in_inference_mode_serves_outside(cuda):
    module, inputs = make("lstm-3"), sequence()
    with torch.inference_mode():
        stream = Stream(module, B)
        first = stream(inputs[0]).clone()
    rest = streamed(stream, inputs[1:])
    assert_same(torch.cat([first.unsqueeze(0).clone(), rest]), whole(module, inputs)[0])
