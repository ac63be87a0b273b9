"""What ``python -m bench gpu`` measures: order, providers, batches, and what a crash costs."""

from __future__ import annotations

import json
import sys
from collections import Counter

import pytest
import torch

from bench import acceptance, gauntlet, gpu, readme, stages
from bench.autotable import TRITON
from bench.cases import CELLS, EVERY_CELL, KINDS, SWEEP_T, every_sweep, named
from bench.disk import whole_rows, write_json
from bench.gauntlet import COMPILED, CORE, cases_of, informative_first, kind_of
from bench.protocol import Prepared
from bench.providers import TORCH, contenders
from bench.results import FolderError, Row

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("FUSEDRNN_IMDB", raising=False)


def worker(folder, stage="sweep", seconds=60.0, **job):
    write_json(folder / "environment.json", {"data": "none"})
    return stages.Worker(stages.Job(stage, folder, seconds, "cpu", quick=True, **job))


def index_of(made, name):
    (index,) = (n for n, case in enumerate(made.cases) if case.name == name)
    return index


# Which cases, and in which order


def test_its_lessons_are_those_of_the_main_job():
    cases = cases_of("lessons")
    points = [(w, cell) for w in named("lessons") for cell in CELLS]
    assert [(case.workload, case.cell) for case in cases[: len(points)]] == points
    assert cases[len(points)] == gauntlet.Case("ragged", None, "")
    assert [(case.workload, case.cell, case.late) for case in cases[len(points) + 1 :]] == [
        (*point, True) for point in points
    ]


def test_a_point_of_the_sweep_is_not_trained_however_small():
    for case in cases_of("sweep", quick=True):
        assert case.workload.steps == case.workload.gpu_steps == 0


def test_the_sweep_is_whole():
    order = informative_first()
    assert set(order) == {(w, cell) for w in every_sweep() for cell in EVERY_CELL}
    assert len(order) == len(set(order))


@pytest.mark.parametrize(
    ("first", "steps", "sizes", "batches", "kinds", "cells"),
    [
        (4, {512, 64}, {256}, {16}, {"padded"}, {"lstm", "gru"}),
        (12, {512, 64, 1024}, {256, 1024, 64}, {16, 64}, {"padded", "packed"}, {"lstm", "gru"}),
        (32, {*SWEEP_T}, {64, 256, 512, 1024}, {1, 16, 64}, {*KINDS}, {*EVERY_CELL}),
    ],
)
def test_what_the_first_cases_of_the_sweep_cover(first, steps, sizes, batches, kinds, cells):
    """Wherever it is cut off: time against T, against B and against H, and then every kind."""
    order = informative_first()[:first]
    assert {w.T for w, _ in order} == steps
    assert {w.H for w, _ in order} >= sizes
    assert {w.B for w, _ in order} == batches
    assert {kind_of(w) for w, _ in order} == kinds
    assert {cell for _, cell in order} == cells
    # What is no neighbour in the grid differs from the usual case in one thing alone.
    base = order[0][0]
    for w, cell in order:
        if not gauntlet.in_grid(w, cell):
            names = ("T", "B", "H", "dtype")
            apart = [getattr(w, name) != getattr(base, name) for name in names]
            assert sum(apart) + (kind_of(w) != "padded") + (cell == "rnn") == 1


def test_the_grid_of_the_acceptance_comes_first():
    """Three of four cases, until all of it is done; README's table is among the first."""
    order = informative_first()
    wanted = {(p.cell, p.dtype, p.H, p.B) for p in acceptance.POINTS}
    usual = [(n, w, c) for n, (w, c) in enumerate(order) if kind_of(w) == "padded" and w.T == 512]
    places = {(c, w.dtype, w.H, w.B): n for n, w, c in usual}
    assert max(places[point] for point in wanted) < 240
    shown = [places[c, readme.DTYPE, H, readme.BATCH] for c in CELLS for H in readme.SIZES]
    assert max(shown) < 24
    in_grid = [gauntlet.in_grid(*point) for point in order[:232]]
    assert in_grid[: 3 * 4] == [True, True, True, False] * 3
    assert sum(in_grid) == len(wanted) + len(CELLS) * 3  # with H = 64 at README's batch


def test_the_plan_is_tuned_where_its_table_has_lines():
    for case in cases_of("autotable"):
        w = case.workload
        assert (w.T, kind_of(w), case.cell in CELLS) == (512, "padded", True)
    assert len(cases_of("autotable")) == 330


# Who takes part


