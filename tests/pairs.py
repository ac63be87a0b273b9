"""Pairs of torch's module and ours with the same weights, of one size; runs that are compared."""

import io

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._pytree import tree_leaves

import fusedrnn

T, B, I, H = 4, 3, 3, 5
NAMES = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")
LENGTHS = torch.tensor([4, 1, 3])
RESET = torch.zeros(T, B, dtype=torch.bool)
RESET[[0, 1, 2], [1, 0, 2]] = True


def build(name: str, dtype: torch.dtype = torch.float64, **kwargs) -> tuple[nn.Module, nn.Module]:
    """Returns torch's module and ours; name may end with a nonlinearity."""
    name, *nonlinearity = name.split()
    kwargs |= {"nonlinearity": nonlinearity[0]} if nonlinearity else {}
    theirs = getattr(nn, name)(I, H, dtype=dtype, **kwargs)
    ours = getattr(fusedrnn, name)(I, H, dtype=dtype, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def input_of(name: str) -> Tensor:
    """Returns an input of torch's or our class of that name, with three features."""
    return torch.randn(5, 3) if name.endswith("Cell") else torch.randn(6, 5, 3)


def output_of(module: nn.Module, *args) -> Tensor:
    """Returns the first result of a call."""
    result = module(*args)
    return result[0] if isinstance(result, tuple) else result


def saved(module: nn.Module) -> io.BytesIO:
    """Returns a file that torch.load can read."""
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return buffer


def reloaded(module: nn.Module) -> nn.Module:
    return torch.load(saved(module), weights_only=False)


def batch(*middle: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(T, *(middle or (B,)), I, dtype=dtype)


def packed(enforce_sorted: bool = False, lengths=(3, 4, 1), dtype=torch.float64) -> PackedSequence:
    lengths = sorted(lengths, reverse=True) if enforce_sorted else lengths
    sequences = [torch.randn(length, I, dtype=dtype) for length in lengths]
    return pack_sequence(sequences, enforce_sorted=enforce_sorted)


def states_for(module: nn.Module, *middle: int) -> Tensor | tuple[Tensor, Tensor]:
    """Returns a random hx, with ``middle`` between layers and columns."""
    rows = module.num_layers * (2 if module.bidirectional else 1)
    H, P, weight = module.hidden_size, module.proj_size, module.weight_hh_l0
    h, c = (torch.randn(rows, *middle, n, dtype=torch.float64).to(weight) for n in (P or H, H))
    return (h, c) if module.mode == "LSTM" else h


def leaves(tree) -> list[Tensor]:
    """Returns the tensors of an input, hx or result."""
    if tree is None:
        return []
    if isinstance(tree, PackedSequence):
        return [tree.data]
    return [tree] if isinstance(tree, Tensor) else [t for part in tree for t in leaves(part)]


def gradients(results, sources) -> list[Tensor]:
    """Pulls random gradients back, the same for every dtype, from results that have a history."""
    numbers = {"generator": torch.Generator().manual_seed(4), "dtype": torch.float64}
    arriving = [torch.randn(r.shape, **numbers).to(r) for r in results]
    pairs = [(r, grad) for r, grad in zip(results, arriving, strict=True) if r.requires_grad]
    outs, given = zip(*pairs, strict=True)
    grads = torch.autograd.grad(outs, sources, given, allow_unused=True, materialize_grads=True)
    return list(grads)


def run(module: nn.Module, input, hx=None, **options) -> list[Tensor]:
    """Returns outputs, states, and the gradients of input, hx and weights."""
    sources = [*leaves(input), *leaves(hx), *module.parameters()]
    for source in sources:
        source.requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(3)  # of the dropout masks
        results = leaves(module(input, hx, **options))
    return results + gradients(results, sources)


def assert_close(got, want, tolerance: float = 1e-12) -> None:
    """Compares the tensors of two trees."""
    trees = tree_leaves(got), tree_leaves(want)
    torch.testing.assert_close(*trees, rtol=tolerance, atol=tolerance)


def assert_same(backend: str, theirs: nn.Module, ours: nn.Module, input, hx=None) -> None:
    """Compares a run: bit for bit on torch's operator, else to 1e-12 in fp64."""
    expected = run(theirs, input, hx)
    with fusedrnn.use_backend(backend):
        got = run(ours, input, hx)
    assert_close(got, expected, 0 if backend == "aten" else 1e-12)
    assert got[0].stride() == expected[0].stride()
