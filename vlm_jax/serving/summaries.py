# SPDX-License-Identifier: Apache-2.0
"""Images that text reads as a summary are read once: their keys and values are kept for later
questions.

B batch  X tokens before the text  V summary tokens  I pixels of the encoder's side
"""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from vlm_jax import hosts
from vlm_jax import mesh as meshes
from vlm_jax.models import voco
from vlm_jax.models.cache import Past
from vlm_jax.models.vlm import VLM
from vlm_jax.serving.index import Index, Summarized, handle_of, image_key
from vlm_jax.serving.requests import Request, bucket_of_rows

BYTES = 10**9  # of the summaries that are kept
KV = ("layers", "batch", "len", "kv_heads", "head")


def read(model: VLM, ids: Int[Array, "B T"], pixels: Float[Array, "B I I 3"]) -> Past:
    """The summaries of images behind these tokens, with which their rows begin."""
    x = model.compressor(model.encode(pixels)).astype(model.llm.dtype)
    if ids.shape[1]:
        x = jnp.concatenate([model.llm.embed(ids), x], axis=1)
    return voco.remembered(model.llm, x, model.compressor.method.tokens)


class Summaries:
    """The summaries of images with which rows begin.

    Args:
      model: whose compressor summarizes; its LLM unstacked, as that of a `Decoder`.
      before: the ids of every row before its image, if that comes first: the tokenizer's own.
    """

    def __init__(self, model: VLM, mesh: Mesh, *, before: Sequence[int], limit: int = BYTES):
        self.model, self.mesh, self.before = model, mesh, list(before)
        self.index = Index(limit)
        self.method, self.read = model.compressor.method, jax.jit(lambda *given: read(*given))

    def first(self, request: Request) -> bool:
        """Whether the one image of a request is the beginning of its row."""
        return len(request.pixels) == 1 and request.ids[: request.places[0]] == self.before

    def of(self, requests: Sequence[Request]) -> tuple[list[Request], Past, list[int]]:
        """The text behind the images of requests that are all `first`, what was read before it,
        and how many tokens of each were known.

        The past has the rows of the batch that the text becomes. An image is read if it is not
        kept, once for all requests.
        """
        keys = [self.key(request) for request in requests]
        found = {key: self.index.image(key) for key in dict.fromkeys(keys)}
        new = {key: r.pixels[0] for key, r in zip(keys, requests, strict=True) if not found[key]}
        read = len(self.before) + self.model.compressor.tokens
        known = [0 if key in new else read for key in keys]
        for key, one in zip(new, self.made(list(new.values())), strict=True):
            self.index.keep_image(key, one)
            found[key] = one
        size = bucket_of_rows(len(keys), meshes.batch_shards(self.mesh))
        rows = [found[key] for key in (*keys, *[keys[0]] * (size - len(keys)))]
        texts = [
            replace(r, ids=r.ids[len(self.before) :], places=(), pixels=[], sizes=[])
            for r in requests
        ]
        return texts, self.past(rows, read), known

    def key(self, request: Request) -> bytes:
        """The key of a request's image."""
        return image_key(handle_of("", request.pixels[0]), self.method.tokens, None)

    def made(self, images: Sequence[np.ndarray]) -> list[Summarized]:
        """The summaries of these images, of which each process has all."""
        if not images:
            return []
        size = bucket_of_rows(len(images), meshes.batch_shards(self.mesh))
        pixels = np.stack([*images, *[images[0]] * (size - len(images))])
        ids = np.tile(np.array(self.before, np.int32), (size, 1))
        past = hosts.fetched(
            self.read(self.model, *meshes.spread((ids, pixels), self.mesh, "batch"))
        )
        return [
            Summarized(*(np.array(x) for x in (past.hidden[k], past.keys[:, k], past.values[:, k])))
            for k in range(len(images))
        ]

    def past(self, rows: Sequence[Summarized], read: int) -> Past:
        """The past of rows that begin with these images, of `read` tokens each."""
        length = np.full(len(rows), self.method.tokens, np.int32)
        hidden, keys, values = zip(*rows, strict=True)
        return Past(
            meshes.spread(np.stack(hidden), self.mesh, "batch"),
            meshes.spread(np.stack(keys, 1), self.mesh, *KV),
            meshes.spread(np.stack(values, 1), self.mesh, *KV),
            *meshes.spread((length, read - length), self.mesh, "batch"),
        )

    def described(self) -> str:
        """What is kept, in words."""
        held = self.index.stats()
        return f"{held.bytes:,} bytes keep the summaries of {held.images} images"
