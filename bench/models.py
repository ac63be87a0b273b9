"""The models of the workloads around an RNN, their examples, and short trainings."""

from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from .cases import Workload
from .data import Corpus, padded, prices, rescaled, sine, windows
from .progress import progress


class Examples(NamedTuple):
    """Examples of a workload: a batch, or all, those for training first."""

    inputs: Tensor  # ids [N, T] or windows [N, T, 1]
    lengths: Tensor  # int64 [N], on the CPU, as pack_padded_sequence wants it
    targets: Tensor  # [N]
    known: int = 0  # the number of examples for training

    def batch(self, rows: Tensor, device: torch.device | None = None) -> "Examples":
        inputs, targets = self.inputs[rows].to(device), self.targets[rows].to(device)
        return Examples(inputs, self.lengths[rows], targets)


class Model(nn.Module):
    """An RNN, and a linear layer with one output behind the last layer's final hidden states.

    Reviews are classified, as words that are one-hot, or embedded and packed; of a series the next
    value is forecast. ``features`` returns the RNN's input.
    """

    def __init__(self, rnn: nn.RNNBase, workload: Workload):
        super().__init__()
        self.rnn, self.task, self.vocabulary = rnn, workload.task, workload.vocabulary
        self.directions = 1 + workload.bidirectional
        self.fc = nn.Linear(self.directions * workload.H, 1)
        if self.task == "embedding":
            self.embedding = nn.Embedding(self.vocabulary, workload.I, padding_idx=0)
        if self.task == "one-hot":
            remember(rnn)

    def features(self, batch: Examples) -> Tensor | PackedSequence:
        if self.task == "one-hot":
            return F.one_hot(batch.inputs, self.vocabulary).to(self.fc.weight.dtype)
        if self.task == "embedding":
            x = self.embedding(batch.inputs)
            return pack_padded_sequence(x, batch.lengths, batch_first=True, enforce_sorted=False)
        return batch.inputs

    def forward(self, batch: Examples) -> Tensor:
        h_n = final_hidden(self.rnn(self.features(batch)))
        return self.fc(torch.cat([*h_n[-self.directions :]], -1)).squeeze(-1)


@torch.no_grad()
def remember(rnn: nn.RNNBase) -> None:
    """Adds 3 to the bias of the LSTM's forget gate or the GRU's update gate.

    The memory then lasts some twenty steps; without it the gradient vanishes over 100 words.
    """
    for name, parameter in rnn.named_parameters():
        if name.startswith("bias_hh") and rnn.mode in ("LSTM", "GRU"):
            parameter[rnn.hidden_size : 2 * rnn.hidden_size] += 3


def final_hidden(result: tuple) -> Tensor:
    """Returns h_n of the result of an RNN."""
    return result[1][0] if isinstance(result[1], tuple) else result[1]


def examples_of(workload: Workload, corpus: Corpus | None, seed: int) -> Examples:
    """Returns reviews in an order drawn from ``seed``, or windows of a series in order of time."""
    if workload.task in ("sine", "price"):
        series = sine() if workload.task == "sine" else prices(seed=seed)
        known = (len(series) - workload.T) * 4 // 5
        if workload.task == "price":
            series = rescaled(series, known + workload.T)
        inputs, targets = windows(series, workload.T)
        return Examples(inputs, torch.full((len(inputs),), workload.T), targets, known)
    assert corpus is not None
    parts = []
    for reviews, count in zip(corpus[:2], (workload.train, workload.test), strict=True):
        ids, lengths = padded(reviews, workload.vocabulary, workload.T)
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(lengths), generator=generator)[:count]
        parts.append((ids[rows], lengths[rows], reviews.labels[rows].float()))
    inputs, lengths, targets = (torch.cat(pair) for pair in zip(*parts, strict=True))
    return Examples(inputs, lengths, targets, known=len(parts[0][0]))


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
    size, known, draw = workload.B, examples.known, torch.Generator().manual_seed(seed)
    orders = (torch.randperm(known, generator=draw) for _ in range(steps))
    full = chain.from_iterable(order.split(size)[: max(1, known // size)] for order in orders)
    for rows in progress(list(islice(full, steps)), lambda rows: "training"):
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


@torch.no_grad()
def predict(model: Model, examples: Examples) -> tuple[Tensor, Tensor]:
    """Returns the logits or forecasts ``[N]`` for the test part, in its order, and the targets."""
    model.eval()
    rows, device = torch.arange(examples.known, len(examples.targets)), model.fc.weight.device
    batches = [examples.batch(part, device) for part in rows.split(256)]
    values = torch.cat([model(batch) for batch in batches])
    return values, torch.cat([batch.targets for batch in batches])
