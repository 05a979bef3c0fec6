# SPDX-License-Identifier: Apache-2.0
"""GGUF files: metadata and tensors read on demand, dequantized in pieces by the package `gguf`.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The package's own reader maps the
whole file, and takes any count that a damaged file states for true; the numbers are dequantized by
it, and the tests hold what is read here to what it reads.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from vlm_jax.weights.stored import Repeated, Stored, unrepeated
from vlm_jax.weights.values import value_text

MAGIC, VERSIONS = b"GGUF", (2, 3)
# Bytes; Gemma's 256,000 tokens with their merges take 16 MB.
LONGEST_HEADER = 32 * 2**20
SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8",
    11: "<i8", 12: "<f8",
}  # fmt: skip
TEXT, ARRAY = 8, 9  # the other kinds of values
PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class Header:
    """The beginning of a file, value after value; ValueError where it ends too early."""

    def __init__(self, path: Path, file: IO[bytes]):
        self.path, self.file, self.at = path, file, 0
        self.end = min(path.stat().st_size, LONGEST_HEADER)

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        self.at += count
        if self.at > self.end:
            raise ValueError(
                f"{self.path} is cut off or damaged: its description of the tensors ends behind "
                f"its first {self.end} bytes; copy or download it again"
            )
        return self.file.read(count)

    def whole(self, bytes_: int = 8) -> int:
        """An unsigned number."""
        return int.from_bytes(self.take(bytes_), "little")

    def text(self) -> str:
        """A text in UTF-8."""
        try:
            return self.take(self.whole()).decode()
        except UnicodeDecodeError:
            raise ValueError(f"{self.path} is damaged: one of its texts is not UTF-8") from None

    def numbers(self, kind: int, count: int) -> list[Any]:
        """Numbers of one kind."""
        dtype = np.dtype(SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()

    def value(self, kind: int) -> Any:
        """A number, a text, or a list of them."""
        if kind == TEXT:
            return self.text()
        if kind in SCALARS:
            return self.numbers(kind, 1)[0]
        if kind == ARRAY:
            kind, count = self.whole(4), self.whole()
            if kind == TEXT:
                return [self.text() for _ in range(count)]
            if kind in SCALARS:
                return self.numbers(kind, count)
        raise ValueError(f"{self.path} is damaged: it has a value of the unknown kind {kind}")


@dataclass(frozen=True)
class Rows(Stored):
    """A matrix of a GGUF file, read in whole rows.

    Attributes:
      kind: the name of the type that is dequantized to float32; "" for numbers as they are.
      heads: 0, or the number of heads between whose halves the rows are interleaved, which is
        undone: rows 0, 2, 4 ... of a head are its first half.
    """

    kind: str = ""
    heads: int = 0

    def part(self, start: int, stop: int) -> np.ndarray:
        """The numbers from position `start` up to `stop`, in order, flat."""
        columns = self.shape[-1]
        rows = math.prod(self.shape[:-1]) // self.heads if self.heads else 1
        first = start // (columns * rows) * rows
        last = -(-stop // (columns * rows)) * rows
        if self.kind:
            block, size = block_of(self.kind)
            width = columns // block * size
            raw = Stored(self.path, self.offset, np.dtype(np.uint8), self.shape)
            raw_rows = raw.part(first * width, last * width).reshape(last - first, width)
            numbers = dequantized(raw_rows, self.kind)
        else:
            numbers = super().part(first * columns, last * columns)
        if self.heads:
            numbers = numbers.reshape(-1, rows // 2, 2, columns).swapaxes(1, 2)
        return numbers.reshape(-1)[start - first * columns : stop - first * columns]


def library() -> Any:
    """The package `gguf`. Raises ValueError where it is not installed."""
    try:
        import gguf
    except ModuleNotFoundError:
        needed = "a GGUF file needs the package gguf: pip install 'vlm_jax[gguf]'"
        raise ValueError(needed) from None
    return gguf


@cache
def types() -> dict[int, str]:
    """The names of the types of tensors, by number."""
    return {int(kind): kind.name for kind in library().GGMLQuantizationType}


def block_of(kind: str) -> tuple[int, int]:
    """The numbers in a block of a type, and its bytes."""
    gguf = library()
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]


def dequantized(rows: np.ndarray, kind: str) -> np.ndarray:
    """Rows of bytes as float32."""
    gguf = library()
    return gguf.dequantize(rows, gguf.GGMLQuantizationType[kind])


@cache
def can_dequantize(kind: str) -> bool:
    """Whether the package knows the numbers of a type: it is asked for those of one block."""
    try:
        dequantized(np.zeros((1, block_of(kind)[1]), np.uint8), kind)
    except RuntimeError:  # it is not implemented
        return False
    return True


def read(path: Path) -> tuple[dict[str, Any], dict[str, Rows]]:
    """Metadata and tensors of a file under its own names; no number of a tensor is read.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for a file that is cut off, damaged, of another format, a part of several, or with
        tensors of a type that cannot be dequantized, naming the first.
    """
    with path.open("rb") as file:
        header = Header(path, file)
        if header.end < 4 or header.take(4) != MAGIC:
            raise ValueError(f"{path} is no GGUF file: it does not begin with {MAGIC.decode()}")
        if (version := header.whole(4)) not in VERSIONS:
            swapped = version % 2**16 == 0
            raise ValueError(
                f"{path} is GGUF {'in big-endian order' if swapped else f'version {version}'}; "
                f"supported are versions {', '.join(map(str, VERSIONS))} in little-endian order: "
                "convert the model to GGUF again"
            )
        tensor_count, value_count = header.whole(), header.whole()
        values = [(header.text(), header.value(header.whole(4))) for _ in range(value_count)]
        try:
            metadata = unrepeated(values)
            refuse_parts(path, metadata)
            entries = unrepeated(list(entries_of(header, tensor_count)))
        except Repeated as error:
            raise ValueError(f"{path} is damaged: it has {error} twice") from None
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 2**20:
            raise ValueError(f"{path}: general.alignment={value_text(alignment)} is not supported")
        begin = -(-header.at // alignment) * alignment
    return metadata, {name: placed(path, begin, name, *entry) for name, entry in entries.items()}


def refuse_parts(path: Path, metadata: dict[str, Any]) -> None:
    """Raises ValueError for one of several files of a model."""
    if (count := metadata.get("split.count", 1)) not in (0, 1):
        part = metadata.get("split.no")
        part = part + 1 if type(part) is int else part
        raise ValueError(
            f"{path} is part {value_text(part)} of {value_text(count)}: make one file of them with "
            "llama.cpp (llama-gguf-split --merge FIRST OUT)"
        )


def entries_of(header: Header, count: int) -> Iterator[tuple[str, tuple]]:
    """Each tensor as a header describes it: its name; its shape, number of the type and place."""
    for _ in range(count):
        name, dimensions = header.text(), header.whole(4)
        if not 1 <= dimensions <= 4:
            raise ValueError(f"{header.path} is damaged: {value_text(name)} has {dimensions} axes")
        # The axis along which numbers are neighbors comes first.
        shape = tuple(header.whole() for _ in range(dimensions))[::-1]
        yield name, (shape, header.whole(4), header.whole())


def placed(path: Path, begin: int, name: str, shape: tuple[int, ...], kind: int, at: int) -> Rows:
    """A tensor of a file. Raises ValueError if its type is not supported, or it is not whole."""
    known = types().get(kind)
    if known is None or not (known in PLAIN or can_dequantize(known)):
        raise ValueError(
            f"{path}: {value_text(name)} is of type {known or kind}, which the package gguf cannot "
            f"dequantize: get the model in another type, such as {', '.join(PLAIN)}, Q8_0 or Q4_K"
        )
    block, size = block_of(known)
    if shape[-1] % block or not 0 < math.prod(shape) < 2**48:
        raise ValueError(
            f"{path} is damaged: {value_text(name)} has the shape {value_text(shape)}, and blocks "
            f"of {known} have {block} numbers"
        )
    end, total = begin + at + math.prod(shape) // block * size, path.stat().st_size
    if end > total:
        raise ValueError(
            f"{path} is cut off: it has {total} bytes, and {value_text(name)} ends at {end}; copy "
            "or download it again"
        )
    dtype = np.dtype(PLAIN.get(known, np.float32))
    return Rows(path, begin + at, dtype, shape, "" if known in PLAIN else known)
