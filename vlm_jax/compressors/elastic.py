# SPDX-License-Identifier: Apache-2.0
"""The base of descriptions of windowed methods that one training can make for several V.

V visual tokens (`tokens`)
"""

from dataclasses import dataclass, field, replace

from vlm_jax.compressors.method import Interface, Method, Number


@dataclass(frozen=True)
class Elastic(Method):
    """A windowed method with a form in which no weight depends on V.

    `elastic` names the V of which each step of align and finetune runs one, so that one model
    serves them all (as TokenFLEX draws V, arXiv 2504.03154); (): the model has the one V.
    """

    elastic: tuple[int, ...] = field(default=(), kw_only=True)

    @property
    def serves_several(self) -> bool:
        return bool(self.elastic)

    @property
    def variant(self) -> str:
        return "elastic" if self.elastic else ""

    def check(self, interface: Interface) -> None:
        super().check(interface)
        if not self.elastic:
            return
        supported = self.supported(interface.side)
        if wrong := [V for V in self.elastic if V not in supported]:
            side = interface.side
            raise ValueError(
                f"compressor.elastic={self.elastic}: {self.kind} cannot make {wrong[0]} visual "
                f"tokens from a {side}x{side} patch grid: choose of {supported}"
            )
        if any(b <= a for a, b in zip(self.elastic, self.elastic[1:], strict=False)):
            raise ValueError(f"compressor.elastic={self.elastic}: give V in ascending order")
        if self.tokens not in self.elastic:
            raise ValueError(
                f"this {self.kind} gives the V of compressor.elastic={self.elastic}, not "
                f"{self.tokens}: choose one of them"
            )

    def fixed(self, tokens: Number) -> "Elastic":
        return replace(self, tokens=tokens, elastic=())

    def given(self, side: int) -> list[int]:
        return list(self.elastic) or super().given(side)

    def buckets(self, side: int) -> tuple[int, ...]:
        return self.elastic

    def drawn_tokens(self, side: int) -> tuple[int, ...]:
        return self.elastic
