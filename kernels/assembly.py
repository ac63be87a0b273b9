"""Reads the instructions of a kernel, SASS or AMDGCN, as text: their kinds, and the loop over T.

Pure text processing, without triton. Counts are static: an instruction counts once, however often
it runs, and for one warp (or wave). A polling loop inside the loop over T counts once, too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Instruction(NamedTuple):
    """One instruction: its name with suffixes (``HMMA.16816.F32.BF16``), and how it branches."""

    name: str
    operands: str = ""
    back_to: int | None = None  # the index of the target, of a branch backwards


#: Kinds of instructions and what their names begin with, by assembly; the first that fits counts.
KINDS = {
    "sass": {
        "tensor core": r"[HIDBQO]G?MMA\b|UTC\w*MMA",
        "MUFU": r"MUFU\b",
        "shared load": r"LDSM?\b",
        "shared store": r"STSM?\b|ATOMS\b",
        "global load": r"LDG(?:STS)?\b|LD\b|UBLKCP\b|UTMALDG",
        "global store": r"STG\b|ST\b|UTMASTG",
        "global atomic": r"ATOMG?\b|REDG?\b",
        "barrier": r"BAR\b|B2R\b|SYNCS\b|UCGABAR|WARPGROUP\b",
        "fence": r"MEMBAR\b|CCTL\b|C?G?A?ERRBAR\b|FENCE\b",
        "shuffle": r"SHFL\b|MOVM\b|REDUX\b",
        "spill": r"LDL\b|STL\b",
        "FMA unit": r"[FD](?:FMA|ADD|MUL)\w*\b|HFMA2|HADD2|HMUL2",
    },
    "amdgcn": {
        "tensor core": r"v_s?mfma",
        "MUFU": r"v_(?:exp|log|rcp|rsq|sqrt|sin|cos)_",
        "shared load": r"ds_(?:read|load)",
        "shared store": r"ds_(?:write|store)",
        "global load": r"(?:global|buffer|flat)_load",
        "global store": r"(?:global|buffer|flat)_store",
        "global atomic": r"(?:global|buffer|flat)_atomic",
        "barrier": r"s_barrier",
        "fence": r"buffer_(?:wbl2|inv)",
        "shuffle": r"ds_b?permute|ds_swizzle|v_permlane|v_readlane|v_writelane|v_mov_b32_dpp",
        "spill": r"scratch_",
        "FMA unit": r"v_(?:pk_)?(?:fma|fmac|add|sub|mul)_f(?:16|32|64)",
    },
}
_SASS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+?)(?:\s+(.*?))?\s*;")
_SASS_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_AMD = re.compile(r"\s+([a-z][a-z0-9_]+)(?:\s+([^;]*))?")
_AMD_LABEL = re.compile(r"(\.?LBB\d+_\d+):")
_BRANCH = re.compile(r"BRA\b|s_c?branch")
_TARGET = re.compile(r"\.L_x_\d+|\.?LBB\d+_\d+")


def dialect_of(text: str) -> str:
    """Which of ``KINDS`` the text is in."""
    return "amdgcn" if ".amdgcn_target" in text or "s_endpgm" in text else "sass"


def read_assembly(text: str) -> list[Instruction]:
    """The instructions of the one kernel that the text holds, in their order."""
    amd = dialect_of(text) == "amdgcn"
    one, label = (_AMD, _AMD_LABEL) if amd else (_SASS, _SASS_LABEL)
    labels: dict[str, int] = {}
    found: list[Instruction] = []
    for line in text.splitlines():
        if mark := label.match(line):
            labels[mark[1]] = len(found)
        elif match := one.match(line) if amd else one.search(line):
            name, operands = match[1], match[2] or ""
            target = _TARGET.search(operands) if _BRANCH.match(name) else None
            # A label that has not come yet is ahead.
            found.append(Instruction(name, operands, labels.get(target[0]) if target else None))
        elif amd and line.startswith(".Lfunc_end"):
            break  # what follows is data
    return found


def longest_loop(instructions: Sequence[Instruction]) -> Sequence[Instruction]:
    """From the target of the farthest backward branch to that branch: the loop over T, or nothing.

    Kernels have one other sort of loop, which polls, inside that one. Compilers here keep the loop
    in one piece: ``docs/kernels.md`` says how far to trust that.
    """
    longest: Sequence[Instruction] = ()
    for index, instruction in enumerate(instructions):
        if instruction.back_to is not None and index + 1 - instruction.back_to > len(longest):
            longest = instructions[instruction.back_to : index + 1]
    return longest


def count_kinds(instructions: Iterable[Instruction], dialect: str) -> dict[str, int]:
    """How many of each kind, of those of no kind ("other"), and of all ("total")."""
    kinds = {kind: re.compile(names) for kind, names in KINDS[dialect].items()}
    counts = dict.fromkeys((*kinds, "other", "total"), 0)
    for instruction in instructions:
        of = (kind for kind, names in kinds.items() if names.match(instruction.name))
        counts[next(of, "other")] += 1
        counts["total"] += 1
    return counts


def tensor_names(instructions: Iterable[Instruction], dialect: str) -> Counter[str]:
    """The matrix instructions by their full names."""
    names = re.compile(KINDS[dialect]["tensor core"])
    return Counter(i.name for i in instructions if names.match(i.name))
