"""The puzzles of docs/puzzles.ipynb: checks fail on the empty cells and pass with the solutions."""

import json
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


def found_by_checks(name, folder):
    for n, cell in enumerate(cells(name, "code")):
        (folder / f"cell{n:02}.py").write_text(cell)
    done = python("-c", RUN, folder, cwd=folder, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.xdist_group("processes")
def test_the_solutions_pass_every_check(tmp_path):
    solved = [f"Puzzle {n} is solved." for n in range(1, 9)]
    assert found_by_checks("solutions.ipynb", tmp_path) == solved


@pytest.mark.xdist_group("processes")
def test_every_check_fails_on_the_empty_cell(tmp_path):
    failed = found_by_checks("puzzles.ipynb", tmp_path)
    assert [line[:9] for line in failed] == [f"puzzle {n}:" for n in range(1, 9)]


def test_the_notebooks_differ_in_eight_cells_alone():
    pairs = zip(cells("puzzles.ipynb", "code"), cells("solutions.ipynb", "code"), strict=True)
    differing = [puzzle for puzzle, solution in pairs if puzzle != solution]
    assert ["YOUR CODE" in puzzle for puzzle in differing] == [True] * 8
    titles = cells("puzzles.ipynb", "markdown")[1:9]
    assert all(text.startswith(f"## {n}. ") for n, text in enumerate(titles, 1))
