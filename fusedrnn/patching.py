"""``patch``, ``replace_modules``, ``to_torch``: adoption without a change in a model's code.

``patch`` changes what ``torch.nn.LSTM`` and its five kin *mean*, for models that are built from
then on. ``replace_modules`` changes the ones that a model *has*. Either can be undone.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.nn.modules import rnn as torchs_rnn
from torch.nn.utils import parametrize

from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .tokens import TokenGRU, TokenLSTM

_Model = TypeVar("_Model", bound=torch.nn.Module)

_OURS: dict[str, type[torch.nn.Module]] = {
    kind.__name__: kind for kind in (LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell)
}
# Looked up here, once: under patch() torch's names lead to ours.
_TORCHS: dict[str, type[torch.nn.Module]] = {name: getattr(torchs_rnn, name) for name in _OURS}
_OURS_FOR_TORCHS = {_TORCHS[name]: _OURS[name] for name in _OURS}
_TORCHS_FOR_OURS = {_OURS[name]: _TORCHS[name] for name in _OURS}
#: Every place where torch exposes the six.
_PLACES = (torch.nn, torch.nn.modules, torchs_rnn)
# What torch keeps in each module beside the weights and what ours have no use for.
_FLAT, _FLAT_REFS = "_flat_weights", "_flat_weight_refs"

_lock = threading.Lock()
_calls: set[Patch] = set()  # calls of patch() that neither unpatch() nor a `with` has taken over
_blocks = 0  # `with patch():` blocks that are open
_before: dict[tuple[Any, str], Any] = {}  # what stood in each place; empty while not patched
# Methods of ours that a class derived from torch's may call by torch's name, and what was there.
_SHARED = ("__init__", "forward")
_methods_before: list[tuple[type, str, Any]] = []
_allow_rnn_before = False, False  # by default, and in the thread that patched


class Patch:
    """What ``patch()`` returns: nothing to do for a plain call, or the ``with`` block's manager."""

    def __enter__(self) -> None:
        global _blocks
        with _lock:
            _calls.discard(self)  # from here on it is the block that counts
            _blocks += 1
            _renew()

    def __exit__(self, *exception: object) -> None:
        global _blocks
        with _lock:
            _blocks -= 1
            _renew()


def patch() -> Patch:
    """Makes ``torch.nn.LSTM``, ``GRU``, ``RNN``, ``LSTMCell``, ``GRUCell`` and ``RNNCell`` ours.

    For all threads, in ``torch.nn``, ``torch.nn.modules`` and ``torch.nn.modules.rnn``, so that
    code written for torch builds fusedrnn's modules. A plain call lasts until ``unpatch()``; as
    ``with fusedrnn.patch():`` it lasts for the block. Torch is patched as long as a plain call
    stands or a block is open, in any thread: calls may be repeated (one ``unpatch()`` undoes them
    all), blocks may be nested, and whichever ends last restores exactly what was there before. A
    name that somebody else has replaced in between is left to them.

    What it does not reach, and what follows from torch's names leading to other classes:

    - Names bound earlier (``from torch.nn import LSTM``), modules built earlier and classes derived
      earlier stay torch's and work as before; for modules there is ``replace_modules``. A class of
      those may name its base in a method (``nn.LSTM.forward(self, x)`` instead of ``super()``):
      while patched our ``__init__`` and ``forward`` hand its instances on to torch's. What is
      bound, built or derived while patched stays ours later.
    - ``isinstance(module, torch.nn.LSTM)`` is True of ours while patched, and only then; of a
      module built earlier it is False while patched.
    - ``state_dict()`` is the same either way. A whole module saved while patched is saved as
      ``fusedrnn``'s and needs it to load, patched or not. One saved as torch's loads as ours while
      patched. A module built earlier cannot be pickled while patched: pickle looks its class up by
      name and refuses the other one.
    - Child processes that start anew (``spawn``) are not patched; forked ones are.
    - TorchDynamo breaks the graph at every instance of whatever ``torch.nn.LSTM``, ``GRU`` and
      ``RNN`` name; so that it does not at ours, ``torch._dynamo.config.allow_rnn`` is True while
      patched. To set it, and so that torch's own quantization goes on knowing torch's classes, the
      first call imports ``torch._dynamo``, which takes a second or two.

    Returns:
        A context manager; a plain call may drop it.

    Example:
        >>> with fusedrnn.patch():
        ...     module = torch.nn.LSTM(3, 4)
        >>> assert type(module) is fusedrnn.LSTM
    """
    # Before the lock, for it takes long; and before the change, for it imports torch.ao.
    import torch._dynamo  # noqa: F401

    call = Patch()
    with _lock:
        _calls.add(call)
        _renew()
    return call


