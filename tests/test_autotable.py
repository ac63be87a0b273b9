"""The autotuner: candidates are proved, the fastest wins, and what it writes is what plan reads."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import autotable
from bench.autotable import MOST, Files, Tried, install, problem_of, shortlist, tune
from bench.cases import Workload
from bench.disk import whole_rows
from bench.forcing import forced
from bench.gate import Gate
from bench.run import Settings, Subject
from bench.timing import Times
from fusedrnn import dispatch, launches
from fusedrnn.kernels import measured
from fusedrnn.kernels.plan import CHIPS, candidates, chip_of, modelled, plan, plan_stack

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, seconds=0.0, least_rounds=1)
POINT = Workload("H40-B3-fp16", "sweep", "none", T=2, B=3, I=9, H=40, dtype="float16")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def clock(monkeypatch):
    """Times that are given: resident with 8 warps is the fastest, torch.nn takes 9 ms."""

    def told(calls, device, **_):
        def ms(name):
            if name == "torch.nn":
                return 9.0
            wide = "schedule='resident'" in name and "forward_warps=8" in name
            return 1.0 if wide else 2.0

        for call in calls.values():
            call()
        return {name: Times(ms(name), ms(name), ms(name), 1.0, 1) for name in calls}

    monkeypatch.setattr(autotable, "interleaved", told)


@pytest.fixture
def forget():
    def clear():
        for cached in (measured.table, plan, plan_stack):
            cached.cache_clear()

    yield clear
    clear()


def test_the_fastest_of_the_proved_wins(clock):
    tried = []
    lines = list(tune(POINT, "gru", SETTINGS, tell=lambda p, t: tried.append((p.needs_grad, t))))
    assert [shape.needs_grad for shape, _, _ in lines] == [True, False]
    for shape, cut, found in lines:
        assert (shape.cell, shape.I, shape.H, shape.B, shape.dtype) == ("gru", 9, 40, 3, "float16")
        assert (cut.schedule, cut.forward_warps) == ("resident", 8)
        # 1, 2 and 9 ms over the two steps.
        assert (found.T, found.us, found.model_us, found.torch_us) == (2, 500.0, 1000.0, 4500.0)
    assert {t.outcome for _, t in tried} == {"ok"}
    assert {t.plan.schedule for _, t in tried} == {"resident", "stepwise"}
    assert all(t.ms in (1.0, 2.0) for _, t in tried)


def test_a_wrong_candidate_is_never_timed(clock, monkeypatch):
    """The fastest by the clock computes something else: its line in the folder says red."""
    original, now = Gate.judge, []

    def judge(self, provider):
        verdict = original(self, provider)
        (chosen,) = launches.plan_stack(None, None)
        now.append(chosen.schedule == "resident" and chosen.forward.num_warps == 8)
        return verdict._replace(ok=not now[-1])

    monkeypatch.setattr(Gate, "judge", judge)
    monkeypatch.setattr("bench.gate.Verdict.failures", property(lambda self: ["output is wrong"]))
    tried = []
    lines = list(tune(POINT, "lstm", SETTINGS, tell=lambda p, t: tried.append(t)))
    assert any(now)
    assert not all(now)
    assert len(lines) == 2
    for _, cut, found in lines:
        assert (cut.schedule, found.us) == ("resident", found.model_us)
        assert cut.forward_warps != 8
    red = [t for t in tried if t.plan.forward.num_warps == 8 and t.plan.schedule == "resident"]
    assert {(t.outcome, t.ms, t.note) for t in red} == {("red", None, "output is wrong")}


def test_a_candidate_that_breaks_costs_only_itself(clock, monkeypatch):
    original = Gate.judge

    def judge(self, provider):
        (chosen,) = launches.plan_stack(None, None)
        if chosen.schedule == "resident":
            raise RuntimeError("too many resources requested")
        return original(self, provider)

    monkeypatch.setattr(Gate, "judge", judge)
    tried = []
    lines = list(tune(POINT, "lstm", SETTINGS, tell=lambda p, t: tried.append(t)))
    # Even the model's own choice broke: whatever passed is better than that.
    assert "resident" not in {cut.schedule for _, cut, _ in lines}
    assert len(lines) == 2
    assert {found.model_us for *_, found in lines} == {math.inf}
    assert any("too many resources" in t.note for t in tried)
    monkeypatch.setattr(Gate, "judge", lambda *_: 1 / 0)
    assert list(tune(POINT, "lstm", SETTINGS)) == []


def test_the_models_choice_stands_unless_clearly_beaten(monkeypatch):
    problem = problem_of(POINT, "lstm", True)
    chip = chip_of(CPU)
    usual, other = (p.cut for p in list(candidates(problem, chip))[:2])
    for ms, winner in ((0.99, usual), (0.97, other)):
        _, cut, found = autotable._winner(problem, chip, 4, {None: 9.0, usual: 1.0, other: ms})
        assert cut == winner
        assert found.us == pytest.approx(250 * (1.0 if winner == usual else ms))


def test_forced_plans_are_what_runs(monkeypatch):
    ran = []
    original = launches.run_forward
    monkeypatch.setattr(
        "fusedrnn.stack.run_forward",
        lambda config, plan, *rest: (ran.append(plan), original(config, plan, *rest))[1],
    )
    before = dispatch.plan_stack, launches.plan_stack
    call = Subject(POINT, "lstm", SETTINGS).call("fusedrnn triton", "fwbw")
    found = shortlist(candidates(problem_of(POINT, "lstm", True), chip_of(CPU)))
    for candidate in found:
        with forced(candidate):
            call()
    assert ran == found
    assert (dispatch.plan_stack, launches.plan_stack) == before


def test_the_shortlist_has_the_best_of_every_schedule_first():
    large = problem_of(replace(POINT, I=128, H=128, B=16), "lstm", True)
    chip = CHIPS["sm_90"]
    found = shortlist(candidates(large, chip))
    assert [p.schedule for p in found[:3]] == ["resident", "cooperative", "stepwise"]
    assert found[0].cut == modelled(large, chip).cut
    assert len(found) == MOST
    rest = shortlist(candidates(large, chip), frozenset({"resident", "stepwise"}))
    assert {p.schedule for p in rest} == {"cooperative"}
    steps = [p.step for p in rest]
    assert steps[0] == min(steps)


def test_winners_become_the_plan(clock, tmp_path, monkeypatch, forget):
    """From the stage's files through the installed table into plan and its description."""
    target = tmp_path / "measured.csv"
    target.write_text(",".join(measured.COLUMNS) + "\n")
    folder = tmp_path / "results"
    folder.mkdir()
    files = Files(folder)
    for line in tune(POINT, "gru", SETTINGS):
        files.add_winner(line)
    files.winners.path.write_bytes(files.winners.path.read_bytes() + b"sm_90-132,lstm,9")  # torn
    assert install(folder, target) == 2
    whole = target.read_text()
    target.write_text(whole.replace(",500,", ",400,"))
    assert target.read_text() != whole
    assert install(folder, target) == 2  # the same lines again replace themselves
    assert target.read_text() == whole
    assert len(measured.read(target)) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["autotable.csv", "measured.csv"]
    monkeypatch.setattr(measured, "PATH", target)
    forget()
    chosen = plan(problem_of(POINT, "gru", True), chip_of(CPU))
    assert chosen.cut.forward_warps == 8
    assert "500.00 us a step (torch.nn 4500.00), measured at T = 2" in chosen.describe()


