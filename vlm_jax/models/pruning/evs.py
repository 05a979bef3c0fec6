# SPDX-License-Identifier: Apache-2.0
"""EVS: of a clip's visual tokens, those that differ least from the frame before are left out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from vlm_jax.compressors.method import Number
from vlm_jax.models.pruning.description import NONE, Pruning, Read, Run


@dataclass(frozen=True)
class EVS(Pruning):
    """Efficient video sampling (arXiv 2510.14624), before the LLM: no layer reads what is dropped.

    Each token is compared, by the cosine, with that of the same place in the frame before. Of a
    clip the least similar ones are kept, max(V, int((1 - dropped) T V)), all of the first frame
    among them, in their order. The others leave no gap: positions are counted after the choice, as
    for every LLM whose positions have one dimension.

    Source: vllm-project/vllm, vllm/multimodal/evs.py. There equal similarities fall in any order;
    here the earlier token comes first, and similarities that differ by less than 1 / 4096 may be
    equal, so that where nothing moves the choice does not follow from rounding.
    """

    kind: ClassVar[str] = "evs"
    of_clips: ClassVar[bool] = True

    layers: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    dropped: float = 0.0

    @classmethod
    def of(cls, fields: Mapping[str, Any], read: Read) -> "EVS":
        for name in ("layers", "tokens", "weight"):
            if fields[name] != NONE[name]:
                raise ValueError(
                    f"pruning.{name}={fields[name]} is not read by pruning.kind='evs', which drops "
                    "the share pruning.dropped before the first layer: leave it out"
                )
        made = cls(dropped=fields["dropped"])
        made.check(read)
        return made

    @classmethod
    def usual_layers(cls, depth: int) -> tuple[int, ...]:
        return ()

    def check(self, read: Read) -> None:
        if not 0 < self.dropped < 1:
            raise ValueError(
                f"pruning.dropped={self.dropped}: pruning.kind='evs' drops a share of a clip's "
                "visual tokens, above 0 and below 1, such as 0.7"
            )
        method = read.compressor
        if not method.in_place or method.adaptive or method.prefusion or method.summarizes:
            raise ValueError(
                f"pruning.kind='evs' compares a token with that of the same place in the frame "
                f"before, and compressor.kind={method.kind!r} has none: choose a compressor whose "
                "tokens have places, such as token_packer, pool or none"
            )

    def kept(self, visual: int, frames: int) -> int:
        """Tokens that are kept of `frames` images with `visual` each; 0 of none."""
        return max(visual, int(visual * frames * (1 - self.dropped))) if frames else 0

    def given(self, visual: Number, frames: Number) -> Number:
        return self.kept(visual, frames)  # type: ignore[arg-type]

    @property
    def inside(self) -> Pruning | None:
        return None

    def before(self) -> Callable[..., Any]:
        from vlm_jax.models.dropped import drop

        return drop

    def cut(self) -> Callable[..., Any]:
        raise TypeError("evs drops tokens before the LLM, and cuts none between its layers")

    def runs(self, depth: int, visual: Number) -> tuple[Run, ...]:
        return (Run(0, depth, visual),)

    @property
    def variant(self) -> str:
        return f"evs drops {self.dropped:g}"
