"""The models of the workloads around an RNN, and their examples."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from .cases import Workload
from .data import Corpus, Scale, padded, prices, sine, windows


class Batch(NamedTuple):
    inputs: Tensor  # ids [B, T] or windows [B, T, 1]
    lengths: Tensor  # int64 [B], on the CPU, as pack_padded_sequence wants it
    targets: Tensor  # [B]


class Model(nn.Module):
    """An RNN and a linear layer with one output; ``features`` returns the RNN's input."""

    def __init__(self, rnn: nn.RNNBase, workload: Workload, directions: int = 1):
        super().__init__()
        self.rnn = rnn
        self.fc = nn.Linear(directions * workload.H, 1)

    def features(self, batch: Batch) -> Tensor | PackedSequence:
        return batch.inputs


class OneHotReviews(Model):
    """Classifies reviews of one-hot words from the last hidden state."""

    def __init__(self, rnn: nn.RNNBase, workload: Workload):
        super().__init__(rnn, workload)
        self.vocabulary = workload.vocabulary
        remember(rnn)

    def features(self, batch: Batch) -> Tensor:
        return nn.functional.one_hot(batch.inputs, self.vocabulary).to(self.fc.weight.dtype)

    def forward(self, batch: Batch) -> Tensor:
        return self.fc(final_hidden(self.rnn(self.features(batch)))[-1]).squeeze(-1)


class EmbeddedReviews(Model):
    """Classifies packed reviews of embedded words from both directions of the last layer."""

    def __init__(self, rnn: nn.RNNBase, workload: Workload):
        super().__init__(rnn, workload, directions=2)
        self.embedding = nn.Embedding(workload.vocabulary, workload.I, padding_idx=0)

    def features(self, batch: Batch) -> PackedSequence:
        x = self.embedding(batch.inputs)
        return pack_padded_sequence(x, batch.lengths, batch_first=True, enforce_sorted=False)

    def forward(self, batch: Batch) -> Tensor:
        h_n = final_hidden(self.rnn(self.features(batch)))
        return self.fc(torch.cat((h_n[-2], h_n[-1]), -1)).squeeze(-1)


class Forecast(Model):
    """Forecasts the next value of a series from the last output of a window."""

    def forward(self, batch: Batch) -> Tensor:
        output, _ = self.rnn(self.features(batch))
        return self.fc(output[:, -1]).squeeze(-1)


MODELS: dict[str, type[Model]] = {
    "one-hot": OneHotReviews, "embedding": EmbeddedReviews, "sine": Forecast, "price": Forecast,
}  # fmt: skip


@torch.no_grad()
def remember(rnn: nn.RNNBase) -> None:
    """Adds 3 to the bias of the LSTM's forget gate or the GRU's update gate.

    The memory then lasts some twenty steps. Without it the gradient vanishes over 100 words, and
    training begins on a plateau where rounding decides the direction of Adam's steps.
    """
    for name, parameter in rnn.named_parameters():
        if name.startswith("bias_hh") and rnn.mode in ("LSTM", "GRU"):
            parameter[rnn.hidden_size : 2 * rnn.hidden_size] += 3


def final_hidden(result: tuple) -> Tensor:
    """Returns h_n of the result of an RNN."""
    return result[1][0] if isinstance(result[1], tuple) else result[1]


class Examples(NamedTuple):
    """All examples of a workload, those for training first."""

    inputs: Tensor
    lengths: Tensor
    targets: Tensor
    known: int  # the number of examples for training

    def batch(self, rows: Tensor, device: torch.device) -> Batch:
        inputs, targets = self.inputs[rows].to(device), self.targets[rows].to(device)
        return Batch(inputs, self.lengths[rows], targets)


def examples_of(workload: Workload, corpus: Corpus | None, seed: int) -> Examples:
    """Returns reviews in an order drawn from ``seed``, or the windows of a series in order of time.

    Raises:
        ValueError: the workload needs reviews, and ``corpus`` is None.
    """
    if workload.task in ("sine", "price"):
        series = sine() if workload.task == "sine" else prices(seed=seed)
        known = (len(series) - workload.T) * 4 // 5
        if workload.task == "price":
            series = Scale.of(series, known + workload.T).apply(series)
        inputs, targets = windows(series, workload.T)
        return Examples(inputs, torch.full((len(inputs),), workload.T), targets, known)
    if corpus is None:
        raise ValueError(f"{workload.name} needs reviews")
    parts = []
    for reviews, count in zip(corpus[:2], (workload.train, workload.test), strict=True):
        ids, lengths = padded(reviews, workload.vocabulary, workload.T)
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(lengths), generator=generator)[:count]
        parts.append((ids[rows], lengths[rows], reviews.labels[rows].float()))
    inputs, lengths, targets = (torch.cat(pair) for pair in zip(*parts, strict=True))
    return Examples(inputs, lengths, targets, known=len(parts[0][0]))
