"""Device functions and kernels with one passage of their source replaced."""

from __future__ import annotations

import inspect
import tempfile
from pathlib import Path

import triton


def rewritten(function: triton.JITFunction, old: str, new: str) -> triton.JITFunction:
    """The function with ``old``, which its source has once, replaced by ``new``."""
    source = inspect.getsource(function.fn)
    assert source.count(old) == 1, f"{old!r} is {source.count(old)} times in the source"
    namespace = dict(function.fn.__globals__)
    path = Path(tempfile.mkdtemp()) / "mutant.py"
    path.write_text(source.replace(old, new))  # Triton reads the source from the file
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    return namespace[function.fn.__name__]
