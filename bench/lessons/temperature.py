"""Text of one model at temperatures 0.5, 1.0 and 1.5."""

import random
from argparse import Namespace

import torch
from torch import Tensor, nn

import fusedrnn

from . import Result

LOOK_AT = "the division by the temperature before softmax in write, and the Stream that decodes."
LOOKS = "black/brown/grey/old/red/small/white/young"
PLACES = "in/near/behind the barn/forest/garden/meadow/river/valley/village"
#: Choices of words. The form of the verb depends on the first word of the sentence.
FORMS = (
    f"the {LOOKS} cat/fox/goose/mouse/wolf drinks/eats/plays/rests/sleeps {PLACES}",
    f"two/three/four/five {LOOKS} cats/foxes/geese/mice/wolves drink/eat/play/rest/sleep {PLACES}",
)


def sentence(draw: random.Random) -> str:
    """Returns a random sentence, as "three red foxes sleep near the river."."""
    words = draw.choice(FORMS).split()
    return " ".join(draw.choice(choices.split("/")) for choices in words) + "."


class Characters(nn.Module):
    """Gives the logits ``[T, B, alphabet]`` of the next character for ids ``[T, B]``."""

    def __init__(self, alphabet: int, I: int = 32, H: int = 128):
        super().__init__()
        self.embedding = nn.Embedding(alphabet, I)
        self.rnn = fusedrnn.LSTM(I, H)
        self.fc = nn.Linear(H, alphabet)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.rnn(self.embedding(ids))[0])


def fit(model: Characters, ids: Tensor, steps: int, T: int = 64, B: int = 16) -> float:
    """Trains on windows from anywhere in the text; returns the last loss."""
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        batch = ids[torch.randint(len(ids) - T, (B,)) + torch.arange(T + 1).unsqueeze(1)]
        loss = nn.functional.cross_entropy(model(batch[:-1]).flatten(0, 1), batch[1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return loss.item()


@torch.no_grad()
def write(model: Characters, alphabet: str, temperature: float, count: int, seed: int) -> str:
    """Samples characters one by one with a ``Stream``, which keeps the state between calls."""
    generator = torch.Generator().manual_seed(seed)
    stream = model.rnn.stream(batch_size=1)
    token, written = torch.tensor([alphabet.index("\n")]), []
    for _ in range(count):
        probabilities = (model.fc(stream(model.embedding(token))) / temperature).softmax(-1)
        token = probabilities.multinomial(1, generator=generator).squeeze(1)
        written.append(alphabet[token])
    return "".join(written)


def run(options: Namespace) -> Result:
    draw = random.Random(options.seed)
    text = "\n".join(sentence(draw) for _ in range(500)) + "\n"
    alphabet = "".join(sorted(set(text)))
    ids = torch.tensor([alphabet.index(character) for character in text])
    torch.manual_seed(options.seed)
    model = Characters(len(alphabet))
    loss = fit(model, ids, steps=3 if options.quick else 250)
    lines = [f"loss after training: {loss:.2f} nats a character"]
    known = set(text.replace(".", "").split())
    for temperature in (0.5, 1.0, 1.5):
        written = write(model, alphabet, temperature, 60 if options.quick else 600, options.seed)
        words = written.replace(".", "").split()[:-1]
        share = sum(word in known for word in words) / max(1, len(words))
        lines.append(f"temperature {temperature}: {share:.0%} of the words are in the text")
        lines += [f"    {line}" for line in written[:160].splitlines()[:-1]]
    return lines, None
