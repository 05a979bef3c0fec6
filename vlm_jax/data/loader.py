# SPDX-License-Identifier: Apache-2.0
"""Batches of a source in a shuffled order that depends on the seed alone, sharded over the mesh.

Batch k is a pure function of (k, seed, source, batch size). It does not depend on the number of
processes or on the position where reading started. A process makes only the rows of its devices.

Shapes: B rows of all processes, M images of a row (data.images_per_row; left out where it is 1),
T text tokens, Tq question tokens, S pixels, P patches, C channels.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from vlm_jax import mesh as meshes
from vlm_jax.data.example import BadExample, Source
from vlm_jax.data.order import EPOCHS, examples
from vlm_jax.data.packed_rows import PackedRows, Pictures, Usage
from vlm_jax.data.packing import Arrangement, Buckets, Packing
from vlm_jax.data.processor import Processor
from vlm_jax.data.skips import Skip, Skips
from vlm_jax.data.texts import BadText, Texts, none_usable, stack

PLAIN = Arrangement()
Batch = dict[str, Any]  # of numpy or sharded jax arrays
Faults = dict[int, tuple[str, str]]  # example -> the kind of what is wrong with it, and a sentence


def local_rows(mesh: Mesh | None, batch: int) -> np.ndarray:
    """Which rows of a batch the devices of this process hold, ascending int64; all without a mesh.

    Raises:
      ValueError: if the mesh does not divide the batch evenly.
    """
    if mesh is None:
        return np.arange(batch)
    if batch % (shards := meshes.batch_shards(mesh)):
        raise ValueError(
            f"a batch of {batch} rows is not divisible by the {shards} parts into which the mesh "
            f"divides it (data x fsdp): choose a multiple of {shards}"
        )
    places = meshes.sharding(mesh, "batch").addressable_devices_indices_map((batch,))
    return np.unique(np.concatenate([np.arange(batch)[place] for place in places.values()]))


class _Rows:
    """Assembles rows by example index: text, from the table if there is one, and image."""

    def __init__(self, texts: Texts, features: np.ndarray | None):
        self.texts, self.features = texts, features
        self.source, self.processor, self.skip = texts.source, texts.processor, texts.skip
        if features is not None and len(features) != len(self.source.images):
            raise ValueError(
                f"features of {len(features)} images for a source with {len(self.source.images)}: "
                "encode the same split again"
            )
        # Images that could not be read when they were encoded have no features.
        self.unread = None if features is None else np.isnan(features[:, 0, 0])

    def _pictures(self, index: int) -> Pictures:
        """The images of an example."""
        processor, images = self.processor, self.texts.images(index)
        read = getattr(self.source.images, "picture", self.source.images.__getitem__)
        pictures = self._none(len(images))
        for k, image in enumerate(images):
            if image >= 0:
                picture = read(int(image))
                pictures.squares[k] = processor.square(picture)
                pictures.sizes[k] = processor.shown_size(picture)
        return pictures

    def _none(self, count: int) -> Pictures:
        """`count` missing images."""
        size = self.processor.images.size
        return Pictures(np.zeros((count, size, size, 3), np.uint8), np.ones((count, 2), np.int32))

    def _parts(self, index: int) -> tuple[Batch | None, Pictures]:
        """The text of an example, None if the table has it, and its images."""
        if index in self.texts.bad:
            raise self.texts.bad[index]
        text = None if self.texts.table is not None else self.texts.of(index)
        if self.features is None:
            return text, self._pictures(index)
        unread = [int(i) for i in self.texts.images(index) if i >= 0 and self.unread[i]]
        if unread:
            name = self.source.images.name(unread[0])
            raise BadExample(f"image {name} could not be read when its features were made")
        return text, self._none(0)

    def whole(self, index: int) -> tuple[Batch, Pictures]:
        """`_parts`, with the text taken from the table if it is there."""
        text, images = self._parts(index)
        if text is None:
            text = {name: column[index] for name, column in self.texts.table.items()}
        return text, images

    def _usable(
        self, index: int, replace: bool, faults: Faults
    ) -> tuple[int, tuple[Batch | None, Pictures] | None]:
        """The example at `index`, or the next one that can be used, with its parts."""
        last = BadExample("no example was tried")
        for step in range(len(self.source) if replace else 1):
            candidate = (index + step) % len(self.source)
            try:
                return candidate, self._parts(candidate)
            except BadExample as error:
                # Caught here and not left to grain, whose iterators do not survive an exception.
                if not self.skip:
                    raise
                kind = "text" if isinstance(error, BadText) else "image"
                faults[candidate] = (kind, str(error))
                last = error
        if not replace:
            return index, None
        raise none_usable(self.source, last)

    def __call__(self, indices: np.ndarray, *, replace: bool = True) -> Batch:
        """Rows for these example indices.

        `skipped` [B] marks rows whose own example cannot be used: they hold the next good one or,
        without `replace`, empty images. `faults` describes every example that cannot be used.
        """
        wanted, extra, faults = indices, {}, {}
        usable = [self._usable(int(i), replace, faults) for i in indices]
        indices = np.array([i for i, _ in usable], np.int64)
        missing = np.array([parts is None for _, parts in usable])
        images = np.stack([self.texts.images(int(i)) for i in indices])
        empty = (images < 0) | missing[:, None]
        if self.features is None:
            none = self._none(self.texts.most)
            seen = [none if parts is None else parts[1] for _, parts in usable]
            pixels = self.processor.images.normalized(np.stack([x.squares for x in seen]))
            pixels[empty] = 0  # as in LLaVA: zeros after normalization
            extra["pixels"] = pixels
            if self.processor.reads == "image_size":
                extra["image_size"] = np.stack([x.sizes for x in seen])
        else:
            levels = self.features[np.maximum(images, 0)]
            if empty.any():
                levels[empty] = 0
            extra["levels"] = levels
        if self.texts.most == 1:
            extra = {name: values[:, 0] for name, values in extra.items()}
        if self.texts.table is not None:
            text = {name: column[indices] for name, column in self.texts.table.items()}
        else:
            texts = [parts[0] if parts else self.texts.any() for _, parts in usable]
            text = stack(texts)
        skipped = missing | (indices != wanted)
        text["cut"] = indices[text["cut"]]
        return {
            **text,
            **extra,
            "index": indices.astype(np.int32),
            "skipped": skipped,
            "faults": faults,
        }


def on_mesh(batch: Batch, mesh: Mesh | None, size: int) -> Batch:
    """Local rows as arrays of the whole batch, split over the mesh by their first dimension."""
    if mesh is None:
        return batch
    sharding = meshes.sharding(mesh, "batch")
    if jax.process_count() == 1:  # the same, without the overhead of a call for each array
        return jax.device_put(batch, sharding)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (size, *rows.shape[1:]))
        for name, rows in batch.items()
    }


class Batches:
    """An endless iterator of training batches that can continue at any position.

    `position`, the number of batches taken, is the only state that a checkpoint needs.

    A batch: ids int32 [B, T], loss_mask bool [B, T], length int32 [B], image_at int32 [B, M],
    question int32 [B, M, Tq], question_length int32 [B, M], index int32 [B] (example of each row),
    and either pixels float32 [B, M, S, S, 3] or, with `features`, levels [B, M, P, C]; without M if
    a row has at most one image. Each epoch has its own order; a batch may span two.

    Args:
      batch: rows, all processes together.
      seed: of the order.
      skip: if the image or text of an example cannot be used, take the next good one instead of
        failing, and count it in `skips`, once.
      features: cached encoder outputs [images, P, C], indexed by Example.images; replaces reading
        images.
      texts: those of this source and processor if they exist already, made with answers and the
        same `skip`.
      mesh: where batches go; None gives numpy arrays of all rows.
      workers: processes that read ahead; 0 reads in this one, with threads if images must be
        decoded.
      arrangement: which examples share a row or a batch; see `PackedRows` for the arrays.
      visual: V, visual tokens of an image, which take space in a packed row and count as tokens.
    Raises:
      ValueError: for an empty source, a batch that the mesh cannot divide, or features of another
        split.
      BadExample: while iterating, for an image that cannot be read, unless `skip`; with `skip` if
        no example can be used.
    """

    def __init__(
        self,
        source: Source,
        processor: Processor,
        *,
        batch: int,
        seed: int,
        skip: bool = False,
        features: np.ndarray | None = None,
        texts: Texts | None = None,
        mesh: Mesh | None = None,
        workers: int = 0,
        arrangement: Arrangement = PLAIN,
        visual: int = 0,
    ):
        if not len(source):
            raise ValueError(f"source {source.name}, split {source.split}, has no examples")
        self.batch, self.mesh, self.workers = batch, mesh, workers
        self.source, self.skips, self.cut_rows = source, Skips(), set()
        self._bad_texts: Faults = {}  # not in the plan: counted with the first batch
        mine = local_rows(mesh, batch)
        if texts is None:
            texts = Texts(source, processor, answer=True, skip=skip)
        rows = _Rows(texts, features)
        self.usage, self.plan = Usage(visual), None
        if arrangement.plain:
            order = examples(source, seed).batch(
                batch, batch_fn=lambda indices: np.array(indices, np.int64)[mine]
            )
            self._data = order.map(rows)
        else:
            self.plan = planned(texts, arrangement, batch=batch, seed=seed, visual=visual)
            packed_rows = PackedRows(texts, self.plan, rows.whole, mine, features)
            self._data = grain.MapDataset.range(EPOCHS).map(packed_rows)
            for example, error in texts.bad.items():
                self._bad_texts[example] = ("text", str(error))
        # Reading ahead pays only if there are images to decode.
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
        """Stops reading ahead; the iterator can still be used."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None

    def at(self, k: int) -> Batch:
        """Batch k, independent of the iterator's position."""
        return self._finish(self._data[k])

    @property
    def examples(self) -> int | float:
        """Examples in a batch; an average if rows are packed."""
        return self.batch if self.plan is None else self.plan.examples

    @property
    def skipped(self) -> int:
        """Examples of this process that could not be used so far; each counts once."""
        return len(self.skips)

    @property
    def cut(self) -> int:
        """Examples of this process that data.text_length truncated so far; each counts once."""
        return len(self.cut_rows)

    def fields(self) -> dict[str, Any]:
        """Fields for a log: how much of the data is not used, and which share of what is computed
        is used."""
        left = len(self.source.left_out)
        return ({"left_out": left} if left else {}) | self.skips.fields() | self.usage.fields()

    def _finish(self, batch: Batch) -> Batch:
        batch.pop("skipped", None)
        faults, self._bad_texts = self._bad_texts | batch.pop("faults"), {}
        for example, (kind, reason) in faults.items():
            self.skips.add(example, kind, skip_of(self.source, example, reason))
            if self.plan is not None and len(self.skips) == len(self.source):
                raise none_usable(self.source, BadExample(reason))
        self.cut_rows.update(batch.pop("cut").tolist())
        self.usage.add(batch)
        return on_mesh(batch, self.mesh, self.batch)

    def _start(self) -> Iterator[Batch]:
        threads = (
            grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
            if self._ahead
            else grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        )
        data = self._data[self._position :].to_iter_dataset(threads)
        if self.workers:
            # grain reads its own flags, also without an absl app.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.workers))
        return iter(data)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._start()
        try:
            rows = next(self._iterator)
        except BaseException:
            self.close()  # otherwise worker processes warn about what they still hold
            raise
        batch = self._finish(rows)
        self._position += 1
        return batch


