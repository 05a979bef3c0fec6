# SPDX-License-Identifier: Apache-2.0
"""The arrays of a checkpoint on the disk, read box by box, and the digests written beside them.

Orbax writes them (OCDBT with Zarr inside). Its own reader has barriers between processes, at which
the others would wait forever for a process that meets a damaged file. Here every process reads what
it needs, and results are compared afterwards.
"""

import asyncio
import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from vlm_jax.training import digest

DIGESTS = "digests"  # item of a step
READERS = 8  # threads that read boxes, or add up digests
AHEAD = 4  # arrays that are read ahead


class Damaged(ValueError):
    """A checkpoint that is not what was written."""


class Box(NamedTuple):
    """A part of an array: from `start` to `stop` in each dimension."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @classmethod
    def of(cls, index: Sequence[slice], shape: Sequence[int]) -> "Box":
        """The box of an index that a sharding gives."""
        cut = [s.indices(n) for s, n in zip(index, shape, strict=True)]
        return cls(tuple(a for a, _, _ in cut), tuple(b for _, b, _ in cut))

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))

    @property
    def size(self) -> int:
        return math.prod(b - a for a, b in zip(self.start, self.stop, strict=True))

    def __str__(self) -> str:
        return "[" + ", ".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True)) + "]"


# --- What is written ------------------------------------------------------------------------------


@dataclass
class Pieces:
    """The pieces of one array that this process writes, in host memory."""

    shape: tuple[int, ...]
    dtype: str
    pieces: list[tuple[Box, np.ndarray]] = field(default_factory=list)

    def described(self) -> dict[str, Any]:
        """The entry of the array in the file of digests."""
        digests = [(box, digest.of_piece(x, box.start, self.shape)) for box, x in self.pieces]
        rows = [[list(box.start), list(box.stop), f"{d:016x}"] for box, d in digests]
        return {"shape": list(self.shape), "dtype": self.dtype, "pieces": rows}


def pieces_of(arrays: Mapping[str, jax.Array]) -> dict[str, Pieces]:
    """The pieces that this process is responsible for: the first copy of each box.

    They are on the host when this returns. Orbax uses the same copies, so each is made once.
    """
    firsts = {
        name: [s for s in x.addressable_shards if s.replica_id == 0] for name, x in arrays.items()
    }
    for shards in firsts.values():
        for shard in shards:
            shard.data.copy_to_host_async()
    return {
        name: Pieces(
            x.shape,
            str(x.dtype),
            [(Box.of(s.index, x.shape), np.asarray(s.data)) for s in firsts[name]],
        )
        for name, x in arrays.items()
    }


class Handler(ocp.AsyncCheckpointHandler):
    """Computes the digests in the background: a step is not finished without them."""

    async def async_save(self, directory: Any, args: "Save") -> list[Any]:
        return [
            ocp.future.CommitFutureAwaitingContractedSignals(
                self.write(directory, args), name="digests"
            )
        ]

    async def write(self, directory: Any, args: "Save") -> None:
        names = list(args.arrays)
        with ThreadPoolExecutor(READERS) as pool:
            digests = list(pool.map(lambda name: args.arrays[name].described(), names))
        about = {"processes": jax.process_count(), "arrays": dict(zip(names, digests, strict=True))}
        (directory / f"process_{jax.process_index()}.json").write_text(json.dumps(about))

    def save(self, directory: Any, args: "Save") -> None:
        asyncio.run(self.write(directory, args))

    def restore(self, directory: Any, args: Any = None) -> "Manifest | None":
        return Manifest.read(epath.Path(directory).parent)


@ocp.args.register_with_handler(Handler, for_save=True)
@dataclass
class Save(ocp.args.CheckpointArgs):
    """The pieces of which digests are written."""

    arrays: dict[str, Pieces]


@ocp.args.register_with_handler(Handler, for_restore=True)
@dataclass
class Restore(ocp.args.CheckpointArgs):
    """Reads the digests of a step."""


# --- What is read ---------------------------------------------------------------------------------


@dataclass
class Manifest:
    """The digests of a step: for each array its shape, its type and the digests of its pieces."""

    arrays: dict[str, tuple[tuple[int, ...], str, list[tuple[Box, int]]]]

    @classmethod
    def read(cls, step: Any) -> "Manifest | None":
        """The digests in a step's folder; None if it has none, as from earlier versions.

        Raises:
          Damaged: if some are missing.
        """
        folder = epath.Path(step) / DIGESTS
        if not folder.exists():
            return None
        manifest, processes = cls({}), 1
        files = sorted(folder.glob("process_*.json"))
        for path in files:
            with fields_of(path) as about:
                processes = about["processes"]
                for name, x in about["arrays"].items():
                    shape, dtype = tuple(x["shape"]), x["dtype"]
                    _, _, pieces = manifest.arrays.setdefault(name, (shape, dtype, []))
                    pieces += [
                        (Box(tuple(a), tuple(b)), int(hexadecimal, 16))
                        for a, b, hexadecimal in x["pieces"]
                    ]
        if len(files) != processes:
            raise Damaged(f"{folder} has the digests of {len(files)} of {processes} processes")
        for name, (shape, _, pieces) in manifest.arrays.items():
            if sum(box.size for box, _ in pieces) != math.prod(shape):
                raise Damaged(f"{folder} has no digests of some pieces of {name}")
        return manifest

    def total(self, name: str) -> int:
        """The digest of a whole array."""
        return digest.total([d for _, d in self.arrays[name][2]])


def read_json(path: Any) -> Any:
    """The content of a JSON file of a checkpoint; Damaged if it is missing or not JSON."""
    try:
        return json.loads(path.read_text())
    except (ValueError, FileNotFoundError) as error:
        raise Damaged(f"{path}: {error}") from None


@contextlib.contextmanager
def fields_of(path: Any) -> Iterator[Any]:
    """The content of a JSON file of a checkpoint; Damaged if the body does not find in it what was
    written: a flipped bit may leave JSON with another key."""
    about = read_json(path)
    try:
        yield about
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise Damaged(f"{path}: {type(error).__name__} {error}") from None


class Arrays:
    """The arrays of one step's `state`, opened by name."""

    def __init__(self, state: Any):
        self.folder = epath.Path(state)
        with fields_of(self.folder / "_METADATA") as about:
            entries = about["tree_metadata"].values()
            self.names = {".".join(str(k["key"]) for k in e["key_metadata"]) for e in entries}
            self.driver = "zarr3" if about.get("use_zarr3") else "zarr"
        text = str(self.folder)
        self.base = text if "://" in text else f"file://{text}"

    def open(self, name: str) -> ts.TensorStore:
        """The array of this name; Damaged if it cannot be opened."""
        spec = {
            "driver": self.driver,
            "kvstore": {"driver": "ocdbt", "base": f"{self.base}/", "path": f"{name}/"},
        }
        try:
            return ts.open(spec, read=True, open=True).result()
        except Exception as error:
            raise Damaged(f"{name} cannot be opened: {first_line(error)}") from None

    def read(self, name: str, stored: ts.TensorStore, box: Box) -> np.ndarray:
        """A box of an array; Damaged if it cannot be read."""
        try:
            x = stored[box.slices].read().result() if box.start else stored.read().result()
        except Exception as error:
            raise Damaged(f"{name}{box} cannot be read: {first_line(error)}") from None
        return np.asarray(x)


