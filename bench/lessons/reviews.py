"""Good film reviews told from bad ones: confusion matrix, precision and recall."""

from argparse import Namespace
from dataclasses import replace

import torch

from .. import data
from ..cases import EMBEDDING, cut_down
from ..models import examples_of, predict
from . import Result, fit

LOOK_AT = "precision and recall beside accuracy; features in bench/models.py packs the reviews."
#: The larger IMDB case in a size that one core trains in under a minute.
WORKLOAD = replace(
    EMBEDDING, name="sentiment", T=100, B=64, I=32, H=32, layers=1, dropout=0.0, vocabulary=5_000,
    train=12_000, test=4_000, steps=375, learning_rate=5e-3,
)  # fmt: skip


def run(options: Namespace) -> Result:
    workload = cut_down(WORKLOAD) if options.quick else WORKLOAD
    corpus = data.load(options.imdb, options.download, options.seed, workload.train)
    examples = examples_of(workload, corpus, options.seed)
    model, training = fit("lstm", workload, examples, options, workload.steps, remembers=True)
    logits, targets = predict(model, examples)
    cell = 2 * (targets > 0.5).long() + (logits > 0).long()  # truth and prediction in one number
    tn, fp, fn, tp = torch.bincount(cell, minlength=4).tolist()
    precision, recall = tp / max(1, tp + fp), tp / max(1, tp + fn)
    lines = [
        f"data: {corpus.source}",
        f"LSTM {workload.shape}, {len(training.losses)} steps on {examples.known:,} reviews, tested"
        f" on {len(targets):,}",
        f"{'':<12}{'predicted bad':>15}{'predicted good':>16}",
        f"{'bad':<12}{tn:>15}{fp:>16}",
        f"{'good':<12}{fn:>15}{tp:>16}",
        f"accuracy {training.metric:.3f}, precision {precision:.3f}, recall {recall:.3f}",
    ]
    return lines, None
