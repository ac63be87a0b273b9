"""``python -m fusedrnn run``: runs a program with ``torch.nn`` patched and counts its modules."""

import atexit
import functools
import os
import runpy
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from . import dispatch, modules, patching

_backends_of: WeakKeyDictionary[torch.nn.Module, set[str]] = WeakKeyDictionary()
_ran: list[set[str]] = []  # the backends of each module that has run, which may be gone by now


def run(target: str, arguments: Sequence[str], as_module: bool) -> None:
    """Runs ``python target`` or, ``as_module``, ``python -m target`` with ``torch.nn`` patched.

    When the process ends, one line on stderr says how many modules ran on which backend.
    """
    for kind in (modules._Stack, modules._SingleStep):
        kind.forward = _counting(kind.forward)  # type: ignore[method-assign]
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
        backend = dispatch.decide(self._prepare(input, hx, **options).facts)[0]
        if torch.compiler.is_dynamo_compiling():
            torch._dynamo.comptime.comptime(_note_while_compiling)
        else:
            _note(self, backend)
        return forward(self, input, hx, **options)

    return counted


def _note_while_compiling(context: Any) -> None:
    """Notes a module that Dynamo traces, outside of the graph, so that no guard depends on it."""
    variable = context.get_local("self")._i_will_not_complain_if_bc_breaks_VariableTracker()
    _note(variable.value, context.get_local("backend").as_python_constant())


def _note(module: torch.nn.Module, backend: str) -> None:
    if not getattr(module, "_is_replica", False):  # DataParallel makes one for each batch
        new: set[str] = set()
        backends = _backends_of.setdefault(module, new)
        if backends is new:
            _ran.append(new)
        backends.add(backend)


def _report(process: int) -> None:
    """Prints ``fusedrnn: 3 modules ran: 2 on triton, 1 on triton and aten``, but not in a fork."""
    if os.getpid() == process:
        counts = Counter(" and ".join(sorted(b, key=dispatch.BACKENDS.index)) for b in _ran)
        parts = ", ".join(f"{n} on {names}" for names, n in counts.most_common())
        ran = f"{len(_ran)} module{'' if len(_ran) == 1 else 's'} ran"
        sys.stderr.write(f"fusedrnn: {ran}{': ' if parts else ''}{parts}\n")
