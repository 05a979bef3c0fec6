# SPDX-License-Identifier: Apache-2.0
"""Batches of images with what each patch shows, for an encoder that is trained from nothing.

B images, P patches, S pixels of the encoder's side.
"""

import grain
import numpy as np
from jax.sharding import Mesh

from vlm_jax.data.example import Source
from vlm_jax.data.loader import Batches, local_rows
from vlm_jax.data.processor import Processor


class PatchBatches(Batches):
    """Like `Batches`, image by image: pixels [B, S, S, 3], ids [B, P] the classes in raster order.

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
        mesh: Mesh | None = None,
    ):
        self.batch, self.mesh, self.workers, self.skipped = batch, mesh, 0, 0
        mine = local_rows(mesh, batch)

        def rows(images: np.ndarray) -> dict[str, np.ndarray]:
            labels = np.stack([source.patch_labels(int(i), side) for i in images]).astype(np.int32)
            # A fixed pattern per image, so that a batch depends on nothing but its images.
            draw = np.random.default_rng(images).random(labels.shape)
            pixels = np.stack([processor.pixels(source.images[int(i)]) for i in images])
            return dict(
                pixels=pixels,
                ids=labels,
                loss_mask=(labels > 0) | (draw < background),
                skipped=np.zeros(len(images), bool),
            )

        order = grain.MapDataset.range(len(source.images)).shuffle(seed=seed % (1 << 32)).repeat()
        self._data = order.batch(batch, batch_fn=lambda i: np.array(i, np.int64)[mine]).map(rows)
        self._ahead, self._position, self._iterator = True, 0, None