def restore(
    arrays: Arrays, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> Iterator[tuple[str, jax.Array, int]]:
    """Each wanted array with the digest of the pieces that this process is responsible for.

    Every process reads what its devices hold. Raises Damaged.
    """
    with ThreadPoolExecutor(READERS) as pool:
        under_way: dict[str, tuple[Any, ...]] = {}
        names = list(wanted)

        def begin(name: str) -> None:
            like, stored = wanted[name], arrays.open(name)
            if (
                shape := tuple(stored.shape)
            ) != like.shape or stored.dtype.numpy_dtype != like.dtype:
                raise Damaged(
                    f"{name} is {stored.dtype.name}{list(shape)}, and {like.dtype}"
                    f"{list(like.shape)} was expected"
                )
            places = like.sharding.addressable_devices_indices_map(like.shape)
            boxes = {Box.of(index or (), like.shape) for index in places.values()}
            under_way[name] = like, {b: pool.submit(arrays.read, name, stored, b) for b in boxes}

        for at, name in enumerate(names):
            for ahead in names[at : at + AHEAD]:
                if ahead not in under_way:
                    begin(ahead)
            like, reads = under_way[name]
            boxes_read = {box: read.result() for box, read in reads.items()}
            under_way[name] = ()

            def of(index: Any, boxes_read: dict = boxes_read, like: Any = like) -> np.ndarray:
                return boxes_read[Box.of(index or (), like.shape)]

            x = jax.make_array_from_callback(like.shape, like.sharding, of)
            firsts = {
                Box.of(s.index, like.shape) for s in x.addressable_shards if s.replica_id == 0
            }
            sums = pool.map(
                lambda b, f=boxes_read, s=like.shape: digest.of_piece(f[b], b.start, s), firsts
            )
            yield name, x, digest.total(list(sums))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without tensorstore's dump of its spec."""
    text = str(error).strip().partition("\n")[0].partition(" [tensorstore_spec=")[0]
    return text or repr(error)
