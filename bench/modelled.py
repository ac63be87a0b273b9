"""``python -m bench model``: what a step takes at least on a chip, from its figures alone.

Nothing here is measured: ``fusedrnn/kernels/model.py`` says what goes in. The table stands beside
measurements, to show how far they are from what the hardware allows, and where none exist yet.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import torch

from fusedrnn.kernels.model import cudnn_step
from fusedrnn.kernels.plan import CHIPS, Problem, modelled

from .cases import CELLS, DTYPES
from .results import FolderError

SIZES = (64, 128, 192, 256, 384, 512, 768, 1024, 2048)
BATCHES = (1, 16, 64, 128)
FIELDS = (
    "chip", "cell", "dtype", "H", "B", "schedule", "programs", "forward_us", "bound", "backward_us",
    "cudnn_reported_us", "status",
)  # fmt: skip


def rows(chip: str) -> Iterator[dict[str, object]]:
    """One layer in one direction with I = H; fp32 as tf32, as torch's RNNs by default."""
    for cell in CELLS:
        for dtype in DTYPES:
            for H in SIZES:
                for B in BATCHES:
                    yield _row(chip, cell, dtype, H, B)


def _row(chip: str, cell: str, dtype: str, H: int, B: int) -> dict[str, object]:
    problem = Problem(cell, H, H, B, 1, getattr(torch, dtype), "tf32", True)
    chosen = modelled(problem, CHIPS[chip])
    tiles, (forward, backward) = chosen.forward, chosen.floors
    members = -(-H // tiles.blocks[0][1]) if tiles.k_chunks else 1
    batch_tiles = -(-B // tiles.block_b)
    rounds = -(-batch_tiles // tiles.at_once) if tiles.k_chunks else 1
    reported = cudnn_step(problem)
    return {
        "chip": chip,
        "cell": cell,
        "dtype": dtype,
        "H": H,
        "B": B,
        "schedule": chosen.schedule,
        "programs": "" if chosen.schedule == "stepwise" else members * (batch_tiles // rounds or 1),
        "forward_us": f"{forward.step:.2f}",
        "bound": max(forward._asdict(), key=forward._asdict().__getitem__),
        "backward_us": f"{backward.step:.2f}",
        "cudnn_reported_us": "" if reported is None else f"{reported:.1f}",
        "status": "modelled",
    }


def write(folder: Path, chip: str = "sm_90") -> Path:
    """Writes modelled.csv and prints it; returns its path.

    Raises:
        FolderError: the folder cannot be written.
    """
    lines = list(rows(chip))
    print(f"floors of one step on {chip}, in microseconds; modelled, nothing here is measured")
    widths = {name: max(len(name), *(len(str(line[name])) for line in lines)) for name in FIELDS}
    head: dict[str, object] = {name: name for name in FIELDS}
    for line in [head, *lines]:
        print(" ".join(f"{line[name]!s:>{widths[name]}}" for name in FIELDS))
    path = folder / "modelled.csv"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
    except OSError as error:
        raise FolderError(f"no results can be written to {folder}: {error.strerror}") from error
    return path
