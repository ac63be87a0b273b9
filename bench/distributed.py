"""Trains the sentiment model in several processes, by torch's own DDP or fully_shard.

``torchrun --nproc-per-node 2 -m bench.distributed --strategy ddp``: NCCL and one GPU a process
where there are GPUs, else gloo on the CPU. Losses are those of one process, ``--strategy none``:
every process takes its part of the same batches. docs/distributed.md is the recipe.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DistributedSampler

from . import imdb
from .archives import DataError
from .cases import CELLS, EMBEDDING, ONE_HOT, Workload, cut_down
from .models import (
    Batch,
    EmbeddedReviews,
    Examples,
    Model,
    OneHotReviews,
    examples_of,
    final_hidden,
)
from .providers import build

STRATEGIES = ("ddp", "fsdp", "none")


class SetupError(RuntimeError):
    """The processes cannot train as they were started; the message says why in one sentence."""


class ReviewsByLengths(EmbeddedReviews):
    """The same model by ``lengths=``, which may lie on any device.

    DDP with ``device_ids`` and fully_shard move every input to the GPU, where
    ``pack_padded_sequence`` refuses the lengths.
    """

    def forward(self, batch: Batch) -> Tensor:
        h_n = final_hidden(self.rnn(self.embedding(batch.inputs), lengths=batch.lengths))
        return self.fc(torch.cat((h_n[-2], h_n[-1]), -1)).squeeze(-1)


MODELS: dict[str, tuple[type[Model], Workload]] = {
    "lengths": (ReviewsByLengths, EMBEDDING),
    "packed": (EmbeddedReviews, EMBEDDING),
    "one-hot": (OneHotReviews, ONE_HOT),
}


class Place(NamedTuple):
    """This process among the others, as torchrun says it; alone without torchrun."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def here(cls) -> Place:
        rank, local, world = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
        )
        if not torch.cuda.is_available():
            return cls(rank, world, torch.device("cpu"))
        if local >= (gpus := torch.cuda.device_count()):
            raise SetupError(f"process {local} of this machine has no GPU: there are {gpus}")
        return cls(rank, world, torch.device("cuda", local))


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        place = Place.here()
        workload = _workload(options)
        _check(options, workload, place)
        # The same data in every process, from the same seed or the same file.
        most = max(workload.train, workload.test)
        corpus = imdb.load(options.imdb, seed=options.seed, reviews=most)
    except (SetupError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    examples = examples_of(workload, corpus, options.seed)
    if options.strategy == "none":
        return run(options, workload, examples, place)
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    dist.init_process_group("nccl" if place.device.type == "cuda" else "gloo")
    try:
        return run(options, workload, examples, place)
    finally:
        dist.destroy_process_group()


def run(options: argparse.Namespace, workload: Workload, examples: Examples, place: Place) -> int:
    """Builds, resumes, trains, prints the losses and saves."""
    model = parallel(build_model(options, workload, place), options.strategy, place)
    # fully_shard replaces the parameters, so the optimiser comes after it.
    optimiser = torch.optim.Adam(model.parameters(), lr=workload.learning_rate)
    done = resume(options.resume, model, optimiser) if options.resume else 0
    if place.rank == 0:
        processes = f"{place.world} x {place.device.type}"
        print(f"{options.model} {options.cell}, {options.strategy}, {processes}", flush=True)
    batches = islice(rows_of(examples, workload.B, options.seed, place), done, options.steps)
    torch.manual_seed(options.seed + 1 + place.rank)  # dropout: every process its own
    for step, rows in enumerate(batches, done + 1):
        loss = train_step(model, optimiser, examples.batch(rows, place.device))
        if options.strategy != "none":  # the mean of equal parts' means; gloo has no AVG
            dist.all_reduce(loss)
            loss /= place.world
        if place.rank == 0:
            print(f"step {step} loss {loss.item():.12f}", flush=True)
    if options.save:
        save(options.save, model, optimiser, options.steps)
    return 0


def build_model(options: argparse.Namespace, workload: Workload, place: Place) -> Model:
    """The model on this process's device, equal in all: fully_shard takes each one's as it is."""
    torch.manual_seed(options.seed)
    model_class, _ = MODELS[options.model]
    model = model_class(build("fusedrnn", options.cell, workload), workload)
    return model.to(place.device, getattr(torch, options.dtype))


def parallel(model: Model, strategy: str, place: Place) -> nn.Module:
    """The model as DDP or fully_shard trains it."""
    if strategy == "ddp":
        # Without device_ids: the model stands where it should, and packing wants lengths left
        # on the CPU.
        return DistributedDataParallel(model)
    if strategy == "fsdp":
        mesh = init_device_mesh(place.device.type, (place.world,))
        for part in model.children():
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def rows_of(examples: Examples, size: int, seed: int, place: Place) -> Iterator[Tensor]:
    """This process's rows of each shuffled batch of ``size``, epoch after epoch, for ever."""
    everything: Any = range(examples.known)
    sampler: DistributedSampler = DistributedSampler(
        everything, place.world, place.rank, seed=seed, drop_last=True
    )
    parts = BatchSampler(sampler, size // place.world, drop_last=True)
    for epoch in count():
        sampler.set_epoch(epoch)
        yield from map(torch.tensor, parts)


def train_step(model: nn.Module, optimiser: torch.optim.Optimizer, batch: Batch) -> Tensor:
    """One step, the same in one process and in many; returns the loss of this process's part."""
    optimiser.zero_grad()
    logits = model(batch)
    loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.targets.to(logits))
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return loss.detach()


def save(folder: Path, model: nn.Module, optimiser: torch.optim.Optimizer, step: int) -> None:
    """Every process writes its part; any number of processes and either strategy reads it."""
    weights, moments = get_state_dict(model, optimiser)
    state = {"model": weights, "optimiser": moments, "step": step}
    dcp.save(state, checkpoint_id=folder, no_dist=not dist.is_initialized())


def resume(folder: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Takes up what ``save`` wrote; returns how many steps were done."""
    weights, moments = get_state_dict(model, optimiser)
    state: dict[str, Any] = {"model": weights, "optimiser": moments, "step": 0}
    dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_state_dict(
        model,
        optimiser,
        model_state_dict=state["model"],
        optim_state_dict=state["optimiser"],
    )
    return state["step"]


def _workload(options: argparse.Namespace) -> Workload:
    _, workload = MODELS[options.model]
    workload = cut_down(workload) if options.quick else workload
    if options.batch is not None:
        workload = replace(workload, B=options.batch)
    return workload if options.dropout is None else replace(workload, dropout=options.dropout)


def _check(options: argparse.Namespace, workload: Workload, place: Place) -> None:
    """Raises SetupError for what would hang or train something else."""
    started = "RANK" in os.environ
    if options.strategy != "none" and not started:
        raise SetupError(
            f"--strategy {options.strategy} needs torchrun: torchrun --nproc-per-node 2 -m "
            f"bench.distributed --strategy {options.strategy}"
        )
    if options.strategy == "none" and place.world > 1:
        raise SetupError(f"--strategy none is one process, and there are {place.world}")
    if workload.B < 1 or workload.B % place.world:
        raise SetupError(
            f"a batch of {workload.B} has no equal parts for {place.world} processes, and the mean "
            "of unequal parts' losses is not the batch's"
        )
    if workload.train < workload.B:
        raise SetupError(f"a batch of {workload.B} is more than the {workload.train} reviews")
    if options.model == "packed" and options.strategy == "fsdp" and place.device.type == "cuda":
        raise SetupError(
            "fully_shard moves the lengths to the GPU, where pack_padded_sequence refuses them; "
            "take --model lengths"
        )
    if options.resume and not (options.resume / ".metadata").is_file():
        raise SetupError(f"{options.resume} holds no checkpoint")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m bench.distributed", description=__doc__)
    add = parser.add_argument
    add("--strategy", choices=STRATEGIES, default="ddp", help="none: one process, no torchrun")
    add("--model", choices=MODELS, default="lengths", help="how reviews of unequal length come")
    add("--cell", choices=CELLS, default="lstm")
    add("--steps", type=int, default=8, help="optimiser steps, those before --resume included")
    add("--batch", type=int, metavar="B", help="reviews of a step, over all processes")
    add("--dropout", type=float, metavar="P", help="between layers; 0 for reproducible losses")
    add("--dtype", choices=("float32", "float64"), default="float32")
    add("--imdb", metavar="PATH", help="imdb.npz or aclImdb_v1.tar.gz; also FUSEDRNN_IMDB")
    add("--save", type=Path, metavar="DIR", help="a checkpoint after the last step")
    add("--resume", type=Path, metavar="DIR", help="the checkpoint to go on from")
    add("--seed", type=int, default=0, help="of weights, data, their order and dropout")
    add("--quick", action="store_true", help="tiny sizes, to test the machinery")
    return parser


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: torch caches the mesh of fully_shard, which keeps gloo's threads past
    # destroy_process_group. One that frees a tensor while the interpreter ends aborts the process,
    # which was seen once, on busy cores. Nothing is left here to be cleaned up.
    os._exit(code)
