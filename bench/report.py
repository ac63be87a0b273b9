"""The results on disk, which are the only source of tables and plots, and the tables."""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

import fusedrnn

try:
    from tqdm import tqdm
except ImportError:  # measuring needs torch and triton only
    tqdm = None

from . import UserError
from .providers import PEERS, TORCH, matmul_fp32, rnn_fp32

#: Of results.csv: one line for each case, cell, pass and provider.
COLUMNS = (
    "case", "cell", "pass", "provider", "backend", "dtype", "precision", "layout",
    "T", "B", "I", "H", "layers", "directions", "gate", "share", "error",
    "ms", "p20", "p80", "x", "x_low", "x_high", "rounds", "device_ms",
    "kept_mb", "peak_mb", "plan", "note",
)  # fmt: skip
LOSSES = ("case", "cell", "provider", "step", "loss")
#: The columns of the two tables that runs print, and their widths.
MAIN = {"case": 19, "backend": 7, "error": 5, "forward": 16, "training": 16, "loss": 18}
CASES = {"case": 22, "cell": 4, "provider": 20, "gate": 14, "forward": 22, "training": 22}
LEGENDS = (
    "gate: the largest error as a part of what is allowed; results.csv has a note on what was\n"
    "refused or failed. forward, training: milliseconds, and how many times as fast as torch.nn,\n"
    "which gets a PackedSequence where lengths differ.",
    "Each row is fusedrnn beside torch.nn, from the same weights. error: the largest error of any\n"
    "output or gradient against fp64, as a part of what is allowed. forward, training: how many\n"
    "times as fast as torch.nn, and milliseconds. loss: after the same training, and torch.nn's.",
)


