# SPDX-License-Identifier: Apache-2.0
"""Reads the text of a compiled program: its operations, and how often each of them runs.

XLA's own cost analysis counts the body of a loop once. Here the trip count of a loop is read from
its condition; a loop whose count cannot be read counts once and is listed in `Module.unread`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BYTES = {
    "f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s16": 2,
    "u16": 2, "s8": 1, "u8": 1, "pred": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s4": 0.5, "u4": 0.5,
}  # fmt: skip
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
NAME = re.compile(r"%([\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of a program: `%name = type opcode(operands), rest`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str  # the operands as text
    rest: str
    root: bool = False

    @property
    def scope(self) -> str:
        """Where the operation comes from in the source, such as "jit(step)/llm/mlp/dot_general"."""
        match = re.search(r'op_name="([^"]*)"', self.rest)
        return match[1] if match else ""

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute such as `body` names."""
        match = re.search(rf"\b{attribute}=%?([\w.-]+)", self.rest)
        return match[1] if match else None


def elements(dims: str) -> int:
    """How many numbers an array with dimensions such as "4,8" holds."""
    return math.prod(int(n) for n in dims.split(",") if n)


def size_of(type: str) -> int:
    """Bytes of an array or a tuple of them, without padding."""
    return int(sum(BYTES.get(kind, 0) * elements(dims) for kind, dims, _ in ARRAY.findall(type)))


@functools.cache
def in_hbm(type: str) -> float:
    """Bytes that the arrays of a type take in HBM, padded to their tiles; 0 for those in VMEM."""
    total = 0.0
    for kind, dims, layout in ARRAY.findall(type):
        order, _, tiling = layout.strip("{}").partition(":")
        if kind not in BYTES or re.search(r"S\([1-9]\)", tiling):
            continue
        sizes = [int(n) for n in dims.split(",") if n]
        physical = [sizes[int(i)] for i in order.split(",") if i]  # fastest first
        tile = re.match(r"T\((\d+),(\d+)\)", tiling)
        if tile and len(physical) > 1:
            rows, lanes = int(tile[1]), int(tile[2])
            physical[:2] = [
                math.ceil(physical[0] / lanes) * lanes, math.ceil(physical[1] / rows) * rows
            ]  # fmt: skip
        total += BYTES[kind] * math.prod(physical)
    return total


def closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if not depth:
            return at
    raise ValueError(f"not an operation of a compiled program: {text[:80]!r}")


def operation(line: str) -> Operation | None:
    """The operation on a line; None if the line has none."""
    match = re.match(r"\s*(ROOT )?%?([\w.-]+) = ", line)
    if not match:
        return None
    rest = line[match.end() :]
    if rest.startswith("("):
        end = closing(rest, 0) + 1
    else:
        array = ARRAY.match(rest)
        if not array:
            return None
        end = array.end()
    opened = rest.find("(", end)
    if opened < 0:
        return None
    closed = closing(rest, opened)
    arguments = rest[opened + 1 : closed]
    return Operation(
        match[2],
        rest[:end],
        rest[end:opened].strip(),
        tuple(NAME.findall(arguments)),
        arguments,
        rest[closed + 1 :],
        bool(match[1]),
    )