def test_all_who_are_there_take_part_in_the_lessons():
    for device in (CPU, CUDA):
        able = contenders(device)
        late = [name for name in COMPILED if name in able]
        for case in cases_of("lessons"):
            if case.workload is None:
                continue
            taking = case.providers(device)
            assert taking[0] == TORCH
            if case.late:
                assert taking == (TORCH, *late)
            else:
                assert {*taking, *late} == {*able}
    schedules = {f"fusedrnn {name}" for name in ("resident", "cooperative", "stepwise")}
    assert schedules <= {*cases_of("lessons")[0].providers(CUDA)}


def test_peers_and_schedules_take_part_in_some_of_the_sweep():
    first = cases_of("sweep")[:12]
    assert {case.providers(CUDA)[:3] for case in first} == {CORE}
    wide = [case for case in first if case.everybody]
    assert [case.name for case in wide] == [
        "H256-B16-fp32 lstm", "H256-B16-fp32 gru", "H1024-B16-fp32 lstm",
    ]  # fmt: skip
    for case in first:
        others = {*case.providers(CUDA)[3:]}
        schedules = {"fusedrnn resident", "fusedrnn cooperative", "fusedrnn stepwise"}
        assert others >= ({*schedules, "eager loop"} if case.everybody else set())
        assert not others & {"compiled loop", "compiled step", "fusedrnn torch"}
        assert case.everybody or not others
    assert acceptance.KERNELS in CORE
    assert acceptance.AUTO in CORE
    assert TRITON in CORE


# The protocol


def test_a_stage_follows_the_protocol(tmp_path, interpreted, monkeypatch):
    """A batch is gated, then warmed, then its memory is told, and then case after case is timed;
    each is on disk before the next."""
    made, happened = worker(tmp_path), []
    monkeypatch.setattr(stages, "MOST_IN_BATCH", 2)
    names = ["H64-B16-fp16 lstm", "H64-B16-fp32 gru"]
    made.todo = [index_of(made, name) for name in names]
    for stage in ("__init__", "warm", "measure_memory", "time"):
        whole = getattr(Prepared, stage)

        def noted(self, *given, stage=stage, whole=whole):
            on_disk = len({row["workload"] for row in whole_rows(tmp_path / "results.csv")})
            whole(self, *given)
            happened.append((stage, self.subject.workload.name, on_disk))

        monkeypatch.setattr(Prepared, stage, noted)
    assert made.run() == stages.DONE
    points = [name.split()[0] for name in names]
    before = [(stage, point, 0) for stage in ("__init__", "warm", "measure_memory")
              for point in points]  # fmt: skip
    assert happened == [*before, ("time", points[0], 0), ("time", points[1], 1)]
    rows = whole_rows(tmp_path / "results.csv")
    assert list(rows[0]) == list(Row.__dataclass_fields__)
    for row in rows:
        if row["gate"] in ("yardstick", "ok"):
            assert float(row["fw_ms_p20"]) <= float(row["fw_ms"]) <= float(row["fw_ms_p80"])
            assert int(row["rounds"]) >= 2
            assert row["kept_mb"] or row["provider"] == "onnxruntime"
    ours = [row for row in rows if row["provider"] == "fusedrnn triton"]
    assert [row["plan"] for row in ours] == ["layer 0: resident"] * 2
    assert all(row["precision"] == "ieee" for row in rows if row["cell"] == "gru")
    now = json.loads(stages.now_path(tmp_path, "sweep").read_text())
    assert (now["case"], now["begin"]) == ("", now["of"])


def test_a_lesson_is_trained_and_what_is_compiled_comes_without_torch(
    tmp_path, interpreted, monkeypatch
):
    made = worker(tmp_path, "lessons")
    made.do([index_of(made, "sine-10 gru")])
    rows = whole_rows(tmp_path / "results.csv")
    trained = {row["provider"] for row in rows if row["train_s"]}
    assert (
        trained
        == {TORCH, "fusedrnn"}
        == {row["provider"] for row in whole_rows(tmp_path / "losses.csv")}
    )
    assert {row["provider"] for row in rows} == {*contenders(CPU)} - {*COMPILED}
    late = index_of(made, "many-to-one gru, compiled")
    others = ("fusedrnn torch", "fusedrnn aten")  # which need no compiler
    monkeypatch.setattr(gauntlet, "COMPILED", others)
    made.do([late])
    added = whole_rows(tmp_path / "results.csv")[len(rows) :]
    assert tuple(row["provider"] for row in added) == others
    assert all(float(row["fw_speedup"]) > 0 for row in added)


