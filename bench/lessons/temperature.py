"""What a language model writes at three temperatures: the one of ``python -m bench text``.

The logits are divided by the temperature before the softmax: below 1 the likely characters become
likelier, above 1 all become alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from .. import text
from .lesson import DEVICE, Lesson, Numbers, Setting, backend_of

SIZES = replace(text.Sizes(), steps=250)
#: The next character after this is drawn in the picture: many words may follow.
PROMPT = "\nthe "
#: Characters of the text whose next ones' entropy is averaged.
CONTEXT = 500


@torch.no_grad()
def probabilities(model: text.Characters, ids: torch.Tensor, temperature: float) -> torch.Tensor:
    """Of each next character, in fp64: ``[T, alphabet]`` for ids ``[T]``."""
    logits = model(ids.unsqueeze(1).to(DEVICE))[:, 0].double()
    return (logits / temperature).softmax(-1)


def entropy(probability: torch.Tensor) -> float:
    """Mean entropy of distributions ``[N, alphabet]``, in bits."""
    return torch.special.entr(probability).sum(-1).mean().item() / math.log(2)


def measure(setting: Setting) -> Numbers:
    sizes = text.QUICK if setting.quick else SIZES
    corpus = text.Text.of(text.generate(sizes.characters, setting.seed))
    model = text.build(text.OURS, len(corpus.alphabet), sizes, setting.seed).to(DEVICE)
    setting.progress.at("training")
    training = text.fit(model, corpus.ids, sizes, setting.seed, DEVICE, setting.progress.tick)
    model.eval()
    prompt = torch.tensor([corpus.alphabet.index(character) for character in PROMPT])
    found = {}
    for temperature in text.TEMPERATURES:
        samples = text.write(model, corpus, temperature, sizes, setting.seed, DEVICE)
        found[str(temperature)] = {
            "samples": samples,
            "known_words": text.known_words("".join(f"{s} " for s in samples), corpus.text),
            "entropy_bits": entropy(probabilities(model, corpus.ids[:CONTEXT], temperature)),
            "next": probabilities(model, prompt, temperature)[-1].tolist(),
        }
    example = torch.zeros(sizes.T, sizes.B, sizes.embedding, device=DEVICE)
    return {
        "backends": {"lstm": backend_of(model.rnn, example)},
        "final_loss": training.final_loss,
        "alphabet": list(corpus.alphabet),
        "temperatures": found,
    }


def table(numbers: Numbers) -> Iterator[str]:
    yield f"loss after training: {numbers['final_loss']:.3f} nats a character"
    for temperature, found in numbers["temperatures"].items():
        yield (
            f"temperature {temperature}: {found['known_words']:.0%} of the words are known, "
            f"{found['entropy_bits']:.2f} bits a character"
        )
        yield from (f"    {line}" for line in found["samples"][0].strip().splitlines())


def draw(figure: Any, numbers: Numbers) -> None:
    """The next character after the prompt, at each temperature."""
    found = numbers["temperatures"]
    panels = figure.subplots(len(found), sharex=True, sharey=True)
    shown = [("line end" if c == "\n" else "blank" if c == " " else c) for c in numbers["alphabet"]]
    for axis, (temperature, of) in zip(panels, found.items(), strict=True):
        axis.bar(range(len(shown)), of["next"], color="#d1495b")
        axis.set_title(f"temperature {temperature}", fontsize=9)
    panels[-1].set_xticks(range(len(shown)), shown)
    panels[-1].tick_params("x", labelrotation=90)
    figure.supylabel("probability of the next character")
    figure.suptitle(f"after {PROMPT.strip()!r} and a blank", fontsize=10)


LESSON = Lesson(
    "text of one model at temperatures 0.5, 1.0 and 1.5",
    measure,
    table,
    draw,
    steps=SIZES.steps,
)
