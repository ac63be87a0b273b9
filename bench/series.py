"""The two series of the lessons: a sine wave, and a made-up share price."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Windows(NamedTuple):
    """Every window of a series and the value that follows it, in order of time."""

    inputs: Tensor  # float32 [windows, T, 1]
    targets: Tensor  # float32 [windows]


def sine(points: int = 500) -> Tensor:
    """``sin(linspace(0, 20 pi, points))``: ten periods."""
    return torch.linspace(0, 20 * math.pi, points, dtype=torch.float64).sin()


def prices(days: int = 500, seed: int = 0) -> Tensor:
    """A trend from 100 to 150, a season of height 10 over 8 pi, and noise of deviation 3."""
    noise = torch.randn(days, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    trend = torch.linspace(100, 150, days, dtype=torch.float64)
    season = 10 * torch.linspace(0, 8 * math.pi, days, dtype=torch.float64).sin()
    return trend + season + 3 * noise


def windows(series: Tensor, length: int) -> Windows:
    """Cuts a series ``[N]`` into its ``N - length`` windows of ``length`` values.

    Raises:
        ValueError: the series is not longer than one window.
    """
    if len(series) <= length:
        raise ValueError(f"a series of {len(series)} values has no window of {length} and a target")
    cut = series.float().unfold(0, length, 1)[:-1]
    return Windows(cut.unsqueeze(-1).contiguous(), series[length:].float())


class Scale(NamedTuple):
    """The range ``low`` to ``high`` that is mapped to [0, 1], and back."""

    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, series: Tensor, known: int) -> Scale:
        """The range of the first ``known`` values; the rest is not looked at."""
        return cls(series[:known].min(), series[:known].max())

    def apply(self, values: Tensor) -> Tensor:
        return (values - self.low) / (self.high - self.low)

    def invert(self, scaled: Tensor) -> Tensor:
        return self.low + scaled * (self.high - self.low)


def rescaled(series: Tensor, known: int) -> Tensor:
    """Maps the range of the first ``known`` values to [0, 1]."""
    return Scale.of(series, known).apply(series)
