# SPDX-License-Identifier: Apache-2.0
"""Visual tokens of a clip that are like those of the frame before, left out before the LLM.

B batch  M frames of a row  V visual tokens  K tokens that are kept of a row, at most  D llm width
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vlm_jax.compressors.compressor import Visual
from vlm_jax.layers import rows

EPSILON = 1e-8  # of norms, as in torch.nn.functional.cosine_similarity
# Steps in which one less the cosine is compared: where nothing moves it is 0 up to rounding, which
# differs from program to program. The source compares in bfloat16, whose steps near 1 are 1 / 256.
STEPS = 4096


@jax.named_scope("pruning")
def drop(tokens: Float[Array, "B MV D"], count: Int[Array, "B M"], kept: tuple[int, ...]) -> Visual:
    """The tokens that are kept, [B K D], packed in their order, and how many of each frame.

    `kept[n]` is how many are kept of a row with n frames, which are its first ones; K is the last.
    Frames that are missing have a count of 0, all others of V.
    """
    frames = len(kept) - 1
    V = tokens.shape[1] // frames
    x = tokens.astype(jnp.float32)
    size = jnp.maximum(jnp.linalg.norm(x, axis=-1), EPSILON)
    alike = (x[:, V:] * x[:, :-V]).sum(-1) / (size[:, V:] * size[:, :-V])
    first = jnp.full_like(x[:, :V, 0], jnp.inf)
    differs = jnp.concatenate([first, jnp.round(STEPS * (1 - alike))], axis=1)
    there = jnp.repeat(count > 0, V, axis=1)
    order = jnp.argsort(jnp.where(there, -differs, jnp.inf), axis=1, stable=True)
    present = (count > 0).sum(1)[:, None] == jnp.arange(frames + 1)
    wanted = jnp.where(present, np.array(kept), 0).sum(1)
    chosen = jnp.arange(kept[-1]) < wanted[:, None]
    # What a row does not keep goes behind, where no count reaches it.
    last = tokens.shape[1]
    places = jnp.sort(jnp.where(chosen, order[:, : kept[-1]], last), axis=1)
    own = places[:, :, None] // V == jnp.arange(frames)
    return Visual(rows(tokens, jnp.minimum(places, last - 1)), own.sum(1))
