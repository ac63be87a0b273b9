"""The lessons' models around an RNN: what a tutorial would write."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from .cases import Workload
from .imdb import Corpus, padded
from .series import prices, rescaled, sine, windows


class Batch(NamedTuple):
    inputs: Tensor  # ids [B, T] or windows [B, T, 1]
    lengths: Tensor  # int64 [B], on the CPU as pack_padded_sequence wants it
    targets: Tensor  # [B]


Input = Tensor | PackedSequence


class Model(nn.Module):
    """An RNN, and what it is given of a batch."""

    rnn: nn.RNNBase

    def features(self, batch: Batch) -> Input:
        raise NotImplementedError


class OneHotReviews(Model):
    """Words as one-hot vectors; the logit comes from the last hidden state."""

    def __init__(self, rnn: nn.RNNBase, workload: Workload):
        super().__init__()
        self.rnn, self.vocabulary = rnn, workload.vocabulary
        remember(rnn)
        self.fc = nn.Linear(workload.H, 1)

    def features(self, batch: Batch) -> Tensor:
        """``[B, T, vocabulary]``: made for one batch, as all reviews would take 1.8 GB."""
        return nn.functional.one_hot(batch.inputs, self.vocabulary).to(self.fc.weight.dtype)

    def forward(self, batch: Batch) -> Tensor:
        h_n = final_hidden(self.rnn(self.features(batch)))
        return self.fc(h_n[-1]).squeeze(-1)


class EmbeddedReviews(Model):
    """Embedded words of ragged reviews; the logit comes from the last layer's two directions."""

    def __init__(self, rnn: nn.RNNBase, workload: Workload):
        super().__init__()
        self.embedding = nn.Embedding(workload.vocabulary, workload.I, padding_idx=0)
        self.rnn = rnn
        self.fc = nn.Linear(2 * workload.H, 1)

    def features(self, batch: Batch) -> PackedSequence:
        return pack_padded_sequence(
            self.embedding(batch.inputs), batch.lengths, batch_first=True, enforce_sorted=False
        )

    def forward(self, batch: Batch) -> Tensor:
        h_n = final_hidden(self.rnn(self.features(batch)))
        return self.fc(torch.cat((h_n[-2], h_n[-1]), -1)).squeeze(-1)


class Forecast(Model):
    """The next value of a series from the last output of a window."""

    def __init__(self, rnn: nn.RNNBase, workload: Workload):
        super().__init__()
        self.rnn = rnn
        self.fc = nn.Linear(workload.H, 1)

    def features(self, batch: Batch) -> Tensor:
        return batch.inputs

    def forward(self, batch: Batch) -> Tensor:
        output, _ = self.rnn(self.features(batch))
        return self.fc(output[:, -1]).squeeze(-1)


MODELS: dict[str, Callable[[nn.RNNBase, Workload], Model]] = {
    "one-hot": OneHotReviews,
    "embedding": EmbeddedReviews,
    "sine": Forecast,
    "price": Forecast,
}


@torch.no_grad()
def remember(rnn: nn.RNNBase) -> None:
    """Starts with a memory of some twenty steps: 3 onto the bias of the LSTM's f or the GRU's z.

    Both are the second gate, in every layer and direction. Without it the gradient of h_T dies out
    over 100 words, and training spends its first epoch on a plateau where rounding decides the
    direction of Adam's steps.
    """
    for name, parameter in rnn.named_parameters():
        if name.startswith("bias_hh"):
            parameter[rnn.hidden_size : 2 * rnn.hidden_size] += 3


def final_hidden(result: tuple) -> Tensor:
    """h_n of what an LSTM or a GRU returns."""
    final = result[1]
    return final[0] if isinstance(final, tuple) else final


class Examples(NamedTuple):
    """All of a workload's examples, training first."""

    inputs: Tensor
    lengths: Tensor
    targets: Tensor
    known: int  # examples [:known] are for training

    def batch(self, rows: Tensor, device: torch.device) -> Batch:
        return Batch(
            self.inputs[rows].to(device), self.lengths[rows], self.targets[rows].to(device)
        )


def examples_of(workload: Workload, corpus: Corpus | None, seed: int) -> Examples:
    """Reviews in an order drawn from ``seed``, or the windows of a series in order of time."""
    if workload.task in ("sine", "price"):
        return _series_examples(workload, seed)
    if corpus is None:
        raise ValueError(f"{workload.name} needs reviews, and was given none")
    parts = []
    for reviews, count in zip(corpus.splits, (workload.train, workload.test), strict=True):
        ids, lengths = padded(reviews, workload.vocabulary, workload.T)
        order = torch.randperm(len(reviews), generator=torch.Generator().manual_seed(seed))
        rows = order[:count]
        parts.append((ids[rows], lengths[rows], reviews.labels[rows].float()))
    inputs, lengths, targets = (torch.cat(pair) for pair in zip(*parts, strict=True))
    return Examples(inputs, lengths, targets, known=len(parts[0][0]))


def _series_examples(workload: Workload, seed: int) -> Examples:
    series = sine() if workload.task == "sine" else prices(seed=seed)
    known = (len(series) - workload.T) * 4 // 5
    if workload.task == "price":
        series = rescaled(series, known + workload.T)
    cut = windows(series, workload.T)
    lengths = torch.full((len(cut.inputs),), workload.T)
    return Examples(cut.inputs, lengths, cut.targets, known)
