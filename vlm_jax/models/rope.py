# SPDX-License-Identifier: Apache-2.0
"""Rotary positions (arXiv 2104.09864) with the stretchings that published configurations name.

B batch  T tokens  N heads  H head size
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.models.sizes import LLMSize


class Turns(NamedTuple):
    """Cosine and sine of every angle, computed once for all layers; one row may serve all."""

    cos: Float[Array, "#B T 1 half"]
    sin: Float[Array, "#B T 1 half"]


@dataclass(frozen=True)
class Rope:
    """How fast each pair of features turns: theta^(-2i/H), then stretched as `kind` says.

    `factor` and the three numbers behind it are those of `rope_scaling` in a published config.json;
    a kind reads what it needs. ValueError: a kind that is not in `KINDS`.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_length: int = 8192

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"llm.rope_kind={self.kind!r}: choose one of {sorted(KINDS)}")

    @classmethod
    def of(cls, size: LLMSize) -> "Rope":
        """That of a decoder."""
        return cls(
            size.rope_theta,
            size.rope_kind,
            size.rope_factor,
            size.rope_low_frequency,
            size.rope_high_frequency,
            size.rope_original_length,
        )

    def turns(self, positions: Int[Array, "B T"], half: int) -> "Turns":
        """How far the `half` pairs of a head are turned at these positions."""
        angle = positions[:, :, None, None].astype(jnp.float32) * self.rates(half)
        return Turns(jnp.cos(angle), jnp.sin(angle))

    def rates(self, half: int) -> Float[Array, "half"]:
        """Radians per position of the `half` pairs of a head."""
        plain = self.theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
        return KINDS[self.kind](plain, self)


def llama3(rates: Float[Array, "half"], rope: Rope) -> Float[Array, "half"]:
    """Slow pairs are divided by the factor, fast ones kept, those between blended (Llama 3.1)."""
    turns = rope.original_length * rates / (2 * math.pi)
    fast = (turns - rope.low_frequency) / (rope.high_frequency - rope.low_frequency)
    fast = jnp.clip(fast, 0, 1)
    return rates * (fast + (1 - fast) / rope.factor)


KINDS: dict[str, Callable[[Array, Rope], Array]] = {
    "default": lambda rates, rope: rates,
    "linear": lambda rates, rope: rates / rope.factor,  # positions interpolated, arXiv 2306.15595
    "llama3": llama3,
}


def rotate(x: Float[Array, "B T N H"], turns: Turns) -> Float[Array, "B T N H"]:
    """Rotary position embedding in the half-split form of the published Llama and Qwen weights."""
    cos, sin = turns
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