def test_batches_hold_what_fits_and_what_goes_alone(tmp_path, interpreted, monkeypatch):
    made = worker(tmp_path, "lessons")
    ragged = index_of(made, "ragged")
    assert made._batch() == list(range(stages.MOST_IN_BATCH))
    made.todo = [ragged - 1, ragged, ragged + 1]
    assert made._batch() == [ragged - 1]
    made.todo = made.todo[1:]
    assert made._batch() == [ragged]
    made.todo = [0, 1, 2]
    monkeypatch.setattr(stages, "BLOCK", 2 * stages.values_of(made.cases[0].workload))
    assert made._batch() == [0, 1]


def test_its_ragged_rows_are_added_to_those_the_folder_has(tmp_path, interpreted):
    made = worker(tmp_path, "lessons")
    ragged = index_of(made, "ragged")
    for runs in (1, 2):
        made.todo = [ragged]
        made.do([ragged])
        rows = whole_rows(tmp_path / "ragged.csv")
        assert [row["cell"] for row in rows] == (["lstm"] * 4 + ["gru"] * 4 + ["rnn"] * 4) * runs


def test_a_folder_with_other_columns_is_not_written_to(tmp_path):
    (tmp_path / "results.csv").write_text("workload,lesson\r\na,b\r\n")
    with pytest.raises(FolderError, match="has other columns"):
        gpu.Run(gpu.Options(only=("sweep",)), tmp_path, CPU)._begin()


# What breaks


PROGRAM = """
import os, sys, time
from types import SimpleNamespace
from bench import stages
from bench.results import Row
class Prepared:
    def __init__(self, workload, cell, settings, names, corpus, at):
        self.subject = SimpleNamespace(workload=workload, cell=cell, steps=0)
        self.rows, self.complaints = {{}}, []
        for name in names:
            at(name)
            {body}
            self.rows[name] = Row.of(workload, cell, name, backend="", gate="ok")
        at("")
    warm = measure_memory = time = lambda self: None
stages.Prepared = Prepared
stages.Worker.todo = property(lambda self: self._todo, lambda self, new: setattr(
    self, "_todo", [n for n in new if n < 20]))
sys.exit(stages.main())
"""


def broken_run(body, folder, monkeypatch, restarts, minutes=5.0, patience=3.0):
    original = stages.Job.command.fget
    program = PROGRAM.format(body=body)
    command = property(lambda job: [sys.executable, "-c", program, *original(job)[3:]])
    monkeypatch.setattr(stages.Job, "command", command)
    few = tuple(s._replace(case_seconds=patience) for s in gpu.STAGES)
    monkeypatch.setattr(gpu, "STAGES", few)
    monkeypatch.setattr(gpu, "_MOST_RESTARTS", restarts)
    run = gpu.Run(gpu.Options(minutes, ("sweep",), quick=True), folder, CPU)
    assert run.run() == 1
    return json.loads((folder / "status.json").read_text())["stages"]["sweep"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("time.sleep(60) if 'fp32' in workload.name else None", "hung"),
        ("os._exit(9) if 'fp32' in workload.name else None", "its process left with 9"),
        ("os.kill(os.getpid(), 11) if 'fp32' in workload.name else None", "left with -11"),
    ],
)
def test_a_case_that_takes_its_process_with_it_costs_only_itself(
    body, reason, tmp_path, interpreted, monkeypatch
):
    """What was gated before it in its batch is done again, and each case is there once."""
    stage = broken_run(body, tmp_path, monkeypatch, restarts=1)
    assert stage["state"] == "failed"
    assert stage["broken"][0].startswith("H256-B16-fp32 lstm torch.nn")
    assert reason in stage["broken"][0]
    assert len(stage["broken"]) == 2  # the next of its kind, and then it is enough
    names = [case.name for case in cases_of("sweep")]
    found = Counter(f"{row['workload']} {row['cell']}" for row in rows_of(tmp_path))
    second = index_in(names, stage["broken"][1])
    assert found == dict.fromkeys([n for n in names[:second] if "fp32" not in n], len(CORE))


def test_what_failed_is_told_once_though_its_batch_is_done_again(
    tmp_path, interpreted, monkeypatch
):
    """The second case fails, the third ends the process: the first had not been timed yet."""
    body = "{'H256-B16-fp32 lstm': lambda: 1 / 0, 'H256-B16-bf16 gru': lambda: os._exit(9)}"
    body += ".get(f'{workload.name} {cell}', lambda: None)()"
    stage = broken_run(body, tmp_path, monkeypatch, restarts=2)
    assert stage["broken"] == ["H256-B16-bf16 gru torch.nn (its process left with 9)"]
    rows = Counter((f"{r['workload']} {r['cell']}", r["provider"]) for r in rows_of(tmp_path))
    assert set(rows.values()) == {1}
    assert ("H256-B16-fp32 lstm", "fusedrnn") in rows
    assert ("H256-B16-bf16 gru", "fusedrnn") not in rows
    assert "red: H256-B16-fp32 lstm: division by zero" in stage["text"]


