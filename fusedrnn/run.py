"""``python -m fusedrnn run``: somebody else's program, with ``torch.nn`` patched and a count kept.

The program should find what ``python`` itself would have given it: ``sys.argv``, ``sys.path[0]``,
``__main__``, the exit code, and a traceback that begins with its own code.
"""

from __future__ import annotations

import atexit
import functools
import importlib.machinery
import os
import runpy
import sys
import threading
import types
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.comptime import ComptimeContext, comptime

from . import dispatch, functional, modules, patching


class Tally:
    """Which modules ran on which backend. It keeps no module alive, and forgets none that ran."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ran: list[set[str]] = []  # for each module that ran its backends
        self._latest: dict[int, tuple[weakref.ref, set[str]]] = {}  # by id, which may be used again

    def note(self, module: torch.nn.Module, backend: str) -> None:
        """Takes down that a module ran."""
        # DataParallel makes such copies anew for every batch.
        if getattr(module, "_is_replica", False):
            return
        with self._lock:
            reference, backends = self._latest.get(id(module), (None, set()))
            if reference is None or reference() is not module:
                backends = set()
                self._latest[id(module)] = weakref.ref(module), backends
                self._ran.append(backends)
            backends.add(backend)

    def __str__(self) -> str:
        """One line, as ``fusedrnn: 3 modules ran: 2 on triton, 1 on triton and aten``."""
        order = dispatch.BACKENDS
        counts = Counter(tuple(sorted(backends, key=order.index)) for backends in self._ran)
        parts = [f"{n} on {' and '.join(names)}" for names, n in counts.most_common()]
        total = len(self._ran)
        return f"fusedrnn: {total} module{'' if total == 1 else 's'} ran" + (
            ": " + ", ".join(parts) if parts else ""
        )


_tally = Tally()
_REVEAL = "_i_will_not_complain_if_bc_breaks_VariableTracker"  # of a ComptimeVar


def read(path: str) -> bytes:
    """The source of a program, for ``run``.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return file.read()


def run(target: str, arguments: Sequence[str], source: bytes | None) -> None:
    """Runs a program as ``python target`` or ``python -m target`` would, with ``torch.nn`` patched.

    It ends as the program does: by returning, or with the program's exception. When the process
    ends, one line on stderr says how many modules ran on which backend.

    Args:
        target: the path of a Python file, or the name of a module or package.
        arguments: ``sys.argv[1:]`` of the program.
        source: what the file contains; None says that ``target`` is a name.

    Raises:
        BaseException: whatever the program raises.
    """
    patching.patch()
    modules._Stack.forward = _counting(modules._Stack.forward, functional.run)  # type: ignore[method-assign]
    modules._SingleStep.forward = _counting(  # type: ignore[method-assign]
        modules._SingleStep.forward, functional.run_cell
    )
    # At the very end: after a traceback, and after threads that outlive the main one.
    atexit.register(_report, os.getpid())
    sys.argv = [target, *arguments]
    try:
        if source is None:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            _run_file(target, source)
    except BaseException:
        # Python prints it, for only Python knows every way in which a process ends.
        sys.excepthook = _without_our_frames(sys.excepthook)
        raise


def _run_file(path: str, source: bytes) -> None:
    """What ``runpy.run_path`` does, except that ``sys.argv[0]`` stays as it was typed while
    ``__file__`` is absolute, and that ``__main__`` lasts to the end of the process, for atexit."""
    full = os.path.abspath(path)
    main = types.ModuleType("__main__")
    main.__file__ = full
    main.__loader__ = importlib.machinery.SourceFileLoader("__main__", full)
    main.__dict__["__cached__"] = None
    sys.modules["__main__"] = main
    if not getattr(sys.flags, "safe_path", False):  # python -P, since 3.11
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    exec(compile(source, full, "exec", dont_inherit=True), main.__dict__)


def _counting(forward: Callable, run_call: Callable) -> Callable:
    """A module's ``forward`` that also notes its backend; only a process under ``run`` pays."""

    @functools.wraps(forward)
    def counted(self: Any, input: Any, hx: Any = None, **options: Any) -> Any:
        call = self._prepare(input, hx, **options)
        _note(self, dispatch.choose(call.request))
        return run_call(call)

    return counted


def _note(module: torch.nn.Module, backend: str) -> None:
    if torch.compiler.is_dynamo_compiling():
        comptime(_note_while_tracing)
    else:
        _tally.note(module, backend)


def _note_while_tracing(context: ComptimeContext) -> None:
    """Notes the arguments of ``_note``, which Dynamo traces; it runs once, while compiling.

    Nothing of it is in the graph, and no guard ties the compiled code to this one module, as a
    guard would if the module were an argument of an ordinary call. Dynamo has the module, but
    promises nobody the way to it: where that is another, the module is not counted and the program
    runs all the same.
    """
    reveal = getattr(context.get_local("module"), _REVEAL, None)
    module = getattr(reveal and reveal(), "value", None)
    if isinstance(module, torch.nn.Module):
        _tally.note(module, context.get_local("backend").as_python_constant())


def _report(process: int) -> None:
    """Prints the line, if this is no fork of the process that was started."""
    if os.getpid() == process and sys.__stderr__ is not None:
        sys.__stderr__.write(f"{_tally}\n")


#: The files whose frames stand between Python and the program.
_BETWEEN = (
    __file__,
    os.path.join(os.path.dirname(__file__), "__main__.py"),
    runpy.run_module.__code__.co_filename,
)


def _without_our_frames(shown: Callable) -> Callable:
    """A ``sys.excepthook`` that begins a traceback with the program's first line."""

    def hook(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        while traceback is not None and traceback.tb_frame.f_code.co_filename in _BETWEEN:
            traceback = traceback.tb_next
        shown(kind, error.with_traceback(traceback), traceback)

    return hook
