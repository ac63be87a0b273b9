"""``LSTM``, ``GRU``, ``RNN`` and their cells: torch's modules in names, weights, shapes and errors.

They derive from ``nn.RNNBase`` and not from ``nn.LSTM``: TorchDynamo breaks the graph at every
instance of ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``, subclasses included. Weights are read by
attribute at every call, so whatever replaces them (weight_norm, parametrize, pruning,
functional_call) takes effect.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import arguments, dispatch, functional, states
from .ops import ATEN, ATEN_CELL
from .patching import register
from .stream import Stream
from .vmap import is_transformed

_WEIGHTS = "weight_ih", "weight_hh", "bias_ih", "bias_hh"  # of a cell


def _as_leaf(module: torch.nn.Module, input: torch.fx.Proxy, *hx: Any, **options: Any) -> Any:
    """Records a call as one node of ``torch.fx.symbolic_trace``, as torch's own layers are."""
    given = {name: value for name, value in options.items() if value is not None}
    path = input.tracer.path_of_module(module)  # type: ignore[attr-defined]
    return input.tracer.create_proxy("call_module", path, (input, *hx), given)


def _warn_of_quantization(name: str) -> None:
    """Warns where torch's quantization marks a module, which it would then pass over."""
    if name == "qconfig":
        warnings.warn(
            "torch's quantization takes none of fusedrnn's modules and leaves this one as it is; "
            "to quantize it, call fusedrnn.to_torch(model) first, outside patch()",
            stacklevel=3,
        )


class _FlatWeights(list):
    """The weights of a module in torch's order; an assignment replaces one for its forward."""

    def __init__(self, module: "_Stack") -> None:
        super().__init__(module._params())
        self._module = module

    def __setitem__(self, index: Any, weight: Any) -> None:
        super().__setitem__(index, weight)
        self._module._flat_weights = self


