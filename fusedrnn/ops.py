"""``fusedrnn::rnn_forward`` and ``fusedrnn::rnn_backward``: a stack of layers as one operator.

They have fake kernels, so that compilers see one node with symbolic T and B, rules for
``torch.func`` (``vmap.py``), and autograd; the gradient of ``rnn_backward`` is the reference's. A
call that neither a compiler nor a mode must see skips the dispatcher.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import _VF, Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from . import stack, vmap
from .kernels.rows import Rows
from .layer import Kind
from .layout import rows_of, with_table
from .records import Sequences, StackConfig, StackGrads, StackInputs, StackOutputs
from .reference import differentiable_stack

_NAMES = ("lstm", "gru", "rnn_tanh", "rnn_relu")
#: torch's operator for each cell that it has one for: a stack, and a single step.
ATEN: dict[str, Callable] = {name: getattr(_VF, name) for name in _NAMES}
ATEN_CELL: dict[str, Callable] = {name: getattr(_VF, f"{name}_cell") for name in _NAMES}

#: The records that the operators take field by field. dropout_masks are optional because a program
#: packaged by AOTInductor has None for an empty list.
_SCHEMA = {
    StackGrads: "Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n, Tensor? d_cs",
    StackInputs: "Tensor input, Tensor h_0, Tensor? c_0, Tensor[] params, Tensor[]? dropout_masks",
    StackOutputs: (
        "Tensor? output, Tensor? h_n, Tensor? c_n, Tensor? gates, Tensor? cs, Tensor? hidden"
    ),
    Sequences: "Tensor? lengths, Tensor? reset, Tensor? batch_sizes, Tensor? table",
    StackConfig: (
        "str cell, str backend, bool has_bias, int num_layers, bool bidirectional, str precision, "
        "bool recompute"
    ),
}
_FORWARD, _BACKWARD = (StackInputs, Sequences, StackConfig), tuple(_SCHEMA)


def _records(flat: Sequence[Any], kinds: Sequence[Any]) -> list[Any]:
    """Returns the flat arguments of an operator as records of these kinds, and the rest."""
    found: list[Any] = []
    for kind in kinds:
        size = len(kind._fields)
        found.append(kind(*flat[:size]))
        flat = flat[size:]
    return [*found, *flat]


def _flat(*records: Any) -> list[Any]:
    """Reverses ``_records``: an operator takes lists, not tuples, of tensors."""
    found: list[Any] = []
    for record in records:
        found += record if isinstance(record, tuple) else (record,)
    return [list(value) if isinstance(value, tuple) else value for value in found]


torch.library.define(
    "fusedrnn::rnn_forward",
    f"({', '.join(_SCHEMA[kind] for kind in _FORWARD)}, bool save)"
    " -> (Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cs, Tensor hidden)",
)
torch.library.define(
    "fusedrnn::rnn_backward",
    f"({', '.join(_SCHEMA[kind] for kind in _BACKWARD)}, bool needs_input, bool needs_params)"
    " -> (Tensor d_input, Tensor d_h_0, Tensor d_c_0, Tensor[] d_params)",
)


def rnn_stack(
    inputs: StackInputs, sequences: Sequences, config: StackConfig,
    dtype: torch.dtype | None = None, *, keep_states: bool = False, kind: Kind | None = None,
) -> tuple[Tensor, list[Tensor], Tensor | None]:  # fmt: skip
    """Runs a stack of layers, differentiably; with ``dtype``, autocast's, in that dtype.

    It goes past the dispatcher where nothing but autograd must see the call, as one of a ``kind``.

    Returns:
        output ``[T, B, D*H]`` or packed ``[R, D*H]``; the final states, h_n and for an LSTM c_n,
        ``[L*D, B, H]`` each; and with ``keep_states`` c of every step, ``[L*D, T, B, H]``.
    """
    input, h_0, c_0, params, masks = inputs
    is_special = is_seen = False
    if kind is None:
        is_special = vmap.has_tangents() or _has_projection(inputs, config)
        is_seen = is_special or _needs_dispatcher(input)
    rows = kind and kind.rows
    if rows is None and (not is_seen or sequences.batch_sizes is not None or vmap.is_eager(input)):
        sequences = with_table(sequences, input, h_0.shape[1], config.directions)
    if not is_seen:
        rows = rows or rows_of(input, h_0.shape[1], config.directions, sequences)
        if kind.facts.needs_grad if kind else vmap.needs_grad(input, h_0, c_0, *params):
            call = _Forward(masks, sequences, config, rows, dtype, keep_states, kind)
            results = _apply(call, input, h_0, c_0, *params)
        else:
            inputs = stack.ready(inputs, config, dtype)
            results = stack.forward(inputs, rows, config, keep_states, kind=kind)
    elif is_special:
        results = _by_reference(inputs.cast(dtype), sequences, config)
    else:
        if not torch.compiler.is_compiling():
            _register_flops()
        arguments = _flat(inputs.cast(dtype), sequences, config, keep_states)
        results = torch.ops.fusedrnn.rnn_forward(*arguments)
    output, h_n, c_n, _, cs, _ = results
    if c_0 is None:
        return output, [h_n], None
    return output, [h_n, c_n], cs.unflatten(1, input.shape[:-1]) if keep_states else None


def _needs_dispatcher(*tensors: Tensor) -> bool:
    """Returns whether something that must see operators is active, such as a profiler."""
    return not all(map(vmap.is_eager, tensors)) or torch._C._autograd._profiler_enabled()


def _register_flops() -> None:
    """Gives the active FlopCounterModes formulas; to import their module would import Triton."""
    for mode in _get_current_dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", None), "flop_registry", {})
        registry[torch.ops.fusedrnn.rnn_forward] = _forward_flops
        registry[torch.ops.fusedrnn.rnn_backward] = _backward_flops


def _forward_flops(input, h_0, c_0, params, *rest, out_val=None) -> int:
    """Counts two for each row and element of a matrix, as for torch's products."""
    return 2 * math.prod(input.shape[:-1]) * sum(p.numel() for p in params if p.dim() == 2)


