"""Tests of ``python -m fusedrnn run``: programs run as under python, and modules are counted."""

import subprocess
from pathlib import Path

import pytest
from processes import python

FACTS = """
import __main__, os, sys, torch, fusedrnn
import beside  # only in the script's folder
print(__name__, __package__, __file__ == sys.argv[0], sys.argv[1:], vars() is vars(__main__))
assert torch.nn.LSTM is fusedrnn.LSTM
from torch.ao.quantization.quantization_mappings import DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS
assert torch.nn.LSTM not in DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS  # it has bound torch's own
torch.nn.GRU(3, 4)(torch.randn(1, 5, 3))
if os.fork() == 0:
    sys.exit(0)  # prints no line
os.wait()
sys.exit("enough")
"""
COMPILED = """
import torch, fusedrnn
from torch import nn

x = torch.randn(6, 5, 4)
models = [nn.Sequential(nn.GRU(4, 4)) for _ in range(3)]
with fusedrnn.use_backend("aten"):
    for model in models:
        model.compile(fullgraph=True, backend="eager")  # one graph for all, and one module
        model(x)
eager, never, cell = nn.RNN(4, 4), nn.LSTM(4, 4), nn.LSTMCell(4, 4)
for backend in ("aten", "torch"):
    with fusedrnn.use_backend(backend):
        eager(x)
with fusedrnn.use_backend("torch"):
    cell(x[0])
    nn.RNNCell(4, 4)(x[0])  # does not live to the end
replica = eager._replicate_for_data_parallel()
for name, p in eager.named_parameters():
    setattr(replica, name, p * 1)
replica(x)
"""


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    program = "-W", "ignore", "-m", "fusedrnn", "run"
    return python(*program, *arguments, cwd=cwd, FUSEDRNN_BACKEND=None)


@pytest.mark.parametrize(
    ("target", "arguments"),
    [(["linked.py"], ["-m", "--", "-h", "--flag=1", ""]), (["-m", "package"], ["-m", "x"])],
)
def test_a_program_runs_as_by_python(target, arguments, tmp_path):
    for name in ("real", "package"):
        (tmp_path / name).mkdir()
    for name, text in (
        ("beside.py", ""), ("package/__main__.py", FACTS),
        ("real/beside.py", ""), ("real/facts.py", FACTS),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
    (tmp_path / "linked.py").symlink_to("real/facts.py")
    done = run(*target, *arguments, cwd=tmp_path)
    package = "package" if target[0] == "-m" else ""
    assert done.stdout.startswith(f"__main__ {package}")
    assert done.stdout.endswith(f" True {arguments} True\n")
    assert done.stderr == "enough\nfusedrnn: 1 module ran: 1 on aten\n"
    assert done.returncode == 1


def test_modules_are_counted_compiled_ones_too(tmp_path):
    (tmp_path / "script.py").write_text(COMPILED)
    done = run("script.py", cwd=tmp_path)
    expected = "fusedrnn: 4 modules ran: 2 on torch, 1 on aten, 1 on aten and torch\n"
    assert done.stderr == expected
