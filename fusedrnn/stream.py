"""``Stream``: one step per call with the state carried along, for decoding and live data."""

from typing import Any

import torch
from torch import Tensor

from . import arguments, dispatch
from .ops import ATEN_CELL

_States = list[list[Tensor]]  # of h and, in an LSTM, of c: for each layer [B, H]


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
    _states: _States

    def __init__(self, module: Any, batch_size: int = 1, hx: Any = None) -> None:
        if module.bidirectional:
            raise ValueError(
                "the module is bidirectional; a stream cannot run it, for the second direction "
                "starts at the end of the sequence"
            )
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}; expected a positive integer")
        self._module = module
        self._shape = (batch_size, module.input_size)
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
        with torch.no_grad():
            weights = self._weights(input)
            first, held = weights[0], self._states[0][0]
            autocast = first.device.type != "meta" and torch.is_autocast_enabled(first.device.type)
            self._check_input(input, first, autocast)
            if held.dtype != first.dtype or held.device != first.device:
                self._states = [[s.to(first) for s in layers] for layers in self._states]
                self._facts = self._facts._replace(dtype=first.dtype, device=first.device)
            needs_stack = autocast or self._facts.proj_size
            if needs_stack or dispatch.decide(self._facts)[0] != "aten":
                return self._by_stack(input, weights)
            return self._by_cells(input, weights)

    @property
    def state(self) -> Any:
        """A copy of the state after the last step, in the form of ``hx``.

        A state that is assigned is copied as well, and checked as by the module.
        """
        with torch.no_grad():
            return arguments.as_hx([torch.stack(layers) for layers in self._states])

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
        rows = rows.to(self._states[0][0].device, non_blocking=True)
        if kind != torch.bool:
            rows = rows.new_zeros(B, dtype=torch.bool).index_fill(0, rows.long(), True)
        # In the place of NaN too.
        mask = rows.unsqueeze(1)
        self._states = [[s.masked_fill(mask, 0) for s in layers] for layers in self._states]

    def _set(self, hx: Any) -> None:
        """Copies a state in, after the module's own checks beside an input that is right."""
        module, (batch, features) = self._module, self._shape
        size = (batch, 1, features) if module.batch_first else (1, batch, features)
        with torch.no_grad():
            call = module._prepare(module._params()[0].new_zeros(size), hx)
            self._facts = call.facts._replace(autocast=None)
            self._states = [list(state.clone().unbind(0)) for state in call.states]

    def _weights(self, input: Any) -> list[Tensor]:
        """Returns the present weights, after the hooks that may compute them."""
        module = self._module
        for key, hook in module._forward_pre_hooks.items():
            with_kwargs = key in module._forward_pre_hooks_with_kwargs
            hook(module, (input,), *([{}] if with_kwargs else []))
        return module._params()

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

    def _by_cells(self, input: Tensor, weights: list[Tensor]) -> Tensor:
        """Runs the layers one by one with torch's operators for single steps, which are faster."""
        step, each, after = ATEN_CELL[self._facts.cell], len(weights) // len(self._states[0]), []
        for layer, hx in enumerate(zip(*self._states, strict=True)):
            own = weights[layer * each : (layer + 1) * each]
            result = step(input, hx if len(hx) == 2 else hx[0], *own)
            after.append(result if isinstance(result, tuple) else (result,))
            input = after[-1][0]
        self._states = [list(layers) for layers in zip(*after, strict=True)]
        return input.clone()  # the caller may write into the output, but not into the state

    def _by_stack(self, input: Tensor, weights: list[Tensor]) -> Tensor:
        """Runs a sequence of one step."""
        hx = arguments.as_hx([torch.stack(layers) for layers in self._states])
        output, final = self._module._run(
            self._facts.cell, input.unsqueeze(0), hx, weights, self._layers
        )
        # Autocast returns its own dtype; the state keeps that of the weights.
        finals = (final,) if isinstance(final, Tensor) else final
        self._states = [list(s.to(weights[0].dtype).unbind(0)) for s in finals]
        return output[0]
