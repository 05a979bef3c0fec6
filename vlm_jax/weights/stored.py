# SPDX-License-Identifier: Apache-2.0
"""Tensors in files, read on demand, and the safetensors format, read and written in pieces.

Format: https://github.com/huggingface/safetensors#format. Its own reader maps whole files, and its
writer holds a whole shard in memory; here memory holds at most one tensor or one piece of it.
"""

import json
import math
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vlm_jax.weights.values import value_text

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
WEIGHTS = ("F32", "F16", "BF16", "F64")  # allowed types of a model's numbers
PIECE = 64 * 2**20  # bytes read, cast and written at a time
# Bytes. The format's own reader takes 100 MB, and JSON of that size takes several GB of memory; a
# shard with ten thousand tensors has 1.5 MB.
LONGEST_HEADER = 4 * 2**20
BLOCK = 2**22  # numbers checked together, to limit memory


@dataclass(frozen=True)
class Stored:
    """A C-ordered little-endian tensor at an offset of a file, read on demand."""

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of the first axis; a scalar is returned as it is."""
        if not self.shape:
            return self.part(0, 1).reshape(())
        stop = self.shape[0] if stop is None else stop
        row = math.prod(self.shape[1:])
        return self.part(start * row, stop * row).reshape(stop - start, *self.shape[1:])

    def pieces(self) -> Iterator[np.ndarray]:
        """All numbers in order, flat, at most PIECE bytes at a time."""
        step = PIECE // self.dtype.itemsize
        for start in range(0, self.size, step):
            yield self.part(start, min(start + step, self.size))

    def part(self, start: int, stop: int) -> np.ndarray:
        """The numbers from position `start` up to `stop`, in order, flat."""
        size = self.dtype.itemsize
        # Bytes first: numpy's file reader does not know bfloat16.
        raw = np.fromfile(
            self.path, np.uint8, (stop - start) * size, offset=self.offset + start * size
        )
        if raw.size != (stop - start) * size:
            raise ValueError(f"{self.path} ends before it should: copy or download it again")
        return raw.view(self.dtype)


def read_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file; only its header is read.

    Raises:
      ValueError: for a file that is cut off or is not a safetensors file.
    """
    total = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else total
        if length > min(LONGEST_HEADER, total - 8):
            raise ValueError(
                f"{path} is cut off or not a safetensors file: it has {total} bytes, its header "
                f"would end at {length + 8}; copy or download it again"
            )
        try:
            header = json.loads(file.read(length), object_pairs_hook=unrepeated)
        except Repeated as error:
            raise ValueError(f"{path}: its header names {error} twice") from None
        # Nested 100,000 deep, JSON is a RecursionError.
        except (ValueError, RecursionError):
            raise ValueError(f"{path} is not a safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a safetensors file: its header describes no tensors")
    header.pop("__metadata__", None)
    entries = sorted(described(path, name, entry) for name, entry in header.items())
    tensors, end = {}, 8 + length
    for start, stop, name, kind, shape in entries:
        tensor = Stored(path, 8 + length + start, DTYPES[kind], shape)
        if tensor.offset != end or stop - start != tensor.size * tensor.dtype.itemsize:
            raise ValueError(f"{path}: the header contradicts itself at {name}")
        tensors[name], end = tensor, 8 + length + stop
    if end != total:
        raise ValueError(
            f"{path} is cut off: it has {total} bytes, its header promises {end}; "
            "copy or download it again"
        )
    return tensors


class Repeated(ValueError):
    """A name that occurs twice in a JSON object; readers disagree on which one counts."""


def unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises Repeated if a name occurs twice."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise Repeated(value_text(counts.most_common(1)[0][0]))
    return fields


def described(path: Path, name: str, entry: Any) -> tuple[int, int, str, str, tuple[int, ...]]:
    """Begin, end, name, type and shape of one entry of a header; ValueError if it is invalid."""
    where = f"{path} is not a safetensors file: {value_text(name)} in its header"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {value_text(entry)}, which describes no tensors")
    if missing := [field for field in ("dtype", "shape", "data_offsets") if field not in entry]:
        raise ValueError(f"{where} has no {', '.join(missing)} and describes no tensors")
    kind, shape, places = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(
            f"{path}: {value_text(name)} has dtype {value_text(kind).strip(chr(39))}: weights may "
            f"be {', '.join(WEIGHTS)}"
        )
    for field, numbers, most in (("shape", shape, 64), ("data_offsets", places, 2)):
        are_whole = isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
        if not are_whole or len(numbers) > most or (field == "data_offsets" and len(numbers) < 2):
            raise ValueError(
                f"{where} has {field}={value_text(numbers)}: whole numbers from 0 are needed"
            )
    return *places, name, kind, tuple(shape)


