"""README's and a page's tables of the newest results: ``make tables`` writes them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from .disk import whole_rows
from .targets import geomean

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "benchmarking.md"
RESULTS = Path(__file__).resolve().parent / "results"
END = "<!-- end -->\n"
NOTHING = "No GPU has been measured yet: `make gpu`, then `make tables` ([how](docs/gpu.md)).\n"
NO_PEERS = (
    "No peers have been measured yet: `make peers ARGS='--out bench/results/cpu-DATE-peers'`.\n"
)
NO_CPU = "No CPU has been measured yet: `python -m bench cpu --out bench/results/cpu-DATE`.\n"
#: The columns of the GPU's table, all at one batch and dtype.
SIZES, BATCH, DTYPE = (64, 256, 1024), 16, "bfloat16"
#: T, layers, directions and layout of its rows; the sweep has others too.
SHAPE = ("512", "1", "1", "padded")
_MODES = {"fw": "forward", "fwbw": "with backward"}
#: README's lines of the CPU's table: what is said, and the case, pass and backend of cpu.csv. None:
#: every lesson, by geometric mean and least.
_LINES = (
    ("the lessons, forward", None, "forward", ""),
    ("the lessons, training", None, "training", ""),
    ("IMDB one-hot, training", "imdb-one-hot", "training", ""),
    ("sine, T = 100, training", "sine-100", "training", ""),
    ("`stream`, a step", "decode", "step", "stream"),
    ("`lengths` beside packed, T = 500, training", "lengths", "training", ""),
    ("`TokenLSTM` beside one-hot rows, forward", "tokens", "forward", ""),
    ("`TokenLSTM` beside one-hot rows, training", "tokens", "training", ""),
)


def newest(results: Path = RESULTS) -> Path | None:
    """The folder whose run on a GPU began last, of those that have a sweep."""
    found = []
    for path in results.glob("*/environment.json"):
        env = json.loads(path.read_text())
        if not env.get("device", "CPU").startswith("CPU") and _sweep(path.parent):
            found.append((env["date"], path.parent.name, path.parent))
    return max(found)[-1] if found else None


def gpu_table(results: Path = RESULTS) -> str:
    """The rows in Markdown under a line that says where they come from, or one sentence."""
    folder = newest(results)
    if folder is None:
        return NOTHING
    env = json.loads((folder / "environment.json").read_text())
    rows = _sweep(folder)
    T = {row["T"] for row in rows.values()}
    where = f"{env['device']}, {env['date'][:10]}, torch {env['torch']}, B = {BATCH}, bf16, T = "
    head = f"{where}{'/'.join(sorted(T))}: ms (times as fast as torch.nn)"
    lines = [f"| {head} | {' | '.join(f'H = {H}' for H in SIZES)} |", "|---" * 4 + "|"]
    for cell in ("lstm", "gru"):
        for mode, words in _MODES.items():
            cells = (_cell(rows.get((cell, str(H))), mode) for H in SIZES)
            lines.append(f"| {cell.upper()} {words} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _sweep(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    """Our rows of the sweep at the table's batch and dtype, by cell and H; the last of each."""
    return {
        (row["cell"], row["H"]): row
        for row in whole_rows(folder / "results.csv")
        if (row["lesson"], row["provider"]) == ("sweep", "fusedrnn triton")
        and (row["B"], row["dtype"]) == (str(BATCH), DTYPE)
        and (row["T"], row["layers"], row["directions"], row["layout"]) == SHAPE
    }


def _cell(row: dict[str, str] | None, mode: str) -> str:
    if row is None:
        return "not measured"
    if row["gate"] != "ok":
        return row["gate"]
    return f"{float(row[f'{mode}_ms']):.3g} ({float(row[f'{mode}_speedup']):.2f})"


