"""``fusedrnn::rnn_forward`` and ``fusedrnn::rnn_backward``: a stack of layers as one operator.

They have fake kernels, so that compilers see one node with symbolic T and B, rules for
``torch.func`` (``vmap.py``), and autograd; the gradient of ``rnn_backward`` is the reference's. A
call that neither a compiler nor a mode must see skips the dispatcher.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import _VF, Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from . import stack, vmap
from .layout import with_table
from .records import Sequences, StackConfig, StackGrads, StackInputs, StackOutputs
from .reference import differentiable_stack

_NAMES = ("lstm", "gru", "rnn_tanh", "rnn_relu")
#: torch's operator for each cell that it has one for: a stack, and a single step.
ATEN: dict[str, Callable] = {name: getattr(_VF, name) for name in _NAMES}
ATEN_CELL: dict[str, Callable] = {name: getattr(_VF, f"{name}_cell") for name in _NAMES}

_SEQUENCES = "Tensor? lengths, Tensor? reset, Tensor? batch_sizes, Tensor? table"
_CONFIG = (
    "str cell, str backend, bool has_bias, int num_layers, bool bidirectional, str precision, "
    "bool recompute"
)
# dropout_masks are optional because a program packaged by AOTInductor has None for an empty list.
torch.library.define(
    "fusedrnn::rnn_forward",
    "(Tensor input, Tensor h_0, Tensor? c_0, Tensor[] params, Tensor[]? dropout_masks, "
    f"{_SEQUENCES}, {_CONFIG}, bool save)"
    " -> (Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cs, Tensor hidden)",
)
torch.library.define(
    "fusedrnn::rnn_backward",
    "(Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n, Tensor? d_cs, Tensor input, Tensor h_0, "
    "Tensor? c_0, Tensor[] params, Tensor[]? dropout_masks, Tensor? output, Tensor? gates, "
    f"Tensor? cs, Tensor? hidden, {_SEQUENCES}, {_CONFIG}, bool needs_input, bool needs_params)"
    " -> (Tensor d_input, Tensor d_h_0, Tensor d_c_0, Tensor[] d_params)",
)


def rnn_stack(
    inputs: StackInputs, sequences: Sequences, config: StackConfig,
    dtype: torch.dtype | None = None, *, keep_states: bool = False,
) -> tuple[Tensor, list[Tensor], Tensor | None]:  # fmt: skip
    """Runs a stack of layers, differentiably; with ``dtype``, autocast's, in that dtype.

    Returns:
        output ``[T, B, D*H]`` or packed ``[R, D*H]``; the final states, h_n and for an LSTM c_n,
        ``[L*D, B, H]`` each; and with ``keep_states`` c of every step, ``[L*D, T, B, H]``.
    """
    inputs = inputs.cast(dtype)
    if sequences.batch_sizes is not None or vmap.is_eager(inputs.input):
        sequences = with_table(sequences, inputs.input, inputs.h_0.shape[1], config.directions)
    if vmap.has_tangents() or _has_projection(inputs, config):
        output, h_n, c_n, cs = _by_reference(inputs, sequences, config)
    elif _needs_dispatcher(inputs.input):
        input, h_0, c_0, params, masks = inputs
        if not torch.compiler.is_compiling():
            _register_flops()
        output, h_n, c_n, _, cs, _ = torch.ops.fusedrnn.rnn_forward(
            input, h_0, c_0, list(params), list(masks), *sequences, *config, keep_states
        )
    elif _needs_grad(*inputs[:3], *inputs.params):
        run = partial(_run_forward, sequences=sequences, config=config, save=True)
        output, h_n, c_n, _, cs, _ = _forward_node(inputs, sequences, config, run)
    else:
        output, h_n, c_n, _, cs, _ = _run_forward(inputs, sequences, config, keep_states)
    return output, [h_n] if inputs.c_0 is None else [h_n, c_n], cs


def run_eager(
    inputs: StackInputs, sequences: Sequences, config: StackConfig, needs_grad: bool,
    dtype: torch.dtype | None = None, keep_states: bool = False,
) -> tuple[Tensor, list[Tensor], Tensor | None]:  # fmt: skip
    """Runs ``rnn_stack`` where nothing but autograd is active, and h has the columns of c."""
    return rnn_stack(inputs, sequences, config, dtype, keep_states=keep_states)


def _needs_grad(*tensors: Any) -> bool:
    """Returns whether autograd records a call of these; no module's training flag matters."""
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)


