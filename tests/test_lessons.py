"""The lessons' numbers: each must show what its sentence says, and be its seed's."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from needs import needs

import fusedrnn
from bench.__main__ import main
from bench.archives import Reviews
from bench.cases import EMBEDDING, ONE_HOT, PRICE
from bench.imdb import Corpus, generate, padded
from bench.lessons import (
    by_hand,
    forecasts,
    gates,
    page,
    parameters,
    reviews,
    temperature,
    vanishing,
)
from bench.lessons.command import LESSONS, listing, one_thread, picture, run
from bench.lessons.lesson import LessonError, Setting
from bench.series import Scale, prices


def corpus(count):
    return Corpus(generate(count, count, seed=0), "generated")


QUICK = Setting(quick=True, corpus=corpus)


@pytest.fixture(autouse=True)
def _no_reviews_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.delenv("FUSEDRNN_IMDB", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# The command


def test_without_a_name_they_are_listed(capsys):
    assert main(["lesson"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == list(LESSONS)
    assert max(map(len, said)) <= 100


def test_an_unknown_name_is_exit_code_2(capsys):
    assert main(["lesson", "vanish"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "there is no lesson 'vanish'" in err
    assert listing() in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["numpy", "--out", "{}/file"], "no results can be written to"),
        (["numpy", "--out", "{}", "--figure", "{}/x.gif"], "a figure ends in .png or .svg"),
        (["sentiment", "--out", "{}", "--imdb", "{}/none.npz"], "none.npz cannot be read"),
        (["embeddings", "--out", "{}", "--words", "{}/none.json"], "none.json cannot be read"),
        (["embeddings", "--out", "{}", "--words", "{}/file"], "is no JSON file"),
        (["embeddings", "--out", "{}", "--words", "{}/list"], "is no index of words"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(arguments, sentence, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "list").write_text("[1]")
    assert main(["lesson", "--quick", *(word.format(tmp_path) for word in arguments)]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("name", LESSONS)
def test_equal_seeds_give_equal_files(name, tmp_path, capsys):
    """JSON byte for byte; and what is printed fits a terminal and names the backend."""
    for folder in ("first", "second"):
        assert run(name, QUICK, tmp_path / folder) == 0
    first, second = ((tmp_path / f / f"lesson-{name}.json") for f in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    out, err = capsys.readouterr()
    assert err == ""
    assert "backend  fusedrnn " in out or name == "parameters"
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 120


@pytest.mark.parametrize("name", [name for name in LESSONS if name != "parameters"])
def test_another_seed_gives_other_numbers(name):
    numbers = LESSONS[name].measure(QUICK)
    assert numbers != LESSONS[name].measure(Setting(1, True, corpus))


@pytest.mark.parametrize("name", page.HELD)
def test_the_docs_quote_the_lesson_as_it_is(name):
    """`make lessons-page` writes it anew. Numbers may part by one of the last digit."""
    with one_thread():
        fresh = page.block(name, LESSONS[name].measure(Setting()))
    quoted = page.written(page.PAGE.read_text(encoding="utf-8"), page.begin(name))
    assert len(quoted.splitlines()) > 2
    assert not list(page.drift(quoted, fresh))


def test_a_drift_is_found():
    quoted = "LSTM 1,302 of 4,000: 0.20 to 3.2e-03"
    for same in (
        quoted,
        "LSTM 1,302   of 4,000: 0.21 to 3.1e-03",
        "LSTM 1,302 of 4,000: 0.2 to 3e-03",
    ):
        assert not list(page.drift(quoted, same)), same
    for other in (
        "LSTM 1,303 of 4,000: 0.20 to 3.2e-03", "LSTM 1,302 of 4,000: 0.22 to 3.2e-03",
        "LSTM 1,302 of 4,000: 0.20 to 3.4e-03", "LSTM 1,302 of 4,000: 0.20 to 3.2e-02",
        "GRU 1,302 of 4,000: 0.20 to 3.2e-03", "LSTM 1,302 of 4,000: 0.20", quoted + "\nmore",
    ):  # fmt: skip
        assert len(list(page.drift(quoted, other))) == 1, other
    assert len(list(page.drift(quoted + "\nmore", quoted))) == 1


@needs("matplotlib")
def test_the_page_is_written_between_its_comments(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, "DEFAULT_FOLDER", tmp_path)
    committed = page.PAGE.read_text(encoding="utf-8")
    assert set(page.rows(committed)) == set(LESSONS)
    spoilt = page.put(committed, page.begin("parameters"), "```\nstale\n```\n")
    copy = tmp_path / "lessons.md"
    copy.write_text(spoilt, encoding="utf-8")
    assert page.renew(["parameters"], copy, tmp_path) == 0
    renewed = copy.read_text(encoding="utf-8")
    quoted = page.written(committed, page.begin("parameters"))
    assert page.written(renewed, page.begin("parameters")) == quoted
    # Nothing else is, but for the lesson's row: where and when.
    assert page.rows(renewed) | {"parameters": ""} == page.rows(committed) | {"parameters": ""}
    assert page.put(renewed, page.TABLE, "") == page.put(committed, page.TABLE, "")
    assert (tmp_path / "parameters.svg").read_text().startswith("<?xml")
    with pytest.raises(ValueError, match="has no line"):
        page.put(committed, page.begin("another"), "")


@needs("matplotlib")
def test_wrong_numbers_are_not_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, "DEFAULT_FOLDER", tmp_path)
    monkeypatch.setitem(parameters.GATES, "gru", 4)
    copy = tmp_path / "lessons.md"
    copy.write_text(before := page.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    assert page.renew(["parameters"], copy, tmp_path) == 1
    assert copy.read_text(encoding="utf-8") == before


def test_a_backend_that_cannot_is_one_sentence(tmp_path, capsys):
    with fusedrnn.use_backend("aten"):
        assert main(["lesson", "gates", "--quick", "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("python -m bench lesson: gates cannot be run so: backend 'aten': ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", LESSONS)
def test_the_docs_have_its_section_and_its_picture(name):
    docs = Path(__file__).parent.parent / "docs"
    section = (docs / "lessons.md").read_text().partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    assert page.begin(name) in section
    assert f"![{name}](figures/lessons/{name}.svg)" in section
    assert "Look at `" in section
    picture = (docs / "figures" / "lessons" / f"{name}.svg").read_text()
    assert len(picture) < 100_000
    assert "<dc:date>" not in picture


@needs("matplotlib")
def test_a_picture_is_its_numbers_alone(tmp_path):
    numbers = LESSONS["vanishing"].measure(QUICK)
    files = [tmp_path / name for name in ("a.svg", "b.svg", "c.png")]
    for file in files:
        assert picture(LESSONS["vanishing"], numbers, file) == str(file)
    svg = files[0].read_text()
    assert svg == files[1].read_text()
    assert "<svg" in svg
    assert "date" not in svg
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_are_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("vanishing", QUICK, tmp_path) == 0
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
    assert "no picture: matplotlib is not installed" in capsys.readouterr().out


# Vanishing gradients


@pytest.fixture(scope="module")
def ratios():
    return vanishing.measure(Setting())["ratios"]


def test_an_open_gate_carries_the_gradient_and_an_rnn_does_not(ratios):
    """f = sigmoid(3) = 0.953 leaves 0.09 after 49 steps; W_hh of norm near 0.6 leaves 1e-11."""
    assert ratios["RNN"]["50"] < 1e-10
    assert ratios["LSTM f open"]["50"] > 1e-2
    assert ratios["GRU z open"]["50"] > 1e-2


def test_gates_half_open_forget_too_but_less(ratios):
    for name in ("LSTM", "GRU"):
        assert ratios["RNN"]["50"] * 100 < ratios[name]["50"] < 1e-5


def test_the_gradients_are_those_of_finite_differences():
    """Of the norm over I at the first step, in fp64 by central differences."""
    torch.manual_seed(0)
    rnn = fusedrnn.RNN(vanishing.I, vanishing.H)
    T, step = 4, 1e-5
    norms = vanishing.gradient_norms(rnn, T, seed=7)
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(T, vanishing.B, vanishing.I, generator=generator).double()
    direction = torch.randn(vanishing.H, generator=generator).double()
    rnn.double()
    slopes = torch.zeros(T, vanishing.B, vanishing.I, dtype=torch.float64)
    with torch.no_grad():
        for t in range(T):
            for i in range(vanishing.I):
                ahead, behind = x.clone(), x.clone()
                ahead[t, :, i] += step
                behind[t, :, i] -= step
                rise = (rnn(ahead)[1][0] - rnn(behind)[1][0]) @ direction
                slopes[t, :, i] = rise / (2 * step)
    assert norms == pytest.approx(slopes.norm(dim=-1).mean(1).tolist(), rel=1e-4)


# Forecasts


def test_every_cell_learns_the_sine(monkeypatch):
    monkeypatch.setattr(forecasts, "STEPS", 60)
    numbers = forecasts.measure_curves(Setting())
    for cell, losses in numbers["losses"].items():
        assert len(losses) == 60
        assert numbers["final_loss"][cell] < losses[0] / 20
        assert numbers["test_rmse"][cell] < 0.2  # always saying 0 has 0.71


def test_the_error_falls_with_the_length_while_training_is_short(monkeypatch):
    """After 100 steps: 0.0075 at T = 10, 0.0031 at T = 100, of two starts."""
    for name, value in (("CELLS", ("lstm",)), ("LENGTHS", (10, 100)), ("STARTS", 2)):
        monkeypatch.setattr(forecasts, name, value)
    monkeypatch.setattr(forecasts, "STEPS", 100)
    errors = forecasts.measure_lengths(Setting())["test_rmse"]["lstm"]
    assert {T: len(set(of)) for T, of in errors.items()} == {"10": 2, "100": 2}
    assert sum(errors["100"]) < 0.7 * sum(errors["10"])
    assert max(errors["10"] + errors["100"]) < 0.03  # always saying 0 has 0.71


def test_errors_are_in_the_units_given():
    errors = forecasts.errors_of(torch.tensor([1.0, 2.0, 7.0]), torch.tensor([2.0, 2.0, 4.0]))
    assert errors == pytest.approx({"mae": 4 / 3, "rmse": math.sqrt(10 / 3)})


def test_the_price_is_scaled_by_what_is_known_and_back():
    series = prices(seed=0)
    scale = Scale.of(series, 100)
    assert (scale.low, scale.high) == (series[:100].min(), series[:100].max())
    torch.testing.assert_close(scale.invert(scale.apply(series)), series)
    altered = series.clone()
    altered[100:] += 1000
    assert Scale.of(altered, 100) == scale


def test_the_price_forecast_beats_the_mean_in_its_own_units():
    numbers = forecasts.measure_price(Setting())
    series = prices(seed=0)
    # Windows of the fp32 scaled series come back as prices: eps of 6e-8 of some hundred.
    expected = series[numbers["days"]].tolist()
    assert numbers["true"] == pytest.approx(expected, abs=1e-4)
    known = numbers["days"][0]
    assert numbers["scale"]["high"] == series[:known].max().item()
    for errors in numbers["errors"].values():
        assert 0 < errors["mae"] <= errors["rmse"]
    ours, average = numbers["errors"]["LSTM"], numbers["errors"]["mean of training"]
    assert ours["mae"] < average["mae"] / 2
    assert ours["rmse"] > 3  # the noise's deviation: less would be the training part


# Parameters


def test_parameters_by_hand():
    """One layer: 4 * 16 * (300 + 16 + 2). Two both ways: the second reads 256."""
    assert parameters.by_formula("lstm", ONE_HOT) == 4 * 16 * 318
    both = 2 * 3 * 128 * (64 + 128 + 2) + 2 * 3 * 128 * (256 + 128 + 2)
    assert parameters.by_formula("gru", EMBEDDING) == both
    assert parameters.by_formula("rnn", PRICE) == 50 * (1 + 50 + 2) + 50 * (50 + 50 + 2)


def test_parameters_by_module_are_those_of_the_formula(monkeypatch):
    numbers = parameters.measure(Setting())
    assert numbers["formula"] == numbers["module"]
    assert parameters.fault(numbers) == ""
    monkeypatch.setitem(parameters.GATES, "gru", 4)
    assert "disagree" in parameters.fault(parameters.measure(Setting()))


# Reviews


def test_the_matrix_counts_truth_by_row():
    logits = torch.tensor([-1.0, 2.0, 3.0, -4.0, 5.0, -6.0])
    targets = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    assert reviews.confusion(logits, targets) == [[2, 2], [1, 1]]
    scores = reviews.scores([[2, 2], [1, 1]])
    assert scores == pytest.approx({"accuracy": 1 / 2, "precision": 1 / 3, "recall": 1 / 2})
    assert reviews.scores([[3, 0], [1, 0]])["precision"] is None
    assert reviews.scores([[3, 1], [0, 0]])["recall"] is None


def test_the_classifier_learns_and_is_counted_whole(monkeypatch):
    small = {"T": 60, "H": 16, "vocabulary": 300, "train": 3_000, "test": 300, "steps": 140}
    workload = reviews.replace(reviews.WORKLOAD, **small)
    monkeypatch.setattr(reviews, "WORKLOAD", workload)
    numbers = reviews.measure_sentiment(Setting(corpus=corpus))
    matrix = numbers["confusion"]
    assert sum(map(sum, matrix)) == numbers["test"] == 300
    # Half of all are good: guessing has 0.5, with a deviation of 0.029.
    assert numbers["accuracy"] > 0.5 + 3 * 0.029
    assert numbers["accuracy"] == (matrix[0][0] + matrix[1][1]) / 300


def test_the_longest_embeddings_are_listed(tmp_path):
    index = tmp_path / "words.json"
    index.write_text(json.dumps({f"w{rank}": rank for rank in range(1, 400)}))
    numbers = reviews.measure_embeddings(Setting(0, True, corpus, index))
    norms = numbers["norms"]
    listed = [line["norm"] for line in numbers["largest"]]
    assert listed == sorted(norms, reverse=True)[:5]
    for line in numbers["largest"]:
        assert norms[line["token"]] == line["norm"]
        assert line["name"] in ("<start>", "<rare>", f"w{line['token'] - 3}")
    moved = [line["moved"] for line in numbers["moved_most"]]
    assert moved == sorted(moved, reverse=True)
    assert moved[0] > 0
    assert norms[0] == 0  # of padding


def test_a_token_is_named_by_the_rank_it_was_made_of():
    ranks = torch.tensor([1, 2, 250, 400], dtype=torch.int32)
    one = Reviews(ranks, torch.tensor([0, 4]), torch.ones(1, dtype=torch.uint8))
    (tokens,), _ = padded(one, vocabulary=300, length=6)
    names = [reviews.name_of(token, {}) for token in tokens.tolist()]
    ranked = [f"word of rank {rank}" for rank in (1, 2, 250)]
    assert names == ["<start>", *ranked, "<rare>", "<pad>"]


def test_reviews_with_a_token_are_counted_once_each():
    examples = SimpleNamespace(
        inputs=torch.tensor([[1, 4, 4], [1, 5, 4], [1, 5, 5]]),
        targets=torch.tensor([1.0, 0.0, 1.0]),
        known=2,
    )
    count, good = reviews.reviews_with(examples, 6)
    assert count.tolist() == [0, 2, 0, 0, 2, 1]
    assert good.tolist() == [0, 1, 0, 0, 1, 0]


def test_reviews_are_needed():
    with pytest.raises(LessonError, match="was given none"):
        LESSONS["sentiment"].measure(Setting(quick=True))


# Temperature


def test_heat_spreads_the_probabilities():
    numbers = temperature.measure(QUICK)
    found = [numbers["temperatures"][str(t)] for t in (0.5, 1.0, 1.5)]
    bits = [of["entropy_bits"] for of in found]
    assert bits == sorted(bits)
    assert bits[0] < bits[1] < bits[2] < math.log2(len(numbers["alphabet"]))
    for of, power in zip(found, (2.0, 1.0, 1 / 1.5), strict=True):
        plain = torch.tensor(found[1]["next"], dtype=torch.float64) ** power
        assert of["next"] == pytest.approx((plain / plain.sum()).tolist(), abs=1e-12)


# NumPy


@needs("numpy")
def test_numpy_is_the_module_within_1e_5():
    numbers = by_hand.measure(Setting())
    assert len(numbers["difference"]) == by_hand.T
    assert numbers["largest_difference"] <= 1e-5
    assert max(map(abs, numbers["numpy"])) > 0.1


@needs("numpy")
def test_another_gru_is_exit_code_1(tmp_path, capsys, monkeypatch):
    """z and r swapped, as in other layouts."""
    gru = by_hand.gru

    def swapped(x, h, w_ih, w_hh, b_ih, b_hh):
        H = h.shape[-1]
        rows = [*range(H, 2 * H), *range(H), *range(2 * H, 3 * H)]
        return gru(x, h, w_ih[rows], w_hh[rows], b_ih[rows], b_hh[rows])

    monkeypatch.setattr(by_hand, "gru", swapped)
    assert run("numpy", QUICK, tmp_path) == 1
    assert "from the module" in capsys.readouterr().err


# The gates


def stand_in(module, input, hx=None, gates=False):
    """``LSTM.states`` for one layer, from the equations."""
    w_ih, w_hh, b_ih, b_hh = module.parameters()
    h = c = torch.zeros(input.shape[1], module.hidden_size)
    seen = {name: [] for name in "ifgohc"}
    for x in input:
        i, f, g, o = (x @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * c + i * g
        h = o * c.tanh()
        for name, value in zip("ifgohc", (i, f, g, o, h, c), strict=True):
            seen[name].append(value)
    all_of = {name: torch.stack(values) for name, values in seen.items()}
    return SimpleNamespace(
        output=all_of["h"],
        h=[[all_of["h"]]],
        c=[[all_of["c"]]],
        gates=[[{name: all_of[name] for name in "ifgo"}]],
    )


def test_the_gates_are_those_of_the_equations():
    rnn, fc, _ = gates.fit(seed=0, steps=1)
    values = torch.linspace(-1, 1, gates.T)
    seen = gates.watch(rnn, fc, values)
    expected = stand_in(rnn, values.view(-1, 1, 1)).gates[0][0]
    for name, gate in seen["gates"].items():
        torch.testing.assert_close(torch.tensor(gate), expected[name][:, 0].detach())
    with torch.no_grad():
        prediction = fc(rnn(values.view(-1, 1, 1))[0]).flatten()
    torch.testing.assert_close(torch.tensor(seen["prediction"]), prediction)
    assert seen["residual"] < gates.TOLERANCE


def test_training_follows_the_sine():
    _, _, losses = gates.fit(seed=0, steps=60)
    assert losses[-1] < losses[0] / 5


def test_the_gates_in_small():
    seen = gates.measure(QUICK)
    assert len(seen["input"]) == len(seen["target"]) == len(seen["prediction"]) == gates.T
    assert seen["target"][:-1] == seen["input"][1:]
    for name in "ifgo":
        assert [len(row) for row in seen["gates"][name]] == [gates.H] * gates.T
    said = "\n".join(gates.table(seen))
    assert all(title in said for title in gates.GATES.values())


def test_gates_of_another_run_are_exit_code_1(tmp_path, capsys, monkeypatch):
    def swapped(*args, **kwargs):
        states = stand_in(*args, **kwargs)
        (all_gates,) = states.gates[0]
        all_gates["i"], all_gates["f"] = all_gates["f"], all_gates["i"]
        return states

    monkeypatch.setattr(fusedrnn.LSTM, "states", swapped)
    assert run("gates", QUICK, tmp_path) == 1
    assert "from c" in capsys.readouterr().err
