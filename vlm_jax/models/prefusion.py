# SPDX-License-Identifier: Apache-2.0
"""LLaVA-Mini's pre-fusion: layers of the LLM's form in which the text reads all patches.

B batch  P patches  V visual tokens  T text tokens  D llm width
"""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from vlm_jax import mesh
from vlm_jax.layers import remat, stack
from vlm_jax.models.attention import mask_of
from vlm_jax.models.cache import positions_of
from vlm_jax.models.llm import Block
from vlm_jax.models.rope import Rope
from vlm_jax.models.sizes import LLMSize


class Prefusion(nnx.Module):
    """Decoder layers over patches, visual tokens and text, in this order (arXiv 2501.03895).

    No final norm. Source: `prefusion_layers` of ictnlp/LLaVA-Mini at 47da1137.
    """

    def __init__(self, size: LLMSize, depth: int, *, rngs: nnx.Rngs, remat_policy: str = "none"):
        self.size, self.depth, self.remat_policy = size, depth, remat_policy
        self.rope = Rope.of(size)
        self.blocks = stack(lambda r: Block(size, rngs=r), depth, rngs)

    def __call__(
        self,
        patches: Float[Array, "B P D"],
        visual: Float[Array, "B V D"],
        text: Float[Array, "B T D"],
        visible: Bool[Array, "B T"],
    ) -> tuple[Float[Array, "B V D"], Float[Array, "B T D"]]:
        """Visual tokens and text behind the layers; text that is not `visible` stays as it was.

        Padding and answers are not visible: nobody reads them. The visual tokens come before the
        text, so they do not depend on it.
        """
        x = jnp.concatenate([patches, visual, text], axis=1)
        images = patches.shape[1] + visual.shape[1]
        batch, length = x.shape[:2]
        place = positions_of(batch, length)
        all_of_image = jnp.broadcast_to(
            jnp.ones((), bool), (batch, images), out_sharding=mesh.spec("batch", "len")
        )
        seen = jnp.concatenate([all_of_image, visible], axis=1)
        turned = jnp.where(seen, jnp.cumsum(seen, axis=1) - 1, 1)
        turns = self.rope.turns(turned, self.size.head_size // 2)
        mask = mask_of(place, None, None) & seen[:, None]

        def step(x, block):
            return block(x, turns, mask)[0], None

        x, _ = lax.scan(remat(self.remat_policy)(step), x, self.blocks)
        fused = jnp.where(visible[..., None], x[:, images:], text)
        return x[:, patches.shape[1] : images], fused
