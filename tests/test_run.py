"""``python -m fusedrnn run``: a program finds what python gives it, and its modules are counted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fusedrnn
from fusedrnn import __main__ as command_line

ROOT = Path(__file__).parent.parent
NONE_RAN = "fusedrnn: 0 modules ran\n"
RUN = ("-m", "fusedrnn", "run")


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs python in a folder; nothing but the arguments and that folder says what it finds."""
    ours = ("FUSEDRNN_BACKEND", "TRITON_INTERPRET", "PYTHONSAFEPATH")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**kept, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def both(*arguments: str, cwd: Path):
    """What a program does under python, and under ours without the line at the end."""
    plain, ours = python(*arguments, cwd=cwd), python(*RUN, *arguments, cwd=cwd)
    assert ours.stderr.endswith(NONE_RAN), ours.stderr
    ours.stderr = ours.stderr.removesuffix(NONE_RAN)
    return plain, ours


FACTS = '''"""The doc."""
import __main__, atexit, inspect, pickle, sys
import beside  # only in the script's own folder

class Here:
    pass

def at_the_end(here=Here()):
    print(type(pickle.loads(pickle.dumps(here))) is Here, __main__.Here is Here)

def annotated(x: undefined_unless_annotations_are_strings = 0): pass

if __name__ == "__main__":
    print(__doc__, __file__, __package__, __spec__, __cached__, type(__loader__).__name__)
    print(sys.argv, sys.path[0], vars() is vars(__main__))
    print(inspect.getsource(Here), end="")
    atexit.register(at_the_end)
'''


def test_a_script_finds_what_python_gives_it(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "beside.py").touch()
    text = FACTS.replace("undefined_unless_annotations_are_strings", "int")
    (tmp_path / "real" / "facts.py").write_text(text)
    (tmp_path / "linked.py").symlink_to("real/facts.py")
    arguments = ("linked.py", "-m", "--", "-h", "--flag=1", "")
    plain, ours = both(*arguments, cwd=tmp_path)
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.count("\n") == 5
    assert (ours.stdout, ours.returncode, ours.stderr) == (plain.stdout, 0, "")


def test_a_traceback_is_the_programs_own(tmp_path):
    (tmp_path / "raises.py").write_text(
        "def annotated(x: undefined): pass\n"  # our `from __future__` does not reach the program
    )
    plain, ours = both("raises.py", cwd=tmp_path)
    assert "NameError" in plain.stderr
    assert (ours.stderr, ours.returncode) == (plain.stderr, 1)


def test_a_hook_of_the_program_is_called(tmp_path):
    (tmp_path / "hook.py").write_text(
        "import sys\n"
        "def hook(kind, error, traceback):\n"
        "    print(kind, error, traceback.tb_frame.f_code.co_name, traceback.tb_next)\n"
        "    assert error.__traceback__ is traceback\n"
        "sys.excepthook = hook\n"
        "raise ValueError('from above') from KeyError('below')\n"
    )
    plain, ours = both("hook.py", cwd=tmp_path)
    assert plain.stdout == "<class 'ValueError'> from above <module> None\n"
    assert (ours.stdout, ours.stderr, ours.returncode) == (plain.stdout, plain.stderr, 1)


def test_bad_syntax_is_shown_as_by_python(tmp_path):
    (tmp_path / "bad.py").write_text("x = 1\nif x\n")
    plain, ours = both("bad.py", cwd=tmp_path)
    assert "SyntaxError" in plain.stderr
    assert (ours.stderr, ours.returncode) == (plain.stderr, 1)


def test_an_interrupt_ends_as_by_python(tmp_path):
    (tmp_path / "interrupted.py").write_text("raise KeyboardInterrupt\n")
    plain, ours = both("interrupted.py", cwd=tmp_path)
    assert plain.returncode == -signal.SIGINT  # which a shell calls 130
    assert (ours.stderr, ours.returncode) == (plain.stderr, -signal.SIGINT)


