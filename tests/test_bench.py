"""The command line of the bench, its results on disk, and a small run of every command."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from processes import ROOT
from test_bench_data import cache  # noqa: F401  # a user's file would be read

from bench import host, progress, report, run
from bench.__main__ import COMMANDS, main
from bench.cases import named
from bench.measure import BenchmarkCase, Settings, in_fresh_processes, interleaved
from bench.providers import PROVIDERS, Adapter, absent
from bench.report import COLUMNS

SETTINGS = Settings(torch.device("cpu"), seconds=1e-3, least_rounds=1)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["cases", "sin-20"], "there is no case 'sin-20'; similar names are sine-20"),
        (["cases", ""], "there is no case ''; `cases` alone lists all"),
        (["cases", "sine-20", "--providers", "cudnn"], "there is no provider 'cudnn'"),
        (["cases", "sine-20", "--cells", "mlp"], "there is no cell 'mlp'; there are lstm, gru"),
        (["sine", "--minutes", "nan"], "--minutes must be a number above 0, not nan"),
        (["--minutes", "-1"], "--minutes must be a number above 0, not -1"),
        (["sine", "--device", "cuda"], "--device cuda needs a GPU"),
        (["imdb", "--imdb", "/nowhere/imdb.npz"], "/nowhere/imdb.npz cannot be read: No"),
        (["cpu", "--only", "sine-7"], "there is no case 'sine-7'; similar names are"),
        (["report", "/nowhere"], "/nowhere has no results that can be read"),
        (["nothing"], "there is no command: 'nothing' (choose from 'demo', "),
        (["sine", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["references", "--gpu", "nothing"], "there are no published times of these"),
        (["compare", "/nowhere"], "/nowhere cannot be read: [Errno 2]"),
        (["lesson", "nothing"], "there is no lesson 'nothing'"),
        (["gpu", "--only", "sweep,nothing"], "--only: there is no step nothing"),
        (["gpu"], "gpu needs a CUDA device"),
        (["sine", "--out", "/dev/null/x"], "no results can be written to /dev/null/x: Not"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(argv, sentence, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(argv) == 2
    error = capsys.readouterr().err
    command = "demo" if argv[0].startswith("-") else argv[0]
    assert error.startswith(f"python -m bench {command}: {sentence}")
    assert error.count("\n") == 1


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=str)
def test_help_fits_a_screen(argv, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80


def test_a_reader_that_goes_away_is_no_traceback():
    command = [sys.executable, "-m", "bench", "cases"]
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
    rows = report.read(tmp_path / "results.csv")
    assert list(rows[0]) == list(COLUMNS)
    assert {row["gate"] for row in rows} == {"reference", "ok"}
    assert all(float(row["ms"]) > 0 for row in rows)
    losses = report.read(tmp_path / "losses.csv")
    by_provider = {}
    for line in losses:
        by_provider.setdefault(line["provider"], []).append(float(line["loss"]))
    ours, theirs = by_provider["fusedrnn"], by_provider["torch.nn"]
    assert ours == pytest.approx(theirs, rel=1e-3)
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["data"].startswith("generated reviews")


def test_cases_are_resumed_behind_one_that_ended_the_process(tmp_path, capsys):
    argv = ["cases", "many-to-one,toy-both-ways", "--quick", "--providers", "fusedrnn"]
    argv += ["--cells", "gru", "--out", str(tmp_path)]
    assert main([*argv, "--minutes", "1e-9"]) == 0
    assert report.read(tmp_path / "results.csv") == []
    assert "--minutes ended before many-to-one gru" in capsys.readouterr().out
    (tmp_path / "begun.csv").write_text("case,cell\nmany-to-one,gru\n")
    assert main([*argv, "--resume", "--gate-only"]) == 1  # for the case that ended it
    first, *others = report.read(tmp_path / "results.csv")
    assert (first["gate"], first["note"]) == ("failed", "its process ended")
    assert {row["case"] for row in others} == {"toy-both-ways"}
    assert {row["ms"] for row in others} == {""}
    assert main([*argv, "--resume"]) == 1
    assert len(report.read(tmp_path / "results.csv")) == 1 + len(others)


@pytest.mark.parametrize("kind", ["a terminal", "a file", "without tqdm"])
def test_a_bar_names_the_case_on_a_terminal_and_rows_stay_on_stdout(kind, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: kind == "a terminal")
    if kind == "without tqdm":
        monkeypatch.setattr(progress, "tqdm", None)
    for item in progress.progress(["a", "b"]):
        progress.say(f"row {item}")
    printed = capsys.readouterr()
    assert printed.out == "row a\nrow b\n"
    assert ("\rb: " in printed.err) == bool(printed.err) == (kind == "a terminal")


def test_cpu_times_in_new_processes_and_report_prints_the_speeds(tmp_path, capsys, monkeypatch):
    real, counts = run.in_fresh_processes, []  # only the first case is run there: imports take long

    def in_one(count, function, *args):
        counts.append(count)
        return real(count, function, *args) if len(counts) == 1 else [function(*args)] * count

    monkeypatch.setattr(run, "in_fresh_processes", in_one)
    argv = ["cpu", "--quick", "--only", "imdb-one-hot,character,ragged"]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    assert counts == [1] * 9
    printed = capsys.readouterr().out
    assert "geometric_mean" in printed
    rows = report.read(tmp_path / "results.csv")
    assert {row["provider"] for row in rows} >= {"fusedrnn stream", "fusedrnn recompute"}
    assert all(row["x_low"] for row in rows)
    assert main(["report", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "| character " in printed
    assert "`python -m bench" in printed


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (ValueError("a bug\nof many lines"), 1, "failed, ValueError: a bug\n"),
        (RuntimeError("CUDA error: an illegal memory access"), 3, "illegal memory access"),
    ],
)
def test_a_provider_that_breaks_is_a_row_and_the_exit_code(
    tmp_path, monkeypatch, capsys, error, code, printed
):
    """After a CUDA error nothing is right any more, so the process ends."""

    def broken(*sizes, **options):
        raise error

    monkeypatch.setitem(PROVIDERS, "eager loop", PROVIDERS["eager loop"]._replace(build=broken))
    argv = ["cases", "many-to-one", "--quick", "--providers", "eager loop", "--cells", "lstm"]
    assert main([*argv, "--device", "cpu", "--out", str(tmp_path)]) == code
    assert printed in capsys.readouterr().err
    if code == 1:
        gates = [row["gate"] for row in report.read(tmp_path / "results.csv")]
        assert gates == ["reference"] * 2 + ["failed"] * 2


def test_times_are_interleaved_and_compared_with_the_first():
    order = []

    def waits(name, loops):
        def call():
            order.append(name)
            for _ in range(loops):
                pass

        return call

    calls = {"torch.nn": waits("slow", 200_000), "fusedrnn": waits("fast", 20_000)}
    times = interleaved(calls, SETTINGS._replace(seconds=0.05, least_rounds=4))
    slow, fast = times["torch.nn"], times["fusedrnn"]
    assert slow["x"] == 1
    assert fast["x"] > 2
    assert fast["p20"] <= fast["ms"] <= fast["p80"]
    assert fast["rounds"] == slow["rounds"] >= 4
    changes = sum(before != name for before, name in pairwise(order))
    assert changes == fast["rounds"]  # a round begins with the one that the last ended with


def test_new_processes_return_results_and_errors():
    assert len({os.getpid(), *in_fresh_processes(2, os.getpid)}) == 3
    with pytest.raises(RuntimeError, match="terminated abruptly"):
        in_fresh_processes(1, os._exit, 0)


def test_rows_are_those_of_the_process_in_the_middle():
    runs = [{("fusedrnn", "forward"): {"ms": ms, "x": 6 / ms}} for ms in (3, 1, 2)]
    assert run.middle(runs) == {
        ("fusedrnn", "forward"): {"ms": 2, "x": 3.0, "x_low": 2.0, "x_high": 6.0}
    }


def test_times_have_three_digits_and_no_exponent():
    for ms, text in ((0.0712, "0.0712 ms"), (998.6, "999 ms"), (2051.4, "2051 ms")):
        row = {"case": "a", "cell": "gru", "gate": "ok", "ms": ms, "x": 1.5}
        (line,) = report.lines({("fusedrnn", "forward"): row}, {})
        assert f"| 1.50x, {text} " in line


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
    for got, want in ((bias, expected), (w_hh, case.weights["weight_hh_l0"])):
        assert torch.equal(got.flatten().sort().values, want.flatten().sort().values)
    assert w_ih.numel() == 32


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without it")
def test_ddp_and_fully_shard_have_the_losses_of_one_process(capsys):
    assert main(["distributed", "--cell", "gru"]) == 0
    alone, ddp, fsdp = capsys.readouterr().out.splitlines()
    assert alone.split()[2:] == ddp.split()[1:] == fsdp.split()[1:]
    assert len(set(alone.split()[2:])) == 4


def test_host_times_a_call_up_to_its_launches_and_the_cells(monkeypatch):
    ((_, *lines),) = in_fresh_processes(1, host.stack_lines)
    assert [line.split()[0] for line in lines] == ["plain", "autocast", "lengths"]
    assert all(0 < float(n) < 1e5 for line in lines for n in line.split()[1:])
    monkeypatch.setattr(host, "_us", lambda call: float(len(call())))
    assert len(host.cell_lines()) == 1 + 18