def _backward_flops(*flat, out_val=None) -> int:
    """Counts the products for the gradients of the rows below, of h and of the weights."""
    _, inputs, _, _, config, needs_input, needs_params = _records(flat, _BACKWARD)
    first = [w.w_ih for w in config.group(inputs.params)[0]]
    passes = 1 + needs_params + (config.recompute and config.spec.saved > 0)
    without = 0 if needs_input else _forward_flops(inputs.input, None, None, first)
    return passes * _forward_flops(*inputs) - without


def _has_projection(inputs: StackInputs, config: StackConfig) -> bool:
    """Returns whether h has fewer columns than c; torch's operator alone takes that."""
    c_0 = inputs.c_0
    return config.backend != "aten" and c_0 is not None and c_0.shape[-1] != inputs.h_0.shape[-1]


def _by_reference(inputs: StackInputs, sequences: Sequences, config: StackConfig) -> StackOutputs:
    """Runs the reference, which saves nothing."""
    input, h_0, c_0, params, masks = inputs
    given = config.cell, input, h_0, c_0, config.group(params), masks or (), sequences
    output, h_n, c_n, cs = differentiable_stack(*given)
    return StackOutputs(output, h_n, c_n, cs=None if cs is None else cs.flatten(1, -2))


class _Node(torch.autograd.Function):
    """A node of autograd around ``call.run(*tensors)``, with gradients by ``call.pull_back``.

    ``torch.library``'s own walks all arguments as trees and does not compose with ``torch.func``.
    """

    @staticmethod
    def forward(ctx, call, *tensors):
        results, kept, constant, ctx.own = call.run(*tensors)
        every = *tensors, *kept
        ctx.call, ctx.count = call, len(tensors)
        ctx.set_materialize_grads(False)
        if constant:
            ctx.mark_non_differentiable(*constant)
        # Tools that walk a graph's saved tensors expect no None.
        ctx.missing = [place for place, tensor in enumerate(every) if tensor is None]
        ctx.save_for_backward(*[tensor for tensor in every if tensor is not None])
        return results

    @staticmethod
    def backward(ctx, *grads):
        saved = list(ctx.saved_tensors)
        for place in ctx.missing:
            saved.insert(place, None)
        parts, needs = (saved[: ctx.count], saved[ctx.count :]), ctx.needs_input_grad[1:]
        return None, *ctx.call.pull_back(*parts, ctx.own, grads, needs)


#: ``_Node.apply`` without its checks for ``torch.func``, which the operators' keys take care of.
_apply = super(torch.autograd.Function, _Node).apply


def _below_autograd(op: Callable, *arguments: Any) -> Any:
    """Calls an operator past the autograd of this level of ``torch.func``, if there is one."""
    is_inner = torch._C._are_functorch_transforms_active()
    # A node runs without gradients, but the levels further out may need theirs.
    with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad() if is_inner else nullcontext():
        return op(*arguments)


