"""The protocol of ``python -m bench --cases``: its order, its chains, and who is left out."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from bench import __main__ as main_module
from bench import protocol, providers
from bench.cases import RAGGED, Workload
from bench.memory import kept
from bench.protocol import ProviderError, blocks, chosen, measure_block
from bench.providers import PROVIDERS, TORCH, Provider
from bench.results import Row
from bench.run import Settings, Subject

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, seconds=0.0, least_rounds=3)
SMALL = Workload("small", "toy", "none", T=4, B=3, I=5, H=6)
OTHER = replace(SMALL, name="other", H=7)


def recorder(calls, name):
    """torch.nn under a name, which notes each call: hidden size and the state it starts from."""

    class LSTM(nn.LSTM):
        def forward(self, input, hx=None):
            result = super().forward(input, hx)
            calls.append((name, self.hidden_size, self.training, hx, result[1]))
            return result

    class GRU(nn.GRU):
        pass

    class Classes:
        pass

    Classes.LSTM, Classes.GRU = LSTM, GRU
    return Provider(Classes)


@pytest.fixture
def recorded(monkeypatch):
    calls: list = []
    for name in ("a", "b", "c"):
        monkeypatch.setitem(PROVIDERS, name, recorder(calls, name))
    monkeypatch.setattr(protocol, "CELLS", ("lstm",))
    return calls


def test_all_are_gated_and_warmed_before_any_is_timed(recorded, monkeypatch):
    stages = []
    for stage in ("warm", "measure_memory", "time"):
        whole = getattr(protocol.Prepared, stage)

        def noted(self, stage=stage, whole=whole):
            stages.append((stage, self.subject.workload.name, len(recorded)))
            whole(self)

        monkeypatch.setattr(protocol.Prepared, stage, noted)
    list(measure_block([SMALL, OTHER], SETTINGS, (TORCH, "a", "b", "c"), None))
    assert [(s, n) for s, n, _ in stages] == [
        (s, n) for s in ("warm", "measure_memory", "time") for n in ("small", "other")
    ]
    # Before the first is warmed, each provider's gate has run on both cases and nothing else has.
    assert stages[0][2] == 2 * 3
    timed = recorded[stages[4][2] : stages[5][2]]
    assert {hidden for _, hidden, *_ in timed} == {6}
    forward = [name for name, _, training, *_ in timed if not training]
    assert forward == list("abc") + list("abc") + list("bca")  # torch.nn is the fourth in turn


def test_each_timed_call_starts_from_the_state_before(recorded):
    subject = Subject(SMALL, "lstm", SETTINGS)
    for mode in ("fw", "fwbw"):
        recorded.clear()
        call = subject.call("a", mode)
        for _ in range(3):
            call()
        states = [(hx, final) for *_, hx, final in recorded]
        assert states[0][0] is None
        for (_, before), (hx, _) in pairwise(states):
            assert all(torch.equal(x, y) for x, y in zip(hx, before, strict=True))


def test_red_and_broken_providers_are_not_timed(monkeypatch):
    class Wrong:
        class LSTM(nn.LSTM):
            def forward(self, input, hx=None):
                output, final = super().forward(input, hx)
                return output * (1 + 1e-4), final

        GRU = nn.GRU

    class Broken:
        class LSTM(nn.LSTM):
            def forward(self, input, hx=None):
                raise RuntimeError("no device\nand a long story")

        GRU = nn.GRU

    class BreaksLater:
        class LSTM(nn.LSTM):
            def forward(self, input, hx=None):
                if not self.training:
                    raise RuntimeError("cannot infer")
                return super().forward(input, hx)

        GRU = nn.GRU

    for name, classes in (("wrong", Wrong), ("broken", Broken), ("later", BreaksLater)):
        monkeypatch.setitem(PROVIDERS, name, Provider(classes))
    monkeypatch.setattr(protocol, "CELLS", ("lstm",))
    names = (TORCH, "wrong", "broken", "later", "eager loop")
    (prepared,) = measure_block([SMALL], SETTINGS, names, None)
    gates = {name: row.gate for name, row in prepared.rows.items()}
    assert gates == {
        TORCH: "yardstick", "wrong": "red", "broken": "failed", "later": "failed",
        "eager loop": "ok",
    }  # fmt: skip
    assert prepared.rows["broken"].note == "RuntimeError: no device"
    for name in ("wrong", "broken", "later"):
        assert prepared.rows[name].fw_ms is prepared.rows[name].fwbw_ms is None
        assert any(f"small lstm {name}" in line for line in prepared.complaints)
    row = prepared.rows["eager loop"]
    assert row.fw_ms > 0
    assert row.rounds == 3
    assert row.kept_mb > 0
    assert row.fw_device_ms is None
    assert 0 < row.error < 1e-6


def test_device_times_have_their_spread_and_no_ratio_without_torch(monkeypatch):
    """By stand-ins for the graphs: on CUDA every call is replayed from what was captured."""
    limits = {"seconds": 0.0, "least": 3}
    monkeypatch.setattr(protocol, "captured", lambda call, device: call)
    prepared = protocol.Prepared(SMALL, "lstm", SETTINGS, (TORCH, "eager loop"))
    prepared._replayed("fw", limits)
    for row in prepared.rows.values():
        assert 0 < row.fw_device_ms_p20 <= row.fw_device_ms <= row.fw_device_ms_p80
        assert row.fw_device_speedup > 0
        assert row.fwbw_device_ms is row.fw_ms is None

    def refused(call, device):
        if call is prepared.calls["fwbw"][TORCH]:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return call

    monkeypatch.setattr(protocol, "captured", refused)
    prepared._replayed("fwbw", limits)
    assert prepared.rows[TORCH].note == "no graph of fwbw: operation not permitted"
    assert prepared.rows["eager loop"].fwbw_device_ms_p20 > 0
    assert prepared.rows["eager loop"].fwbw_device_speedup is None


def test_a_yardstick_that_breaks_leaves_no_ratios(monkeypatch):
    prepared = protocol.Prepared(SMALL, "lstm", SETTINGS, (TORCH, "eager loop", "fusedrnn torch"))
    monkeypatch.setitem(prepared.calls["fw"], TORCH, lambda: 1 / 0)
    prepared.warm()
    assert prepared.rows[TORCH].gate == "failed"
    prepared.time()
    row = prepared.rows["eager loop"]
    assert row.fw_ms > 0
    assert row.fw_speedup is row.fwbw_speedup is None


def test_who_breaks_in_telling_its_memory_costs_nobody_else(monkeypatch):
    whole = Subject.kept_mb

    def kept_mb(self, provider):
        if provider == "eager loop":
            raise RuntimeError("out of memory")
        return whole(self, provider)

    monkeypatch.setattr(Subject, "kept_mb", kept_mb)
    monkeypatch.setattr(protocol, "CELLS", ("lstm",))
    (prepared,) = measure_block([SMALL], SETTINGS, (TORCH, "eager loop", "fusedrnn torch"), None)
    gates = {name: row.gate for name, row in prepared.rows.items()}
    assert gates == {TORCH: "yardstick", "eager loop": "failed", "fusedrnn torch": "ok"}
    assert prepared.rows["fusedrnn torch"].fw_ms > 0


def test_the_floor_and_the_memory_stand_beside_the_time():
    row = Row.of(
        SMALL, "lstm", "fusedrnn cooperative", backend="triton", gate="ok", share=0.42, error=2e-7,
        fw_ms=1.5, fw_ms_p20=1.4, fw_ms_p80=1.6, fw_speedup=2.0, fw_device_ms=1.25,
        fw_floor_ms=0.125, fwbw_ms=4.5, fwbw_ms_p20=4.4, fwbw_ms_p80=4.6, fwbw_speedup=3.0,
        fwbw_floor_ms=12.3, kept_mb=1234.5, peak_mb=2345.6,
    )  # fmt: skip
    shown = protocol.line(row)
    assert len(shown) == len(protocol.HEAD) < 150
    titles = protocol.HEAD.split()
    assert titles[-2:] == ["kept", "peak"]
    assert titles.count("floor") == titles.count("device") == 2
    assert shown.split()[6:] == [
        "2e-07", "1.50", "1.40-1.60", "2.00", "1.25", "0.125", "4.50", "4.40-4.60", "3.00", "-",
        "12.3", "1234", "2346",
    ]  # fmt: skip
    # Each word ends where its heading does.
    for title, value in (("peak", "2346"), ("kept", "1234"), ("error", "2e-07")):
        end = protocol.HEAD.index(title) + len(title)
        assert shown[:end].endswith(f" {value}")
    assert "modelled, not measured" in protocol.LEGEND


def test_what_only_infers_has_no_backward():
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    (prepared, *_) = measure_block([SMALL], SETTINGS, (TORCH, "onnxruntime"), None)
    row = prepared.rows["onnxruntime"]
    assert row.gate == "ok"
    assert row.fw_ms > 0
    assert row.fwbw_ms is row.kept_mb is None


def test_the_rnn_takes_part_where_there_is_one():
    names = (TORCH, "fusedrnn", "fusedrnn torch", "fusedrnn aten", "eager loop", "onnxruntime")
    made = {p.subject.cell: p for p in measure_block([SMALL], SETTINGS, names, None)}
    assert list(made) == ["lstm", "gru", "rnn"]
    rows = made["rnn"].rows
    assert all(rows[name].gate == "ok" and rows[name].fwbw_ms > 0 for name in names[1:5])
    if "onnxruntime" in chosen("onnxruntime", CPU):
        assert (rows["onnxruntime"].gate, rows["onnxruntime"].note) == (
            "refused", "has LSTM and GRU only",
        )  # fmt: skip
    assert not made["rnn"].complaints


def test_blocks_hold_what_fits(monkeypatch):
    large = replace(SMALL, T=1000, B=64, H=512)
    monkeypatch.setattr(protocol, "BLOCK", (len(protocol.CELLS) + 1) * 1000 * 64 * 1029)
    assert [len(b) for b in blocks([SMALL, large, large, SMALL])] == [2, 2]
    assert [len(b) for b in blocks([large])] == [1]


class Clock:
    """Stands for ``time``: a second passes in each stage of a case, and none elsewhere."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


