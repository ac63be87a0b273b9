"""``python -m bench ragged``: what sequences of unequal length cost, beside torch.nn's two ways.

B sequences of T/2 to T steps, as torch users run them (padded to T, and as a PackedSequence) and as
fusedrnn does (``lengths``, and the same PackedSequence). First the gate: the outputs that count,
the final states and all gradients of every way but the padded one are the same sequences', within
the error budget. Then forward, and forward with backward, in turns in one process.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn

from .cases import EVERY_CELL, RAGGED
from .disk import Table
from .gate import Verdict, outcome, verdict
from .report import environment, header
from .results import FolderError
from .run import chained, random_lengths
from .timing import Call, Times, interleaved

FIELDS = (
    "cell", "provider", "backend", "T", "B", "I", "H", "gate", "share",
    "fw_ms", "fw_ms_p20", "fw_ms_p80", "fw_x_padded", "fw_x_packed",
    "fwbw_ms", "fwbw_ms_p20", "fwbw_ms_p80", "fwbw_x_padded", "fwbw_x_packed",
)  # fmt: skip
LEGEND = """\
ms: median; x and x packed: torch.nn's time on the padded batch, and on the PackedSequence, as a
multiple of this one's, in the same run."""
PADDED, PACKED = "torch.nn padded", "torch.nn packed"


class Sizes(NamedTuple):
    T: int = RAGGED.T
    B: int = RAGGED.B
    I: int = RAGGED.I
    H: int = RAGGED.H


QUICK = Sizes(12, 4, 3, 5)


class Problem(NamedTuple):
    """One cell's modules with the same weights, and a batch of unequal lengths."""

    theirs: nn.RNNBase
    ours: nn.RNNBase
    input: Tensor  # [T, B, I]
    lengths: Tensor  # [B], on the CPU
    on_device: Tensor

    @property
    def packed(self) -> PackedSequence:
        return pack_padded_sequence(self.input, self.lengths, enforce_sorted=False)


#: How each provider runs: the module, its input, and its keyword arguments.
PROVIDERS: dict[str, Callable[[Problem], tuple[nn.Module, Tensor | PackedSequence, dict]]] = {
    PADDED: lambda p: (p.theirs, p.input, {}),
    PACKED: lambda p: (p.theirs, p.packed, {}),
    "fusedrnn lengths": lambda p: (p.ours, p.input, {"lengths": p.on_device}),
    "fusedrnn packed": lambda p: (p.ours, p.packed, {}),
}


