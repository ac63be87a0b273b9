"""Two processes train to the losses of one."""

import pytest
import torch

from bench.__main__ import main


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without it")
def test_ddp_and_fully_shard_have_the_losses_of_one_process(capsys):
    assert main(["distributed", "--cell", "gru"]) == 0
    alone, ddp, fsdp = capsys.readouterr().out.splitlines()
    assert alone.split()[2:] == ddp.split()[1:] == fsdp.split()[1:]
    assert len(set(alone.split()[2:])) == 4
