"""Short trainings: from the same weights and in the same order of examples."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .cases import Workload
from .models import Examples, Model


class Training(NamedTuple):
    """The loss of every step, and the metric on the test part after the last."""

    losses: list[float]
    metric: float  # accuracy of reviews, root mean square error of forecasts

    @property
    def final_loss(self) -> float:
        """The mean over the last tenth of the steps, because single batches scatter."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(last) / len(last)


def train(model: Model, workload: Workload, examples: Examples, steps: int, seed: int) -> Training:
    """Trains with Adam on the model's device, and tests."""
    torch.manual_seed(seed)  # of dropout
    classifies, device = workload.vocabulary > 0, model.fc.weight.device
    criterion = nn.BCEWithLogitsLoss() if classifies else nn.MSELoss()
    optimiser = torch.optim.Adam(model.parameters(), lr=workload.learning_rate)
    losses = []
    model.train()
    for _, rows in zip(range(steps), _batches(examples.known, workload.B, seed), strict=False):
        batch = examples.batch(rows, device)
        optimiser.zero_grad()
        loss = criterion(model(batch), batch.targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.detach())  # .item() would synchronise with the GPU
    values, targets = predict(model, examples)
    if classifies:
        metric = ((values > 0) == (targets > 0.5)).double().mean()
    else:
        metric = (values - targets).square().mean().sqrt()
    return Training(torch.stack(losses).tolist(), metric.item())


def _batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Yields shuffled full batches without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order.split(size)[: max(1, count // size)]


@torch.no_grad()
def predict(model: Model, examples: Examples) -> tuple[Tensor, Tensor]:
    """Returns the logits or forecasts ``[N]`` for the test part, in its order, and the targets."""
    model.eval()
    rows, device = torch.arange(examples.known, len(examples.targets)), model.fc.weight.device
    batches = [examples.batch(part, device) for part in rows.split(256)]
    values = torch.cat([model(batch) for batch in batches])
    return values, torch.cat([batch.targets for batch in batches])
