"""``python -m fusedrnn run``: runs a program with ``torch.nn`` patched and counts its modules."""

from __future__ import annotations

import atexit
import functools
import os
import runpy
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from . import dispatch, modules, patching

_lock = threading.Lock()
_of: WeakKeyDictionary[torch.nn.Module, set[str]] = WeakKeyDictionary()
_ran: list[set[str]] = []  # the backends of each module that has run, which may be gone by now


def run(target: str, arguments: Sequence[str], as_module: bool) -> None:
    """Runs ``python target`` or, ``as_module``, ``python -m target`` with ``torch.nn`` patched.

    When the process ends, one line on stderr says how many modules ran on which backend.

    Raises:
        BaseException: the exception that ends the program.
    """
    for kind in (modules._Stack, modules._SingleStep):
        kind.forward = _counting(kind.forward)  # type: ignore[attr-defined, method-assign]
    patching.patch()
    atexit.register(_report, os.getpid())
    sys.argv = [target, *arguments]
    if as_module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.realpath(target))
        runpy.run_path(target, run_name="__main__")


def _counting(forward: Callable) -> Callable:
    """Returns a module's ``forward`` that also notes the backend."""

    @functools.wraps(forward)
    def counted(self: Any, input: Any, hx: Any = None, **options: Any) -> Any:
        backend = dispatch.choose(self._prepare(input, hx, **options).facts)
        if torch.compiler.is_dynamo_compiling():
            torch._dynamo.comptime.comptime(_note_while_compiling)
        else:
            note(self, backend)
        return forward(self, input, hx, **options)

    return counted


def _note_while_compiling(context: Any) -> None:
    """Notes a module that Dynamo traces, outside of the graph, so that no guard depends on it."""
    variable = context.get_local("self")._i_will_not_complain_if_bc_breaks_VariableTracker()
    note(variable.value, context.get_local("backend").as_python_constant())


def note(module: torch.nn.Module, backend: str) -> None:
    """Notes that a module has run; a replica of DataParallel does not count."""
    with _lock:
        if not getattr(module, "_is_replica", False):
            if module not in _of:
                _of[module] = set()
                _ran.append(_of[module])
            _of[module].add(backend)


def summary() -> str:
    """Returns one line such as ``fusedrnn: 3 modules ran: 2 on triton, 1 on triton and aten``."""
    counts = Counter(tuple(sorted(b, key=dispatch.BACKENDS.index)) for b in _ran)
    parts = [f"{n} on {' and '.join(names)}" for names, n in counts.most_common()]
    plural = "" if len(_ran) == 1 else "s"
    return f"fusedrnn: {len(_ran)} module{plural} ran{': ' if parts else ''}{', '.join(parts)}"


def _report(process: int) -> None:
    """Prints the summary, unless this is a fork of the process that was started."""
    if os.getpid() == process and sys.__stderr__ is not None:
        sys.__stderr__.write(f"{summary()}\n")