def test_what_is_no_measurement_is_not_installed(tmp_path, monkeypatch, capsys):
    target = tmp_path / "measured.csv"
    target.write_text(before := ",".join(measured.COLUMNS) + "\n")
    folder = tmp_path / "results"
    folder.mkdir()
    monkeypatch.setattr(measured, "PATH", target)
    main = ["python -m bench.autotable", str(folder)]
    for text, sentence in ((None, "usage:"), (before + "x," * 23 + "x\n", "is no measurement")):
        if text:
            (folder / "measured.csv").write_text(text)
        monkeypatch.setattr("sys.argv", main)
        assert autotable.main() == 2
        assert sentence in capsys.readouterr().err
        assert target.read_text() == before


def test_every_candidate_is_in_the_folder(tmp_path):
    files = Files(tmp_path)
    problem, chip = problem_of(POINT, "lstm", True), chip_of(CPU)
    best = modelled(problem, chip)
    files.add_tried(measured.shape_of(problem, chip), 4, Tried(best, "ok", 1.5, "0.20 of it"))
    (row,) = whole_rows(tmp_path / "autotable.csv")
    assert (row["outcome"], row["ms"], row["schedule"], row["T"]) == ("ok", "1.5", "resident", "4")
    assert float(row["floor_us"]) == pytest.approx(best.step, rel=0.01)
    assert Path(tmp_path / "measured.csv").exists()
