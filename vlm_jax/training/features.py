# SPDX-License-Identifier: Apache-2.0
"""What the frozen encoder gives for every image of a split, computed once and kept in a file."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import PurePath
from typing import NamedTuple

import jax
import numpy as np

from vlm_jax import files, hosts, mesh, preemption, progress
from vlm_jax.compressors.compressor import Compressor
from vlm_jax.data import loader, sources
from vlm_jax.data.processor import Processor
from vlm_jax.models.vit import ViT

BATCH = 64


class Sight(NamedTuple):
    """How images are encoded: the same for most compressors, so that they share their features."""

    shrink: int = 1  # smaller on each side
    reads: str = ""  # beside the levels

    @classmethod
    def of(cls, compressor: Compressor) -> "Sight":
        """What `compressor` wants; it may be abstract."""
        return cls(compressor.shrink, compressor.reads)

    def file(self, split: str) -> str:
        """The name of the file with the features of a split."""
        shrunk = f"-shrink{self.shrink}" if self.shrink > 1 else ""
        return f"{split}{shrunk}{f'-{self.reads}' if self.reads else ''}.npy"


class Features(NamedTuple):
    """Encoder outputs of one sight, float32, patches in raster order."""

    train: np.ndarray | None  # [images, P, Y]; None if no model is trained on this sight
    test: np.ndarray  # [images, P, Y]
    blind: np.ndarray  # [1, P, Y], of an image of the mean color


def features_of(
    encoder: ViT,
    source: sources.Source,
    processor: Processor,
    sight: Sight,
    folder: PurePath,
    *,
    skip: bool = False,
) -> np.ndarray:
    """Encoder outputs of every image of a source, [images, P, Y], kept in a file of `folder`.

    With `skip` those of an image that cannot be read are NaN, and the examples that need it are
    skipped where the features are used; without, such an image is a BadExample.
    """
    path = folder / sight.file(source.split)
    if not hosts.from_writer(path.exists):
        count = len(source.images)
        with (
            progress.doing(f"features of the {source.split} images", count) as task,
            files.making(path) if hosts.is_writer() else nullcontext() as fresh,
        ):
            table = None
            for start, found in encoded(encoder, source, processor, sight, skip=skip):
                preemption.point("the same command makes the features anew")
                stop = min(start + BATCH, count)
                if fresh is not None and table is None:
                    shape = (count, *found.shape[1:])
                    table = np.lib.format.open_memmap(fresh, "w+", np.float32, shape)
                if table is not None:
                    table[start:stop] = found[: stop - start]
                task.note(stop)
            if table is not None:
                table.flush()
        hosts.barrier(f"{path.name} is written")
    return np.load(files.on_disk(path), mmap_mode="r")


def encoded(
    encoder: ViT, source: sources.Source, processor: Processor, sight: Sight, *, skip: bool
) -> Iterator[tuple[int, np.ndarray]]:
    """The first image of each batch of a source, and the batch's encoder outputs [BATCH, P, Y].

    Each process reads the images that its devices encode, and has the outputs of all. The last
    batch is filled up with its last image.
    """
    now, count, blank = jax.sharding.get_mesh(), len(source.images), processor.images.blank()
    mine = loader.local_rows(now, BATCH)
    for start in range(0, count, BATCH):
        seen = [picture(source, min(start + k, count - 1), skip=skip) for k in mine.tolist()]
        shown = [blank if x is None else x for x in seen]
        made = dict(
            pixels=np.stack([processor.pixels(x) for x in shown]),
            sizes=np.array([processor.shown_size(x) for x in shown], np.int32),
            unread=np.array([x is None for x in seen]),
        )
        batch = loader.on_mesh(made, now, BATCH)
        found = np.array(outputs(encoder, batch["pixels"], batch["sizes"], sight))
        found[hosts.fetched(batch["unread"])] = np.nan
        yield start, found


def picture(source: sources.Source, index: int, *, skip: bool) -> np.ndarray | None:
    """One image, uint8 [H, W, 3]; with `skip` None where it cannot be read."""
    try:
        return source.images[index]
    except sources.BadExample:
        if not skip:
            raise
        return None


def blind_of(encoder: ViT, processor: Processor, sight: Sight) -> np.ndarray:
    """Encoder outputs of an image of the mean color, [1, P, Y]."""
    gray = processor.images.normalized(processor.images.blank())
    pixels, square = np.broadcast_to(gray, (BATCH, *gray.shape)), np.ones((BATCH, 2), np.int32)
    return outputs(encoder, placed(pixels), placed(square), sight)[:1]


def blind_to(seen: np.ndarray, blind: np.ndarray) -> np.ndarray:
    """`blind` [1, P, Y] in place of every image of `seen` [images, P, Y].

    An image that could not be read stays NaN: blind and sighted models have the same examples.
    """
    unread = np.isnan(seen[:, 0, 0])
    if not unread.any():
        return np.broadcast_to(blind, seen.shape)
    return np.concatenate([blind, np.full_like(blind, np.nan)])[unread.astype(int)]


def outputs(encoder: ViT, pixels: jax.Array, sizes: jax.Array, sight: Sight) -> np.ndarray:
    """Encoder outputs of a batch on the mesh, [BATCH I I 3] and [BATCH 2], the same in every
    process, float32."""
    return hosts.fetched(_encode(encoder, pixels, sizes, **sight._asdict())).astype(np.float32)


_encode = jax.jit(
    lambda vit, x, sizes, shrink, reads: vit(x, shrink=shrink, reads=reads, sizes=sizes),
    static_argnames=("shrink", "reads"),
)


def placed(rows: np.ndarray) -> jax.Array:
    """One batch on the current mesh."""
    return mesh.spread(rows, jax.sharding.get_mesh(), "batch")


def batches_of(features: np.ndarray) -> Iterator[jax.Array]:
    """Features in batches of one size on the current mesh; the last is filled up with its last."""
    for start in range(0, len(features), BATCH):
        yield placed(features[np.minimum(np.arange(start, start + BATCH), len(features) - 1)])