def _needs_dispatcher(tensor: Tensor) -> bool:
    """Returns whether something that must see operators is active, such as a profiler."""
    return not vmap.is_eager(tensor) or torch._C._autograd._profiler_enabled()


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
    inputs, _, _, _, config, needs_input, needs_params = _split_backward(flat)
    first = [w.w_ih for w in config.group(inputs.params)[0]]
    passes = 1 + needs_params + (config.recompute and config.spec.saved > 0)
    without = 0 if needs_input else _forward_flops(inputs.input, None, None, first)
    return passes * _forward_flops(*inputs) - without


def _has_projection(inputs: StackInputs, config: StackConfig) -> bool:
    """Returns whether h has fewer columns than c; torch's operator alone takes that."""
    c_0 = inputs.c_0
    return config.backend != "aten" and c_0 is not None and c_0.shape[-1] != inputs.h_0.shape[-1]


def _by_reference(inputs: StackInputs, sequences: Sequences, config: StackConfig) -> Any:
    """Runs the reference: output, h_n, c_n and c of every step."""
    input, h_0, c_0, params, masks = inputs
    weights = config.group(params)
    return differentiable_stack(config.cell, input, h_0, c_0, weights, masks, sequences)


def _run_forward(
    inputs: StackInputs, sequences: Sequences, config: StackConfig, save: bool
) -> StackOutputs:
    """Runs the stack without autograd; what is not kept is None."""
    if config.backend != "aten":
        return stack.forward(inputs, sequences, config, save)
    input, h_0, c_0, params, _ = inputs
    hx = h_0.contiguous() if c_0 is None else (h_0.contiguous(), c_0.contiguous())
    flags = config.has_bias, config.num_layers, 0.0, False, config.bidirectional, False
    output, h_n, *c_n = ATEN[config.cell](input, hx, params, *flags)
    return StackOutputs(output, h_n, c_n[0] if c_n else None)


def _run_backward(inputs, outputs, grads, sequences, config, *flags):
    """Calls ``rnn_backward`` with the arguments of ``stack.backward``."""
    input, h_0, c_0, params, masks = inputs
    output, _, _, *saved = outputs
    tensors = *grads, input, h_0, c_0, list(params), list(masks), output, *saved
    return torch.ops.fusedrnn.rnn_backward(*tensors, *sequences, *config, *flags)


class _Node(torch.autograd.Function):
    """A node of autograd: ``run(*tensors)``, with gradients by ``pull_back``.

    ``torch.library``'s own walks all arguments as trees and does not compose with ``torch.func``.
    """

    @staticmethod
    def forward(ctx, run, pull_back, *tensors):
        results, kept, constant = run(*tensors)
        every = *tensors, *kept
        ctx.pull_back, ctx.count = pull_back, len(tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[tensor for tensor in constant if tensor is not None])
        ctx.present = [tensor is not None for tensor in every]
        # Tools that walk a graph's saved tensors expect no None.
        ctx.save_for_backward(*[tensor for tensor in every if tensor is not None])
        return results

    @staticmethod
    def backward(ctx, *grads):
        tensors = iter(ctx.saved_tensors)
        saved = [next(tensors) if present else None for present in ctx.present]
        parts, needs = (saved[: ctx.count], saved[ctx.count :]), ctx.needs_input_grad[2:]
        return None, None, *ctx.pull_back(*parts, grads, needs)


#: ``_Node.apply`` without its checks for ``torch.func``, which the operators' keys take care of.
_apply = super(torch.autograd.Function, _Node).apply


def _below_autograd(op: Callable, *arguments: Any) -> Any:
    """Calls an operator past the autograd of this level of ``torch.func``, if there is one."""
    is_inner = torch._C._are_functorch_transforms_active()
    # A node runs without gradients, but the levels further out may need theirs.
    with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad() if is_inner else nullcontext():
        return op(*arguments)


