"""The benchmark's gate: planted bugs are found, and what is wrong is not timed."""

import pytest
import torch
from torch import nn

from bench import providers
from bench.cases import RAGGED, Workload, cut_down, named
from bench.commands import applies
from bench.measure import PASSES, BenchmarkCase, Settings
from bench.providers import PROVIDERS, TORCH, Provider
from bench.run import able, gated, timed

SETTINGS = Settings(torch.device("cpu"), seconds=1e-3, least_rounds=1)
SMALL = Workload("small", "toy", "none", T=6, B=3, I=4, H=5, layers=2, bidirectional=True)


def changed(result, output=lambda y: y, state=lambda h: h):
    return output(result[0]), state(result[1])


BUGS = {
    "final state": lambda gru, *x: changed(gru(*x), state=lambda h: h * (1 + 1e-5)),
    "lost gradient": lambda gru, *x: changed(gru(*x), state=lambda h: h + (h.detach() - h)),
    "NaN": lambda gru, *x: changed(gru(*x), lambda y: y + torch.where(y == y.max(), torch.nan, 0)),
    "no initial state": lambda gru, input, hx: gru(input, torch.zeros_like(hx) + 0 * hx),
    "gradient of the input": lambda gru, input, hx: gru(
        input + 1e-4 * (input - input.detach()), hx
    ),
    "order of sequences": lambda gru, input, hx: gru(
        input._replace(sorted_indices=None, unsorted_indices=None), hx
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_red_and_not_timed(bug, monkeypatch):
    class Wrong(nn.GRU):
        def forward(self, input, hx=None):
            return BUGS[bug](super().forward, input, hx)

    wrong = Provider(lambda cell, *sizes, **options: Wrong(*sizes, **options))
    monkeypatch.setitem(providers.PROVIDERS, "eager loop", wrong)
    workload = cut_down(RAGGED) if bug == "order of sequences" else SMALL
    case = BenchmarkCase.of(workload, "gru", SETTINGS)
    rows = timed(case, gated(case, (TORCH, "eager loop")), SETTINGS)
    row = rows["eager loop", "training"]
    assert row["gate"] == "red"
    assert row["share"] > 1 or row["share"] != row["share"]
    assert "ms" not in row
    assert rows[TORCH, "training"]["ms"] > 0
    assert "OVER budget" in row["note"]


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
