"""The command line of the bench, its results on disk, and a small run of every command."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import UserError, cpu, report, run
from bench.__main__ import COMMANDS, _check, _parser, main
from bench.cases import LESSONS, every_case, named
from bench.measure import BenchmarkCase, Call, Settings, in_fresh_process, interleaved
from bench.providers import PROVIDERS, Adapter, absent
from bench.report import COLUMNS, Results

ROOT = Path(__file__).parent.parent
SETTINGS = Settings(torch.device("cpu"), seconds=1e-3, least_rounds=1)


@pytest.fixture(autouse=True)
def no_imdb(monkeypatch, tmp_path):
    monkeypatch.delenv("FUSEDRNN_IMDB", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def rows_in(folder, name="results.csv"):
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--cases", "sin-20"], ": there is no case 'sin-20'; similar names are sine-20"),
        (["--cases", ""], ": there is no case ''; --list prints all names"),
        (["--cases", "???"], ": there is no case '???'; --list prints all names"),
        (["--cases", "sine-20", "--providers", "cudnn"], ": there is no provider 'cudnn'"),
        (["--providers", "fusedrnn"], ": --providers needs --cases"),
        (["sine", "--minutes", "nan"], " sine: --minutes must be a number above 0, not nan"),
        (["--minutes", "-1"], ": --minutes must be a number above 0, not -1"),
        (["--list", "cpu"], " cpu: --list cannot be used with cpu"),
        (["--device", "cuda", "sine"], " sine: --device cuda needs a GPU"),
        (["imdb", "--imdb", "/nowhere/imdb.npz"], " imdb: /nowhere/imdb.npz cannot be read: No"),
        (["cpu", "--only", "sine-7"], " cpu: there is no case 'sine-7'; there are many-to-one"),
        (["report", "/nowhere"], " report: /nowhere has no results that can be read"),
        (["sine", "--out", "/dev/null/x"], " sine: no results can be written to /dev/null/x: Not"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(argv, sentence, capsys):
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"python -m bench{sentence}")
    assert error.count("\n") == 1


@pytest.mark.parametrize("argv", [["nothing"], ["--seed", "x"], ["cpu", "--device", "cpu"]])
def test_words_that_are_not_understood_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_help_fits_a_screen(capsys):
    assert _parser([]).format_help().count("\n") <= 45
    for name in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        assert capsys.readouterr().out.count("\n") <= 30, name


def test_an_option_before_the_command_holds():
    argv = ["--quick", "--seed", "5", "sine"]
    options = _parser(argv).parse_args(argv)
    assert (options.quick, options.seed, options.device) == (True, 5, "auto")


def test_every_command_takes_its_own_options():
    for argv in (["tune", "--cases", "sweep"], ["gpu", "--dry-run"], ["lesson"]):
        options = _parser(argv).parse_args(argv)
        _check(options)
        assert options.command == argv[0]


def test_names_are_unique_and_groups_are_found():
    names = [w.name for w in every_case()]
    assert len({*names}) == len(names)
    assert named("lessons") == LESSONS
    assert [w.name for w in named("sine-10,character,sine-10")] == ["sine-10", "character"]
    assert {w.group for w in named("sweep,kernelbench")} == {"sweep", "kernelbench"}


def test_a_reader_that_goes_away_is_no_traceback():
    command = [sys.executable, "-m", "bench", "--list"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as listing:
        assert listing.stdout.readline().startswith("many-to-one ")
        listing.stdout.close()
        assert listing.stderr.read() == ""
    assert listing.returncode == 1


def test_the_main_job_gates_times_and_trains(tmp_path, capsys):
    assert main(["--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(table) == 1 + 16
    assert all(len(line) == len(table[0]) <= 100 for line in table)
    rows = rows_in(tmp_path)
    assert list(rows[0]) == list(COLUMNS)
    assert {row["gate"] for row in rows} == {"reference", "ok"}
    assert all(float(row["ms"]) > 0 for row in rows)
    losses = rows_in(tmp_path, "losses.csv")
    by_provider = {}
    for line in losses:
        by_provider.setdefault(line["provider"], []).append(float(line["loss"]))
    ours, theirs = by_provider["fusedrnn"], by_provider["torch.nn"]
    assert ours == pytest.approx(theirs, rel=1e-3)
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["data"].startswith("generated reviews")


def test_cases_are_resumed_behind_one_that_ended_the_process(tmp_path, capsys):
    argv = ["--quick", "--cases", "many-to-one,toy-both-ways", "--providers", "fusedrnn"]
    argv += ["--cells", "gru", "--out", str(tmp_path)]
    assert main([*argv, "--minutes", "1e-9"]) == 0
    assert rows_in(tmp_path) == []
    assert "--minutes ended before many-to-one gru" in capsys.readouterr().out
    (tmp_path / "begun.txt").write_text("many-to-one gru\n")
    assert main([*argv, "--resume", "--gate-only"]) == 0
    first, *others = rows_in(tmp_path)
    assert (first["gate"], first["note"]) == ("failed", "its process ended")
    assert {row["case"] for row in others} == {"toy-both-ways"}
    assert {row["ms"] for row in others} == {""}
    assert main([*argv, "--resume"]) == 0
    assert len(rows_in(tmp_path)) == 1 + len(others)


def test_ragged_has_four_ways(tmp_path):
    assert main(["ragged", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    ways = {row["provider"]: row["gate"] for row in rows_in(tmp_path)}
    assert ways == {"torch.nn": "reference", "torch.nn padded": "reference"} | {
        "fusedrnn": "ok", "fusedrnn lengths": "ok",
    }  # fmt: skip


def test_cpu_times_in_new_processes_and_prints_targets(tmp_path, capsys):
    argv = ["cpu", "--quick", "--only", "imdb-one-hot,character,ragged"]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for words in ("geometric_mean", "one-hot LSTM training", "lengths beside packed", "kept_mb"):
        assert words in printed
    rows = rows_in(tmp_path)
    assert {row["provider"] for row in rows} >= {"fusedrnn stream", "fusedrnn recompute"}
    assert all(row["x_low"] for row in rows)
    page = tmp_path / "page.md"
    page.write_text(f"before\n<!-- bench {tmp_path} -->\nold\n<!-- end -->\nafter\n")
    assert main(["report", str(tmp_path), "--into", str(page)]) == 0
    text = page.read_text()
    assert "| character " in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("<!-- end -->\nafter\n")


def test_without_the_kernels_names_the_host_part_is_a_sentence(monkeypatch):
    monkeypatch.setattr(cpu.sys, "executable", sys.executable)
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.chdir("/")
    told = cpu.host_time(1)
    assert isinstance(told, str)
    assert told.startswith("not measured: ")


def test_a_provider_that_breaks_is_a_row_and_the_exit_code(tmp_path, monkeypatch, capsys):
    def broken(*sizes, **options):
        raise ValueError("a bug\nof many lines")

    monkeypatch.setitem(PROVIDERS, "eager loop", PROVIDERS["eager loop"]._replace(build=broken))
    argv = ["--quick", "--cases", "many-to-one", "--providers", "eager loop", "--cells", "lstm"]
    assert main([*argv, "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "many-to-one lstm: eager loop: ValueError: a bug\n" in capsys.readouterr().err
    assert [row["gate"] for row in rows_in(tmp_path)] == ["reference"] * 2 + ["failed"] * 2


def test_results_round_trip_and_begin_anew(tmp_path):
    results = Results(tmp_path, {"torch": "2"})
    row = {"case": "a, b", "cell": "gru", "ms": 1 / 3, "note": 'says "no"'}
    results.add([row])
    assert rows_in(tmp_path)[0] == dict.fromkeys(COLUMNS, "") | row | {"ms": "0.333333"}
    Results(tmp_path, {}, resume=True)
    assert len(rows_in(tmp_path)) == 1
    Results(tmp_path, {})
    assert rows_in(tmp_path) == []
    with pytest.raises(UserError, match="no results can be written"):
        Results(tmp_path / "results.csv" / "x", {})


def test_times_are_interleaved_and_compared_with_the_first():
    order = []

    def waits(name, loops):
        def call():
            order.append(name)
            for _ in range(loops):
                pass

        return call

    calls = {"slow": Call(waits("slow", 200_000)), "fast": Call(waits("fast", 20_000))}
    times = interleaved(calls, torch.device("cpu"), seconds=0.05, least=4)
    assert times["slow"].x == 1
    assert times["fast"].x > 2
    assert times["fast"].p20 <= times["fast"].p50 <= times["fast"].p80
    assert times["fast"].rounds == times["slow"].rounds >= 4
    firsts = [name for name, before in zip(order[3:], order[2:], strict=False) if name != before]
    assert firsts.count("fast") > 1


def test_a_new_process_returns_results_and_errors():
    assert in_fresh_process(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        in_fresh_process(divmod, 1, 0)
    with pytest.raises(RuntimeError, match="terminated abruptly"):
        in_fresh_process(os._exit, 0)


def test_rows_are_those_of_the_process_in_the_middle():
    runs = [{("fusedrnn", "forward"): {"ms": ms, "x": 6 / ms}} for ms in (3, 1, 2)]
    assert run.middle(runs) == {
        ("fusedrnn", "forward"): {"ms": 2, "x": 3.0, "x_low": 2.0, "x_high": 6.0}
    }


def test_absent_providers_say_how_to_install_them(monkeypatch):
    monkeypatch.setattr("bench.providers.find_spec", lambda name: None)
    assert absent("haste", torch.device("cuda")) == "not installed: pip install haste_pytorch"
    assert absent("fusedrnn triton", torch.device("cpu")) == "runs on cuda only"
    assert absent("fusedrnn", torch.device("cpu")) is None


@pytest.mark.parametrize("provider", ["flashrnn", "haste"])
def test_adapters_convert_weights_without_losing_any(provider):
    (workload,) = named("many-to-one")
    case = BenchmarkCase.of(replace(workload, H=8), "lstm", SETTINGS)
    adapter = case.rnn(provider)
    assert isinstance(adapter, Adapter)
    w_ih, w_hh, bias = adapter.fix()
    expected = case.weights["bias_ih_l0"] + case.weights["bias_hh_l0"]
    assert torch.equal(bias.flatten().sort().values, expected.sort().values)
    assert torch.equal(
        w_hh.flatten().sort().values, case.weights["weight_hh_l0"].flatten().sort()[0]
    )
    assert w_ih.numel() == 32


def test_the_environment_names_the_commit_and_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "sine", "--quick"])
    environment = report.environment(torch.device("cpu"), "none")
    assert environment["command"] == "python -m bench sine --quick"
    assert environment["threads"] == torch.get_num_threads()
    assert "device   CPU, " in report.header(environment)
