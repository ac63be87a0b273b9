"""``python -m bench text``: a character model learns a small language, and writes it by ``Stream``.

The text comes from a grammar of three kinds of sentences: animals, whose number the verb must
agree with; the weather of the four winds; and sums. A model of characters must remember the number
of the subject over a dozen steps, and what it writes can be judged: are these words?
"""

from __future__ import annotations

import csv
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fusedrnn
from fusedrnn.stream import Stream

from .cases import CHARACTER
from .plots import COLOURS
from .progress import Progress
from .providers import TORCH
from .results import FolderError
from .timing import Times, interleaved
from .train import Training

DEFAULT_FOLDER = Path(__file__).parent / "results" / "local"
OURS = "fusedrnn"
TEMPERATURES = (0.5, 1.0, 1.5)
#: Who takes a step in the timing; the first is the yardstick.
WAYS = ("torch.nn, T=1", "fusedrnn, T=1", "fusedrnn, Stream")
#: Of outputs against one run over the sequence, both fp32; measured 1.5e-6 on the CPU.
TOLERANCE = 1e-4

ANIMALS = {
    "cat": "cats", "dog": "dogs", "fox": "foxes", "goose": "geese", "horse": "horses",
    "mouse": "mice", "otter": "otters", "owl": "owls", "sheep": "sheep", "wolf": "wolves",
}  # fmt: skip
COLORS = ("black", "brown", "grey", "old", "quiet", "red", "small", "white", "young")
PLACES = ("barn", "forest", "garden", "harbour", "meadow", "river", "valley", "village")
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve",
)  # fmt: skip
VERBS = {"drink": "drinks", "eat": "eats", "play": "plays", "rest": "rests", "sleep": "sleeps"}
WINDS = {"north": "snow", "east": "frost", "south": "sunshine", "west": "rain"}
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


def generate(characters: int, seed: int = 0) -> str:
    """Sentences, one a line, of at least ``characters`` characters together."""
    draw = random.Random(seed)
    lines: list[str] = []
    length = 0
    while length < characters:
        lines.append(draw.choice((_animals, _weather, _sum))(draw))
        length += len(lines[-1]) + 1
    return "\n".join(lines) + "\n"


def _animals(draw: random.Random) -> str:
    """``the red fox sleeps near the river.`` or ``three red foxes sleep near the river.``"""
    one, many = draw.choice(list(ANIMALS.items()))
    plain, third = draw.choice(list(VERBS.items()))
    rest = f"{draw.choice(('in', 'near', 'behind'))} the {draw.choice(PLACES)}."
    colour = draw.choice(COLORS)
    if draw.random() < 0.5:
        return f"{draw.choice(('the', 'one'))} {colour} {one} {third} {rest}"
    return f"{draw.choice(NUMBERS[2:])} {colour} {many} {plain} {rest}"


def _weather(draw: random.Random) -> str:
    """``on monday the wind from the west brings rain.``: each wind brings its own."""
    wind, weather = draw.choice(list(WINDS.items()))
    return f"on {draw.choice(DAYS)} the wind from the {wind} brings {weather}."


def _sum(draw: random.Random) -> str:
    """``two and three make five.``: true ones only, up to twelve."""
    first = draw.randint(0, 9)
    second = draw.randint(1, min(9, 12 - first))
    return f"{NUMBERS[first]} and {NUMBERS[second]} make {NUMBERS[first + second]}."


def known_words(sample: str, text: str) -> float:
    """The share of the sample's words that the text has; the last may be cut off and is left out.

    A word is what lies between blanks and full stops; a sample without one whole word has 0.
    """
    known = set(text.replace(".", " ").split())
    words = sample.replace(".", " . ").split(" ")[:-1]
    found = [word for part in words for word in part.split() if word != "."]
    return sum(word in known for word in found) / len(found) if found else 0.0


@dataclass(frozen=True)
class Sizes:
    """Of text, model, training (T characters, B rows) and timing."""

    characters: int = 20_000
    embedding: int = CHARACTER.I
    H: int = CHARACTER.H
    T: int = 64
    B: int = 16
    steps: int = 300
    learning_rate: float = 5e-3
    sample: int = 120
    rows: int = 8  # samples of a temperature; the first is shown, all are judged
    tokens: int = 50  # of one timed call
    seconds: float = 3.0


QUICK = Sizes(2_000, 4, 8, 8, 4, 4, sample=20, rows=2, tokens=2, seconds=0.0)


