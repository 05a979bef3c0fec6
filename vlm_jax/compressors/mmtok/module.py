# SPDX-License-Identifier: Apache-2.0
"""MMTok: the patches that together cover the words of the question and all other patches.

B batch  P patches, raster order  V visual tokens  U tokens of the question's words
Y channels of the encoder  E vit width  D llm width
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from vlm_jax.compressors.compressor import Question
from vlm_jax.compressors.selector import Selector, each_image, pairs, products, unit

TEXT_TEMPERATURE = 0.02  # as published for LLaVA-1.5
IMAGE_TEMPERATURE = 0.2
IMAGE_WEIGHT = 0.5  # of covering patches, against words
SHORTEST = 1e-8  # a row's length, where it is divided by


class MMTok(Selector):
    """Each next patch adds most to what is covered of the question and the image.

    The question is the LLM's input embeddings of its words (compressor.query "words"), each image's
    own. A patch of the padding that made the image square is not chosen while there are others.
    `levels` are those of ViT's `reads="image_size"`.

    Source: arXiv 2508.18264; Ironieser/MMTok at d1522cda. There a batch has one question, and V
    above the number of allowed patches repeats the first patch; here each image has its own, and
    the best of the excluded patches fill the rest.

        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from vlm_jax import mesh
        >>> from vlm_jax.compressors.compressor import Question
        >>> from vlm_jax.compressors.method import Interface
        >>> from vlm_jax.compressors.mmtok import MMTokMethod
        >>> between = Interface(side=4, width=32, levels=1, llm_width=64)
        >>> with jax.set_mesh(mesh.make(devices=jax.devices()[:1])):
        ...     cover = MMTokMethod(tokens=5).build(between, rngs=nnx.Rngs(0))
        ...     asked = Question(jnp.ones((2, 3, 64)), jnp.array([3, 2]))
        ...     jax.jit(lambda m, x, q: m(x, q))(cover, jnp.ones((2, 16, 32 + 2)), asked).shape
        (2, 5, 64)
    """

    def features(self, levels: Float[Array, "B P Y"]) -> Float[Array, "B P E"]:
        return levels[..., -self.width - 2 : -2]

    def choose(
        self, levels: Float[Array, "B P Y"], tokens: Float[Array, "B P D"], question: Question
    ) -> Int[Array, "B V"]:
        patch = self.interface.patch_size

        def one(tokens, features, size, words, length):
            excluded = padding(size, side=self.side, patch=patch)
            real = jnp.arange(len(words)) < length
            return select(tokens, features, words, real, excluded, count=self.tokens)

        return each_image(one, tokens, self.features(levels), levels[:, 0, -2:], *question)


def padding(size: Shaped[Array, "2"], *, side: int, patch: int) -> Bool[Array, " P"]:
    """Which patches of a `side` x `side` grid of `patch` x `patch` pixels lie in the padding of an
    image of this width and height, by the rounding of the published code."""
    width, height = size
    pixels = side * patch
    longest, shortest = jnp.maximum(width, height), jnp.minimum(width, height)
    inside = jnp.rint(shortest * pixels / longest).astype(jnp.int32)
    before = (pixels - inside) // 2
    after = pixels - inside - before
    line = jnp.arange(side)
    outside = (line < before // patch) | (line >= side - after // patch)
    rows = jnp.broadcast_to(outside[:, None], (side, side))
    return jnp.where(height < width, rows, rows.T).reshape(-1)


def select(
    tokens: Float[Array, "P D"],
    features: Float[Array, "P E"],
    words: Float[Array, "U D"],
    real: Bool[Array, " U"],
    excluded: Bool[Array, " P"],
    *,
    count: int,
    text_temperature: float = TEXT_TEMPERATURE,
    image_temperature: float = IMAGE_TEMPERATURE,
    image_weight: float = IMAGE_WEIGHT,
) -> Int[Array, " V"]:
    """`count` patches of one image in the order in which they are chosen.

    Args:
      tokens: the projected patches; features: the last level of them.
      words: input embeddings of the question's words, of which the `real` ones count.
      excluded: patches that are chosen only when no others are left. They are covered like others.
      text_temperature, image_temperature: of the softmax over the patches that each word, and each
        patch, is divided among.
      image_weight: of covering patches, against words.
    """
    tokens, words, features = (unit(x, SHORTEST) for x in (tokens, words, features))
    asked = jax.nn.softmax(products(words, tokens) / text_temperature)
    asked = jnp.where(real[:, None], asked, 0) / jnp.maximum(real.sum(), 1)
    seen = jax.nn.softmax(pairs(features) / image_temperature) / len(features)
    # One row for each patch that may be chosen: what it covers of every word and patch.
    covers = jnp.concatenate([asked, image_weight * seen]).T

    def step(i, state):
        order, covered, chosen = state
        gain = jnp.maximum(covers - covered, 0).sum(1)
        allowed = ~(chosen | excluded)
        allowed = jnp.where(allowed.any(), allowed, ~chosen)
        best = jnp.argmax(jnp.where(allowed, gain, -jnp.inf))
        covered = jnp.maximum(covered, covers[best])
        return order.at[i].set(best), covered, chosen.at[best].set(True)

    state = jnp.zeros(count, jnp.int32), jnp.zeros(covers.shape[1]), jnp.zeros_like(excluded)
    return lax.fori_loop(0, count, step, state)[0]
