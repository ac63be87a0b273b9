"""Other implementations beside torch.nn: adapters pass the gate, and who is absent says so."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import pytest
import torch

import fusedrnn
from bench import peer, peers, providers
from bench.cases import CELLS, EVERY_CELL, Workload
from bench.forcing import scheduled
from bench.gate import Gate
from bench.peer import both, reordered
from bench.providers import PROVIDERS, TORCH, absent, build, contenders
from bench.run import Settings, Subject
from fusedrnn import dispatch, launches

CPU = torch.device("cpu")
ONE = Workload("one", "toy", "none", T=4, B=3, I=5, H=6)
BOTH_WAYS = Workload("both", "toy", "none", T=4, B=3, I=5, H=6, layers=2, bidirectional=True)
PACKED = Workload("packed", "toy", "none", T=6, B=3, I=5, H=6, ragged=True)
PACKED_BOTH_WAYS = replace(BOTH_WAYS, name="packed both", T=9, B=5, ragged=True)


@pytest.fixture(autouse=True)
def nothing_is_generated(monkeypatch):
    """Inductor takes a minute for what Dynamo alone shows: the graph is the loop's."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def gate(workload, cell):
    subject = Subject(workload, cell, Settings(CPU))
    return Gate(workload, cell, subject.weights, subject.gate_input())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo's own
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # of the peers about their own insides
@pytest.mark.parametrize("cell", EVERY_CELL)
@pytest.mark.parametrize(
    "workload", [ONE, BOTH_WAYS, PACKED, PACKED_BOTH_WAYS], ids=lambda w: w.name
)
@pytest.mark.parametrize(
    "name", [n for n in PROVIDERS if n != TORCH and "cpu" in PROVIDERS[n].devices]
)
def test_every_adapter_passes_the_gate(name, workload, cell):
    if reason := absent(name, CPU):
        pytest.skip(reason)
    if cell == "rnn" and PROVIDERS[name].package:
        with pytest.raises(NotImplementedError, match="has LSTM and GRU only"):
            build(name, cell, workload)
        return
    verdict = gate(workload, cell).judge(name)
    assert verdict.ok, verdict.failures
    assert 0 < verdict.error < 1e-6
    names = {budget.name for budget in verdict.budgets}
    assert ("d_input" in names) == PROVIDERS[name].backward
    of_weights = any(name.endswith("weight_hh_l0") for name in names)
    assert of_weights == PROVIDERS[name].backward


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("gate_of", ["i or r", "the last"])
def test_gates_in_another_order_are_red(cell, gate_of, monkeypatch):
    """What an adapter with the wrong permutation would compute."""
    gates = 4 if cell == "lstm" else 3
    order = (
        (1, 0, 2, 3)[:gates] if gate_of == "i or r" else (*range(gates - 2), gates - 1, gates - 2)
    )

    class Swapped(peers.EagerLoop):
        def convert(self, *weights):
            return tuple(reordered(t, gates, order) for t in weights)

    monkeypatch.setitem(PROVIDERS, "eager loop", providers.Provider(both(Swapped)))
    assert not gate(ONE, cell).judge("eager loop").ok


def test_what_is_timed_is_converted_once():
    rnn = build("eager loop", "gru", ONE)
    leaves = rnn.fix()
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in leaves)
    with torch.no_grad():
        rnn.weight_hh_l0.zero_()
    output, _ = rnn(torch.randn(3, 4, 5))
    assert torch.autograd.grad(output.sum(), leaves[1])[0].abs().sum() > 0


def test_peers_refuse_in_a_sentence():
    packed = Subject(PACKED, "lstm", Settings(CPU)).input
    for name in ("flashrnn", "haste", "torchrl"):
        with pytest.raises(NotImplementedError, match="takes no packed sequences"):
            build(name, "lstm", PACKED)(packed)
    long = Workload("long", "toy", "none", T=31, B=1, I=2, H=3)
    with pytest.raises(NotImplementedError, match="unrolls all steps"):
        gate(long, "gru").judge("compiled loop")
    with pytest.raises(NotImplementedError, match="does not compute in"):
        build("keras", "lstm", ONE)(torch.randn(3, 4, 5, dtype=torch.float64))


@pytest.mark.parametrize("cell", EVERY_CELL)
@pytest.mark.parametrize("order", ["as it is", "sorted"])
def test_padding_holds_nothing_that_matters(cell, order):
    """A masked step leaves the states; the padding comes out of the packed output again."""
    subject = Subject(PACKED_BOTH_WAYS, cell, Settings(CPU))
    packed = subject.input
    if order == "sorted":
        packed = packed._replace(sorted_indices=None, unsorted_indices=None)
    output, _ = subject.rnn("eager loop")(packed)
    theirs, _ = subject.rnn(TORCH)(packed)
    assert output.batch_sizes is packed.batch_sizes
    assert output.sorted_indices is packed.sorted_indices
    assert output.data.shape == theirs.data.shape


