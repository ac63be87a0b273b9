"""``python -m bench distributed``: trains in several processes and compares with one process.

The model is trained by DistributedDataParallel and by ``fully_shard``, on GPUs if there are enough.
Every process takes its rows of the same batches in fp64, so the losses must be the same.
"""

import argparse
import multiprocessing
import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fusedrnn

from . import UserError
from .models import final_hidden

WORDS, T, B, STEPS = 500, 30, 16, 4


class Sentiment(nn.Module):
    """Classifies sequences of words; ``fully_shard`` moves their lengths to the GPU too."""

    def __init__(self, cell: str, H: int = 32):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, H)
        self.rnn = getattr(fusedrnn, cell.upper())(H, H, num_layers=2, bidirectional=True)
        self.fc = nn.Linear(2 * H, 1)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        h_n = final_hidden(self.rnn(self.embedding(words), lengths=lengths))
        return self.fc(torch.cat((h_n[-2], h_n[-1]), -1)).squeeze(-1)


def run(options: argparse.Namespace) -> int:
    """Prints the losses of each way to train; returns 1 if they differ."""
    world = options.processes
    if world < 1 or B % world:
        raise UserError(f"--processes divides the batch of {B}, and {world} does not")
    alone, wrong = losses(options.cell), 0
    print("one process ", *(f"{loss:.12f}" for loss in alone))
    results = multiprocessing.get_context("spawn").SimpleQueue()
    for strategy in ("ddp", "fsdp"):
        with tempfile.TemporaryDirectory() as folder:
            arguments = (world, folder, strategy, options.cell, results)
            torch.multiprocessing.spawn(_process, arguments, nprocs=world)
        found = results.get()
        print(f"{strategy:<12}", *(f"{loss:.12f}" for loss in found))
        off = max(abs(a - b) for a, b in zip(found, alone, strict=True))
        if not off <= 1e-10:  # in fp64, of gradients that are summed in another order
            print(f"{strategy} differs from one process by {off:.1e}, allowed 1e-10")
            wrong = 1
    return wrong


def _process(rank: int, world: int, folder: str, strategy: str, cell: str, results: Any) -> None:
    """Trains as one of several processes; rank 0 tells the losses."""
    on_gpu = torch.cuda.device_count() >= world
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    library, meeting = "nccl" if on_gpu else "gloo", f"file://{folder}/meeting"
    dist.init_process_group(library, meeting, rank=rank, world_size=world)
    found = losses(cell, strategy, device)
    if rank == 0:
        results.put(found)
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo can abort a process that frees tensors while Python ends


def losses(cell: str, strategy: str = "", device: torch.device | None = None) -> list:
    """Returns the loss of each step; ``strategy`` "" is without other processes."""
    torch.manual_seed(0)
    model: nn.Module = Sentiment(cell).to(device, torch.float64)
    rank, world = (dist.get_rank(), dist.get_world_size()) if strategy else (0, 1)
    words, lengths = torch.randint(WORDS, (STEPS, T, B)), torch.randint(1, T + 1, (STEPS, B))
    targets = torch.randint(2, (STEPS, B)).double()
    if strategy == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif strategy == "fsdp":
        mesh = init_device_mesh((device or torch.device("cpu")).type, (world,))
        for part in (*model.children(), model):
            fully_shard(part, mesh=mesh)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    found = []
    for step in range(STEPS):
        x, n, y = (data[step][..., rank::world].to(device) for data in (words, lengths, targets))
        loss = nn.functional.binary_cross_entropy_with_logits(model(x, n), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        mean = loss.detach() / world
        if strategy:
            dist.all_reduce(mean)
        found.append(mean.item())
    return found
