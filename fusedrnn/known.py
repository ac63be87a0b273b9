"""Calls like an earlier one: without its checks, and with the choice that was made for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch, functional
from .arguments import Call, Layers, as_hx, prepare
from .kernels.spec import SPECS
from .launches import Config
from .layout import Ragged
from .ops import ATEN
from .requested import requested_name
from .threads import alone
from .transforms import are_operators_watched, is_transformed, rnn_stack, run_eagerly


def run_module(
    cell: str,
    input: Any,
    hx: Any,
    params: Sequence[Tensor],
    layers: Layers,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
) -> Any:
    """What the modules call: a call like an earlier one without its checks, else ``run``."""
    key = None
    if lengths is None and reset is None:
        result, key = run_known(cell, input, hx, params, layers)
        if result is not None:
            return result
    call = prepare(cell, input, hx, params, layers, lengths, reset)
    result = functional.run(call)
    remember(key, call, hx)
    return result


_PLAIN = (Tensor, torch.nn.Parameter)


class _Known(NamedTuple):
    """What a call came to."""

    config: Config | None  # how our operator runs it, or None: torch's takes it just as it came
    shapes: list[torch.Size]  # of all params
    states: list[torch.Size]  # of h_0 and, if there is one, c_0
    alone: bool  # whether torch's operator multiplies in one thread

    def zeros(self, like: Tensor) -> Sequence[Tensor]:
        """The states of a call that brings none."""
        h_0 = like.new_zeros(*self.states[0])
        if len(self.states) == 1:
            return (h_0,)
        # Nobody writes to them.
        return h_0, h_0 if self.states[1] == self.states[0] else like.new_zeros(*self.states[1])


_DENSE = Ragged()
#: By all that the choice depends on.
_KNOWN: dict[tuple, _Known] = {}


def run_known(
    cell: str, input: Any, hx: Any, params: Sequence[Tensor], layers: Layers
) -> tuple[Any, tuple | None]:
    """What a call like an earlier one gives, and the key by which the next is known.

    Checks and choice of such a call are remembered: in the smallest they take as long as torch's
    operator (30 of 100 us with T = 4, B = 2, H = 5). What is done here instead must take no longer
    than what ``nn.LSTM`` does before its operator, about 6 us. Returns None for the result of any
    other call, and None for the key of one that may not be remembered.
    """
    if (
        type(input) is not Tensor
        or input.dim() != 3
        or input.is_nested
        or input.is_meta
        or torch.compiler.is_compiling()
        or torch._C._is_any_autocast_enabled()
        or is_transformed()
    ):
        return None, None
    states: Sequence[Tensor] = ()
    if hx is not None:
        if isinstance(hx, Tensor) if SPECS[cell].states == 2 else not isinstance(hx, Tensor):
            return None, None  # the checks have the sentence
        states = (hx,) if isinstance(hx, Tensor) else hx
        if not isinstance(states, (tuple, list)):
            return None, None
    dtype, device, first, second = input.dtype, input.device, params[0], params[1]
    if states and not _are_plain(states, dtype, device):
        return None, None
    grad = torch.is_grad_enabled() and (
        first.requires_grad or any(t.requires_grad for t in (input, *params, *states))
    )
    requested = requested_name()
    precision = dispatch.precision() if requested == "triton" or input.is_cuda else None
    shapes = input.shape, first.shape, second.shape, *[state.shape for state in states]
    key = cell, layers, shapes, dtype, device, grad, input.requires_grad, requested, precision
    known = _KNOWN.get(key)
    by_torch = known is None or known.config is None
    # Torch's operator looks at all weights, the kernels would read past their ends.
    if not _are_plain((first,) if by_torch else params, dtype, device):
        return None, None
    if known is None:
        return None, key
    if not states:
        states = known.zeros(input)
    if known.config is None:
        try:
            with alone(known.alone):
                output, *final = ATEN[cell](
                    input, as_hx(states), params, *functional.for_aten(layers)
                )
        except RuntimeError:
            return None, None  # weights unlike the first, say: the checks have the sentence
        return (output, as_hx(final)), key
    if [p.shape for p in params] != known.shapes:
        return None, None
    rows = input.transpose(0, 1) if layers.batch_first else input
    masks = functional.dropout_masks(rows, second.shape[1], layers)
    if are_operators_watched():  # the input is a plain one, and nothing compiles
        output, final, _ = rnn_stack(rows, states, params, masks, _DENSE, known.config)
    else:
        c_0 = states[1] if len(states) == 2 else None
        results = run_eagerly(rows, states[0], c_0, params, masks, _DENSE, known.config, grad, grad)
        output, *final = results[: 1 + len(states)]
    return (output.transpose(0, 1) if layers.batch_first else output, as_hx(final)), key


def _are_plain(tensors: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> bool:
    for t in tensors:
        if type(t) not in _PLAIN or t.dtype is not dtype or t.device != device:
            return False
    return True


def remember(key: tuple | None, call: Call, hx: Any) -> None:
    """What a call with this key came to, if its states were as the backends take them."""
    given = () if hx is None else (hx,) if isinstance(hx, Tensor) else hx
    whole = all(g.shape == state.shape for g, state in zip(given, call.states, strict=False))
    if key is None or not whole:
        return
    if len(_KNOWN) >= 4096:  # lengths without end
        _KNOWN.clear()
    backend = dispatch.choose(call.request)
    config = None if backend == "aten" else functional.config_of(call, backend)
    shapes = [p.shape for p in call.params], [state.shape for state in call.states]
    _KNOWN[key] = _Known(config, *shapes, functional.is_small(call))
