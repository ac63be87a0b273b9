"""The lessons in tiny sizes, and what each of them claims."""

import pytest
import torch

import fusedrnn
from bench import data, models
from bench.__main__ import main
from bench.lessons import by_hand, command, sine


@pytest.mark.parametrize("name", command.LESSONS)
def test_every_lesson_runs_and_says_what_to_look_at(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(data, "load", lambda *_, **__: data.generate(200, 200))
    threads = torch.get_num_threads()
    assert main(["lesson", name, "--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{name}: ")
    assert "\nLook at: " in printed
    assert torch.get_num_threads() == threads
    if "Picture: " in printed:
        assert (tmp_path / f"lesson-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_lessons_are_listed(capsys):
    assert main(["lesson"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(command.LESSONS)


def test_a_forecast_that_is_fed_back_sees_one_window_of_the_test_part():
    inputs, targets = torch.tensor([[9.0, 9.0], [1.0, 2.0], [7.0, 7.0]])[..., None], torch.zeros(3)
    examples = models.Examples(inputs, torch.full((3,), 2), targets, known=1)
    made = sine.fed_back(lambda batch: batch.inputs[:, 0, 0] + 10 * batch.inputs[:, 1, 0], examples)
    assert made.tolist() == [21, 212]


@torch.no_grad()
def test_the_step_by_hand_is_that_of_the_lstm():
    """That of the GRU is the one that all GRUs are compared with, in ``models.py``."""
    lstm, x, h, c = fusedrnn.LSTMCell(3, 5), torch.randn(2, 3), torch.randn(2, 5), torch.randn(2, 5)
    *_, h_1, c_1 = by_hand.lstm_step(x, h, c, *lstm.parameters())
    torch.testing.assert_close((h_1, c_1), lstm(x, (h, c)))


@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize(("layers", "bidirectional"), [(1, False), (2, True)])
def test_the_formula_counts_the_parameters(cell, layers, bidirectional):
    module = getattr(fusedrnn, cell)(7, 5, layers, bidirectional=bidirectional)
    counted = sum(parameter.numel() for parameter in module.parameters())
    assert by_hand.parameters(cell, 7, 5, layers, 1 + bidirectional) == counted