class Characters(nn.Module):
    """Embedding, RNN, and the logits of the next character."""

    def __init__(self, rnn: nn.RNNBase, alphabet: int):
        super().__init__()
        self.embedding = nn.Embedding(alphabet, rnn.input_size)
        self.rnn = rnn
        self.fc = nn.Linear(rnn.hidden_size, alphabet)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``[T, B, alphabet]`` of ids ``[T, B]``."""
        return self.fc(self.rnn(self.embedding(ids))[0])


class Text(NamedTuple):
    """A text as numbers."""

    text: str
    alphabet: str
    ids: Tensor  # int64 [characters]

    @classmethod
    def of(cls, text: str) -> Text:
        alphabet = "".join(sorted(set(text)))
        number = {character: i for i, character in enumerate(alphabet)}
        return cls(text, alphabet, torch.tensor([number[c] for c in text]))


def build(provider: str, alphabet: int, sizes: Sizes, seed: int) -> Characters:
    """The same start for every provider."""
    torch.manual_seed(seed)
    classes: Any = nn if provider == TORCH else fusedrnn
    return Characters(classes.LSTM(sizes.embedding, sizes.H), alphabet)


def batches(ids: Tensor, sizes: Sizes, seed: int) -> Iterator[Tensor]:
    """Windows of T + 1 characters ``[T + 1, B]`` from anywhere in the text, for ever."""
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(sizes.T + 1).unsqueeze(1)
    while True:
        yield ids[torch.randint(len(ids) - sizes.T, (sizes.B,), generator=generator) + window]


def fit(
    model: Characters,
    ids: Tensor,
    sizes: Sizes,
    seed: int,
    device: torch.device,
    tick: Callable[[], object] = lambda: None,
) -> Training:
    """Trains with Adam; losses in nats a character. The metric is the mean loss of the end."""
    optimiser = torch.optim.Adam(model.parameters(), lr=sizes.learning_rate)
    losses = []
    for _, batch in zip(range(sizes.steps), batches(ids, sizes, seed), strict=False):
        batch = batch.to(device)
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(batch[:-1]).flatten(0, 1), batch[1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.detach())  # read at the end: .item() would wait for the GPU
        tick()
    training = Training(torch.stack(losses).tolist(), 0.0, 0.0)
    return training._replace(metric=training.final_loss)


@torch.no_grad()
def write(
    model: Characters, text: Text, temperature: float, sizes: Sizes, seed: int, device: torch.device
) -> list[str]:
    """Samples by ``Stream``, ``rows`` side by side, each from the beginning of a line."""
    generator = torch.Generator(device).manual_seed(seed)
    stream = Stream(model.rnn, sizes.rows)
    start = text.alphabet.index("\n")
    ids = torch.full((sizes.rows,), start, device=device)
    written = []
    for _ in range(sizes.sample):
        logits = model.fc(stream(model.embedding(ids))) / temperature
        ids = logits.softmax(-1).multinomial(1, generator=generator).squeeze(1)
        written.append(ids)
    rows = torch.stack(written, 1).tolist()
    return ["".join(text.alphabet[i] for i in row) for row in rows]


@torch.no_grad()
def distance(model: Characters, ids: Tensor) -> float:
    """The largest difference between ``Stream``'s outputs and one run over the sequence."""
    inputs = model.embedding(ids.unsqueeze(1))
    stream = Stream(model.rnn)
    streamed = torch.stack([stream(x) for x in inputs])
    return (streamed - model.rnn(inputs)[0]).abs().max().item()


