# SPDX-License-Identifier: Apache-2.0
"""Batches of a source in a shuffled order that depends on the seed alone, sharded over the mesh.

Batch k is a pure function of (k, seed, source, batch size): not of how many processes read it, nor
of where reading began. A process makes only the rows that its devices hold.

Shapes: B rows of all processes, M images of a row (data.images_per_row; left out where it is 1),
T text tokens, Tq question tokens, S pixels, P patches, C channels.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from vlm_jax import mesh as meshes
from vlm_jax.data.example import BadExample, Source
from vlm_jax.data.processor import Processor

TABLE_BYTES = 1 << 28  # sources whose ids fit into this are tokenised once, at the start
EPOCHS = (
    1 << 32
)  # more than anyone trains; grain's endless repeat has no length that fits batches of 1

Batch = dict[str, Any]  # of numpy or sharded jax arrays


def local_rows(mesh: Mesh | None, batch: int) -> np.ndarray:
    """Which rows of a batch the devices of this process hold, ascending int64; all without a mesh.

    Raises:
      ValueError: where the mesh does not cut the batch evenly.
    """
    if mesh is None:
        return np.arange(batch)
    if batch % (shards := meshes.batch_shards(mesh)):
        raise ValueError(
            f"a batch of {batch} rows is not divisible by the {shards} parts into which the mesh "
            f"cuts it (data x fsdp): choose a multiple of {shards}"
        )
    places = meshes.sharding(mesh, "batch").addressable_devices_indices_map((batch,))
    return np.unique(np.concatenate([np.arange(batch)[place] for place in places.values()]))


class _Rows:
    """Assembles rows of a source by example index: text, from a table where small, and image."""

    def __init__(
        self,
        source: Source,
        processor: Processor,
        features: np.ndarray | None,
        *,
        answer: bool,
        skip: bool,
    ):
        self.source, self.processor, self.features = source, processor, features
        self.answer, self.skip = answer, skip
        if features is not None and len(features) != len(source.images):
            raise ValueError(
                f"features of {len(features)} images for a source with {len(source.images)}: "
                "encode the same split again"
            )
        self.table, self.most = None, processor.images_per_row
        row_bytes = processor.text_length * 5 + processor.question_length * 4 * self.most
        if len(source) * row_bytes <= TABLE_BYTES:
            examples = [source[i] for i in range(len(source))]
            self.table = self._stack([processor.text(e, answer=answer) for e in examples])
            self.images = np.array([self._padded(e.images) for e in examples], np.int64)

    @staticmethod
    def _stack(rows: list[dict]) -> Batch:
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _padded(self, images: tuple[int, ...]) -> list[int]:
        """As many images as a row may have; -1: none."""
        return [*images, *[-1] * (self.most - len(images))]

    def _images_of(self, index: int) -> np.ndarray:
        """The images of an example, [M]."""
        if self.table is not None:
            return self.images[index]
        return np.array(self._padded(self.source[index].images), np.int64)

    def _pictures(self, index: int) -> np.ndarray:
        """The images of an example, uint8 [M, S, S, 3]; black where it has fewer."""
        size, images = self.processor.images.size, self._images_of(index)
        pictures = np.zeros((len(images), size, size, 3), np.uint8)
        for k, image in enumerate(images):
            if image >= 0:
                pictures[k] = self.processor.square(self.source.images[int(image)])
        return pictures

    def _readable(self, index: int, replace: bool) -> tuple[int, np.ndarray | None]:
        """The example at `index`, or the next one whose images can be read, with its pictures."""
        for step in range(len(self.source) if replace else 1):
            candidate = (index + step) % len(self.source)
            try:
                return candidate, self._pictures(candidate)
            except BadExample as error:
                # Caught here and not left to grain, whose iterators do not survive an exception.
                if not self.skip:
                    raise
                last = error
        if not replace:
            return index, None
        raise BadExample(
            f"not one of {len(self.source)} examples has a readable image; the last: {last}"
        )

    def __call__(self, indices: np.ndarray, *, replace: bool = True) -> Batch:
        """Rows for these example indices. `skipped` [B] marks rows whose own image could not be
        read: the next good example stands in, or, without `replace`, an empty image of each."""
        wanted, extra = indices, {}
        if self.features is None:
            found = [self._readable(int(i), replace) for i in indices]
            indices = np.array([i for i, _ in found], np.int64)
            size = self.processor.images.size
            blank = np.zeros((self.most, size, size, 3), np.uint8)
            pixels = self.processor.images.normalise(
                np.stack([blank if p is None else p for _, p in found])
            )
            missing = np.array([p is None for _, p in found])
            empty = np.stack([self._images_of(int(i)) < 0 for i in indices]) | missing[:, None]
            pixels[empty] = 0  # as LLaVA: zeros after normalisation
            extra["pixels"], skipped = pixels, missing | (indices != wanted)
        else:
            images = np.stack([self._images_of(int(i)) for i in indices])
            levels = self.features[np.maximum(images, 0)]
            if (images < 0).any():
                levels[images < 0] = 0
            extra["levels"], skipped = levels, np.zeros(len(indices), bool)
        if self.most == 1:
            extra = {name: values[:, 0] for name, values in extra.items()}
        if self.table is not None:
            text = {name: column[indices] for name, column in self.table.items()}
        else:
            text = self._stack(
                [self.processor.text(self.source[int(i)], answer=self.answer) for i in indices]
            )
        return {**text, **extra, "index": indices.astype(np.int32), "skipped": skipped}


def _on_mesh(batch: Batch, mesh: Mesh | None, size: int) -> Batch:
    """Local rows as arrays of the whole batch, split over the mesh by their first dimension."""
    if mesh is None:
        return batch
    sharding = meshes.sharding(mesh, "batch")
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (size, *rows.shape[1:]))
        for name, rows in batch.items()
    }


class Batches:
    """An endless iterator of training batches that can continue at any position.

    `position`, the number of batches taken, is all that a checkpoint needs to store.

    A batch: ids int32 [B, T], loss_mask bool [B, T], length int32 [B], image_at int32 [B, M],
    question int32 [B, M, Tq], question_length int32 [B, M], index int32 [B] (example of each row),
    and either pixels float32 [B, M, S, S, 3] or, with `features`, levels [B, M, P, C]; without M
    where a row has one image at most. Each epoch has its own order; a batch may span two.

    Args:
      batch: rows, all processes together.
      seed: of the order.
      skip: where an image cannot be read, take the next good example instead of failing, and count
        it.
      features: cached encoder outputs [images, P, C], indexed by Example.images; replaces reading
        images.
      mesh: where batches go; None leaves numpy arrays of all rows.
      workers: processes that read ahead; 0 reads in this one, with threads where images must be
        decoded.
    Raises:
      ValueError: for an empty source, a batch the mesh cannot cut, or features of another split.
      BadExample: while iterating, for an image that cannot be read, unless `skip`.
    """

    # Rows so far, of this process: replaced because their image could not be read; cut at the end
    # because they were longer than data.text_length.
    skipped = 0
    cut = 0

    def __init__(
        self,
        source: Source,
        processor: Processor,
        *,
        batch: int,
        seed: int,
        skip: bool = False,
        features: np.ndarray | None = None,
        mesh: Mesh | None = None,
        workers: int = 0,
    ):
        if not len(source):
            raise ValueError(f"source {source.name}, split {source.split}, has no examples")
        self.batch, self.mesh, self.workers = batch, mesh, workers
        mine = local_rows(mesh, batch)
        rows = _Rows(source, processor, features, answer=True, skip=skip)
        order = grain.MapDataset.range(len(source)).shuffle(seed=seed % (1 << 32)).repeat(EPOCHS)
        order = order.batch(batch, batch_fn=lambda found: np.array(found, np.int64)[mine])
        self._data = order.map(rows)
        # Reading ahead pays only where there are images to decode.
        self._ahead = features is None
        self._position, self._iterator = 0, None

    @property
    def position(self) -> int:
        """Batches taken so far; setting it continues as if that many had been taken."""
        return self._position

    @position.setter
    def position(self, value: int) -> None:
        self.close()
        self._position = value

    def close(self) -> None:
        """Stops reading ahead; the iterator can be used again."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None

    def at(self, k: int) -> Batch:
        """Batch k, wherever the iterator stands."""
        return self._finish(self._data[k])

    def _finish(self, batch: Batch) -> Batch:
        self.skipped += int(np.sum(batch.pop("skipped", 0)))
        self.cut += int(np.sum(batch.pop("cut", 0)))
        return _on_mesh(batch, self.mesh, self.batch)

    def _start(self) -> Iterator[Batch]:
        threads = (
            grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
            if self._ahead
            else grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        )
        data = self._data[self._position :].to_iter_dataset(threads)
        if self.workers:
            if (
                not flags.FLAGS.is_parsed()
            ):  # grain reads its own flags, also where no absl app runs
                flags.FLAGS.mark_as_parsed()
            data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.workers))
        return iter(data)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._start()
        batch = self._finish(next(self._iterator))
        self._position += 1
        return batch


