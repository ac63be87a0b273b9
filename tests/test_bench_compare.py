"""``python -m bench compare``: what counts as slower, wrong or larger, and the exit code."""

import argparse

import pytest

from bench import UserError, compare

pytest.importorskip("pandas", reason="pandas is not installed")

OLD = (
    "case,cell,pass,provider,gate,ms,x,x_low,x_high,kept_mb\n"
    "a,lstm,forward,fusedrnn,ok,1.0,2.0,1.9,2.1,10.0\n"
)


@pytest.fixture
def compared(tmp_path):
    """Runs the command on files with these texts."""

    def run(*texts):
        files = [tmp_path / f"{n}.csv" for n in range(len(texts))]
        for file, text in zip(files, texts, strict=True):
            file.write_text(text)
        return compare.run(argparse.Namespace(files=files, tolerance=1.1))

    return run


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
def test_what_became_worse_is_named_and_the_code_is_1(compared, capsys, results, kind):
    new = OLD.replace("ok,1.0,2.0,1.9,2.1,10.0", results)
    assert compared(OLD, new) == bool(kind)
    assert not kind or f"{kind:<8} a lstm forward fusedrnn" in capsys.readouterr().out


def test_several_old_files_widen_the_spread(compared):
    slow = OLD.replace("2.0,1.9,2.1", "1.5,1.4,1.6")
    assert compared(OLD, slow) == 1
    assert compared(OLD, slow, slow) == 0


def test_cases_of_one_file_are_printed(compared, capsys):
    assert compared(OLD, OLD.replace("a,lstm", "b,lstm")) == 0
    printed = capsys.readouterr().out
    assert "gone     a lstm" in printed
    assert "added    b lstm" in printed


def test_a_file_of_something_else_is_one_sentence(compared):
    with pytest.raises(UserError, match="it has no column"):
        compared(OLD, "a,b\n1,2\n")
    with pytest.raises(UserError, match="at least two files"):
        compared(OLD)
