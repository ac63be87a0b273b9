"""The command line of the bench: its commands, and what it says of bad input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench import __main__ as bench
from bench import acceptance

ROOT = Path(__file__).parent.parent


def test_every_command_has_a_line_of_help():
    said = " ".join(bench._parser().format_help().partition("commands:")[2].split())
    assert {"lesson", "compare", "cpu", "gpu"} <= set(bench.COMMANDS)
    for name, command in bench.COMMANDS.items():
        assert f"{name} {command.help}" in said
        assert len(command.help) < 80


def test_a_command_takes_its_own_options():
    options = bench.parse(["gpu", "--only", "sweep", "--minutes", "3", "--dry-run"])
    assert (options.only, options.minutes, options.dry_run) == ("sweep", 3.0, True)
    options = bench.parse(["lesson", "gates", "--seed", "3", "--figure", "x.svg"])
    assert (options.name, options.seed, str(options.figure)) == ("gates", 3, "x.svg")
    # What stands before the command holds, and what is not said is the default.
    options = bench.parse(["--quick", "--seed", "5", "sine"])
    assert (options.quick, options.seed, options.device) == (True, 5, "auto")
    assert bench.parse([]).command == "all"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--cases", ""], ": there is no case '': --list prints those there are"),
        (["--cases", "smoke", "--minutes", "-1"], ": --minutes is a number above 0, and not -1"),
        (["--cases", "smoke", "--minutes", "0"], ": --minutes is a number above 0, and not 0"),
        (["--cases", "smoke", "--minutes", "nan"], ": --minutes is a number above 0, and not nan"),
        (["gpu", "--minutes", "inf"], " gpu: --minutes is a number above 0, and not inf"),
        (["--minutes", "5"], ": --minutes is of gpu and of --cases"),
        (["--providers", "fusedrnn"], ": --providers is of --cases, and none are named"),
        (["sine", "--cases", "smoke"], ": --cases goes without a command, and sine is one"),
        (["--cases", "smoke", "cpu"], " cpu: --cases goes without a command, and cpu is one"),
        (["--list", "cpu"], " cpu: --list goes without a command, and cpu is one"),
        (["cpu", "--device", "cpu"], ": cpu takes no --device: python -m bench cpu --help"),
        (["plot"], " plot: it takes 1 folder, and got 0"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(argv, sentence, capsys):
    assert bench.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"python -m bench{sentence}\n"


def test_a_run_that_measured_nothing_says_so(tmp_path, capsys):
    argv = ["--cases", "many-to-one", "--providers", "fusedrnn", "--quick", "--device", "cpu"]
    assert bench.main([*argv, "--minutes", "1e-9", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "0 of 1 cases" in out
    assert err == "python -m bench: nothing was measured: --minutes ended before a case did\n"
    assert bench.main([*argv, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""


def test_the_list_begins_with_the_groups(capsys):
    assert bench.main(["--list"]) == 0
    groups = [line.split()[0] for line in capsys.readouterr().out.splitlines()[:3]]
    assert groups == ["lessons", "sweep", "smoke"]


def test_a_reader_that_goes_away_is_no_traceback():
    """As in ``--list | head -1``; the list is longer than a pipe holds."""
    command = [sys.executable, "-m", "bench", "--list"]
    with subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as listing:
        assert listing.stdout.readline().startswith("lessons ")
        listing.stdout.close()
        assert listing.stderr.read() == ""
    assert listing.returncode == 1


@pytest.mark.parametrize("argv", [[], ["none"], ["{}", "{}"], ["{}"]])
def test_acceptance_without_results_is_one_sentence(argv, tmp_path, capsys):
    assert acceptance.main([word.format(tmp_path) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("usage: python -m bench.acceptance FOLDER")