def unpatch() -> None:
    """Undoes every plain call of ``patch()``; harmless where there was none.

    Inside a ``with fusedrnn.patch():`` block torch stays patched until the block ends.
    """
    with _lock:
        _calls.clear()
        _renew()


def _renew() -> None:
    """Brings torch's names into the state that calls and blocks ask for; under the lock."""
    global _allow_rnn_before
    wanted = bool(_calls) or _blocks > 0
    if wanted == bool(_before):
        return
    if wanted:
        _allow_rnn_before = _allow_rnn(True, True)
        for place in _PLACES:
            for name, ours in _OURS.items():
                _before[place, name] = getattr(place, name)
                setattr(place, name, ours)
        for name, ours in _OURS.items():
            for method in _SHARED:
                own = vars(ours).get(method)
                _methods_before.append((ours, method, own))
                setattr(ours, method, _handing_on(method, ours, own, _TORCHS[name]))
        return
    _allow_rnn(*_allow_rnn_before)
    for (place, name), former in _before.items():
        if getattr(place, name) is _OURS[name]:
            setattr(place, name, former)
    _before.clear()
    for ours, method, own in _methods_before:
        if own is None:
            delattr(ours, method)
        else:
            setattr(ours, method, own)
    _methods_before.clear()


def _handing_on(
    method: str, ours: type, own: Callable | None, theirs: type[torch.nn.Module]
) -> Callable:
    """A method that is torch's for instances of classes that were derived from torch's.

    own: the one that ``ours`` has itself; else it is looked up at each call, as ``run`` changes it.
    """

    @functools.wraps(getattr(ours, method))
    def shared(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, ours):
            return getattr(theirs, method)(self, *args, **kwargs)
        if own is not None:
            return own(self, *args, **kwargs)
        return getattr(super(ours, self), method)(*args, **kwargs)

    return shared


def _allow_rnn(by_default: bool, here: bool) -> tuple[bool, bool]:
    """Sets Dynamo's switch for all threads and for this one; returns what it was.

    Since torch 2.12 a setting is one thread's own, so the default has to change as well, which
    torch has no public name for. This thread may have a setting: ``torch.export`` leaves one.
    """
    config = torch._dynamo.config
    entry = config._config["allow_rnn"]  # type: ignore[attr-defined]
    before = entry.default, config.allow_rnn
    entry.default = by_default
    if config.allow_rnn != here:
        config.allow_rnn = here
    return before


def replace_modules(model: _Model) -> _Model:
    """Turns every ``nn.LSTM``, ``GRU``, ``RNN`` and cell of them in a model into ours, in place.

    The modules stay the same objects and change their class, so nothing that refers to them has
    to know: Parameters and gradients, optimizers, hooks of every kind, ``training``,
    ``weight_norm`` in both styles, parametrizations, pruning, and modules that occur twice are what
    they were. Compiled code compiles anew. Only torch's very classes are replaced: a class derived
    from one of them may have a ``forward`` of its own and is left alone, and so are quantized,
    scripted and ``fully_shard``ed modules. Afterwards ``isinstance(module, torch.nn.LSTM)`` is
    False, unless under ``patch``. A second call does nothing.

    Args:
        model: any module; also an ``nn.LSTM`` itself.

    Returns:
        The model.

    Raises:
        TypeError: the model is not a ``torch.nn.Module``.
        ValueError: before anything is changed: a module has an attribute ``forward`` of its own,
            as some libraries set, or another attribute that would hide or be hidden by one of ours.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.LSTM(3, 4))
        >>> model = fusedrnn.replace_modules(model)
        >>> assert type(model[0]) is fusedrnn.LSTM
    """
    with _lock:  # another thread may have the same model
        found = _found(model, _OURS_FOR_TORCHS, "replace_modules")
        for name, module in found:
            ours = _OURS_FOR_TORCHS[parametrize.type_before_parametrizations(module)]
            added = set(dir(ours)) - set(dir(type(module)))
            own = {*module.__dict__, *module._parameters, *module._buffers, *module._modules}
            if clash := sorted((added & own) - {_FLAT}):
                raise ValueError(
                    f"replace_modules: {name} has an attribute {clash[0]!r}, which fusedrnn's "
                    "modules use themselves; rename it"
                )
        for _, module in found:
            _change_class(module, _OURS_FOR_TORCHS)
            # Ours read their weights at every call. Weak references could not be pickled either.
            if module.__dict__.pop(_FLAT, None) is not None:
                module.__dict__[_FLAT_REFS] = []
    return model


