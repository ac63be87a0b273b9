"""``python -m bench compare`` and ``plot``: from CSV files alone."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from bench import __main__ as main_module
from bench import comparing, plots
from bench.cases import Workload, sweep
from bench.results import Loss, Results, Row

COMMITTED = Path(__file__).parent.parent / "bench" / "results" / "cpu-2026-11-28"
SMALL = Workload("small", "toy", "none", T=4, B=3, I=5, H=6)


def a_row(provider, ms, spread=0.1, workload=SMALL, **values):
    times = {
        f"{mode}_ms{tail}": ms * factor
        for mode in ("fw", "fwbw")
        for tail, factor in (("", 1), ("_p20", 1 - spread), ("_p80", 1 + spread))
    }
    values = {"backend": "", "gate": "ok"} | times | values
    return Row.of(workload, "lstm", provider, **values)


def written(path, *rows, without=()):
    names = [f.name for f in fields(Row) if f.name not in without]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({k: "" if v is None else v for k, v in asdict(r).items()} for r in rows)
    return str(path)


@pytest.fixture
def compared(tmp_path, capsys):
    """Of files, each a sequence of rows, the last of them the new one."""

    def compare(*files):
        paths = []
        for number, rows in enumerate(files):
            folder = tmp_path / f"run-{number}"
            folder.mkdir(exist_ok=True)
            (folder / "environment.json").write_text("{}")
            paths.append(written(folder / "results.csv", *rows))
        return main_module.main(["compare", *paths]), capsys.readouterr().out

    return compare


def pair(ours, theirs=10.0, spread=0.1, **values):
    """The rows of torch.nn and of fusedrnn."""
    return a_row("torch.nn", theirs, spread), a_row("fusedrnn", ours, spread, **values)


def test_beyond_the_spread_of_several_runs_is_a_regression(compared):
    code, out = compared(pair(5.0), pair(5.5), pair(9.0))
    assert code == 1
    assert "slower   small lstm fusedrnn float32 T4" in out
    assert "2.00 (1.49-2.44) to 1.11 (0.91-1.36) times as fast as torch.nn" in out
    assert "2 ratios: 2 slower, 0 faster, 0 apart, 0 within spread" in out
    code, out = compared(pair(9.0), pair(9.0), pair(5.0))
    assert (code, "2 ratios: 0 slower, 2 faster" in out) == (0, True)


def test_what_old_runs_span_is_none(compared):
    """The new one lies between two of one code, and beyond either's own spread."""
    assert compared(pair(5.0), pair(5.0), pair(8.0))[0] == 1
    code, out = compared(pair(5.0), pair(9.0), pair(7.0, spread=0.01))
    assert (code, "2 within spread" in out) == (0, True)


def test_one_old_run_cannot_tell_a_change_from_the_next_run(compared):
    code, out = compared(pair(5.0), pair(9.0))
    assert code == 0
    assert "apart    small lstm fusedrnn" in out
    assert "a second OLD file tells (docs/benchmarking.md)" in out
    assert "2 ratios: 0 slower, 0 faster, 2 apart, 0 within spread" in out
    # But what is farther than two runs of one code have been.
    code, out = compared(pair(5.0), pair(15.5))
    assert (code, "2 slower" in out) == (1, True)
    code, out = compared(pair(15.5), pair(5.0))
    assert (code, "2 faster" in out) == (0, True)


def test_within_the_spread_is_none(compared):
    code, out = compared(pair(5.0), pair(6.5))
    assert (code, "2 within spread" in out) == (0, True)
    # The same medians, measured more quietly, are one.
    quiet = pair(5.0, spread=0.01)
    assert compared(quiet, quiet, pair(6.5, spread=0.01))[0] == 1


def test_a_slower_machine_is_no_regression(compared):
    """Everything takes three times as long: the ratios stand."""
    assert "2 within spread" in compared(pair(5.0), pair(5.0), pair(15.0, 30.0))[1]
    code, out = compared(pair(5.0), pair(5.0), pair(5.0, 30.0))
    assert (code, "2 faster" in out) == (0, True)


def test_the_ratio_of_the_rounds_counts_where_it_is_there(compared):
    """Not that of the medians."""
    x = {"fw_speedup": 2.1, "fwbw_speedup": 2.2}
    out = compared(pair(5.0, **x), pair(5.0, **x), pair(9.0))[1]
    assert "fw: 2.10 (1.64-2.44) to 1.11" in out
    assert "fwbw: 2.20 (1.64-2.44) to 1.11" in out


def test_device_times_are_compared_by_the_spread_of_the_wall_times(compared):
    def device(ms):
        rows = pair(5.0)
        return [replace(row, fw_device_ms=t) for row, t in zip(rows, (8.0, ms), strict=True)]

    assert "3 within spread" in compared(device(4.0), device(4.0), device(4.5))[1]
    code, out = compared(device(4.0), device(4.0), device(8.0))
    assert code == 1
    (line,) = [line for line in out.splitlines() if line.startswith("slower")]
    assert "fw on the device: 2.00 (1.64-2.44) to 1.00 (0.82-1.22) times as fast" in line
    # Who has none any more is in one file only.
    assert "fw on the device" in compared(device(4.0), pair(5.0))[1]


