"""The language of the text lesson, and its samples."""

from __future__ import annotations

import csv
import re
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import fusedrnn
from bench import text
from bench.providers import TORCH
from bench.results import FolderError

CPU = torch.device("cpu")
SENTENCE = re.compile(r"[a-z]+( [a-z]+)+\.")


# The language


def test_the_text_is_the_seeds():
    """Sentences of small letters, one a line; another seed is another text."""
    first = text.generate(3_000, seed=1)
    assert first == text.generate(3_000, seed=1)
    assert first != text.generate(3_000, seed=2)
    assert 3_000 <= len(first) < 3_100
    assert all(SENTENCE.fullmatch(line) for line in first.splitlines())


def test_verbs_agree_sums_are_true_and_winds_bring_their_own():
    singular, plural = set(text.ANIMALS), set(text.ANIMALS.values())
    seen = dict.fromkeys(("animals", "weather", "sum"), 0)
    for line in text.generate(20_000).splitlines():
        words = line.rstrip(".").split()
        if "make" in words:
            seen["sum"] += 1
            first, second, total = (text.NUMBERS.index(words[i]) for i in (0, 2, 4))
            assert first + second == total
        elif "wind" in words:
            seen["weather"] += 1
            assert text.WINDS[words[-3]] == words[-1]
        else:
            seen["animals"] += 1
            one = words[0] in ("the", "one")
            assert words[2] in (singular if one else plural)
            assert words[3] in (text.VERBS.values() if one else text.VERBS.keys())
    assert min(seen.values()) > 100


@pytest.mark.parametrize(
    ("sample", "share"),
    [
        ("the cat sleeps.\nthe ", 1.0),
        ("the cet sleeps. ", 2 / 3),
        ("thecat.\nsleeps the.c", 2 / 3),
        ("zzz zz ", 0.0),
        ("catcatcat", 0.0),
        ("", 0.0),
    ],
)
def test_known_words(sample, share):
    """What follows the last blank is cut off, and counts neither way."""
    assert text.known_words(sample, "the cat sleeps.\n") == pytest.approx(share)


# The lesson


CORPUS = text.Text.of(text.generate(2_000))


@pytest.fixture
def model():
    return text.build(text.OURS, len(CORPUS.alphabet), text.QUICK, seed=0)


def test_both_start_alike_and_learn_alike():
    """One operator behind both on the CPU: no curve may leave the other."""
    sizes, ids = replace(text.QUICK, steps=40), CORPUS.ids
    models = [
        text.build(provider, len(CORPUS.alphabet), sizes, 3) for provider in (TORCH, text.OURS)
    ]
    assert type(models[0].rnn) is nn.LSTM
    assert type(models[1].rnn) is fusedrnn.LSTM
    for theirs, ours in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(theirs, ours)
    first, second = (text.fit(model, ids, sizes, 3, CPU) for model in models)
    assert len(first.losses) == sizes.steps
    assert first.losses == pytest.approx(second.losses, abs=1e-5)
    assert first.losses[-1] < first.losses[0]


def test_batches_are_windows_of_the_text():
    ids = torch.arange(100)
    batch = next(text.batches(ids, text.QUICK, seed=0))
    assert batch.shape == (text.QUICK.T + 1, text.QUICK.B)
    assert torch.equal(batch[1:], batch[:-1] + 1)


def test_samples_are_the_seeds_and_cold_ones_are_greedy(model):
    """Near temperature 0 every row writes what the module itself finds likeliest."""
    first = text.write(model, CORPUS, 1.0, text.QUICK, 5, CPU)
    assert first == text.write(model, CORPUS, 1.0, text.QUICK, 5, CPU)
    assert first != text.write(model, CORPUS, 1.0, text.QUICK, 6, CPU)
    assert [len(sample) for sample in first] == [text.QUICK.sample] * text.QUICK.rows
    cold = text.write(model, CORPUS, 1e-4, text.QUICK, 5, CPU)
    ids = [CORPUS.alphabet.index("\n")]
    for _ in range(text.QUICK.sample):
        ids.append(int(model(torch.tensor(ids).unsqueeze(1))[-1, 0].argmax()))
    assert cold[0] == "".join(CORPUS.alphabet[i] for i in ids[1:])
    assert len(set(cold)) == 1


@pytest.mark.parametrize("way", text.WAYS)
def test_every_way_takes_the_same_steps(way, model):
    """By the stream and by hand; the state is carried from call to call."""
    step = text.stepper_of(model, way)
    inputs = torch.randn(5, 1, text.QUICK.embedding)
    with torch.no_grad():
        torch.testing.assert_close(torch.stack([step(x) for x in inputs]), model.rnn(inputs)[0])


def test_the_whole_lesson_in_small(tmp_path, capsys):
    assert text.run(tmp_path, quick=True, seed=0, device=CPU) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert max(map(len, out.replace(str(tmp_path), "").splitlines())) <= 100
    for part in ("loss     torch.nn", "loss     fusedrnn", "temperature 1.5", *text.WAYS):
        assert part in out
    with open(tmp_path / "text.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    values = {(line["measure"], line["name"], line["step"]): line["value"] for line in lines}
    for way in text.WAYS:
        assert float(values["whole_loop_tokens_per_s", way, ""]) > 0
        assert float(values["rnn_alone_speedup", way, ""]) > 0
    assert float(values["whole_loop_speedup", text.WAYS[0], ""]) == 1
    assert {step for what, _, step in values if what == "loss"} == set("0123")
    assert 0 <= float(values["known_words", "temperature 1.5", ""]) <= 1


def test_the_picture_needs_matplotlib_and_nothing_else_does(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert text.run(tmp_path, quick=True, seed=0, device=CPU) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"text.csv"}
    monkeypatch.undo()
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    text.draw(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".png"}


def test_a_stream_that_goes_astray_is_exit_code_1(tmp_path, capsys, monkeypatch):
    astray = text.Stream.__call__
    monkeypatch.setattr(text.Stream, "__call__", lambda self, x: astray(self, x) + 1e-3)
    assert text.run(tmp_path, quick=True, seed=0, device=CPU) == 1
    assert "Stream is 1.0e-03 from one run over the sequence" in capsys.readouterr().err


def test_a_folder_that_cannot_be(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "DEFAULT_FOLDER", tmp_path / "local")
    (tmp_path / "file").touch()
    with pytest.raises(FolderError, match="no results can be written to"):
        text.folder_for(tmp_path / "file")
    assert text.folder_for(tmp_path / "a" / "b").is_dir()
    assert text.folder_for(None) == tmp_path / "local"