class _Stack(torch.nn.RNNBase):
    """The common part of ``LSTM``, ``GRU`` and ``RNN``."""

    _torchs: Any  # the counterpart, as ``register`` finds it
    # Class attributes, for modules that began as torch's.
    recompute: bool = False
    _assigned: dict[str, Tensor] | None = None  # weights assigned through _flat_weights
    _run = staticmethod(functional.run)  # of a ``Stream``

    def __init__(self, mode: str, *args: Any, recompute: bool = False, **kwargs: Any) -> None:
        super().__init__(mode, *args, **kwargs)
        if mode != "LSTM" and (self.proj_size or "proj_size" in kwargs):
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if recompute:
            self.recompute = True

    @property
    def _cell(self) -> str:
        return self.mode.lower()

    def extra_repr(self) -> str:
        return super().extra_repr() + (", recompute=True" if self.recompute else "")

    def _assign(self, weights: Sequence[Tensor | None]) -> None:
        pairs = zip(self._flat_weights_names, weights, strict=True)
        assigned = {name: w for name, w in pairs if w is not getattr(self, name, None)}
        self.__dict__["_assigned"] = assigned or None

    #: The weights as they are now. RNNBase would keep a list, stale once one is replaced.
    _flat_weights: Any = property(_FlatWeights, _assign)

    def _init_flat_weights(self) -> None:
        """Forgets assignments to ``_flat_weights``, as torch rebuilds its list."""
        self.__dict__.pop("_assigned", None)
        self.flatten_parameters()

    def flatten_parameters(self) -> None:
        """Moves the Parameters into one buffer for cuDNN, which else copies them at every call.

        Torch calls it where a module is made or moved. Computed weights are left alone.
        """
        if all(name in self._parameters for name in self._flat_weights_names):
            super().flatten_parameters()

    def _update_flat_weights(self) -> None:
        """Does nothing: there is no list to update."""

    def _prepare(self, input, hx=None, *, lengths=None, reset=None) -> arguments.Call:
        sizes = self.num_layers, self.bias, self.batch_first, self.dropout, self.training
        layers = *sizes, bool(self.bidirectional), self.recompute  # quicker than ``Layers``
        return arguments.prepare(self._cell, input, hx, self._params(), layers, lengths, reset)

    def _params(self) -> list[Tensor]:
        """Returns the weights as they are now, computed ones too, in torch's order."""
        plain: dict[str, Any] = self._parameters
        plain = plain | self._assigned if self._assigned else plain
        # Module.__getattr__ is slow.
        return [plain[n] if n in plain else getattr(self, n) for n in self._flat_weights_names]

    def forward(self, input: Any, hx: Any = None, *, lengths: Any = None, reset: Any = None):
        """Runs the stack; see the class, and ``fusedrnn.lstm`` for shapes and errors."""
        if isinstance(input, torch.fx.Proxy):
            return _as_leaf(self, input, hx, lengths=lengths, reset=reset)
        is_traced = torch._C._get_tracing_state() and lengths is reset is None
        if is_traced and self._cell in ATEN and dispatch.requested_backend()[0] == "auto":
            return self._torchs.forward(self, input, hx)  # tracers know it at all sizes
        return functional.run(self._prepare(input, hx, lengths=lengths, reset=reset))

    def states(
        self, input: Any, hx: Any = None, *, lengths: Any = None, reset: Any = None,
        gates: bool = False,
    ) -> states.States:  # fmt: skip
        """Runs the stack and returns every state of every step; see ``fusedrnn.States``.

        Args:
            input, hx, lengths, reset: those of ``forward``.
            gates: whether the gates are wanted too, for two more products a layer and direction.

        Raises:
            NotImplementedError: backend ``"aten"`` was named, which keeps no state but the last.
        """
        return states.run(self._prepare(input, hx, lengths=lengths, reset=reset), gates)

    def stream(self, batch_size: int = 1, hx: Any = None) -> Stream:
        """Returns a ``Stream``, which decodes step by step and carries the state along."""
        return Stream(self, batch_size, hx)

    # RNNBase overrides the following three to keep its list of weights.

    def __setattr__(self, name: str, value: Any) -> None:
        _warn_of_quantization(name)
        super(torch.nn.RNNBase, self).__setattr__(name, value)
        if self._assigned and name in self._flat_weights_names:
            self._init_flat_weights()

    _replicate_for_data_parallel = torch.nn.Module._replicate_for_data_parallel

    def __setstate__(self, state: dict[str, Any]) -> None:
        super(torch.nn.RNNBase, self).__setstate__(state)
        # A module that was pickled as torch's and is loaded under patch() brings its list along.
        self.__dict__.pop("_flat_weights", None)
        self.__dict__.setdefault("proj_size", 0)  # since torch 1.8
        self.flatten_parameters()  # torch's modules leave a copy to cuDNN's, at every call

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state for pickle and deepcopy, which refuse tensors that have a history."""
        state = self.__dict__.copy()
        # weight_norm and pruning leave such a tensor; the next forward computes it anew.
        for name in self._flat_weights_names:
            if isinstance(state.get(name), Tensor):
                state[name] = state[name].detach()
        return state


class _ResetsGate:
    """The common part of ``GRU`` and ``GRUCell``."""

    reset_after: bool = True

    def __init__(self, *args: Any, reset_after: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reset_after = reset_after

    @property
    def _cell(self) -> str:
        return "gru" if self.reset_after else "gru_reset_before"

    def extra_repr(self) -> str:
        shown = super().extra_repr()  # type: ignore[misc]
        return shown if self.reset_after else f"{shown}, reset_after=False"


class LSTM(_Stack):
    """Drop-in for ``torch.nn.LSTM``; equations, shapes and errors are ``fusedrnn.lstm``'s.

    Args:
        input_size: I, the features of the input.
        hidden_size: H, the features of h and c.
        num_layers, bias, batch_first, dropout, bidirectional, recompute: as of ``fusedrnn.lstm``;
            recompute is keyword only.
        proj_size: P > 0 projects h to P features (Sak et al. 2014, arXiv 1402.1128).
        device, dtype: of the weights.

    Raises:
        TypeError, ValueError: as ``nn.LSTM``, for an argument of the wrong type or range.

    Inputs: ``input, hx=None, *, lengths=None, reset=None`` and outputs ``output, (h_n, c_n)`` are
    those of ``fusedrnn.lstm``. ``states`` returns every state and gate, ``stream`` decodes step by
    step.

    Example:
        >>> module = fusedrnn.LSTM(3, 4, batch_first=True)
        >>> output, (h_n, c_n) = module(torch.randn(2, 7, 3))
        >>> assert output.shape == (2, 7, 4)
        >>> assert h_n.shape == (1, 2, 4)
    """

    permute_hidden: Any = torch.nn.LSTM.permute_hidden
    check_forward_args: Any = torch.nn.LSTM.check_forward_args
    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)


class GRU(_ResetsGate, _Stack):
    """Drop-in for ``torch.nn.GRU``; equations, shapes and errors are ``fusedrnn.gru``'s.

    The arguments and errors are ``LSTM``'s, but ``proj_size`` raises ValueError.

    Args:
        reset_after: whether the reset gate applies after the recurrent product, as in torch and
            cuDNN, or before it, as in the original paper and ONNX's default. Keyword only.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("GRU", *args, **kwargs)