def test_what_was_red_is_told_of_a_stage_that_ran_out_of_time(tmp_path, interpreted, monkeypatch):
    """Killed at its limit, it leaves no exit code; what it had found wrong stands all the same."""
    body = "{'H256-B16-fp32 lstm': lambda: 1 / 0, 'H256-B16-bf16 gru': lambda: time.sleep(60)}"
    body += ".get(f'{workload.name} {cell}', lambda: None)()"
    stage = broken_run(body, tmp_path, monkeypatch, restarts=2, minutes=0.5, patience=60.0)
    assert stage["state"] == "failed"
    assert "red: H256-B16-fp32 lstm: division by zero, stopped after" in stage["text"]


def test_an_exception_outside_of_every_case_is_no_red_gate(tmp_path, interpreted, monkeypatch):
    body = "sys.exit(1) if name == 'eager loop' else None"
    stage = broken_run(body, tmp_path, monkeypatch, restarts=2)
    assert stage["broken"] == ["H256-B16-fp32 lstm eager loop (its process left with 1)"]


def test_a_peer_that_takes_its_process_with_it_costs_only_itself(
    tmp_path, interpreted, monkeypatch
):
    body = "os._exit(9) if name == 'eager loop' else None"
    stage = broken_run(body, tmp_path, monkeypatch, restarts=2)
    assert stage["broken"] == ["H256-B16-fp32 lstm eager loop (its process left with 9)"]
    rows = rows_of(tmp_path)
    lost = [row for row in rows if row["provider"] == "eager loop"]
    assert lost
    assert {(row["gate"], row["note"].partition(",")[0]) for row in lost} == {
        ("failed", "took its process with it at an earlier case"),
    }
    done = Counter(f"{r['workload']} {r['cell']}" for r in rows if r["provider"] == TORCH)
    assert done == dict.fromkeys([case.name for case in cases_of("sweep")[:20]], 1)


def rows_of(folder):
    return whole_rows(folder / "results.csv")


def index_in(names, text):
    return next(n for n, name in enumerate(names) if text.startswith(f"{name} "))


def test_a_lost_device_ends_the_process_and_a_broken_case_does_not(
    tmp_path, interpreted, monkeypatch
):
    made = worker(tmp_path)
    broke, answers = [], lambda self: len(broke) < 2
    monkeypatch.setattr(stages.Worker, "_device_answers", answers)

    def breaks(*_):
        broke.append(True)
        raise RuntimeError("out of memory\nand a long story")

    monkeypatch.setattr(stages, "Prepared", breaks)
    assert made.run() == stages.LOST
    rows = rows_of(tmp_path)
    first = [case.name.split()[0] for case in made.cases[:2]]
    assert list(dict.fromkeys(row["workload"] for row in rows)) == first
    assert {row["gate"] for row in rows} == {"failed"}
    assert {row["note"] for row in rows} == {"RuntimeError: out of memory"}
    assert TORCH not in {row["provider"] for row in rows}
    # The file names what cost the device, for whoever begins again behind it.
    now = json.loads(stages.now_path(tmp_path, "sweep").read_text())
    assert (now["index"], now["begin"], now["done"]) == (1, 1, [])


@pytest.mark.parametrize("provider", ["fusedrnn", "eager loop"])
def test_whoever_costs_the_device_is_named(provider, tmp_path, interpreted, monkeypatch):
    """By the file, as the next one asks whether the device still answers."""
    made = worker(tmp_path)
    made.todo = [index_of(made, "H256-B16-fp32 lstm")]
    monkeypatch.setattr(stages.Worker, "_device_answers", lambda self: self.now[1] != provider)
    assert made.run() == stages.LOST
    now = json.loads(stages.now_path(tmp_path, "sweep").read_text())
    assert now["provider"] == provider
    # A peer's case will be done again without it; a case that breaks in our hands is told.
    assert {row["gate"] for row in rows_of(tmp_path)} == ({"failed"} if provider in CORE else set())
    job = gpu._without(made.job, now)
    assert job.lost == (set() if provider in CORE else {provider})
    assert (now["index"] in job.skip) == (provider in CORE)


def test_a_training_that_breaks_leaves_the_times(tmp_path, interpreted, monkeypatch):
    def breaks(*_):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(stages, "trained", breaks)
    made = worker(tmp_path, "lessons")
    made.do([index_of(made, "sine-10 gru")])
    assert made.red == ["sine-10 gru: training: no such luck"]
    assert {r["provider"] for r in rows_of(tmp_path) if r["fw_ms"]} >= {TORCH, "fusedrnn"}