def cpu_table(results: Path = RESULTS) -> str:
    """Times and memory on the CPU, of the newest folder of ``python -m bench cpu``."""
    folder = max((path.parent for path in results.glob("cpu-*/cpu.csv")), default=None)
    if folder is None:
        return NO_CPU
    env = json.loads((folder / "environment.json").read_text())
    rows, memory = whole_rows(folder / "cpu.csv"), whole_rows(folder / "memory.csv")
    where = f"torch.nn's time / ours; {env['device']}, {env['threads']} threads, {env['date'][:10]}"
    lines = [f"| {where}, torch {env['torch']} | LSTM | GRU | RNN |", "|---" * 4 + "|"]
    for words, case, what, backend in _LINES:
        cells = [_speedup(rows, case, cell, what, backend) for cell in ("lstm", "gru", "rnn")]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    head = "kept for backward, MiB: torch.nn, default, `recompute=True` (its time / the default's)"
    lines += ["", f"| {head} | LSTM | GRU |", "|---" * 3 + "|"]
    for case in dict.fromkeys(row["case"] for row in memory):
        cells = [
            "{torch_MiB}, {default_MiB}, {recompute_MiB} ({recompute_x_time})".format(**row)
            for row in memory
            if row["case"] == case
        ]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _speedup(rows: list[dict[str, str]], case: str | None, cell: str, what: str, by: str) -> str:
    others = ("decode", "lengths", "tokens")
    meant = [
        row
        for row in rows
        if (row["cell"], row["what"]) == (cell, what)
        and row["case"].startswith(case or "")
        and (case is not None or not row["case"].startswith(others))
        and not row["case"].endswith("from tokens")
        and (not by or row["backend"] == by)
    ]
    if any(row.get("gate") == "red" for row in meant):
        return "red"
    found = [float(row["x"]) for row in meant]
    if not found:
        return "-"
    if case is None:
        return f"{geomean(found):.2f} (least {min(found):.2f})"
    return f"{found[0]:.2f}"


def peers_table(results: Path = RESULTS, kind: str = "peers") -> str:
    """Everybody's times on the CPU as parts of torch.nn's, of the newest folder of a kind."""
    folder = max(results.glob(f"cpu-*-{kind}"), default=None)
    if folder is None:
        return NO_PEERS
    env = json.loads((folder / "environment.json").read_text())
    rows = whole_rows(folder / "results.csv")
    who = [name for name in dict.fromkeys(row["provider"] for row in rows) if name != "torch.nn"]
    where = f"{env['device']}, {env['threads']} threads, {env['date'][:10]}, torch {env['torch']}"
    lines = [f"| {where} | {' | '.join(who)} |", "|---" * (1 + len(who)) + "|"]
    for case, cell in dict.fromkeys((row["workload"], row["cell"]) for row in rows):
        of = {r["provider"]: r for r in rows if (r["workload"], r["cell"]) == (case, cell)}
        lines.append(f"| {case} {cell} | {' | '.join(_both(of[name]) for name in who)} |")
    return "\n".join(lines) + "\n"


def _both(row: dict[str, str]) -> str:
    if row["gate"] != "ok":
        return "-" if row["gate"] == "refused" else row["gate"]
    found = (row["fw_speedup"], row["fwbw_speedup"])
    return " / ".join(f"{float(x):.2f}" if x else "-" for x in found)


#: Each table and the line of its page behind which it stands.
TABLES = {"<!-- make tables: gpu -->\n": gpu_table, "<!-- make tables: cpu -->\n": cpu_table}
PAGE_TABLES = {
    "<!-- make tables: peers -->\n": peers_table,
    "<!-- make tables: compiled -->\n": partial(peers_table, kind="compiled"),
}


def written(begin: str, page: Path = README) -> str:
    """The table that a page has now behind a line."""
    return page.read_text().partition(begin)[2].partition(END)[0]


def write(page: Path = README, results: Path = RESULTS, tables: dict = TABLES) -> str:
    """Puts the tables between their comments in a page; returns them."""
    text, made = page.read_text(), []
    for begin, table_of in tables.items():
        made.append(table_of(results))
        before, found, rest = text.partition(begin)
        if not found:
            raise ValueError(f"{page} has no line {begin.strip()}")
        text = before + begin + made[-1] + END + rest.partition(END)[2]
    page.write_text(text)
    return "\n".join(made)


if __name__ == "__main__":
    print(write(), write(PAGE, tables=PAGE_TABLES), sep="\n", end="")
