"""Commands of fusedrnn."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .kernels.plan import CHIPS
from .kernels.spec import SPECS

_RUN = """\
Runs a Python program as python itself would, except that torch.nn.LSTM, GRU, RNN and their cells
are fusedrnn's. At the end one line on stderr says how many of them ran on which backend."""
_STUDY = """\
Compiles the kernels of a layer or stack for a GPU, which need not be there, and prints the plan and
why, what each binary needs, the instructions of its loop over time, and the modelled floor of a
step. Every form from Triton's to the assembler's is written into a folder; docs/kernels.md teaches
how to read it."""


def main(arguments: Sequence[str]) -> None:
    """Parses a command line (without ``python -m fusedrnn``) and runs it.

    Raises:
        SystemExit: it is wrong (code 2) or asks for help, or the program that it runs ends so.
    """
    parser = argparse.ArgumentParser(prog="python -m fusedrnn", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    own, rest = _split(arguments)
    options = parser.parse_args(own)
    options.arguments = rest
    options.command(options)


def _split(arguments: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Ours, and what is the program's own: all that follows its name, be it ``-m`` or ``--``."""
    if not arguments or arguments[0] != "run":
        return arguments, []
    names = (i for i in range(1, len(arguments)) if not arguments[i].startswith("-"))
    end = next(names, len(arguments)) + 1
    return arguments[:end], arguments[end:]


def _add_run(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        help="run a program with torch.nn's LSTM, GRU, RNN and cells replaced",
        description=_RUN,
        usage="%(prog)s [-h] script.py [argument ...]\n"
        "       %(prog)s [-h] -m module [argument ...]",
    )
    parser.add_argument("-m", dest="as_module", action="store_true", help="as of python")
    parser.add_argument("target", metavar="script.py or module", help="the program")
    parser.set_defaults(command=_run, fail=parser.error)


def _run(options: argparse.Namespace) -> None:
    # Imported late, for it takes seconds and --help should not.
    from . import run

    source = None
    if not options.as_module:
        try:
            source = run.read(options.target)
        except OSError as error:
            options.fail(f"can't open file {options.target!r}: {error.strerror}")
    run.run(options.target, options.arguments, source)


def _add_study(commands: Any) -> None:
    from . import study

    parser = commands.add_parser(
        "study", help="see what kernels a layer becomes; no GPU is needed", description=_STUDY
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


_positive.__name__ = "positive number"  # by which argparse calls it


def _study(options: argparse.Namespace) -> None:
    from . import study

    try:
        for paragraph in study.run(options):
            sys.stdout.write(f"{paragraph}\n\n")
            sys.stdout.flush()
    except study.Refused as reason:
        sys.stderr.write(f"{reason}\n")
        raise SystemExit(2) from None
    except BrokenPipeError:  # `study ... | head`: the reader has what it wants
        # What is still in the buffer would raise once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


#: A command adds its parser and names the function that runs it with the parsed options.
COMMANDS: tuple[Callable[[Any], None], ...] = (_add_run, _add_study)

if __name__ == "__main__":
    main(sys.argv[1:])
