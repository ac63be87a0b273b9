"""Adoption without a change in a model's code: ``patch``, ``replace_modules`` and ``to_torch``."""

import copy
import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.nn.modules import rnn as torchs_rnn
from torch.nn.utils.parametrize import type_before_parametrizations as _class_of

_Model = TypeVar("_Model", bound=torch.nn.Module)
_Classes = dict[type[torch.nn.Module], type[torch.nn.Module]]

# Filled at import by ``register``, because while patched torch's names lead to ours.
_OURS: _Classes = {}
_TORCHS: _Classes = {}
#: The lists in which torch's modules, but not ours, keep their weights a second time.
_FLAT = {"_flat_weights", "_flat_weight_refs"}
#: The modules in which torch exposes the six classes.
_PLACES = (torch.nn, torch.nn.modules, torchs_rnn)

_lock = threading.Lock()
_calls: set["Patch"] = set()  # the plain calls
_blocks: list["Patch"] = []  # the open blocks
_undo: list[Callable[[], object]] = []  # restores what patching changed; empty while not patched


def register(*classes: Any) -> None:
    """Makes each class the counterpart of torch's class of the same name."""
    for ours in classes:
        theirs = ours._torchs = getattr(torch.nn, ours.__name__)
        _OURS[theirs], _TORCHS[ours] = ours, theirs
        # Replaces a module in ``torch.jit.script``, with its Parameters.
        ours.__prepare_scriptable__ = lambda module: to_torch(copy.copy(module))


class Patch:
    """The result of ``patch()``: a context manager, which a plain call may ignore."""

    def __enter__(self) -> None:
        with _update():
            _calls.discard(self)
            _blocks.append(self)

    def __exit__(self, *exception: object) -> None:
        with _update():
            _blocks.remove(self)


def patch() -> Patch:
    """Makes ``torch.nn.LSTM``, ``GRU``, ``RNN``, ``LSTMCell``, ``GRUCell`` and ``RNNCell`` ours.

    The change affects all threads. A plain call lasts until ``unpatch()``, and
    ``with fusedrnn.patch():`` for the block. Calls may be repeated and blocks nested; the last to
    end restores what was there before, except for names that other code has replaced meanwhile.

    Names bound, modules built and classes derived before the call remain torch's and work as
    before, but such modules cannot be pickled while patched. What is bound, built or derived while
    patched remains ours. ``torch._dynamo.config.allow_rnn`` is True while patched, so that Dynamo
    does not break the graph at ours, which are ``torch.nn.LSTM`` by then.
    """
    # This import also brings torch's quantization, which must bind torch's own classes.
    import torch._dynamo  # noqa: F401

    call = Patch()
    with _update():
        _calls.add(call)
    return call


def unpatch() -> None:
    """Ends every plain call of ``patch()``; inside a block, torch stays patched until it ends."""
    with _update():
        _calls.clear()


@contextmanager
def _update() -> Iterator[None]:
    """Locks calls and blocks for a change, then patches or restores torch as they require."""
    with _lock:
        yield
        if not (_calls or _blocks):
            while _undo:
                _undo.pop()()
        elif not _undo:
            _undo.append(functools.partial(_allow_rnn, *_allow_rnn(True, True)))
            if quantize := sys.modules.get("torch.ao.quantization.quantize"):
                mark = _with_warning(quantize.propagate_qconfig_)
                _undo.append(_replace(quantize, mark.__name__, mark))
            for theirs, ours in _OURS.items():
                _undo.extend(_replace(place, ours.__name__, ours) for place in _PLACES)
                for method in ("__init__", "forward"):
                    _undo.append(_replace(ours, method, _for_both(ours, theirs, method)))


