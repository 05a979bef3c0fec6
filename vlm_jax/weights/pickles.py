# SPDX-License-Identifier: Apache-2.0
"""Reads torch's files of weights (.bin, .pth) without torch and without running their code.

A pickle is a program for a stack machine. This reader is such a machine with the few instructions
that torch writes and the few names with which it describes tensors. Every other instruction and
name is refused before it runs, and so is a program longer than any that describes a model. Python's
own unpickler is not used: it reserves memory for any memo index in a program, and hashes tuples
that are nested deeper than its stack.
"""

import itertools
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.weights.stored import DTYPES, Stored
from vlm_jax.weights.values import value_text

STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
# The description of a tensor takes about 150 bytes and 40 instructions, so these are 13,000
# tensors; the numbers themselves are outside the pickle.
LONGEST_PICKLE = 2 * 2**20
MOST_INSTRUCTIONS = 2**19
LONGEST_DIRECTORY = 4 * 2**20  # bytes of a zip's directory, about 70 for each tensor
ZIP = b"PK\x03\x04"
# The end of a zip: its signature, and the signatures of the records before it in a large one.
END, LOCATOR, LARGE_END = b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06"


class Refused(ValueError):
    """A file that does not describe tensors; the text is the message for the user."""


def read_torch(path: Path) -> dict[str, Stored]:
    """The tensors of a state dict that torch (1.6 or later) saved.

    Raises:
      ValueError: for a file in another format, one that is cut off, one that holds anything but
        named tensors, and one that asks for code to be run.
    """
    with path.open("rb") as file:
        if file.read(4) != ZIP:
            raise ValueError(
                f"{path} is not in torch's zip format, so it is refused unread: only torch >= 1.6 "
                "files and safetensors can be read without running them; save it again as either"
            )
    try:
        check_directory(path)
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            mains = [name for name in entries if name.endswith("/data.pkl")]
            if len(mains) != 1:
                raise Refused(f"{path} has {len(mains)} descriptions of tensors instead of one")
            (main,) = mains
            root = main.removesuffix("data.pkl")
            order = f"{root}byteorder"
            if order in entries and small(path, archive, entries[order], 16) != b"little":
                raise Refused(f"{path} was written on a big-endian machine")
            program = small(path, archive, entries[main], LONGEST_PICKLE)
            state = Machine(path, root, entries).run(program)
    except Refused as error:
        raise ValueError(str(error)) from None
    # Errors of zipfile for other files, and of pickletools for a program that is cut off.
    except (
        zipfile.BadZipFile, zipfile.LargeZipFile, RuntimeError, EOFError,
        ValueError, OverflowError, struct.error,
    ) as error:  # fmt: skip
        message = " ".join(str(error).split())
        raise ValueError(
            f"{path} is cut off or not a file of weights ({message}): copy or download it again"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(x, Stored) for x in state.values()):
        raise ValueError(f"{path} holds something else than named tensors")
    if wrong_names := [name for name in state if not isinstance(name, str)]:
        raise ValueError(f"{path} has a tensor named {value_text(wrong_names[0])}: names are texts")
    return dict(state)


def check_directory(path: Path) -> None:
    """Raises Refused if a zip's directory is too long for weights: zipfile would read all of it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 2**16 - 22))
        tail = file.read()
        at = tail.rfind(END)
        if at < 0 or len(tail) < at + 22:
            raise zipfile.BadZipFile("the end of its directory is missing")
        (length,) = struct.unpack_from("<I", tail, at + 12)
        if at >= 20 and tail[at - 20 : at - 16] == LOCATOR:
            (place,) = struct.unpack_from("<Q", tail, at - 12)
            file.seek(min(place, size))
            record = file.read(56)
            if len(record) < 56 or record[:4] != LARGE_END:
                raise zipfile.BadZipFile("the end of its directory is missing")
            (length,) = struct.unpack_from("<Q", record, 40)
    if length > LONGEST_DIRECTORY:
        raise Refused(f"{path}: its directory of {length} bytes is implausibly long for weights")


def small(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, most: int) -> bytes:
    """The content of an uncompressed entry of at most `most` bytes."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise Refused(f"{path}: {value_text(entry.filename)} is compressed, which torch never does")
    if entry.file_size > most:
        raise Refused(
            f"{path}: its description of tensors ({value_text(entry.filename)}, {entry.file_size} "
            f"bytes) is implausibly long: {most} at most"
        )
    return archive.read(entry)


@dataclass(frozen=True)
class Word:
    """A known name in a program, and the function that it calls."""

    name: str
    makes: Callable[..., Any] | None = None


