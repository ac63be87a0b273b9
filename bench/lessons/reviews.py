"""A bidirectional classifier of reviews: its confusion matrix, and its longest embeddings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cases import EMBEDDING, Workload, cut_down
from ..imdb import FIRST, RARE, START
from ..models import EmbeddedReviews, Examples, examples_of, remember
from ..providers import build
from ..train import Training, predict, train
from .lesson import DEVICE, Lesson, LessonError, Numbers, Setting, backend_of

#: The larger IMDB workload in a size that two cores train in under a minute.
WORKLOAD = replace(
    EMBEDDING, name="sentiment", T=100, B=64, I=32, H=32, layers=1, dropout=0.0, vocabulary=5_000,
    train=12_000, test=4_000, steps=375, learning_rate=5e-3,
)  # fmt: skip
SPECIAL = {0: "<pad>", START: "<start>", RARE: "<rare>"}
#: Tokens listed; and in how many training reviews a listed one is, at least.
TOP, LEAST_REVIEWS = 5, 20


class Fit(NamedTuple):
    """A trained classifier, its embeddings ``[V, I]`` at the start, its reviews, and how."""

    model: EmbeddedReviews
    first: Tensor
    examples: Examples
    training: Training
    backend: str
    source: str


def fit(setting: Setting) -> Fit:
    """Trains a bidirectional LSTM that begins with a memory of some twenty words."""
    workload = sizes(setting.quick)
    setting.progress.at("reviews")
    # Twice what is used: the reviews of a split are drawn from more, as from the real file.
    corpus = setting.corpus(2 * max(workload.train, workload.test))
    examples = examples_of(workload, corpus, setting.seed)
    torch.manual_seed(setting.seed)
    model = EmbeddedReviews(build("fusedrnn", "lstm", workload), workload)
    remember(model.rnn)
    model.to(DEVICE)
    first = model.embedding.weight.detach().clone()
    setting.progress.at("training")
    tick = setting.progress.tick
    training = train(model, workload, examples, workload.steps, DEVICE, setting.seed, tick)
    backend = backend_of(model.rnn, model.features(examples.batch(torch.arange(8), DEVICE)))
    return Fit(model, first, examples, training, backend, corpus.source)


def sizes(quick: bool) -> Workload:
    return cut_down(WORKLOAD) if quick else WORKLOAD


# Sentiment


def scores(matrix: list[list[int]]) -> dict[str, float | None]:
    """Accuracy, precision and recall of ``[[TN, FP], [FN, TP]]``, a good review being positive.

    Precision is None if nothing was called good, and recall if nothing is.
    """
    (tn, fp), (fn, tp) = matrix
    return {
        "accuracy": (tn + tp) / (tn + fp + fn + tp),
        "precision": tp / (tp + fp) if tp + fp else None,
        "recall": tp / (tp + fn) if tp + fn else None,
    }


def confusion(logits: Tensor, targets: Tensor) -> list[list[int]]:
    """``[[TN, FP], [FN, TP]]``: rows are the truth, columns what was said."""
    cell = 2 * (targets > 0.5).long() + (logits > 0).long()
    return torch.bincount(cell, minlength=4).view(2, 2).tolist()


def measure_sentiment(setting: Setting) -> Numbers:
    trained = fit(setting)
    matrix = confusion(*predict(trained.model, trained.examples, DEVICE))
    workload = sizes(setting.quick)
    return {
        "data": trained.source,
        "backends": {"lstm": trained.backend},
        "shape": workload.shape,
        "train": trained.examples.known,
        "test": len(trained.examples.targets) - trained.examples.known,
        "losses": trained.training.losses,
        "confusion": matrix,
        **scores(matrix),
    }


def table_sentiment(numbers: Numbers) -> Iterator[str]:
    yield f"data     {numbers['data']}"
    yield (
        f"model    LSTM {numbers['shape']}, {len(numbers['losses'])} steps on {numbers['train']:,} "
        f"reviews, tested on {numbers['test']:,}"
    )
    yield f"{'':<12}{'said bad':>10}{'said good':>10}"
    for name, row in zip(("is bad", "is good"), numbers["confusion"], strict=True):
        yield f"{name:<12}" + "".join(f"{count:>10}" for count in row)
    for name in ("accuracy", "precision", "recall"):
        value = numbers[name]
        yield f"{name:<12}{'undefined' if value is None else f'{value:.3f}':>10}"


def draw_sentiment(figure: Any, numbers: Numbers) -> None:
    """The loss curve and the matrix."""
    left, right = figure.subplots(1, 2)
    left.plot(range(1, len(numbers["losses"]) + 1), numbers["losses"], color="#d1495b", lw=1)
    left.set_xlabel("training step")
    left.set_ylabel("cross entropy of the batch")
    matrix = numbers["confusion"]
    right.imshow(matrix, cmap="Greys", vmin=0, vmax=2 * max(map(max, matrix)) or 1)
    for i, row in enumerate(matrix):
        for j, count in enumerate(row):
            right.text(j, i, f"{count}", ha="center", va="center", fontsize=14)
    right.set_xticks((0, 1), ("said bad", "said good"))
    right.set_yticks((0, 1), ("is bad", "is good"))
    figure.set_size_inches(9, 4)


# Embeddings


def reviews_with(examples: Examples, vocabulary: int) -> tuple[Tensor, Tensor]:
    """How many training reviews have each token, and how many of them are good, both ``[V]``."""
    count = torch.zeros(vocabulary, dtype=torch.int64)
    good = torch.zeros(vocabulary, dtype=torch.int64)
    for ids, target in zip(
        examples.inputs[: examples.known], examples.targets[: examples.known], strict=True
    ):
        there = ids.unique()
        count[there] += 1
        good[there] += int(target)
    return count, good


def name_of(token: int, words: dict[int, str]) -> str:
    """The word, or what stands for it; the most frequent word, of rank 1, is token 4."""
    return SPECIAL.get(token) or words.get(token) or f"word of rank {token - FIRST}"


def words_of(path: Path | None) -> dict[int, str]:
    """Token to word from Keras' ``imdb_word_index.json``, which has ranks from 1.

    Raises:
        LessonError: the file cannot be read, or is not such an index.
    """
    if path is None:
        return {}
    try:
        ranks = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LessonError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise LessonError(f"{path} is no JSON file") from error
    if not (isinstance(ranks, dict) and all(isinstance(rank, int) for rank in ranks.values())):
        raise LessonError(f"{path} is no index of words: it must map each word to its rank")
    return {rank + FIRST: word for word, rank in ranks.items()}


def measure_embeddings(setting: Setting) -> Numbers:
    words = words_of(setting.words)
    trained = fit(setting)
    weight = trained.model.embedding.weight.detach()
    norms, start = weight.norm(dim=1), trained.first.norm(dim=1)
    moved = (weight - trained.first).norm(dim=1)
    count, good = reviews_with(trained.examples, len(weight))

    def listed(order: Tensor) -> list[dict[str, Any]]:
        return [
            {
                "token": token,
                "name": name_of(token, words),
                "norm": norms[token].item(),
                "norm_at_start": start[token].item(),
                "moved": moved[token].item(),
                "reviews": int(count[token]),
                "good": int(good[token]) / int(count[token]) if count[token] else None,
            }
            for token in order[:TOP].tolist()
        ]

    often = torch.where(count >= (1 if setting.quick else LEAST_REVIEWS), moved, -1.0)
    return {
        "data": trained.source,
        "backends": {"lstm": trained.backend},
        "mean_norm": norms.mean().item(),
        "largest": listed(norms.argsort(descending=True, stable=True)),
        "moved_most": listed(often.argsort(descending=True, stable=True)),
        "norms": norms.tolist(),
        "norms_at_start": start.tolist(),
    }


def table_embeddings(numbers: Numbers) -> Iterator[str]:
    yield f"data     {numbers['data']}"
    yield f"{len(numbers['norms']):,} tokens, mean norm {numbers['mean_norm']:.2f}"
    for title, key in (("largest norm", "largest"), ("moved most", "moved_most")):
        yield f"{title:<22}{'norm':>8}{'at start':>10}{'moved':>8}{'reviews':>9}{'good':>7}"
        for line in numbers[key]:
            good = "" if line["good"] is None else f"{line['good']:.0%}"
            yield (
                f"  {line['name']:<20}{line['norm']:>8.2f}{line['norm_at_start']:>10.2f}"
                f"{line['moved']:>8.2f}{line['reviews']:>9}{good:>7}"
            )


def draw_embeddings(figure: Any, numbers: Numbers) -> None:
    axis = figure.subplots()
    top = max(*numbers["norms"], *numbers["norms_at_start"])
    bins = [top * i / 60 for i in range(61)]
    axis.hist(numbers["norms_at_start"], bins, color="#555555", alpha=0.5, label="at the start")
    axis.hist(numbers["norms"], bins, color="#d1495b", alpha=0.5, label="trained")
    for line in numbers["largest"]:
        axis.axvline(line["norm"], color="#d1495b", lw=0.8)
    axis.set_xlabel("norm of the embedding; lines: the five largest")
    axis.set_ylabel("tokens")
    axis.legend()


SENTIMENT = Lesson(
    "good reviews told from bad ones in both directions: confusion matrix, precision, recall",
    measure_sentiment,
    table_sentiment,
    draw_sentiment,
    steps=WORKLOAD.steps,
)
EMBEDDINGS = Lesson(
    "the tokens whose embeddings are longest, and those that training moved most",
    measure_embeddings,
    table_embeddings,
    draw_embeddings,
    steps=WORKLOAD.steps,
)