MODULE = """
import sys
import torch
import fusedrnn
from . import sibling
assert torch.nn.LSTM is fusedrnn.LSTM
assert sibling.Model.__mro__[1] is fusedrnn.GRU
print(__name__, __package__, __spec__.name, __file__ == sys.argv[0], sys.argv[1:])
sibling.Model(3, 4)(torch.randn(6, 5, 3))
sys.exit("enough")
"""


def test_a_module_runs_as_by_python(tmp_path):
    package = tmp_path / "some" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "sibling.py").write_text("import torch\nclass Model(torch.nn.GRU):\n    pass\n")
    (package / "__main__.py").write_text(MODULE)
    done = python(*RUN, "-m", "some.package", "-m", "x", cwd=tmp_path)
    assert done.stdout == "__main__ some.package some.package.__main__ True ['-m', 'x']\n"
    assert done.stderr == "enough\nfusedrnn: 1 module ran: 1 on aten\n"
    assert done.returncode == 1


ENDS = {
    "exit-7": "sys.exit(7)",
    "exit-text": "sys.exit('enough')",
    "exit-none": "sys.exit()",
    "exit-tuple": "raise SystemExit((1, 2))",
    "error": "inner()",
    "chained": "raise ValueError('above') from KeyError('below')",
    "in-a-module": "sibling.fail()",
    "interrupt": "raise KeyboardInterrupt",
    "to-the-end": "atexit.register(print, 'last')",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_module_ends_as_by_python(end, tmp_path):
    """``run -m package ARGS`` beside ``python -m package ARGS``: argv, output, exit code, trace."""
    package = tmp_path / "some" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "sibling.py").write_text("def fail():\n    raise RuntimeError('from afar')\n")
    (package / "__main__.py").write_text(
        "import atexit, sys\nfrom . import sibling\n"
        "def inner():\n    raise KeyError('inner')\n"
        "print(sys.argv, sys.path[0], __name__, __package__, __spec__.name, __file__)\n"
        f"{ENDS[end]}\n"
    )
    plain, ours = both("-m", "some.package", "-m", "--flag=1", "", "x y", cwd=tmp_path)
    assert str(package / "__main__.py") in plain.stdout
    # Python shows runpy's frames of its own, which are not the program's.
    frames = r"  File \"<frozen runpy>\".*\n"
    assert ours.stderr == re.sub(frames, "", plain.stderr)
    assert (ours.stdout, ours.returncode) == (plain.stdout, plain.returncode)


def test_what_cannot_be_found(tmp_path):
    done = python(*RUN, "-m", "nowhere", cwd=tmp_path)
    assert done.stderr == f"ImportError: No module named nowhere\n{NONE_RAN}"
    assert done.returncode == 1


COMPILED = """
import gc, os, sys
import fusedrnn
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(4, 4)
    def forward(self, x):
        return self.rnn(x)[0]

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.cell, self.block = nn.LSTM(4, 4), nn.GRUCell(4, 4), Block()
    def forward(self, x):
        x = checkpoint(self.block, self.lstm(x)[0], use_reentrant=False)
        return self.cell(x[-1])

def train(model, x, **options):
    compiled = torch.compile(model, fullgraph=True, **options)
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())

x = torch.randn(6, 5, 4)
with fusedrnn.use_backend("torch"):
    train(Model(), x, backend="aot_eager")  # three modules, gone when this is done
gc.collect()
counters = torch._dynamo.utils.counters["stats"]
before = counters["unique_graphs"]
blocks = [Block() for _ in range(10)]
with fusedrnn.use_backend("aten"):
    for block in blocks:
        block.compile(fullgraph=True, backend="eager")
        block(x)
# No guard ties code to one module, so all ten share one graph.
assert counters["unique_graphs"] == before + 1, counters

eager, never = nn.RNN(4, 4), nn.LSTM(4, 4)
for _ in range(3):
    eager(x)
again = nn.LSTMCell(4, 4)
again(x[0])
with fusedrnn.use_backend("torch"):
    again(x[0])
with fusedrnn.use_backend("torch"):
    nn.RNNCell(4, 4)(x[0])
fusedrnn.explain(never, x)
replica = eager._replicate_for_data_parallel()
for name, p in eager.named_parameters():
    setattr(replica, name, p * 1)
replica(x)
child = os.fork()
if child == 0:
    sys.exit(0)  # says nothing: the line is the parent's
assert os.waitpid(child, 0)[1] == 0
"""


