"""The benchmark: the gate bites, times are honest, results survive, errors are clear."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_packed_sequence

import bench.__main__ as main_module
from bench import imdb, plots, providers, run, timing
from bench.cases import (
    CELLS,
    CHARACTER,
    EMBEDDING,
    LESSONS,
    MANY_TO_ONE,
    ONE_HOT,
    PRICE,
    RAGGED,
    SINE,
    TOY_BOTH_WAYS,
    TRAINED,
    WORKLOADS,
    CaseError,
    Workload,
    cut_down,
    every_sweep,
    lessons,
    named,
    sweep,
)
from bench.gate import Gate
from bench.models import MODELS, Examples, examples_of
from bench.progress import Progress
from bench.providers import PROVIDERS, TORCH, Provider
from bench.report import WIDTH, environment, header, table_head, table_line
from bench.results import FolderError, Loss, Results, Row
from bench.run import Settings, Subject, first_steps, measure, random_input
from bench.timing import interleaved, quantile
from bench.train import train

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, seconds=0.0, least_rounds=2)
SMALL = {workload.name: cut_down(workload) for workload in TRAINED}


@pytest.fixture(scope="module")
def corpus() -> imdb.Corpus:
    return imdb.Corpus(imdb.generate(128, 64, seed=0), "generated for a test")


@pytest.fixture
def no_imdb(monkeypatch, tmp_path):
    monkeypatch.delenv("FUSEDRNN_IMDB", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Wrong:
    """torch.nn with a planted bug: a stand-in for the class of an RNN whose numbers are wrong."""

    class LSTM(torch.nn.LSTM):
        def forward(self, input, hx=None):
            output, (h_n, c_n) = super().forward(input, hx)
            return output, (h_n, c_n + (c_n.detach() - c_n))  # the gradient of c_n is lost

    class GRU(torch.nn.GRU):
        def forward(self, input, hx=None):
            output, h_n = super().forward(input, hx)
            return output, h_n * (1 + 1e-5)


@pytest.fixture
def wrong_provider(monkeypatch):
    wrong = Provider(Wrong, PROVIDERS[TORCH].context)
    monkeypatch.setitem(providers.PROVIDERS, "fusedrnn torch", wrong)


# Workloads


def test_the_lessons_are_the_ones_promised():
    assert (ONE_HOT.T, ONE_HOT.B, ONE_HOT.I, ONE_HOT.H, ONE_HOT.layers) == (100, 64, 300, 16, 1)
    assert (ONE_HOT.vocabulary, ONE_HOT.train, ONE_HOT.test) == (300, 15_000, 10_000)
    assert (EMBEDDING.vocabulary, EMBEDDING.I, EMBEDDING.H, EMBEDDING.T) == (20_000, 64, 128, 200)
    assert (EMBEDDING.layers, EMBEDDING.bidirectional, EMBEDDING.dropout) == (2, True, 0.3)
    assert sorted(w.T for w in SINE) == [10, 20, 30, 50, 100]
    assert {(w.I, w.H) for w in SINE} == {(1, 32)}
    assert (PRICE.T, PRICE.H, PRICE.layers, PRICE.dropout, PRICE.B) == (30, 50, 2, 0.2, 32)
    assert len({w.name for w in LESSONS}) == len(LESSONS)
    assert {w.lesson for w in lessons(("imdb",))} == {"imdb"}
    assert {w.lesson for w in lessons(("sine",))} == {"sine"}
    # The main job has every workload of the lessons, also those that nobody trains.
    assert lessons(("all",)) == named("lessons") == LESSONS
    assert {w for w in LESSONS if not w.steps} == {MANY_TO_ONE, TOY_BOTH_WAYS, CHARACTER}
    assert {w for w in LESSONS if w.steps} == set(TRAINED)


def test_the_sweep_covers_sizes_batches_and_dtypes():
    points = list(sweep())
    assert {w.H for w in points} >= {16, 64, 128, 192, 256, 384, 512, 768, 1024, 2048}
    assert {w.B for w in points} == {1, 16, 64, 128, 256}
    assert {w.dtype for w in points} == {"float32", "float16", "bfloat16"}
    assert {w.T for w in points} == {512}
    assert len({w.name for w in points}) == len(points)


def test_every_workload_has_a_name_of_its_own_and_is_found_by_it():
    points = [*WORKLOADS, *every_sweep()]
    assert len({w.name for w in points}) == len(points)
    for name in ("many-to-one", "character", "H64-B16-fp16", "H64-B1-fp32-T4096-packed"):
        assert [w.name for w in named(name)] == [name]
    assert [w.name for w in named("sine-10,character,sine-10")] == ["sine-10", "character"]
    assert {w.H for w in points if w.lesson == "sweep"} >= {16, 2048}
    assert {w.T for w in points if w.lesson == "sweep"} >= {64, 4096}


def test_the_groups():
    lessons_ = {w.name: w for w in named("lessons")}
    assert set(lessons_) >= {"many-to-one", "toy-both-ways", "imdb-one-hot", "imdb-embedding"}
    assert set(lessons_) >= {"price-30", "character", *(f"sine-{T}" for T in (10, 20, 30, 50, 100))}
    assert (lessons_["character"].T, lessons_["imdb-embedding"].B) == (1, 64)
    assert {w.lesson for w in named("sweep")} == {"sweep"}
    assert len(named("sweep")) == len(list(every_sweep()))
    assert all(w.T <= 12 and w.H <= 8 for w in named("smoke"))
    assert {w.name for w in named("smoke")} == {w.name for w in WORKLOADS}


@pytest.mark.parametrize(
    ("name", "near"), [("many-to-on", "many-to-one"), ("sin-20", "sine-20"), ("???", "--list")]
)
def test_an_unknown_case_is_a_sentence_with_those_near(name, near):
    with pytest.raises(CaseError, match=rf"there is no case .*{near}"):
        named(f"sine-10,{name}")


def test_what_is_ragged_is_packed_with_the_longest_of_all_steps():
    packed = random_input(replace(RAGGED, T=7, B=4, I=3), CPU)
    assert len(packed.batch_sizes) == 7
    assert packed.batch_sizes[3] == 4  # nothing is shorter than half
    cut = first_steps(packed, 5)
    padded, lengths = pad_packed_sequence(cut)
    whole, _ = pad_packed_sequence(packed)
    assert torch.equal(padded, whole[:5])
    assert lengths.max() == 5


@pytest.mark.parametrize("workload", SMALL.values(), ids=lambda w: w.name)
def test_models_take_the_batches_of_their_examples(workload, corpus):
    examples = examples_of(workload, corpus, seed=0)
    model = MODELS[workload.task](providers.build(TORCH, "gru", workload), workload)
    batch = examples.batch(torch.arange(workload.B), CPU)
    assert model(batch).shape == batch.targets.shape == (workload.B,)
    features = model.features(batch)
    assert features.data.shape[-1] == workload.I
    assert 0 < examples.known < len(examples.targets)


def test_one_hot_reviews_are_one_hot(corpus):
    workload = SMALL["imdb-one-hot"]
    model = MODELS["one-hot"](providers.build(TORCH, "lstm", workload), workload)
    batch = examples_of(workload, corpus, 0).batch(torch.arange(3), CPU)
    features = model.features(batch)
    assert features.shape == (3, workload.T, 300)
    assert torch.equal(features.argmax(-1), batch.inputs)
    assert features.sum(-1).eq(1).all()


def test_a_forecast_is_tested_on_what_comes_later():
    examples = examples_of(PRICE, None, seed=0)
    assert len(examples.targets) == 500 - 30
    assert examples.known == 376
    last_seen = examples.inputs[examples.known - 1, -1, 0]
    assert last_seen == examples.targets[examples.known - 2]
    known = torch.cat((examples.inputs[: examples.known].flatten(), examples.targets[:376]))
    assert (known.min(), known.max()) == (0, 1)


# The gate


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", ["imdb-one-hot", "imdb-embedding", "price-30"])
def test_the_gate_passes_the_fallback_and_sees_every_tensor(name, cell, corpus):
    workload = SMALL[name]
    subject = Subject(workload, cell, SETTINGS, corpus)
    verdict = Gate(workload, cell, subject.weights, subject.gate_input()).judge("fusedrnn torch")
    assert verdict.ok, verdict.failures
    assert 0 < verdict.share <= 1
    names = [budget.name.replace("rnn.", "") for budget in verdict.budgets]
    states = ["h", "c"] if cell == "lstm" else ["h"]
    expected = {"output", "d_input", *(f"{s}_n" for s in states), *(f"d_{s}_0" for s in states)}
    expected |= {f"d_{name}" for name in subject.weights}
    assert set(names) == expected


@pytest.mark.parametrize(("cell", "culprit"), [("lstm", "d_c_0"), ("gru", "h_n")])
def test_a_red_gate_shows_no_speed(cell, culprit, wrong_provider):
    measured = measure(SMALL["sine-20"], cell, SETTINGS)
    row = measured.rows[-1]
    assert (row.provider, row.gate) == ("fusedrnn torch", "red")
    assert row.share > 1
    assert row.fw_ms is row.fwbw_ms is row.final_loss is None
    assert any(culprit in line for line in measured.complaints)
    assert "no speed is shown" in table_line(row)
    assert not any(loss.provider == row.provider for loss in measured.losses)
    assert [r.gate for r in measured.rows[:2]] == ["yardstick", "ok"]


def test_a_provider_that_refuses_says_why(monkeypatch):
    monkeypatch.setattr(run, "names_for", lambda *_: (TORCH, "fusedrnn triton"))
    measured = measure(replace(tiny_sweep(), dtype="bfloat16"), "lstm", SETTINGS)
    assert measured.rows[1].gate == "refused"
    assert "Triton's interpreter multiplies the bit patterns" in table_line(measured.rows[1])
    assert not measured.complaints


# Times


def test_every_contender_is_timed_in_every_round():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = interleaved(calls, CPU, seconds=0.0, least=4)
    assert order[:3] == list("abc")  # warm-up, of one round where there is no time
    assert order[3:] == list("abcbcacababc")
    assert [t.rounds for t in times.values()] == [4, 4, 4]
    assert times["a"].speedup == 1


def test_ratios_are_medians_of_ratios(monkeypatch):
    clock = iter([1.0, 2.0, 8.0, 4.0, 2.0, 3.0])  # a b, b a, a b
    monkeypatch.setattr(timing, "_cpu_clock", lambda call: next(clock))
    calls = {"a": lambda: None, "b": lambda: None}
    times = interleaved(calls, CPU, seconds=0.0, least=3)
    # a: 1, 4, 2; b: 2, 8, 3: the machine slept in the second round, and the ratio stands.
    assert times["a"].p50 == 2
    assert times["b"].p50 == 3
    assert times["b"].speedup == 0.5


def test_a_slow_call_gets_the_least_and_a_fast_one_no_more_than_most():
    calls = {"a": lambda: None}
    assert interleaved(calls, CPU, seconds=0.0, least=3)["a"].rounds == 3
    assert interleaved(calls, CPU, seconds=60.0, most=7)["a"].rounds == 7


def test_quantiles_interpolate():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2
    assert quantile([0.0, 10.0], 0.2) == 2
    assert quantile([5.0], 0.8) == 5


def test_what_is_timed_is_forward_and_backward(corpus):
    workload = SMALL["imdb-embedding"]
    subject = Subject(workload, "lstm", SETTINGS, corpus)
    output, _ = subject.call("fusedrnn", "fw")()
    assert not output.data.requires_grad
    gradients = subject.call("fusedrnn", "fwbw")()
    assert len(gradients) == 1 + 4 * workload.layers * 2
    assert gradients[-1].shape == subject.input.data.shape
    one_hot = Subject(SMALL["imdb-one-hot"], "gru", SETTINGS, corpus)
    assert len(one_hot.call("fusedrnn", "fwbw")()) == 4  # nothing trainable stands before it


# Training


def test_training_learns_and_both_start_alike(corpus):
    workload = replace(SMALL["sine-20"], H=16, B=16, T=20, steps=60)
    subject = Subject(workload, "gru", SETTINGS)
    ticks = []
    ours = subject.train("fusedrnn torch", lambda: ticks.append(1))
    theirs = subject.train(TORCH, lambda: None)
    assert len(ticks) == len(ours.losses) == 60
    assert ours.losses[0] == pytest.approx(theirs.losses[0], rel=1e-5)
    assert max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True)) < 1e-4
    assert ours.final_loss < ours.losses[0] / 10
    assert ours.metric == pytest.approx(theirs.metric, abs=1e-3)


def test_dropout_is_drawn_alike(corpus):
    subject = Subject(SMALL["price-30"], "lstm", SETTINGS)
    ours, theirs = (subject.train(name, lambda: None) for name in ("fusedrnn torch", TORCH))
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)


def test_accuracy_and_rmse_are_of_the_test_part():
    class Constant(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.value = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, batch):
            return self.value.expand(len(batch.targets))

    targets = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    examples = Examples(torch.zeros(6, 1), torch.ones(6), targets, known=2)
    workload = replace(SMALL["imdb-one-hot"], B=2, learning_rate=0.0)
    assert train(Constant(), workload, examples, 1, CPU, 0).metric == 0.75
    workload = replace(SMALL["sine-20"], B=2, learning_rate=0.0)
    expected = ((3 * 1 + 4) / 4) ** 0.5
    assert train(Constant(), workload, examples, 1, CPU, 0).metric == pytest.approx(expected)


# Results


def a_row(**values) -> Row:
    base = {"backend": "aten", "gate": "ok", "share": 0.25}
    times = {f"{m}_{k}": 12345.6789 for m in ("fw", "fwbw") for k in ("ms", "ms_p20", "ms_p80")}
    return Row.of(EMBEDDING, "lstm", "fusedrnn", **(base | times | values))


def test_the_table_fits_120_columns():
    for row in (
        a_row(fw_speedup=0.011, fwbw_speedup=99.99, final_loss=1e-9, loss_difference=1e-8),
        a_row(metric="accuracy", test=1.0, final_loss=0.6931, loss_difference=0.0),
        a_row(metric="rmse", test=0.0123, gate="red", share=1e9, note="word " * 50),
        a_row(gate="failed", share=None, note="word " * 50),
    ):
        assert len(table_line(row)) <= WIDTH
    assert len(table_head().splitlines()[0]) <= WIDTH
    accuracy = table_line(a_row(metric="accuracy", test=0.7345, final_loss=0.5, fw_speedup=1.0))
    assert "73.4%" in accuracy or "73.5%" in accuracy
    assert "fusedrnn (aten)" in accuracy


def test_the_header_names_device_versions_and_data():
    env = environment(CPU, "made-up reviews")
    text = header(env)
    assert max(map(len, text.splitlines())) <= WIDTH
    for part in ("CPU", torch.__version__, "made-up reviews", f"{torch.get_num_threads()} of"):
        assert part in text
    json.dumps(env)


def test_results_are_on_disk_line_by_line(tmp_path):
    results = Results(tmp_path / "a" / "b", {"device": "x"})
    row = a_row(note='a "quoted", note', test=None)
    results.add([row], [Loss("w", "lstm", "fusedrnn", 0, 0.5)])
    with open(tmp_path / "a" / "b" / "results.csv", newline="") as file:
        (read,) = csv.DictReader(file)
    assert list(read) == list(asdict(row))
    assert (read["note"], read["test"], read["H"]) == ('a "quoted", note', "", "128")
    losses = (tmp_path / "a" / "b" / "losses.csv").read_text().splitlines()
    assert losses == ["workload,cell,provider,step,loss", "w,lstm,fusedrnn,0,0.5"]
    with pytest.raises(FolderError, match="no results can be written"):
        Results(tmp_path / "a" / "b" / "results.csv", {})


def test_pictures_come_from_the_csv_alone(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    results = Results(tmp_path, environment(CPU, "nothing"))
    sweep_rows = [
        Row.of(w, "lstm", provider, backend="", gate="ok", fw_ms=1.0, fw_ms_p20=1.0, fw_ms_p80=1.0)
        for w in list(sweep())[:4]
        for provider in (TORCH, "fusedrnn triton")
    ]
    for row in sweep_rows:
        row.fw_speedup = row.fwbw_speedup = 2.0
    shown = a_row()
    results.add([shown, a_row(gate="red"), *sweep_rows], [Loss("w", "lstm", TORCH, 0, 0.5)])
    assert "PNG" in plots.draw(tmp_path)
    made = sorted(path.name for path in tmp_path.glob("*.png"))
    assert made == ["axes.png", "losses.png", "maps.png", "speed.png", "sweep.png"]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "matplotlib is not installed" in plots.draw(tmp_path)


def test_pictures_show_forward_and_training():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from matplotlib.figure import Figure

    rows = []
    for w in list(sweep())[:6]:
        for provider, backend in ((TORCH, ""), ("fusedrnn triton", "triton")):
            row = Row.of(w, "lstm", provider, backend=backend, gate="ok", fw_ms=1.0, fwbw_ms=3.0)
            row.fw_speedup = row.fw_floor_ms = 0.5
            row.fwbw_speedup = row.fwbw_floor_ms = 1.5
            rows.append({k: "" if v is None else str(v) for k, v in asdict(row).items()})
    drawn = {}
    for name, painter in (("axes", plots._axes), ("maps", plots._maps)):
        figure = Figure()
        painter(figure, rows)
        drawn[name] = [axis.get_title() for axis in figure.axes if axis.has_data()]
    modes = [title.partition(";")[0] for title in drawn["axes"]]
    assert modes == ["forward"] * 3 + ["training"] * 3
    assert {title.partition(":")[0] for title in drawn["maps"]} == {"forward", "training"}
    figure = Figure()
    plots._roofline(figure, [row for row in rows if row["provider"] != TORCH])
    forward, training = (axis.collections[0].get_offsets()[0] for axis in figure.axes)
    assert ([*forward], [*training]) == ([0.5, 1.0], [1.5, 3.0])


def test_progress_is_silent_when_nobody_watches(capsys):
    progress = Progress(10)
    progress.at("work")
    progress.tick()
    progress.say("a line")
    progress.close()
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("a line\n", "")


# The command


def test_the_whole_command_in_small(tmp_path, capsys, no_imdb):
    code = main_module.main(["imdb", "--quick", "--device", "cpu", "--out", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert "generated reviews" in out
    lines = [line for line in out.splitlines() if line.startswith("imdb-one-hot ")]
    assert [line.split()[1] for line in lines] == ["lstm"] * 3 + ["gru"] * 3
    assert max(map(len, out.splitlines())) <= max(WIDTH, len(str(tmp_path)) + 40)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files >= {"results.csv", "losses.csv", "environment.json"}


def test_a_red_gate_is_exit_code_1(tmp_path, capsys, wrong_provider, monkeypatch):
    monkeypatch.setattr(main_module, "lessons", lambda *_: (SMALL["sine-20"],))
    code = main_module.main(["sine", "--quick", "--device", "cpu", "--out", str(tmp_path)])
    assert code == 1
    assert "OVER budget" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["imdb", "--imdb", "missing.npz"], "missing.npz cannot be read"),
        (["sine", "--quick", "--out", "file"], "no results can be written to file"),
        (["sine", "--device", "cuda"], "needs a GPU"),
        (["gpu"], "needs a CUDA device"),
        (["model", "--out", "file/x"], "no results can be written to file/x"),
    ],
)
def test_what_the_user_can_put_right_is_one_sentence(argv, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert main_module.main(argv) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1


# The GPU's run, as far as a CPU can tell


def tiny_sweep() -> Workload:
    return replace(next(iter(sweep(T=4))), B=2, I=3, H=5, dtype="float32")


def test_the_truth_starts_from_the_weights_that_are_tested():
    """Rounded to the case's dtype before the gate makes fp64 of them."""
    subject = Subject(replace(tiny_sweep(), dtype="float16"), "gru", SETTINGS)
    assert {weight.dtype for weight in subject.weights.values()} == {torch.float16}


