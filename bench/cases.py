"""The list of workloads: shapes, tasks and training lengths, each with a name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import torch

from . import UserError

CELLS = ("lstm", "gru")
EVERY_CELL = (*CELLS, "rnn")
DTYPES = {"float16": "fp16", "float32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Workload:
    """The shape of an RNN, its task, and how long it is trained.

    Attributes:
        name: unique; ``--cases`` takes it.
        group: ``"imdb"``, ``"sine"``, ``"toy"``, ``"sweep"``, ``"kernelbench"`` or ``"deepbench"``.
        task: ``"one-hot"`` or ``"embedding"`` reviews, a forecast of ``"sine"`` or ``"price"``, or
            ``"none"``, which is timed on random input and not trained.
        cells: the cells it is run with.
        ragged: the input is a PackedSequence.
        vocabulary: size of the vocabulary of reviews.
        train, test: number of reviews; a series is split 4 to 1 in order of time.
        steps, gpu_steps: optimiser steps of the training on the CPU and on a GPU.
    """

    name: str
    group: str
    task: str
    T: int
    B: int
    I: int
    H: int
    layers: int = 1
    bidirectional: bool = False
    ragged: bool = False
    dropout: float = 0.0
    dtype: str = "float32"
    cells: tuple[str, ...] = EVERY_CELL
    vocabulary: int = 0
    train: int = 0
    test: int = 0
    steps: int = 0
    gpu_steps: int = 0
    learning_rate: float = 1e-2

    @property
    def shape(self) -> str:
        """The sizes in short, as ``T100 B64 I300 H16x2bi``."""
        layers = f"x{self.layers}" if self.layers > 1 else ""
        return f"T{self.T} B{self.B} I{self.I} H{self.H}{layers}{'bi' * self.bidirectional}"

    @property
    def needs_input_grad(self) -> bool:
        """Returns True unless the input is data, which needs no gradient."""
        return self.task in ("embedding", "none")

    def steps_on(self, device: torch.device) -> int:
        return self.gpu_steps if device.type == "cuda" else self.steps


ONE_HOT = Workload(
    "imdb-one-hot", "imdb", "one-hot", T=100, B=64, I=300, H=16, vocabulary=300,
    train=15_000, test=10_000, steps=352, gpu_steps=1410,
)  # fmt: skip
#: Four steps on the CPU show that the curves are equal; they do not make a classifier.
EMBEDDING = Workload(
    "imdb-embedding", "imdb", "embedding", T=200, B=64, I=64, H=128, layers=2, bidirectional=True,
    ragged=True, dropout=0.3, vocabulary=20_000, train=15_000, test=256, steps=4, gpu_steps=300,
    learning_rate=2e-3,
)  # fmt: skip
SINE = tuple(
    Workload(f"sine-{T}", "sine", "sine", T=T, B=32, I=1, H=32, steps=100, gpu_steps=600)
    for T in (20, 10, 30, 50, 100)
)
PRICE = Workload(
    "price-30", "sine", "price", T=30, B=32, I=1, H=50, layers=2, dropout=0.2,
    steps=100, gpu_steps=600,
)  # fmt: skip
MANY_TO_ONE = Workload("many-to-one", "toy", "none", T=4, B=2, I=1, H=5)
TOY_BOTH_WAYS = Workload("toy-both-ways", "toy", "none", T=10, B=16, I=32, H=64, bidirectional=True)
#: One step of a character model.
CHARACTER = Workload("character", "toy", "none", T=1, B=1, I=32, H=128)
RAGGED = Workload("ragged", "ragged", "none", T=500, B=32, I=128, H=128, ragged=True)
LONG = Workload("long", "toy", "none", T=500, B=16, I=64, H=64)
TRAINED = (ONE_HOT, EMBEDDING, *SINE, PRICE)
LESSONS = (MANY_TO_ONE, TOY_BOTH_WAYS, *TRAINED, CHARACTER)


def _kernelbench(number: int, cell: str, bidirectional: bool = False) -> Workload:
    return Workload(
        f"kernelbench-{number}", "kernelbench", "none", T=512, B=10, I=128, H=256, layers=6,
        bidirectional=bidirectional, cells=(cell,),
    )  # fmt: skip


def _deepbench(cell: str, H: int, B: int, T: int) -> Workload:
    return Workload(f"deepbench-{cell}-{H}", "deepbench", "none", T=T, B=B, I=H, H=H, cells=(cell,))


#: Sizes that others have published times of (``bench/references.csv``).
PUBLISHED = (
    _kernelbench(35, "lstm"), _kernelbench(38, "lstm", True),
    _kernelbench(39, "gru"), _kernelbench(41, "gru", True),
    _deepbench("lstm", 256, 16, 150), _deepbench("lstm", 512, 16, 25),
    _deepbench("lstm", 1024, 32, 25), _deepbench("lstm", 1536, 16, 50),
    _deepbench("gru", 1024, 32, 1500), _deepbench("gru", 1536, 32, 375),
)  # fmt: skip


def sweep() -> Iterator[Workload]:
    """Yields every H, B, dtype, T and kind of the sweep that fits into memory."""
    kinds: dict[str, dict[str, Any]] = {
        "": {}, "-packed": {"ragged": True}, "-bidirectional": {"bidirectional": True},
        "-stacked": {"layers": 2},
    }  # fmt: skip
    # The usual values come first, because a run may be cut off.
    for T in (512, 64, 1024, 256, 4096):
        for kind, options in kinds.items():
            for B in (16, 64, 1, 128, 256):
                for H in (64, 256, 1024, 128, 512, 32, 16, 192, 384, 768, 2048):
                    for dtype, short in DTYPES.items():
                        name = f"H{H}-B{B}-{short}{'' if T == 512 else f'-T{T}'}{kind}"
                        point = Workload(
                            name, "sweep", "none", T=T, B=B, I=H, H=H, dtype=dtype, cells=CELLS
                        )
                        if T * B * H <= 2**28:
                            yield replace(point, **options)


def every_case() -> tuple[Workload, ...]:
    return (*LESSONS, LONG, RAGGED, *PUBLISHED, *sweep())


def named(names: str) -> tuple[Workload, ...]:
    """Returns the workloads of a list of names of cases, groups or ``lessons``, with commas.

    Raises:
        UserError: a name is unknown; the message suggests similar ones.
    """
    cases = every_case()
    by_name = {w.name: (w,) for w in cases} | {"lessons": LESSONS}
    for group in dict.fromkeys(w.group for w in cases if w.group not in by_name):
        by_name[group] = tuple(w for w in cases if w.group == group)
    found: dict[Workload, None] = {}  # an ordered set
    for name in names.split(","):
        if name not in by_name:
            near = get_close_matches(name, by_name, n=4, cutoff=0.5)
            hint = f"similar names are {', '.join(near)}" if near else "--list prints all names"
            raise UserError(f"there is no case {name!r}; {hint}")
        found |= dict.fromkeys(by_name[name])
    return tuple(found)


def cut_down(workload: Workload) -> Workload:
    """Returns the same task in sizes that test the program and measure nothing."""
    most = {"T": 12, "B": 4, "H": 8, "vocabulary": 300, "train": 64, "test": 32, "steps": 3,
            "gpu_steps": 3, "layers": 2}  # fmt: skip
    return replace(workload, **{name: min(getattr(workload, name), n) for name, n in most.items()})
