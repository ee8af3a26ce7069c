"""What a compiled program moves: bytes through a chip's memory and bytes between chips, read from its HLO text.

XLA's own count takes the body of a loop once, however often it runs; scanned layers would hardly be there. Here a loop
counts as often as the compiler knows it to run. An array counts with its tile's padding, and not at all where the
compiler keeps it on the chip (memory space `S(1)` and above). A slice counts as what is taken, an update in place as
what is written. A custom call (a kernel) counts its arguments and results once, or as often as its author's estimate
of its cost says.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_ARRAY = re.compile(r"\b(pred|token|opaque|[a-z]+\d+(?:e\w+)?)\[([\d,]*)\](?:\{([^{}]*)\})?")
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_TRIPS = re.compile(r'known_trip_count\\?"?:\s*\{\\?"?n\\?"?:\\?"?(\d+)')
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[(.*?)\] *\{(.*?)\})")
_PARTITIONS = re.compile(r"num_partitions=(\d+)")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# What a TPU program hands its host for other slices; the host combines it with theirs.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id")
_ESTIMATE = re.compile(r'cost_estimate\\?"?:\s*\{[^}]*bytes_accessed\\?"?:\s*\\?"?(\d+)')
_MOVES_NOTHING = re.compile(r'custom_call_target="(ConcatBitcast|AllocateBuffer)"')
_SLICES = ("dynamic-slice", "slice", "gather")


class Traffic(NamedTuple):
    """Bytes of one chip in one run of a program."""

    memory: int  # read from and written to the chip's memory
    interconnect: int  # sent by the chip in collectives over its slice's links, where they go round a ring
    network: int  # sent to other slices, where they go round a ring of slices


class Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str  # what stands between the parentheses
    attributes: str
    is_root: bool


def program_traffic(text: str, slices: int = 1) -> Traffic:
    """The traffic of a compiled program, `jax.stages.Compiled.as_text()`, that runs on so many slices."""
    computations, entry = parse_program(text)
    partitions = _PARTITIONS.search(text.split("\n", 1)[0])
    devices = int(partitions[1]) if partitions else 1
    memory = sent = network = 0
    for instruction, times, siblings in _executed(computations, entry, 1):
        memory += times * _memory(instruction, computations, siblings)
        sent += times * _sent(instruction, siblings, devices)
        network += times * _sent_to_slices(instruction, siblings, slices)
    return Traffic(memory, sent, network)


def memory_by_instruction(text: str) -> Iterator[tuple[Instruction, int, dict[str, Instruction]]]:
    """Each instruction that runs by itself, the bytes that all its runs move through memory, and its computation."""
    computations, entry = parse_program(text)
    for instruction, times, siblings in _executed(computations, entry, 1):
        yield instruction, times * _memory(instruction, computations, siblings), siblings


def parse_program(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """(computations by name, each its instructions by name; the name of the entry)."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            current = computations.setdefault(name, {})
            entry = name if line.startswith("ENTRY ") else entry
        elif current is not None and " = " in line:
            instruction = _parse_instruction(line)
            current[instruction.name] = instruction
    return computations, entry


