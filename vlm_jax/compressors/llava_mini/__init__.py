# SPDX-License-Identifier: Apache-2.0
"""LLaVA-Mini: a grid of learned queries, one in the published model, reads all patches.

V visual tokens (`tokens`)  P patches  E vit width
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from vlm_jax.compressors.method import (
    Interface,
    Method,
    Products,
    linear,
    projector_parameters,
)
from vlm_jax.compressors.tensors import LLAVA, Table, Tensor, attention, norm

HEADS = 8  # of the attention, fixed in the published code


@dataclass(frozen=True)
class LlavaMiniMethod(Method):
    """Cross-attention of V = c x c learned queries to all patches (arXiv 2501.03895).

    Before the LLM, `prefusion` layers of its form let the whole text read all patches. The visual
    tokens, which come before the text there, do not depend on it and can be stored; the text can
    not.

    Keys carry the queries' position table, resampled to the patches; with V = 1 that is a constant,
    which leaves no trace: the token is the same for every order of the patches.
    """

    kind: ClassVar[str] = "llava_mini"
    marks: ClassVar = ("ln_kv.", "prefusion_layers.")

    heads: int
    prefusion: int = 4

    @staticmethod
    def module() -> type:
        from vlm_jax.compressors.llava_mini.module import LlavaMini

        return LlavaMini

    @staticmethod
    def supported(side: int) -> list[int]:
        """Ascending squares of which no side is longer than the grid's."""
        return [n * n for n in range(1, side + 1)]

    @classmethod
    def usual(cls, side: int) -> int:
        return 1

    def parameters(self, interface: Interface) -> int:
        width = interface.width
        tables, norms = 2 * int(self.tokens) * width, 2 * 2 * width
        return tables + norms + 4 * linear(width, width) + projector_parameters(interface)

    def products(self, interface: Interface, form: str) -> Products:
        """Without the layers before the LLM, which `cost` counts by the LLM's sizes.

        Here no key or value is projected: each head attends to the patches at full width, with
        its query times the key projection, which no image enters."""
        V, P, width = self.tokens, interface.patches, interface.width
        out = 2 * V * width**2
        projected = V + (P if self.prefusion else 0)
        projector = projected * (interface.up + interface.down)
        if form == "published":
            read = 4 * P * width**2
            return Products(other=read + 4 * V * P * width + 2 * out + projector)
        side, grid = interface.side, math.isqrt(int(V))
        resampled = 2 * width * side * grid * (grid + side)
        return Products(
            other=4 * V * P * width * self.heads + 2 * out + projector,
            constant=2 * out + resampled,
        )

    def published(self) -> Table:
        """Names of ictnlp/LLaVA-Mini (47da1137), of its `compressor` and of LLaVA's projector."""
        return (
            {
                "pos_embed": Tensor((("position",),), unchanged=True),
                "query": Tensor((("query",),), unchanged=True),
            }
            | attention("attn", "attention")
            | norm("ln_q", "query_norm")
            | norm("ln_kv", "patch_norm")
            | LLAVA
        )

    @classmethod
    def of_published(cls, llava: Any) -> tuple[Method, tuple[int, ...]]:
        """One token per query, and as many layers before the LLM as there are."""
        shape = llava.shapes.get("query", ())
        if len(shape) != 2 or math.isqrt(shape[0]) ** 2 != shape[0]:
            raise ValueError(f"compressor.query is {shape or 'missing'}: a square grid of queries")
        layers = {x.split(".")[1] for x in llava.shapes if x.startswith("prefusion_layers.")}
        return cls(shape[0], llava.heads(cls.kind, HEADS), len(layers)), llava.levels
