# SPDX-License-Identifier: Apache-2.0
"""What a VLM and a grid ask of every compressor, with the answers that most of them give.

B batch  V visual tokens  D llm width
"""

from typing import NamedTuple

from flax import nnx
from jaxtyping import Array, Float, Int

from vlm_jax.compressors.window import tilings


class Visual(NamedTuple):
    """What each row's image became: V slots, of which the LLM reads the first `count`.

    Of rows with several images, as a VLM splices them: V slots of each, one after another, and a
    count of each.
    """

    tokens: Float[Array, "B V D"]
    count: Int[Array, "B *M"]


class Compressor(nnx.Module):
    """From the levels of the patches to visual tokens [B V D]; a method overrides what differs.

    `tokens` is V, the slots of its result. An adaptive compressor returns `Visual`: it fills its
    slots as far as each image needs them; the others return the tokens alone and fill them all.
    """

    tokens: int
    buckets: tuple[int, ...] = ()  # ascending V to run requests at, where one model serves any
    prefixes: tuple[int, ...] = ()  # a step of the second stage shows so many first tokens of it
    scales: tuple[int, ...] = ()  # a step of the second stage shows each of these V
    window = 1  # patches come window by window, windows of this side; 1 is raster order
    options: tuple[str, ...] = ()  # fields of config.compressor that this method alone has
    reads_question = False  # the question's feature is an input
    reads_prefix = False  # it comes from the LLM's own pass over the text before the image
    reads_keys = False  # the levels come with what ViT's `keys=True` adds, in float32
    shrink = 1  # the encoder sees the image this many times smaller on each side
    adaptive = False  # how many of its slots an image fills depends on the image

    @staticmethod
    def supported(side: int) -> list[int]:
        """Ascending numbers of visual tokens on a `side` x `side` patch grid: what tiles it."""
        return tilings(side)