@pytest.mark.parametrize("what", ["kept_mb", "peak_mb"])
def test_more_memory_is_a_regression(what, compared):
    code, out = compared(
        pair(5.0, **{what: 3.0}), pair(5.0, **{what: 4.0}), pair(5.0, **{what: 4.2})
    )
    assert code == 1
    name = "small lstm fusedrnn float32 T4 B3 I5 H6 layers 1 directions 1"
    assert f"larger   {name} {what}: 4 to 4.2 MB" in out
    assert compared(pair(5.0, **{what: 3.0}), pair(5.0, **{what: 3.0}))[0] == 0
    assert compared(pair(5.0), pair(5.0, **{what: 3.0}))[0] == 0
    # torch.nn's own is not ours to mend.
    grown = replace(pair(5.0)[0], **{what: 9.0}), pair(5.0)[1]
    assert compared((replace(grown[0], **{what: 1.0}), grown[1]), grown)[0] == 0


def test_another_backend_or_precision_is_said(compared):
    out = compared(pair(5.0, backend="aten"), pair(9.0, backend="torch"))[1]
    assert "directions 1 fw (by aten, then torch): 2.00" in out
    out = compared(pair(5.0, precision="tf32"), pair(9.0, precision="ieee"))[1]
    assert "directions 1 fw (in tf32, then ieee): 2.00" in out


def test_what_is_in_one_file_only_is_said(compared):
    other = replace(SMALL, name="other")
    wider = replace(SMALL, H=7)
    old = [a_row("torch.nn", 10.0), a_row("fusedrnn", 5.0)]
    old += [a_row("torch.nn", 10.0, workload=other), a_row("fusedrnn", 5.0, workload=other)]
    new = [a_row("torch.nn", 10.0), a_row("fusedrnn", 5.0, fwbw_ms=None)]
    new += [a_row("torch.nn", 1.0, workload=wider), a_row("fusedrnn", 5.0, workload=wider)]
    code, out = compared(old, new)
    assert code == 0
    assert "run-0/results.csv   other lstm fusedrnn" in out
    assert "run-1/results.csv   small lstm fusedrnn float32 T4 B3 I5 H7" in out
    assert "1 ratios" in out


@pytest.mark.parametrize("gate", ["red", "failed"])
def test_who_passed_and_does_not_any_more_is_named(gate, compared):
    old = [a_row("torch.nn", 10.0), a_row("fusedrnn", 5.0), a_row("keras", 9.0)]
    broken = Row.of(SMALL, "lstm", "fusedrnn", backend="", gate=gate)
    code, out = compared(old, [*old[::2], broken])
    assert code == 1
    (line,) = [line for line in out.splitlines() if line.startswith(gate)]
    assert line.split(maxsplit=1)[1] == (
        "small lstm fusedrnn float32 T4 B3 I5 H6 layers 1 directions 1: it was ok"
    )
    # Who was so before is no news, and who refuses has not broken.
    assert compared([*old[::2], broken], [*old[::2], broken])[0] == 0
    refused = replace(broken, gate="refused")
    assert compared(old, [*old[::2], refused])[0] == 0
    assert compared([*old[::2], refused], [*old[::2], broken])[0] == 0


# cpu.csv


def test_two_runs_of_one_code_are_no_alarm(capsys):
    """The pair that docs/benchmarking.md quotes: its spreads within the runs do not meet."""
    pair = [str(COMMITTED / f"{name}.csv") for name in ("cpu", "cpu-second")]
    assert main_module.main(["compare", *pair]) == 0
    out = capsys.readouterr().out
    assert "86 ratios: 0 slower, 0 faster, 6 apart, 80 within spread" in out
    assert "apart    imdb-one-hot lstm training: 1.63 (1.50-1.75) to 0.61 (0.56-0.66)" in out
    assert main_module.main(["compare", *pair, pair[0]]) == 0
    assert "86 within spread" in capsys.readouterr().out
    said = (COMMITTED.parents[2] / "docs" / "benchmarking.md").read_text()
    assert "6 of 86 ratios" in said
    assert "1.63 (1.50-1.75) and 0.61 (0.56-0.66)" in said


