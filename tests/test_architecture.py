"""What imports what, what no kernel may contain, and how long things may get.

Every rule is a function from one source file to the sentences it objects with, so that a planted
violation can show that it bites. Files are found by name: a new one is under the rules at once.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

#: Imports go downwards only: each module may import those before it.
ORDER = (
    "kernels",
    "layout",
    "reference",
    "steps",
    "loop_cells",
    "chunks",
    "compiled",
    "threads",
    "loop",
    "gemm",
    "grads",
    "onednn",
    "requested",
    "launches",
    "segments",
    "recompute",
    "stack",
    "second",
    "ops",
    "transforms",
    "dispatch",
    "arguments",
    "functional",
    "known",
    "inspection",
    "streaming",
    "modules",
    "tokens",
    "patching",
    "running",
    "study",
    "testing",
    "__init__",
    "__main__",
)
#: Of kernels/, what the rest may import at any time, for it imports no triton.
PURE = (
    "__init__",
    "spec",
    "rows",
    "limits",
    "model",
    "chips",
    "measured",
    "plan",
    "occupancy",
    "assembly",
)
BANNED_IN_KERNELS = {
    "make_block_ptr": "block pointers are gone since Triton 3.8",
    "advance": "block pointers are gone since Triton 3.8",
    "libdevice": "the interpreter has none",
}
MOST_LINES, MOST_LINES_OF_A_BODY = 500, 80
PUBLIC_HOSTS = (
    "127.0.0.1",  # whoever runs the test
    "ai.stanford.edu",
    "arxiv.org",
    "docs.pytorch.org",
    "doi.org",
    "github.com",
    "keepachangelog.com",
    "pytorch.org",
    "semver.org",
    "storage.googleapis.com",
    "www.apache.org",
    "www.w3.org",  # the namespace of SVG
)
# No machine's folder and no package server; the patterns do not match themselves.
PLACE = re.compile(r"(?<![\w.])/(?:work|root|home|opt|tmp|var|mnt)/|(?:find-links|index-url)[ =]")
URL = re.compile(r"https?://([\w.-]+)")
TEXT = ("", ".csv", ".json", ".md", ".py", ".svg", ".toml", ".txt", ".yaml", ".yml")


class Source(NamedTuple):
    """One file: its path from the top, with / between, and its text."""

    path: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def folder(self) -> str:
        return self.path.rpartition("/")[0]

    @property
    def stem(self) -> str:
        return Path(self.path).stem


class Import(NamedTuple):
    """One imported name in full, as in ``fusedrnn.kernels.plan.Plan``."""

    name: str
    line: int
    lazy: bool

    @property
    def layer(self) -> str:
        """The part of fusedrnn it comes from, or "" for what is not ours."""
        top, *rest = self.name.split(".")
        return (rest[0] if rest else "__init__") if top == "fusedrnn" else ""

    @property
    def kernel_module(self) -> str:
        return self.name.split(".")[2] if self.name.startswith("fusedrnn.kernels.") else ""


def sources(*patterns: str) -> Iterator[Source]:
    for pattern in patterns:
        for path in sorted(ROOT.glob(pattern)):
            yield Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))


def imports(source: Source) -> Iterator[Import]:
    """Every import, relative ones spelt out; ``lazy`` is one inside a function."""
    package = {"fusedrnn": ["fusedrnn"], "kernels": ["fusedrnn", "kernels"]}[source.folder]
    functions = [n for n in ast.walk(source.tree) if isinstance(n, ast.FunctionDef)]
    inside = {n.lineno for f in functions for n in ast.walk(f) if isinstance(n, ast.stmt)}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = base + ([node.module] if node.module else [])
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            yield Import(name, node.lineno, node.lineno in inside)


def imports_go_downwards(source: Source) -> Iterator[str]:
    own = "kernels" if source.folder == "kernels" else source.stem
    if own not in ORDER:
        yield f"{source.path} has no place in ORDER"
        return
    for found in imports(source):
        if not found.layer:
            continue
        if found.layer not in ORDER:
            yield f"{source.path}:{found.line} imports {found.name}, which has no place in ORDER"
        elif own != "kernels" and ORDER.index(found.layer) >= ORDER.index(own):
            yield f"{source.path}:{found.line} imports {found.name} upwards"
        elif own == "kernels" and found.layer != "kernels":
            yield f"{source.path}:{found.line}: a kernel imports {found.name}"


def needs_torch_alone(source: Source) -> Iterator[str]:
    """Nothing but torch and the standard library; triton in kernels/ only, and not in PURE."""
    triton_allowed = source.folder == "kernels" and source.stem not in PURE
    allowed = {"torch", "fusedrnn", *sys.stdlib_module_names}
    if triton_allowed:
        allowed.add("triton")
    for found in imports(source):
        if found.name.split(".")[0] not in allowed:
            yield f"{source.path}:{found.line} imports {found.name}"


def takes_schedules_lazily(source: Source) -> Iterator[str]:
    """Who needs no triton himself imports the kernels that do inside functions only."""
    if source.folder == "kernels" and source.stem not in PURE:
        return
    for found in imports(source):
        if not found.lazy and found.kernel_module not in ("", *PURE):
            yield f"{source.path}:{found.line} imports {found.name} outside a function"


def has_no_banned_call(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        names = {getattr(node, "attr", None), getattr(node, "id", None)}
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.name.rpartition(".")[2] for alias in node.names}
            names |= set((getattr(node, "module", None) or "").split("."))
        for name in sorted(names & set(BANNED_IN_KERNELS), key=str):
            yield f"{source.path}:{node.lineno} uses {name}: {BANNED_IN_KERNELS[name]}"


def says_its_precision(source: Source) -> Iterator[str]:
    """tl.dot's default is tf32 on some chips and ieee on others."""
    for node in ast.walk(source.tree):
        is_dot = isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.dot"
        if is_dot and "input_precision" not in {keyword.arg for keyword in node.keywords}:
            yield f"{source.path}:{node.lineno}: tl.dot without input_precision"


