"""``python -m bench cpu``: the tables are complete; ``--quick`` measures nothing."""

import csv

import torch

from bench import __main__ as main_module
from bench.cases import named
from bench.memory import kept


def test_every_case_cell_and_pass_has_a_row(tmp_path, capsys):
    assert main_module.main(["cpu", "--quick", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    with (tmp_path / "cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {(row["case"], row["cell"], row["what"]) for row in rows}
    lessons = named("lessons")
    for workload in lessons:
        for cell in ("lstm", "gru", "rnn"):
            assert {(workload.name, cell, what) for what in ("forward", "training")} <= found
    assert {row["backend"] for row in rows} == {"aten", "torch", "stream"}
    assert all(float(row["x"]) > 0 and float(row["torch_ms"]) > 0 for row in rows)
    assert "lstm training: geometric mean" in said
    with (tmp_path / "memory.csv").open() as file:
        memory = list(csv.DictReader(file))
    assert len(memory) == 2 * len(lessons)
    assert all(float(m["recompute_MiB"]) <= float(m["default_MiB"]) for m in memory)
    with (tmp_path / "host.csv").open() as file:
        host = list(csv.DictReader(file))
    assert [row["cell"] for row in host] == ["lstm", "gru", "rnn"]
    assert all(float(h["fwd_launch_us"]) < float(h["fwd_whole_us"]) for h in host)
    assert all(0 < float(h["bwd_launch_us"]) < float(h["bwd_whole_us"]) for h in host)


def test_kept_bytes_are_those_of_saved_storages():
    """Of y = tanh(x W^T + b) autograd keeps y; x and the weights are not counted."""
    module, x = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh()), torch.randn(3, 4)
    assert kept(module, x) == 3 * 8 * 4


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main_module.main(["cpu", "--quick", "--out", str(tmp_path / "file")]) == 2
    said = capsys.readouterr().err
    assert "no results can be written to" in said
    assert said.count("\n") == 1