class Module:
    """A compiled program, as `compiled.as_text()` gives it."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Operation]] = {}
        self.entry = ""
        current: list[Operation] = []
        for line in text.splitlines():
            if line[:1] in ("%", "E") and line.rstrip().endswith("{"):
                match = re.match(r"(ENTRY )?%?([\w.-]+)", line)
                assert match is not None
                current = self.computations[match[2]] = []
                if match[1]:
                    self.entry = match[2]
            elif line.startswith("  ") and (op := operation(line)) is not None:
                current.append(op)
        if not self.entry:
            raise ValueError("this text has no ENTRY: it is not a compiled program")
        self.unread: list[str] = []

    def table(self, name: str) -> dict[str, Operation]:
        """The operations of a computation by name."""
        return {op.name: op for op in self.computations[name]}

    def executed(self) -> Iterator[tuple[Operation, int, dict[str, Operation]]]:
        """Every operation outside fusions, how often it runs, and the operations of its computation
        by name."""
        yield from self._run(self.entry, 1)

    def _run(self, name: str, times: int) -> Iterator[tuple[Operation, int, dict[str, Operation]]]:
        table = self.table(name)
        for op in self.computations[name]:
            yield op, times, table
            if op.opcode == "while":
                body = op.called("body")
                if body in self.computations:
                    yield from self._run(body, times * self.trips(op))
            elif op.opcode == "call" and (to := op.called("to_apply")) in self.computations:
                yield from self._run(str(to), times)
            elif op.opcode == "conditional":
                listed = re.search(r"branch_computations=\{([^}]*)\}", op.rest)
                named = NAME.findall(listed[1]) if listed else [
                    op.called(side) for side in ("true_computation", "false_computation")
                ]  # fmt: skip
                for branch in named:
                    if branch in self.computations:
                        yield from self._run(branch, times)

    def inside(self, op: Operation) -> Iterator[tuple[Operation, dict[str, Operation]]]:
        """The operations inside a fusion or an asynchronous start, each with those of its
        computation by name."""
        to = op.called("calls") if op.opcode in ("fusion", "async-start") else None
        if to in self.computations:
            table = self.table(str(to))
            for inner in self.computations[str(to)]:
                yield inner, table
                yield from (more for more in self.inside(inner) if more[0] is not inner)

    def trips(self, loop: Operation) -> int:
        """How often the body of a loop runs; 1, and listed in `unread`, if that cannot be read.

        The counter starts at 0: the condition compares it with a constant, and the body adds 1 to
        it, or more in a loop that the compiler unrolled.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
        if known:
            return int(known[1])
        condition, body = loop.called("condition"), loop.called("body")
        limit = self._limit(str(condition))
        if limit is None or body not in self.computations:
            self.unread.append(loop.name)
            return 1
        last, index = limit
        return max(math.ceil(last / self._step(str(body), index)), 1)

    def _limit(self, condition: str) -> tuple[int, int | None] | None:
        """The constant that a counter is compared with, and the counter's place in the tuple."""
        if condition not in self.computations:
            return None
        constants = [
            int(op.arguments)
            for op, _ in self._whole(condition)
            if op.opcode == "constant" and op.arguments.lstrip("-").isdigit()
        ]
        compared = [op for op, _ in self._whole(condition) if op.opcode == "compare"]
        places = [
            int(match[1])
            for op in self.computations[condition]
            if op.opcode == "get-tuple-element" and (match := re.search(r"index=(\d+)", op.rest))
        ]
        if len(constants) != 1 or len(compared) != 1 or "direction=LT" not in compared[0].rest:
            return None
        return constants[0], places[0] if len(places) == 1 else None

    def _whole(self, name: str) -> Iterator[tuple[Operation, dict[str, Operation]]]:
        table = self.table(name)
        for op in self.computations[name]:
            yield op, table
            yield from self.inside(op)

    def _step(self, body: str, index: int | None) -> int:
        """What the body adds to its counter; 1 if it cannot be read."""
        table = self.table(body)
        root = next((op for op in self.computations[body] if op.root), None)
        if root is None or index is None or index >= len(root.operands):
            return 1
        counter = table.get(root.operands[index])
        if counter is None:
            return 1
        adds = [counter, *(op for op, _ in self.inside(counter))]
        if not any(op.opcode == "add" for op in adds):
            return 1
        inner = [op for op in adds if op.opcode == "constant"]
        inner += [
            table[name]
            for name in counter.operands
            if name in table and table[name].opcode == "constant"
        ]
        steps = [int(op.arguments) for op in inner if op.arguments.isdigit()]
        return steps[0] if len(steps) == 1 and steps[0] > 0 else 1