class Mark:
    """A marker on the stack; the values above it are taken together."""


@dataclass(frozen=True)
class Storage:
    """The numbers of some tensors: their type, their offset in the file and their count."""

    dtype: np.dtype
    place: int
    count: int


# Instructions that push a value from the program on the stack.
VALUES = frozenset({
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
    "BINSTRING", "SHORT_BINSTRING", "NONE", "NEWTRUE", "NEWFALSE",
})  # fmt: skip
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Machine:
    """Runs the program of one file and builds `Stored` where torch would build tensors."""

    def __init__(self, path: Path, root: str, entries: dict[str, zipfile.ZipInfo]):
        self.path, self.root, self.entries = path, root, entries
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.words = {
            ("collections", "OrderedDict"): Word("OrderedDict", self.dictionary),
            ("torch._utils", "_rebuild_tensor_v2"): Word("tensor", self.tensor),
            ("torch._utils", "_rebuild_parameter"): Word("parameter", self.parameter),
            **{("torch", name): Word(name) for name in STORAGES},
        }

    def run(self, program: bytes) -> Any:
        """The value that the program builds.

        Raises:
          Refused: for an instruction or a name that torch does not use for tensors.
          ValueError: for a program that is cut off.
        """
        # Counted first, because reading them is fast and running them is slow.
        if any(
            True for _ in itertools.islice(pickletools.genops(program), MOST_INSTRUCTIONS, None)
        ):
            raise Refused(
                f"{self.path}: its description of tensors is implausibly long: more than "
                f"{MOST_INSTRUCTIONS} instructions"
            )
        for code, value, _ in pickletools.genops(program):
            if code.name == "STOP":
                return self.pop()
            self.step(code.name, value)
        raise ValueError("its description does not end")

    def step(self, name: str, value: Any) -> None:
        """Runs one instruction."""
        if name in VALUES:
            self.stack.append(CONSTANTS.get(name, value))
        elif name in EMPTY:
            self.stack.append(EMPTY[name]())
        elif name == "MARK":
            self.stack.append(Mark)
        elif name in TUPLES:
            self.stack.append(tuple(reversed([self.pop() for _ in range(TUPLES[name])])))
        elif name == "TUPLE":
            self.stack.append(tuple(self.marked()))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if value is None else value] = self.top()
        elif name in ("BINGET", "LONG_BINGET"):
            if value not in self.memo:
                raise Refused(f"{self.path} reads memo {value}, which nothing was put in")
            self.stack.append(self.memo[value])
        elif name in ("SETITEM", "SETITEMS"):
            self.put([self.pop(), self.pop()][::-1] if name == "SETITEM" else self.marked())
        elif name in ("APPEND", "APPENDS"):
            self.append([self.pop()] if name == "APPEND" else self.marked())
        elif name == "GLOBAL":
            self.word(*value.split(" ", 1))
        elif name == "STACK_GLOBAL":
            self.word(*[self.pop(), self.pop()][::-1])
        elif name == "BINPERSID":
            self.stack.append(self.storage(self.pop()))
        elif name == "REDUCE":
            self.call(self.pop(), self.pop())
        elif name == "BUILD":
            # A state dict has the versions of its modules, which do not concern tensors.
            self.pop()
            self.expect(self.top(), dict)
        elif name not in ("PROTO", "FRAME"):
            raise Refused(
                f"{self.path} has the instruction {name}, which is not part of a file of weights: "
                "it is refused; get the weights as safetensors"
            )

    def pop(self) -> Any:
        """Removes and returns the last value of the stack."""
        if not self.stack or self.stack[-1] is Mark:
            raise ValueError("its description takes a value that does not exist")
        return self.stack.pop()

    def top(self) -> Any:
        """The last value of the stack."""
        if not self.stack or self.stack[-1] is Mark:
            raise ValueError("its description takes a value that does not exist")
        return self.stack[-1]

    def marked(self) -> list[Any]:
        """Removes the values after the last mark, and the mark, and returns the values."""
        values = []
        while self.stack and self.stack[-1] is not Mark:
            values.append(self.stack.pop())
        if not self.stack:
            raise ValueError("its description takes a value that does not exist")
        self.stack.pop()
        return values[::-1]

    def expect(self, value: Any, kind: Any) -> Any:
        """`value`, or Refused if it has another type than torch writes there."""
        if not isinstance(value, kind):
            raise Refused(f"{self.path} holds something else than named tensors")
        return value

    def put(self, pairs: list[Any]) -> None:
        """Adds alternating names and values to the dictionary on top of the stack."""
        target = self.expect(self.top(), dict)
        if len(pairs) % 2:
            raise ValueError("its description has a name without a value")
        for name, value in zip(pairs[::2], pairs[1::2], strict=True):
            # A tuple as a name may be nested deeper than can be hashed.
            target[self.expect(name, str | int)] = value

    def append(self, values: list[Any]) -> None:
        """Appends values to the list on top of the stack."""
        self.expect(self.top(), list).extend(values)

    def word(self, module: Any, name: Any) -> None:
        """Pushes a known name on the stack; Refused for an unknown one."""
        are_texts = isinstance(module, str) and isinstance(name, str)
        if not are_texts or (module, name) not in self.words:
            full_name = (
                f"{module}.{name}" if are_texts else f"{value_text(module)}.{value_text(name)}"
            )
            raise Refused(
                f"{self.path} asks for {value_text(full_name).strip(chr(39))}, which is not part "
                "of a file of weights: it is refused, because it could run code; get the weights "
                "as safetensors"
            )
        self.stack.append(self.words[module, name])

    def call(self, arguments: Any, word: Any) -> None:
        """Pushes the result of a known name for its arguments."""
        if not isinstance(word, Word) or word.makes is None or not isinstance(arguments, tuple):
            raise Refused(f"{self.path} holds something else than named tensors")
        self.stack.append(word.makes(*arguments[:8]))

    def dictionary(self, *pairs: Any) -> dict[str, Any]:
        """An OrderedDict of torch, which starts empty and is filled later."""
        if pairs and pairs != ([],):
            raise Refused(f"{self.path} holds something else than named tensors")
        return {}

    def parameter(self, tensor: Any = None, *rest: Any) -> Stored:
        """A tensor that was a parameter."""
        del rest
        return self.expect(tensor, Stored)

    def storage(self, description: Any) -> Storage:
        """Type, place in the file and length of one storage."""
        wrong = Refused(f"{self.path}: storage {value_text(description)} is not as torch writes it")
        if (
            not isinstance(description, tuple)
            or len(description) != 5
            or description[0] != "storage"
        ):
            raise wrong
        _, word, key, _, count = description
        named = isinstance(word, Word) and word.name in STORAGES
        if not named or not isinstance(key, str) or not natural(count):
            raise wrong
        dtype = DTYPES[STORAGES[word.name]]
        entry = self.entries.get(f"{self.root}data/{key}")
        if entry is None:
            raise Refused(f"{self.path} is cut off: storage {value_text(key)} is not there")
        stored = entry.compress_type == zipfile.ZIP_STORED
        if not stored or entry.file_size != count * dtype.itemsize:
            raise wrong
        with self.path.open("rb") as file:
            # The local header has its own lengths, because torch pads it to align the numbers.
            file.seek(entry.header_offset)
            header = file.read(30)
            total = file.seek(0, 2)
        if len(header) < 30 or header[:4] != ZIP:
            raise wrong
        name, extra = struct.unpack("<HH", header[26:30])
        place = entry.header_offset + 30 + name + extra
        if place + entry.file_size > total:
            raise Refused(f"{self.path} is cut off inside storage {value_text(key)}")
        return Storage(dtype, place, count)

    def tensor(self, *arguments: Any) -> Stored:
        """A contiguous view of a storage."""
        storage, offset, shape, strides = (*arguments, None, None, None, None)[:4]
        numbers = isinstance(shape, tuple) and isinstance(strides, tuple)
        if not isinstance(storage, Storage) or not numbers or not natural(offset):
            raise Refused(f"{self.path} holds something else than named tensors")
        if not all(map(natural, (*shape, *strides))) or not len(shape) == len(strides) <= 64:
            raise Refused(f"{self.path} holds a tensor of shape {value_text(shape)}")
        expected = tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))
        # The stride of an axis of length 1 is never used, and torch leaves any number there.
        plain = all(
            n == 1 or (n > 1 and a == b) for n, a, b in zip(shape, strides, expected, strict=True)
        )
        if not plain or not 0 <= offset <= storage.count - math.prod(shape):
            raise Refused(
                f"{self.path} holds a tensor {shape} with strides {strides}: save it again with "
                ".contiguous()"
            )
        place = storage.place + offset * storage.dtype.itemsize
        return Stored(self.path, place, storage.dtype, shape)


def natural(value: Any) -> bool:
    """Whether a value is a whole number from 0, and not a bool."""
    return type(value) is int and value >= 0
