"""``python -m fusedrnn``: its commands, their help, and how they end."""

import io

import pytest

from fusedrnn import __main__ as command_line
from fusedrnn import check


def ends(*arguments):
    """The code with which a command line ends."""
    with pytest.raises(SystemExit) as ended:
        command_line.main(arguments)
    return ended.value.code


@pytest.mark.parametrize("command", ["run", "study", "check"])
def test_help(command, capsys):
    assert ends("--help") == ends(command, "--help") == 0
    overview, page = capsys.readouterr().out.split(f"usage: python -m fusedrnn {command} ")
    assert f"\n    {command} " in overview
    assert " ".join(getattr(command_line, command).__doc__.split()) in " ".join(page.split())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("walk",), "invalid choice: 'walk'"),
        (("run", "-m"), "the following arguments are required: script.py"),
        (("run", "nowhere.py", "-m"), "cannot read the file 'nowhere.py'"),
        (("study",), "the following arguments are required: --hidden"),
        (("study", "--hidden", "0"), "--hidden: 0 is not positive"),
        (("study", "--hidden", "x"), "--hidden: invalid positive value: 'x'"),
        (("study", "--hidden", "4096", "--schedule", "resident"), "no plan: schedule resident"),
        (("study", "--hidden", "99999999"), "no GPU has memory for the weights"),
        (("study", "--hidden", "64", "--batch", "999999999999"), "no GPU has memory"),
        (("study", "--hidden", "64", "--out", "/dev/null/x"), "x cannot be made: Not a directory"),
        (("study", "--hidden", "64", "--cell", "gru"), "TRITON_INTERPRET is set"),
    ],
)
def test_a_wrong_command_line_ends_with_a_sentence(arguments, sentence, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", str(int("INTERPRET" in sentence)))
    assert ends(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert sentence in printed.err.splitlines()[-1]


@pytest.mark.parametrize(("text", "code"), [("WRONG resident", 1), ("a line: WRONG", 0)])
def test_a_report_ends_with_code_1_if_something_is_wrong(text, code, monkeypatch, capsys):
    monkeypatch.setattr(check, "run", lambda: iter(["first", text]))
    assert ends("check") == code
    assert capsys.readouterr().out == f"first\n{text}\n"


def test_a_closed_pipe_is_no_error(monkeypatch):
    def run():
        yield "text"
        raise BrokenPipeError

    monkeypatch.setattr(check, "run", run)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert ends("check") == 0
    assert command_line.sys.stderr.closed  # so that Python does not report it once more