def _forward_node(
    inputs: StackInputs, sequences: Sequences, config: StackConfig, run: Callable
) -> Sequence[Any]:
    """Runs ``run(inputs)``, a stack's forward, as a node of autograd."""
    input, h_0, c_0, params, masks = inputs
    # The values that backward multiplies by remain those of forward when p.data is replaced.
    values = [p.detach() for p in params]

    def run_flat(input, h_0, c_0, *params):
        results = tuple(run(StackInputs(input, h_0, c_0, params, masks)))
        output, _, _, gates, cs, hidden = results
        # Else the output may be modified in place.
        output = output if config.hidden_layers < config.num_layers else None
        return results, (output, gates, cs, hidden), (gates, hidden)

    pull_back = partial(_pull_back, config, sequences, masks, values)
    return _apply(run_flat, pull_back, input, h_0, c_0, *params)


def _pull_back(config, sequences, masks, values, tensors, kept, grads, needs) -> tuple[Any, ...]:
    """Returns the gradients of input, h_0, c_0 and params from those of a stack's results."""
    (input, h_0, c_0, *params), (output, gates, cs, hidden) = tensors, _empty_to_none(kept)
    d_output, d_h_n, d_c_n, _, d_cs, _ = grads
    given = StackGrads(d_output, d_h_n, *((None, None) if c_0 is None else (d_c_n, d_cs)))
    present = [grad for grad in given if grad is not None]
    if not present:
        return (None,) * len(tensors)
    if vmap.has_tangents() and any(forward_ad.unpack_dual(g).tangent is not None for g in present):
        _refuse_tangents()  # they would be lost
    through_op = torch.is_grad_enabled() or any(map(_needs_dispatcher, present))
    run = _run_backward if through_op else stack.backward
    d_input, d_h_0, d_c_0, d_params = run(
        StackInputs(input, h_0, c_0, params if through_op else values, masks),
        StackOutputs(output, None, None, gates, cs, hidden),  # type: ignore[arg-type]
        given,
        sequences,
        config,
        needs[0],
        any(needs[3:]),
    )
    d_input, d_c_0 = d_input if needs[0] else None, None if c_0 is None else d_c_0
    return d_input, d_h_0, d_c_0, *(d_params or [None] * len(params))


def _refuse_tangents():
    raise NotImplementedError(
        "fusedrnn's operators carry no tangents; call the module itself, not what was exported "
        "or compiled from it, and call it where the tangents are, not before"
    )


def _split_arguments(flat: Sequence[Any]) -> tuple[Sequences, StackConfig, Sequence[Any]]:
    """Splits the arguments behind the tensors into sequences, config and flags."""
    n, m = len(Sequences._fields), len(Sequences._fields) + len(StackConfig._fields)
    return Sequences(*flat[:n]), StackConfig(*flat[n:m]), flat[m:]


def _none_to_empty(like: Tensor, tensors: Sequence[Any]) -> tuple[Any, ...]:
    """Returns the results of an operator, which has an empty tensor for each missing one."""
    return tuple(like.new_empty(0) if t is None else t for t in tensors)