def cpu_csv(path, **changes):
    """The committed cpu.csv with its first row changed."""
    with open(COMMITTED / "cpu.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rows[0] |= changes
    path.parent.mkdir()
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def test_a_slower_row_of_a_cpu_csv_is_found(tmp_path, capsys):
    pair = [str(COMMITTED / f"{name}.csv") for name in ("cpu", "cpu-second")]
    times = {"fusedrnn_ms": "0.2", "fusedrnn_ms_p20": "0.19", "fusedrnn_ms_p80": "0.21", "x": "0.5"}
    new = cpu_csv(tmp_path / "slow" / "cpu.csv", **times)
    assert main_module.main(["compare", *pair, new]) == 1
    assert "slower   many-to-one lstm forward: 1.02 (0.68-1.52) to 0.50" in capsys.readouterr().out
    red = cpu_csv(tmp_path / "red" / "cpu.csv", gate="red")
    assert main_module.main(["compare", *pair, red]) == 1
    assert "red      many-to-one lstm forward: it was ok" in capsys.readouterr().out
    other = cpu_csv(tmp_path / "other" / "cpu.csv", backend="torch", **times)
    assert main_module.main(["compare", *pair, other]) == 1
    assert "many-to-one lstm forward (by aten, then torch): 1.02" in capsys.readouterr().out


# Environments


def test_how_environments_differ_is_said_in_words(tmp_path):
    environments = (
        {
            "device": "CPU, a",
            "torch": "2.13",
            "threads": 2,
            "peers": {"keras": "3.15"},
            "cuda": None,
        },
        {"device": "CPU, a", "torch": "2.14", "threads": 4, "peers": {}, "cuda": None},
    )
    paths = [tmp_path / name / "results.csv" for name in "ab"]
    for path, environment in zip(paths, environments, strict=True):
        path.parent.mkdir()
        (path.parent / "environment.json").write_text(json.dumps(environment))
    a, b = (path.parent for path in paths)
    assert list(comparing.differences(paths)) == [
        f"differs  version of torch: 2.13 in {a}, 2.14 in {b}",
        f"differs  CPU threads: 2 in {a}, 4 in {b}",
        f"differs  version of keras: 3.15 in {a}, nothing in {b}",
        "differs  with version of torch, CPU threads the ratios may move, and the code stay as it "
        "was",
    ]
    assert list(comparing.differences([paths[0], paths[0].with_name("second.csv")])) == [
        "unknown  environment: several files lie beside one environment.json, which is of one"
    ]
    (b / "environment.json").unlink()
    assert list(comparing.differences(paths)) == [
        f"unknown  environment: there is no {b / 'environment.json'}"
    ]


def test_what_cannot_be_read_is_exit_code_2(tmp_path, capsys):
    good = written(tmp_path / "good.csv", a_row("torch.nn", 10.0), a_row("fusedrnn", 5.0))
    lacks = written(tmp_path / "lacks.csv", a_row("fusedrnn", 5.0), without=("fw_ms_p80",))
    text = written(tmp_path / "text.csv", a_row("torch.nn", 1.0), a_row("x", 1.0, fw_ms="fast"))
    zero = written(tmp_path / "zero.csv", a_row("torch.nn", 1.0), a_row("x", 0.0))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "environment.json").write_text("[]")
    bad = written(tmp_path / "bad" / "results.csv", a_row("torch.nn", 10.0))
    for paths, sentence in (
        ((good, str(tmp_path / "none.csv")), "none.csv cannot be read"),
        ((lacks, good), "it has no column fw_ms_p80"),
        ((good, text), "has a time that is none, for small lstm x"),
        ((good, zero), "has a time that is none, for small lstm x"),
        ((good, str(COMMITTED / "cpu.csv")), "they share no case"),
        ((good, bad), "environment.json cannot be read"),
        ((good,), "it takes 2 files or more, the new one last, and got 1"),
    ):
        assert main_module.main(["compare", *paths]) == 2
        err = capsys.readouterr().err
        assert err.startswith("python -m bench compare: ")
        assert sentence in err
        assert err.count("\n") == 1


def test_plots_are_drawn_from_the_csv_alone(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    results = Results(tmp_path, {"device": "x", "torch": "1", "triton": "2", "data": "none"})
    x = {"fw_speedup": 2.0, "fwbw_speedup": 2.0}
    floors = {"fw_floor_ms": 0.5, "fwbw_floor_ms": 1.0}
    points = list(sweep())[:6]
    rows = [a_row(p, 1.0, workload=w, **x) for w in points for p in ("torch.nn", "another")]
    rows += [a_row("torch.nn", 1.0, **x), a_row("another", 1.0, **x, **floors)]
    rows += [a_row("infers", 1.0, fwbw_ms=None)]
    losses = [Loss("small", "lstm", name, s, 1.0) for name in ("torch.nn", "z") for s in (0, 1)]
    results.add(rows, losses)
    assert main_module.main(["plot", str(tmp_path)]) == 0
    assert "PNG" in capsys.readouterr().out
    made = {path.stem for path in tmp_path.glob("*.png")}
    assert made == {"speed", "losses", "sweep", "axes", "maps", "roofline"}


def test_a_folder_without_results_is_one_sentence(tmp_path, capsys):
    assert main_module.main(["plot", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("python -m bench plot: ")
    assert "holds no results that can be drawn" in err
    assert err.count("\n") == 1


def test_every_provider_has_a_colour_and_ours_keep_theirs():
    chosen = plots.colours(["torch.nn", "b", "a"])
    assert chosen["torch.nn"] == plots.COLOURS["torch.nn"]
    assert chosen["a"] != chosen["b"]
