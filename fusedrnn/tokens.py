"""``TokenLSTM`` and ``TokenGRU``: an embedding (or one-hot rows) and a first layer in one look-up.

A token's row of the first projection depends on the token alone, so ``W_ih e`` is computed once for
each of the V tokens of the vocabulary, and T * B rows of that table are gathered instead of T * B
products with W_ih. Axes: T time, B batch, V tokens, E features of an embedding, H hidden, G gates,
D directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from . import arguments, dispatch, states, known
from .modules import GRU, LSTM

_INTEGERS = (torch.int32, torch.int64)


class _Tokens:
    """What the two modules share: tokens instead of an input, in front of ``_Stack``."""

    embedding: nn.Embedding | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int | None,
        *args: Any,
        padding_idx: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(embedding_dim or num_embeddings, *args, **kwargs)  # type: ignore[call-arg]
        self.num_embeddings = num_embeddings
        self.embedding = None
        if embedding_dim is not None:
            made: Any = {name: kwargs[name] for name in ("device", "dtype") if name in kwargs}
            self.embedding = nn.Embedding(num_embeddings, embedding_dim, padding_idx, **made)
        elif padding_idx is not None:
            raise ValueError("padding_idx was given without embedding_dim; one-hot rows have none")

    @classmethod
    def of(cls, embedding: nn.Embedding | None, rnn: nn.RNNBase) -> Any:
        """The module that computes ``rnn(embedding(tokens))`` with the same Parameters.

        Args:
            embedding: of V tokens and E features; None for one-hot rows of ``rnn.input_size``.
            rnn: an ``LSTM`` or ``GRU`` of torch's or ours with E features.

        Raises:
            TypeError: rnn is of another kind.
            ValueError: the sizes do not fit, or the embedding has ``max_norm``,
                ``scale_grad_by_freq`` or ``sparse``.
        """
        kind = "LSTM" if issubclass(cls, LSTM) else "GRU"
        if getattr(rnn, "mode", None) != kind:
            raise TypeError(f"rnn is a {type(rnn).__name__}; expected an {kind}")
        features = None if embedding is None else embedding.embedding_dim
        if features not in (None, rnn.input_size):
            raise ValueError(f"the embedding has {features} features, rnn takes {rnn.input_size}")
        for name in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(embedding, name, None):
                raise ValueError(f"the embedding has {name}, which a table of products has not")
        kwargs: dict[str, Any] = {"proj_size": rnn.proj_size} if kind == "LSTM" else {}
        if kind == "GRU":
            kwargs["reset_after"] = getattr(rnn, "reset_after", True)
        module: Any = cls(
            rnn.input_size if embedding is None else embedding.num_embeddings,
            features,
            rnn.hidden_size,
            rnn.num_layers,
            rnn.bias,
            rnn.batch_first,
            rnn.dropout,
            bool(rnn.bidirectional),
            padding_idx=None if embedding is None else embedding.padding_idx,
            recompute=getattr(rnn, "recompute", False),
            device="meta",
            **kwargs,
        )
        for name, parameter in rnn.named_parameters(recurse=False):
            setattr(module, name, parameter)
        module.embedding = embedding
        return module.train(rnn.training)

    def _prepare(
        self: Any,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
        embedded: bool = False,
    ) -> arguments.Call:
        rows, params, layers = self._rows(input, embedded)
        return arguments.prepare(self._cell, rows, hx, params, layers, lengths, reset)

    def _rows(self: Any, input: Any, embedded: bool = False) -> tuple[Any, list[Tensor], Any]:
        """What the layers are given, and their weights: features, or rows of a table.

        embedded: features in any case.
        """
        tokens = input.data if isinstance(input, PackedSequence) else input
        if not isinstance(tokens, Tensor) or tokens.dtype not in _INTEGERS:
            kind = tokens.dtype if isinstance(tokens, Tensor) else f"a {type(tokens).__name__}"
            raise ValueError(f"input is {kind}; expected tokens, a tensor of int64 or int32")
        params, layers = self._params(), self._layers()
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        by_identity = dispatch.prefers_identity(self._cell, tokens.device, trains)
        gathers = not (embedded or self.recompute) and dispatch.prefers_table(
            self.num_embeddings,
            None if self.embedding is None else self.input_size,
            tokens.numel(),
            len(params[0]) * (1 + bool(self.bidirectional)),
            by_identity,
        )
        if gathers:
            rows, params = self._gathered(tokens, params, by_identity)
            layers = layers._replace(projected=not by_identity)
        elif self.embedding is None:
            rows = F.one_hot(tokens.long(), self.num_embeddings).to(params[0].dtype)
        else:
            rows = self.embedding(tokens)
        if isinstance(input, PackedSequence):
            rows = PackedSequence(rows, *input[1:])
        return rows, params, layers

    def _gathered(
        self: Any, tokens: Tensor, params: list[Tensor], by_identity: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """``W_ih e`` of each token, ``[..., D*G*H]``, and the weights without the first W_ih, or
        with an identity in its place."""
        directions, params = 1 + bool(self.bidirectional), list(params)
        each = len(params) // (directions * self.num_layers)
        first = [params[d * each] for d in range(directions)]
        weights = torch.cat(first) if directions == 2 else first[0]
        if self.embedding is None:
            # W_ih's own columns as rows: a look-up of columns takes six times as long.
            table = weights.t().contiguous()
        else:
            every = torch.arange(self.num_embeddings, device=tokens.device)
            table = self.embedding(every) @ weights.t()
        parts: Any = [w[:, :0] for w in first]
        if by_identity:
            identity = torch.eye(len(weights), dtype=table.dtype, device=table.device)
            parts = identity.chunk(directions)
        for d, part in enumerate(parts):
            params[d * each] = part
        return F.embedding(tokens, table), params

    def forward(self: Any, input: Any, hx: Any = None, **options: Any):
        """Runs the stack on tokens; see the class."""
        rows, params, layers = self._rows(input)
        return known.run_module(self._cell, rows, hx, params, layers, **options)

    def states(self: Any, input: Any, hx: Any = None, *, gates: bool = False, **options: Any):
        """As ``LSTM.states``, of tokens."""
        call = self._prepare(input, hx, embedded=True, **options)
        return states.run(call, gates)

    def stream(self, batch_size: int = 1, hx: Any = None) -> Any:
        """Refused: a stream takes the embedding's rows.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "a stream takes features, not tokens: stream an LSTM or GRU behind the embedding"
        )


