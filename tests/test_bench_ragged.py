"""`python -m bench ragged`: its gate and its table."""

import csv

import pytest
import torch

import bench.__main__ as main_module
from bench import ragged
from bench.disk import whole_rows

CPU = torch.device("cpu")


def test_the_table(tmp_path, capsys):
    assert main_module.main(["ragged", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    with open(tmp_path / "ragged.csv") as file:
        lines = list(csv.DictReader(file))
    assert {line["cell"] for line in lines} == {"lstm", "gru", "rnn"}
    assert {line["provider"] for line in lines} == set(ragged.PROVIDERS)
    for line in lines:
        assert line["gate"] == "ok"
        assert float(line["share"]) <= 1
        assert float(line["fwbw_ms_p20"]) <= float(line["fwbw_ms"]) <= float(line["fwbw_ms_p80"])
    by_name = {(line["cell"], line["provider"]): line for line in lines}
    assert by_name["gru", "torch.nn packed"]["fw_x_packed"] == "1.0"
    assert by_name["gru", "fusedrnn lengths"]["backend"] == "torch"
    assert "gru  fusedrnn lengths" in capsys.readouterr().out


def test_a_red_gate_has_no_times(tmp_path, monkeypatch, capsys):
    """One step too few of each sequence."""

    def shorter(problem):
        return problem.ours, problem.input, {"lengths": problem.on_device - 1}

    monkeypatch.setitem(ragged.PROVIDERS, "fusedrnn lengths", shorter)
    assert ragged.run(tmp_path, CPU, quick=True) == 1
    with open(tmp_path / "ragged.csv") as file:
        lines = [x for x in csv.DictReader(file) if x["provider"] == "fusedrnn lengths"]
    assert [line["gate"] for line in lines] == ["red"] * 3
    assert not any(line["fw_ms"] for line in lines)


def test_rows_are_on_disk_before_the_next_cell_is_measured(tmp_path, monkeypatch):
    seen = []

    def timed(problem, names, *rest, timed=ragged.timed):
        seen.append([row["cell"] for row in whole_rows(tmp_path / "ragged.csv")])
        if len(seen) == 6:
            raise KeyboardInterrupt
        return timed(problem, names, *rest)

    (tmp_path / "ragged.csv").write_text("of,an,older,run\n")
    monkeypatch.setattr(ragged, "timed", timed)
    with pytest.raises(KeyboardInterrupt):
        ragged.run(tmp_path, CPU, quick=True)
    lstm, gru = (["lstm"] * 4, ["gru"] * 4)
    assert seen == [[], [], lstm, lstm, lstm + gru, lstm + gru]
    # A run of the GPU's stages goes on in the file that is there.
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        ragged.run(tmp_path, CPU, quick=True, anew=False)
    assert seen[0] == lstm + gru


def test_what_is_differentiated_is_weights_and_input():
    """As in every other command, for the workload has something trainable before the RNN."""
    problem = ragged.make("gru", ragged.QUICK, CPU, torch.float32)
    for name in ragged.PROVIDERS:
        gradients = ragged.call(problem, name, "fwbw")()
        assert len(gradients) == 4 + 1
        assert gradients[-1].abs().sum() > 0
        output, _ = ragged.call(problem, name, "fw")()
        assert not output.data.requires_grad


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    argv = ["ragged", "--quick", "--device", "cpu", "--out", str(tmp_path / "file")]
    assert main_module.main(argv) == 2
    said = capsys.readouterr().err
    assert "no results can be written to" in said
    assert said.count("\n") == 1