def _replace(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Sets an attribute; returns a function that undoes it unless it has been set again since."""
    former = vars(owner).get(name)
    setattr(owner, name, value)

    def restore() -> None:
        if vars(owner).get(name) is value:
            delattr(owner, name) if former is None else setattr(owner, name, former)

    return restore


def _for_both(ours: type, theirs: type, method: str) -> Callable:
    """Returns a method of ours that runs torch's on classes derived before the patch."""
    own = getattr(ours, method)

    @functools.wraps(own)
    def shared(self: Any, *args: Any, **kwargs: Any) -> Any:
        called = own if isinstance(self, ours) else getattr(theirs, method)
        return called(self, *args, **kwargs)

    return shared


def _with_warning(mark: Callable) -> Callable:
    """Wraps the function that marks the modules to quantize, which names torch's classes."""

    @functools.wraps(mark)
    def warned(model: Any, *args: Any, **kwargs: Any) -> Any:
        if any(type(module) in _OURS for module in model.modules()):
            message = "torch's quantization finds no nn.LSTM or nn.GRU while torch is patched; "
            warnings.warn(message + "call fusedrnn.unpatch() first", stacklevel=3)
        return mark(model, *args, **kwargs)

    return warned


def _allow_rnn(default: bool, current: bool) -> tuple[bool, bool]:
    """Sets Dynamo's switch for all threads and, since torch 2.12, this one; returns the former."""
    config = torch._dynamo.config
    entry = config._config["allow_rnn"]  # type: ignore[attr-defined]
    former = entry.default, config.allow_rnn
    entry.default = default
    if config.allow_rnn != current:
        config.allow_rnn = current
    return former


def replace_modules(model: _Model) -> _Model:
    """Converts every ``nn.LSTM``, ``GRU``, ``RNN`` and cell in a model to fusedrnn's, in place.

    Only the class of a module changes: Parameters, optimizers, hooks, parametrizations, pruning and
    ``training`` stay. Subclasses of torch's classes, quantized and scripted modules are left alone.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
        ValueError: a module has an instance attribute ``forward``, or one with the name of an
            attribute of fusedrnn's class. Nothing has been changed.
    """
    return _convert(model, _OURS, "replace_modules")


def to_torch(model: _Model) -> _Model:
    """Converts every module of fusedrnn in a model to torch's, in place.

    On a GPU the weights are laid out in cuDNN's buffer. A ``Stream`` of such a module ends.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
        ValueError: a GRU or GRUCell has ``reset_after=False``, for which torch has no module, or a
            module has an instance attribute ``forward``. Nothing has been changed.
    """
    return _convert(model, _TORCHS, "to_torch")


def _convert(model: _Model, classes: _Classes, caller: str) -> _Model:
    """Gives every module whose class is a key of ``classes`` the class's counterpart."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{caller} takes a torch.nn.Module; got {type(model).__name__}")
    with _lock:  # another thread may convert the same model
        found = [(path, m) for path, m in model.named_modules() if _class_of(m) in classes]
        for path, module in found:
            if obstacle := _obstacle(module, classes[_class_of(module)]):
                name = f"module {path!r}" if path else "the model"
                raise ValueError(f"{caller}: {name} {obstacle}")
        for _, module in found:
            former, base = type(module), classes[_class_of(module)]
            if former not in classes:
                # parametrize derives a class for each module, with a property for each such weight.
                skipped = "__dict__", "__weakref__"
                own = {key: value for key, value in vars(former).items() if key not in skipped}
                base = type(former.__name__, (base,), own)
            object.__setattr__(module, "__class__", base)
            for name in (*_FLAT, "reset_after", "recompute", "_assigned"):
                module.__dict__.pop(name, None)
            if classes is _TORCHS and isinstance(module, torch.nn.RNNBase):
                module._init_flat_weights()
                # deepcopy refuses tensors with a history; forward computes them again.
                for i, weight in enumerate(module._flat_weights):
                    if weight is not None and not weight.is_leaf:
                        module._flat_weights[i] = weight.detach()
    return model


def _obstacle(module: torch.nn.Module, target: type) -> str | None:
    """Returns the reason why a module cannot change its class, or None."""
    if "forward" in module.__dict__:
        return "has a forward of its own; remove it, or change the class before it is set"
    if not getattr(module, "reset_after", True):
        kind = type(module).__name__
        return f"is a {kind} with reset_after=False, for which torch has no module"
    own = {*module.__dict__, *module._parameters, *module._buffers, *module._modules} - _FLAT
    for name in sorted(own & (set(dir(target)) - set(dir(type(module))))):
        return f"has an attribute {name!r}, which {target.__name__} uses itself; rename it"
    return None
