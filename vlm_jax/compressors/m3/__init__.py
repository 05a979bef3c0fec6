# SPDX-License-Identifier: Apache-2.0
"""M3: the projected patches, averaged over windows of any side that tiles the grid."""

from dataclasses import dataclass
from typing import Any, ClassVar

from vlm_jax.compressors.method import Interface, Method, Products, Projected


@dataclass(frozen=True)
class M3Method(Projected):
    """LLaVA-1.5's projector, its outputs averaged over windows of patches (arXiv 2405.17430).

    `scales` are the numbers of tokens that every training step uses; () stands for `nested`.
    """

    kind: ClassVar[str] = "m3"
    any_tokens: ClassVar[bool] = True
    inelastic: ClassVar[str] = "serves several V as it is"
    named_by: ClassVar = (("matryoshka_vis_token_scale", None),)
    scales: tuple[int, ...] = ()

    @staticmethod
    def module() -> type:
        from vlm_jax.compressors.m3.module import M3

        return M3

    @staticmethod
    def nested(side: int) -> tuple[int, ...]:
        """The default numbers of tokens for training, ascending; each side divides the next.

        Starting from all patches the side is divided by its smallest prime factor again and again:
        576, 144, 36, 9 and 1 for 24 x 24 patches, as published.
        """
        sides = [side]
        while sides[-1] > 1:
            n = sides[-1]
            sides.append(n // next(k for k in range(2, n + 1) if n % k == 0))
        return tuple(n * n for n in reversed(sides))

    @classmethod
    def usual(cls, side: int) -> int:
        return side**2

    @classmethod
    def of_published(cls, llava: Any) -> tuple[Method, tuple[int, ...]]:
        """A LLaVA whose config.json lists the numbers of tokens that it was trained to give."""
        name = "matryoshka_vis_token_scale"
        scales, side = llava.fields[name], llava.side
        if isinstance(scales, str):
            parts = scales.split(",")
            scales = [int(x) if x.strip().isdecimal() and len(x) < 9 else x for x in parts]
        scales = scales if isinstance(scales, list) else [scales]
        scales = tuple(llava.whole(name, x, most=side**2) for x in scales)
        if not scales:
            raise ValueError(f"{name}=[]: numbers of tokens are needed")
        tokens = max(scales) if llava.tokens is None else llava.tokens
        return cls(tokens=tokens, scales=scales), llava.levels

    def buckets(self, side: int) -> tuple[int, ...]:
        return tuple(self.supported(side))

    def trained_tokens(self, side: int) -> tuple[int, ...]:
        return self.scales or self.nested(side)

    def check(self, interface: Interface) -> None:
        for tokens in (self.tokens, *self.trained_tokens(interface.side)):
            Projected.check(self.at(tokens), interface)

    def products(self, interface: Interface, form: str) -> Products:
        """The published code pools the output of the MLP; here pooling precedes its last layer."""
        P = interface.patches
        last = P if form == "published" else self.tokens
        return Products(reading=P * interface.up, other=last * interface.down)
