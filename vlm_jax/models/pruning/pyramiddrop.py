# SPDX-License-Identifier: Apache-2.0
"""PyramidDrop: after each quarter of the layers, half of the visual tokens that are left."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from vlm_jax.models.pruning.description import Pruning


@dataclass(frozen=True)
class PyramidDrop(Pruning):
    """PyramidDrop (arXiv 2410.17247): several cuts, by the attention of the layer behind each.

    That is the last token's of the prompt, mean over heads. Positions are counted again, without
    gaps, after every cut. Source: Cooperx521/PyramidDrop at 6444f304, whose code needs as many
    key-value heads as heads; here they are shared.
    """

    kind: ClassVar[str] = "pyramiddrop"
    looks_ahead: ClassVar[bool] = True
    packs: ClassVar[bool] = True

    @classmethod
    def usual_layers(cls, depth: int) -> tuple[int, ...]:
        # Layers 8, 16 and 24 of 32; in a model of fewer than four layers some coincide.
        return tuple(sorted({max(depth * quarter // 4, 1) for quarter in (1, 2, 3)} - {depth}))

    @classmethod
    def usual_tokens(cls, visual: int) -> tuple[int, ...]:
        return tuple(int(visual * ratio) for ratio in (0.5, 0.25, 0.125))

    def cut(self) -> Callable[..., Any]:
        from vlm_jax.models.pruning.cuts import by_attention

        return by_attention
