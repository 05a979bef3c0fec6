# SPDX-License-Identifier: Apache-2.0
"""Windowed cross-attention: one query per window over the keys and values of that window.

B batch  V windows  S keys of one window  N heads  H head size  E width of what is not projected
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def window_attention(
    query: Float[Array, "B V N H"],
    keys: Float[Array, "B V S N H"],
    values: Float[Array, "B V S N H"],
) -> Float[Array, "B V N H"]:
    """Softmax attention inside every window, scores scaled by 1/sqrt(H) and softmax in float32."""
    scores = jnp.einsum("BVNH,BVSNH->BVNS", query, keys, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * query.shape[-1] ** -0.5).astype(values.dtype)
    return jnp.einsum("BVNS,BVSNH->BVNH", weights, values)


def absorbed_attention(
    query: Float[Array, "B V N E"],
    keys: Float[Array, "B V S E"],
    values: Float[Array, "B V S E"],
    *,
    scale: float,
) -> Float[Array, "B V N E"]:
    """`window_attention` with keys and values that all heads share, scores times `scale`."""
    scores = jnp.einsum("BVNE,BVSE->BVNS", query, keys, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * scale).astype(values.dtype)
    return jnp.einsum("BVNS,BVSE->BVNE", weights, values)
