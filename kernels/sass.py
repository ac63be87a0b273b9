"""Reads the SASS of a compiled kernel: each instruction with its kind and control word."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

NO_BOARD = 7  # the scoreboard field of an instruction that sets none

#: Kinds of instructions and what their names begin with; the first that fits counts.
KINDS = {
    "tensor core": r"[HIDBQO]G?MMA\b|UTC\w*MMA",
    "MUFU": r"MUFU\b",
    "conversion": r"(I2F|F2I|F2F|FRND|I2I|POPC|FLO|BREV)\b",
    "shared load": r"LDSM?\b",
    "shared store": r"STSM?\b|ATOMS\b",
    "global load": r"LDG(STS)?\b|LD\b|UBLKCP\b|UTMALDG",
    "global store": r"STG\b|ST\b|UTMASTG",
    "global atomic": r"ATOMG?\b|REDG?\b",
    "spill": r"LDL\b|STL\b",
    "barrier": r"BAR\b|SYNCS\b|UCGABAR|WARPGROUP\b",
    "fence": r"MEMBAR\b|CCTL\b|(CGA)?ERRBAR\b|FENCE\b",
    "shuffle": r"SHFL\b|MOVM\b|REDUX\b|MATCH\b",
    "constant": r"LDCU?\b",
    "special register": r"S2U?R\b|B2R\b",
    "FMA unit": r"[FD](ADD|MUL|FMA)\w*|FSWZADD\b|H(FMA|ADD|MUL)2",
    "integer multiply": r"IMAD|IMUL\b",
    "control": r"(BRA|BRX|BSSY|BSYNC|BREAK|WARPSYNC|NOP|EXIT|CALL|RET|YIELD|DEPBAR|NANOSLEEP|BMOV"
    r"|PREEXIT|ACQBULK|ELECT|SETCTAID|KILL|RPCMOV|USETMAXREG)\b",
    "uniform": r"R2UR\b|U",
}


class Instruction(NamedTuple):
    """One SASS instruction with the fields of its control word."""

    address: int
    name: str  # with suffixes: HMMA.16816.F32.BF16
    operands: str = ""
    predicate: str = ""
    line: str = ""  # file:line of the source
    labels: tuple[str, ...] = ()  # by which branches name it
    stall: int = 1  # cycles until the next instruction of the warp may issue
    stay: bool = True  # the scheduler may issue the next instruction from the same warp
    write: int = NO_BOARD  # the scoreboard that is released when the result is written
    read: int = NO_BOARD  # the scoreboard that is released when the operands are read
    wait: int = 0  # mask of the scoreboards to wait for

    def __str__(self) -> str:
        return f"{self.predicate} {self.name} {self.operands}".strip()


@cache
def kind_of(name: str) -> str:
    """Returns the kind of an instruction, "other" if it is of none."""
    return next((kind for kind, names in KINDS.items() if re.match(names, name)), "other")


def count_kinds(instructions: Sequence[Instruction]) -> dict[str, int]:
    """Counts the instructions of each kind, of no kind ("other"), and all ("total")."""
    found = Counter(kind_of(one.name) for one in instructions)
    return {kind: found[kind] for kind in (*KINDS, "other")} | {"total": len(instructions)}


def decode(high: int) -> dict[str, Any]:
    """Returns the control fields in the upper 64 of an instruction's 128 bits."""
    # The first bit of each and the number of its bits.
    places = {"stall": (41, 4), "stay": (45, 1), "write": (46, 3), "read": (49, 3), "wait": (52, 6)}
    return {name: high >> first & (1 << bits) - 1 for name, (first, bits) in places.items()}


#: A line of the source, a label, or an instruction with both halves of its encoding.
_ITEM = re.compile(
    r'^\s*//## File "(?P<file>[^"]*)", line (?P<number>\d+)|^\s*(?P<label>\.L_\w+):'
    r"|/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:(?P<predicate>@!?U?P\w+)\s+)?(?P<name>[A-Z][\w.]*)"
    r"[ \t]*(?P<operands>.*?)\s*;\s*/\*\s*0x[0-9a-f]{16}\s*\*/"
    r"\s*/\*\s*0x(?P<high>[0-9a-f]{16})\s*\*/",
    re.MULTILINE,
)


def read_listing(text: str) -> list[Instruction]:
    """Returns the instructions of the one kernel in a listing of ``nvdisasm -c -hex -g``.

    Raises:
        ValueError: the listing holds no instruction with its encoding.
    """
    found: list[Instruction] = []
    source, labels = "", tuple[str, ...]()
    for item in _ITEM.finditer(text):
        if item["file"]:
            source = f"{Path(item['file']).name}:{item['number']}"
        elif item["label"]:
            labels += (item["label"],)
        else:
            about = item["name"], item["operands"], item["predicate"] or "", source, labels
            fields = decode(int(item["high"], 16))
            found.append(Instruction(int(item["address"], 16), *about, **fields))
            labels = ()
    if not found:
        raise ValueError("the listing holds no instruction with its encoding")
    return found


def run_tool(cubin: bytes, name: str, *options: str) -> str:
    """Runs a program that Triton ships (cuobjdump, nvdisasm) on a binary."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def trace(instructions: Sequence[Instruction]) -> list[Instruction]:
    """Returns one turn of the longest loop in the order of execution; empty if there is none.

    Branches depend on data that is not there: those with a predicate are not taken, so a polling
    loop is left after one round. Nor are those that lead out of the loop.

    Raises:
        ValueError: there is an endless loop within it.
    """
    at = {label: index for index, one in enumerate(instructions) for label in one.labels}
    goals = {}  # the index that each branch leads to
    for index, one in enumerate(instructions):
        label = re.search(r"\.L_\w+", one.operands)
        if one.name.startswith("BRA") and label and label[0] in at:
            goals[index] = at[label[0]]
    loops = [(to, index) for index, to in goals.items() if to < index]
    if not loops:
        return []
    first, last = max(loops, key=lambda loop: loop[1] - loop[0])
    path, index = [], first
    while index != last:
        one, goal = instructions[index], goals.get(index, -1)
        path.append(one)
        always = not one.predicate and "UP" not in one.operands
        index = goal if always and first <= goal <= last else index + 1
        if len(path) > last:
            raise ValueError("the loop has no end that the trace reaches")
    return [*path, instructions[last]]