def compiles_once_for_all_lengths(source: Source) -> Iterator[str]:
    """T, B and strides are run-time values: none may recompile a kernel."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.arg) and node.annotation:
            sized = node.arg in ("T", "B") or node.arg.startswith("stride")
            if sized and "constexpr" in ast.unparse(node.annotation):
                yield f"{source.path}:{node.lineno}: {node.arg} is a compile-time constant"


def stays_short(source: Source) -> Iterator[str]:
    """A body is counted without its arguments, one a line in a kernel, and its docstring."""
    if (lines := len(source.text.splitlines())) > MOST_LINES:
        yield f"{source.path} has {lines} lines, more than {MOST_LINES}"
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[ast.get_docstring(node) is not None :] or node.body
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1
            if lines > MOST_LINES_OF_A_BODY:
                yield f"{source.path}:{node.lineno}: the body of {node.name} has {lines} lines"


def names_no_machine(source: Source) -> Iterator[str]:
    for number, line in enumerate(source.text.splitlines(), 1):
        if place := PLACE.search(line):
            yield f"{source.path}:{number} names a place on a machine: {place[0]}"
        for host in URL.findall(line):
            if host not in PUBLIC_HOSTS:
                yield f"{source.path}:{number} names {host}, which is not in PUBLIC_HOSTS"


def marks_what_needs_a_gpu(source: Source) -> Iterator[str]:
    """`-m gpu` must select a test that skips without CUDA: by the fixture ``device``, or a mark."""
    absent = "not torch.cuda.is_available()"
    named: dict[str, str] = {}  # what the module's own names, decorators among them, stand for
    for node in source.tree.body:
        if isinstance(node, ast.Assign):
            named |= {ast.unparse(target): ast.unparse(node.value) for target in node.targets}
    everywhere = named.get("pytestmark", "")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            marks = [everywhere, *decorators, *(named.get(name, "") for name in decorators)]
            skips = absent in ast.unparse(node) or any(absent in mark for mark in marks)
            selected = any("mark.gpu" in mark for mark in marks)
            if skips and not selected and "device" not in [arg.arg for arg in node.args.args]:
                yield f"{source.path}:{node.lineno}: `-m gpu` leaves out {node.name}"


PACKAGE = ("fusedrnn/*.py", "kernels/*.py")
KERNELS = ("kernels/*.py",)
RULES: list[tuple[Callable[[Source], Iterator[str]], tuple[str, ...]]] = [
    (imports_go_downwards, PACKAGE),
    (needs_torch_alone, PACKAGE),
    (takes_schedules_lazily, PACKAGE),
    (has_no_banned_call, KERNELS),
    (says_its_precision, KERNELS),
    (compiles_once_for_all_lengths, KERNELS),
    (stays_short, (*PACKAGE, "bench/*.py", "bench/lessons/*.py")),
    (marks_what_needs_a_gpu, ("tests/*.py",)),
]


@pytest.mark.parametrize(("rule", "patterns"), RULES, ids=[rule.__name__ for rule, _ in RULES])
def test_rule(rule, patterns):
    files = list(sources(*patterns))
    assert files, f"no file is called {' or '.join(patterns)}"
    found = [sentence for source in files for sentence in rule(source)]
    assert not found, "\n".join(found)


def test_no_machine_is_named():
    folders = ("fusedrnn", "kernels", "tests", "bench", "docs", ".ci")
    inside = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    found = []
    for path in sorted([*ROOT.glob("*"), ROOT / ".gitignore", *inside]):
        relative = path.relative_to(ROOT).as_posix()
        generated = "__pycache__" in relative or relative.startswith("bench/results/local")
        if path.is_file() and path.suffix in TEXT and not generated:
            found += names_no_machine(Source(relative, path.read_text(encoding="utf-8")))
    assert not found, "\n".join(found)


NEEDS_CUDA = "pytest.mark.skipif(not torch.cuda.is_available(), reason='')\n"
LONG_BODY = "def f():\n    '''Doc.'''\n" + "    x = 1\n" * 81
PLANTED = [
    (imports_go_downwards, "fusedrnn/ops.py", "from .modules import LSTM"),
    (imports_go_downwards, "fusedrnn/ops.py", "def f():\n    from . import functional"),
    (imports_go_downwards, "fusedrnn/ops.py", "import fusedrnn"),
    (imports_go_downwards, "fusedrnn/dispatch.py", "from fusedrnn.functional import lstm"),
    (imports_go_downwards, "fusedrnn/surprise.py", ""),
    (imports_go_downwards, "kernels/plan.py", "from ..stack import Config"),
    (needs_torch_alone, "fusedrnn/ops.py", "def f():\n    import triton"),
    (needs_torch_alone, "fusedrnn/ops.py", "import numpy as np"),
    (needs_torch_alone, "fusedrnn/testing.py", "from bench.gate import check"),
    (needs_torch_alone, "kernels/plan.py", "from triton import language"),
    (takes_schedules_lazily, "fusedrnn/ops.py", "from .kernels.resident import resident_fwd"),
    (takes_schedules_lazily, "fusedrnn/ops.py", "from .kernels import resident"),
    (takes_schedules_lazily, "kernels/plan.py", "from .cells import CELLS"),
    (has_no_banned_call, "kernels/x.py", "p = tl.make_block_ptr(x)"),
    (has_no_banned_call, "kernels/x.py", "p = tl.advance(p, (1,))"),
    (has_no_banned_call, "kernels/x.py", "from triton.language.extra import libdevice"),
    (has_no_banned_call, "kernels/x.py", "from triton.language.extra.libdevice import tanh"),
    (says_its_precision, "kernels/x.py", "y = tl.dot(a, b, acc)"),
    (compiles_once_for_all_lengths, "kernels/x.py", "def f(x_ptr, T: tl.constexpr): pass"),
    (compiles_once_for_all_lengths, "kernels/x.py", "def f(stride_x_b: tl.constexpr): pass"),
    (stays_short, "bench/x.py", "x = 1\n" * 501),
    (stays_short, "bench/x.py", LONG_BODY),
    (marks_what_needs_a_gpu, "tests/x.py", f"@{NEEDS_CUDA}def test(cell): pass"),
    (marks_what_needs_a_gpu, "tests/x.py", f"gpu = {NEEDS_CUDA}@gpu\ndef test(): pass"),
    (marks_what_needs_a_gpu, "tests/x.py", f"pytestmark = {NEEDS_CUDA}def test(): pass"),
    (
        marks_what_needs_a_gpu,
        "tests/x.py",
        "def test():\n    if not torch.cuda.is_available():\n        pytest.skip('')",
    ),
    (names_no_machine, "docs/x.md", "see /" + "home/me/x"),
    (names_no_machine, "docs/x.md", "pip --index-" + "url=x"),
    (names_no_machine, "docs/x.md", "https:" + "//packages.example.org/simple"),
]


@pytest.mark.parametrize(("rule", "path", "text"), PLANTED)
def test_planted_violation_is_found(rule, path, text):
    assert len(list(rule(Source(path, text)))) == 1


ALLOWED = [
    (imports_go_downwards, "fusedrnn/ops.py", "from .kernels.plan import plan\nimport torch"),
    (imports_go_downwards, "kernels/plan.py", "from .spec import SPECS"),
    (needs_torch_alone, "kernels/cells.py", "import triton\nfrom .common import tanh"),
    (takes_schedules_lazily, "fusedrnn/ops.py", "def f():\n    from .kernels import resident"),
    (has_no_banned_call, "kernels/x.py", '"""No libdevice here."""  # nor make_block_ptr'),
    (stays_short, "kernels/x.py", "def f(" + "\n    a,\n" * 90 + "): pass"),
    (marks_what_needs_a_gpu, "tests/x.py", f"@{NEEDS_CUDA}def test(cell, device): pass"),
    (marks_what_needs_a_gpu, "tests/x.py", f"@pytest.mark.gpu\n@{NEEDS_CUDA}def test(): pass"),
    (names_no_machine, "docs/x.md", "../shared/home/x, work/x, https:" + "//arxiv.org/abs/1"),
]


@pytest.mark.parametrize(("rule", "path", "text"), ALLOWED)
def test_what_is_right_is_let_through(rule, path, text):
    assert not list(rule(Source(path, text)))


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # `import triton` raises, find_spec finds none
import torch
before = set(sys.modules)
import fusedrnn
tops = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(tops - {"torch", *sys.stdlib_module_names}))

lstm, x = fusedrnn.LSTM(3, 4), torch.randn(5, 2, 3, requires_grad=True)
for backend in ("auto", "aten", "torch"):
    with fusedrnn.use_backend(backend):
        lstm(x)[0].sum().backward()
with fusedrnn.use_backend("triton"):
    try:
        lstm(x)
    except NotImplementedError as error:
        print(error)
"""


def test_import_and_run_without_triton():
    """fusedrnn imports nothing but torch, and its CPU backends need no triton."""
    ours = ("TRITON_INTERPRET", "FUSEDRNN_BACKEND")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON],
        env={**kept, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    imported, refusal = done.stdout.splitlines()
    assert imported == "fusedrnn"
    assert "triton" in refusal


def test_kernels_are_reached_through_a_relative_symlink():
    link = ROOT / "fusedrnn" / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("../kernels")