def environment(device: torch.device, data: str) -> dict[str, Any]:
    """Returns what a reader needs to judge or repeat the numbers."""
    cuda = device.type == "cuda"
    cpu = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpu.read_text() if cpu.exists() else "")
    name = f"CPU, {model[1] if model else platform.processor()}"
    installed = {d.metadata["Name"]: d.version for d in distributions()}
    return {
        "device": torch.cuda.get_device_name(device) if cuda else name,
        "data": data,
        "fusedrnn": fusedrnn.__version__,
        "torch": torch.__version__,
        "triton": installed.get("triton"),
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "fp32": rnn_fp32() if cuda else "ieee",
        "matmul_fp32": matmul_fp32() if cuda else "ieee",
        "peers": {n: installed[n] for n in PEERS if n in installed},
        "commit": _commit(),
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _commit() -> str | None:
    """Returns the commit of the measured package, if it is a checkout and git is there."""
    folder, command = Path(fusedrnn.__file__).parent, ["git", "describe", "--always", "--dirty"]
    try:
        git = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return git.stdout.strip() or None


def header(env: dict[str, Any], quick: bool = False) -> str:
    """Returns the lines above every table."""
    software = [f"{name} {env[name]}" for name in ("fusedrnn", "torch", "triton") if env[name]]
    software += [f"cuDNN {env['cudnn']}"] if env["cudnn"] else []
    threads = f"{env['threads']} of {env['cores']} CPU threads"
    lines = [f"device   {env['device']}; {threads}; fp32 as {env['fp32']}"]
    lines += [f"versions {', '.join(software)}, commit {env['commit']}", f"data     {env['data']}"]
    lines += ["quick    tiny sizes: the times mean nothing"] * quick
    return "\n".join([*lines, ""])


class Results:
    """A folder of results; every line is on disk before the next is measured."""

    def __init__(self, folder: Path, env: dict[str, Any], resume: bool = False):
        """Begins a folder, or continues it.

        Raises:
            UserError: it cannot be written.
        """
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "environment.json").write_text(json.dumps(env, indent=2) + "\n")
            for name, columns in (("results.csv", COLUMNS), ("losses.csv", LOSSES)):
                if not (resume and (folder / name).exists()):
                    (folder / name).write_text(",".join(columns) + "\n")
            if not resume:
                (folder / "begun.txt").unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"no results can be written to {folder}: {error.strerror}") from error

    def begin(self, case: str, cell: str) -> None:
        """Notes a case, so that a resumed run skips one that ended the process."""
        with open(self.folder / "begun.txt", "a") as file:
            file.write(f"{case} {cell}\n")

    def add(self, rows: Iterable[dict[str, Any]], trainings: dict[str, Any] | None = None) -> None:
        """Appends rows, and the losses of a case's trainings by provider."""
        rows = list(rows)
        self._append("results.csv", COLUMNS, rows)
        for provider, training in (trainings or {}).items():
            keys = {"case": rows[0]["case"], "cell": rows[0]["cell"], "provider": provider}
            lines = [keys | {"step": n, "loss": x} for n, x in enumerate(training.losses)]
            self._append("losses.csv", LOSSES, lines)

    def _append(self, name: str, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
        with open(self.folder / name, "a", newline="") as file:
            for row in rows:
                short = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
                csv.DictWriter(file, columns, lineterminator="\n").writerow(short)
            file.flush()
            os.fsync(file.fileno())


def row_of(case: Any, mode: str, provider: str) -> dict[str, Any]:
    """Returns the first columns of a line of results.csv."""
    w = case.workload
    return {
        "case": w.name, "cell": case.cell, "pass": mode, "provider": provider, "dtype": w.dtype,
        "layout": "packed" if w.ragged else "padded", "T": w.T, "B": w.B, "I": w.I, "H": w.H,
        "layers": w.layers, "directions": 1 + w.bidirectional,
    }  # fmt: skip


def progress(items: Any) -> Any:
    """Iterates behind a progress bar, if tqdm is installed and stderr is a terminal."""
    return tqdm(items, disable=None, leave=False) if tqdm else items


def say(line: str) -> None:
    """Prints a line above the progress bar."""
    tqdm.write(line) if tqdm else print(line)
    sys.stdout.flush()


def head(trains: bool) -> str:
    widths = MAIN if trains else CASES
    rule = "|".join("-" * (width + 2) for width in widths.values())
    return f"{_line({name: name for name in widths}, widths)}\n|{rule}|"


def _line(cells: dict[str, str], widths: dict[str, int]) -> str:
    return f"| {' | '.join(cells[name].ljust(width) for name, width in widths.items())} |"


def _ms(ms: float) -> str:
    return f"{ms:.3f} ms" if ms < 1 else f"{ms:.2f} ms" if ms < 10 else f"{ms:.1f} ms"


def main_lines(rows: dict, trainings: dict) -> Iterator[str]:
    """Yields the line of the main table for one case and cell."""
    forward, training = (rows["fusedrnn", mode] for mode in ("forward", "training"))

    def speed(row: dict) -> str:
        return f"{row['x']:.2f}x, {_ms(row['ms'])}" if row.get("x") else row["gate"]

    losses = [f"{trainings[p].final_loss:.3g}" for p in ("fusedrnn", TORCH) if p in trainings]
    share = f"{training['share']:.2f}" if "share" in training else "-"
    cells = {
        "case": f"{forward['case']} {forward['cell']}",
        "backend": training.get("backend", "-"),
    }
    cells |= {"error": share, "forward": speed(forward), "training": speed(training)}
    yield _line(cells | {"loss": ", ".join(losses)}, MAIN)


def case_lines(rows: dict, trainings: dict) -> Iterator[str]:
    """Yields a line for each provider of a case."""
    for provider in dict.fromkeys(p for p, _ in rows):
        passes = {mode: row for (p, mode), row in rows.items() if p == provider}
        first, shares = next(iter(passes.values())), [r.get("share", 0) for r in passes.values()]
        gate = next((r["gate"] for r in passes.values() if r["gate"] != "ok"), "ok")
        cells = {"case": first["case"], "cell": first["cell"], "provider": provider}
        cells["gate"] = f"{gate} {max(shares):.2f}" if max(shares) else gate
        for mode in ("forward", "training"):
            row = passes.get(mode, {})
            ms = _ms(row["ms"]) if row.get("ms") else "-"
            cells[mode] = f"{ms}, {row['x']:.2f}x" if row.get("x") else ms
        yield _line(cells, CASES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="a folder with results.csv")
    words = "replace what is between <!-- bench FOLDER --> and <!-- end --> in this file"
    parser.add_argument("--into", type=Path, metavar="FILE", help=words)


def run(options: argparse.Namespace) -> int:
    """Prints torch.nn's time divided by each provider's, or writes the table into a file."""
    import pandas

    try:
        frame = pandas.read_csv(options.folder / "results.csv")
        env = json.loads((options.folder / "environment.json").read_text())
        frame = frame[frame.provider != TORCH].dropna(subset=["x"])
        wide = frame.pivot_table(
            index=["case", "provider"], columns=["cell", "pass"], values="x", sort=False
        ).reset_index()
        wide.columns = [" ".join(name).strip() for name in wide.columns]
        caption = f"{env['device']}, {env['threads']} threads, torch {env['torch']}, {env['date']}"
        page = options.into.read_text() if options.into else ""
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{options.folder} has no results that can be read: {error}") from error
    table = wide.to_markdown(index=False, floatfmt=".2f", missingval="-")
    text = f"{table}\n\n{caption}: `{env['command']}`"
    if options.into is None:
        print(text)
        return 0
    begin = f"<!-- bench {options.folder.as_posix()} -->"
    region = re.compile(f"({re.escape(begin)}\n).*?(\n<!-- end -->)", re.DOTALL)
    if not region.search(page):
        raise UserError(f"{options.into} has no region that begins with {begin}")
    options.into.write_text(region.sub(lambda m: m[1] + text + m[2], page))
    return 0