def make(cell: str, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    """Lengths uniform in T/2 to T, the longest T."""
    theirs, ours = (
        getattr(classes, cell.upper())(sizes.I, sizes.H, device=device, dtype=dtype)
        for classes in (nn, fusedrnn)
    )
    ours.load_state_dict(theirs.state_dict())
    lengths = random_lengths(sizes.T, sizes.B)
    input = torch.randn(sizes.T, sizes.B, sizes.I, device=device, dtype=dtype)
    return Problem(theirs, ours, input.requires_grad_(), lengths, lengths.to(device))


def results(problem: Problem, provider: str) -> dict[str, Tensor]:
    """Output (zero beyond the end), final states and every gradient, by name."""
    module, input, options = PROVIDERS[provider](problem)
    leaves = {"input": problem.input, **dict(module.named_parameters())}
    return outcome(module, input, leaves, **options)


def gate(problem: Problem, provider: str) -> Verdict:
    """Against the PackedSequence in fp64, within the budget."""
    theirs = copy.deepcopy(problem.theirs).double().cpu()
    input = problem.input.detach().double().cpu().requires_grad_()
    double = Problem(theirs, theirs, input, problem.lengths, problem.lengths)
    truth, ref, got = (
        results(*pair) for pair in ((double, PACKED), (problem, PACKED), (problem, provider))
    )
    return verdict(got, ref, truth, truth)


def call(problem: Problem, provider: str, mode: str) -> Call:
    """``"fw"``, or ``"fwbw"`` into the weights and the input."""
    module, input, options = PROVIDERS[provider](problem)
    leaf = input.data.detach().requires_grad_(mode == "fwbw")
    given = input._replace(data=leaf) if isinstance(input, PackedSequence) else leaf
    return chained(module, given, [*module.parameters(), leaf], mode, **options)


def timed(problem: Problem, names: list[str], mode: str, seconds: float, least: int) -> dict:
    """Each of them, in turns."""
    calls = {name: call(problem, name, mode) for name in names}
    return interleaved(calls, problem.input.device, seconds=seconds, least=least)


def run(
    out: Path, device: torch.device, *, quick: bool = False, seed: int = 0, anew: bool = True
) -> int:
    """Prints the table and writes ``ragged.csv`` into ``out``; 1 if a gate is red.

    Args:
        out: the folder.
        device: where all is computed.
        quick: tiny sizes.
        seed: of weights, input and lengths.
        anew: False to add to the file that is there.

    Raises:
        FolderError: the folder cannot be written.
    """
    torch.manual_seed(seed)
    sizes = QUICK if quick else Sizes()
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    env = environment(device, "random input, lengths uniform in T/2 to T")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if anew:
            (out / "ragged.csv").unlink(missing_ok=True)
        table = Table(out / "ragged.csv", FIELDS)
    except OSError as error:
        raise FolderError(f"no results can be written to {out}: {error.strerror}") from error
    print(header(env))
    print(f"sizes    T{sizes.T} B{sizes.B} I{sizes.I} H{sizes.H}, {dtype}\n")
    print(f"{'cell':<5}{'provider':<18}{'gate':>8}{'forward ms':>12}{'x':>7}{'x packed':>10}"
          f"{'fw+bw ms':>11}{'x':>7}{'x packed':>10}")  # fmt: skip
    all_ok = True
    for cell in EVERY_CELL:
        problem = make(cell, sizes, device, dtype)
        verdicts = {name: gate(problem, name) for name in PROVIDERS if name != PADDED}
        good = [name for name in PROVIDERS if name == PADDED or verdicts[name].ok]
        limits = (0.0, 2) if quick else (4.0, 5)
        times = {mode: timed(problem, good, mode, *limits) for mode in ("fw", "fwbw")}
        for name in PROVIDERS:
            found = verdicts.get(name)
            ok, share = (found.ok, found.share) if found else (True, 0.0)
            all_ok &= ok
            line = {"cell": cell, "provider": name, **sizes._asdict(), "share": share}
            line |= {"gate": "ok" if ok else "red", "backend": backend_of(problem, name)}
            if name in good:
                line |= _times("fw", name, times["fw"]) | _times("fwbw", name, times["fwbw"])
            table.add(line.get(field, "") for field in FIELDS)
            print(_shown(line), flush=True)
    print(f"\n{LEGEND}")
    return 0 if all_ok else 1


def backend_of(problem: Problem, name: str) -> str:
    """What runs a provider, with gradients where they are enabled."""
    module, input, options = PROVIDERS[name](problem)
    if module is problem.theirs:
        return "torch.nn"
    return fusedrnn.explain(module, input, **options).backend or "none"


def _times(kind: str, name: str, times: dict[str, Times]) -> dict[str, float]:
    own = times[name]
    return {
        f"{kind}_ms": own.p50,
        f"{kind}_ms_p20": own.p20,
        f"{kind}_ms_p80": own.p80,
        f"{kind}_x_padded": own.speedup,
        f"{kind}_x_packed": own.speedup / times[PACKED].speedup,
    }


def _shown(line: dict) -> str:
    start = f"{line['cell']:<5}{line['provider']:<18}{line['gate']:>3} {line['share']:.2f}"
    if "fw_ms" not in line:
        return start
    return start + "".join(
        f"{line[k + '_ms']:>{w}.1f}{line[k + '_x_padded']:>7.2f}{line[k + '_x_packed']:>10.2f}"
        for k, w in (("fw", 12), ("fwbw", 11))
    )
