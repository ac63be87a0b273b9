"""Planted bugs: in the source of kernels, and in the tables of rows."""

import inspect
import tempfile
from pathlib import Path

import triton
from torch import Tensor

from fusedrnn.kernels.rows import INITIAL, PREVIOUS, SKIPPED, ZERO


def rewritten(function: triton.JITFunction, old: str, new: str) -> triton.JITFunction:
    """The function with ``old``, which its source has once, replaced by ``new``."""
    source = inspect.getsource(function.fn)
    assert source.count(old) == 1, f"{old!r} is {source.count(old)} times in the source"
    namespace = dict(function.fn.__globals__)
    path = Path(tempfile.mkdtemp()) / "mutant.py"
    path.write_text(source.replace(old, new))  # Triton reads the source from the file
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    return namespace[function.fn.__name__]


def first_step_for_all(origins: Tensor) -> Tensor:
    """Uses the mask of step 0 for all steps."""
    return origins[:, :1].expand_as(origins).contiguous()


def padding_counts(origins: Tensor) -> Tensor:
    """Runs steps beyond the end like any other."""
    return origins.masked_fill(origins == SKIPPED, PREVIOUS)


def resets_lost(origins: Tensor) -> Tensor:
    return origins.masked_fill(origins == ZERO, PREVIOUS)


def initial_lost(origins: Tensor) -> Tensor:
    """Begins the reverse direction at the end of the batch, not of each sequence."""
    return origins.masked_fill(origins == INITIAL, PREVIOUS)


ORIGIN_BUGS = first_step_for_all, padding_counts, resets_lost, initial_lost
