"""Tests of the structure: imports, lengths, docstrings, and the rules of kernels."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from processes import ROOT, python

FOLDERS = ("fusedrnn", "kernels", "bench", "bench/lessons")
PATHS = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PATHS}
PACKAGE = {path: text for path, text in TEXTS.items() if not path.startswith("bench/")}
MODULES = ("resident", "resident_nvidia", "cooperative", "stepwise")
SCHEDULES = {f"fusedrnn.kernels.{name}" for name in MODULES}
#: The kernels of docs/kernels.md, each of which is read alone.
RUNGS = {f"kernels/{name}.py" for name in MODULES}
MOST_LINES, MOST_LINES_OF_A_RUNG, MOST_LINES_OF_A_FUNCTION = 450, 300, 60
MOST_PARAMETERS, LONGEST_CHAIN = 12, 10
#: The operators of torch.library, whose schema is their list of parameters.
OPERATORS = re.compile(r"torch\.library|library\.|_op\b|custom_op|register")
OPENING = re.compile(r"(What|Whether|Of|Likewise|How|Which|Here|Where|As)\b")
BANNED = re.compile(
    r"\b(nobody|whoever|of its own|hands on|goes this way|likewise)\b", re.IGNORECASE
)
PLACE = re.compile(r"(?<![\w.])/(?:work|root|home|opt|tmp|mnt)/|(?:find-links|index-url)[ =]")


def imported(path: str) -> set[str]:
    """Returns the names that a file imports in full, as ``fusedrnn.ops.rnn_stack``."""
    package = ["fusedrnn", "kernels"][: 1 + path.startswith("kernels/")]
    names = SCHEDULES if "import_module(" in PACKAGE[path] else set()
    for node in ast.walk(ast.parse(PACKAGE[path])):
        if isinstance(node, ast.Import):
            names = names | {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*base, node.module or ""]).strip(".")
            names = names | {f"{base}.{alias.name}" for alias in node.names}
    return names


def files_below(path: str) -> set[str]:
    """Returns the files of the package that a file imports."""
    found = set()
    for name in imported(path):
        place = name.removeprefix("fusedrnn.") if ".kernels." in name else name
        parts = place.split(".")[:2]
        found |= {"/".join(parts) + ".py"} & PACKAGE.keys()
    return found - {path}


def test_imports_have_no_circle_and_no_long_chain():
    graph = {path: files_below(path) for path in PACKAGE}
    assert "fusedrnn/stack.py" in graph["fusedrnn/ops.py"]
    assert "kernels/tiles.py" in graph["kernels/resident.py"]
    chains: dict[str, tuple[str, ...]] = {}
    for path in TopologicalSorter(graph).static_order():  # raises CycleError
        chains[path] = (path, *max((chains[other] for other in graph[path]), key=len, default=()))
    chains.pop("fusedrnn/__main__.py")
    longest = max(chains.values(), key=len)
    assert len(longest) <= LONGEST_CHAIN, " -> ".join(longest)


def test_every_file_has_a_file_of_tests():
    names = {Path(path).stem.strip("_") for path in PACKAGE} - {"init"}
    assert names <= {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}


@pytest.mark.parametrize("path", PACKAGE)
def test_only_kernels_import_triton(path):
    allowed = {"torch", "fusedrnn", *sys.stdlib_module_names}
    allowed |= {"triton"} if path.startswith("kernels/") else set()
    assert {name.split(".")[0] for name in imported(path)} <= allowed


@pytest.mark.parametrize("path", TEXTS)
def test_lengths_and_english(path):
    text, found = TEXTS[path], []
    most = MOST_LINES_OF_A_RUNG if path in RUNGS else MOST_LINES
    if (lines := len(text.splitlines())) > most:
        found.append(f"{lines} lines")
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            continue
        docstring, where = ast.get_docstring(node) or "", getattr(node, "name", "the file")
        if OPENING.match(docstring):
            found.append(f"{where}: the docstring opens with {docstring.split()[0]}")
        found += [f"{where}: {word}" for word in BANNED.findall(docstring)]
        if isinstance(node, ast.FunctionDef):
            lines = [line for line in text.splitlines()[node.lineno - 1 : node.end_lineno] if line]
            lines = len(lines) - len(docstring.splitlines())
            if lines > MOST_LINES_OF_A_FUNCTION:
                found.append(f"{where}: {lines} lines without blank ones and the docstring")
            decorators = " ".join(map(ast.unparse, node.decorator_list))
            count = len(node.args.args) + len(node.args.kwonlyargs)
            if count > MOST_PARAMETERS and not OPERATORS.search(decorators):
                found.append(f"{where}: {count} parameters")
    assert not found, f"{path}\n" + "\n".join(found)


@pytest.mark.parametrize("path", [path for path in PACKAGE if path.startswith("kernels/")])
def test_kernels_name_their_precision_and_compile_once_for_all_lengths(path):
    for node in ast.walk(ast.parse(PACKAGE[path])):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.dot":
            assert "input_precision" in {keyword.arg for keyword in node.keywords}, node.lineno
        if isinstance(node, ast.arg) and node.arg in ("T", "B") and node.annotation:
            assert "constexpr" not in ast.unparse(node.annotation), node.lineno


def test_no_machine_is_named():
    command = ["git", "ls-files", "*.py", "*.md", "*.toml", "*.txt"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    paths = [ROOT / name for name in done.stdout.split()] or list(ROOT.rglob("*.py"))
    assert [path for path in paths if PLACE.search(path.read_text())] == []


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # `import triton` raises, find_spec finds none
import torch
before = set(sys.modules)
import fusedrnn
tops = {name.partition(".")[0] for name in set(sys.modules) - before}
assert dir(fusedrnn) == sorted(fusedrnn.__all__)
assert all(hasattr(fusedrnn, name) for name in fusedrnn.__all__)
print(*sorted(tops - {"torch", *sys.stdlib_module_names}))
lstm, x = fusedrnn.LSTM(3, 4), torch.randn(5, 2, 3, requires_grad=True)
for backend in ("auto", "aten", "torch"):
    with fusedrnn.use_backend(backend):
        lstm(x)[0].sum().backward()
try:
    with fusedrnn.use_backend("triton"):
        lstm(x)
except NotImplementedError as error:
    print(error)
"""


def test_import_and_run_without_triton():
    done = python("-c", WITHOUT_TRITON, FUSEDRNN_BACKEND="auto")
    assert done.returncode == 0, done.stderr
    names, refusal = done.stdout.splitlines()
    assert names == "fusedrnn"
    assert "triton" in refusal.lower()
