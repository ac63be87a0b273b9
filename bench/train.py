"""The short training: same start, same order of examples, real optimisation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .cases import Workload
from .models import Examples

#: Examples of a batch when testing, where nothing is kept for backward.
_TEST_BATCH = 256


class Training(NamedTuple):
    """Losses of every step and what the trained model does on the test part."""

    losses: list[float]
    metric: float  # accuracy of reviews, root mean square error of forecasts
    seconds: float

    @property
    def final_loss(self) -> float:
        """Mean over the last tenth of the steps: one batch alone says little."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(last) / len(last)


def train(
    model: nn.Module,
    workload: Workload,
    examples: Examples,
    steps: int,
    device: torch.device,
    seed: int,
    tick: Callable[[], object] = lambda: None,
) -> Training:
    """Trains with Adam and tests; ``tick`` is called after every step."""
    torch.manual_seed(seed)  # dropout
    classifies = metric_name(workload) == "accuracy"
    criterion = nn.BCEWithLogitsLoss() if classifies else nn.MSELoss()
    optimiser = torch.optim.Adam(model.parameters(), lr=workload.learning_rate)
    losses = []
    start = time.perf_counter()
    model.train()
    for _, rows in zip(range(steps), _row_batches(examples.known, workload.B, seed), strict=False):
        batch = examples.batch(rows, device)
        optimiser.zero_grad()
        loss = criterion(model(batch), batch.targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.detach())  # read at the end: .item() would wait for the GPU
        tick()
    curve = torch.stack(losses).tolist()
    seconds = time.perf_counter() - start
    return Training(curve, _test(model, examples, device, classifies), seconds)


class Predictions(NamedTuple):
    """What a model says of the test part, in its order, and what is true."""

    values: Tensor  # [N]: logits of reviews, forecasts of series
    targets: Tensor  # [N]


def metric_name(workload: Workload) -> str:
    return "accuracy" if workload.vocabulary else "rmse"


def _row_batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Shuffled full batches, epoch after epoch, for ever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order.split(size)[: max(1, count // size)]


@torch.no_grad()
def predict(model: nn.Module, examples: Examples, device: torch.device) -> Predictions:
    """The model, in ``eval()``, on the test part."""
    model.eval()
    rows = torch.arange(examples.known, len(examples.targets))
    batches = [examples.batch(part, device) for part in rows.split(_TEST_BATCH)]
    values = torch.cat([model(batch) for batch in batches])
    return Predictions(values, torch.cat([batch.targets for batch in batches]))


def _test(model: nn.Module, examples: Examples, device: torch.device, classifies: bool) -> float:
    predictions, targets = predict(model, examples, device)
    if classifies:
        return ((predictions > 0) == (targets > 0.5)).double().mean().item()
    return (predictions - targets).square().mean().sqrt().item()
