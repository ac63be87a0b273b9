"""Tokens in, states out: equal to an embedding, or one-hot rows, in front of torch.nn's module."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn

T, B, V, E, H = 6, 3, 7, 4, 5
KINDS = {
    "lstm": ("LSTM", {}),
    "lstm-2-both-ways": ("LSTM", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "lstm-projected-no-bias": ("LSTM", {"proj_size": 3, "bias": False}),
    "gru-2": ("GRU", {"num_layers": 2}),
    "gru-both-ways": ("GRU", {"bidirectional": True}),
}


class Theirs(nn.Module):
    """What people write: a look-up or one-hot rows, and torch.nn's module behind it."""

    def __init__(self, kind, kwargs, one_hot, padding_idx=None):
        super().__init__()
        self.embedding = None if one_hot else nn.Embedding(V, E, padding_idx)
        self.rnn = getattr(nn, kind)(V if one_hot else E, H, **kwargs)

    def forward(self, tokens, hx=None):
        if self.embedding is None:
            return self.rnn(F.one_hot(tokens, V).to(self.rnn.weight_hh_l0.dtype), hx)
        return self.rnn(self.embedding(tokens), hx)


def pair(kind, one_hot, dtype=torch.float64, **kwargs):
    """Theirs, and ours with the same Parameters."""
    torch.manual_seed(0)
    name, options = KINDS[kind]
    theirs = Theirs(name, options, one_hot, **kwargs).to(dtype)
    return theirs, getattr(fusedrnn, f"Token{name}").of(theirs.embedding, theirs.rnn)


def tokens_of(kind):
    torch.manual_seed(1)
    batch_first = KINDS[kind][1].get("batch_first", False)
    return torch.randint(V, (B, T) if batch_first else (T, B))


def results(module, *call, **options):
    output, final = module(*call, **options)
    return [output, *(final if isinstance(final, tuple) else (final,))]


def assert_same(ours, theirs, got, want, tolerance=1e-12):
    total = [sum((r * r.detach().cos()).sum() for r in each) for each in (got, want)]
    grads = [
        torch.autograd.grad(value, list(theirs.parameters()), retain_graph=True) for value in total
    ]
    for left, right in zip((*got, *grads[0]), (*want, *grads[1]), strict=True):
        torch.testing.assert_close(left, right, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_an_embedding_in_front_of_torchs(kind, one_hot):
    theirs, ours = pair(kind, one_hot)
    tokens = tokens_of(kind)
    assert fusedrnn.explain(ours, tokens).request.projected
    assert_same(ours, theirs, results(ours, tokens), results(theirs, tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_by_torchs_operator(kind):
    """An LSTM's, which multiplies gathered rows by an identity, if that is smaller than W_ih."""
    torch.manual_seed(0)
    name, options = KINDS[kind]
    theirs = getattr(nn, name)(100, H, **options).double()
    ours = getattr(fusedrnn, f"Token{name}").of(None, theirs)
    tokens = torch.randint(100, (T, B))
    with torch.no_grad():
        said = fusedrnn.explain(ours, tokens)
        columns = sum(p.shape[0] for p in theirs.parameters() if p.shape[-1] == 100)
        by_identity = ("aten", False, columns) if name == "LSTM" else ("torch", True, columns)
        assert (said.backend, said.request.projected, said.request.input_size) == by_identity
        want = results(theirs, F.one_hot(tokens, 100).double())
        for left, right in zip(results(ours, tokens), want, strict=True):
            torch.testing.assert_close(left, right, atol=1e-12, rtol=1e-12)
        with fusedrnn.use_backend("aten"):
            for left, right in zip(results(ours, tokens), want, strict=True):
                torch.testing.assert_close(left, right, atol=1e-12, rtol=1e-12)
    _, small = pair(kind, True)
    with torch.no_grad():  # an identity would be as wide as the rows
        said = fusedrnn.explain(small, tokens_of(kind))
        assert name == "GRU" or said.request.input_size == V


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("kind", ["lstm-2-both-ways", "gru-2"])
def test_on_the_kernels(kind, one_hot):
    theirs, ours = pair(kind, one_hot, torch.float32)
    tokens = tokens_of(kind)
    with fusedrnn.use_backend("triton"), fusedrnn.use_precision("ieee"):
        got = results(ours, tokens)
        assert_same(ours, theirs, got, results(theirs, tokens), 1e-5)


def test_a_large_vocabulary_is_looked_up_token_by_token():
    """A table of V rows would cost more than T * B products."""
    theirs, ours = pair("lstm", False)
    tokens = tokens_of("lstm")[:2]
    assert not fusedrnn.explain(ours, tokens).request.projected
    assert_same(ours, theirs, results(ours, tokens), results(theirs, tokens))


@pytest.mark.parametrize("one_hot", [False, True])
def test_lengths_and_packed_tokens(one_hot):
    theirs, ours = pair("gru-2", one_hot)
    tokens, lengths = tokens_of("gru-2"), torch.tensor([6, 2, 4])
    got = results(ours, tokens, lengths=lengths)
    packed = pack_padded_sequence(tokens.unsqueeze(-1), lengths, enforce_sorted=False)
    packed = packed._replace(data=packed.data.squeeze(-1))
    output, final = ours(packed)
    padded, _ = nn.utils.rnn.pad_packed_sequence(output, total_length=T)
    torch.testing.assert_close(padded, got[0])
    for b, n in enumerate(lengths.tolist()):
        want, state = theirs(tokens[:n, b])
        torch.testing.assert_close(got[0][:n, b], want)
        torch.testing.assert_close(final[:, b], state)


def test_padding_gets_no_gradient():
    theirs, ours = pair("lstm", False, padding_idx=2)
    tokens = tokens_of("lstm")
    assert (tokens == 2).any()
    assert_same(ours, theirs, results(ours, tokens), results(theirs, tokens))
    results(ours, tokens)[0].sum().backward()
    assert not theirs.embedding.weight.grad[2].any()


def test_a_single_sequence_hx_and_int32():
    theirs, ours = pair("gru-both-ways", True)
    tokens, hx = tokens_of("gru-both-ways")[:, 0], torch.randn(2, H, dtype=torch.float64)
    got = results(ours, tokens.int(), hx)
    assert_same(ours, theirs, got, results(theirs, tokens, hx))


def test_recompute_and_states():
    theirs, ours = pair("lstm-2-both-ways", True)
    tokens = tokens_of("lstm-2-both-ways")
    ours.recompute = True
    assert_same(ours, theirs, results(ours, tokens), results(theirs, tokens))
    assert torch.equal(ours.states(tokens).output, ours(tokens)[0])


def test_compiled_and_second_derivatives():
    theirs, ours = pair("gru-2", False)
    tokens = tokens_of("gru-2")
    torch._dynamo.reset()
    got = torch.compile(ours, fullgraph=True, backend="aot_eager")(tokens)
    assert_same(ours, theirs, list(got), results(theirs, tokens))
    found = []
    for module in (ours, theirs):
        weight = theirs.rnn.weight_ih_l0
        (grad,) = torch.autograd.grad(module(tokens)[0].sum(), weight, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), list(theirs.parameters())))
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right)


