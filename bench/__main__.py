"""``python -m bench``: fusedrnn beside torch.nn, from the same weights and on the same inputs."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import gates, gpu, imdb, modelled, plots, ragged, text
from .archives import DataError
from .cases import CELLS, Workload, lessons
from .imdb import Corpus
from .progress import Progress
from .providers import names_for
from .report import LEGEND, environment, header, table_head, table_line
from .results import FolderError, Results
from .run import Settings, measure

#: Lessons of their own kind, with a table of their own.
SHORT = ("ragged", "text", "gates")
DEFAULT_FOLDER = Path(__file__).parent / "results" / "local"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a red gate, 2 for what the user can put right."""
    options = _parser().parse_args(argv)
    try:
        if options.lesson == "gpu":
            return gpu.run(options.minutes, options.out, quick=options.quick, seed=options.seed)
        if options.lesson == "model":
            modelled.write(options.out or DEFAULT_FOLDER)
            return 0
        if options.lesson in SHORT:
            return _short(options)
        return run_lessons(options)
    except (DataError, FolderError, gpu.NoDeviceError) as error:
        print(f"{options.prog}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.set_defaults(prog=parser.prog)
    add = parser.add_argument
    add(
        "lesson",
        nargs="?",
        choices=("all", "imdb", "sine", *SHORT, "gpu", "model"),
        default="all",
        help="what to run; all is imdb and sine; ragged: sequences of unequal length beside "
        "torch.nn's two ways; text: a language model that learns and speaks, token by token; "
        "gates: an LSTM's gates while it follows a sine; gpu: the kernel tests and a sweep on a "
        "CUDA machine; model: the floors of a step by arithmetic (default: all)",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    add("--imdb", metavar="PATH", help="imdb.npz or aclImdb_v1.tar.gz; also FUSEDRNN_IMDB")
    add("--download", action="store_true", help="fetch imdb.npz (17 MB) if it is not at hand")
    add("--out", type=Path, metavar="DIR", help="where CSV and PNG go")
    add("--seed", type=int, default=0, help="of weights, order of examples and dropout")
    add("--quick", action="store_true", help="tiny sizes: tests the machinery, measures nothing")
    add("--minutes", type=float, default=9, help="time for gpu (default: 9)")
    return parser


def _short(options: argparse.Namespace) -> int:
    """What needs no data."""
    out, device = options.out or DEFAULT_FOLDER, pick_device(options.device)
    if options.lesson == "gates":
        return gates.run(out, seed=options.seed, quick=options.quick)
    if options.lesson == "ragged":
        return ragged.run(out, device, quick=options.quick, seed=options.seed)
    return text.run(out, quick=options.quick, seed=options.seed, device=device)


def run_lessons(options: argparse.Namespace) -> int:
    """The lessons of IMDB and sine: header, table and files."""
    started = time.monotonic()
    device = pick_device(options.device)
    names = ("imdb", "sine") if options.lesson == "all" else (options.lesson,)
    workloads = lessons(names, options.quick)
    corpus = _corpus(workloads, options)
    settings = Settings(device, options.seed)
    if options.quick:
        settings = Settings(device, options.seed, seconds=0.0, least_rounds=2)
    env = environment(device, corpus.source if corpus else "sine and price series, computed")
    results = Results(options.out or DEFAULT_FOLDER, env)
    cut = "\nquick    tiny sizes: none of these numbers means anything" if options.quick else ""
    print(f"{header(env)}{cut}\n\n{table_head()}", flush=True)

    progress = Progress(_steps(workloads, device))
    complaints = []
    for workload in workloads:
        for cell in CELLS:
            measured = measure(workload, cell, settings, corpus, progress)
            results.add(measured.rows, measured.losses)
            complaints += measured.complaints
            for row in measured.rows:
                progress.say(table_line(row))
    progress.close()
    print(f"\n{LEGEND}")
    for workload in workloads:
        steps = workload.steps_on(device)
        print(f"{workload.name}: {workload.shape}, {steps} training steps")
    print(f"\n{time.monotonic() - started:.0f} s; {plots.draw(results.folder)}")
    for line in complaints:
        print(line, file=sys.stderr)
    return 1 if complaints else 0


def pick_device(name: str) -> torch.device:
    """The device of ``--device``.

    Raises:
        gpu.NoDeviceError: CUDA was named and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise gpu.NoDeviceError("--device cuda needs a GPU, and torch sees none")
    has_gpu = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if has_gpu else "cpu")


def _corpus(workloads: Sequence[Workload], options: argparse.Namespace) -> Corpus | None:
    if not any(w.vocabulary for w in workloads):
        return None
    # Twice what is used: the reviews of a split are drawn from more, as from the real file.
    needed = 2 * max(max(w.train, w.test) for w in workloads)
    return imdb.load(
        options.imdb, download=options.download, seed=options.seed, reviews=min(needed, 25_000)
    )


def _steps(workloads: Sequence[Workload], device: torch.device) -> int:
    """Training steps of the whole run, which is what the progress bar counts."""
    return sum(
        len(CELLS)
        * w.steps_on(device)
        * sum(w.train_reference or name != "fusedrnn torch" for name in names_for(w, device))
        for w in workloads
    )


if __name__ == "__main__":
    sys.exit(main())