def to_torch(model: _Model) -> _Model:
    """Turns every module of ours in a model into torch's, in place: ``replace_modules`` undone.

    Everything is kept as by ``replace_modules``. On a GPU the weights are laid out in cuDNN's one
    buffer, as ``nn.LSTM`` does when it is moved there. A ``Stream`` of such a module ends.

    Args:
        model: any module; also one of ours itself.

    Returns:
        The model.

    Raises:
        TypeError: the model is not a ``torch.nn.Module``.
        ValueError: before anything is changed: a GRU or GRUCell has ``reset_after=False``, for
            which torch has no module; there is a TokenLSTM or TokenGRU; or a module has a
            ``forward`` of its own.
    """
    with _lock:
        found = _found(model, _TORCHS_FOR_OURS, "to_torch")
        for module in model.modules():
            if isinstance(module, (TokenLSTM, TokenGRU)):
                raise ValueError(
                    f"to_torch: the model has a {type(module).__name__}, which is two modules of "
                    "torch's: an Embedding or one-hot rows, and what is behind them"
                )
        for name, module in found:
            if not getattr(module, "reset_after", True):
                raise ValueError(
                    f"to_torch: {name} is a {type(module).__name__} with reset_after=False, for "
                    "which torch has no module"
                )
        for _, module in found:
            for name in ("reset_after", "recompute"):
                module.__dict__.pop(name, None)
            _change_class(module, _TORCHS_FOR_OURS)
            if isinstance(module, torch.nn.RNNBase):
                module._init_flat_weights()
                # Computed weights have a history, which deepcopy refuses; forward computes anew.
                weights: list[Any] = module._flat_weights
                module._flat_weights = [
                    w if w is None or w.is_leaf else w.detach() for w in weights
                ]
    return model


def _found(
    model: torch.nn.Module, classes: dict[type[torch.nn.Module], type[torch.nn.Module]], caller: str
) -> list[tuple[str, torch.nn.Module]]:
    """The modules of a model that are exactly of these classes, each once, with a name to print.

    Raises:
        TypeError: the model is no module.
        ValueError: one of them has a forward of its own.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{caller} takes a torch.nn.Module; got {type(model).__name__}")
    found = []
    for path, module in model.named_modules():
        if parametrize.type_before_parametrizations(module) in classes:
            name = f"module {path!r}" if path else "the model"
            if "forward" in module.__dict__:
                raise ValueError(
                    f"{caller}: {name} has a forward of its own, set on the instance, which would "
                    "go on running the former class; remove it or change the class before it is set"
                )
            found.append((name, module))
    return found


def _change_class(
    module: torch.nn.Module, classes: dict[type[torch.nn.Module], type[torch.nn.Module]]
) -> None:
    """Gives a module its class's counterpart; a parametrized one keeps its properties."""
    former = type(module)
    base = classes[parametrize.type_before_parametrizations(module)]
    if former in classes:
        module.__class__ = base
        return
    # parametrize has put a class of its own between, one for each module, with a property for each
    # parametrized weight.
    members = {k: v for k, v in vars(former).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(former.__name__, (base,), members)
