"""Reads the SASS of a compiled kernel, with the control word of every instruction."""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

NO_BOARD = 7  # the scoreboard field of an instruction that sets none


@dataclass(frozen=True)
class Instruction:
    """One SASS instruction with the fields of its control word."""

    address: int
    name: str  # with suffixes: HMMA.16816.F32.BF16
    operands: str = ""
    predicate: str = ""
    line: str = ""  # file:line of the source
    target: int | None = None  # the address that a branch names
    stall: int = 1  # cycles until the next instruction of the warp may issue
    stay: bool = True  # the scheduler may issue the next instruction from the same warp
    write: int = NO_BOARD  # the scoreboard that is released when the result is written
    read: int = NO_BOARD  # the scoreboard that is released when the operands are read
    wait: int = 0  # mask of the scoreboards to wait for

    def __str__(self) -> str:
        return f"{self.predicate} {self.name} {self.operands}".strip()


def decode(high: int) -> dict[str, Any]:
    """Returns the control fields in the upper 64 of an instruction's 128 bits.

    Bits 105 to 108 hold the stall count, 109 the yield flag, 110 to 112 the write scoreboard,
    113 to 115 the read scoreboard, 116 to 121 the wait mask.
    """
    control = high >> 41
    return {
        "stall": control & 15,
        "stay": bool(control >> 4 & 1),
        "write": control >> 5 & 7,
        "read": control >> 8 & 7,
        "wait": control >> 11 & 63,
    }


_INSTRUCTION = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s*/\*\s*0x[0-9a-f]{16}\s*\*/"
)
_HIGH = re.compile(r"^\s*/\*\s*0x([0-9a-f]{16})\s*\*/")
_LABEL = re.compile(r"^\s*(\.L_\w+):")
_LINE = re.compile(r'^\s*//## File "([^"]*)", line (\d+)')
_TARGET = re.compile(r"(\.L_\w+)|\b0x([0-9a-f]+)\b")


def read_listing(text: str) -> list[Instruction]:
    """Returns the instructions of the one kernel in a listing of ``nvdisasm -c -hex -g``.

    Raises:
        ValueError: the listing holds no instruction, or one without its encoding.
    """
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []  # labels of the next instruction
    names: list[str | None] = []  # the label that each branch names
    source = ""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if mark := _LINE.match(line):
            source = f"{Path(mark[1]).name}:{mark[2]}"
        elif mark := _LABEL.match(line):
            waiting.append(mark[1])
        elif match := _INSTRUCTION.search(line):
            high = _HIGH.match(lines[number + 1]) if number + 1 < len(lines) else None
            if not high:
                raise ValueError(f"line {number + 1} has no second half of its encoding")
            address, predicate, name, operands = int(match[1], 16), match[2], match[3], match[4]
            labels.update(dict.fromkeys(waiting, address))
            waiting = []
            goal = _TARGET.search(operands) if name.startswith(("BRA", "CALL")) else None
            target = int(goal[2], 16) if goal and goal[2] else None
            names.append(goal[1] if goal else None)
            fields = decode(int(high[1], 16))
            found.append(
                Instruction(address, name, operands, predicate or "", source, target, **fields)
            )
    if not found:
        raise ValueError("the listing holds no instruction with an encoding")
    return [
        replace(one, target=labels[label]) if label in labels else one
        for one, label in zip(found, names, strict=True)
    ]


def run_tool(name: str, *arguments: str) -> str:
    """Runs a program that Triton ships (ptxas, cuobjdump, nvdisasm) and returns its output."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([program, *arguments], check=True, capture_output=True, text=True).stdout


def read(cubin: bytes) -> list[Instruction]:
    """Returns the instructions of a binary of one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return read_listing(run_tool("nvdisasm", "-c", "-hex", "-g", file.name))


def loops(instructions: Sequence[Instruction]) -> list[tuple[int, int]]:
    """Returns the first and last index of every loop, the longest first."""
    at: dict[int | None, int] = {one.address: index for index, one in enumerate(instructions)}
    spans = [
        (at[one.target], index)
        for index, one in enumerate(instructions)
        if one.name.startswith("BRA") and one.target in at and at[one.target] < index
    ]
    return sorted(spans, key=lambda span: span[0] - span[1])


def trace(instructions: Sequence[Instruction]) -> list[Instruction]:
    """Returns one turn of the longest loop in the order of execution.

    Branches depend on data that is not there. Those out of the loop are not taken. A predicated
    branch forward is taken where it skips a call and no load: the slow path of a division. A
    polling loop is left after one round.

    Raises:
        ValueError: there is no loop.
    """
    spans = loops(instructions)
    if not spans:
        raise ValueError("the kernel has no loop")
    first, last = spans[0]
    at: dict[int | None, int] = {one.address: index for index, one in enumerate(instructions)}

    def goal(index: int) -> int | None:
        one = instructions[index]
        target = at.get(one.target) if one.name.startswith("BRA") else None
        return target if target is not None and first <= target <= last else None

    exits = set()  # branches out of polling loops that end in an unconditional branch backward
    for begin, end in spans[1:]:
        if first < begin and end < last and not instructions[end].predicate:
            leaving = (i for i in range(begin, end) if (goal(i) or 0) > end)
            exits.update(list(leaving)[:1])
    path, index = [], first
    while index != last:
        one, target = instructions[index], goal(index)
        path.append(one)
        follows = index + 1
        if target is not None:
            always = not one.predicate and "UP" not in one.operands
            skipped = instructions[index + 1 : target]
            names = [each.name for each in skipped]
            slow = any(name.startswith("CALL") for name in names) and not any(
                name.startswith(("BAR", "LD", "HMMA")) for name in names
            )
            if always or (target > index and (slow or index in exits)):
                follows = target
        if len(path) > 4 * (last - first + 1):
            raise ValueError("the loop has no end that the trace reaches")
        index = follows
    return [*path, instructions[last]]
