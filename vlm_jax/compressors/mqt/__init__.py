# SPDX-License-Identifier: Apache-2.0
"""MQT: the first V of a list of learned queries, whose attention is the same for every image.

V visual tokens (`tokens`)  P patches  E vit width
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from vlm_jax.compressors.method import Interface, Method, Products, linear
from vlm_jax.compressors.tensors import Table, Tensor, attention, norm

LEARNED_QUERIES = 256  # a 16 x 16 grid, or one per patch if those are fewer; arXiv 2405.19315
HEADS = 16  # in the published code, at width 1024
BUCKETS = (1, 4, 16, 36, 144)  # and all queries


@dataclass(frozen=True)
class MQTMethod(Method):
    """Cross-attention of learned queries to all patches of the last level (arXiv 2405.19315)."""

    kind: ClassVar[str] = "mqt"
    any_tokens: ClassVar[bool] = True
    inelastic: ClassVar[str] = "serves several V as it is"
    draws_tokens: ClassVar[bool] = True
    marks: ClassVar = ("ln_k.", "ln_v.", "proj")
    named_by: ClassVar = (("query_abstractor_type", "matry_query"),)
    checks_projector_type: ClassVar[bool] = False
    heads: int
    queries: int = 0  # number of learned queries; 0 as published

    @staticmethod
    def module() -> type:
        from vlm_jax.compressors.mqt.module import MQT

        return MQT

    @staticmethod
    def supported(side: int) -> list[int]:
        """Supported V on a `side` x `side` patch grid, ascending: any up to the queries."""
        return list(range(1, min(LEARNED_QUERIES, side**2) + 1))

    @classmethod
    def planned(cls, side: int) -> list[int]:
        """The powers of two: any prefix of its queries works."""
        return [2**i for i in range(LEARNED_QUERIES.bit_length())]

    def learned(self, side: int) -> int:
        """The number of learned queries, which is independent of V."""
        return self.queries or min(LEARNED_QUERIES, side**2)

    def check(self, interface: Interface) -> None:
        learned = self.learned(interface.side)
        if math.isqrt(max(learned, 0)) ** 2 != learned or learned < 1:
            raise ValueError(
                f"mqt: {learned} queries are not a square grid: choose 1, 4, 9, ... "
                f"{LEARNED_QUERIES}"
            )
        if interface.width % 4:
            raise ValueError(
                f"mqt: vit.width={interface.width} is not a multiple of 4, as the sines and "
                "cosines of rows and columns need"
            )
        self.check_rows(interface)
        if not 1 <= self.tokens <= learned:
            raise self.impossible(interface, f"any of 1 to {learned}")

    def buckets(self, side: int) -> tuple[int, ...]:
        learned = self.learned(side)
        return (*(slots for slots in BUCKETS if slots < learned), learned)

    def prefixes(self, side: int) -> tuple[int, ...]:
        """Numbers of tokens from which second-stage steps draw with equal probability.

        2, 4, ... 256 as published; 1, 3, ... if the number of queries is odd.
        """
        return tuple(range(self.learned(side), 0, -2))[::-1]

    def parameters(self, interface: Interface) -> int:
        width = interface.width
        attend, norms = 4 * linear(width, width), 3 * 2 * width
        table = 2 * self.learned(interface.side) * width  # queries and their positions
        return table + attend + norms + width * interface.llm_width

    def products(self, interface: Interface, form: str) -> Products:
        """MQT's keys hold no image: the weights of its attention are the same for every image.

        The published code computes them for every image. Here they are computed once for a batch,
        and for few queries the patches are averaged before the value projection and not after it.
        """
        V, P, width = self.tokens, interface.patches, interface.width
        side, grid = interface.side, math.isqrt(self.learned(interface.side))
        keys = 2 * P * width**2 + 2 * V * width**2 + 2 * V * P * width
        values = 2 * P * width**2 + 2 * V * P * width
        out, last = 2 * V * width**2, 2 * V * width * interface.llm_width
        if form == "published":
            return Products(other=keys + values + out + last)
        averaged = 2 * self.heads * V * P * width + 2 * V * width**2
        of_image = min(values, averaged) + last
        if form == "folded":
            return Products(other=of_image)
        resampled = 2 * width * side * grid * (grid + side)  # the position table, dense products
        return Products(other=of_image + out, constant=keys + resampled)

    def published(self) -> Table:
        """MQT multiplies by `proj` from the right: no transpose, and no bias.

        Names: gordonhu608/MQT-LLaVA (92c35d06).
        """
        unchanged = {
            "pos_embed": ("position",),
            "query": ("query",),
            "proj": ("projector", "kernel"),
        }
        return (
            {name: Tensor((path,), unchanged=True) for name, path in unchanged.items()}
            | attention("attn", "attention")
            | norm("ln_q", "query_norm")
            | norm("ln_k", "key_norm")
            | norm("ln_v", "value_norm")
        )

    @classmethod
    def of_published(cls, llava: Any) -> tuple[Method, tuple[int, ...]]:
        """One model for any number of tokens; by default it produces one token per query."""
        side, shape = llava.side, llava.shapes.get("query", ())
        if len(shape) != 2 or math.isqrt(shape[0]) ** 2 != shape[0]:
            raise ValueError(f"compressor.query is {shape or 'missing'}: a square grid of queries")
        tokens_field, queries = llava.fields.get("num_visual_tokens"), shape[0]
        # These values describe training and not requests.
        if tokens_field in (None, "first_stage", "second_stage"):
            tokens_field = queries
        if isinstance(tokens_field, str) and tokens_field.isdecimal() and len(tokens_field) < 9:
            tokens_field = int(tokens_field)
        tokens = llava.whole("num_visual_tokens", tokens_field, most=queries)
        tokens = tokens if llava.tokens is None else llava.tokens
        heads = llava.heads(cls.kind, HEADS)
        # 0 stands for the number of a new model of these sizes.
        usual = len(cls.supported(side))
        return cls(tokens, heads, 0 if queries == usual else queries), llava.levels
