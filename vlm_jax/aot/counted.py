# SPDX-License-Identifier: Apache-2.0
"""What a compiled program computes, moves and sends on one device; loop bodies count per trip.

Matrix products are counted from the text, HBM bytes from the types and layouts of operands and
results, collectives by kind. docs/pods.md says where such numbers mislead.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping

from vlm_jax.aot.hlo import ARRAY, Module, Operation, in_hbm, size_of

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
               "collective-broadcast")  # fmt: skip
# Operations that move no data.
FREE = {"parameter", "bitcast", "tuple", "get-tuple-element", "constant", "after-all",
        "partition-id", "opt-barrier", "while", "conditional", "call"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """Communication of one kind from one place, and how often it runs.

    `bytes` is the whole tensor once: the result of a gather, the operand of a reduction. `sent` is
    what a device sends for it in a ring, `group` the devices that take part.
    """

    kind: str
    asynchronous: bool
    bytes: int
    sent: float
    group: int
    times: int
    scope: str


@dataclasses.dataclass(frozen=True)
class Tensor:
    """The result of an operation: its type, its bytes in HBM, its place in the source."""

    type: str
    bytes: int
    scope: str


@dataclasses.dataclass(frozen=True)
class Facts:
    """A program on one device.

    Attributes:
      flops: of matrix products and convolutions.
      kernel_calls: of Pallas kernels; kernel_flops, kernel_bytes: as the kernels declare them.
      cycles: the compiler's estimate by scope, without collectives and kernels.
      hbm_bytes: read and written by all operations, arrays in VMEM left out.
      saved_bytes: of the arrays that loops over layers leave for the backward pass.
      gradient_bytes: of the arrays that the backward loops leave.
      collectives: all of them. largest: arrays, the largest first.
      unread_loops: loops whose trip count could not be read; their bodies count once.
    """

    flops: float
    kernel_calls: int
    kernel_flops: float
    kernel_bytes: float
    cycles: Mapping[str, int]
    hbm_bytes: float
    saved_bytes: int
    gradient_bytes: int
    collectives: tuple[Collective, ...]
    largest: tuple[Tensor, ...]
    unread_loops: tuple[str, ...]


def dimensions(type: str) -> list[int]:
    """The sizes of an array."""
    match = ARRAY.match(type)
    return [int(n) for n in match[2].split(",") if n] if match else []


def flops_of(op: Operation, table: Mapping[str, Operation]) -> float:
    """FLOPs of a matrix product or a convolution, 2 per multiply-add; 0 for other operations."""
    if op.opcode not in ("dot", "convolution") or any(name not in table for name in op.operands):
        return 0.0
    left, right = (dimensions(table[name].type) for name in op.operands[:2])
    if op.opcode == "dot":
        listed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)
        contracted = [int(n) for n in (listed[1] if listed else "").split(",") if n]
        return 2.0 * math.prod(dimensions(op.type)) * math.prod(left[n] for n in contracted)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest)
    if not labels:
        return 0.0
    of_left, of_right, of_out = labels.groups()
    out = dimensions(op.type)
    features = out[of_out.index("f")] * right[of_right.index("i")]
    pairs = math.prod(
        reached(left[of_left.index(d)], right[of_right.index(d)], out[of_out.index(d)], *window)
        for d, window in windows(op, sum(d.isdigit() for d in of_out))
    )
    return 2.0 * out[of_out.index("b")] * features * pairs


def windows(op: Operation, count: int) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    """For each spatial dimension: its letter, stride, padding before, dilations of both sides."""
    text = re.search(r"window=\{([^}]*)\}", op.rest)
    window = dict(part.split("=") for part in text[1].split()) if text else {}

    def per(name: str, default: int) -> list[int]:
        parts = window[name].split("x") if name in window else [str(default)] * count
        return [int(part.split("_")[0]) for part in parts]

    values = zip(
        per("stride", 1), per("pad", 0), per("lhs_dilate", 1), per("rhs_dilate", 1), strict=True
    )
    yield from ((str(d), each) for d, each in enumerate(values))


@functools.cache
def reached(
    left: int, right: int, out: int, stride: int, pad: int, left_apart: int, right_apart: int
) -> int:
    """Pairs of an output position and a window position whose input exists, in one dimension.

    XLA writes batched products as convolutions in which most pairs fall between the inputs.
    """
    if right == 1 and pad == 0 and left_apart == 1:
        return out
    pairs = 0
    for k in range(right):
        for o in range(out):
            at = o * stride - pad + k * right_apart
            pairs += at >= 0 and at % left_apart == 0 and at // left_apart < left
    return pairs


def group_of(op: Operation) -> int:
    """How many devices take part in a collective."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", op.rest)
    if listed:
        return listed[1].count(",") + 1
    counted = re.search(r"replica_groups=\[(\d+),(\d+)\]", op.rest)
    if counted:
        return int(counted[2])
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", op.rest)
    if axes:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        return math.prod(int(sizes.get(name, 1)) for name in re.findall(r"'(\w+)'", axes[2]))
    return 1


