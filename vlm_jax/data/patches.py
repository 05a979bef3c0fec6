# SPDX-License-Identifier: Apache-2.0
"""Batches of images with what each patch shows, for an encoder that is trained from nothing.

B images, P patches, S pixels of the encoder's side.
"""

import grain
import numpy as np
from jax.sharding import Mesh

from vlm_jax.data.example import BadExample, Source
from vlm_jax.data.loader import Batch, Batches, Faults, local_rows, on_mesh
from vlm_jax.data.packed_rows import Usage
from vlm_jax.data.processor import Processor
from vlm_jax.data.skips import Skip, Skips


class PatchBatches(Batches):
    """Like `Batches`, image by image: pixels [B, S, S, 3], ids [B, P] the classes in raster order.

    With `names` also names [B, P], the number of each patch's name from 1, 0 where it has none.

    The class of most patches is 0, background: `loss_mask` [B, P] keeps every other patch, and as
    many of the background ones as `background` says, so that the rare things are learnt.
    """

    def __init__(
        self,
        source: Source,
        processor: Processor,
        *,
        batch: int,
        seed: int,
        side: int,
        background: float = 0.03,
        names: bool = False,
        skip: bool = False,
        mesh: Mesh | None = None,
    ):
        self.batch, self.mesh, self.workers = batch, mesh, 0
        self.usage, self.plan = Usage(0), None
        self.source, self.skips, self.cut_rows = source, Skips(), set()
        mine, count = local_rows(mesh, batch), len(source.images)

        def usable(image: int, faults: Faults) -> tuple[int, np.ndarray]:
            for step in range(count):
                candidate = (image + step) % count
                try:
                    return candidate, processor.pixels(source.images[candidate])
                except BadExample as error:
                    if not skip:
                        raise
                    faults[candidate] = ("image", str(error))
            raise BadExample(f"not one of {count} images can be read; {faults[candidate][1]}")

        def rows(images: np.ndarray) -> dict[str, np.ndarray]:
            faults: Faults = {}
            found = [usable(int(i), faults) for i in images]
            images = np.array([i for i, _ in found], np.int64)
            labels = np.stack([source.patch_labels(int(i), side) for i in images]).astype(np.int32)
            # A fixed pattern for each image: which of its patches count depends on no other image,
            # nor on which process reads it.
            draw = np.stack([np.random.default_rng(i).random(labels[0].size) for i in images])
            named = [source.patch_names(int(i), side) for i in images] if names else []
            return dict(
                **({"names": np.stack(named)} if names else {}),
                pixels=np.stack([pixels for _, pixels in found]),
                ids=labels,
                loss_mask=(labels > 0) | (draw < background),
                faults=faults,
            )

        order = grain.MapDataset.range(count).shuffle(seed=seed % (1 << 32)).repeat()
        self._data = order.batch(batch, batch_fn=lambda i: np.array(i, np.int64)[mine]).map(rows)
        self._ahead, self._position, self._iterator = True, 0, None

    def _finish(self, batch: Batch) -> Batch:
        for image, (kind, reason) in batch.pop("faults").items():
            name = self.source.images.name(image)
            self.skips.add(image, kind, Skip(f"image {image}", name, reason))
        return on_mesh(batch, self.mesh, self.batch)
