"""``python -m bench cpu``: every row is gated, what the case says it is, and on disk at once.

``--quick`` measures nothing: of times only their order is looked at.
"""

from __future__ import annotations

import json
import mmap
import operator
import os
import threading
from dataclasses import replace

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils.rnn import PackedSequence

import fusedrnn
from bench import __main__ as main_module
from bench import cpu, cpu_rows, imdb, providers, ragged, targets
from bench.apart import apart
from bench.cases import EMBEDDING, EVERY_CELL, MANY_TO_ONE, ONE_HOT, PRICE, cut_down, named
from bench.disk import whole_rows
from bench.gate import Gate, Verdict
from bench.memory import kept, new_pages
from bench.providers import PROVIDERS, TORCH, Provider
from bench.run import Settings, Subject

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, seconds=0.0, least_rounds=2)
QUICK = ["cpu", "--quick", "--out"]
#: Times of a row that is printed.
TIMES = {f"{who}_ms{tail}": 2.0 for who in ("torch", "fusedrnn") for tail in ("", "_p20", "_p80")}


@pytest.fixture
def no_imdb(monkeypatch, tmp_path):
    monkeypatch.delenv("FUSEDRNN_IMDB", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def few(monkeypatch, no_imdb):
    """One lesson, and no process of ``bench.host``."""
    monkeypatch.setattr(cpu, "LESSONS", (MANY_TO_ONE,))
    monkeypatch.setattr(cpu, "find_spec", lambda name: None)


def test_every_case_cell_and_pass_has_a_row(tmp_path, capsys, no_imdb):
    assert main_module.main([*QUICK, str(tmp_path)]) == 0
    said = capsys.readouterr().out
    rows = whole_rows(tmp_path / "cpu.csv")
    found = {(row["case"], row["cell"], row["what"]) for row in rows}
    lessons = named("lessons")
    for workload in lessons:
        for cell in EVERY_CELL:
            assert {(workload.name, cell, what) for what in ("forward", "training")} <= found
    assert {row["backend"] for row in rows} == {"aten", "torch", "stream"}
    assert {row["gate"] for row in rows} == {"ok"}
    assert all(0 < float(row["share"]) <= 1 for row in rows)
    assert all(float(row["x"]) > 0 and int(row["rounds"]) == 2 for row in rows)
    for row in rows:
        for who in ("torch", "fusedrnn"):
            p20, p50, p80 = (float(row[f"{who}_ms{tail}"]) for tail in ("_p20", "", "_p80"))
            assert 0 < p20 <= p50 <= p80
    assert all(int(row["torch_pages"]) >= 0 <= int(row["fusedrnn_pages"]) for row in rows)
    assert "lstm training: geometric mean" in said
    assert all(f"{target.words} >= {target.least:g}: " in said for target in targets.TARGETS)
    memory = whole_rows(tmp_path / "memory.csv")
    assert len(memory) == 2 * len(lessons)
    assert all(float(m["recompute_MiB"]) <= float(m["default_MiB"]) for m in memory)
    host = whole_rows(tmp_path / "host.csv")
    assert [row["cell"] for row in host] == ["lstm", "gru", "rnn"]
    assert all(float(h["fwd_launch_us"]) < float(h["fwd_whole_us"]) for h in host)
    assert all(0 < float(h["bwd_launch_us"]) < float(h["bwd_whole_us"]) for h in host)


def test_a_lesson_is_run_as_its_workload_says():
    """imdb-embedding packed for both, of the lengths that the main job draws, with its dropout."""
    corpus = imdb.Corpus(imdb.generate(64, 64, seed=0), "generated for a test")
    workload = replace(cut_down(EMBEDDING), T=EMBEDDING.T, B=16, H=32)
    main_job = Subject(workload, "gru", SETTINGS, corpus).input
    assert main_job.batch_sizes[0] > main_job.batch_sizes[-1]  # not all are of one length
    seen = []
    hook = register_module_forward_pre_hook(lambda module, given: seen.append((module, given[0])))
    try:
        case = cpu.lesson(workload, "gru", SETTINGS, corpus)
        assert all(found.ok for found in case.judge())
        seen.clear()
        for pair in case.pairs:
            pair.theirs()
            pair.ours()
    finally:
        hook.remove()
    kinds = [(type(module), module.training) for module, _ in seen]
    both = torch.nn.GRU, fusedrnn.GRU
    assert kinds == [(kind, training) for training in (False, True) for kind in both]
    for module, input in seen:
        assert isinstance(input, PackedSequence)
        assert torch.equal(input.batch_sizes, main_job.batch_sizes)
        assert torch.equal(input.data, main_job.data)
        assert input.data.requires_grad == module.training
        assert (module.dropout, module.num_layers, module.bidirectional) == (0.3, 2, True)
    sizes = cpu.memory(workload, "gru", SETTINGS, corpus)
    subject = Subject(workload, "gru", SETTINGS, corpus)
    with fusedrnn.use_backend("torch"):
        assert sizes[3] == f"{kept(subject.rnn('fusedrnn'), subject.input) / 2**20:.2f}"


def test_the_backend_that_is_timed_is_the_one_that_is_gated(monkeypatch):
    """Of so wide an input auto trains on the loop; the gate's own input asks for its gradient."""
    judged = []
    judge = Gate.judge

    def spy(self, provider, **options):
        judged.append((provider, options))
        return judge(self, provider, **options)

    monkeypatch.setattr(Gate, "judge", spy)
    corpus = imdb.Corpus(imdb.generate(64, 64, seed=0), "generated for a test")
    case = cpu.lesson(replace(ONE_HOT, train=64, test=1), "lstm", SETTINGS, corpus)
    assert [pair.backend for pair in case.pairs] == ["aten", "torch"]
    case.judge()
    assert judged == [("fusedrnn", {"inference": True}), ("fusedrnn torch", {})]
    case = cpu.lesson(PRICE, "lstm", SETTINGS, None)
    assert case.pairs[0].backend == "aten"
    case.judge()
    assert judged[-1] == ("fusedrnn aten", {})


class Wrong:
    """torch.nn under our name, a little wrong without gradients, or in c_n's alone."""

    class LSTM(torch.nn.LSTM):
        def forward(self, input, hx=None):
            output, (h_n, c_n) = super().forward(input, hx)
            return output, (h_n, c_n + (c_n.detach() - c_n))

    class GRU(torch.nn.GRU):
        def forward(self, input, hx=None):
            output, h_n = super().forward(input, hx)
            return output * (1 if self.training else 1 + 1e-4), h_n

    RNN = torch.nn.RNN


def test_the_gate_of_inference_sees_what_only_eval_does(monkeypatch):
    subject = Subject(cut_down(MANY_TO_ONE), "gru", SETTINGS)
    monkeypatch.setitem(providers.PROVIDERS, "fusedrnn", Provider(Wrong))
    gate = Gate(subject.workload, "gru", subject.weights, subject.gate_input())
    assert gate.judge("fusedrnn").ok
    verdict = gate.judge("fusedrnn", inference=True)
    assert not verdict.ok
    assert {budget.name for budget in verdict.budgets} == {"output", "h_n"}


def test_who_is_wrong_is_not_timed(tmp_path, capsys, monkeypatch, few):
    monkeypatch.setitem(
        providers.PROVIDERS, "fusedrnn aten", Provider(Wrong, PROVIDERS[TORCH].context)
    )
    assert main_module.main([*QUICK, str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "many-to-one lstm: d_c_0: OVER budget" in err
    red = [row for row in whole_rows(tmp_path / "cpu.csv") if row["gate"] == "red"]
    assert [(row["case"], row["cell"]) for row in red] == [("many-to-one", "lstm")] * 2
    assert all(row["x"] == row["torch_ms"] == row["rounds"] == "" for row in red)
    assert all(float(row["share"]) > 1 for row in red)
    assert "every lesson, cell and pass >= 0.95" in out
    line = next(x for x in out.splitlines() if x.startswith("LSTM training"))
    assert line == "LSTM training, geometric mean >= 1.1: - missed"


def shorter(problem):
    return problem.ours, problem.input, {"lengths": problem.on_device - 1}


def scaled(function, in_training=True):
    """Its output, a little too large."""

    def wrong(self, *args, **kwargs):
        result = function(self, *args, **kwargs)
        if torch.is_grad_enabled() and not in_training:
            return result
        if isinstance(result, tuple):
            return result[0] * (1 + 1e-4), *result[1:]
        return result * (1 + 1e-4)

    return wrong


def test_every_other_gate_bites(monkeypatch):
    def green():
        cases = (
            cpu.with_lengths(ragged.QUICK, "gru", 0.0),
            cpu.with_tokens(cut_down(ONE_HOT), "lstm", 0.0),
            cpu.decoding(cut_down(MANY_TO_ONE), "gru", 0.0),
        )
        return [[found.ok for found in case.judge()] for case in cases]

    assert green() == [[True], [True], [True, True]]
    monkeypatch.setitem(ragged.PROVIDERS, "fusedrnn lengths", shorter)
    in_eval = scaled(fusedrnn.TokenLSTM.forward, in_training=False)
    monkeypatch.setattr(fusedrnn.TokenLSTM, "forward", in_eval)
    stream = type(fusedrnn.GRU(2, 3).stream())
    monkeypatch.setattr(stream, "__call__", scaled(stream.__call__))
    assert green() == [[False], [False], [False, True]]
    monkeypatch.setattr(fusedrnn.GRU, "forward", scaled(fusedrnn.GRU.forward))
    assert not any(green()[2])


def test_rows_are_on_disk_as_they_are_measured(tmp_path, monkeypatch, few):
    taken = []

    def cut_off(*args, apart=cpu.apart):
        if len(taken) == 2:
            raise KeyboardInterrupt
        taken.append(apart(*args))
        return taken[-1]

    (tmp_path / "cpu.csv").write_text("of,an,older,run\n")
    monkeypatch.setattr(cpu, "apart", cut_off)
    with pytest.raises(KeyboardInterrupt):
        main_module.main([*QUICK, str(tmp_path)])
    rows = whole_rows(tmp_path / "cpu.csv")
    assert [row["cell"] for row in rows] == ["lstm", "lstm", "gru", "gru"]
    assert float(rows[2]["x"]) == pytest.approx(taken[1][0].x, rel=1e-5)


def test_all_of_a_case_is_warmed_before_any_is_timed():
    calls = []

    def pair(name):
        both = (lambda who=who: calls.append((name, who)) for who in ("theirs", "ours"))
        return cpu.Pair(name, "forward", "aten", *both, 0.0)

    verdicts = [Verdict(True, 0.5, ()), Verdict(True, 0.2, ())]
    case = cpu.Case("gru", [pair("a"), pair("b")], lambda: verdicts)
    behind = cpu.gated(lambda: case)
    assert behind.is_green
    assert calls == []
    assert [(row.case, row.gate, row.share) for row in behind.rows] == [
        ("a", "ok", 0.5), ("b", "ok", 0.5)
    ]  # fmt: skip
    rows = cpu.timed(behind.make, behind.rows, least=3, seed=0)
    once = [("theirs", "ours"), ("ours", "theirs")]
    warm = [(name, who) for name in "ab" for _ in range(2) for who in once[0]]
    timed = []
    for name in "ab":
        timed += [(name, who) for n in range(3) for who in once[n % 2]]
        timed += [(name, who) for who in once[0] for _ in range(3)]  # whose new pages are counted
    assert calls == warm + timed
    assert [row.rounds for row in rows] == [3, 3]
    verdicts.append(Verdict(False, 1.5, ()))
    assert [row.gate for row in cpu.gated(lambda: case).rows] == ["red", "red"]


def test_each_case_is_timed_in_a_process_of_its_own():
    """Of as many threads; what the function raises arrives."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = [apart(whoami, 7) for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    assert len({os.getpid(), *(pid for pid, *_ in found)}) == 3
    assert [(threads, number) for _, threads, number in found] == [(3, 7)] * 2
    with pytest.raises(ZeroDivisionError):
        apart(operator.floordiv, 1, 0)


def whoami(number):
    return os.getpid(), torch.get_num_threads(), number


def a_row(x, case="sine-10", cell="lstm", what="training", backend="aten"):
    return cpu_rows.Row(case=case, cell=cell, what=what, backend=backend, gate="ok", share=0.1, x=x)


def test_targets_are_of_the_rows_they_name():
    rows = [
        a_row(1.0), a_row(4.0, "imdb-one-hot"), a_row(0.94, what="forward", cell="gru"),
        a_row(1.6, cell="gru"),
        a_row(2.0, "decode T1", what="step", backend="stream"),
        a_row(0.99, "decode T1", what="step"),
        a_row(3.5, "lengths T5"), a_row(0.1, "lengths T5", what="forward"),
        a_row(2.1, "tokens T9", what="forward"), a_row(0.2, "tokens T9"),
        a_row(1.9, "tokens T9 from tokens", what="forward"),
    ]  # fmt: skip
    assert [targets.verdict_on(target, rows) for target in targets.TARGETS] == [
        "every lesson, cell and pass >= 0.95: 0.94 missed (sine-10 gru forward)",
        "LSTM training, geometric mean >= 1.1: 2.00 holds",
        "IMDB one-hot, LSTM training >= 1.8: 4.00 holds (imdb-one-hot lstm training)",
        "GRU training, geometric mean >= 1.6: 1.60 holds",
        "a step of T=1 by stream >= 1: 2.00 holds (decode T1 lstm step)",
        "a step of T=1 by the module >= 1: 0.99 missed (decode T1 lstm step)",
        "lengths beside packed, training >= 3: 3.50 holds (lengths T5 lstm training)",
        "tokens beside one-hot rows, forward >= 2: 2.10 holds (tokens T9 lstm forward)",
        "tokens beside making one-hot rows, forward >= 2: 1.90 missed "
        "(tokens T9 from tokens lstm forward)",
    ]
    red = replace(rows[1], gate="red", x=None)
    assert targets.verdict_on(targets.TARGETS[1], [a_row(1.2), red]).endswith("1.20 missed")


def test_a_row_is_of_the_process_in_the_middle():
    """Each row for itself, and it says what the others found."""
    runs = [[a_row(x), a_row(y, cell="gru")] for x, y in ((1.5, 1.0), (1.1, 3.0), (1.2, 2.0))]
    found = cpu_rows.median_of(runs)
    assert [(r.cell, r.x, r.x_low, r.x_high) for r in found] == [
        ("lstm", 1.2, 1.1, 1.5), ("gru", 2.0, 1.0, 3.0)
    ]  # fmt: skip
    line = cpu_rows.shown(replace(found[1], **TIMES, torch_pages=999))
    assert " 2.00   1.00-3.00  new pages 999, 0" in line


def test_three_processes_time_a_case(monkeypatch, tmp_path, no_imdb):
    timed = []

    def apart(function, make, rows, *rest):
        timed.append((rows[0].case, rows[0].cell, rest))
        return [replace(row, x=1.0, **TIMES) for row in rows]

    monkeypatch.setattr(cpu, "apart", apart)
    case = cpu.Case(
        "gru",
        [cpu.Pair("a", "forward", "aten", int, int, 0.0)],
        lambda: [Verdict(True, 0.5, ())],
    )
    monkeypatch.setattr(cpu, "makers", lambda *_: iter([lambda: case]))
    monkeypatch.setattr(cpu, "workloads", lambda _: ())
    monkeypatch.setattr(cpu.host, "measured", lambda _: [])
    assert cpu.run(tmp_path, None, beside_thread=True) == 0
    assert timed == [("a", "gru", (6, 0, True))] * 3
    assert json.loads((tmp_path / "environment.json").read_text())["beside_thread"] is True


def test_another_thread_has_workers_of_its_own():
    before = threading.active_count()
    assert apart(threads_beside, True) == apart(threads_beside, False) + 1
    assert threading.active_count() == before


def threads_beside(beside):
    cpu.timed(lambda: cpu.Case("gru", [], list), [], 1, 0, beside)
    return threading.active_count()


def test_kept_bytes_are_those_of_saved_storages():
    """Of y = tanh(x W^T + b) autograd keeps y; x and the weights are not counted."""
    module, x = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh()), torch.randn(3, 4)
    assert kept(module, x) == 3 * 8 * 4


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, capsys, no_imdb):
    (tmp_path / "file").write_text("")
    assert main_module.main([*QUICK, str(tmp_path / "file")]) == 2
    said = capsys.readouterr().err
    assert "no results can be written to" in said
    assert said.count("\n") == 1


def test_new_pages_are_those_a_call_touches_first():
    page, bytes_ = mmap.PAGESIZE, 48 << 20  # beyond what malloc keeps
    there = torch.zeros(bytes_, dtype=torch.uint8)
    found = new_pages(lambda: torch.empty(bytes_, dtype=torch.uint8).fill_(1))
    assert found == pytest.approx(bytes_ / page, rel=0.1)
    assert new_pages(lambda: there.fill_(2)) < 100
