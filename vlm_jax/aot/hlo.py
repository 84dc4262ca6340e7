"""Costs of a compiled program per chip, counted from its HLO text (`jax.stages.Compiled.as_text()`). Imports no JAX.

XLA's `cost_analysis()` counts the body of a loop once, so a scanned decoder of 32 layers shows 1/32 of its FLOPs. Here the
body counts once per iteration, nested loops multiply, and a conditional costs as much as its most expensive branch.
"""

from __future__ import annotations

import dataclasses
import math
import re

from vlm_jax.aot.hlo_text import NAME, Computation, Instruction, Program, Shape

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
    "ragged-all-to-all",
)  # fmt: skip
SLICES = ("dynamic-slice", "slice", "gather")
DCN = "DCN "  # before the name of a collective between TPU slices
MEGASCALE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
TURNS = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)|at_most_(\d+)_turns\)?/while"')


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A custom call, whose cost is not visible in the text."""

    target: str
    operands: tuple[Shape, ...]
    op_name: str  # its scope in the model


@dataclasses.dataclass
class Costs:
    """Per chip."""

    flops: float = 0.0  # of matrix products and convolutions, a multiply-add counted as 2
    memory_bytes: float = 0.0  # an estimate: what instructions outside of fusions read and write
    collectives: dict[str, float] = dataclasses.field(default_factory=dict)  # kind -> times
    sent_bytes: dict[str, float] = dataclasses.field(default_factory=dict)  # kind -> bytes
    kernels: dict[Kernel, float] = dataclasses.field(default_factory=dict)  # kernel -> times
    open_loops: int = 0  # loops with an unknown number of iterations, counted once

    def add(self, other: Costs, times: float = 1) -> None:
        self.flops += times * other.flops
        self.memory_bytes += times * other.memory_bytes
        self.open_loops += other.open_loops
        for kind, number in other.collectives.items():
            self.send(kind, times * number, times * other.sent_bytes[kind])
        for kernel, number in other.kernels.items():
            self.kernels[kernel] = self.kernels.get(kernel, 0) + times * number

    def send(self, kind: str, times: float, sent_bytes: float) -> None:
        self.collectives[kind] = self.collectives.get(kind, 0) + times
        self.sent_bytes[kind] = self.sent_bytes.get(kind, 0) + sent_bytes


def count(text: str) -> Costs:
    """The costs of running the program once."""
    return Counter(Program(text)).costs()


class Counter:
    """Counts each computation once and adds it once per call."""

    def __init__(self, program: Program):
        self.computations, self.program = program.computations, program
        self._costs: dict[str, Costs] = {}

    def costs(self) -> Costs:
        """The costs of running the program once."""
        return self._of(self.program.entry)

    def _of(self, name: str) -> Costs:
        """The costs of running a computation once, including the computations it calls."""
        if name not in self._costs:
            total, here = Costs(), self.computations[name]
            for instruction in here.by_name.values():
                self._add(instruction, here, total)
            self._costs[name] = total
        return self._costs[name]

    def _add(self, i: Instruction, here: Computation, total: Costs) -> None:
        kind = i.op.removesuffix("-start")
        if i.op == "while":
            turns = self._turns(i, here)
            total.open_loops += turns is None
            body = i.called("body")
            total.add(self._of(body or ""), 1 if turns is None else turns)
            return
        if i.op == "conditional":
            total.add(max((self._of(n) for n in _branches(i)), key=lambda c: c.flops))
            return
        if i.op == "dot":
            total.flops += _dot_flops(i, here)
        elif i.op == "reduce" and 'dot_general"' in i.attributes:
            # A product of one row and a matrix, computed without the matrix unit.
            total.flops += 2.0 * here.operand(i, 0).shapes[0].size
        elif i.op == "convolution":
            total.flops += _convolution_flops(i, here)
        elif kind in COLLECTIVES:
            self._collective(kind, i, here, total)
        elif i.op == "send":
            _between_slices(i, total)
        elif i.op == "custom-call":
            _custom_call(i, here, total)
        inner = i.called("to_apply" if i.op == "call" else "calls")
        if i.op in ("call", "fusion", "async-start") and inner:
            total.add(self._of(inner))
        total.memory_bytes += self._traffic(i, here)

    def _turns(self, loop: Instruction, here: Computation) -> int | None:
        """The number of iterations: as annotated, else derived from `counter < limit`, `counter + step` and the start.

        A loop that may end early counts as often as it may run: the loss names its scope `at_most_N_turns`.
        """
        known = TURNS.search(loop.attributes)
        if known:
            return int(known[1] or known[2])
        condition = self.computations[loop.called("condition") or ""]
        body = self.computations[loop.called("body") or ""]
        test = condition.by_name[condition.root]
        if test.op == "fusion":
            return None
        limit = _constant(condition, test.operands[1]) if test.op == "compare" else None
        index = _element(condition, test.operands[0]) if test.op == "compare" else None
        if limit is None or index is None or "direction=LT" not in test.attributes:
            return None
        start = _constant(here, here.operand(loop, 0).operands[index])
        result = body.by_name[body.by_name[body.root].operands[index]]
        while result.op in ("copy", "bitcast"):
            result = body.operand(result, 0)
        steps = [_constant(body, name) for name in result.operands] if result.op == "add" else []
        step = next((s for s in steps if s is not None), None)
        return None if start is None or not step else max(-(-(limit - start) // step), 0)

    def _collective(self, kind: str, i: Instruction, here: Computation, total: Costs) -> None:
        """Counts the bytes that a chip sends in a ring algorithm.

        A TPU's asynchronous all-gather is repeated in each fusion that overlaps with it; only its start counts. Its
        reduce-scatter appears as an all-reduce in a fusion that keeps a slice.
        """
        if here.fused:
            targets = {_target(x) for x in here.by_name.values() if x.op == "custom-call"}
            if "chain_id=" in i.attributes and "AsyncCollectiveStart" not in targets:
                return
            if kind == "all-reduce" and any(x.op == "dynamic-slice" for x in here.by_name.values()):
                kind = "reduce-scatter"
        size = self._group(i.attributes)
        given = sum(here.by_name[name].shapes[0].anywhere_bytes for name in i.operands)
        part = (size - 1) / size
        share = {"all-gather": size - 1, "all-reduce": 2 * part, "collective-permute": 1}
        total.send(kind, 1, given * share.get(kind, part))

    def _group(self, attributes: str) -> int:
        """The number of chips in each group of a collective, in any of XLA's three notations."""
        text = attributes.partition("replica_groups=")[2]
        if listed := re.match(r"\{\{([\d,]*)", text):
            return len(listed[1].split(","))
        if iota := re.match(r"\[\d+,(\d+)\]", text):
            return int(iota[1])
        if mesh := re.match(r"mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
            sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
            axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
            return math.prod(int(part or sizes[axis]) for axis, part in axes)
        return self.program.devices

    def _traffic(self, i: Instruction, here: Computation) -> float:
        """The bytes that an instruction reads from and writes to main memory."""
        if here.fused or i.op in FREE or i.op.endswith(("-done", "-update")):
            return 0
        if i.op == "custom-call" and _target(i) in NO_WORK:
            return 0
        if i.op == "fusion":
            return self._fusion_traffic(i, self.computations[i.called("calls") or ""], here)
        operands = [here.by_name[name] for name in i.operands]
        if i.op in SLICES:
            (result,), source = i.shapes, operands[0].shapes[0]
            return result.bytes + (0 if source.space else result.anywhere_bytes)
        if i.op == "dynamic-update-slice":
            return 2 * operands[1].shapes[0].anywhere_bytes
        if i.op.endswith("-start"):  # (destination, source, flags): either may be on-chip
            return sum(shape.bytes for shape in i.shapes[:2])
        read = sum(shape.bytes for operand in operands for shape in operand.shapes)
        return read + sum(shape.bytes for shape in i.shapes)

    def _fusion_traffic(self, i: Instruction, inner: Computation, here: Computation) -> float:
        """As `_traffic`, but an operand that the fusion only slices counts its slices, and one updated in place the update.

        The buffers of a collective that an earlier fusion started pass through without traffic: they count at its start.
        """
        total = 0.0
        under_way = _under_way(inner)
        for number, name in enumerate(i.operands):
            source, given = here.by_name[name].shapes[0], inner.parameters[number].name
            if under_way and all(user.name in under_way for user in inner.users[given]):
                continue
            parts = self._parts_read(inner, given)
            if parts is None:
                total += source.bytes
            elif not source.space:
                total += sum(shape.anywhere_bytes for shape in parts)
        root = inner.by_name[inner.root]
        written = [inner.by_name[n] for n in root.operands] if root.op == "tuple" else [root]
        for result in written:
            if under_way and (result.name in under_way or result.op == "parameter"):
                continue
            if result.op == "dynamic-update-slice":
                total += inner.operand(result, 1).shapes[0].anywhere_bytes
            else:
                total += sum(shape.bytes for shape in result.shapes)
        return total

    def _parts_read(self, inner: Computation, name: str) -> list[Shape] | None:
        """The slices that a fusion reads of a parameter, if every use slices it or updates it in place; otherwise None.

        A use may be a fusion inside of the fusion, as where a product takes its layer's part of stacked weights.
        """
        parts: list[Shape] = []
        for user in inner.users[name]:
            first = user.operands[0] == name
            if user.op in SLICES and first:
                parts += user.shapes
            elif user.op in ("bitcast", "fusion"):
                further = self._parts_behind(user, name, inner)
                if further is None:
                    return None
                parts += further
            elif not (user.op == "dynamic-update-slice" and first):
                return None
        return parts

    def _parts_behind(self, user: Instruction, name: str, inner: Computation) -> list[Shape] | None:
        if user.op == "bitcast":
            return self._parts_read(inner, user.name)
        nested = self.computations[user.called("calls") or ""]
        given = [number for number, operand in enumerate(user.operands) if operand == name]
        found = [self._parts_read(nested, nested.parameters[number].name) for number in given]
        if any(parts is None for parts in found):
            return None
        return [shape for parts in found for shape in parts or ()]


FREE = frozenset((
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "async-start",
    "send", "recv", "after-all", "partition-id", "replica-id", "optimization-barrier", "opt-barrier",
))  # fmt: skip

# Custom calls that are annotations and compute nothing.
NO_WORK = frozenset((
    "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveDone", "AsyncCollectiveStart",
    "ConcatBitcast", "GatherScatterIndicesBitpacked", "Sharding", "annotate_device_placement",
))  # fmt: skip


def _under_way(fused: Computation) -> set[str]:
    """What in a fusion carries on or ends a collective that an earlier one started, and the tuple of results; else empty."""
    every = fused.by_name.values()
    targets = {_target(i): i.name for i in every if i.op == "custom-call"}
    going = {i.name for i in every if i.op in COLLECTIVES and "chain_id=" in i.attributes}
    if not going or "AsyncCollectiveStart" in targets:
        return set()
    return going | {targets.get("AsyncCollectiveDone", fused.root)}


def _between_slices(i: Instruction, total: Costs) -> None:
    """Counts what a chip gives its host to exchange with those of the other slices, in a ring of one chip per slice."""
    kind = MEGASCALE.search(i.attributes)
    if kind is None:
        return
    listed = re.search(r'_xla_megascale_target="\{([^}]*)\}', i.attributes)
    spans = [span.split(":") for span in listed[1].split(",")] if listed else []
    slices = max(sum(int(span[-1]) - int(span[0]) + 1 for span in spans), 2)
    part = (slices - 1) / slices
    share = {
        "ALL_GATHER": slices - 1,
        "ALL_REDUCE": 2 * part,
        "REDUCE_SCATTER": part,
        "ALL_TO_ALL": part,
    }
    name = DCN + kind[1].lower().replace("_", "-")
    total.send(name, 1, i.shapes[0].anywhere_bytes * share.get(kind[1], 1))


def _branches(i: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", i.attributes)
    if listed:
        return NAME.findall(listed[1])
    return [i.called(f"{side}_computation") or "" for side in ("true", "false")]


def _target(i: Instruction) -> str:
    match = re.search(r'custom_call_target="([^"]*)"', i.attributes)
    return match[1] if match else ""


def _constant(here: Computation, name: str) -> int | None:
    """The integer constant `name`, possibly copied or converted; None if it is computed."""
    i = here.by_name[name]
    while i.op in ("copy", "bitcast", "convert"):
        i = here.operand(i, 0)
    return int(i.argument) if i.op == "constant" and i.argument.lstrip("-").isdigit() else None


def _element(here: Computation, name: str) -> int | None:
    """The index of `name` in the state of a loop, if it is an element of it."""
    i = here.by_name[name]
    match = re.search(r"index=(\d+)", i.attributes)
    return int(match[1]) if i.op == "get-tuple-element" and match else None


def _ints(pattern: str, attributes: str) -> list[int]:
    match = re.search(pattern, attributes)
    return [int(x) for x in match[1].split(",") if x] if match else []


def _dot_flops(i: Instruction, here: Computation) -> float:
    left = here.operand(i, 0).shapes[0]
    contracted = _ints(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
    return 2.0 * i.shapes[0].size * math.prod(left.dims[d] for d in contracted)


def _convolution_flops(i: Instruction, here: Computation) -> float:
    """FLOPs of a convolution, counting along each axis only the pairs of output and kernel positions that meet an input.

    TPUs express every matrix product as a convolution whose batch axes are dilated windows, most of which are empty.
    """
    left, right = (here.operand(i, n).shapes[0] for n in (0, 1))
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    assert labels is not None
    of_left, of_right, of_result = labels.groups()
    groups = [
        int(m[1]) if (m := re.search(rf"{kind}_group_count=(\d+)", i.attributes)) else 1
        for kind in ("feature", "batch")
    ]
    total = 2.0 * right.dims[of_right.index("i")] * i.shapes[0].dims[of_result.index("f")]
    total *= left.dims[of_left.index("b")] / groups[1]
    window = re.search(r"window=\{([^}]*)\}", i.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    for axis in range(len(of_left) - 2):
        label = str(axis)

        def value(key: str, default: str, axis: int = axis) -> str:
            return fields[key].split("x")[axis] if key in fields else default

        low = int(value("pad", "0_0").split("_")[0])
        stride, left_step, right_step = (
            int(value(key, "1")) for key in ("stride", "lhs_dilate", "rhs_dilate")
        )
        size = left.dims[of_left.index(label)]
        reach = (size - 1) * left_step
        total *= sum(
            0 <= (place := out * stride - low + tap * right_step) <= reach and not place % left_step
            for out in range(i.shapes[0].dims[of_result.index(label)])
            for tap in range(right.dims[of_right.index(label)])
        )
    return total


def _custom_call(i: Instruction, here: Computation, total: Costs) -> None:
    """Matrix products of a GPU are custom calls, counted from their shapes; other kernels are listed in `total.kernels`."""
    target = _target(i)
    if target in NO_WORK:
        return
    operands = tuple(here.by_name[name].shapes[0] for name in i.operands)
    if "gemm" in target or "matmul" in target:
        contracted = _ints(
            r"lhs_contracting_dimensions:\[([\d,]*)\]", i.attributes.replace('"', "")
        )
        total.flops += 2.0 * i.shapes[0].size * math.prod(operands[0].dims[d] for d in contracted)
        return
    name = re.search(r'op_name="([^"]*)"', i.attributes)
    kernel = Kernel(target, operands, name[1] if name else "")
    total.kernels[kernel] = total.kernels.get(kernel, 0) + 1
