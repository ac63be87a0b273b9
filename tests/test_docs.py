"""What the Markdown files name is there: figures, files and functions; and what they quote is so.

Every check is a function from texts to what it objects to, so that a planted fault can show that it
bites. Files are found by name: a new one is checked at once.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import test_architecture as architecture
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusedrnn import reference
from fusedrnn.kernels.spec import Weights

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs" / "figures"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGE = ROOT / "docs" / "kernels.md"

#: ``![alt](path)``, ``[text](path)`` and ``<img src="path">``.
IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)|<img[^>]*\ssrc=\"([^\"]+)\"")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
#: `kernels/plan.py` or `plan.py: cooperative, _wavefront`, in backquotes.
NAMED = re.compile(r"`([\w./-]+\.py)(?::\s+([\w,.\s]+))?`")
#: Paths are from the top of the repository or, as in "`kernels/`'s plan.py", from one of these.
FOLDERS = ("", "fusedrnn", "kernels", "bench", "tests", "docs")
#: A command and what it says, in a block of its own.
QUOTED = re.compile(r"```\n\$ (python -m fusedrnn study [^\n]*)\n(.*?)```", re.DOTALL)
VERSION = re.compile(r"Triton (\d+\.\d+\.\d+)")


def images(text: str) -> list[str]:
    return [one or other for one, other in IMAGE.findall(text)]


def missing_targets(folder: Path, text: str) -> Iterator[str]:
    """Figures and links to files that do not exist."""
    for target in images(text) + LINK.findall(text):
        path = target.partition("#")[0]
        if path and "://" not in path and not (folder / path).exists():
            yield f"{target} does not exist"


def unused_figures(names: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Names of figures that no text shows."""
    shown = {Path(image).name for text in texts for image in images(text)}
    return [name for name in names if name not in shown]


