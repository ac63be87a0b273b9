"""The figure of a step on rungs 3 and 4, as the predictor has it."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch

from fusedrnn.kernels import steptime
from fusedrnn.kernels.plan import SCHEDULES
from fusedrnn.kernels.problem import CHIPS, Problem

ARCH = "sm_90"
COLOURS = {
    "issues instructions": "#2e86ab", "products": "#1b998b", "waits for shared memory": "#f4a261",
    "stands at a barrier": "#d1495b", "waits for something else": "#bbbbbb",
}  # fmt: skip
ISSUES, PRODUCTS, SHARED, BARRIER, OTHER = COLOURS
CAUSES = {"issuing": ISSUES, "fixed latency": ISSUES, "barrier": BARRIER, "pipe: tensor": PRODUCTS}
CAUSES["wait: shared memory"] = SHARED
BINS, LEFT, BIN, ROW = 160, 240, 4, 15
RIGHT, MOTION = LEFT + BINS * BIN, 'dur="16s" repeatCount="indefinite"'
HEAD = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {RIGHT + 12} 395"
 font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#ffffff"/>"""
NOTE = "Predicted by kernels/steptime.py for an H100, not measured: LSTM, bf16, H = 128, 8 rows."


def states(schedule: str, cycles: float) -> tuple[steptime.Prediction, list[list[str]]]:
    """Returns the prediction, and for each warp what it does in each bin of so many cycles."""
    from fusedrnn.kernels.compile import compile_plan

    problem, chip = Problem("lstm", 128, 64, 1, torch.bfloat16, "tf32", True), CHIPS[ARCH]
    (kernel,) = compile_plan(problem, SCHEDULES[schedule](problem, chip), chip, ("forward",))
    step = kernel.predict(ARCH)
    width = (cycles or step.cycles) / BINS
    rows = [[OTHER] * BINS for _ in range(step.warps)]
    for warp, *times, cause, _ in step.spans:
        first, last = (min(max(round((t - step.begin) / width), 0), BINS) for t in times)
        rows[warp][first:last] = [CAUSES.get(cause, OTHER)] * (last - first)
    return step, rows


def panel(top: int, title: str, holds: str, rows: list[list[str]]) -> Iterator[str]:
    """Yields for each warp where its W_hh lies, a lamp, and what it does over time."""
    yield f'<text x="12" y="{top}" font-size="14" font-weight="bold">Rung {title}</text>'
    for warp, row in enumerate(rows):
        y, units = top + 12 + warp * ROW, holds.format(16 * warp, 16 * warp + 15)
        yield f'<text x="12" y="{y + 10}">warp {warp}: W_hh {units}</text>'
        values = ";".join(COLOURS[state] for state in row)
        lamp = f'<animate attributeName="fill" values="{values}" calcMode="discrete" {MOTION}/>'
        yield f'<circle cx="{LEFT - 14}" cy="{y + 6}" r="5" fill="none">{lamp}</circle>'
        for state, bins in groupby(range(BINS), key=row.__getitem__):
            first, *more = bins
            place = f'x="{LEFT + first * BIN}" y="{y}" width="{(1 + len(more)) * BIN}"'
            yield f'<rect {place} height="{ROW - 3}" fill="{COLOURS[state]}"/>'
    move = f'<animate attributeName="x" from="{LEFT}" to="{RIGHT}" {MOTION}/>'
    yield f'<rect y="{top + 8}" width="1" height="126">{move}</rect>'


def draw(path: Path) -> None:
    """Writes an animated SVG."""
    lines, cycles = [HEAD], 0.0
    panels = (24, "resident", "in shared memory"), (190, "resident_nvidia", "of units {} to {}")
    for rung, (top, name, holds) in enumerate(panels, 3):
        step, rows = states(name, cycles)
        cycles = cycles or step.cycles  # of the first: both panels show the same time
        title = f"{rung}, {name}: {step.cycles:.0f} cycles a step; barriers: {step.barriers:g}"
        lines += panel(top, title, holds, rows)
    for n, (name, colour) in enumerate(COLOURS.items()):
        x, y = 12 + n % 3 * 270, 344 + n // 3 * 18
        lines.append(f'<text x="{x}" y="{y}" fill="{colour}">&#9632; {name}</text>')
    lines += [f'<text x="12" y="386" fill="#555555">{NOTE}</text>', "</svg>\n"]
    path.write_text("\n".join(lines))
