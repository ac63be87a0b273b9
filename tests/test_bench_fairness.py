"""No peer does in the timed region what its user would have done before."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from functools import partial

import peer_stubs
import pytest
import torch
from torch import nn

import fusedrnn
from bench import peers, peers_cuda, run
from bench.cases import CELLS, Workload
from bench.peer import Held, Peer, both
from bench.providers import PROVIDERS, Provider, absent, build
from bench.run import Settings, Subject

CPU = torch.device("cpu")
BOTH_WAYS = Workload("both", "toy", "none", T=4, B=3, I=5, H=6, layers=2, bidirectional=True)
PACKED = replace(BOTH_WAYS, name="packed", ragged=True)
STUBBED = ("flashrnn", "haste", "torchrl")
PEERS = tuple(n for n, p in PROVIDERS.items() if p.adapted and p.classes not in (nn, fusedrnn))
#: Those that need a GPU take no packed sequences.
TAKEN = [(n, w) for n in PEERS for w in (BOTH_WAYS, PACKED) if n not in STUBBED or w is BOTH_WAYS]
taken = pytest.mark.parametrize(("name", "workload"), TAKEN, ids=lambda v: getattr(v, "name", v))

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the peers, about their insides
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # Dynamo's
]


@pytest.fixture(autouse=True)
def _nothing_is_generated(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def calls(name, cell, workload, modes=("fw", "fwbw")):
    subject = Subject(workload, cell, Settings(CPU))
    backward = PROVIDERS[name].backward
    return {mode: subject.call(name, mode) for mode in modes if mode == "fw" or backward}


def entered(call) -> set[str]:
    """What Python and C functions a call enters, as ``file:name``, or ``name`` of those in C."""
    seen = set()

    def profile(frame, event, argument):
        if event == "call":
            code = frame.f_code
            seen.add(f"{os.path.basename(code.co_filename)}:{code.co_qualname}")
        elif event == "c_call":
            seen.add(argument.__name__)

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


#: Of our adapters, of torch, Keras, ONNX Runtime and JAX's tracing of our function; the last two
#: are how the gate calls a module with weights that are not its own.
PREPARATION = {
    "convert", "hold", "_built", "_native", "fix", "onnx_session", "jax_layer",
    "Module.__init__", "Layer.__init__", "InferenceSession.__init__", "compile", "export",
    "Layer.stateless_call", "functional_call",
}  # fmt: skip
OURS = ("peer.py", "peers.py", "peers_cuda.py", "peers_outside.py")


def is_preparation(name: str) -> bool:
    """Of ``entered``: something is built, converted, exported, compiled or traced."""
    file, _, function = name.partition(":")
    own = function.rpartition(".")[2] if file in OURS else function
    return own in PREPARATION or file == "convert_frame.py"


@pytest.mark.parametrize("cell", CELLS)
@taken
def test_nothing_is_built_or_converted_in_the_third_call(name, workload, cell, monkeypatch):
    """Two calls are warm-up."""
    if name in STUBBED:
        peer_stubs.install(monkeypatch)
        monkeypatch.setattr(peer_stubs, "_torchrl", partial(in_torch, {}))
    elif reason := absent(name, CPU):
        pytest.skip(reason)
    for mode, call in calls(name, cell, workload).items():
        call(), call()
        seen = entered(call)
        assert len(seen) > 3
        assert not [n for n in seen if is_preparation(n)], mode
        if name != "onnxruntime":  # which is given arrays on the tensors' own memory
            assert not seen & {"numpy", "cpu", "from_numpy"}, mode


def in_torch(made, mode, x, given, weights, is_init):
    """A stand-in without a constructor, which torchrl's kernels have not."""
    hx = tuple(states[None, :, 0].contiguous() for states in given)
    common = weights, True, 1, 0.0, True, False, True
    if mode == "LSTM":
        output, *final = torch.lstm(x, hx, *common)
    else:
        output, *final = torch.gru(x, hx[0], *common)
    return output, [state[0] for state in final]


@pytest.mark.parametrize("what", ["builds", "converts", "compiles"])
def test_preparation_in_a_call_is_seen(what, monkeypatch):
    class Slow(peers.EagerLoop):
        def layer(self, weights, x, states):
            if what == "builds":
                nn.LSTM(1, 1)
            elif what == "converts":
                self.convert(*weights)
            else:
                torch.compile(lambda t: t + 1)(x)
            return super().layer(weights, x, states)

    monkeypatch.setitem(PROVIDERS, "eager loop", Provider(both(Slow)))
    for call in calls("eager loop", "lstm", BOTH_WAYS).values():
        call(), call()
        assert any(map(is_preparation, entered(call)))