def decoder(model: Characters, way: str, tokens: int, device: torch.device) -> Callable[[], None]:
    """Writes ``tokens`` characters, the likeliest each time, for one sequence."""
    step = stepper_of(model, way)
    ids = torch.zeros(1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def decode() -> None:
        nonlocal ids
        for _ in range(tokens):
            ids = model.fc(step(model.embedding(ids))).argmax(-1)

    return decode


def rnn_alone(model: Characters, way: str, tokens: int, device: torch.device) -> Callable[[], None]:
    """The RNN's part of ``decoder``."""
    step = stepper_of(model, way)
    x = torch.zeros(1, model.rnn.input_size, device=device)

    @torch.no_grad()
    def steps() -> None:
        for _ in range(tokens):
            step(x)

    return steps


def stepper_of(model: Characters, way: str) -> Callable[[Tensor], Tensor]:
    """One step of the RNN, ``[1, I]`` to ``[1, H]``; its state goes on from call to call."""
    if way == WAYS[2]:
        return Stream(model.rnn)
    hx: Any = None

    def by_hand(x: Tensor) -> Tensor:
        nonlocal hx
        output, hx = model.rnn(x.unsqueeze(0), hx)
        return output[0]

    return by_hand


def speeds(
    models: dict[str, Characters], sizes: Sizes, device: torch.device
) -> dict[str, dict[str, Times]]:
    """Milliseconds of ``tokens`` characters by way, of the whole loop and of the RNN alone."""
    trained = {way: models[TORCH if way == WAYS[0] else OURS] for way in WAYS}
    return {
        what: interleaved(
            {way: make(model, way, sizes.tokens, device) for way, model in trained.items()},
            device,
            seconds=sizes.seconds,
        )
        for what, make in (("whole loop", decoder), ("RNN alone", rnn_alone))
    }


def run(out: Path | None, *, quick: bool, seed: int, device: torch.device) -> int:
    """Trains, writes samples, times, and leaves text.csv and text.png in the folder.

    Args:
        out: the folder; None means ``bench/results/local``.
        quick: tiny sizes, which measure nothing.
        seed: of the text, the weights, the batches and the samples.
        device: where the models are.

    Returns:
        0, or 1 if ``Stream`` and a run over the whole sequence differ.

    Raises:
        FolderError: the folder cannot be written.
    """
    folder = folder_for(out)
    sizes = QUICK if quick else Sizes()
    text = Text.of(generate(sizes.characters, seed))
    print(f"text     {len(text.text)} characters, {len(text.alphabet)} different, from a grammar")
    print(f"model    embedding {sizes.embedding}, LSTM H={sizes.H}, {sizes.steps} training steps")
    models, trained = {}, {}
    progress = Progress(2 * sizes.steps)
    for provider in (TORCH, OURS):
        progress.at(provider)
        models[provider] = build(provider, len(text.alphabet), sizes, seed).to(device)
        trained[provider] = fit(models[provider], text.ids, sizes, seed, device, progress.tick)
    progress.close()
    apart = _largest_difference(trained)
    for provider, training in trained.items():
        print(f"loss     {provider:<9} {training.final_loss:.4f} nats a character")
    print(f"         largest difference of the two curves at any step: {apart:.0e}")

    ours = models[OURS].eval()
    off = distance(ours, text.ids[: sizes.sample].to(device))
    shares = {}
    for temperature in TEMPERATURES:
        samples = write(ours, text, temperature, sizes, seed, device)
        shares[temperature] = known_words("".join(f"{s} " for s in samples), text.text)
        print(f"\ntemperature {temperature}: {shares[temperature]:.0%} of the words are known")
        print("\n".join(f"    {line}" for line in samples[0].strip().splitlines()))

    timed = speeds(models, sizes, device)
    title = "tokens per second, one sequence"
    print(f"\n{title:<32}" + "".join(f"{what:>12}{'x':>6}" for what in timed))
    for way in WAYS:
        cells = [timed[what][way] for what in timed]
        print(f"{way:<32}" + "".join(f"{_rate(c, sizes):>12.0f}{c.speedup:>6.2f}" for c in cells))
    print(f"x: median over the rounds of {WAYS[0]}'s time / this one's.")
    _save(folder, trained, shares, timed, sizes)
    print(draw(folder))
    if not off <= TOLERANCE:
        print(f"Stream is {off:.1e} from one run over the sequence", file=sys.stderr)
        return 1
    return 0


def _rate(times: Times, sizes: Sizes) -> float:
    return 1e3 * sizes.tokens / times.p50


def _largest_difference(trained: dict[str, Training]) -> float:
    curves = [training.losses for training in trained.values()]
    return max(abs(a - b) for a, b in zip(*curves, strict=True))


def folder_for(out: Path | None) -> Path:
    """The folder of the results, made if it is not there.

    Raises:
        FolderError: it cannot be.
    """
    folder = out or DEFAULT_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"no results can be written to {folder}: {error.strerror}") from error
    return folder


def _save(
    folder: Path,
    trained: dict[str, Training],
    shares: dict[float, float],
    timed: dict[str, dict[str, Times]],
    sizes: Sizes,
) -> None:
    """text.csv, a number a line: what it is, of whom, at which training step if any."""
    lines: list[tuple[str, str, int | str, str]] = []
    for what, ways in timed.items():
        name = what.replace(" ", "_").lower()
        for way, times in ways.items():
            lines.append((f"{name}_tokens_per_s", way, "", f"{_rate(times, sizes):.6g}"))
            lines.append((f"{name}_speedup", way, "", f"{times.speedup:.6g}"))
    for temperature, share in shares.items():
        lines.append(("known_words", f"temperature {temperature}", "", f"{share:.6g}"))
    for provider, training in trained.items():
        lines.append(("final_loss", provider, "", f"{training.final_loss:.6g}"))
        lines += [("loss", provider, i, f"{x:.6g}") for i, x in enumerate(training.losses)]
    with open(folder / "text.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("measure", "name", "step", "value"))
        writer.writerows(lines)


def draw(folder: Path) -> str:
    """Writes text.png from text.csv: the two loss curves on top of each other."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"CSV in {folder} (no picture: matplotlib is not installed)"
    with open(folder / "text.csv", newline="") as file:
        points = [line for line in csv.DictReader(file) if line["measure"] == "loss"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for provider, width in ((TORCH, 3.0), (OURS, 1.2)):
        curve = [(int(p["step"]), float(p["value"])) for p in points if p["name"] == provider]
        axis.plot(*zip(*curve, strict=True), color=COLOURS[provider], lw=width, label=provider)
    axis.set_xlabel("training step")
    axis.set_ylabel("loss, nats a character")
    axis.legend()
    figure.savefig(folder / "text.png", dpi=110)
    return f"CSV and PNG in {folder}"