def collective_of(
    op: Operation, table: Mapping[str, Operation], times: int, asynchronous: bool
) -> Collective | None:
    """The collective that an operation is; None for any other operation."""
    kind = op.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    read = sum(size_of(table[name].type) for name in op.operands if name in table)
    written = size_of(op.type)
    if op.opcode.endswith("-start") and op.type.startswith("("):
        written = max(written - read, read) if kind == "all-gather" else read
    whole, group = (written if kind == "all-gather" else read), group_of(op)
    ring = (group - 1) / group if group > 1 else 0.0
    sent = {"all-reduce": 2 * ring * whole, "collective-permute": float(whole)}.get(
        kind, ring * whole
    )
    return Collective(
        kind, asynchronous or op.opcode.endswith("-start"), whole, sent, group, times, op.scope
    )


def facts(text: str, scope_of: Callable[[str], str] = lambda scope: "all") -> Facts:
    """What a compiled program does on one device; `scope_of` names the part of an operation's
    source, by which cycles are added up."""
    module = Module(text)
    flops, moved = 0.0, 0.0
    kernels = [0, 0.0, 0.0]
    cycles: dict[str, int] = {}
    collectives, places = [], set()
    tensors: dict[tuple[str, str], Tensor] = {}
    for op, times, table in module.executed():
        estimate = re.search(r'"estimated_cycles":"(\d+)"', op.rest)
        if estimate:
            part = scope_of(op.scope)
            cycles[part] = cycles.get(part, 0) + int(estimate[1]) * times
        moved += times * traffic(op, table)
        if op.opcode not in FREE and not op.opcode.endswith(("-start", "-done")):
            for type in whole_arrays(op.type):
                tensors.setdefault((type, op.scope), Tensor(type, int(in_hbm(type)), op.scope))
        beside = op.opcode == "async-start" or "async" in f"{op.name} {op.called('calls')}"
        for inner, names in [(op, table), *module.inside(op)]:
            flops += times * flops_of(inner, names)
            kernels = [a + times * b for a, b in zip(kernels, declared(inner, names), strict=True)]
            sent = collective_of(inner, names, times, beside and inner is not op)
            if sent is None:
                continue
            if "all-reduce-scatter" in str(op.called("calls")):
                # The compiler's form of a reduce-scatter: only a shard of the reduction is kept.
                sent = dataclasses.replace(sent, kind="reduce-scatter", sent=sent.sent / 2)
            # An asynchronous collective is spread over several fusions, each of which repeats it
            # with its chain. Those of a `shard_map` have one channel.
            channel = re.search(r"channel_id=(\d+)", inner.rest)
            chain = re.search(r'chain_id="(\d+)"', inner.rest)
            place = (next(iter(table)), channel and channel[1], chain and chain[1])
            if channel is None or not sent.asynchronous or place not in places:
                collectives.append(sent)
                places.add(place)
    saved, gradients = kept_by_loops(module)
    largest = sorted(tensors.values(), key=lambda tensor: -tensor.bytes)[:20]
    return Facts(
        flops,
        int(kernels[0]),
        kernels[1],
        kernels[2],
        cycles,
        moved,
        saved,
        gradients,
        tuple(collectives),
        tuple(largest),
        tuple(dict.fromkeys(module.unread)),
    )


