"""``python -m bench ragged``: what sequences of unequal length cost, beside torch.nn's two ways.

B sequences of T/2 to T steps, as torch users run them (padded to T, and as a PackedSequence) and as
fusedrnn does (``lengths``, and the same PackedSequence). First the gate: the outputs that count,
the final states and all gradients of every way but the padded one are the same sequences', within
the error budget. Then forward, and forward with backward, in turns in one process.
"""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fusedrnn
from fusedrnn.testing import error_budget

from .cases import RAGGED
from .report import environment, header
from .timing import Times, interleaved

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
    lengths = torch.randint(sizes.T // 2, sizes.T + 1, (sizes.B,))
    lengths[0] = sizes.T
    input = torch.randn(sizes.T, sizes.B, sizes.I, device=device, dtype=dtype)
    return Problem(theirs, ours, input.requires_grad_(), lengths, lengths.to(device))


def results(problem: Problem, provider: str) -> dict[str, Tensor]:
    """Output (zero beyond the end), final states and every gradient, by name."""
    module, input, options = PROVIDERS[provider](problem)
    output, final = module(input, **options)
    if isinstance(output, PackedSequence):
        output, _ = pad_packed_sequence(output, total_length=len(problem.input))
    named = {"output": output}
    for name, state in zip(("h_n", "c_n"), (final,) if isinstance(final, Tensor) else final,
                           strict=False):  # fmt: skip
        named[name] = state
    leaves = [problem.input, *module.parameters()]
    grads = torch.autograd.grad(sum(t.sin().sum() for t in named.values()), leaves)
    names = ["d_input", *(f"d_{name}" for name, _ in module.named_parameters())]
    return {k: v.detach() for k, v in (named | dict(zip(names, grads, strict=True))).items()}


def gate(problem: Problem, provider: str) -> tuple[bool, float]:
    """Whether all is within the budget, and the largest error as a part of the allowed one."""
    theirs = copy.deepcopy(problem.theirs).double().cpu()
    input = problem.input.detach().double().cpu().requires_grad_()
    double = Problem(theirs, theirs, input, problem.lengths, problem.lengths)
    truth, ref, got = (
        results(*pair) for pair in ((double, PACKED), (problem, PACKED), (problem, provider))
    )
    budgets = [error_budget(name, got[name], ref[name], truth[name]) for name in truth]
    share = max(b.max_err / b.allowed for b in budgets if b.allowed)
    return all(b.ok for b in budgets), share


def timed(problem: Problem, names: list[str], seconds: float, least: int) -> tuple[dict, dict]:
    """Forward without gradients, and forward with backward, in turns."""

    def forward(name: str) -> Callable[[], object]:
        module, input, options = PROVIDERS[name](problem)

        def call() -> object:
            with torch.no_grad():
                return module(input, **options)

        return call

    def both(name: str) -> Callable[[], object]:
        module, input, options = PROVIDERS[name](problem)

        def call() -> None:
            output, _ = module(input, **options)
            data = output.data if isinstance(output, PackedSequence) else output
            torch.autograd.grad(data.sum(), [*module.parameters()])

        return call

    device = problem.input.device
    return tuple(  # type: ignore[return-value]
        interleaved({n: way(n) for n in names}, device, seconds=seconds, least=least)
        for way in (forward, both)
    )


def run(out: Path, device: torch.device, *, quick: bool = False, seed: int = 0) -> int:
    """Prints the table and writes ``ragged.csv`` into ``out``; 1 if a gate is red."""
    torch.manual_seed(seed)
    sizes = Sizes(12, 4, 3, 5) if quick else Sizes()
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    env = environment(device, "random input, lengths uniform in T/2 to T")
    print(header(env))
    print(f"sizes    T{sizes.T} B{sizes.B} I{sizes.I} H{sizes.H}, {dtype}\n")
    print(f"{'cell':<5}{'provider':<18}{'gate':>8}{'forward ms':>12}{'x':>7}{'x packed':>10}"
          f"{'fw+bw ms':>11}{'x':>7}{'x packed':>10}")  # fmt: skip
    lines, all_ok = [], True
    for cell in ("lstm", "gru", "rnn"):
        problem = make(cell, sizes, device, dtype)
        verdicts = {name: gate(problem, name) for name in PROVIDERS if name != PADDED}
        good = [name for name in PROVIDERS if name == PADDED or verdicts[name][0]]
        fw, fwbw = timed(problem, good, 0.0 if quick else 4.0, 2 if quick else 5)
        for name in PROVIDERS:
            ok, share = verdicts.get(name, (True, 0.0))
            all_ok &= ok
            line = {"cell": cell, "provider": name, **sizes._asdict(), "share": share}
            line |= {"gate": "ok" if ok else "red", "backend": _backend(problem, name)}
            if name in good:
                line |= _times("fw", name, fw) | _times("fwbw", name, fwbw)
            lines.append(line)
            print(_shown(line), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "ragged.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(lines)
    print(f"\n{LEGEND}")
    return 0 if all_ok else 1


def _backend(problem: Problem, name: str) -> str:
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