def _empty_to_none(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Reverses ``_none_to_empty``: no other saved tensor is 1-D."""
    return tuple(None if t is None or t.dim() == 1 else t for t in tensors)


def _forward_kernel(input, h_0, c_0, params, dropout_masks, *rest):
    """The operator on real tensors."""
    sequences, config, (save,) = _split_arguments(rest)
    inputs = StackInputs(input, h_0, c_0, params, dropout_masks or ())
    return _none_to_empty(input, _run_forward(inputs, sequences, config, save))


def _forward_autograd(input, h_0, c_0, params, dropout_masks, *rest):
    """The operator's autograd; a program that was traced without gradients may need them here."""
    if vmap.has_tangents():
        _refuse_tangents()
    forward = torch.ops.fusedrnn.rnn_forward
    sequences, config, (save,) = _split_arguments(rest)
    inputs = StackInputs(input, h_0, c_0, params, dropout_masks or ())
    if not _needs_grad(input, h_0, c_0, *params):
        return _below_autograd(forward, *inputs, *sequences, *config, save)
    config = config._replace(backend="torch") if config.backend == "aten" else config
    if _has_projection(inputs, config):
        output, h_n, c_n, cs = _by_reference(inputs, sequences, config)
        return _none_to_empty(input, (output, h_n, c_n, None, cs, None))

    def run(inputs):
        return _below_autograd(forward, *inputs, *sequences, *config, True)

    with enable_single_level_autograd_function():
        return _forward_node(inputs, sequences, config, run)


@torch.library.register_fake("fusedrnn::rnn_forward")
def _forward_fake(input, h_0, c_0, params, dropout_masks, *rest):
    _, config, (save,) = _split_arguments(rest)
    inputs = StackInputs(input, h_0, c_0, params, ())
    save = save and config.backend != "aten"
    return _none_to_empty(input, stack.empty_outputs(inputs, config, save))


def _split_backward(flat: Sequence[Any]) -> tuple[Any, ...]:
    """Returns the arguments of ``rnn_backward`` as those of ``stack.backward``."""
    grads, (input, h_0, c_0, params, masks) = StackGrads(*flat[:4]), flat[4:9]
    output, gates, cs, hidden = _empty_to_none(flat[9:13])
    sequences, config, flags = _split_arguments(flat[13:])
    inputs = StackInputs(input, h_0, c_0, params, masks or ())
    outputs = StackOutputs(output, None, None, gates, cs, hidden)  # type: ignore[arg-type]
    return inputs, outputs, grads, sequences, config, *flags


def _backward_kernel(*flat):
    """The operator on real tensors."""
    inputs, *arguments = _split_backward(flat)
    *results, d_params = stack.backward(inputs, *arguments)
    return *_none_to_empty(inputs.input, results), d_params


def _backward_autograd(*flat):
    """The operator's autograd."""
    inputs, outputs, grads, *arguments = _split_backward(flat)
    (input, h_0, c_0, params, masks), (sequences, config, needs_input, _) = inputs, arguments
    tensors = *grads, input, h_0, c_0, *params
    if not _needs_grad(*tensors):
        return _below_autograd(torch.ops.fusedrnn.rnn_backward, *flat)

    def run(*tensors):
        own = StackInputs(*tensors[4:7], tensors[7:], masks)
        results = _below_autograd(_run_backward, own, outputs, tensors[:4], *arguments)
        return (*results[:3], *results[3]), (), ()

    pull_back = partial(_pull_back_again, config, sequences, masks, needs_input)
    with enable_single_level_autograd_function():
        d_input, d_h_0, d_c_0, *d_params = _apply(run, pull_back, *tensors)
    return d_input, d_h_0, d_c_0, d_params


def _pull_back_again(config, sequences, masks, needs_input, tensors, kept, directions, needs):
    """Pulls ``directions`` back through the gradients of a stack, by the reference.

    The gradients are a pullback of the stack's results, so theirs are a pullback of that one. What
    forward saved has no gradient: it is a function of the other tensors, which are d_output, d_h_n,
    d_c_n, d_cs, input, h_0, c_0 and params.
    """
    present = {i: tensor for i, tensor in enumerate(tensors) if tensor is not None}
    cotangents = {i: present.pop(i) for i in range(4) if i in present}
    directions = {i: d for i, d in enumerate(directions, 4) if d is not None and i in present}
    if not needs_input:
        directions.pop(4, None)
    if not directions:
        return [None] * len(tensors)

    def results(primals):
        input, h_0, *params = primals.values()
        c_0 = params.pop(0) if 6 in primals else None
        every = _by_reference(StackInputs(input, h_0, c_0, params, masks), sequences, config)
        return {i: every[i] for i in cotangents}

    def gradients(primals, cotangents):
        (found,) = torch.func.vjp(results, primals)[1](cotangents)
        return {i: found[i] for i in directions}

    of_primals, of_cotangents = torch.func.vjp(gradients, present, cotangents)[1](directions)
    found = of_primals | of_cotangents
    return [found.get(i) for i in range(len(tensors))]


@torch.library.register_fake("fusedrnn::rnn_backward")
def _backward_fake(*flat):
    inputs, *_, needs_input, needs_params = _split_backward(flat)
    input, h_0, c_0, params, _ = inputs
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