@pytest.mark.parametrize("cell", CELLS)
def test_haste_is_constructed_once_however_many_calls(cell, monkeypatch):
    peer_stubs.install(monkeypatch)
    rnn_class = {"lstm": peer_stubs.HasteLSTM, "gru": peer_stubs.HasteGRU}[cell]
    made = calls("haste", cell, BOTH_WAYS)
    for call in made.values():
        for _ in range(3):
            call()
    assert rnn_class.built == 4 * len(made)  # a layer and direction each


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fixed", [True, False])
def test_haste_is_told_whether_it_trains(training, fixed, monkeypatch):
    """In eval() it keeps nothing for backward; a new module would always train."""
    peer_stubs.install(monkeypatch)
    rnn = build("haste", "lstm", BOTH_WAYS).train(training)
    if fixed:
        rnn.fix()
    rnn(torch.randn(3, 4, 5))
    modules = {w.module for w in rnn.fixed} if fixed else {*rnn._by_width.values()}
    assert {mode for module in modules for mode in module.modes} == {training}


@pytest.mark.parametrize("cell", CELLS)
@taken
def test_what_is_timed_gives_what_was_gated(name, workload, cell, monkeypatch):
    """Converted once or in the graph, by a module's call or as a function of its weights."""
    if name in STUBBED:
        peer_stubs.install(monkeypatch)
    elif reason := absent(name, CPU):
        pytest.skip(reason)
    subject = Subject(workload, cell, Settings(CPU))
    rnn = subject.rnn(name).eval()
    gated = run._tensors(rnn(subject.input))
    leaves = rnn.fix()
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in leaves)
    timed = run._tensors(rnn(subject.input))
    for one, other in zip(gated, timed, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", ["keras", "haste"])
def test_a_module_holds_the_weights_that_are_differentiated(name, cell, monkeypatch):
    if name == "haste":
        peer_stubs.install(monkeypatch)
    elif reason := absent(name, CPU):
        pytest.skip(reason)
    rnn = Subject(BOTH_WAYS, cell, Settings(CPU)).rnn(name)
    leaves = rnn.fix()
    assert all(isinstance(weights, Held) for weights in rnn.fixed)
    output, _ = rnn(torch.randn(3, 4, 5))
    grads = torch.autograd.grad(output.square().sum(), leaves)
    assert all(grad.abs().sum() > 0 for grad in grads)


def test_torchrl_marks_no_beginnings_anew(monkeypatch):
    peer_stubs.install(monkeypatch)
    rnn = build("torchrl", "gru", BOTH_WAYS)
    given = []
    monkeypatch.setattr(
        peer_stubs,
        "_torchrl",
        lambda m, x, g, w, begins: given.append(begins) or in_torch({}, m, x, g, w, begins),
    )
    rnn(torch.randn(3, 4, 5)), rnn(torch.randn(3, 4, 5))
    assert len({id(begins) for begins in given}) == 1


class Waiting:
    """Counts what ``jax.block_until_ready`` is given."""

    def __init__(self, jax):
        self.original, self.given = jax.block_until_ready, []

    def __call__(self, arrays):
        self.given.append(arrays)
        return self.original(arrays)


@pytest.mark.parametrize("workload", [BOTH_WAYS, PACKED], ids=lambda w: w.name)
def test_jax_waits_for_all_results_and_goes_on_from_the_final_states(workload, monkeypatch):
    jax = pytest.importorskip("jax", reason="jax is not installed")
    waiting = Waiting(jax)
    monkeypatch.setattr(jax, "block_until_ready", waiting)
    call = calls("jax", "lstm", workload, ("fwbw",))["fwbw"]
    call(), call()
    (first, first_grads), (second, _) = waiting.given
    weights, input = first_grads
    assert len(first) == 3
    assert len(weights) == 16
    assert input.ndim == (2 if workload.ragged else 3)
    assert not bool((first[0] == second[0]).all())


def test_jax_differentiates_the_input_only_where_the_others_do(monkeypatch):
    jax = pytest.importorskip("jax", reason="jax is not installed")
    waiting = Waiting(jax)
    monkeypatch.setattr(jax, "block_until_ready", waiting)
    for task, count in (("none", 2), ("sine", 1)):
        waiting.given.clear()
        assert replace(BOTH_WAYS, task=task).needs_input_grad == (count == 2)
        rnn = build("jax", "gru", BOTH_WAYS)
        rnn.timed("fwbw", torch.randn(3, 4, 5), count == 2)()
        ((_, gradients),) = waiting.given
        assert len(gradients) == count


@pytest.mark.parametrize("mode", ["fw", "fwbw"])
def test_jax_drops_between_layers_only_in_training(mode):
    """From the same weights, cotangents and states: the first call's output, or first gradient."""
    jax = pytest.importorskip("jax", reason="jax is not installed")
    first = []
    for dropout in (0.0, 0.5):
        torch.manual_seed(0)
        rnn = build("jax", "gru", replace(BOTH_WAYS, dropout=dropout))
        first.append(jax.tree.leaves(rnn.timed(mode, torch.ones(3, 4, 5), False)())[0])
    assert bool((first[0] == first[1]).all()) == (mode == "fw")


def test_the_default_is_to_time_forward():
    rnn = build("eager loop", "gru", BOTH_WAYS)
    assert isinstance(rnn, Peer)
    assert rnn.timed("fw", torch.randn(3, 4, 5), False) is None
    assert peers_cuda.Haste.timed is Peer.timed
