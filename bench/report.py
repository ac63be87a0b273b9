"""The header and the table that the main job prints."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fusedrnn
from fusedrnn.dispatch import precision

from .results import Row

WIDTH = 120


def environment(device: torch.device, data: str) -> dict[str, object]:
    """What a reader needs to judge the numbers, or to repeat them."""
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
        # One getter for torch's older and newer switches; see fusedrnn.dispatch.precision.
        "fp32": precision() if cuda else "ieee",
        "matmul_fp32": matmul_fp32() if cuda else "ieee",
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def matmul_fp32() -> str:
    """torch's switch for products; it is "none" where nobody has set it, and then ieee."""
    switch = torch.backends.cuda.matmul.fp32_precision
    return "ieee" if switch == "none" else switch


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
    """The commit of the checkout, if this is one and git is there."""
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def header(env: dict[str, object]) -> str:
    """Three lines above the table."""
    software = [f"{name} {env[name]}" for name in ("fusedrnn", "torch", "triton") if env[name]]
    if env["cudnn"]:
        software += [f"CUDA {env['cuda']}", f"cuDNN {env['cudnn']}"]
    return "\n".join(
        (
            f"device   {env['device']}; {env['threads']} of {env['cores']} CPU threads; "
            f"fp32 as {env['fp32']} (matmul {env['matmul_fp32']})",
            f"versions {', '.join(software)}, Python {env['python']}",
            f"data     {env['data']}",
        )
    )


_HEADINGS = (
    f"{'workload':<14} {'cell':<4} {'provider':<16} {'gate':>7} {'forward ms':>19} {'x':>5} "
    f"{'fw+bw ms':>19} {'x':>5} {'loss':>7} {'test':>6} {'|dloss|':>7}"
)
LEGEND = """\
gate: every output and gradient against fp64; the largest error as a part of the allowed one.
ms: median and 20th-80th percentile; x: median over the rounds of torch.nn's time / this one's.
loss: mean of the last tenth of the steps; test: accuracy, or root mean square error of a forecast.
|dloss|: largest distance of the loss curve from torch.nn's at any step. An LSTM leaving a plateau
amplifies rounding: torch.nn's own curves part as far when one weight is moved by one ulp."""


def table_head() -> str:
    return f"{_HEADINGS}\n{'-' * len(_HEADINGS)}"


def table_line(row: Row) -> str:
    """One row of at most 120 characters; where there are no numbers, the reason.

    Where our kernels ran, a second one: which schedule, and the modelled floor of the times.
    """
    by_auto = row.provider == "fusedrnn" and row.backend
    provider = f"fusedrnn ({row.backend})" if by_auto else row.provider
    gate = "" if row.gate == "yardstick" else row.gate
    if row.share is not None:
        gate += f" {row.share:.2f}"
    start = f"{row.workload:<14} {row.cell:<4} {provider:<16} {gate:>7} "
    if not row.has_numbers:
        return (start + row.note)[:WIDTH]
    cells = (
        clock_cell(row.fw_ms, row.fw_ms_p20, row.fw_ms_p80),
        number_cell(row.fw_speedup, ".2f", 5),
        clock_cell(row.fwbw_ms, row.fwbw_ms_p20, row.fwbw_ms_p80),
        number_cell(row.fwbw_speedup, ".2f", 5),
        number_cell(row.final_loss, ".4f" if (row.final_loss or 1) >= 1e-3 else ".1e", 7),
        number_cell(row.test, _METRIC_FORMAT.get(row.metric, ""), 6),
        number_cell(row.loss_difference, ".0e" if row.loss_difference else ".0f", 7),
    )
    line = start + " ".join(cells)
    if row.fw_floor_ms is None or row.fwbw_floor_ms is None:
        return line
    floors = f"{ms_text(row.fw_floor_ms)} ms, with backward {ms_text(row.fwbw_floor_ms)} ms"
    return f"{line}\n{'':<21}{row.plan}; floor (modelled): {floors}"[: len(line) + 1 + WIDTH]


_METRIC_FORMAT = {"accuracy": ".1%", "rmse": ".4f"}


def training_line(row: Row) -> str:
    """What a short training came to, where that has no columns of its own."""
    loss = number_cell(row.final_loss, ".4f" if (row.final_loss or 1) >= 1e-3 else ".1e", 0)
    test = number_cell(row.test, _METRIC_FORMAT.get(row.metric, ""), 0)
    apart = "" if row.loss_difference is None else f", |dloss| {row.loss_difference:.0e}"
    return f"trained {row.steps} steps: loss {loss}, test {test}{apart}"


def number_cell(value: float | None, form: str, width: int) -> str:
    return f"{'' if value is None else format(value, form):>{width}}"


def clock_cell(p50: float | None, p20: float | None, p80: float | None) -> str:
    if p50 is None or p20 is None or p80 is None:
        return " " * 19
    return f"{ms_text(p50):>6} {f'{ms_text(p20)}-{ms_text(p80)}':>12}"


def ms_text(ms: float) -> str:
    """Milliseconds in at most six places."""
    return f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"