# The model


def test_the_floor_stands_beside_the_time(monkeypatch, no_imdb):
    """Modelled for the chip that the interpreter stands for; in ms for all T."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(run, "names_for", lambda *_: (TORCH, "fusedrnn triton"))
    workload = tiny_sweep()
    row = measure(workload, "lstm", SETTINGS).rows[1]
    subject = Subject(workload, "lstm", SETTINGS)
    told = subject.explain("fusedrnn triton")
    assert row.plan == "layer 0: resident"
    assert row.fw_floor_ms == pytest.approx(told.floors_us[0] * workload.T / 1000)
    assert row.fwbw_floor_ms == pytest.approx(sum(told.floors_us) * workload.T / 1000)
    assert "layer 0: resident; floor (modelled): 0.0" in table_line(row).splitlines()[1]
    assert all(len(line) <= WIDTH for line in table_line(row).splitlines())


def test_the_table_of_floors(tmp_path, capsys):
    assert main_module.main(["model", "--out", str(tmp_path)]) == 0
    assert "modelled, nothing here is measured" in capsys.readouterr().out
    with open(tmp_path / "modelled.csv") as file:
        lines = list(csv.DictReader(file))
    assert {line["status"] for line in lines} == {"modelled"}
    found = {(x["cell"], x["dtype"], x["H"], x["B"]): x for x in lines}
    large = found["lstm", "bfloat16", "1024", "16"]
    assert (large["schedule"], large["bound"]) == ("cooperative", "sync")
    assert 1.0 < float(large["forward_us"]) < float(large["backward_us"]) < 4.0
    committed = Path(__file__).parent.parent / "docs" / "modelled.csv"
    assert committed.read_text() == (tmp_path / "modelled.csv").read_text()