@pytest.mark.parametrize(
    ("seconds", "gated", "warmed", "timed"),
    [
        (float("inf"), 6, 6, 6),
        (100, 6, 6, 6),
        (16, 6, 6, 5),  # 6 + 6, the memory takes none, and 5 are begun by the 16th second
        (8, 5, 4, 0),
        (1, 1, 1, 0),
    ],
)
def test_the_time_is_looked_at_between_the_cases_of_a_block(
    seconds, gated, warmed, timed, monkeypatch
):
    clock, done = Clock(), []
    monkeypatch.setattr(protocol, "time", clock)

    def stage(name):
        def run(self, *_):
            done.append(name)
            clock.now += 1

        return run

    monkeypatch.setattr(protocol.Prepared, "__init__", stage("gate"))
    monkeypatch.setattr(protocol.Prepared, "warm", stage("warm"))
    monkeypatch.setattr(protocol.Prepared, "measure_memory", lambda self: None)
    monkeypatch.setattr(protocol.Prepared, "time", stage("time"))
    found = list(measure_block([SMALL, OTHER], SETTINGS, (TORCH,), None, end=seconds))
    assert len(found) == timed
    assert [done.count(name) for name in ("gate", "warm", "time")] == [gated, warmed, timed]


def test_minutes_end_within_a_block(tmp_path, monkeypatch, capsys):
    """Rows of the cases that were timed, and a count that says how many those are."""
    clock = Clock()
    monkeypatch.setattr(protocol, "time", clock)
    monkeypatch.setattr(protocol, "CELLS", ("lstm",))
    whole = protocol.Prepared.time

    def slow(self):
        whole(self)
        clock.now += 40

    monkeypatch.setattr(protocol.Prepared, "time", slow)
    cases = [replace(SMALL, name=f"case-{n}") for n in range(4)]
    assert protocol.run(cases, (TORCH,), SETTINGS, tmp_path, minutes=1) == 0
    with open(tmp_path / "results.csv", newline="") as file:
        assert [row["workload"] for row in csv.DictReader(file)] == ["case-0", "case-1"]
    assert "2 of 4 cases" in capsys.readouterr().out


