# SPDX-License-Identifier: Apache-2.0
"""FastV: after a few layers, only the visual tokens that the last token attends to most."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from vlm_jax.models.pruning.description import Pruning


@dataclass(frozen=True)
class FastV(Pruning):
    """FastV (arXiv 2403.06764): one cut, by the attention of the layer before it, mean over heads.

    Tokens keep their positions. Source: pkunlp-icler/FastV at d1659729. Its scripts start the image
    one token late, so that the first patch is always kept; its form with a cache stores the keys of
    the layer before the cut twice. Neither is done here.
    """

    kind: ClassVar[str] = "fastv"

    @classmethod
    def usual_layers(cls, depth: int) -> tuple[int, ...]:
        return (2,)

    def check(self, read: Any) -> None:
        super().check(read)
        if len(self.layers) != 1:
            raise ValueError(
                f"pruning.layers={self.layers}: fastv cuts once, such as (2,); several cuts are "
                "pruning.kind='pyramiddrop'"
            )

    def cut(self) -> Callable[..., Any]:
        from vlm_jax.models.pruning.cuts import by_attention

        return by_attention
