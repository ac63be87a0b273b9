"""DDP and fully_shard over two processes train to the losses of one, through torchrun and gloo."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOP = Path(__file__).parent.parent
#: Losses are means over 4 to 32 reviews of size 0.7, in fp64, after 4 steps of Adam.
TOLERANCE = 1e-10


def train(strategy, *options, processes=2):
    """The losses of each step that ``python -m bench.distributed`` prints, and all it said."""
    command = [sys.executable, "-m"]
    if strategy != "none":
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command += ["bench.distributed", "--strategy", strategy, "--quick", "--dropout", "0"]
    command += ["--dtype", "float64", "--steps", "4", *map(str, options)]
    environment = os.environ | {"PYTHONPATH": str(TOP), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        command, cwd=TOP, env=environment, capture_output=True, text=True, timeout=240
    )
    losses = [float(loss) for loss in re.findall(r"step \d+ loss (\S+)", done.stdout)]
    return losses, done


@pytest.fixture(scope="module")
def alone():
    """The losses of one process, by model and cell."""
    known: dict = {}

    def losses(model, cell):
        if (model, cell) not in known:
            known[model, cell], done = train("none", "--model", model, "--cell", cell)
            assert len(known[model, cell]) == 4, done.stderr
        return known[model, cell]

    return losses


@pytest.mark.parametrize(
    ("strategy", "model", "cell"),
    [
        ("ddp", "lengths", "lstm"),
        ("fsdp", "lengths", "lstm"),
        ("ddp", "packed", "gru"),
        ("fsdp", "one-hot", "gru"),
    ],
)
def test_losses_of_two_processes_are_those_of_one(strategy, model, cell, alone):
    losses, done = train(strategy, "--model", model, "--cell", cell)
    assert done.returncode == 0, done.stderr
    want = alone(model, cell)
    assert losses == pytest.approx(want, abs=TOLERANCE)
    assert len(set(want)) == 4  # something is learned in each step


def test_a_checkpoint_goes_on_under_another_strategy(alone, tmp_path):
    """Two steps under DDP, saved; the other two under fully_shard."""
    first, done = train("ddp", "--steps", 2, "--save", tmp_path / "checkpoint")
    assert done.returncode == 0, done.stderr
    rest, done = train("fsdp", "--resume", tmp_path / "checkpoint")
    assert done.returncode == 0, done.stderr
    assert [*first, *rest] == pytest.approx(alone("lengths", "lstm"), abs=TOLERANCE)


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        ("ddp", ("--batch", 3), "has no equal parts for 2 processes"),
        ("none", ("--resume", "nowhere"), "nowhere holds no checkpoint"),
        ("none", ("--batch", 10**6), "is more than the"),
    ],
)
def test_bad_input_gets_a_sentence(strategy, options, message):
    losses, done = train(strategy, *options)
    assert not losses
    assert done.returncode != 0
    assert message in done.stderr


def test_without_torchrun_it_says_so():
    command = [sys.executable, "-m", "bench.distributed", "--strategy", "fsdp"]
    environment = {k: v for k, v in os.environ.items() if k != "RANK"}
    done = subprocess.run(command, cwd=TOP, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "needs torchrun" in done.stderr


def test_gloo_is_there():
    """What the tests above stand on; a build of torch without it could not run them."""
    assert torch.distributed.is_gloo_available()
