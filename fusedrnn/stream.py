"""``Stream``: one step at a time with the state carried along, for decoding and live data.

A call of a module with T = 1 spends most of its time around the arithmetic: checks, the choice of
a backend, and for an LSTM on the CPU the way through oneDNN, which is made for many steps (measured
on one or two cores, one sequence, two layers of H = 512: 2 to 9 ms a step, 0.5 to 0.8 without). A
stream checks and chooses once and then runs the leanest operators that compute the same step. On
CUDA it replays one captured graph. Axes: B batch, I input size, H hidden size, L layers, P the
columns of h: proj_size or H.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import _VF, Tensor

from . import arguments, dispatch, functional
from .kernels.spec import Weights
from .launches import Config, group_weights
from .reference import differentiable_stack, one_step
from .requested import LOOPS, requested_name

#: torch's operators for a single step. They take weights as they lie, and are 1.1 to 10 times as
#: fast as its operators for a stack with T = 1.
_SINGLE_STEP: dict[str, Callable] = {
    "lstm": _VF.lstm_cell,
    "gru": _VF.gru_cell,
    "rnn_tanh": _VF.rnn_tanh_cell,
    "rnn_relu": _VF.rnn_relu_cell,
}
#: Beyond it oneDNN's fused LSTM earns what it costs to get there: over H = 128 to 512 and B = 128
#: to 1024 the single-step operator takes up to 30% longer; up to B = 64 it is as fast or faster (at
#: worst 4% slower). fp64 has no oneDNN.
_LARGEST_SINGLE_STEP_BATCH = 64

_States = list[list[Tensor]]  # of h and, in an LSTM, of c: for each layer [B, P] or [B, H]


class Stream:
    """A stack that runs one step a call and carries its state; made by ``module.stream()``.

    The results are those of one call of the module over the whole sequence. Calls run without
    gradients and as in ``eval()``: there is no dropout, whatever ``module.training`` says. Weights
    are the module's at each call, so an optimizer's step, ``load_state_dict`` and a replaced
    Parameter are seen; when the module is cast or moved, the state follows at the next call. The
    module's forward pre-hooks run before a step with the input ``[B, I]`` (``weight_norm`` and
    pruning compute their weights in one), and what they return is ignored; forward hooks do not
    run. ``use_backend``, ``FUSEDRNN_BACKEND`` and ``torch.autocast`` apply to each call; the state
    keeps the dtype of the weights under autocast too.

    On CUDA a step is captured into a CUDA graph and replayed; see ``_Replay``, also for when it is
    captured anew. **That part has not been run on a GPU yet.** Modules whose weights are computed
    at each call (``weight_norm``, ``parametrize``, pruning) run there without a graph.

    Args:
        module: a ``fusedrnn`` LSTM, GRU or RNN in one direction. ``batch_first`` means nothing.
        batch_size: B, the sequences that run side by side.
        hx: the state to start from, ``(h_0, c_0)`` or ``h_0``, each ``[L, B, H]`` (h_0 of an LSTM
            with a projection ``[L, B, P]``), or ``[L, 1, H]`` for all sequences alike; None means
            zeros. It is copied.

    Raises:
        ValueError: the module is bidirectional, or ``batch_size`` is no positive integer.
        RuntimeError, TypeError, AttributeError, IndexError: hx is wrong, as the module itself
            raises.

    Example:
        >>> module = fusedrnn.LSTM(3, 4)
        >>> stream = module.stream(batch_size=2)
        >>> sequence = torch.randn(7, 2, 3)
        >>> outputs = torch.stack([stream(input) for input in sequence])
        >>> torch.testing.assert_close(outputs, module(sequence)[0].detach())
    """

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
        self._names: list[str] = list(module._flat_weights_names)
        self._chosen: dict[tuple, str] = {}
        self._replay: _Replay | None = None
        self._states: _States = []
        call = self._checked(hx)
        self._request = call.request
        self._place(call.params[0], call.states)

    def __repr__(self) -> str:
        return f"Stream({self._module}, batch_size={self._shape[0]})"

    def __call__(self, input: Tensor) -> Tensor:
        """Runs one step.

        Args:
            input: ``[B, I]``, of the weights' dtype (under autocast any floating one) and device.

        Returns:
            output ``[B, P]``: h of the last layer. It is the caller's own: no later step writes
            into it, at the price of at most one copy of ``[B, P]`` (1.7 us on the CPU for B = 1).

        Raises:
            AttributeError: the input is no tensor.
            ValueError: its ndim or dtype is wrong.
            RuntimeError: its features, batch or device are wrong.
            NotImplementedError: a backend was named that does not take this call.

        After an exception the state is what it was.
        """
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._advance(input)
        return self._advance(input)

    @property
    def state(self) -> Any:
        """The state after the last step in the form of hx; a copy, which is the caller's to keep.

        Setting it copies a state of the same form in, and raises as the module for another shape,
        dtype, device or type; the state is then what it was.
        """
        with torch.no_grad():
            return arguments.as_hx([torch.stack(layers) for layers in self._states])

    @state.setter
    def state(self, hx: Any) -> None:
        if hx is None:
            raise TypeError("state is None; use reset() to start again from zeros")
        call = self._checked(hx)
        self._place(call.params[0], call.states)

    def reset(self, rows: Tensor | None = None) -> None:
        """Sets the state of all or some sequences to zeros; the host waits for no device.

        Args:
            rows: which: a bool mask ``[B]``, or an integer tensor of indices ``[n]`` (one outside
                the batch is torch's IndexError on the CPU, a device assertion on CUDA). On the
                state's device; from elsewhere it is copied there first. None means all.

        Raises:
            TypeError: rows is no tensor of bool, int32 or int64.
            ValueError: rows has another shape.
        """
        if rows is not None:
            self._check_rows(rows)
            rows = rows.to(self._states[0][0].device, non_blocking=True)
        with torch.no_grad():
            self._store([[_zeroed(s, rows) for s in layers] for layers in self._states])

    def _check_rows(self, rows: Any) -> None:
        allowed = (torch.bool, torch.int32, torch.int64)
        if not isinstance(rows, Tensor) or rows.dtype not in allowed:
            kind = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
            raise TypeError(f"rows is {kind}; expected a tensor: a bool mask, or int64 indices")
        masks = rows.dtype == torch.bool
        if rows.dim() != 1 or (masks and len(rows) != self._shape[0]):
            expected = f"[{self._shape[0]}], the batch_size" if masks else "1-D indices"
            raise ValueError(f"rows has shape {list(rows.shape)}; expected {expected}")

    def _checked(self, hx: Any) -> arguments.Call:
        """hx as the module itself checks it, beside an input that is right."""
        module = self._module
        weight = getattr(module, self._names[0])
        batch, features = self._shape
        size = (batch, 1, features) if module.batch_first else (1, batch, features)
        with torch.no_grad():
            return module._prepare(weight.new_zeros(size), hx)

    def _place(self, weight: Tensor, states: Sequence[Sequence[Tensor] | Tensor]) -> None:
        """Copies states, by layer, to where ``weight`` lies; into the buffers where there are."""
        with torch.inference_mode(False), torch.no_grad():
            fresh: _States = [
                [torch.empty_like(s, dtype=weight.dtype, device=weight.device) for s in layers]
                for layers in states
            ]
            old = self._states[0][0] if self._states else None
            if old is None or old.dtype != weight.dtype or old.device != weight.device:
                self._replay = None
                if _captures(weight.device):
                    self._replay = _Replay(fresh)
            elif self._replay is not None:
                fresh = self._states
            for targets, sources in zip(fresh, states, strict=True):
                for target, source in zip(targets, sources, strict=True):
                    target.copy_(source)
            self._states = fresh

    def _store(self, states: _States) -> None:
        """The state after a step: in the same buffers where a graph reads them."""
        if self._replay is None:
            self._states = states
        else:
            self._replay.store(states)

    def _weights(self, input: Any) -> tuple[list[Tensor], bool]:
        """The weights as they are now, and whether they all are plain Parameters."""
        module = self._module
        for key, hook in module._forward_pre_hooks.items():
            if key in module._forward_pre_hooks_with_kwargs:
                hook(module, (input,), {})
            else:
                hook(module, (input,))
        # Module.__getattr__ for each of eight weights is 3.3 us, this 0.4.
        own = module._parameters
        try:
            return [own[name] for name in self._names], True
        except KeyError:
            return [getattr(module, name) for name in self._names], False

    def _advance(self, input: Tensor) -> Tensor:
        weights, plain = self._weights(input)
        first = weights[0]
        dtype, device = first.dtype, first.device
        autocast = _autocasts(device)
        if (
            not isinstance(input, Tensor)
            or input.shape != self._shape
            or input.dtype is not dtype
            or input.device != device
        ):
            self._check_input(input, first, autocast)
        held = self._states[0][0]
        if held.dtype is not dtype or held.device != device:
            self._place(first, self._states)
        replay = self._replay
        if replay is None or not plain or _is_capturing():
            output, states = self._step(input, weights, autocast)
            if output is states[0][-1]:
                # Without a copy, a caller who writes into the output would write into the state.
                output = output.clone()
            self._store(states)
            return output
        key = self._graph_key(input, weights, autocast)
        return replay(input, key, lambda buffer: self._step(buffer, weights, autocast))

    def _check_input(self, input: Any, weight: Tensor, autocast: bool) -> None:
        """Raises for what no step can take; in the module's own exception types."""
        if not isinstance(input, Tensor):
            raise AttributeError(f"input is a {type(input).__name__}; expected a tensor, [B, I]")
        if input.dim() != 2:
            raise ValueError(f"input is {input.dim()}-D; expected 2-D, one step [B, I]")
        if input.dtype != weight.dtype and not (autocast and input.is_floating_point()):
            raise ValueError(
                f"input is {input.dtype}, the weights are {weight.dtype}; convert one with .to()"
            )
        batch, features = self._shape
        if input.shape[1] != features:
            raise RuntimeError(
                f"input has {input.shape[1]} features in its last dimension; expected input_size, "
                f"{features}"
            )
        if input.shape[0] != batch:
            raise RuntimeError(
                f"input has a batch of {input.shape[0]}; expected {batch}, the stream's batch_size"
            )
        if input.device != weight.device:
            raise RuntimeError(
                f"input is on {input.device}; expected {weight.device}, the weights'"
            )

    def _step(self, input: Tensor, weights: list[Tensor], autocast: bool) -> tuple[Tensor, _States]:
        """The output ``[B, P]`` and the states after one step; nothing is written."""
        request, states = self._request, self._states
        if not autocast:
            backend = self._backend(weights[0])
            captured = self._replay is not None
            if backend == "aten" and not (
                request.cell == "lstm"
                and not captured  # cuDNN would gather the weights into its own buffer at each step
                and not request.proj_size  # which oneDNN does not take
                and request.batch > _LARGEST_SINGLE_STEP_BATCH
                and weights[0].dtype != torch.float64
            ):
                return _cell_by_cell(request.cell, input, states, weights, self._module.bias)
            if backend in LOOPS and not captured:
                return _by_reference(request.cell, input, states, weights, self._module.bias)
        options = arguments.Layers(request.num_layers, self._module.bias)
        hx = arguments.as_hx([_stacked(layers) for layers in states])
        call = arguments.prepare(request.cell, input.unsqueeze(0), hx, weights, options)
        output, final = functional.run(call)
        # Autocast hands back its own dtype; in the weights' the state loses nothing.
        dtype = weights[0].dtype
        finals = (final,) if isinstance(final, Tensor) else final
        return output[0], [list(s.to(dtype).unbind(0)) for s in finals]

    def _backend(self, weight: Tensor) -> str:
        """The backend of a step without autocast; chosen once for each answer it depends on."""
        requested = requested_name()
        precision = None if self._replay is None else dispatch.precision()
        key = (requested, precision, weight.dtype, weight.device)
        backend = self._chosen.get(key)
        if backend is None:
            request = self._request._replace(
                dtype=weight.dtype, device=weight.device, autocast=None, needs_grad=False
            )
            backend = self._chosen[key] = dispatch.choose(request)
        return backend

    def _graph_key(self, input: Tensor, weights: list[Tensor], autocast: bool) -> tuple:
        """All that a captured step has baked in."""
        return (
            requested_name(),
            dispatch.precision(),
            torch.get_autocast_dtype(input.device.type) if autocast else None,
            input.dtype,
            *((w.data_ptr(), w.stride()) for w in weights),
        )


class _Replay:
    """One step as a CUDA graph. **It has not been run on a GPU yet**, only with a stand-in.

    A step is a few short kernels, and launching them from Python takes longer than running them;
    a graph is one launch. It reads and writes fixed addresses: the buffers of input and state
    live as long as this object, and a call costs two copies beside the replay, of the input
    ``[B, I]`` into its buffer and of the output ``[B, P]`` out of its.

    A step is captured anew when a weight lies elsewhere (a Parameter was replaced; values changed
    in place need nothing), or its strides, the input's dtype, the requested backend, the precision
    of fp32 or autocast's dtype are others. A capture waits for the device and takes four steps
    from Python. torch's switch for fp32 matrix products is baked in unnoticed.

    Args:
        states: the buffers of the state, for h and c by layer.
    """

    #: torch's documentation demands some: allocations and compilations must not fall into capture.
    WARM_UP_STEPS = 3

    def __init__(self, states: _States) -> None:
        self.states = states
        self.input: Tensor | None = None
        self.output: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._key: tuple | None = None

    def __call__(
        self, input: Tensor, key: tuple, step: Callable[[Tensor], tuple[Tensor, _States]]
    ) -> Tensor:
        """Runs ``step`` on the input, by a capture of it under the same key if there is one."""
        if key != self._key:
            self._capture(input, step)
            self._key = key
        assert self.input is not None
        assert self.output is not None
        assert self._graph is not None
        self.input.copy_(input)
        self._graph.replay()
        return self.output.clone()

    def store(self, states: _States) -> None:
        """Copies states into the buffers."""
        for buffers, sources in zip(self.states, states, strict=True):
            for buffer, source in zip(buffers, sources, strict=True):
                buffer.copy_(source)

    def _capture(self, input: Tensor, step: Callable[[Tensor], tuple[Tensor, _States]]) -> None:
        """Captures ``step`` and the writing of its states; the state is none the later for it.

        A capture that fails leaves no graph behind, and the next call tries again.
        """
        self._key = self._graph = self.output = None
        kind = input.device.type
        # A graph outlives inference mode and the block of autocast that it is captured in: its
        # tensors must be ordinary ones, and no weight may come from autocast's cache.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(input.device):
            if self.input is None or self.input.dtype != input.dtype:
                self.input = torch.empty_like(input, memory_format=torch.contiguous_format)
            self.input.copy_(input)
            cast = torch.autocast(
                kind,
                dtype=torch.get_autocast_dtype(kind),
                enabled=torch.is_autocast_enabled(kind),
                cache_enabled=False,
            )
            graph = torch.cuda.CUDAGraph()
            side = torch.cuda.Stream(input.device)
            side.wait_stream(torch.cuda.current_stream())
            with cast:
                with torch.cuda.stream(side):
                    for _ in range(self.WARM_UP_STEPS):
                        step(self.input)
                torch.cuda.current_stream().wait_stream(side)
                # On a stream of this device: the default one is the first capture's, on any
                # device. thread_local: what other threads do meanwhile breaks no capture.
                with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                    self.output, states = step(self.input)
                    self.store(states)
            self._graph = graph


def _cell_by_cell(
    cell: str, input: Tensor, states: _States, weights: list[Tensor], bias: bool
) -> tuple[Tensor, _States]:
    """A step of all layers by torch's single-step operators."""
    each = len(weights) // len(states[0])
    step, hs = _SINGLE_STEP[cell], []
    if cell != "lstm":
        for layer, h in enumerate(states[0]):
            input = step(input, h, *weights[layer * each : (layer + 1) * each])
            hs.append(input)
        return input, [hs]
    if each != (4 if bias else 2):
        step = _projected_lstm_cell
    cs = []
    for layer, hx in enumerate(zip(*states, strict=True)):
        input, c = step(input, hx, *weights[layer * each : (layer + 1) * each])
        hs.append(input)
        cs.append(c)
    return input, [hs, cs]


def _projected_lstm_cell(
    input: Tensor, hx: tuple[Tensor, Tensor], w_ih: Tensor, w_hh: Tensor, *rest: Tensor
) -> tuple[Tensor, Tensor]:
    """``lstm_cell`` with ``weight_hr [P, H]`` as the last weight, which torch has no operator for.

    The equations one by one take 33 us for H = 64; torch's operator for a stack takes 37.
    """
    *biases, w_hr = rest
    b_ih, b_hh = biases or (None, None)
    return one_step("lstm", input, *hx, Weights(w_ih, w_hh, b_ih, b_hh, w_hr))


def _by_reference(
    cell: str, input: Tensor, states: _States, weights: list[Tensor], bias: bool
) -> tuple[Tensor, _States]:
    """A step of the reference, past its operator, which takes twice as long for T = 1."""
    config = Config(cell, "torch", bias, len(states[0]), False, "ieee")
    h_0, *c_0 = (_stacked(layers) for layers in states)
    output, *finals = differentiable_stack(
        cell,
        input.unsqueeze(0),
        h_0,
        c_0[0] if c_0 else None,
        group_weights(weights, config),
        (),
    )[:3]
    return output[0], [list(s.unbind(0)) for s in finals if s is not None]


def _stacked(layers: list[Tensor]) -> Tensor:
    """``[L, B, H]``, to be read only: of one layer it is a view."""
    return layers[0].unsqueeze(0) if len(layers) == 1 else torch.stack(layers)


def _zeroed(state: Tensor, rows: Tensor | None) -> Tensor:
    """The state ``[B, H]`` with zeros in some rows; a new tensor. NaN becomes 0 as well."""
    if rows is None:
        return torch.zeros_like(state)
    if rows.dtype == torch.bool:
        return state.masked_fill(rows.unsqueeze(1), 0)
    return state.index_fill(0, rows.long(), 0)


def _captures(device: torch.device) -> bool:
    """Whether steps on this device are captured into a graph."""
    return device.type == "cuda"


def _is_capturing() -> bool:
    """Whether a graph of the caller's is being captured: then a step becomes a part of that."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _autocasts(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)
