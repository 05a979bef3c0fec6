# SPDX-License-Identifier: Apache-2.0
"""What training minimizes: the next text token of a VLM, and what each patch shows for an encoder.

An objective returns sums, not means, so that accumulated micro-batches equal one large batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from vlm_jax import cpu, mesh
from vlm_jax.layers import Linear
from vlm_jax.models.sizes import VLMSize
from vlm_jax.models.vit import ViT
from vlm_jax.models.vlm import VLM, Batch


class Sums(NamedTuple):
    """Totals over the supervised positions of a batch."""

    nll: Float[Array, ""]  # nats
    log_z_squared: Float[Array, ""]
    correct: Float[Array, ""]  # positions whose best guess is right


@jax.named_scope("loss")
def score(
    logits: Float[Array, "B T W"], target: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> Sums:
    """Cross-entropy, squared log-partition and hits, summed over the positions in `mask`."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A comparison instead of a gather: the vocabulary may be sharded.
    at_target = jnp.arange(logits.shape[-1]) == target[..., None]
    chosen = jnp.where(at_target, logits, 0).sum(-1)
    return Sums(
        jnp.where(mask, log_z - chosen, 0).sum(),
        jnp.where(mask, jnp.square(log_z), 0).sum(),
        (mask & (chosen >= logits.max(-1))).sum().astype(jnp.float32),
    )


def next_token(model: VLM, batch: Batch) -> Sums:
    """Every supervised text token, given the image and all text before it."""
    return score(model.logits(batch), batch["ids"], batch["loss_mask"])


def every_scale(model: VLM, batch: Batch) -> Sums:
    """`next_token` at each of the compressor's `scales`: the mean of their sums, as M3 is trained.

    The encoder, where it runs, and the compressor's layers are passed through once for all of them.
    """
    seen = model.compressor.every_scale(model.levels(batch))
    sums = [next_token(model, {**batch, "visual": tokens}) for tokens in seen]
    return jax.tree.map(lambda *parts: sum(parts) / len(parts), *sums)


class PatchReader(nnx.Module):
    """An encoder under a linear classifier of what each patch shows."""

    def __init__(self, vit: ViT, classes: int, *, rngs: nnx.Rngs):
        self.vit = vit
        self.head = Linear(
            "BPZ,ZW->BPW",
            (len(vit.size.levels) * vit.size.width, classes),
            dims=("embed", "none"),
            out=("batch", "len", "none"),
            rngs=rngs,
        )


def patch_reader(size: VLMSize, classes: int, *, seed: int) -> PatchReader:
    """A fresh encoder of a model under its classifier, on the current mesh."""
    make = jax.jit(
        lambda: reader(size, classes, seed=seed), compiler_options=mesh.known(cpu.RUN_ONCE)
    )
    return make()


def reader(size: VLMSize, classes: int, *, seed: int) -> PatchReader:
    """`patch_reader` as it is traced."""
    rngs = nnx.Rngs(seed)
    vit = ViT(size.vit, rngs=rngs, remat_policy=size.remat, dtype=size.compute_dtype)
    return PatchReader(vit, classes, rngs=rngs)


def patch_class(model: PatchReader, batch: Batch) -> Sums:
    """Every patch of every image, by what the generator put there."""
    logits = model.head(model.vit(batch["pixels"])).astype(jnp.float32)
    return score(logits, batch["ids"], batch["loss_mask"])
