"""The table and the pictures of a results folder."""

from argparse import Namespace

import pytest

from bench import UserError, report

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("pandas", reason="pandas is not installed")

HEADER = "case,cell,pass,provider,ms,p20,p80\n"


def rows():
    for provider, factor in (("torch.nn", 2), ("fusedrnn", 1)):
        for ms in (16 * factor, 32 * factor, 64 * factor):
            yield f"H{ms // factor},lstm,forward,{provider},{ms},{ms - 1},{ms + 2}\n"
    yield "red,lstm,forward,fusedrnn,,,\n"


def test_every_picture_there_are_data_for_is_drawn(tmp_path):
    (tmp_path / "results.csv").write_text(HEADER + "".join(rows()))
    assert [path.name for path in report.draw(tmp_path)] == ["speed.png"]
    losses = "".join(
        f"sine,lstm,{p},{n},{1 / n}\n" for p in ("torch.nn", "fusedrnn") for n in (1, 2)
    )
    (tmp_path / "losses.csv").write_text("case,cell,provider,step,loss\n" + losses)
    drawn = report.draw(tmp_path)
    assert [path.name for path in drawn] == ["speed.png", "losses.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_a_file_of_something_else_is_one_sentence(tmp_path):
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="no results that can be read"):
        report.run(Namespace(folder=tmp_path, plot=True))
