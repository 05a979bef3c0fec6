# SPDX-License-Identifier: Apache-2.0
"""QueCC: queries from patches and question attend to windows of patches (arXiv 2411.03312).

V visual tokens (`tokens`)  P patches  E vit width  D llm width
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from vlm_jax.compressors.elastic import Elastic
from vlm_jax.compressors.method import (
    LEVELS,
    Interface,
    Method,
    Products,
    keys_and_values_parameters,
    linear,
    projector_parameters,
    window_attention_flops,
)
from vlm_jax.compressors.tensors import Table, Tensor, attention, joined_mlp, mlp, norm
from vlm_jax.compressors.tensors import linear as linear_tensors

QUERY_SOURCES = ("none", "separate", "prefix")  # where the feature of the question comes from
DOWNSAMPLES = ("conv", "pool")  # how the query of a window is made
HEADS = 8  # written into the published code
TEXT_PROJECTION = "0.text_projection.0.weight"  # exists if the model reads the question


@dataclass(frozen=True)
class QueCCMethod(Elastic):
    """Windowed cross-attention whose queries are a depthwise convolution of patches plus question.

    `query` is the source of the question's feature, `downsample` makes the query of a window.
    """

    kind: ClassVar[str] = "quecc"
    marks: ClassVar = ("0.clip_attn.", "0.q_downsample.")
    named_by: ClassVar = (("mm_vision_token_compression_type", "quecc"),)
    heads: int
    query: str = "none"
    downsample: str = "conv"  # as published

    def __post_init__(self) -> None:
        if self.query not in QUERY_SOURCES:
            raise ValueError(
                f"compressor.query={self.query!r}: choose one of {list(QUERY_SOURCES)}"
            )
        if self.downsample not in DOWNSAMPLES:
            raise ValueError(
                f"compressor.downsample={self.downsample!r}: choose one of {list(DOWNSAMPLES)}"
            )
        if self.elastic and self.downsample == "conv":
            raise ValueError(
                f"compressor.elastic={self.elastic}: quecc's convolution has a weight for each "
                "patch of a window, whose size depends on V; set compressor.downsample='pool', or "
                "compressor.elastic=()"
            )

    @staticmethod
    def module() -> type:
        from vlm_jax.compressors.quecc.module import QueCC

        return QueCC

    @property
    def variant(self) -> str:
        own = "" if self.downsample == "conv" else self.downsample
        return ", ".join(filter(None, (own, super().variant)))

    def parameters(self, interface: Interface) -> int:
        width, norm = interface.width, 2 * interface.width
        convolved = self.downsample == "conv"
        taps = width * (round(interface.patches / self.tokens) + 1) if convolved else 0
        query = 2 * linear(width, width) + norm + taps
        question = linear(interface.llm_width, width) + norm if self.reads_question else 0
        return (
            query
            + keys_and_values_parameters(interface)
            + 4 * linear(width, width)  # the attention
            + question
            + projector_parameters(interface)
        )

    def products(self, interface: Interface, form: str) -> Products:
        V, P, square = self.tokens, interface.patches, interface.square
        read = 2 * P * interface.levels * square  # first layer of keys and of values
        write = 2 * P * square  # their second layer
        first = P * square  # of the query
        attend = window_attention_flops(V, interface, self.heads, form)
        other = write + P * square + V * (interface.up + interface.down) + attend
        if self.downsample == "conv":
            other += 2 * P * interface.width
        if not self.reads_question:
            return Products(reading=read + first, other=other)
        read += 2 * interface.llm_width * interface.width
        # The published code adds the question to every patch before the query's first layer; here
        # it goes through that layer separately.
        if form == "published":
            return Products(reading=read, other=other + first)
        return Products(reading=read + first, other=other + square)

    def published(self) -> Table:
        """QueCC is the first module of a sequence; the others are LLaVA's projector.

        Names: locuslab/llava-token-compression (bdedebdf).
        """
        taps = {
            "0.q_downsample.weight": Tensor((("taps",),), outputs=1, square=True),
            "0.q_downsample.bias": Tensor((("taps_bias",),)),
        }
        text = linear_tensors("0.text_projection.0", "text")
        text |= norm("0.text_projection.1", "text_norm")
        paths = mlp("0.q_proj.0", "0.q_proj.2", "query") | norm("0.q_proj.3", "query_norm")
        for letter, part in (("k", "key"), ("v", "value")):
            paths |= joined_mlp(f"0.{letter}_proj.0", f"0.{letter}_proj.2", part)
            paths |= norm(f"0.{letter}_proj.3", f"{part}_norm")
        return (
            attention("0.clip_attn", "attention")
            | paths
            | (taps if self.downsample == "conv" else {})
            | (text if self.reads_question else {})
            | mlp("1", "3", "projector")
        )

    @classmethod
    def of_published(cls, llava: Any) -> tuple[Method, tuple[int, ...]]:
        """QueCC from the paper's code."""
        side, fields, shapes = llava.side, llava.fields, llava.shapes
        prefix = "mm_vision_token_compression"
        counted = fields.get("mm_vision_output_token_count", 576)
        if llava.whole("mm_vision_output_token_count", counted) != side**2:
            raise ValueError(
                f"mm_vision_output_token_count={counted}, and the tower has {side**2} patches"
            )
        taps = shapes.get("0.q_downsample.weight", ())
        if len(taps) != 4 or taps[2] != taps[3]:
            raise ValueError(
                f"compressor.0.q_downsample.weight is {taps or 'missing'}, not a convolution"
            )
        kernel, stride = (
            llava.whole(f"{prefix}_{name}", fields.get(f"{prefix}_{name}", usual))
            for name, usual in (("kernel_size", taps[3]), ("stride", 4))
        )
        if kernel != taps[3]:
            raise ValueError(
                f"{prefix}_kernel_size={kernel}, and compressor.0.q_downsample.weight is {taps}"
            )
        if kernel != stride or side % kernel:
            raise ValueError(
                f"{prefix}_kernel_size={kernel} with {prefix}_stride={stride} on a {side}x{side} "
                f"grid is not supported: both must be one number that divides {side}"
            )
        if TEXT_PROJECTION in shapes:
            size = fields.get("mm_vision_output_text_embedding_size")
            if size is not None and size != shapes[TEXT_PROJECTION][-1]:
                raise ValueError(
                    f"mm_vision_output_text_embedding_size={llava.value_text(size)}, and "
                    f"compressor.{TEXT_PROJECTION} is {shapes[TEXT_PROJECTION]}"
                )
        levels = llava.levels_of("0.k_proj.0.weight", LEVELS)
        heads = llava.heads(cls.kind, HEADS, fixed=True)
        query = "separate" if TEXT_PROJECTION in shapes else "none"
        return cls((side // kernel) ** 2, heads, query), levels
