# SPDX-License-Identifier: Apache-2.0
"""Tensors that lie in files, as yet unread; and the safetensors format, read and written in pieces.

Format: https://github.com/huggingface/safetensors#format. Its own reader maps whole files, and its
writer takes a whole shard in memory; here no more than one tensor or one piece of it ever is.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

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
WEIGHTS = ("F32", "F16", "BF16", "F64")  # what the numbers of a model may be stored in
PIECE = 64 * 2**20  # bytes read, cast and written at a time
LONGEST_HEADER = 100 * 2**20  # bytes, as in the format's own reader


@dataclass(frozen=True)
class Stored:
    """A C-ordered little-endian tensor at an offset of a file; nothing is read before it is asked
    for."""

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of the first axis (of a scalar: itself)."""
        if not self.shape:
            return self._numbers(0, 1).reshape(())
        stop = self.shape[0] if stop is None else stop
        row = math.prod(self.shape[1:])
        return self._numbers(start * row, stop * row).reshape(stop - start, *self.shape[1:])

    def pieces(self) -> Iterator[np.ndarray]:
        """All numbers in order, flat, at most PIECE bytes at a time."""
        step = PIECE // self.dtype.itemsize
        for start in range(0, self.size, step):
            yield self._numbers(start, min(start + step, self.size))

    def _numbers(self, start: int, stop: int) -> np.ndarray:
        size = self.dtype.itemsize
        # Bytes first: numpy's file reader does not know bfloat16.
        raw = np.fromfile(
            self.path, np.uint8, (stop - start) * size, offset=self.offset + start * size
        )
        if raw.size != (stop - start) * size:
            raise ValueError(f"{self.path} ends before it should: copy or download it again")
        return raw.view(self.dtype)


def read_safetensors(path: Path) -> dict[str, Stored]:
    """What a safetensors file holds, from its header alone.

    Raises:
      ValueError: for a file that is cut off, or is none.
    """
    total = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else total
        if length > min(LONGEST_HEADER, total - 8):
            raise ValueError(
                f"{path} is cut off or no safetensors file: it has {total} bytes, its header "
                f"would end at {length + 8}; copy or download it again"
            )
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise ValueError(f"{path} is no safetensors file: its header is not JSON") from None
    try:
        header.pop("__metadata__", None)
        entries = sorted(
            (*of["data_offsets"], name, of["dtype"], tuple(of["shape"]))
            for name, of in header.items()
        )
    except (AttributeError, KeyError, TypeError):
        raise ValueError(
            f"{path} is no safetensors file: its header describes no tensors"
        ) from None
    found, end = {}, 8 + length
    for start, stop, name, kind, shape in entries:
        if kind not in DTYPES:
            raise ValueError(
                f"{path}: {name} has dtype {kind}: weights may be {', '.join(WEIGHTS)}"
            )
        tensor = Stored(path, 8 + length + start, DTYPES[kind], shape)
        if tensor.offset != end or stop - start != tensor.size * tensor.dtype.itemsize:
            raise ValueError(f"{path}: the header is at odds with itself at {name}")
        found[name], end = tensor, 8 + length + stop
    if end != total:
        raise ValueError(
            f"{path} is cut off: it has {total} bytes, its header promises {end}; "
            "copy or download it again"
        )
    return found


@dataclass(frozen=True)
class Pending:
    """A tensor that is to be written: its numbers are made when their turn comes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
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
    # Names in order, as the format's own writer has them within one dtype.
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
                # Overflow to infinity is looked for below, and said with the tensor's name.
                with np.errstate(over="ignore"):
                    cast = np.ascontiguousarray(piece).astype(tensor.dtype, copy=False)
                if cast.dtype != piece.dtype and not finite_as(piece, cast):
                    raise ValueError(
                        f"{tensor.name} holds numbers too large for {tensor.dtype}: "
                        "choose --dtype=bfloat16 or float32"
                    )
                file.write(cast.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def finite_as(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether casting made no finite number infinite."""
    lost = ~np.isfinite(after)
    return not lost.any() or not np.isfinite(before[lost]).any()
