# SPDX-License-Identifier: Apache-2.0
"""What a VLM asks of every compressor's flax module, with the answers that most of them give.

B batch  V visual tokens  D llm width
"""

from typing import NamedTuple

from flax import nnx
from jaxtyping import Array, Float, Int

from vlm_jax.compressors.method import Interface, Method


class Visual(NamedTuple):
    """What each row's image became: V slots, of which the LLM reads the first `count`.

    Of rows with several images, as a VLM splices them: V slots of each, one after another, and a
    count of each.
    """

    tokens: Float[Array, "B V D"]
    count: Int[Array, "B *M"]


class Compressor(nnx.Module):
    """From the levels of the patches to visual tokens [B V D]; a method overrides what differs.

    `method` describes it. `tokens` is V, the slots of its result. An adaptive compressor returns
    `Visual`: it fills its slots as far as each image needs them; the others return the tokens alone
    and fill them all. ValueError where the method cannot give what is described.
    """

    method: Method
    tokens: int
    buckets: tuple[int, ...] = ()  # ascending V to run requests at, where one model serves any
    prefixes: tuple[int, ...] = ()  # a step of the second stage shows so many first tokens of it
    scales: tuple[int, ...] = ()  # a step of the second stage shows each of these V
    window = 1  # patches come window by window, windows of this side; 1 is raster order

    def __init__(self, method: Method, interface: Interface):
        method.check(interface)
        self.method, self.interface = method, interface
        self.side, self.width = interface.side, interface.width
        self.tokens = method.visual_tokens(interface.rows)

    @property
    def reads_question(self) -> bool:
        """Whether the question's feature is an input."""
        return self.method.reads_question

    @property
    def reads_prefix(self) -> bool:
        """Whether it comes from the LLM's own pass over the text before the image."""
        return self.method.reads_prefix

    @property
    def reads_keys(self) -> bool:
        """Whether the levels come with what ViT's `keys=True` adds, in float32."""
        return self.method.reads_keys

    @property
    def shrink(self) -> int:
        """How many times smaller on each side the encoder sees the image."""
        return self.method.shrink(self.side)

    @property
    def adaptive(self) -> bool:
        """Whether it depends on the image how many of its slots are filled."""
        return self.method.adaptive