class TokenLSTM(_Tokens, LSTM):
    """``LSTM(E, H)(Embedding(V, E)(tokens))`` in one module, or of one-hot rows ``LSTM(V, H)``.

    The look-up and the first layer's product with ``W_ih`` become one look-up in a table of
    ``W_ih e`` wherever that is less work: for one-hot rows always, else if the call has more tokens
    than the vocabulary. The parameters are those of the two modules, ``embedding.weight [V, E]``
    and the LSTM's, and get their exact gradients.

    Args:
        num_embeddings: V, the size of the vocabulary.
        embedding_dim: E, or None for one-hot rows.
        hidden_size: H. This and all that follows are ``LSTM``'s arguments.
        padding_idx: a token whose embedding is 0 and gets no gradient; keyword only.

    Inputs: ``tokens`` int64 or int32 ``[T, B]``, ``[B, T]`` if ``batch_first``, ``[T]`` without a
    batch, or a PackedSequence of them; the rest and the outputs are ``LSTM``'s. ``of(embedding,
    lstm)`` takes over the Parameters of modules that exist. ``stream`` is refused.

    Raises:
        ValueError: the input holds no integers; as ``LSTM``.
        IndexError: a token is not in the vocabulary (on a GPU: a device assertion, as in torch).

    Example:
        >>> module = fusedrnn.TokenLSTM(1000, 64, 128, batch_first=True)
        >>> output, (h_n, c_n) = module(torch.randint(1000, (32, 80)))
        >>> assert output.shape == (32, 80, 128)
    """


class TokenGRU(_Tokens, GRU):
    """``GRU(E, H)(Embedding(V, E)(tokens))`` in one module; see ``TokenLSTM``."""
