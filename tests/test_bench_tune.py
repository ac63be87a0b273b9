"""``python -m bench tune``, with the interpreter in place of a GPU."""

import argparse
import csv

import pytest
import torch

from bench import UserError, tune
from fusedrnn.kernels import plan as planning
from fusedrnn.kernels.plan import *  # noqa: F403, for the names in a printed entry


def options(tmp_path, device="cpu"):
    case = "many-to-one"
    return argparse.Namespace(device=device, out=tmp_path, seed=0, names=case, minutes=0.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs without a GPU only")
def test_every_entry_is_a_candidate_and_every_candidate_has_a_row(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune, "MOST", 2)
    assert tune.run(options(tmp_path)) == 0
    entries = eval("{" + capsys.readouterr().out + "}", vars(planning) | {"torch": torch})
    assert {key[2].needs_grad for key in entries} == {True, False}
    for (_, _, problem), measured in entries.items():
        plans = planning.candidates(problem, planning.chip_of(torch.device("cpu")))
        tiles = [(p.schedule, p.forward, p.backward) for p in plans]
        assert (measured.schedule, measured.forward, measured.backward) in tiles
        assert measured.us > 0
        assert measured.torch_us > 0
    with open(tmp_path / "tune.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["pass"], row["gate"]) for row in rows} == {("forward", "ok"), ("training", "ok")}


def test_without_a_gpu_or_the_interpreter_it_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="needs a CUDA device"):
        tune.run(options(tmp_path))