class _Forward(NamedTuple):
    """A stack's forward, as ``_Node`` calls it: on real tensors or, without rows, as operator."""

    masks: Sequence[Tensor]
    sequences: Sequences
    config: StackConfig
    rows: Rows | None = None
    dtype: torch.dtype | None = None
    keep_states: bool = False
    kind: Kind | None = None

    def run(self, input, h_0, c_0, *params):
        config, own, constant = self.config, None, ()
        if self.rows is None:
            inputs = StackInputs(input, h_0, c_0, params, self.masks).cast(self.dtype)
            arguments = _flat(inputs, self.sequences, config, True)
            results = tuple(_below_autograd(torch.ops.fusedrnn.rnn_forward, *arguments))
            constant = results[3], results[5]
            output, _, _, *saved = _empty_to_none(results)
        else:
            given = input, h_0, c_0, params, self.masks
            _, h_0, c_0, params, masks = inputs = stack.ready(given, config, self.dtype)
            found = stack.forward(inputs, self.rows, config, True, kind=self.kind)
            output, h_n, c_n, *saved = found
            results = output, h_n, c_n, None, saved[1] if self.keep_states else None, None
            # The values that backward multiplies by remain those of now when p.data is replaced.
            ends = 4 if config.recompute and config.has_bias else 2
            values = [tuple([p.detach() for p in each]) for each in params[:ends]]
            own = h_0, c_0, (*values, *params[ends:]), masks
        # Else the output may be modified in place.
        output = output if config.hidden_layers < config.num_layers else None
        return results, (output, *saved), constant, own

    def pull_back(self, tensors, kept, own, grads, needs):
        """Returns the gradients of input, h_0, c_0 and params."""
        (input, h_0, c_0, *params), (output, *saved) = tensors, kept
        d_output, d_h_n, d_c_n, _, d_cs, _ = grads
        if c_0 is None:
            d_c_n = d_cs = None
        given = StackGrads(d_output, d_h_n, d_c_n, d_cs)
        present = [grad for grad in given if grad is not None]
        if not present:
            return (None,) * len(tensors)
        if vmap.has_tangents() and any(
            forward_ad.unpack_dual(d).tangent is not None for d in present
        ):
            _refuse_tangents()  # they would be lost
        run, how = stack.backward, self.rows
        if how is None or torch.is_grad_enabled() or _needs_dispatcher(*present):
            run, how = _run_backward, self.sequences
            input, *own = StackInputs(input, h_0, c_0, params, self.masks).cast(self.dtype)
        outputs, needs_params = StackOutputs(output, None, None, *saved), True in needs[3:]
        given = StackInputs(input, *own), outputs, given, how, self.config, needs[0], needs_params
        d_input, d_h_0, d_c_0, d_params = run(*given, kind=self.kind)
        d_input, d_c_0 = d_input if needs[0] else None, None if c_0 is None else d_c_0
        return d_input, d_h_0, d_c_0, *(d_params or [None] * len(params))


def _run_backward(inputs, outputs, grads, *arguments, kind=None):
    """Calls ``rnn_backward`` with the arguments of ``stack.backward``, but sequences for rows."""
    return torch.ops.fusedrnn.rnn_backward(*_flat(grads, inputs, outputs, *arguments))


def _refuse_tangents():
    raise NotImplementedError(
        "fusedrnn's operators carry no tangents; call the module itself, not what was exported "
        "or compiled from it, and call it where the tangents are, not before"
    )


def _none_to_empty(like: Tensor, tensors: Sequence[Any]) -> tuple[Any, ...]:
    """Returns the results of an operator, which has an empty tensor for each missing one."""
    return tuple(like.new_empty(0) if t is None else t for t in tensors)


def _empty_to_none(tensors: Sequence[Tensor | None]) -> StackOutputs:
    """Reverses ``_none_to_empty``: no other result is 1-D."""
    return StackOutputs(*[None if t is None or t.dim() == 1 else t for t in tensors])  # type: ignore[arg-type]


def _forward_kernel(*flat):
    """The operator on real tensors."""
    inputs, sequences, config, save = _records(flat, _FORWARD)
    input, h_0, c_0, params, _ = inputs
    if config.backend != "aten":
        rows = rows_of(input, h_0.shape[1], config.directions, sequences)
        found = stack.forward(stack.ready(inputs, config), rows, config, save)
        return _none_to_empty(input, found)
    hx = h_0.contiguous() if c_0 is None else (h_0.contiguous(), c_0.contiguous())
    flags = config.has_bias, config.num_layers, 0.0, False, config.bidirectional, False
    output, h_n, *c_n = ATEN[config.cell](input, hx, params, *flags)
    return _none_to_empty(input, StackOutputs(output, h_n, c_n[0] if c_n else None))


def _forward_autograd(*flat):
    """The operator's autograd; a program that was traced without gradients may need them here."""
    if vmap.has_tangents():
        _refuse_tangents()
    inputs, sequences, config, _ = _records(flat, _FORWARD)
    if not vmap.needs_grad(*inputs[:3], *inputs.params):
        return _below_autograd(torch.ops.fusedrnn.rnn_forward, *flat)
    config = config._replace(backend="torch") if config.backend == "aten" else config
    if _has_projection(inputs, config):
        return _none_to_empty(inputs.input, _by_reference(inputs, sequences, config))
    with enable_single_level_autograd_function():
        call = _Forward(inputs.dropout_masks, sequences, config)
        return _apply(call, *inputs[:3], *inputs.params)