def named_in(path: Path) -> set[str]:
    """Functions, classes, methods as ``Class.method``, and constants of a module."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
            inner = node.body if isinstance(node, ast.ClassDef) else []
            found |= {f"{node.name}.{n.name}" for n in inner if isinstance(n, ast.FunctionDef)}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [name for target in targets for name in ast.walk(target)]
            found |= {name.id for name in names if isinstance(name, ast.Name)}
    return found


def missing_names(text: str) -> Iterator[str]:
    """Files of ours that are not there, and names that are not in their files."""
    for file, names in NAMED.findall(text):
        path = next((ROOT / f / file for f in FOLDERS if (ROOT / f / file).is_file()), None)
        if path is None:
            yield f"{file} does not exist"
            continue
        for name in re.split(r",\s+", names) if names else ():
            if name not in named_in(path):
                yield f"{file} has no {name}"


def unsaid(quoted: str, said: str) -> list[str]:
    """Lines of a quotation that the text does not have, in this order."""
    rest = iter(said.splitlines())
    return [line for line in quoted.splitlines() if line not in rest]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_figures_and_functions_exist(page):
    text = page.read_text(encoding="utf-8")
    found = [*missing_targets(page.parent, text), *missing_names(text)]
    assert not found, "\n".join(found)


def test_every_figure_is_shown():
    names = [path.name for path in FIGURES.glob("*.svg")]
    assert names
    assert not unused_figures(names, [page.read_text(encoding="utf-8") for page in PAGES])


def test_planted_faults_are_found():
    assert len(list(missing_targets(ROOT, "![a](docs/figures/no.svg) [b](no.md#there)"))) == 2
    assert len(list(missing_targets(ROOT, '<img width="9" src="no.svg"> `x`'))) == 1
    assert (
        len(list(missing_names("`kernels/no.py` and `kernels/plan.py: resident, residents`"))) == 2
    )
    assert len(list(missing_names("`graphs.py: Graphs.run, Graphs.walk, GRAPHS, _GRAPHS`"))) == 2
    assert unused_figures(["a.svg", "b.svg"], ["![a](figures/a.svg)", "b.svg"]) == ["b.svg"]
    assert unsaid("b\na\n", "a\nb\n") == ["a"]


def test_figures_are_what_the_script_draws(tmp_path):
    pytest.importorskip("matplotlib", reason="without matplotlib no figure can be drawn again")
    from bench import figures

    drawn = {path.name: path.read_text(encoding="utf-8") for path in figures.draw(tmp_path)}
    committed = {path.name: path.read_text(encoding="utf-8") for path in FIGURES.glob("*.svg")}
    assert drawn.keys() == committed.keys()
    for name, text in drawn.items():
        assert text == committed[name], f"{name}: python -m bench.figures draws another one"


class Recorder(TorchDispatchMode):
    """The names of the operators that are no views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(value.alias_info is not None for value in func._schema.returns):
            self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def test_launches_of_an_eager_step():
    """The first figure and the text count what the equations of an LSTM run in one step."""
    from bench import figures

    B, H = 2, 3
    w = Weights(torch.ones(4 * H, 1), torch.ones(4 * H, H), torch.ones(4 * H), torch.ones(4 * H))
    gx, h, c = torch.ones(B, 4 * H), torch.ones(B, H), torch.ones(B, H)
    with Recorder() as recorder:
        reference._lstm_step(gx, h, c, w)
    assert tuple(recorder.names) == figures.EAGER
    assert f"{len(figures.EAGER)} launches" in PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="without Triton nothing can be compiled"
)
def test_quotations_of_study(tmp_path):
    """Each command is run, and must still say what the page says it says."""
    import triton

    text = PAGE.read_text(encoding="utf-8")
    (version,) = set(VERSION.findall(text))
    variable = "FUSEDRNN_TRITON_" + "".join(version.split(".")[:2])
    path = [str(ROOT)]
    if triton.__version__ != version:
        if variable not in os.environ:
            pytest.skip(f"quoted from Triton {version}; {variable} names no folder with it")
        path.insert(0, os.environ[variable])
    quotations = QUOTED.findall(text)
    assert len(quotations) == 3
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    for command, quoted in quotations:
        words = [sys.executable, *shlex.split(command)[1:], "--out", str(tmp_path)]
        done = subprocess.run(
            words,
            cwd=ROOT,
            env={**kept, "PYTHONPATH": os.pathsep.join(path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert not unsaid(quoted, done.stdout), command


#: A line of CONTRIBUTING's list of modules: the path, blanks, and what it is.
LISTED = re.compile(r"^    ((?:fusedrnn|kernels)/\w+\.py)  +\S", re.MULTILINE)


def misplaced(listed: Sequence[str]) -> Iterator[str]:
    """Modules that the list lacks or invents, and imports that do not go downwards in it.

    ``kernels/`` counts as one, as in ``test_architecture``.
    """
    files = {s.path: s for s in architecture.sources(*architecture.PACKAGE)}
    there = {path for path in files if not path.endswith("__.py")}
    for path in sorted(there ^ set(listed)):
        yield f"{path} is {'not listed' if path in there else 'no file'}"
    for place, path in enumerate(listed):
        for found in architecture.imports(files[path]) if path in files else ():
            other = f"fusedrnn/{found.layer}.py"
            if other in listed[:place]:
                yield f"{path} imports {other}, which stands above it"


def test_contributing_lists_every_module_above_what_it_imports():
    listed = LISTED.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    found = list(misplaced(listed))
    assert not found, "\n".join(found)
    stack = listed.index("fusedrnn/stack.py")
    assert list(misplaced(listed[:stack] + listed[stack + 1 :])) == [
        "fusedrnn/stack.py is not listed"
    ]
    assert list(misplaced([*listed, "fusedrnn/none.py"])) == ["fusedrnn/none.py is no file"]
    assert any("which stands above it" in line for line in misplaced(listed[::-1]))


def test_every_verb_of_make_is_explained():
    said = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    verbs = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert len(verbs) > 10
    assert [v for v in verbs if not re.search(rf"`make {v}(?: [A-Z][^`]*)?`", said)] == []


#: ``python -m bench ...`` to the end of the line, of a comment, or of the backquotes around it.
BENCH = re.compile(r"python -m bench(?![.\w])([^`\n#;|(]*)")
#: What stands for a value that the reader has.
PLACEHOLDERS = {"NAMES": "smoke", "NAME": "gates", "DIR": "x", "DATE": "x"}


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of every command line of the bench; lines that are broken are joined."""
    joined = re.sub(r"(?<=`)([^`\n]+)\n([^`\n]+)(?=`)", r"\1 \2", text)
    for rest in BENCH.findall(joined):
        yield [PLACEHOLDERS.get(word, word) for word in shlex.split(rest.strip(" .,:)"))]


def wrong_commands(text: str) -> Iterator[str]:
    """Those that the parsers refuse; nothing is run."""
    from bench import __main__ as bench
    from bench import cases, protocol
    from bench.lessons import command

    for words in commands(text):
        try:
            options = bench.parse(words)
            bench.check(options)
            if options.command == "lesson" and options.name not in (None, *command.LESSONS):
                yield f"{words}: there is no lesson {options.name}"
            if options.cases is not None:
                cases.named(options.cases)
            protocol.chosen(options.providers, torch.device("cpu"))
        except (SystemExit, *bench.USER_ERRORS) as error:
            yield f"{words}: {error}"


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "Makefile"], ids=lambda page: page.name
)
def test_command_lines_of_the_bench_are_understood(page):
    found = list(wrong_commands(page.read_text(encoding="utf-8")))
    assert not found, "\n".join(found)


def test_wrong_command_lines_are_found(capsys):
    assert [words for page in PAGES for words in commands(page.read_text(encoding="utf-8"))]
    assert not list(wrong_commands("`python -m bench --cases NAMES`, python -m bench.figures"))
    for line in ("--cases nothing", "--providers keras", "--case x", "compare A.csv", "lesson x",
                 "--cases smoke --providers nobody", "no-lesson", "cpu --device cpu"):  # fmt: skip
        assert len(list(wrong_commands(f"see `python -m bench {line}`."))) == 1, line
