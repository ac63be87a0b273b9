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
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fusedrnn

try:
    from tqdm import tqdm
except ImportError:  # measuring needs torch and triton only
    tqdm = None

from . import UserError
from .cases import Workload
from .providers import TORCH, matmul_fp32, peer_versions, rnn_fp32

HELP = "print the tables of a results folder, or write them into a Markdown file"
OPTIONS: tuple[str, ...] = ()
#: Of results.csv: one line for each case, cell, pass and provider.
COLUMNS = (
    "case", "cell", "pass", "provider", "backend", "dtype", "precision", "layout",
    "T", "B", "I", "H", "layers", "directions", "gate", "share", "error",
    "ms", "p20", "p80", "x", "x_low", "x_high", "rounds", "device_ms",
    "kept_mb", "peak_mb", "plan", "note",
)  # fmt: skip
#: Of losses.csv, and of training.csv.
LOSSES = ("case", "cell", "provider", "step", "loss")
TRAINING = ("case", "cell", "provider", "steps", "final_loss", "difference", "metric", "test")
#: The table of the main job, and the widths of its columns.
MAIN = {"case": 19, "backend": 7, "error": 5, "forward": 16, "training": 16, "loss": 15}
LEGEND = """\
Each row is fusedrnn beside torch.nn, from the same weights. error: the largest error of all outputs
and gradients against fp64, as a part of what is allowed. forward, training: how many times as fast
as torch.nn, and milliseconds. loss: at the end of the same training, and torch.nn's."""


def environment(device: torch.device, data: str) -> dict[str, Any]:
    """Returns what a reader needs to judge or repeat the numbers."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {_cpu_name()}",
        "data": data,
        "fusedrnn": fusedrnn.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "fp32": rnn_fp32() if cuda else "ieee",
        "matmul_fp32": matmul_fp32() if cuda else "ieee",
        "peers": peer_versions(),
        "commit": _commit(),
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Returns the commit of the measured package, if it is a checkout and git is there."""
    folder = Path(fusedrnn.__file__).parent
    command = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def header(env: dict[str, Any]) -> str:
    """Returns the lines above every table."""
    software = [f"{name} {env[name]}" for name in ("fusedrnn", "torch", "triton") if env[name]]
    software += [f"cuDNN {env['cudnn']}"] if env["cudnn"] else []
    threads = f"{env['threads']} of {env['cores']} CPU threads"
    return (
        f"device   {env['device']}; {threads}; fp32 as {env['fp32']}\n"
        f"versions {', '.join(software)}, commit {env['commit']}\n"
        f"data     {env['data']}"
    )


class Results:
    """A folder of results; every line is on disk before the next is measured."""

    def __init__(self, folder: Path, env: dict[str, Any], resume: bool = False):
        """Begins a folder, or continues it.

        Raises:
            UserError: it cannot be written.
        """
        self.folder = folder
        files = {"results.csv": COLUMNS, "losses.csv": LOSSES, "training.csv": TRAINING}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "environment.json").write_text(json.dumps(env, indent=2) + "\n")
            for name, columns in files.items():
                if not (resume and (folder / name).exists()):
                    with open(folder / name, "w", newline="") as file:
                        csv.writer(file).writerow(columns)
        except OSError as error:
            raise UserError(f"no results can be written to {folder}: {error.strerror}") from error

    def add(self, rows: Iterable[dict[str, Any]], name: str = "results.csv") -> None:
        columns = {"losses.csv": LOSSES, "training.csv": TRAINING}.get(name, COLUMNS)
        with open(self.folder / name, "a", newline="") as file:
            writer = csv.DictWriter(file, columns)
            for row in rows:
                writer.writerow(
                    {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
                )
            file.flush()
            os.fsync(file.fileno())


def row_of(workload: Workload, cell: str, mode: str, provider: str, **values: Any) -> dict:
    """Returns a line of results.csv."""
    return {
        "case": workload.name, "cell": cell, "pass": mode, "provider": provider,
        "dtype": workload.dtype, "layout": "packed" if workload.ragged else "padded",
        "T": workload.T, "B": workload.B, "I": workload.I, "H": workload.H,
        "layers": workload.layers, "directions": 1 + workload.bidirectional,
    } | values  # fmt: skip


def progress(items: Any) -> Any:
    """Iterates behind a progress bar, if tqdm is installed and stderr is a terminal."""
    return tqdm(items, disable=None, leave=False) if tqdm else items


def say(line: str) -> None:
    """Prints a line above the progress bar."""
    tqdm.write(line) if tqdm else print(line)
    sys.stdout.flush()


def ms_text(ms: float) -> str:
    return f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 10 else f"{ms:.1f}"


def main_line(rows: list[dict], trainings: list[dict]) -> dict[str, str]:
    """Returns a row of the main table for one case and cell."""
    ours = {r["pass"]: r for r in rows if r["provider"] == "fusedrnn"}
    losses = {t["provider"]: t["final_loss"] for t in trainings}
    forward, training = ours["forward"], ours["training"]

    def speed(row: dict) -> str:
        return f"{row['x']:.2f}x, {ms_text(row['ms'])} ms" if row.get("x") else row["gate"]

    loss = [f"{losses[p]:.2g}" for p in ("fusedrnn", TORCH) if p in losses]
    return {
        "case": f"{forward['case']} {forward['cell']}", "backend": training["backend"] or "-",
        "error": f"{training['share']:.2f}" if training.get("share") else "-",
        "forward": speed(forward), "training": speed(training), "loss": ", ".join(loss) or "-",
    }  # fmt: skip


def table_line(cells: dict[str, str], widths: dict[str, int] = MAIN) -> str:
    return f"| {' | '.join(cells[name].ljust(width) for name, width in widths.items())} |"


def table_head(widths: dict[str, int] = MAIN) -> str:
    rule = "|".join("-" * (width + 2) for width in widths.values())
    return f"{table_line(dict.fromkeys(widths) | {n: n for n in widths}, widths)}\n|{rule}|"


def speed_table(frame: Any) -> str:
    """Returns torch.nn's time divided by each provider's; above 1 is faster than torch.nn."""
    frame = frame[frame.provider != TORCH].dropna(subset=["x"])
    several = frame.provider.nunique() > 1
    columns = (["provider"] if several else []) + ["cell", "pass"]
    wide = frame.pivot_table(index="case", columns=columns, values="x", sort=False)
    wide.columns = [" ".join(name) for name in wide.columns]
    return wide.to_markdown(floatfmt=".2f")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="a folder with results.csv")
    parser.add_argument(
        "--into", type=Path, metavar="FILE",
        help="replace what is between <!-- bench FOLDER --> and <!-- end --> in this file",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Prints the table of speeds, or writes it into a file."""
    import pandas

    try:
        frame = pandas.read_csv(options.folder / "results.csv")
        env = json.loads((options.folder / "environment.json").read_text())
        table = speed_table(frame)
        caption = f"{env['device']}, {env['threads']} threads, torch {env['torch']}, {env['date']}"
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{options.folder} holds no readable results: {error}") from error
    text = f"{table}\n\n{caption}: `{env.get('command', '')}`"
    if options.into is None:
        print(text)
        return 0
    begin = f"<!-- bench {options.folder.as_posix()} -->"
    page = options.into.read_text() if options.into.exists() else ""
    pattern = re.compile(f"({re.escape(begin)}\n).*?(\n<!-- end -->)", re.DOTALL)
    if not pattern.search(page):
        raise UserError(f"{options.into} has no region that begins with {begin}")
    options.into.write_text(pattern.sub(lambda m: m[1] + text + m[2], page))
    return 0