@torch.library.register_fake("fusedrnn::rnn_forward")
def _forward_fake(*flat):
    inputs, _, config, save = _records(flat, _FORWARD)
    shapes = stack.shapes_of(inputs, config, save and config.backend != "aten")
    return _none_to_empty(inputs.input, stack.empty_outputs(inputs.input, shapes))


def _backward_kernel(*flat):
    """The operator on real tensors."""
    grads, inputs, outputs, sequences, config, *needs = _records(flat, _BACKWARD)
    rows = rows_of(inputs.input, inputs.h_0.shape[1], config.directions, sequences)
    inputs = stack.ready(inputs, config)
    outputs = StackOutputs(*stack.aligned(config, _empty_to_none(outputs)))
    *results, d_params = stack.backward(inputs, outputs, grads, rows, config, *needs)
    return *_none_to_empty(inputs.input, results), d_params


def _backward_autograd(*flat):
    """The operator's autograd."""
    call = _Backward(*_records(flat, _BACKWARD))
    tensors = *call.grads, *call.inputs[:3], *call.inputs.params
    if not vmap.needs_grad(*tensors):
        return _below_autograd(torch.ops.fusedrnn.rnn_backward, *flat)
    with enable_single_level_autograd_function():
        d_input, d_h_0, d_c_0, *d_params = _apply(call, *tensors)
    return d_input, d_h_0, d_c_0, d_params


class _Backward(NamedTuple):
    """A stack's backward, as ``_Node`` calls it; its derivative is the reference's."""

    grads: StackGrads
    inputs: StackInputs
    outputs: StackOutputs
    sequences: Sequences
    config: StackConfig
    needs_input: bool
    needs_params: bool

    def run(self, *tensors):
        inputs = StackInputs(*tensors[4:7], tensors[7:], self.inputs.dropout_masks)
        arguments = inputs, self.outputs, tensors[:4], *self[3:]
        *results, d_params = _below_autograd(_run_backward, *arguments)
        return (*results, *d_params), (), (), None

    def pull_back(self, tensors, kept, _, directions, needs):
        """Pulls ``directions`` back through the gradients of a stack.

        The gradients are a pullback of the stack's results, so theirs are a pullback of that one.
        What forward saved has no gradient: it is a function of the other tensors, which are
        d_output, d_h_n, d_c_n, d_cs, input, h_0, c_0 and params.
        """
        present = {i: tensor for i, tensor in enumerate(tensors) if tensor is not None}
        cotangents = {i: present.pop(i) for i in range(4) if i in present}
        directions = {i: d for i, d in enumerate(directions, 4) if d is not None and i in present}
        if not self.needs_input:
            directions.pop(4, None)
        if not directions:
            return [None] * len(tensors)

        def results(primals):
            input, h_0, *params = primals.values()
            c_0 = params.pop(0) if 6 in primals else None
            inputs = StackInputs(input, h_0, c_0, params, self.inputs.dropout_masks)
            output, h_n, c_n, _, cs, _ = _by_reference(inputs, self.sequences, self.config)
            return {i: (output, h_n, c_n, cs)[i] for i in cotangents}

        def gradients(primals, cotangents):
            (found,) = torch.func.vjp(results, primals)[1](cotangents)
            return {i: found[i] for i in directions}

        of_primals, of_cotangents = torch.func.vjp(gradients, present, cotangents)[1](directions)
        found = of_primals | of_cotangents
        return [found.get(i) for i in range(len(tensors))]


@torch.library.register_fake("fusedrnn::rnn_backward")
def _backward_fake(*flat):
    _, (input, h_0, c_0, params, _), *_, needs_input, needs_params = _records(flat, _BACKWARD)
    return (
        input.new_empty(input.shape if needs_input else 0),
        h_0.new_empty(h_0.shape),
        h_0.new_empty(0 if c_0 is None else c_0.shape),
        [p.new_empty(p.shape) for p in params] if needs_params else [],
    )


for _name, _kernel, _autograd, _rule in (
    ("fusedrnn::rnn_forward", _forward_kernel, _forward_autograd, vmap.map_forward),
    ("fusedrnn::rnn_backward", _backward_kernel, _backward_autograd, vmap.map_backward),
):
    torch.library.impl(_name, ("cpu", "cuda"), _kernel)
    torch.library.impl(_name, "Autograd", _autograd)
    torch.library.register_vmap(_name, _rule)