def whole_arrays(type: str) -> list[str]:
    """The arrays of a type, each as text."""
    return [match[0] for match in ARRAY.finditer(type)]


# Matrix products of each splash attention kernel over one triangle of queries and keys; the kernels
# declare no cost.
SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}


def splash_flops(op: Operation, table: Mapping[str, Operation]) -> float:
    """FLOPs of a splash attention kernel, from its operands; half of the pairs are masked."""
    kind = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", f"{op.name} {op.rest}")
    types = [table[name].type for name in op.operands if name in table]
    # Queries, keys and values: [B N T H], or without B where a device has one row. Before them come
    # integers: the blocks that are not masked.
    shapes = [dimensions(type) for type in types if type.startswith(("bf16", "f32"))]
    wide = [shape for shape in shapes if len(shape) >= 3 and shape[-1] > 1][:2]
    if not kind or len(wide) < 2:
        return 0.0
    query, keys = wide
    return float(SPLASH[kind[1]] * math.prod(query) * keys[-2])


def declared(op: Operation, table: Mapping[str, Operation]) -> tuple[int, float, float]:
    """For a Pallas kernel: 1, and the FLOPs and bytes that it declares; 0 for other operations."""
    if 'custom_call_target="tpu_custom_call"' not in op.rest:
        return 0, 0.0, 0.0
    if flops := splash_flops(op, table):
        return 1, flops, traffic(op, table)
    matches = [re.search(rf'"{name}":"(\d+)"', op.rest) for name in ("flops", "bytes_accessed")]
    return 1, *(float(match[1]) if match else 0.0 for match in matches)  # type: ignore[return-value]


def kept_by_loops(module: Module) -> tuple[int, int]:
    """Bytes of the stacked arrays that the loops of ENTRY fill: in forward passes, and in backward
    passes (gradients)."""
    kept = {False: 0, True: 0}
    for loop in module.computations[module.entry]:
        body = str(loop.called("body"))
        if loop.opcode != "while" or body not in module.computations:
            continue
        trips, table = module.trips(loop), module.table(body)
        root = next((op for op in module.computations[body] if op.root), None)
        types = whole_arrays(loop.type)
        if trips < 2 or root is None or len(types) != len(root.operands):
            continue
        for name, type in zip(root.operands, types, strict=True):
            sizes, made = dimensions(type), table.get(name)
            while made is not None and made.opcode == "get-tuple-element":
                made = table.get(made.operands[0])  # a fusion may fill several arrays
            filled = made is not None and made.opcode != "parameter"
            if filled and len(sizes) > 1 and sizes[0] == trips:
                kept["transpose(" in loop.scope] += int(in_hbm(type))
    return kept[False], kept[True]


def traffic(op: Operation, table: Mapping[str, Operation]) -> float:
    """Bytes of HBM that an operation reads and writes: its operands and its result, padded.

    An in-place update or a slice counts only the part that it touches. A fusion that contains one
    counts whole arrays, which is too much.
    """
    if op.opcode in FREE or op.opcode.endswith("-done"):
        return 0.0
    if '"bytes_accessed":"' in op.rest:  # a kernel's own count; its in-place operands are whole
        return float(re.findall(r'"bytes_accessed":"(\d+)"', op.rest)[0])
    read = [in_hbm(table[name].type) for name in op.operands if name in table]
    if op.opcode == "copy-start":  # its type names source and target; VMEM is no traffic
        return in_hbm(op.type)
    if op.opcode == "slice-start":  # its type names the array and the part copied to VMEM
        _, part, *_ = whole_arrays(op.type)
        return in_hbm(re.sub(r"S\(\d\)", "", part)) + in_hbm(part)
    if op.opcode == "dynamic-update-slice":
        return 2 * read[1]
    if op.opcode in ("dynamic-slice", "slice"):
        return 2 * in_hbm(op.type)
    return sum(read) + in_hbm(op.type)
