"""``Stream``: one step per call with the state carried along, for decoding and live data."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from . import arguments, dispatch
from .ops import ATEN_CELL


class Stream:
    """A stack that runs one step per call and carries its state; made by ``module.stream()``.

    The results are those of one call of the module over the whole sequence, without gradients and
    as in ``eval()``. Each call uses the module's present weights, after its forward pre-hooks
    (``weight_norm``, pruning); the state follows a module that is cast or moved and keeps the dtype
    of the weights. ``use_backend`` and ``torch.autocast`` apply.

    Args:
        module: a ``fusedrnn`` LSTM, GRU or RNN in one direction; ``batch_first`` has no effect.
        batch_size: B, the number of sequences.
        hx: the initial state, as for the module; None means zeros. It is copied.

    Raises:
        ValueError: the module is bidirectional, or ``batch_size`` is not a positive integer.
        RuntimeError, TypeError, AttributeError, IndexError: ``hx`` is wrong, as for the module.
    """

    _facts: arguments.Facts
    _states: list[Any]  # of each layer, as torch's operators for single steps take it

    def __init__(self, module: Any, batch_size: int = 1, hx: Any = None) -> None:
        if module.bidirectional:
            raise ValueError(
                "the module is bidirectional; a stream cannot run it, for the second direction "
                "starts at the end of the sequence"
            )
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}; expected a positive integer")
        self._module, self._shape = module, (batch_size, module.input_size)
        self._layers = arguments.Layers(module.num_layers, module.bias)
        self._set(hx)

    def __repr__(self) -> str:
        return f"Stream({self._module}, batch_size={self._shape[0]})"

    def __call__(self, input: Tensor) -> Tensor:
        """Runs one step; an exception leaves the state as it was.

        Args:
            input: ``[B, I]``, of the weights' dtype (under autocast any floating one) and device.

        Returns:
            output ``[B, H]``: h of the last layer. No later step writes into it.

        Raises:
            AttributeError, ValueError, RuntimeError: the input is wrong, as for the module.
            NotImplementedError: the requested backend does not support this call.
        """
        module = self._module
        with torch.no_grad():
            for key, hook in module._forward_pre_hooks.items():  # they may compute weights
                hook(module, (input,), *[{}] * (key in module._forward_pre_hooks_with_kwargs))
            weights, facts = module._params(), self._facts
            first = weights[0]
            autocast = arguments.autocast_dtype(first) is not None
            self._check_input(input, first, autocast)
            if facts.dtype != first.dtype or facts.device != first.device:
                self._states = tree_map(lambda s: s.to(first), self._states)
                self._facts = facts = facts._replace(dtype=first.dtype, device=first.device)
            if autocast or facts.proj_size or dispatch.decide(facts)[0] != "aten":
                given = facts.cell, input.unsqueeze(0), self.state, weights, self._layers
                output, final = module._run(arguments.prepare(*given))
                self._keep((final,) if isinstance(final, Tensor) else final, first.dtype)
                return output[0]
            # Torch's operators for single steps, which are faster.
            step, each, after = ATEN_CELL[facts.cell], len(weights) // len(self._states), []
            for layer, hx in enumerate(self._states):
                after.append(step(input, hx, *weights[layer * each : (layer + 1) * each]))
                input = after[-1][0] if isinstance(after[-1], tuple) else after[-1]
            self._states = after
            return input.clone()  # the caller may write into the output, but not into the state

    @property
    def state(self) -> Any:
        """A copy of the state after the last step, in the form of ``hx``.

        A state that is assigned is copied as well, and checked as by the module.
        """
        with torch.no_grad():
            layers = self._states
            of_each = [layers] if isinstance(layers[0], Tensor) else zip(*layers, strict=True)
            return arguments.as_hx([torch.stack(states) for states in of_each])

    @state.setter
    def state(self, hx: Any) -> None:
        if hx is None:
            raise TypeError("state is None; use reset() to start again from zeros")
        self._set(hx)

    def reset(self, rows: Tensor | None = None) -> None:
        """Sets the state of all or some sequences to zeros, without synchronisation.

        Args:
            rows: the sequences, as a bool mask ``[B]`` or int32 or int64 indices; None: all.

        Raises:
            TypeError: ``rows`` is not a tensor of bool, int32 or int64.
            ValueError: ``rows`` has another shape.
            IndexError: an index is outside the batch (on CUDA a device assertion).
        """
        B = self._shape[0]
        rows = torch.ones(B, dtype=torch.bool) if rows is None else rows
        kind = getattr(rows, "dtype", type(rows).__name__)
        if kind not in (torch.bool, torch.int32, torch.int64):
            raise TypeError(f"rows is {kind}; expected a tensor: a bool mask, or int64 indices")
        if rows.dim() != 1 or (kind == torch.bool and len(rows) != B):
            raise ValueError(f"rows has shape {list(rows.shape)}; expected [{B}] or indices")
        rows = rows.to(self._facts.device, non_blocking=True)
        if kind != torch.bool:
            rows = rows.new_zeros(B, dtype=torch.bool).index_fill(0, rows.long(), True)
        mask = rows.unsqueeze(1)  # not a product, for a state may be NaN
        self._states = tree_map(lambda s: s.masked_fill(mask, 0), self._states)

    def _set(self, hx: Any) -> None:
        """Copies a state in, after the checks of a call with zeros as its input."""
        with torch.no_grad():
            params = self._module._params()
            input = params[0].new_zeros(1, *self._shape)
            call = arguments.prepare(self._module._cell, input, hx, params, self._layers)
            self._facts = call.facts._replace(dtype=params[0].dtype, autocast=None)
            self._keep(call.states, params[0].dtype)

    def _keep(self, states: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Copies states ``[L, B, H]``; autocast may have returned its own dtype."""
        layers = zip(*[state.to(dtype, copy=True) for state in states], strict=True)
        self._states = [arguments.as_hx(states) for states in layers]

    def _check_input(self, input: Any, weight: Tensor, autocast: bool) -> None:
        """Raises for an input that no step takes, with the module's exception types."""
        if not isinstance(input, Tensor):
            raise AttributeError(f"input is a {type(input).__name__}; expected a tensor, [B, I]")
        is_dtype = input.dtype == weight.dtype or (autocast and input.is_floating_point())
        if not is_dtype or input.shape != self._shape or input.device != weight.device:
            kind = RuntimeError if is_dtype and input.dim() == 2 else ValueError
            raise kind(
                f"input is {input.dtype} {list(input.shape)} on {input.device}; expected "
                f"{weight.dtype} {list(self._shape)}, batch_size and input_size, on {weight.device}"
            )
