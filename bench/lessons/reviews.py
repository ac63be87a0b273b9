"""Good film reviews told from bad ones: confusion matrix, precision and recall."""

from argparse import Namespace
from dataclasses import replace

import torch
from torch import Tensor

from .. import data
from ..cases import EMBEDDING, cut_down
from ..models import Model, examples_of, predict, remember, train
from ..providers import build
from . import Result

LOOK_AT = "precision and recall beside accuracy; features in bench/models.py packs the reviews."
#: The larger IMDB case in a size that one core trains in under a minute.
WORKLOAD = replace(
    EMBEDDING, name="sentiment", T=100, B=64, I=32, H=32, layers=1, dropout=0.0, vocabulary=5_000,
    train=12_000, test=4_000, steps=375, learning_rate=5e-3,
)  # fmt: skip


def confusion(logits: Tensor, targets: Tensor) -> list[list[int]]:
    """Returns ``[[TN, FP], [FN, TP]]``: a row for each truth, a column for each prediction."""
    cell = 2 * (targets > 0.5).long() + (logits > 0).long()
    return torch.bincount(cell, minlength=4).view(2, 2).tolist()


def scores(matrix: list[list[int]]) -> dict[str, float]:
    """Returns accuracy, precision and recall of good reviews; NaN is undefined."""
    (tn, fp), (fn, tp) = matrix
    return {
        "accuracy": (tn + tp) / (tn + fp + fn + tp),
        "precision": tp / (tp + fp) if tp + fp else float("nan"),
        "recall": tp / (tp + fn) if tp + fn else float("nan"),
    }


def run(options: Namespace) -> Result:
    workload = cut_down(WORKLOAD) if options.quick else WORKLOAD
    corpus = data.load(options.imdb, options.download, options.seed, workload.train)
    examples = examples_of(workload, corpus, options.seed)
    torch.manual_seed(options.seed)
    model = Model(build("fusedrnn", "lstm", workload), workload)
    remember(model.rnn)
    train(model, workload, examples, workload.steps, options.seed)
    matrix = confusion(*predict(model, examples))
    tested = len(examples.targets) - examples.known
    lines = [
        f"data: {corpus.source}",
        f"LSTM {workload.shape}, {workload.steps} steps on {examples.known:,} reviews, tested on"
        f" {tested:,}",
        f"{'':<12}{'predicted bad':>15}{'predicted good':>16}",
        *(f"{('bad', 'good')[i]:<12}{row[0]:>15}{row[1]:>16}" for i, row in enumerate(matrix)),
        ", ".join(f"{name} {value:.3f}" for name, value in scores(matrix).items()),
    ]
    return lines, None
