# SPDX-License-Identifier: Apache-2.0
"""Hashes of 32 bits that a device computes: of numbers, and of an image's pixels.

B batch  I image side in pixels
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt32


def fmix(h: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """MurmurHash3's finalizer of 32 bits (Austin Appleby, public domain): a bijection."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def image_ids(pixels: Float[Array, "B I I 3"]) -> UInt32[Array, "B"]:
    """A number of each image, from the bits of its pixels and their places, in float32.

    A sum over the pixels: it does not depend on the order in which a device adds.
    """
    bits = lax.bitcast_convert_type(pixels.astype(jnp.float32), jnp.uint32)
    row, column, color = (lax.broadcasted_iota(jnp.uint32, bits.shape, k) for k in (1, 2, 3))
    side = jnp.uint32(pixels.shape[2])
    place = (row * side + column) * jnp.uint32(3) + color
    return fmix(bits + fmix(place)).sum((1, 2, 3), dtype=jnp.uint32)


def halves(ids: UInt32[Array, "B"]) -> Float[Array, "B 2"]:
    """The upper and the lower 16 bits, each of which float32 holds exactly."""
    return jnp.stack([ids >> 16, ids & jnp.uint32(0xFFFF)], axis=-1).astype(jnp.float32)


def joined(halves: Float[Array, "B 2"]) -> UInt32[Array, "B"]:
    """The numbers of these `halves`."""
    high, low = (halves[:, k].astype(jnp.uint32) for k in range(2))
    return (high << 16) | low