class RNN(_Stack):
    """Drop-in for ``torch.nn.RNN``; equations, shapes and errors are ``fusedrnn.rnn``'s.

    The arguments and errors are ``LSTM``'s, but ``proj_size`` raises ValueError, and ``recompute``
    changes nothing, since an RNN saves h alone.

    Args:
        nonlinearity: the fourth argument, ``"tanh"`` or ``"relu"``; another raises ValueError.
    """

    # torch's signature: only RNN has an argument between num_layers and bias.
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if len(args) > 3:
            nonlinearity, args = args[3], args[:3] + args[4:]
        else:
            nonlinearity = kwargs.pop("nonlinearity", "tanh")
        functional.check_nonlinearity(nonlinearity)
        super().__init__(f"RNN_{nonlinearity.upper()}", *args, **kwargs)
        self.nonlinearity = nonlinearity


class _SingleStep(torch.nn.RNNCellBase):
    """The common part of the cells, which derive from torch's."""

    _cell = "lstm"

    def __setattr__(self, name: str, value: Any) -> None:
        _warn_of_quantization(name)
        super().__setattr__(name, value)

    def _prepare(self, input: Tensor, hx: Any = None) -> arguments.Call:
        params = [getattr(self, name) for name in _WEIGHTS]
        if params[2] is params[3] is None:
            params = params[:2]
        params = [self.weight_ih.new_zeros(len(self.weight_ih)) if p is None else p for p in params]
        return arguments.prepare_cell(self._cell, input, hx, params)

    def forward(self, input: Tensor, hx: Any = None):
        """Runs one step; see the class for shapes and errors."""
        if isinstance(input, torch.fx.Proxy):
            return _as_leaf(self, input, hx)
        op, p = ATEN_CELL.get(self._cell), self._parameters
        by_aten = dispatch.requested_backend()[0] in ("auto", "aten")
        if op is None or not by_aten or is_transformed():
            _, hx = functional.run(self._prepare(input, hx))
            return hx.squeeze(0) if isinstance(hx, Tensor) else tuple(s.squeeze(0) for s in hx)
        try:
            if hx is not None and input.dim() == 2:
                return op(input, hx, *[p[name] for name in _WEIGHTS])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError):
            pass  # torch's own forward raises its own error, or reads computed weights
        return super().forward(input, hx)


class LSTMCell(_SingleStep, torch.nn.LSTMCell):
    """Drop-in for ``torch.nn.LSTMCell``: one step of ``fusedrnn.lstm``'s equations.

    The arguments are ``input_size, hidden_size, bias, device, dtype``, as of ``LSTM``. Inputs are
    ``input [B, I]`` or ``[I]`` and ``hx=(h, c)``, each ``[B, H]`` or ``[H]`` (default zeros);
    outputs the next ``(h, c)``. All of one floating dtype and device.

    Raises:
        ValueError: input or a state is neither 1-D nor 2-D.
        RuntimeError: a size, dtype or device is wrong, or hx has not two tensors.
        TypeError, AttributeError: input or hx cannot hold tensors. All as ``nn.LSTMCell``.
    """


class GRUCell(_ResetsGate, _SingleStep, torch.nn.GRUCell):  # type: ignore[override]
    """Drop-in for ``torch.nn.GRUCell``: one step of ``fusedrnn.gru``'s equations.

    The arguments, shapes and errors are ``LSTMCell``'s, but hx and the output are h alone; and
    ``reset_after``, keyword only, is ``GRU``'s.
    """


class RNNCell(_SingleStep, torch.nn.RNNCell):
    """Drop-in for ``torch.nn.RNNCell``: one step of ``fusedrnn.rnn``'s equations.

    The arguments, shapes and errors are ``LSTMCell``'s, but hx and the output are h alone. The
    fourth argument is ``nonlinearity``, ``"tanh"`` or ``"relu"``; another raises RuntimeError at
    the call, since torch's constructor lets it pass.
    """

    @property
    def _cell(self) -> str:  # type: ignore[override]
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return f"rnn_{self.nonlinearity}"


register(LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell)
