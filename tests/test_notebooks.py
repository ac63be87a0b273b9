"""The puzzles of docs/puzzles.ipynb: checks fail on the empty cells and pass with the solutions."""

import json
import re
from pathlib import Path

import pytest
from processes import python

DOCS = Path(__file__).parents[1] / "docs"
#: Runs the files of a folder in order, as cells of one notebook; prints what each check found.
RUN = """
import pathlib, sys
names = {}
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        exec(compile(path.read_text(), str(path), "exec"), names)
    except AssertionError as error:
        print(error)
"""


def cells(name, kind):
    book = json.loads((DOCS / name).read_text())
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in book["cells"])
    return ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == kind]


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize(
    ("name", "line"), [("solutions", r"Puzzle {} is solved\."), ("puzzles", "puzzle {}:.*")]
)
def test_checks_pass_with_the_solutions_and_fail_on_empty_cells(name, line, tmp_path):
    for n, cell in enumerate(cells(f"{name}.ipynb", "code")):
        (tmp_path / f"cell{n:02}.py").write_text(cell)
    done = python("-c", RUN, tmp_path, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    for n, found in zip(range(1, 9), done.stdout.splitlines(), strict=True):
        assert re.fullmatch(line.format(n), found)


def test_the_notebooks_differ_in_eight_cells_alone():
    pairs = zip(cells("puzzles.ipynb", "code"), cells("solutions.ipynb", "code"), strict=True)
    differing = [puzzle for puzzle, solution in pairs if puzzle != solution]
    assert ["YOUR CODE" in puzzle for puzzle in differing] == [True] * 8
    titles = cells("puzzles.ipynb", "markdown")[1:9]
    assert all(text.startswith(f"## {n}. ") for n, text in enumerate(titles, 1))