def test_masks_of_both_directions_and_no_others():
    """Of a sequence of 9 steps and one of 5 or more: the reverse one begins with the padding."""
    given = []

    class Spy(peers.EagerLoop):
        def masked(self, weights, x, states, mask):
            given.append(mask)
            return super().masked(weights, x, states, mask)

    subject = Subject(PACKED_BOTH_WAYS, "gru", Settings(CPU))
    Spy("GRU", 5, 6, batch_first=True, bidirectional=True)(subject.input)
    forward, reverse = given
    lengths = forward.sum(1)
    assert torch.equal(forward, torch.arange(9) < lengths[:, None])
    assert torch.equal(reverse, forward.flip(1))
    assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)
    assert lengths.sum() == subject.input.batch_sizes.sum()


@pytest.mark.parametrize("what", ["mask", "flipped mask", "order of states"])
def test_padding_that_is_walked_into_is_red(what, monkeypatch):
    if what == "order of states":
        monkeypatch.setattr(peer.Padded, "states_in", lambda self, states: states)
    else:
        original = peers.EagerLoop.masked

        def wrong(self, weights, x, states, mask):
            mask = torch.ones_like(mask) if what == "mask" else mask.flip(1)
            return original(self, weights, x, states, mask)

        monkeypatch.setattr(peers.EagerLoop, "masked", wrong)
    assert not gate(PACKED_BOTH_WAYS, "gru").judge("eager loop").ok


def test_who_is_absent_says_how_to_bring_it(monkeypatch):
    found = find_spec
    monkeypatch.setattr(providers, "find_spec", lambda n: None if n == "keras" else found(n))
    assert absent("keras", CPU) == "not installed: pip install keras"
    assert "keras" not in contenders(CPU)
    assert "not released as a package" in absent("fastlstm", CPU)
    monkeypatch.setattr(providers, "find_spec", lambda n: object())
    assert absent("haste", CPU) == "computes on cuda only"
    assert contenders(CPU)[0] == TORCH
    assert set(contenders(torch.device("cuda"))) >= {"haste", "flashrnn", "torchrl", "keras"}


SCHEDULES = ("resident", "cooperative", "stepwise")


@pytest.mark.parametrize("workload", [ONE, BOTH_WAYS, PACKED], ids=lambda w: w.name)
@pytest.mark.parametrize("schedule", ["resident", "stepwise"])
def test_a_schedule_by_force_is_the_one_that_runs(schedule, workload, monkeypatch):
    """In the interpreter; every layer of a stack, and both directions."""
    ran = []
    original = launches.run_forward

    def spy(config, plan, *rest):
        ran.append(plan and plan.schedule)
        return original(config, plan, *rest)

    name, judge = f"fusedrnn {schedule}", gate(workload, "gru").judge
    for usual in ("fusedrnn triton", "fusedrnn triton"):  # remembered from the second call on
        judge(usual)
    monkeypatch.setattr("fusedrnn.stack.run_forward", spy)
    verdict = judge(name)
    assert verdict.ok, verdict.failures
    assert ran == [schedule] * workload.layers
    judge("fusedrnn triton")
    assert set(ran[workload.layers :]) == {"resident"}
    told = Subject(workload, "gru", Settings(CPU)).explain(name)
    assert [line.split(": ")[1] for line in told.layers] == [schedule] * workload.layers


@pytest.mark.parametrize(
    ("schedule", "workload", "sentence"),
    [
        ("resident", replace(ONE, H=4096), "schedule resident holds W_hh in one program"),
        ("cooperative", ONE, "schedule cooperative "),
        ("stepwise", replace(ONE, dtype="bfloat16"), "multiplies the bit patterns of bfloat16"),
    ],
)
def test_a_schedule_refuses_in_a_sentence(schedule, workload, sentence):
    """What it cannot take is refused; neither another schedule nor another backend steps in."""
    judge = gate(workload, "lstm").judge
    if workload is ONE:
        with fusedrnn.use_precision("ieee"):
            for usual in ("fusedrnn triton", "fusedrnn triton"):  # a call of this shape is known
                assert judge(usual).ok
    with fusedrnn.use_precision("ieee"), pytest.raises(NotImplementedError, match=sentence):
        judge(f"fusedrnn {schedule}")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_needs_cuda_or_the_interpreter(schedule, monkeypatch):
    name = f"fusedrnn {schedule}"
    assert absent(name, CPU) == "computes on cuda only"
    assert name in contenders(torch.device("cuda"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(NotImplementedError, match="the kernels need CUDA tensors"):
        gate(ONE, "lstm").judge(name)


def test_a_schedule_by_force_ends_with_its_block():
    before = dispatch.plan_stack, launches.plan_stack

    def breaks():
        with scheduled("stepwise"):
            assert dispatch.plan_stack is launches.plan_stack is not before[0]
            raise KeyError

    with pytest.raises(KeyError):
        breaks()
    assert (dispatch.plan_stack, launches.plan_stack) == before
    assert dispatch.requested_backend()[0] == "auto"
