"""The ladder of kernels: its table in docs/kernels.md, its rungs, and the scan beside it."""

import pytest
import torch
from torch.nn import functional as F

from bench import UserError, ladder
from bench.__main__ import main
from bench.scan import BLOCK_T, min_gru
from fusedrnn.testing import assert_budget


def loop(x, w_z, b_z, w_n, b_n):
    """A minGRU in plain torch, step by step."""
    h, states = x.new_zeros(len(x), len(w_z)), []
    for x_t in x.unbind(1):
        z = F.linear(x_t, w_z, b_z).sigmoid()
        h = (1 - z) * h + z * F.linear(x_t, w_n, b_n)
        states.append(h)
    return torch.stack(states, 1)


@pytest.mark.parametrize("T", [1, BLOCK_T, 2 * BLOCK_T + 3])
def test_the_scan_equals_the_loop(T, device):
    inputs = [torch.randn(2, T, 3), *(torch.randn(33, n).squeeze(1) for n in (3, 1, 3, 1))]
    found = []
    for run, dtype in ((min_gru, torch.float32), (loop, torch.float32), (loop, torch.float64)):
        leaves = [tensor.to(device, dtype).requires_grad_() for tensor in inputs]
        h = run(*leaves)
        cotangent = torch.linspace(-1, 1, h.numel(), device=device, dtype=dtype).view_as(h)
        found.append((h, *torch.autograd.grad(h, leaves, cotangent)))
    for name, *values in zip(("h", "dx", "dw_z", "db_z", "dw_n", "db_n"), *found, strict=True):
        assert_budget(name, *values)


def test_the_table_of_the_page_lies_between_marks_and_has_every_rung(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match="TRITON_INTERPRET is set"):
        list(ladder.table())
    text = ladder.PAGE.read_text()
    before, _, rest = text.partition(ladder.BEGIN)
    written, _, after = rest.partition(ladder.END)
    head, _, *rows = written.splitlines()
    assert head == f"| {' | '.join(ladder.HEADS)} |"
    assert [row.split()[1] for row in rows] == list(ladder.RUNGS)
    monkeypatch.setattr(ladder, "PAGE", tmp_path / "kernels.md")
    ladder.PAGE.write_text(text)
    monkeypatch.setattr(ladder, "table", lambda: iter([("new", "table")]))
    monkeypatch.setattr(ladder.figure, "draw", lambda path: path.parent)
    assert main(["ladder", "--write"]) == 0
    new = f"{before}{ladder.BEGIN}| new | table |\n{ladder.END}{after}"
    assert ladder.PAGE.read_text() == new


@pytest.mark.parametrize("number", ladder.RUNGS)
def test_a_rung_runs_alone(number, monkeypatch, capfd):
    start = ladder.subprocess.run  # the rung's tests are only collected here
    collect = "--collect-only"
    monkeypatch.setattr(ladder.subprocess, "run", lambda words, **o: start((*words, collect), **o))
    assert main(["ladder", number, "--device", "cpu"]) == 0
    rung, printed = ladder.RUNGS[number], capfd.readouterr().out
    assert f"tests/test_{rung.test}.py::test" in printed
    shown = printed.partition(f"\n{rung.file}: ")[2].splitlines()[1:-1]
    assert 10 < len(shown) <= ladder.MOST_LINES
    assert set(shown) <= set(ladder.step(rung))
