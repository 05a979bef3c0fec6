# SPDX-License-Identifier: Apache-2.0
"""Vision language model: encoder, compressor, decoder; visual tokens stand at the image's place.

B batch  P patches  Z = levels x E  V visual tokens  T text tokens  X = T + V  D llm width
W vocabulary  I image side in pixels
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from vlm_jax.models import compressors
from vlm_jax.models.compressors.compressor import Visual
from vlm_jax.models.layers import RUN_ONCE
from vlm_jax.models.llm import KV, LLM
from vlm_jax.models.vit import ViT, window_order

Batch = Mapping[str, Array]


class VLM(nnx.Module):
    """A LLaVA-style model (arXiv 2310.03744) whose image is V tokens, however many patches it had.

    A batch holds `ids` [B T] (right-padded, without a slot for the image), `image_at` [B] (the
    visual tokens stand before ids[image_at]; T for a row without an image), `question` [B U] and
    `question_length` [B] for compressors that read it, and either `pixels` [B I I 3] or `levels`
    [B P Y] (what the encoder gives for this compressor, in raster order).
    """

    def __init__(self, vit: ViT, compressor: nnx.Module, llm: LLM):
        self.vit, self.compressor, self.llm = vit, compressor, llm

    def encode(self, pixels: Float[Array, "B I I 3"]) -> Float[Array, "B P Z"]:
        """Encoder levels as the compressor reads them; the encoder is frozen."""
        reader = self.compressor
        return lax.stop_gradient(
            self.vit(pixels, window=reader.window, shrink=reader.shrink, keys=reader.reads_keys)
        )

    def see(self, batch: Batch) -> Visual:
        """The visual tokens of each row's image, and how many: none in a row without one."""
        if "levels" in batch:
            order = window_order(self.vit.side // self.compressor.shrink, self.compressor.window)
            dtype = "float32" if self.compressor.reads_keys else self.llm.dtype
            levels = batch["levels"][:, order].astype(dtype)
        else:
            levels = self.encode(batch["pixels"])
        question = None
        if self.compressor.reads_question:
            question = self.ask(batch["question"], batch["question_length"])
        made = self.compressor(levels, question)
        tokens, count = made if self.compressor.adaptive else (made, made.shape[1])
        with_image = batch["image_at"] < batch["ids"].shape[1]
        return Visual(tokens.astype(self.llm.dtype), count * with_image)

    def ask(self, question: Int[Array, "B U"], length: Int[Array, "B"]) -> Float[Array, "B D"]:
        """The LLM's hidden state of the question's last token, from a pass of its own.

        As published for QueCC: the question alone, live weights, no gradient.
        """
        hidden = self.llm(self.llm.embed(question))
        return lax.stop_gradient(rows(hidden, length[:, None] - 1)[:, 0])

    def splice(
        self, text: Float[Array, "B T D"], visual: Visual, at: Int[Array, "B"]
    ) -> Float[Array, "B X D"]:
        """Each row's text with its visual tokens before text position `at`, packed: no holes.

        What stands behind a row's last token is never seen: rows are causal.
        """
        length = text.shape[1]
        place = jnp.arange(length + visual.tokens.shape[1])
        at, end = at[:, None], (at + visual.count)[:, None]
        behind = jnp.minimum(place - visual.count[:, None], length - 1)
        index = jnp.where(place < at, place, jnp.where(place < end, length + place - at, behind))
        return rows(jnp.concatenate([text, visual.tokens], axis=1), index)

    def logits(self, batch: Batch) -> Float[Array, "B T W"]:
        """For every text token the scores given all before it; the first has none before it."""
        visual = self.see(batch)
        hidden = self.llm(self.splice(self.llm.embed(batch["ids"]), visual, batch["image_at"]))
        return self.llm.logits(rows(hidden, self.before(batch, visual.count)))

    def before(self, batch: Batch, count: Int[Array, "B"]) -> Int[Array, "B T"]:
        """Where in the spliced row the token before each text token stands."""
        text = jnp.arange(batch["ids"].shape[1])
        return jnp.maximum(text + count[:, None] * (text >= batch["image_at"][:, None]) - 1, 0)

    def prefill(
        self,
        batch: Batch,
        *,
        new_tokens: int,
    ) -> tuple[Float[Array, "B W"], list[KV], Int[Array, "B"]]:
        """Scores of the first new token, caches with room for `new_tokens` more, row lengths."""
        visual = self.see(batch)
        x = self.splice(self.llm.embed(batch["ids"]), visual, batch["image_at"])
        hidden, caches = self.llm.prefill(x, slots=x.shape[1] + new_tokens)
        length = batch["length"] + visual.count
        return self.llm.logits(rows(hidden, length[:, None] - 1))[:, 0], caches, length

    def decode(
        self,
        ids: Int[Array, "B"],
        caches: list[KV],
        position: Int[Array, "B"],
    ) -> tuple[Float[Array, "B W"], list[KV]]:
        """Scores of the token after `ids`, which stand at `position`."""
        hidden, caches = self.llm.decode(self.llm.embed(ids[:, None]), caches, position)
        return self.llm.logits(hidden)[:, 0], caches


def rows(x: Float[Array, "B X D"], index: Int[Array, "B Y"]) -> Float[Array, "B Y D"]:
    """x[b, index[b, y]], row by row, so that nothing leaves the shard of its batch row."""
    return jax.vmap(lambda row, i: row.at[i].get(mode="promise_in_bounds"))(x, index)


def build(config: ConfigDict, rngs: nnx.Rngs) -> VLM:
    """The model that a configuration describes, with fresh float32 parameters."""
    shared = dict(rngs=rngs, remat_policy=config.remat, dtype=config.compute_dtype)
    vit = ViT(**config.vit.to_dict(), **shared)
    compressor = compressors.build(
        config.compressor.kind,
        tokens=config.compressor.tokens,
        side=vit.side,
        width=config.vit.width,
        levels=len(config.vit.levels),
        llm_width=config.llm.width,
        heads=config.compressor.heads,
        query=config.compressor.query,
        downsample=config.compressor.downsample,
        rngs=rngs,
    )
    if compressor.reads_keys:
        vit.check_keys()
    return VLM(vit, compressor, LLM(**config.llm.to_dict(), **shared))


def create(config: ConfigDict, *, seed: int) -> VLM:
    """`build` on the current mesh in one compiled call, every parameter born in its shard."""
    return jax.jit(lambda: build(config, nnx.Rngs(seed)), compiler_options=RUN_ONCE)()


def shapes(config: ConfigDict) -> VLM:
    """The model that a configuration describes, parameters as shapes: nothing is computed."""
    return jax.eval_shape(lambda: build(config, nnx.Rngs(0)))


def parameters(module: nnx.Module) -> int:
    """How many numbers a module holds; works on shapes alone."""
    return sum(leaf.size for leaf in jax.tree.leaves(module))
