# SPDX-License-Identifier: Apache-2.0
"""The encoder's second objective: which name what a patch shows has, in one space with the names.

As CLIP (arXiv 2103.00020) the encoder is trained to lie near a text in a common space, at a learned
temperature. Other than there, a text is the sum of its words, and each patch of a picture is
compared with the names of all things of the training split, not of one batch. So the loss is a sum
over patches, the same however a batch is cut over devices and micro-batches; and a patch, not an
image, has a name, because compressors read patches.

B batch  P patches  Z levels x E  C width of the common space  N names  O most words of a name
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from vlm_jax import cpu, mesh
from vlm_jax.layers import Linear, constant, normal, weight
from vlm_jax.models.sizes import VLMSize
from vlm_jax.models.vlm import Batch
from vlm_jax.training.objective import PatchReader, Sums, reader, score

TEMPERATURE = 0.07  # at the start, as CLIP's
COLDEST = 0.01  # and it never becomes lower than this


def vocabulary(names: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The words of all names, sorted."""
    return tuple(sorted({word for words in names for word in words}))


def bags(names: Sequence[Sequence[str]], known: Sequence[str]) -> np.ndarray:
    """The words of each name as numbers in `known`, int32 [N, O].

    A word that is not known, and the end of a shorter name, is len(known), which is in no table.
    """
    number = {word: k for k, word in enumerate(known)}
    most = max((len(words) for words in names), default=0)
    table = np.full((len(names), most), len(known), np.int32)
    for k, words in enumerate(names):
        table[k, : len(words)] = [number.get(word, len(known)) for word in words]
    return table


class NameReader(nnx.Module):
    """An encoder under a classifier of its patches, and beside names in a common space."""

    def __init__(self, patches: PatchReader, words: int, width: int, *, rngs: nnx.Rngs):
        self.patches = patches
        size = patches.vit.size
        self.project = Linear(
            "BPZ,ZC->BPC",
            (len(size.levels) * size.width, width),
            dims=("embed", "none"),
            out=("batch", "len", "none"),
            rngs=rngs,
        )
        self.embedding = weight(rngs, (words, width), ("none", "none"), normal(width**-0.5))
        # A logarithm, as CLIP's.
        self.scale = weight(rngs, (1,), ("none",), constant(-math.log(TEMPERATURE)))

    @property
    def vit(self) -> nnx.Module:
        """The encoder."""
        return self.patches.vit

    def likeness(
        self, levels: Float[Array, "B P Z"], bags: Int[Array, "N O"]
    ) -> Float[Array, "B P N"]:
        """Cosine of each patch and each name, over the temperature; in float32."""
        seen = _unit(self.project(levels))
        # Words that are in no table add nothing.
        named = _unit(self.embedding[...].at[bags].get(mode="fill", fill_value=0).sum(1))
        scale = jnp.exp(jnp.minimum(self.scale[0], -math.log(COLDEST)))
        out = mesh.spec("batch", "len", "none")
        return scale * jnp.einsum("BPC,NC->BPN", seen, named, out_sharding=out)


def _unit(x: Float[Array, "... C"]) -> Float[Array, "... C"]:
    """Vectors of length 1, in float32; 0 stays 0."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)


def name_reader(size: VLMSize, classes: int, words: int, width: int, *, seed: int) -> NameReader:
    """A fresh encoder, the same as that of `patch_reader`, with its two heads, on the current
    mesh."""

    def made() -> NameReader:
        own = nnx.Rngs(params=jax.random.fold_in(jax.random.key(seed), 1))
        return NameReader(reader(size, classes, seed=seed), words, width, rngs=own)

    return jax.jit(made, compiler_options=mesh.known(cpu.RUN_ONCE))()


def patch_class_and_name(bags: np.ndarray, share: float) -> Callable[[NameReader, Batch], Sums]:
    """The objective: `patch_class`, plus `share` times the loss of the names of named patches.

    A batch has `names` [B, P], 0 for a patch without one. Hits are those of the classes.
    """

    def objective(model: NameReader, batch: Batch) -> Sums:
        levels = model.vit(batch["pixels"])
        logits = model.patches.head(levels).astype(jnp.float32)
        shown = score(logits, batch["ids"], batch["loss_mask"])
        near, number = model.likeness(levels, jnp.asarray(bags)), batch["names"]
        named = score(near, number - 1, number > 0)
        return shown._replace(nll=shown.nll + share * named.nll)

    return objective