def test_modules_are_counted_compiled_ones_too_and_nothing_is_disturbed(tmp_path):
    (tmp_path / "script.py").write_text(COMPILED)
    done = python("-W", "ignore", *RUN, "script.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # torch: the three that were compiled together, and RNNCell; aten: one block of ten, and RNN.
    expected = "fusedrnn: 7 modules ran: 4 on torch, 2 on aten, 1 on torch and aten\n"
    assert done.stderr == expected


@pytest.fixture
def running():
    """The module behind the command, which sets nothing off by being imported."""
    from fusedrnn import running

    return running


def test_the_line(running):
    tally = running.Tally()
    assert str(tally) == "fusedrnn: 0 modules ran"
    modules = [torch.nn.Linear(1, 1) for _ in range(4)]
    tally.note(modules[0], "aten")
    assert str(tally) == "fusedrnn: 1 module ran: 1 on aten"
    tally.note(modules[0], "aten")
    tally.note(modules[0], "triton")
    tally.note(modules[1], "triton")
    tally.note(modules[2], "triton")
    assert str(tally) == "fusedrnn: 3 modules ran: 2 on triton, 1 on triton and aten"


def test_an_id_that_is_used_again_is_another_module(running):
    tally = running.Tally()
    module = torch.nn.Linear(1, 1)
    tally.note(module, "aten")
    reference, backends = tally._latest.pop(id(module))
    tally._latest[id(module)] = (lambda: None), backends  # as when the first one is gone
    tally.note(module, "aten")
    assert reference() is module
    assert str(tally) == "fusedrnn: 2 modules ran: 2 on aten"


def test_a_dynamo_that_shows_no_module_does_not_stop_the_program(running, monkeypatch):
    tally = running.Tally()
    monkeypatch.setattr(running, "_tally", tally)
    module = torch.nn.Linear(1, 1)
    variables = {
        "backend": SimpleNamespace(as_python_constant=lambda: "aten"),
        "module": SimpleNamespace(),
    }
    context = SimpleNamespace(get_local=variables.__getitem__)
    running._note_while_tracing(context)
    setattr(variables["module"], running._REVEAL, lambda: SimpleNamespace())
    running._note_while_tracing(context)
    assert str(tally) == "fusedrnn: 0 modules ran"
    setattr(variables["module"], running._REVEAL, lambda: SimpleNamespace(value=module))
    running._note_while_tracing(context)
    assert str(tally) == "fusedrnn: 1 module ran: 1 on aten"


def test_importing_counts_nothing(running):
    assert fusedrnn.LSTM.forward.__code__.co_filename == fusedrnn.modules.__file__
    assert torch.nn.LSTM.__module__ == "torch.nn.modules.rnn"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("walk",), "invalid choice: 'walk'"),
        (("run",), "the following arguments are required: script.py or module"),
        (("run", "-m"), "the following arguments are required: script.py or module"),
        (("run", "--fast", "x.py"), "unrecognized arguments: --fast"),
        (("run", "nowhere.py", "-m"), "can't open file 'nowhere.py': No such file or directory"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_a_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        command_line.main(arguments)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_help_names_the_forms(capsys):
    with pytest.raises(SystemExit) as ended:
        command_line.main(["run", "-h"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "python -m fusedrnn run [-h] script.py [argument ...]" in shown
    assert "python -m fusedrnn run [-h] -m module [argument ...]" in shown