def test_parameters_are_shared_and_named_as_before():
    theirs, ours = pair("lstm-2-both-ways", False)
    assert ours.embedding is theirs.embedding
    assert ours.weight_hh_l0 is theirs.rnn.weight_hh_l0
    fresh = fusedrnn.TokenLSTM(V, E, H, 2, bidirectional=True, batch_first=True).double()
    fresh.load_state_dict(ours.state_dict())
    names = {f"embedding.{n}" for n, _ in theirs.embedding.named_parameters()}
    assert set(ours.state_dict()) == names | {n for n, _ in theirs.rnn.named_parameters()}
    tokens = tokens_of("lstm-2-both-ways")
    assert torch.equal(fresh(tokens)[0], ours(tokens)[0])


def test_what_is_refused():
    module = fusedrnn.TokenGRU(V, E, H)
    with pytest.raises(ValueError, match=r"input is torch.float32; expected tokens"):
        module(torch.randn(T, B))
    with pytest.raises(ValueError, match="input is a list"):
        module([1, 2])
    with pytest.raises(IndexError):
        module(torch.full((T, B), V))
    with pytest.raises(ValueError, match="to_torch: the model has a TokenGRU"):
        fusedrnn.to_torch(nn.Sequential(module))
    with pytest.raises(NotImplementedError, match="a stream takes features"):
        module.stream()
    with pytest.raises(ValueError, match="padding_idx was given without"):
        fusedrnn.TokenLSTM(V, None, H, padding_idx=0)
    with pytest.raises(TypeError, match="expected an LSTM"):
        fusedrnn.TokenLSTM.of(None, nn.GRU(V, H))
    with pytest.raises(ValueError, match=r"the embedding has 4 features, rnn takes 7"):
        fusedrnn.TokenLSTM.of(nn.Embedding(V, E), nn.LSTM(V, H))
    with pytest.raises(ValueError, match="max_norm"):
        fusedrnn.TokenLSTM.of(nn.Embedding(V, E, max_norm=1.0), nn.LSTM(E, H))