def all_finite(numbers: np.ndarray) -> bool:
    """Whether all numbers are finite."""
    flat = numbers.reshape(-1)
    return all(_finite(flat[i : i + BLOCK]) for i in range(0, flat.size, BLOCK))


def _finite(numbers: np.ndarray) -> bool:
    # By the bits of the exponent, because arithmetic on half types is slow.
    exponent = {DTYPES["BF16"]: 0x7F80, DTYPES["F16"]: 0x7C00}.get(numbers.dtype)
    if exponent is None:
        return bool(np.isfinite(numbers).all())
    return not ((numbers.view(np.uint16) & exponent) == exponent).any()


def equal(one: Stored | np.ndarray, other: Stored | np.ndarray) -> bool:
    """Whether two tensors hold the same numbers, in any types; they are read in pieces."""
    if one is other or one.shape != other.shape:
        return one is other
    # One storage with two names, as torch saves tied weights.
    if type(one) is type(other) is Stored and one == other:
        return True
    return all(
        np.array_equal(
            *(part(x, start, start + BLOCK).astype(np.float32) for x in (one, other)),
            equal_nan=True,
        )
        for start in range(0, math.prod(one.shape), BLOCK)
    )


def part(tensor: Stored | np.ndarray, start: int, stop: int) -> np.ndarray:
    """The numbers of a tensor from position `start` up to `stop`, in order, flat."""
    if isinstance(tensor, Stored):
        return tensor.part(start, min(stop, tensor.size))
    return tensor.reshape(-1)[start:stop]


@dataclass(frozen=True)
class Pending:
    """A tensor to be written; `pieces` computes its numbers when they are needed.

    `where` is the beginning of messages about them, the file that they are read from.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]
    where: str = ""

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(folder: Path, tensors: list[Pending], *, shard: int = 5 * 10**9) -> None:
    """Writes model.safetensors, or shards of at most `shard` bytes with their index.

    A tensor larger than that has a shard of its own. Names and layout are those that transformers
    writes and reads.
    """
    shards: list[list[Pending]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > shard:
            shards.append([])
        shards[-1].append(tensor)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{k:05}-of-{len(shards):05}.safetensors" for k in range(1, len(shards) + 1)]
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors)},
            "weight_map": {
                t.name: name for name, of in zip(names, shards, strict=True) for t in of
            },
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    for name, of in zip(names, shards, strict=True):
        write_file(folder / name, of)


def write_file(path: Path, tensors: list[Pending]) -> None:
    """Writes one safetensors file."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    # Sorted names, as the format's own writer does within one dtype.
    tensors = sorted(tensors, key=lambda t: t.name)
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = dict(
            dtype=NAMES[tensor.dtype], shape=list(tensor.shape), data_offsets=[start, end]
        )
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            for piece in tensor.pieces():
                if not all_finite(piece):
                    raise ValueError(
                        f"{tensor.where}{tensor.name} holds NaN or infinite numbers: a model with "
                        "them cannot answer; get the file again, or take an earlier checkpoint"
                    )
                # Overflow to infinity is checked below, with the tensor's name in the message.
                with np.errstate(over="ignore"):
                    cast = np.ascontiguousarray(piece).astype(tensor.dtype, copy=False)
                if cast.dtype != piece.dtype and not finite_as(piece, cast):
                    raise ValueError(
                        f"{tensor.where}{tensor.name} holds numbers too large for {tensor.dtype}: "
                        "choose --dtype=bfloat16 or float32"
                    )
                file.write(cast.reshape(-1).view(np.uint8).data)


def finite_as(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether casting made no finite number infinite."""
    infinite = ~np.isfinite(after)
    return not infinite.any() or not np.isfinite(before[infinite]).any()
