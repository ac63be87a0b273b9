"""The benchmark's gate: planted bugs are found, and what is wrong is not timed."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from bench import providers
from bench.cases import RAGGED, Workload, cut_down, named
from bench.commands import applies
from bench.gate import Gate
from bench.measure import PASSES, BenchmarkCase, Settings
from bench.providers import PROVIDERS, TORCH, Provider
from bench.run import able, gated, timed

SETTINGS = Settings(torch.device("cpu"), seconds=1e-3, least_rounds=1)
SMALL = Workload("small", "toy", "none", T=6, B=3, I=4, H=5, layers=2, bidirectional=True)


def planted(bug):
    """A provider that is torch.nn, but for its forward."""

    class Wrong(nn.GRU):
        def forward(self, input, hx=None):
            return bug(super().forward, input, hx)

    return Provider(lambda cell, *sizes, **options: Wrong(*sizes, **options))


class Scaled(torch.autograd.Function):
    """The identity, with a gradient that is a little too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + 1e-4)


def wrong_final_state(forward, input, hx):
    output, h_n = forward(input, hx)
    return output, h_n * (1 + 1e-5)


def lost_gradient(forward, input, hx):
    output, h_n = forward(input, hx)
    return output, h_n + (h_n.detach() - h_n)


def no_initial_state(forward, input, hx):
    return forward(input, torch.zeros_like(hx) + 0 * hx)


def wrong_input_gradient(forward, input, hx):
    return forward(Scaled.apply(input), hx)


def not_a_number(forward, input, hx):
    output, h_n = forward(input, hx)
    return output + torch.where(output == output.max(), float("nan"), 0.0), h_n


BUGS = wrong_final_state, lost_gradient, no_initial_state, wrong_input_gradient, not_a_number


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_red_and_not_timed(bug, monkeypatch):
    monkeypatch.setitem(providers.PROVIDERS, "eager loop", planted(bug))
    case = BenchmarkCase.of(SMALL, "gru", SETTINGS)
    rows = timed(case, gated(case, (TORCH, "eager loop")), SETTINGS)
    row = rows["eager loop", "training"]
    assert row["gate"] == "red"
    assert row["share"] > 1 or row["share"] != row["share"]
    assert "ms" not in row
    assert rows[TORCH, "training"]["ms"] > 0
    assert "OVER budget" in row["note"]


def test_a_provider_that_ignores_the_order_of_packed_sequences_is_red(monkeypatch):
    def unsorted(forward, input, hx):
        assert isinstance(input, PackedSequence)
        return forward(input._replace(sorted_indices=None, unsorted_indices=None), hx)

    monkeypatch.setitem(providers.PROVIDERS, "eager loop", planted(unsorted))
    gate = Gate(BenchmarkCase.of(cut_down(RAGGED), "gru", SETTINGS))
    assert not gate.judge("eager loop").ok
    assert gate.judge("fusedrnn lengths").ok


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("name", ["many-to-one", "character", "ragged"])
def test_every_provider_is_equal_or_refuses(name, cell):
    (workload,) = map(cut_down, named(name))
    case = BenchmarkCase.of(workload, cell, SETTINGS)
    names = [n for n, entry in PROVIDERS.items() if "cpu" in entry.devices and applies(n, workload)]
    names.remove("compiled loop")  # compiling takes a minute
    rows = gated(case, names)
    assert {row["gate"] for row in rows.values()} <= {"ok", "reference", "refused"}
    refused = {name for (name, _), row in rows.items() if row["gate"] == "refused"}
    assert refused == ({"eager loop"} if workload.ragged else set())
    assert {*able(rows, "training")} >= {TORCH, "fusedrnn", "fusedrnn torch", "fusedrnn aten"}
    assert {mode for name, mode in rows if name == "fusedrnn"} == set(PASSES)


def test_the_gate_compares_every_tensor(monkeypatch):
    seen = set()
    budget = Gate.judge.__globals__["error_budget"]

    def watched(name, *tensors, **options):
        seen.add(name)
        return budget(name, *tensors, **options)

    monkeypatch.setitem(Gate.judge.__globals__, "error_budget", watched)
    case = BenchmarkCase.of(SMALL, "lstm", SETTINGS)
    assert Gate(case).judge("fusedrnn").ok
    expected = {"output", "h_n", "c_n", "d_input", "d_h_0", "d_c_0"}
    assert seen == expected | {f"d_rnn.{name}" for name in case.weights}
