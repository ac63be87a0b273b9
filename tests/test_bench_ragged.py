"""`python -m bench ragged`: its gate and its table."""

import csv

import torch

import bench.__main__ as main_module
from bench import ragged

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