class RandomPrefixes:
    """Batches that say in `limit` int32 [B] how many visual tokens each row is shown.

    One of `choices` for each micro-batch, all alike: micro-batch a of `accumulate` holds rows a,
    a + accumulate, ... What batch k draws is a pure function of (k, seed).
    """

    def __init__(self, batches: Batches, choices: Sequence[int], *, seed: int, accumulate: int = 1):
        self.batches, self.choices = batches, np.array(choices, np.int32)
        self.seed, self.accumulate = seed % (1 << 32), accumulate

    @property
    def position(self) -> int:
        """As for the batches themselves."""
        return self.batches.position

    @position.setter
    def position(self, value: int) -> None:
        self.batches.position = value

    def limit(self, k: int) -> np.ndarray:
        """The `limit` of the rows of batch k, all processes together."""
        drawn = np.random.default_rng((self.seed, k)).choice(self.choices, self.accumulate)
        return np.resize(drawn, self.batches.batch)

    def __iter__(self) -> "RandomPrefixes":
        return self

    def __next__(self) -> Batch:
        size, mesh = self.batches.batch, self.batches.mesh
        rows = self.limit(self.position)[local_rows(mesh, size)]
        return next(self.batches) | _on_mesh({"limit": rows}, mesh, size)


def evaluation_batches(
    source: Source,
    processor: Processor,
    *,
    batch: int,
    answer: bool = False,
    skip: bool = False,
    features: np.ndarray | None = None,
    mesh: Mesh | None = None,
) -> Iterator[Batch]:
    """Every example exactly once, in order, as batches of one size with `valid` bool [B].

    Rows that fill up the last batch repeat its last example and are not valid; nor, with `skip`,
    are examples whose image cannot be read. `ids` end where the last answer would start, unless
    `answer`.
    """
    rows = _Rows(source, processor, features, answer=answer, skip=skip)
    mine = local_rows(mesh, batch)
    for start in range(0, len(source), batch):
        positions = start + mine
        made = rows(np.minimum(positions, len(source) - 1), replace=False)
        del made["cut"]
        made["valid"] = (positions < len(source)) & ~made.pop("skipped")
        yield _on_mesh(made, mesh, batch)
