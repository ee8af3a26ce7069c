"""Which parts of the package the bytes of a compiled program come from: the list behind `preflight --bytes`.

XLA keeps for an instruction the lines of Python that made it, a fusion those of its result. What is computed in the
backward pass has the lines of its forward pass, except in a kernel's own gradient. Instructions that the compiler adds
without such lines, as copies into another layout or memory, count for the part whose result they take.
"""

import re
from collections import Counter
from typing import NamedTuple

from deperceiver_jax.preflight.hlo_traffic import Instruction, memory_by_instruction

PACKAGE = "/deperceiver_jax/"
NOWHERE = "of the compiler's own"
_ROW = re.compile(r'(\d+) (".*"|\{.*\})$')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_OPERATION = re.compile(r'op_name="([^"]*)"')
_STEP = "make_train_step"  # what called it does not matter
# What calls the parts of a detector, and is none itself.
_CALLERS = ("Detector", "LayerStack", "apply_rematerialized", "on_each_device", "by_platform")


class Part(NamedTuple):
    name: str  # functions and classes of the package, the outermost first
    backward: bool
    bytes: int


def memory_by_part(text: str) -> list[Part]:
    """Bytes through a chip's memory of each part, `program_traffic`'s `memory` in all; the largest first."""
    names = _names_of_frames(text)
    counts: Counter[tuple[str, bool]] = Counter()
    for instruction, size, siblings in memory_by_instruction(text):
        if size:
            frame, operation = _source(instruction, siblings)
            counts[names.get(frame, NOWHERE), "transpose(" in operation] += size
    return [Part(*key, size) for key, size in counts.most_common()]


def _source(instruction: Instruction, siblings: dict[str, Instruction]) -> tuple[str, str]:
    """(number of the frame, name of the operation): its own, or those of the nearest that it takes, or that takes it.

    Empty if there are none.
    """
    for towards in (_taken, _takers):
        seen, queue = {instruction.name}, [instruction]
        for each in queue:
            frame, operation = _FRAME.search(each.attributes), _OPERATION.search(each.attributes)
            if frame:
                return frame[1], operation[1] if operation else ""
            for other in towards(each, siblings):
                if other.name not in seen:
                    seen.add(other.name)
                    queue.append(other)
    return "", ""


def _taken(instruction: Instruction, siblings: dict[str, Instruction]) -> list[Instruction]:
    return [siblings[name] for name in instruction.operands if name in siblings]


def _takers(instruction: Instruction, siblings: dict[str, Instruction]) -> list[Instruction]:
    return [other for other in siblings.values() if instruction.name in other.operands]


def _names_of_frames(text: str) -> dict[str, str]:
    """By the number of a frame: the classes and functions of the step that called it, and its own."""
    tables: dict[str, dict[str, str]] = {}
    table: dict[str, str] = {}
    for line in text.splitlines():
        row = _ROW.match(line)
        if row:
            table[row[1]] = row[2]
        elif re.fullmatch(r"FileNames|FunctionNames|FileLocations|StackFrames", line):
            table = tables.setdefault(line, {})
        elif line.endswith("{"):
            break

    def number(row: str, field: str) -> int:
        found = re.search(rf"\b{field}=(\d+)", row)
        return int(found[1]) if found else 0

    frames = {int(frame): row for frame, row in tables.get("StackFrames", {}).items()}
    none = number(frames.get(1, ""), "parent_frame_id")  # the first frame has no parent; XLA 0.10 counts parents from 1
    names = {}
    for frame in frames:
        owners: list[str] = []
        above = frame
        while above > 0:
            location = tables["FileLocations"][str(number(frames[above], "file_location_id"))]
            owner = tables["FunctionNames"][str(number(location, "function_name_id"))].strip('"').split(".")[0]
            inside = PACKAGE in tables["FileNames"][str(number(location, "file_name_id"))]
            if inside and owner == _STEP:
                break
            if inside and owner not in _CALLERS:
                owners.append(owner)
            above = number(frames[above], "parent_frame_id") - none
        names[str(frame)] = " > ".join(dict.fromkeys(reversed(owners))) or "the step"
    return names
