# SPDX-License-Identifier: Apache-2.0
"""Pixel unshuffle: the patches of a window side by side in one token, then an MLP.

V visual tokens (`tokens`)  P patches  E vit width  D llm width
"""

from dataclasses import dataclass
from typing import ClassVar

from vlm_jax.compressors.method import Interface, Method, Number, Products, linear
from vlm_jax.compressors.tensors import Table, mlp, norm

VERSIONS = ("v2", "v1")


@dataclass(frozen=True)
class PixelUnshuffleMethod(Method):
    """InternVL's projector (arXiv 2404.16821): V = P / s^2 tokens of s x s patches.

    `ps_version` is InternVL's: "v1" leaves the grid of tokens transposed, as its older models do.
    """

    kind: ClassVar[str] = "pixel_unshuffle"
    marks: ClassVar = ("mlp1.",)
    inelastic: ClassVar[str] = (
        "has weights that depend on V: a token is as wide as all patches of its window together"
    )
    ps_version: str = "v2"

    @staticmethod
    def module() -> type:
        from vlm_jax.compressors.pixel_unshuffle.module import PixelUnshuffle

        return PixelUnshuffle

    def check(self, interface: Interface) -> None:
        super().check(interface)
        if self.ps_version not in VERSIONS:
            raise ValueError(f"compressor.ps_version={self.ps_version!r}: choose one of {VERSIONS}")

    @property
    def variant(self) -> str:
        return "" if self.ps_version == "v2" else self.ps_version

    def window_width(self, interface: Interface) -> Number:
        """Channels of all patches of a token together."""
        return interface.patches * interface.width / self.tokens

    def parameters(self, interface: Interface) -> int:
        width, llm_width = round(self.window_width(interface)), interface.llm_width
        return 2 * width + linear(width, llm_width) + linear(llm_width, llm_width)

    def products(self, interface: Interface, form: str) -> Products:
        """The first layer reads every patch once, whatever V; the norm before it is trained too."""
        return Products(other=interface.patches * interface.up + self.tokens * interface.down)

    def published(self) -> Table:
        """Names of OpenGVLab/InternVL (2410d1db)."""
        return norm("mlp1.0", "norm") | mlp("mlp1.1", "mlp1.3", "projector")
