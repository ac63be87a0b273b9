"""``python -m bench cases``: all implementations that are installed, on named cases."""

import argparse
from typing import Any

import torch

from . import UserError, references
from .cases import EVERY_CELL, Workload, every_case, named
from .providers import PROVIDERS, TORCH, absent
from .run import OPTIONS as OPTIONS
from .run import run as run_plan

ARGUMENTS: dict[str, dict[str, Any]] = {
    "names": {"nargs": "?", "metavar": "NAMES", "help": "of cases or groups, with commas"},
    "--providers": {"metavar": "NAMES", "help": "these beside torch.nn; default: all"},
    "--cells": {"metavar": "NAMES", "help": "default: lstm,gru,rnn"},
    "--gate-only": {"action": "store_true", "help": "compare results, measure no time"},
}


def run(options: argparse.Namespace) -> int:
    """Gates and times the providers on the cases, and prints the published times of these."""
    if options.names is None:
        for w in every_case():
            print(f"{w.name:<28} {w.group:<12} {w.shape} {w.dtype} {', '.join(w.cells)}")
        return 0
    workloads, device = named(options.names), torch.device(options.device)
    cells = options.cells.split(",") if options.cells else EVERY_CELL
    wanted = [TORCH, *(options.providers.split(",") if options.providers else PROVIDERS)]
    for kind, names, known in (("provider", wanted, PROVIDERS), ("cell", cells, EVERY_CELL)):
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"there is no {kind} {unknown[0]!r}; there are {', '.join(known)}")
    who = []
    for name in dict.fromkeys(wanted):
        if reason := absent(name, device):
            print(f"absent   {name}: {reason}")
        else:
            who.append(name)
    plan = [(w, [name for name in who if applies(name, w)]) for w in workloads]
    _, code = run_plan(options, plan, cells, gate_only=options.gate_only)
    if published := [w.name for w in workloads if w.group in ("kernelbench", "deepbench")]:
        gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
        print("\n".join(["", references.HEADER, *references.lines(published, gpu)]))
    return code


def applies(provider: str, workload: Workload) -> bool:
    """Returns False where a provider would only repeat another one."""
    entry = PROVIDERS[provider]
    return (not entry.layout or workload.ragged) and (not entry.step or workload.T == 1)