def _parse_instruction(line: str) -> Instruction:
    left, right = line.strip().split(" = ", 1)
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    shape, rest = right[:end], right[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    literal = rest[start + 1 : stop]
    return Instruction(
        name=left.split()[-1].lstrip("%"),
        shape=shape,
        opcode=rest[:start],
        operands=tuple(re.findall(r"%([\w.\-]+)", literal)),
        literal=literal,
        attributes=rest[stop + 1 :],
        is_root=left.startswith("ROOT "),
    )


def _closing(text: str, start: int) -> int:
    """The place of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"no parenthesis closes the one at {start} of {text[:80]!r}")


def _executed(computations, name: str, times: int) -> Iterator[tuple[Instruction, int, dict[str, Instruction]]]:
    """Every instruction that runs by itself, with how often it runs and the computation it stands in."""
    for instruction in computations[name].values():
        yield instruction, times, computations[name]
        if instruction.opcode in ("while", "call", "conditional", "async-start"):
            runs = _trips(instruction, computations) if instruction.opcode == "while" else 1
            for called, branches in _CALLED.findall(instruction.attributes):
                for each in [called] if called else branches.split(","):
                    yield from _executed(computations, each.strip(" %"), times * runs)


def _trips(loop: Instruction, computations) -> int:
    """How often a loop runs: as the compiler says, or the constant that its counter is compared with, or once."""
    known = _TRIPS.search(loop.attributes)
    if known:
        return int(known[1])
    condition = computations[re.findall(r"condition=%?([\w.\-]+)", loop.attributes)[0]]
    for instruction in condition.values():
        if instruction.opcode == "compare" and "direction=LT" in instruction.attributes:
            limit = condition[instruction.operands[1]]
            if limit.opcode == "constant":
                return int(limit.literal)
    return 1


def _sent(instruction: Instruction, siblings: dict[str, Instruction], devices: int) -> int:
    """What a chip sends in a collective: round a ring of n, an all-reduce passes each byte on 2 (n - 1) / n times."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES or instruction.opcode.endswith("-done"):
        return 0
    size = sum(array_bytes(siblings[name].shape, everywhere=True) for name in instruction.operands)
    if kind.startswith("collective"):
        return size
    n = _group_size(instruction.attributes, devices)
    return {"all-reduce": 2 * size * (n - 1) // n, "all-gather": size * (n - 1)}.get(kind, size * (n - 1) // n)


def _sent_to_slices(instruction: Instruction, siblings: dict[str, Instruction], slices: int) -> int:
    """What a chip sends to other slices: what it hands its host goes round a ring of them, as in `_sent`."""
    found = _BETWEEN_SLICES.search(instruction.attributes)
    if instruction.opcode != "send" or found is None:
        return 0
    size = array_bytes(siblings[instruction.operands[0]].shape, everywhere=True)
    kinds = {"ALL_REDUCE": 2 * size * (slices - 1) // slices, "ALL_GATHER": size * (slices - 1), "ONE_TO_ONE": size}
    return kinds.get(found[1], size * (slices - 1) // slices)


def _group_size(attributes: str, devices: int) -> int:
    """How many chips take part in a collective: its groups are lists, a shape, or axes of a mesh with their sizes."""
    found = _GROUPS.search(attributes)
    if found is None:
        return devices
    if found[1] is not None:
        return len(found[1].split(",")) if found[1] else devices
    if found[2] is not None:
        return int(found[2])
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[3]))
    axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[4])  # an axis, or a part of one: its step and size
    return math.prod(int(part or sizes[axis]) for axis, part in axes)


def array_bytes(shape: str, *, everywhere: bool = False) -> int:
    """Bytes that the arrays of an HLO shape take in the chip's memory; `everywhere`: and in any other."""
    total = 0
    for kind, dims, layout in _ARRAY.findall(shape):
        if not everywhere and re.search(r"S\([1-9]", layout):
            continue
        sizes = [int(d) for d in dims.split(",") if d]
        tile = re.search(r"T\(([\d,]+)\)", layout)
        order = [int(d) for d in layout.split(":")[0].split(",") if d]
        if tile and order:
            for dim, multiple in zip(order, reversed([int(t) for t in tile[1].split(",")]), strict=False):
                sizes[dim] = -(-sizes[dim] // multiple) * multiple
        bits = _BITS[kind] if kind in _BITS else int(re.findall(r"\d+", kind)[0])
        total += math.prod(sizes) * bits // 8
    return total


def _memory(instruction: Instruction, computations, siblings: dict[str, Instruction]) -> int:
    opcode = instruction.opcode
    shapes = [siblings[name].shape for name in instruction.operands if name in siblings]
    if opcode in _FREE or opcode in ("while", "call", "conditional", "async-start", "async-update", "async-done"):
        return 0
    if opcode == "custom-call" and _MOVES_NOTHING.search(instruction.attributes):
        return 0
    if opcode == "send":
        return array_bytes(siblings[instruction.operands[0]].shape)
    if opcode == "recv":  # it arrives with recv-done
        return 0
    if opcode.endswith("-start"):  # the result is counted where it arrives
        sliced = opcode in ("slice-start", "dynamic-slice-start")
        return 0 if sliced else sum(map(array_bytes, shapes[:1] if opcode == "copy-start" else shapes))
    if opcode.endswith("-done"):
        written = array_bytes(instruction.shape)
        if opcode == "send-done":
            return 0
        from_memory = opcode in ("slice-done", "dynamic-slice-done")
        return written + (array_bytes(instruction.shape, everywhere=True) if from_memory else 0)
    if opcode in _SLICES:
        return _taken(instruction, shapes[0]) + array_bytes(instruction.shape)
    if _updates(instruction):
        return array_bytes(shapes[1]) + _written(instruction, siblings)
    if opcode == "fusion":
        return _fusion_memory(instruction, shapes, computations)
    arrays = [*shapes, instruction.shape]
    once = sum(map(array_bytes, arrays))
    estimate = _ESTIMATE.search(instruction.attributes) if opcode == "custom-call" else None
    if estimate is None:
        return once
    anywhere = sum(array_bytes(shape, everywhere=True) for shape in arrays)
    return max(once, int(estimate[1]) * once // max(anywhere, 1))


def _taken(slice_: Instruction, source: str) -> int:
    """What a slice reads of `source`."""
    return min(array_bytes(slice_.shape, everywhere=True), array_bytes(source))


def _written(update: Instruction, siblings) -> int:
    """What an update in place writes, were its array in memory."""
    return array_bytes(siblings[update.operands[1]].shape, everywhere=True) if array_bytes(update.shape) else 0


def _updates(instruction: Instruction) -> bool:
    return instruction.opcode == "dynamic-update-slice"


def _fusion_memory(fusion: Instruction, shapes: list[str], computations) -> int:
    inside = _called(fusion, computations)
    total = sum(_read(inside, number, shape, computations) for number, shape in enumerate(shapes))
    root = next(i for i in inside.values() if i.is_root)
    outputs = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    kinds = _ARRAY.finditer(fusion.shape)
    for output, shape in zip(outputs, (match[0] for match in kinds), strict=False):
        last = inside[_origin(inside, output.name)]
        if _updates(last) and array_bytes(shape):
            total += array_bytes(inside[last.operands[1]].shape, everywhere=True)
        else:
            total += array_bytes(shape)
    return total


def _called(fusion: Instruction, computations) -> dict[str, Instruction]:
    return computations[_CALLED.findall(fusion.attributes)[0][0].lstrip("%")]


def _origin(inside: dict[str, Instruction], name: str) -> str:
    while inside[name].opcode in ("bitcast", "convert", "copy"):
        name = inside[name].operands[0]
    return name


def _read(inside: dict[str, Instruction], number: int, shape: str, computations) -> int:
    """What a fusion reads of its operand of this number: slices of it, or the whole; of what it updates, nothing."""
    parameter = next((i.name for i in inside.values() if i.opcode == "parameter" and int(i.literal) == number), None)
    whole = array_bytes(shape)
    if parameter is None or not whole:
        return 0
    if not any(parameter in user.operands for user in inside.values()):
        return whole
    total, names = 0, [parameter]  # it, and what is only another view of it
    for name in names:
        for user in inside.values():
            if name not in user.operands:
                continue
            if user.opcode == "bitcast":
                names.append(user.name)
            elif user.opcode in _SLICES:
                total += _taken(user, shape)
            elif user.opcode == "fusion":
                inner = _called(user, computations)
                total += sum(_read(inner, k, shape, computations) for k, x in enumerate(user.operands) if x == name)
            elif not (_updates(user) and _origin(inside, user.operands[0]) == parameter):
                return whole
    return min(total, whole)
