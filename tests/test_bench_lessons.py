"""The lessons in tiny sizes, and what each of them claims."""

import argparse

import pytest
import torch

import fusedrnn
from bench import data
from bench.cases import TRAINED
from bench.lessons import by_hand, command, parameters, reviews
from bench.providers import build


def options(tmp_path, name, **given):
    shared = {"out": tmp_path, "seed": 0, "quick": True, "imdb": None, "download": False}
    return argparse.Namespace(**shared | {"name": name, "figure": None} | given)


@pytest.mark.parametrize("name", command.LESSONS)
def test_every_lesson_runs_and_says_what_to_look_at(tmp_path, monkeypatch, capsys, name):
    monkeypatch.delenv("FUSEDRNN_IMDB", raising=False)
    monkeypatch.setattr(data, "load", lambda *_, **__: data.generate(200, 200))
    threads = torch.get_num_threads()
    assert command.run(options(tmp_path, name)) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{name}: ")
    assert "\nLook at: " in printed
    assert torch.get_num_threads() == threads
    if "Picture: " in printed:
        assert (tmp_path / f"lesson-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_lessons_are_listed(tmp_path, capsys):
    assert command.run(options(tmp_path, None)) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(command.LESSONS)


@torch.no_grad()
def test_the_lstm_by_hand_is_the_module():
    module = fusedrnn.LSTM(3, 5)
    x, h, c = torch.randn(2, 3), torch.randn(2, 5), torch.randn(2, 5)
    *_, h_1, c_1 = by_hand.lstm_step(x, h, c, *module.parameters())
    _, (want_h, want_c) = module(x[None], (h[None], c[None]))
    torch.testing.assert_close((h_1, c_1), (want_h[0], want_c[0]))


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("workload", TRAINED, ids=lambda workload: workload.name)
def test_the_formula_counts_the_parameters(cell, workload):
    counted = sum(p.numel() for p in build("fusedrnn", cell, workload).parameters())
    assert parameters.by_formula(cell, workload) == counted


def test_confusion_and_scores():
    logits = torch.tensor([-1.0, 2.0, 3.0, -4.0, 5.0])
    matrix = reviews.confusion(logits, torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0]))
    assert matrix == [[1, 1], [1, 2]]
    assert reviews.scores(matrix) == pytest.approx(
        {"accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3}
    )
