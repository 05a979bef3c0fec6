# SPDX-License-Identifier: Apache-2.0
"""Downsampling: a smaller image has fewer patches, and the encoder itself becomes cheaper."""

from dataclasses import dataclass
from typing import ClassVar

from vlm_jax.compressors.method import Number, Projected, window_side


@dataclass(frozen=True)
class DownsampleMethod(Projected):
    """The image is shrunk to V patches before it is encoded (arXiv 2510.07143)."""

    kind: ClassVar[str] = "downsample"
    inelastic: ClassVar[str] = "encodes another image for each V, and its features are kept for one"

    @staticmethod
    def module() -> type:
        from vlm_jax.compressors.downsample.module import Downsample

        return Downsample

    def shrink(self, side: int) -> int:
        return window_side(self.tokens, side)

    def encoded(self, side: int) -> Number:
        return self.tokens
