"""Two processes train to the losses of one."""

import argparse

import pytest
import torch

from bench import UserError, distributed


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without it")
def test_ddp_and_fully_shard_have_the_losses_of_one_process(capsys):
    options = argparse.Namespace(processes=2, steps=3, cell="gru")
    assert distributed.run(options) == 0
    alone, ddp, fsdp = capsys.readouterr().out.splitlines()
    assert alone.split()[2:] == ddp.split()[1:] == fsdp.split()[1:]
    assert len(set(alone.split()[2:])) == 3


def test_a_loss_that_differs_is_printed(monkeypatch, capsys):
    def spawn(function, arguments, nprocs):
        _, folder, *_ = arguments
        with open(f"{folder}/losses.json", "w") as file:
            file.write("[0.5]")

    monkeypatch.setattr(torch.multiprocessing, "spawn", spawn)
    assert distributed.run(argparse.Namespace(processes=2, steps=1, cell="rnn")) == 1
    assert "ddp differs from one process by" in capsys.readouterr().out


def test_processes_must_divide_the_batch():
    with pytest.raises(UserError, match="divides the batch"):
        distributed.run(argparse.Namespace(processes=3, steps=1, cell="lstm"))
