# SPDX-License-Identifier: Apache-2.0
"""The interface of a compressor's flax module to the VLM, with the usual implementations.

B batch  V visual tokens  U tokens of a question  D llm width
"""

from typing import Any, NamedTuple

from flax import nnx
from jaxtyping import Array, Float, Int

from vlm_jax.compressors.method import Interface, Method


class Visual(NamedTuple):
    """Visual tokens of each row: V slots, of which the LLM reads the first `count`.

    Rows with M images have V slots per image, one image after another, and M counts.
    """

    tokens: Float[Array, "B V D"]
    count: Int[Array, "B *M"]


class Question(NamedTuple):
    """What a method that reads the question's tokens reads of each image's question: ids or
    embeddings, of which the first `length` count."""

    tokens: Int[Array, "B U"] | Float[Array, "B U D"]
    length: Int[Array, "B"]


class Compressor(nnx.Module):
    """From the levels of the patches to visual tokens [B V D]; a method overrides what differs.

    `method` is its description, `tokens` is V, the slots of its result. An adaptive compressor
    returns `Visual` and fills as many slots as each image needs; the others return tokens alone and
    fill all slots. Raises ValueError if the method cannot produce what is described.
    """

    method: Method
    tokens: int
    buckets: tuple[int, ...] = ()  # ascending V at which requests run, if one model serves any V
    drawn: tuple[int, ...] = ()  # V of which a step of both stages runs one
    prefixes: tuple[int, ...] = ()  # V of which a step of the second stage draws one
    scales: tuple[int, ...] = ()  # V that a step of the second stage trains all together
    fusion: Any = None  # layers before the LLM in which the text reads the image, if it has any
    window = 1  # side of the windows in which patches are ordered; 1 is raster order

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
        """Whether that feature comes from the LLM's own pass over the text before the image."""
        return self.method.reads_prefix

    @property
    def reads_text(self) -> bool:
        """Whether what becomes of the text before an image depends on the image, or is read by the
        compressor: it cannot be read before the image is known."""
        return self.reads_prefix or self.method.summarizes or self.fusion is not None

    @property
    def reads(self) -> str:
        """What the levels include beside the patches' outputs (ViT's `reads`), then in float32."""
        return self.method.reads

    @property
    def shrink(self) -> int:
        """The factor by which each side of the image is shrunk before the encoder."""
        return self.method.shrink(self.side)

    @property
    def adaptive(self) -> bool:
        """Whether the number of filled slots depends on the image."""
        return self.method.adaptive
