"""Commands of fusedrnn."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .kernels.plan import CHIPS
from .kernels.spec import SPECS


def main(arguments: Sequence[str]) -> None:
    """Parses a command line (without ``python -m fusedrnn``) and runs it.

    Raises:
        SystemExit: it is wrong (code 2) or asks for help, or the program that it runs ends so.
    """
    parser = argparse.ArgumentParser(prog="python -m fusedrnn", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_run, _add_study):
        add(commands)
    options = parser.parse_args(arguments)
    options.command(options)


def _add_run(commands: Any) -> None:
    text = (
        "Runs a Python program as python does, but torch.nn.LSTM, GRU, RNN and their cells are "
        "fusedrnn's. At the end a line on stderr says how many of them ran on which backend."
    )
    parser = commands.add_parser(
        "run", help="run a program with torch.nn patched", description=text
    )
    parser.add_argument("-m", dest="as_module", action="store_true", help="run a module by name")
    parser.add_argument("target", metavar="script.py", help="the program, or with -m its name")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the program")
    parser.set_defaults(command=_run, fail=parser.error)


def _run(options: argparse.Namespace) -> None:
    # Imported late, because it takes seconds and --help should not.
    from . import run

    if not options.as_module and not os.access(options.target, os.R_OK):
        options.fail(f"cannot read the file {options.target!r}")
    run.run(options.target, options.arguments, options.as_module)


def _add_study(commands: Any) -> None:
    from . import study

    text = (
        "Compiles the kernels of a layer or stack for a GPU, which need not be there. Prints the "
        "plan and its reasons, the resources of each binary, the instructions of its loop over "
        "time and the modelled time of a step. docs/kernels.md explains how to read it."
    )
    parser = commands.add_parser(
        "study", help="show which kernels a layer becomes", description=text
    )
    add = parser.add_argument
    add("--cell", choices=list(SPECS), default="lstm")
    add("--hidden", type=_positive, required=True, metavar="H", help="units")
    add("--input", type=_positive, metavar="I", help="columns of the input (as --hidden)")
    add("--batch", type=_positive, default=16, metavar="B", help="sequences (16)")
    add("--directions", type=int, choices=(1, 2), default=1)
    add("--bidirectional", dest="directions", action="store_const", const=2)
    add("--layers", type=_positive, default=1, metavar="L", help="(1)")
    add("--dtype", choices=list(study.DTYPES), default="bf16", help="(bf16)")
    add("--precision", choices=study.PRECISIONS, default="tf32", help="of fp32 products (tf32)")
    add("--arch", choices=list(CHIPS), default="sm_90", help="(sm_90)")
    add("--schedule", choices=study.SCHEDULES, help="instead of the one the plan chooses")
    add("--out", type=Path, metavar="DIR", help="(study/, and a folder named after the rest)")
    parser.set_defaults(command=_study, fail=parser.error)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


_positive.__name__ = "positive number"  # argparse prints the name


def _study(options: argparse.Namespace) -> None:
    from . import study

    try:
        for paragraph in study.run(options):
            sys.stdout.write(f"{paragraph}\n\n")
            sys.stdout.flush()
    except study.UsageError as error:
        options.fail(str(error))
    except BrokenPipeError:  # `study ... | head` has closed the pipe
        # Python would raise once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main(sys.argv[1:])