def test_kept_bytes_of_packed_data():
    subject = Subject(replace(RAGGED, T=6, B=3, I=5, H=6), "gru", SETTINGS)
    assert kept(subject.rnn("fusedrnn torch"), subject.input) > 0


def test_the_command(tmp_path, capsys, monkeypatch):
    found = providers.find_spec
    monkeypatch.setattr(providers, "find_spec", lambda n: None if n == "keras" else found(n))
    argv = ["--cases", "many-to-one,character", "--providers", "fusedrnn,eager loop", "--quick"]
    assert main_module.main([*argv, "--device", "cpu", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "absent   keras: not installed: pip install keras" in out
    assert "absent   fastlstm: no adapter" in out
    assert "2 of 2 cases" in out
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["provider"] for r in rows] == [TORCH, "fusedrnn", "eager loop"] * 6
    assert all(float(r["fw_ms_p20"]) <= float(r["fw_ms"]) <= float(r["fw_ms_p80"]) for r in rows)
    assert {r["fw_device_ms"] for r in rows} == {""}
    assert {r["precision"] for r in rows} == {"ieee"}
    table = [text for text in out.splitlines() if text.startswith("character")]
    assert all(text.split()[-1] == "-" for text in table)  # no peak, and no floor, on the CPU
    env = json.loads((tmp_path / "environment.json").read_text())
    assert env["absent"]["keras"] == "not installed: pip install keras"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--cases", "many-to-on"], "near are many-to-one"),
        (["--cases", "sine-10", "--providers", "kera"], "there is no provider 'kera'"),
        (["--providers", "fusedrnn"], "--providers is of --cases, and none are named"),
        (["cpu", "--providers", "fusedrnn"], "--providers is of --cases, and none are named"),
    ],
)
def test_a_wrong_name_is_one_sentence(argv, sentence, capsys):
    assert main_module.main(argv) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1


def test_the_list(capsys):
    assert main_module.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert "many-to-one" in out
    assert "H2048-B1-fp32-T4096-stacked" in out


def test_torch_comes_first_and_once():
    assert chosen("eager loop,torch.nn", CPU) == (TORCH, "eager loop")
    assert "haste" not in chosen(None, CPU)
    assert chosen("all", CPU) == chosen("eager loop,all", CPU) == chosen(None, CPU)
    assert {TORCH, "fusedrnn", "eager loop"} <= set(chosen("all", CPU))
    with pytest.raises(ProviderError, match="no provider"):
        chosen("nobody", CPU)
