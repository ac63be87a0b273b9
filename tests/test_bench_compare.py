"""``python -m bench compare``: what counts as slower, wrong or larger, and the exit code."""

import argparse

import pytest

from bench import UserError, compare

pytest.importorskip("pandas", reason="pandas is not installed")

HEADER = "case,cell,pass,provider,gate,ms,x,x_low,x_high,kept_mb\n"
OLD = "a,lstm,forward,fusedrnn,ok,1.0,2.0,1.9,2.1,10.0\n"


@pytest.fixture
def write(tmp_path):
    def write(name, rows):
        path = tmp_path / f"{name}.csv"
        path.write_text(HEADER + rows)
        return path

    return write


def run(*files, tolerance=1.1):
    return compare.run(argparse.Namespace(files=list(files), tolerance=tolerance))


@pytest.mark.parametrize(
    ("results", "kind"),
    [
        ("ok,1.0,1.5,1.4,1.6,10.0", "slower"),
        ("red,,,,,", "wrong"),
        ("failed,,,,,", "wrong"),
        ("ok,1.0,2.0,1.9,2.1,10.2", "larger"),
        ("ok,1.0,1.8,1.75,1.85,10.05", ""),  # within tolerance and 1 %
        ("ok,1.0,3.0,2.9,3.1,9.0", ""),  # faster and smaller
        ("refused,,,,,", ""),
    ],
)
def test_what_became_worse_is_named_and_the_code_is_1(write, capsys, results, kind):
    new = write("new", f"a,lstm,forward,fusedrnn,{results}\n")
    assert run(write("old", OLD), new) == bool(kind)
    assert not kind or f"{kind:<8} a lstm forward fusedrnn" in capsys.readouterr().out


def test_several_old_files_widen_the_spread(write):
    slow = "a,lstm,forward,fusedrnn,ok,1.0,1.5,1.4,1.6,10.0\n"
    old, other, new = write("old", OLD), write("other", slow), write("new", slow)
    assert run(old, new) == 1
    assert run(old, other, new) == 0


def test_cases_of_one_file_are_printed(write, capsys):
    assert run(write("old", OLD), write("new", OLD.replace("a,lstm", "b,lstm"))) == 0
    printed = capsys.readouterr().out
    assert "gone     a lstm" in printed
    assert "added    b lstm" in printed


def test_a_file_of_something_else_is_one_sentence(write, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="it has no column"):
        run(write("old", OLD), other)
    with pytest.raises(UserError, match="at least two files"):
        run(write("old", OLD))
