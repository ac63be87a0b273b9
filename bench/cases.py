"""The workloads: one list for the main job, ``pytest bench``, the GPU sweep and later tuning.

Axes: T steps, B sequences, I inputs, H hidden units.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

CELLS = ("lstm", "gru")
DTYPES = {"float16": "fp16", "float32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Workload:
    """Shape, task and training length of one lesson, or of one point of the sweep.

    Attributes:
        name: unique, and short enough for the table.
        lesson: ``"imdb"``, ``"sine"`` or ``"sweep"``.
        task: what the recurrence is part of: ``"one-hot"`` or ``"embedding"`` reviews, a
            forecast of ``"sine"`` or ``"price"``, or ``"none"`` in the sweep.
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
    B=32,
    I=64,
    H=128,
    layers=2,
    bidirectional=True,
    dropout=0.3,
    vocabulary=20_000,
    train=15_000,
    test=256,
    steps=8,  # 1 s each on two CPU cores: enough for the curves, not for a good classifier
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
LESSONS = (ONE_HOT, EMBEDDING, *SINE, PRICE)


def lessons(names: tuple[str, ...], quick: bool = False) -> tuple[Workload, ...]:
    """The workloads of the named lessons; ``quick`` cuts them down to test the machinery."""
    chosen = tuple(w for w in LESSONS if w.lesson in names)
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
        steps=3,
        gpu_steps=3,
    )


def sweep(T: int = 512) -> Iterator[Workload]:
    """Every H, B and dtype of the GPU sweep, the usual sizes first: it may be cut off."""
    for B in (16, 64, 1, 128):
        for H in (64, 256, 1024, 128, 512, 32, 16, 192, 384, 768, 2048):
            for dtype, short in DTYPES.items():
                name = f"H{H}-B{B}-{short}"
                yield Workload(name, "sweep", "none", T=T, B=B, I=H, H=H, dtype=dtype)
