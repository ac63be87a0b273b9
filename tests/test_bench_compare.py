"""``python -m bench compare`` and ``plot``: from CSV files alone."""

from __future__ import annotations

import csv
from dataclasses import asdict, fields, replace

import pytest

from bench import __main__ as main_module
from bench import plots
from bench.cases import Workload, sweep
from bench.results import Loss, Results, Row

SMALL = Workload("small", "toy", "none", T=4, B=3, I=5, H=6)


def a_row(provider, ms, spread=0.1, workload=SMALL, **values):
    times = {
        f"{mode}_ms{tail}": ms * factor
        for mode in ("fw", "fwbw")
        for tail, factor in (("", 1), ("_p20", 1 - spread), ("_p80", 1 + spread))
    }
    return Row.of(workload, "lstm", provider, backend="", gate="ok", **times | values)


def written(path, *rows, without=()):
    names = [f.name for f in fields(Row) if f.name not in without]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({k: "" if v is None else v for k, v in asdict(r).items()} for r in rows)
    return str(path)


@pytest.fixture
def compared(tmp_path, capsys):
    def compare(old, new):
        paths = [written(tmp_path / f"{n}.csv", *rows) for n, rows in (("old", old), ("new", new))]
        return main_module.main(["compare", *paths]), capsys.readouterr().out

    return compare


def test_beyond_the_spread_is_a_regression(compared):
    old = a_row("torch.nn", 10.0), a_row("fusedrnn", 5.0)
    code, out = compared(old, (a_row("torch.nn", 10.0), a_row("fusedrnn", 9.0)))
    assert code == 1
    assert "slower   small lstm fusedrnn float32 T4" in out
    assert "2.00 (1.64-2.44) to 1.11 (0.91-1.36) times as fast as torch.nn" in out
    assert "2 ratios: 2 slower, 0 faster, 0 within spread" in out


def test_within_the_spread_is_none(compared):
    old = a_row("torch.nn", 10.0), a_row("fusedrnn", 5.0)
    code, out = compared(old, (a_row("torch.nn", 10.0), a_row("fusedrnn", 6.5)))
    assert (code, "2 within spread" in out) == (0, True)
    # The same medians, measured more quietly, are one.
    quiet = (a_row("torch.nn", 10.0, 0.01), a_row("fusedrnn", 5.0, 0.01))
    worse = (a_row("torch.nn", 10.0, 0.01), a_row("fusedrnn", 6.5, 0.01))
    assert compared(quiet, worse)[0] == 1


def test_a_slower_machine_is_no_regression(compared):
    """Everything takes three times as long: the ratios stand."""
    old = a_row("torch.nn", 10.0), a_row("fusedrnn", 5.0)
    assert compared(old, (a_row("torch.nn", 30.0), a_row("fusedrnn", 15.0)))[0] == 0
    code, out = compared(old, (a_row("torch.nn", 30.0), a_row("fusedrnn", 5.0)))
    assert (code, "2 faster" in out) == (0, True)


def test_what_is_in_one_file_only_is_said(compared):
    other = replace(SMALL, name="other")
    wider = replace(SMALL, H=7)
    old = [a_row("torch.nn", 10.0), a_row("fusedrnn", 5.0)]
    old += [a_row("torch.nn", 10.0, workload=other), a_row("fusedrnn", 5.0, workload=other)]
    new = [a_row("torch.nn", 10.0), a_row("fusedrnn", 5.0, fwbw_ms=None)]
    new += [a_row("torch.nn", 1.0, workload=wider), a_row("fusedrnn", 5.0, workload=wider)]
    code, out = compared(old, new)
    assert code == 0
    assert "old.csv   other lstm fusedrnn" in out
    assert "new.csv   small lstm fusedrnn float32 T4 B3 I5 H7" in out
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


def test_what_cannot_be_read_is_exit_code_2(tmp_path, capsys):
    good = written(tmp_path / "good.csv", a_row("torch.nn", 10.0), a_row("fusedrnn", 5.0))
    lacks = written(tmp_path / "lacks.csv", a_row("fusedrnn", 5.0), without=("fw_ms_p80",))
    text = written(tmp_path / "text.csv", a_row("torch.nn", 1.0), a_row("x", 1.0, fw_ms="fast"))
    for paths, sentence in (
        ((good, str(tmp_path / "none.csv")), "none.csv cannot be read"),
        ((lacks, good), "it has no column fw_ms_p80"),
        ((good, text), "has a time that is none, for small lstm x"),
        ((good,), "compare takes 2 paths, and got 1"),
    ):
        assert main_module.main(["compare", *paths]) == 2
        err = capsys.readouterr().err
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
    assert "holds no results that can be drawn" in err
    assert err.count("\n") == 1


def test_every_provider_has_a_colour_and_ours_keep_theirs():
    chosen = plots.colours(["torch.nn", "b", "a"])
    assert chosen["torch.nn"] == plots.COLOURS["torch.nn"]
    assert chosen["a"] != chosen["b"]