def planned(
    texts: Texts, arrangement: Arrangement, *, batch: int, seed: int, visual: int
) -> Packing | Buckets:
    """The plan of an arrangement that is not plain, for these texts."""
    processor = texts.processor
    of = dict(batch=batch, seed=seed, order=getattr(texts.source, "order", None))
    if arrangement.buckets:
        buckets = (*arrangement.buckets, processor.text_length)
        return Buckets(texts.lengths(), **of, buckets=buckets, images=texts.most)
    tokens, images = arrangement.row_length, arrangement.row_images
    return Packing(texts.lengths(), **of, tokens=tokens, images=images, visual=visual)


def skip_of(source: Source, example: int, reason: str) -> Skip:
    """The report of an example that is not used."""
    skipped = source[example]
    return Skip(skipped.id, ", ".join(source.images.name(i) for i in skipped.images), reason)


def not_answered(source: Source, faults: Faults) -> list[dict[str, Any]]:
    """The examples that evaluation leaves out, as `evals/embedded.py` counts them.

    First those that cannot be used, then those that the source left out when it was opened.
    """
    skips = []
    for example, (_, reason) in sorted(faults.items()):
        own = source[example]
        of = dict(task=own.task, cluster=own.cluster)
        skips.append(asdict(skip_of(source, example, reason)) | of)
    first = [asdict(skip) for skip in source.left_out.first.values()]
    more = dict(id="", image="", reason="left out when the data was opened")
    return [*skips, *first, *[more] * (len(source.left_out) - len(first))]


def evaluation_batches(
    source: Source,
    processor: Processor,
    *,
    batch: int,
    answer: bool = False,
    skip: bool = False,
    features: np.ndarray | None = None,
    texts: Texts | None = None,
    mesh: Mesh | None = None,
    faults: Faults | None = None,
) -> Iterator[Batch]:
    """Every example exactly once, in order, as batches of one size with `valid` bool [B].

    Rows that pad the last batch repeat its last example and are not valid. With `skip`, neither are
    examples that cannot be used; `faults`, if given, receives the reasons. `ids` end where the last
    answer would start, unless `answer`. `texts` are those of this source and processor, if they
    exist already, made with the same `answer` and `skip`.
    """
    faults = {} if faults is None else faults
    if texts is None:
        texts = Texts(source, processor, answer=answer, skip=skip)
    rows = _Rows(texts, features)
    mine = local_rows(mesh, batch)
    for start in range(0, len(source), batch):
        positions = start + mine
        local = rows(np.minimum(positions, len(source) - 1), replace=False)
        del local["cut"]
        faults |= local.pop("faults")
        local["valid"] = (positions < len(source)) & ~local.pop("skipped")
        yield on_mesh(local, mesh, batch)
