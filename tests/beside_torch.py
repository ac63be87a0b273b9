"""What fails with torch.nn and works here: the tests' list, and README's table made of it.

``make beside`` runs every attempt with torch.nn, catches what it says, and writes it into README.
What torch.nn refuses on the CPU is its own words, caught there; what only cuDNN refuses is caught
on a GPU, and elsewhere is the text that torch has for it, marked as such.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils._pytree import tree_map

T, B, I, H = 5, 2, 3, 4
ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- make beside -->\n", "<!-- end -->\n"


class Claim(NamedTuple):
    """One row: what a user wants, how it is tried with torch.nn, and what it must give here.

    ``attempt(module, x)`` is tried with torch.nn's module and with ours, unless ``ours`` says how
    it is spelled here; ``truth`` makes the same of torch.nn's module in fp64, by a detour.
    ``cudnn`` is torch's text where only cuDNN refuses.
    """

    what: str
    kind: str
    attempt: Callable
    truth: Callable
    ours: Callable | None = None
    cudnn: str = ""


def compiled(module, x):
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend="aot_eager")(x)[0]


def exported(module, x):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = module

        def forward(self, x):
            return self.rnn(x)[0]

    steps = torch.export.Dim("steps", min=2, max=64)
    program = torch.export.export(Model(), (x,), dynamic_shapes={"x": {0: steps}})
    return program.module()(torch.cat([x, x]))


def over_inputs(module, x):
    return vmap(lambda x: module(x)[0])(several(x))


def several(x: Tensor) -> Tensor:
    return torch.stack([x, 2 * x, -x])


def weights_of(module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters()}


def loss(module):
    return lambda params, x: functional_call(module, params, (x,))[0].square().sum()


def per_sample(module, x):
    return vmap(grad(loss(module)), in_dims=(None, 0))(weights_of(module), several(x))


def per_sample_one_by_one(module, x):
    def of(x):
        weights = [p for _, p in module.named_parameters()]
        return torch.autograd.grad(module(x)[0].square().sum(), weights)

    found = [of(x) for x in several(x)]
    names = [name for name, _ in module.named_parameters()]
    return dict(zip(names, map(torch.stack, zip(*found, strict=True)), strict=True))


def members_of(module) -> dict[str, Tensor]:
    return {name: torch.stack([p, p / 2, -p]) for name, p in weights_of(module).items()}


def ensemble(module, x):
    return vmap(loss(module), in_dims=(0, None))(members_of(module), x)


def ensemble_one_by_one(module, x):
    members = [tree_map(lambda p, n=n: p[n], members_of(module)) for n in range(3)]
    return torch.stack([loss(module)(member, x) for member in members])


def tangent(module, x):
    return jvp(lambda x: module(x)[0], (x,), (x.cos(),))[1]


def tangent_by_backward(module, x):
    return torch.autograd.functional.jvp(lambda x: module(x)[0], x, x.cos())[1]


def parts(x: Tensor) -> list[Tensor]:
    return [x[:3, 0], x[:, 1]]


def nested(module, x):
    batch_first = type(module)(I, H, batch_first=True).to(x)
    batch_first.load_state_dict(module.state_dict())
    output = batch_first(torch.nested.nested_tensor(parts(x), layout=torch.jagged))[0]
    return list(output.unbind())


def part_by_part(module, x):
    return [module(part)[0] for part in parts(x)]


def with_an_empty_sequence(module, x):
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([T, 0]))
    return nn.utils.rnn.pad_packed_sequence(module(packed)[0])[0]


def with_an_empty_length(module, x):
    return module(x, lengths=torch.tensor([T, 0]))[0]


def first_and_zeros(module, x):
    return torch.stack([module(x[:, 0])[0], x.new_zeros(T, H)], 1)


def gradient_in_eval(module, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(module.eval()(x)[0].square().sum(), x)[0]


def gradient_in_training(module, x):
    return gradient_in_eval(module, x) if not x.is_cuda else gradient_in_eval(module.cpu(), x.cpu())


def penalty(module, x):
    x = x.clone().requires_grad_()
    (d_x,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
    return torch.autograd.grad(d_x.square().sum(), x)[0]


EVAL = "cudnn RNN backward can only be called in training mode"
TWICE = "Double backwards is not supported for CuDNN RNNs due to limitations in the CuDNN API."
CLAIMS = (
    Claim("`torch.compile(fullgraph=True)`", "LSTM", compiled, lambda m, x: m(x)[0]),
    Claim("`torch.export` for any T", "GRU", exported, lambda m, x: m(torch.cat([x, x]))[0]),
    Claim(
        "`vmap` over inputs",
        "LSTM",
        over_inputs,
        lambda m, x: torch.stack([m(x)[0] for x in several(x)]),
    ),
    Claim("per-sample gradients, `vmap(grad(loss))`", "GRU", per_sample, per_sample_one_by_one),
    Claim("an ensemble, `vmap` over weights", "GRU", ensemble, ensemble_one_by_one),
    Claim("`jvp`, `hessian`", "LSTM", tangent, tangent_by_backward),
    Claim("a jagged NestedTensor", "GRU", nested, part_by_part),
    Claim(
        "a sequence of length 0",
        "LSTM",
        with_an_empty_sequence,
        first_and_zeros,
        with_an_empty_length,
    ),
    Claim("`backward()` in `eval()`", "LSTM", gradient_in_eval, gradient_in_training, cudnn=EVAL),
    Claim("a gradient of a gradient", "GRU", penalty, penalty, cudnn=TWICE),
)


def module_of(claim: Claim, library, dtype: torch.dtype, device: str = "cpu"):
    """A module of ``library`` with the weights that every module of the claim has, and an input."""
    torch.manual_seed(0)
    weights = getattr(nn, claim.kind)(I, H).state_dict()
    module = getattr(library, claim.kind)(I, H)
    module.load_state_dict(weights)
    return module.to(device, dtype), torch.randn(T, B, I).to(device, dtype)


def refusal(claim: Claim, device: str = "cpu") -> Exception | None:
    """What torch.nn raises, or None where it gives a result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an error of pytest's would hide torch's own
        try:
            claim.attempt(*module_of(claim, nn, torch.float32, device))
        except Exception as error:  # any is what the row reports
            return error
    return None


def message(claim: Claim, device: str = "cpu") -> str:
    """A row's right column: the first sentence of torch's own words, in one line."""
    error = refusal(claim, device)
    if error is None:
        return f"{claim.cudnn} (cuDNN alone; its text, not run)"
    text = re.sub(r"^\S+\.cpp:\d+: ", "", " ".join(str(error).split()))
    first = re.split(r"(?<=\.) (?=[A-Z])| Explanation| - |! ", text)[0]
    return f"{type(error).__name__}: {first}".replace("|", "\\|")


def table(device: str = "cpu") -> str:
    """The rows in Markdown, under a line that says where they come from."""
    on = "cuDNN" if device == "cuda" else "the CPU"
    where = f"torch.nn {torch.__version__.partition('+')[0]} says on {on}"
    lines = [f"| works here | {where} |", "|---|---|"]
    lines += [f"| {claim.what} | {message(claim, device)} |" for claim in CLAIMS]
    return "\n".join(lines) + "\n"


def written() -> str:
    """The table that README has now."""
    return README.read_text().partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    made = table("cuda" if torch.cuda.is_available() else "cpu")
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(before + BEGIN + made + END + rest.partition(END)[2])
    sys.stdout.write(made)


if __name__ == "__main__":
    main()
