"""Runs a command as a process group of its own that ends at its limit, whatever it is doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

#: The root of the checkout, from which every command runs.
ROOT = Path(__file__).resolve().parent.parent
#: Becomes the command after asking Linux to be killed when its parent (the first word) dies: a run
#: that is killed must not leave its stage on the GPU. 1 is PR_SET_PDEATHSIG, 9 SIGKILL.
_LAUNCHER = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
os.getppid() == int(sys.argv[1]) or sys.exit("the parent has gone")
os.execvp(sys.argv[2], sys.argv[2:])
"""
#: From a request to end to being killed, and from that to being given up.
_GENTLY, _PATIENCE = 2.0, 10.0


class Stopped(Exception):  # noqa: N818, it is a wish and no error
    """SIGTERM or SIGINT has arrived; ``signum`` says which."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Ended(NamedTuple):
    """``why`` is empty for a process that ended by itself, with ``code``."""

    code: int | None
    why: str
    seconds: float


class Signals:
    """Remembers the first SIGTERM or SIGINT for as long as the block lasts."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> Signals:
        names = (signal.SIGTERM, signal.SIGINT)
        self._before = {name: signal.signal(name, self._note) for name in names}
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _note(self, signum: int, _frame: object) -> None:
        self.received = self.received or signum

    def check(self) -> None:
        """Raises ``Stopped`` if a signal has arrived."""
        if self.received is not None:
            raise Stopped(self.received)


def supervise(
    command: Sequence[str],
    log: Path | None,
    seconds: float,
    signals: Signals,
    *,
    extra: Mapping[str, str] | None = None,
    complaint: Callable[[], str] = lambda: "",
) -> Ended:
    """Runs a command from the root of the checkout.

    Args:
        command: what to run.
        log: a text file that the output is added to; None leaves it where ours goes.
        seconds: the limit; beyond it the whole process group is killed.
        signals: asked all the time; on one, the group is ended and ``Stopped`` raised.
        extra: environment variables beside the present ones.
        complaint: asked all the time; when it says something, the group is killed for it.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    started = time.monotonic()
    with open(log, "a") if log else nullcontext() as file:
        process = subprocess.Popen(
            [*_launcher(), *command],
            cwd=ROOT,
            env=environment | dict(extra or {}),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT if log else None,
            start_new_session=True,
        )
        why = ""
        try:
            while process.poll() is None and not why:
                signals.check()
                if time.monotonic() - started > seconds:
                    why = f"stopped after {seconds:.0f} s"
                why = why or complaint()
                time.sleep(0.05)
        finally:
            _end(process)
    return Ended(process.returncode, why, time.monotonic() - started)


def _launcher() -> list[str]:
    if sys.platform != "linux":
        return []
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())]


def _end(process: subprocess.Popen) -> None:
    """Ends what is left of the group. Who waits for a lost GPU obeys not even SIGKILL."""
    for signum, patience in ((signal.SIGTERM, _GENTLY), (signal.SIGKILL, _PATIENCE)):
        if process.poll() is None:
            _signal_group(process, signum)
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
    _signal_group(process, signal.SIGKILL)  # what the first process may have started


def _signal_group(process: subprocess.Popen, signum: int) -> None:
    try:
        os.killpg(process.pid, signum)
    except ProcessLookupError:
        return
