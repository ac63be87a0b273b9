"""What the user asked for: the backend, and how fp32 is multiplied."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

BACKENDS = ("auto", "triton", "torch", "aten", "compiled")
#: Those whose recurrence is the loop in torch.
LOOPS = ("torch", "compiled")
PRECISIONS = ("ieee", "tf32", "tf32x3")
ENVIRONMENT_VARIABLE = "FUSEDRNN_BACKEND"
_KEY = os.environ.encodekey(ENVIRONMENT_VARIABLE)

# A threading.local and not a ContextVar: TorchDynamo traces and guards the former (a compiled
# module follows use_backend) and breaks the graph at the latter.
_local = threading.local()
_local.backend = _local.precision = None  # of this thread: to find nothing takes 2.5 us


def use_backend(name: str) -> AbstractContextManager[None]:
    """Chooses the backend of every call of this thread inside the ``with`` block.

    Blocks nest, and the former choice comes back when a block is left, by an exception too. It
    takes precedence over the environment variable ``FUSEDRNN_BACKEND``.

    Args:
        name: ``"auto"``, ``"triton"``, ``"torch"``, ``"aten"`` or ``"compiled"``: the loop of
            ``"torch"``, small steps on the CPU compiled, for 5 to 20 seconds the first time that a
            size comes (``explain`` says whether they are). A named backend (all but ``"auto"``)
            runs or raises ``NotImplementedError`` with the reason.

    Raises:
        ValueError: there is no backend of that name.

    Example:
        >>> with fusedrnn.use_backend("torch"):
        ...     output, h_n = module(input)
    """
    _check_name("backend", name, BACKENDS)
    return _set("backend", name)


def use_precision(name: str) -> AbstractContextManager[None]:
    """Chooses how this thread's triton backend multiplies fp32 inside the ``with`` block.

    Without it torch's own switch decides, ``torch.backends.cudnn.rnn.fp32_precision`` (set also
    by the older ``torch.backends.cudnn.allow_tf32``): by torch's default that is tf32. It has no
    effect on other dtypes and other backends.

    Args:
        name: ``"ieee"`` (fp32 throughout), ``"tf32"`` (operands of products rounded to 10 bits of
            mantissa), or ``"tf32x3"`` (three tf32 products: nearly fp32, on tensor cores).

    Raises:
        ValueError: there is no precision of that name.
    """
    _check_name("precision", name, PRECISIONS)
    return _set("precision", name)


def requested_backend() -> tuple[str, str]:
    """The backend asked for and who asked: ``use_backend``, ``FUSEDRNN_BACKEND`` or ``default``.

    Raises:
        ValueError: ``FUSEDRNN_BACKEND`` names no backend.
    """
    name = getattr(_local, "backend", None)
    if name is not None:
        return name, "use_backend"
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    if not name:
        return "auto", "default"
    _check_name(ENVIRONMENT_VARIABLE, name, BACKENDS)
    return name, ENVIRONMENT_VARIABLE


def requested_name() -> str:
    """``requested_backend()[0]``, sooner.

    In 50 us of a small call 2.5 would go to what ``os.environ.get`` raises and catches for a
    variable that is not there; its own dictionary says so at once.
    """
    known = None if torch.compiler.is_compiling() else getattr(os.environ, "_data", None)
    if known is None or _KEY in known or getattr(_local, "backend", None) is not None:
        return requested_backend()[0]
    return "auto"


def precision() -> str:
    """How fp32 is multiplied on triton: ``"ieee"``, ``"tf32"`` or ``"tf32x3"``.

    Follows ``use_precision``, else the switch that torch's own RNNs follow. That one getter knows
    torch's older and newer switches alike; ``cudnn.allow_tf32`` raises when the two were mixed.
    """
    name = getattr(_local, "precision", None)
    if name is not None:
        return name
    switch = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if switch == "tf32" else "ieee"


@contextmanager
def _set(name: str, value: str) -> Iterator[None]:
    before = getattr(_local, name, None)
    setattr(_local, name, value)
    try:
        yield
    finally:
        setattr(_local, name, before)


def _check_name(what: str, name: str, allowed: tuple[str, ...]) -> None:
    if name not in allowed:
        raise ValueError(f"{what} is {name!r}; expected one of {', '.join(allowed)}")
