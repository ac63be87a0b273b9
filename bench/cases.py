"""The workloads: one list for the main job, every other command, ``pytest bench`` and tuning.

Axes: T steps, B sequences, I inputs, H hidden units.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import torch

#: Of the main job and the GPU's sweep; ``--cases``, ``cpu`` and ``ragged`` take RNN (tanh) too.
CELLS = ("lstm", "gru")
EVERY_CELL = (*CELLS, "rnn")
DTYPES = {"float16": "fp16", "float32": "fp32", "bfloat16": "bf16"}
#: Axes of the sweep, the usual values first: it may be cut off.
SWEEP_H = (64, 256, 1024, 128, 512, 32, 16, 192, 384, 768, 2048)
SWEEP_B = (16, 64, 1, 128, 256)
SWEEP_T = (512, 64, 1024, 256, 4096)
#: What an RNN of the sweep is beyond one layer over full sequences.
KINDS: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"ragged": True},
    "bidirectional": {"bidirectional": True},
    "stacked": {"layers": 2},
}
#: Values of one [T, B, H]; a training step keeps about six such tensors for each layer.
_SWEEP_LARGEST = 2**28


@dataclass(frozen=True)
class Workload:
    """Shape, task and training length of one lesson, or of one point of the sweep.

    Attributes:
        name: unique, and short enough for the table.
        lesson: ``"imdb"``, ``"sine"``, ``"toy"``, ``"text"``, ``"ragged"`` or ``"sweep"``.
        task: what the recurrence is part of: ``"one-hot"`` or ``"embedding"`` reviews, a
            forecast of ``"sine"`` or ``"price"``, or ``"none"`` where nothing is trained.
        ragged: lengths are uniform in T/2 to T, as a PackedSequence; reviews have their own.
        vocabulary: ids of the two IMDB tasks.
        train, test: how many reviews are used; a series is cut 4 to 1 in order of time.
        steps: optimiser steps of the short training on the CPU.
        gpu_steps: the same on a GPU.
        train_reference: whether the CPU trains the pure-torch backend too.
    """

    name: str
    lesson: str
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
    vocabulary: int = 0
    train: int = 0
    test: int = 0
    steps: int = 0
    gpu_steps: int = 0
    learning_rate: float = 1e-2
    train_reference: bool = True

    @property
    def shape(self) -> str:
        """The sizes in one word, as ``T100 B64 I300 H16x2bi``."""
        layers = f"x{self.layers}" if self.layers > 1 else ""
        return f"T{self.T} B{self.B} I{self.I} H{self.H}{layers}{'bi' * self.bidirectional}"

    def steps_on(self, device: torch.device) -> int:
        """Optimiser steps of the short training."""
        return self.gpu_steps if device.type == "cuda" else self.steps

    @property
    def needs_input_grad(self) -> bool:
        """Whether something trainable stands before the RNN: an embedding, or layers as usual."""
        return self.task in ("embedding", "none")


ONE_HOT = Workload(
    "imdb-one-hot",
    "imdb",
    "one-hot",
    T=100,
    B=64,
    I=300,
    H=16,
    vocabulary=300,
    train=15_000,
    test=10_000,
    steps=352,  # an epoch and a half
    gpu_steps=1410,
)
EMBEDDING = Workload(
    "imdb-embedding",
    "imdb",
    "embedding",
    T=200,
    B=64,
    I=64,
    H=128,
    layers=2,
    bidirectional=True,
    ragged=True,
    dropout=0.3,
    vocabulary=20_000,
    train=15_000,
    test=256,
    steps=4,  # 2 s each on two CPU cores: enough for the curves, not for a good classifier
    gpu_steps=300,
    learning_rate=2e-3,
    train_reference=False,
)
SINE = tuple(
    Workload(f"sine-{T}", "sine", "sine", T=T, B=32, I=1, H=32, steps=100, gpu_steps=600)
    for T in (20, 10, 30, 50, 100)
)
PRICE = Workload(
    "price-30",
    "sine",
    "price",
    T=30,
    B=32,
    I=1,
    H=50,
    layers=2,
    dropout=0.2,
    steps=100,
    gpu_steps=600,
)
MANY_TO_ONE = Workload("many-to-one", "toy", "none", T=4, B=2, I=1, H=5)
TOY_BOTH_WAYS = Workload("toy-both-ways", "toy", "none", T=10, B=16, I=32, H=64, bidirectional=True)
#: One step of the character model of ``python -m bench text``, which decodes.
CHARACTER = Workload("character", "text", "none", T=1, B=1, I=32, H=128)
#: What ``python -m bench ragged`` takes apart.
RAGGED = Workload("ragged", "ragged", "none", T=500, B=32, I=128, H=128, ragged=True)
#: What the main job trains.
TRAINED = (ONE_HOT, EMBEDDING, *SINE, PRICE)
#: What it shows: these are gated and timed as well.
LESSONS = (MANY_TO_ONE, TOY_BOTH_WAYS, *TRAINED, CHARACTER)
#: All but the sweep.
WORKLOADS = (*LESSONS, RAGGED)
#: ``--cases NAME`` of several workloads.
GROUPS = ("lessons", "sweep", "smoke")


class CaseError(ValueError):
    """No workload has this name; the message is one sentence."""


def named(names: str) -> tuple[Workload, ...]:
    """The workloads of ``--cases``: names of workloads or groups, between commas.

    ``lessons`` are the lessons' workloads, ``sweep`` is every point of every kind, and ``smoke``
    all but the sweep, cut down to nothing.

    Raises:
        CaseError: a name is unknown; those that are near are in the message.
    """
    points = {w.name: w for w in (*WORKLOADS, *every_sweep())}
    found: dict[Workload, None] = {}  # a set that keeps its order
    for name in names.split(","):
        if name not in points and name not in GROUPS:
            near = get_close_matches(name, (*GROUPS, *points), n=4, cutoff=0.5)
            hint = f"near are {', '.join(near)}" if near else "--list prints those there are"
            raise CaseError(f"there is no case {name!r}: {hint}")
        group = {
            "lessons": LESSONS,
            "smoke": tuple(map(cut_down, WORKLOADS)),
            "sweep": tuple(w for w in points.values() if w.lesson == "sweep"),
        }.get(name)
        found |= dict.fromkeys((points[name],) if group is None else group)
    return tuple(found)


def lessons(names: tuple[str, ...], quick: bool = False) -> tuple[Workload, ...]:
    """The workloads of the named lessons, ``"all"`` of every one; ``quick`` cuts them down."""
    chosen = tuple(w for w in LESSONS if "all" in names or w.lesson in names)
    return tuple(map(cut_down, chosen)) if quick else chosen


def cut_down(workload: Workload) -> Workload:
    """The same task in sizes that take a fraction of a second and measure nothing."""
    return replace(
        workload,
        T=min(workload.T, 12),
        B=min(workload.B, 4),
        H=min(workload.H, 8),
        vocabulary=min(workload.vocabulary, 300),
        train=min(workload.train, 64),
        test=min(workload.test, 32),
        steps=min(workload.steps, 3),
        gpu_steps=min(workload.gpu_steps, 3),
    )


def sweep(T: int = 512, kind: str = "padded") -> Iterator[Workload]:
    """Every H, B and dtype of one T and one of ``KINDS``, but for what would not fit."""
    tail = ("" if T == 512 else f"-T{T}") + ("" if kind == "padded" else f"-{kind}")
    for B in SWEEP_B:
        for H in SWEEP_H:
            for dtype, short in DTYPES.items():
                point = Workload(
                    f"H{H}-B{B}-{short}{tail}", "sweep", "none", T=T, B=B, I=H, H=H, dtype=dtype
                )
                if T * B * H <= _SWEEP_LARGEST:
                    yield replace(point, **KINDS[kind])


def every_sweep() -> Iterator[Workload]:
    """``sweep`` of every kind and T."""
    for T in SWEEP_T:
        for kind in KINDS:
            yield from sweep(T, kind)
