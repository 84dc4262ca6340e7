"""A parser of HLO text: computations, their instructions and shapes. Imports no JAX."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32,
    "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128, "token": 0, "opaque": 0,
}  # fmt: skip
SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^{}]*\})?")
SPACE = re.compile(r"S\((\d+)\)")
NAME = re.compile(r"%([\w.\-]+)")
COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array on one chip. space: 0 for main memory, 1 for a TPU's vector memory, 5 for the host's memory."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """The bytes of an array in main memory; 0 if it is in another memory."""
        return 0 if self.space else self.anywhere_bytes

    @property
    def anywhere_bytes(self) -> float:
        return self.size * BITS.get(self.dtype, 8) / 8  # all f8 types have 8 bits


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shapes: tuple[Shape, ...]  # of the result; several for a tuple
    op: str
    operands: tuple[str, ...]
    argument: str  # the text between the parentheses: a constant's value, a parameter's number
    attributes: str

    def called(self, key: str) -> str | None:
        """The name of the computation in the attribute `key=%name`."""
        match = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return match and match[1]


def shapes_of(text: str) -> tuple[Shape, ...]:
    """Every array in a type such as `(f32[2,3]{1,0:S(1)}, s32[])`."""
    found = []
    for dtype, dims, layout in SHAPE.findall(text):
        space = SPACE.search(layout)
        sizes = tuple(int(d) for d in dims.split(",") if d)
        found.append(Shape(dtype, sizes, int(space[1]) if space else 0))
    return tuple(found)


def _lines(text: str) -> Iterator[str]:
    """Lines of the text. Quoted metadata may contain line breaks; the pieces are joined."""
    held = ""
    for line in text.splitlines():
        if held and not line.startswith(("  %", "  ROOT ")) and line != "}":
            held += line
            continue
        if held:
            yield held
            held = ""
        if line.startswith(("  %", "  ROOT ")):
            held = line
        else:
            yield line


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"unbalanced: {text[start : start + 80]}")


def _instruction(line: str) -> Instruction | None:
    line = COMMENT.sub("", line).strip().removeprefix("ROOT ")
    name, equals, rest = line.partition(" = ")
    if not equals:
        return None
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opened = rest.index("(", end)
    closed = _closing(rest, opened)
    argument = rest[opened + 1 : closed]
    return Instruction(
        name.lstrip("%"), shapes_of(rest[:end]), rest[end:opened].strip(), tuple(NAME.findall(argument)), argument,
        rest[closed + 1 :],
    )  # fmt: skip


class Computation:
    """Instructions by name, in program order; `root` is the name of the result."""

    def __init__(self) -> None:
        self.by_name: dict[str, Instruction] = {}
        self.root = ""
        self.fused = False  # the body of a fusion

    def operand(self, instruction: Instruction, number: int) -> Instruction:
        return self.by_name[instruction.operands[number]]

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        found = (i for i in self.by_name.values() if i.op == "parameter")
        return {int(i.argument): i for i in found}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = collections.defaultdict(list)
        for instruction in self.by_name.values():
            for name in set(instruction.operands):
                users[name].append(instruction)
        return users


class Program:
    """A parsed HLO module."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        partitions = re.search(r"num_partitions=(\d+)", text)
        replicas = re.search(r"replica_count=(\d+)", text)
        self.devices = math.prod(int(m[1]) for m in (partitions, replicas) if m)
        here: Computation | None = None
        for line in _lines(text):
            if here is None and line.endswith("{") and " -> " in line:
                name = line.removeprefix("ENTRY ").lstrip("%").split(" ", 1)[0]
                here = self.computations[name] = Computation()
                self.entry = name if line.startswith("ENTRY ") else self.entry
            elif line == "}":
                here = None
            elif here is not None:
                instruction = _instruction(line)
                if instruction is not None:
                    here.by_name[instruction.name] = instruction
                    if line.lstrip().startswith("ROOT "):
                        here.root = instruction.name
        for computation in self.computations.values():
            for instruction in computation.by_name.values():
                inner = instruction.called("calls") if instruction.op == "fusion" else None
                if inner:
                    self.computations[inner].fused = True
