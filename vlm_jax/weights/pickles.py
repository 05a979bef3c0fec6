# SPDX-License-Identifier: Apache-2.0
"""Torch's own files of weights (.bin, .pth), read without torch and without running what they say.

A pickle is a program. This reader knows the few words with which torch describes tensors, gives
them meanings of its own that only describe, and refuses every other word before it acts.
"""

import collections
import io
import math
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.weights.stored import DTYPES, Stored

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
LONGEST_PICKLE = 64 * 2**20  # bytes of description; the numbers themselves lie beside it
ZIP = b"PK\x03\x04"


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
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            (main,) = [name for name in entries if name.endswith("/data.pkl")]
            root = main.removesuffix("data.pkl")
            if entries[main].file_size > LONGEST_PICKLE:
                raise ValueError(f"{path}: its description of tensors is implausibly long")
            order = f"{root}byteorder"
            if order in entries and archive.read(order) != b"little":
                raise ValueError(f"{path} was written on a big-endian machine")
            found = _Descriptions(path, root, entries, archive.read(main)).load()
    except Refused as error:
        raise ValueError(str(error)) from None
    # A broken pickle may raise anything.
    except Exception as error:
        raise ValueError(
            f"{path} is cut off or no file of weights ({error}): copy or download it again"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(x, Stored) for x in found.values()):
        raise ValueError(f"{path} holds something else than named tensors")
    return dict(found)


class Refused(pickle.UnpicklingError):
    """A word of the pickle that describes no tensor."""


class _Descriptions(pickle.Unpickler):
    """Builds `Stored` where torch would build tensors."""

    def __init__(self, path: Path, root: str, entries: dict, program: bytes):
        super().__init__(io.BytesIO(program))
        self.path, self.root, self.entries = path, root, entries

    def find_class(self, module: str, name: str) -> Any:
        """What a word means here; Refused where it has no meaning."""
        # Fresh functions and plain strings: a pickle that tampers with them reaches nothing else.
        known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): lambda *of: self.tensor(*of[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *of: tensor,
            **{("torch", name): name for name in STORAGES},
        }
        if (module, name) not in known:
            raise Refused(
                f"{self.path} asks for {module}.{name}, which is no part of a file of weights: it "
                "is refused, for it could run code; get the weights as safetensors"
            )
        return known[module, name]

    def persistent_load(self, pid: Any) -> tuple[np.dtype, int, int]:
        """Type, place in the file and length of one storage."""
        kind, storage, key, _, count = pid
        entry = self.entries[f"{self.root}data/{key}"]
        dtype = DTYPES[STORAGES[storage]]
        stored = entry.compress_type == zipfile.ZIP_STORED
        if kind != "storage" or not stored or entry.file_size != count * dtype.itemsize:
            raise Refused(f"{self.path}: storage {key} is not as torch writes it")
        with self.path.open("rb") as file:
            # The local header has lengths of its own: torch pads it, so that numbers are aligned.
            file.seek(entry.header_offset)
            header = file.read(30)
        name, extra = struct.unpack("<HH", header[26:30])
        return dtype, entry.header_offset + 30 + name + extra, count

    def tensor(self, storage, offset: int, shape: tuple, strides: tuple) -> Stored:
        """A contiguous view of a storage."""
        dtype, place, count = storage
        expected = tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))
        # The stride of an axis of length 1 is never used, and torch leaves any number there.
        plain = all(
            n == 1 or (n > 1 and a == b) for n, a, b in zip(shape, strides, expected, strict=True)
        )
        if not plain or not 0 <= offset <= count - math.prod(shape):
            raise Refused(
                f"{self.path} holds a tensor {tuple(shape)} with strides {tuple(strides)}: save it "
                "again with .contiguous()"
            )
        return Stored(self.path, place + offset * dtype.itemsize, dtype, tuple(shape))
