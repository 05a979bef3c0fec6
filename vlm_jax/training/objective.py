# SPDX-License-Identifier: Apache-2.0
"""What training minimizes: the next text token of a VLM, and what each patch shows for an encoder.

An objective returns sums, not means, so that accumulated micro-batches equal one large batch.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from vlm_jax import cpu, mesh
from vlm_jax.compressors.compressor import Compressor
from vlm_jax.layers import Linear
from vlm_jax.layers import rows as by_row
from vlm_jax.models.sizes import VLMSize
from vlm_jax.models.vit import ViT
from vlm_jax.models.vlm import VLM, Batch, has_images
from vlm_jax.training import chunked_loss
from vlm_jax.training.chunked_loss import Sums as Sums


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


def next_token(model: VLM, batch: Batch, *, chunk: int = 0) -> Sums:
    """Every supervised text token, given the image and all text before it.

    With `chunk` (config.loss_chunk) the scores [B T W] are never there as a whole: those of so many
    positions of each row are made, summed and, for the gradient, made again.
    """
    target, mask, llm = batch["ids"], batch["loss_mask"], model.llm
    rows, length = target.shape
    chunk = chunked_loss.on_this_mesh(chunk, rows=rows, length=length, vocab=llm.size.vocab)
    if not chunk:
        return score(model.logits(batch), target, mask)
    order = chunked_loss.supervised_first(mask)
    target, mask = by_row(target, order), by_row(mask, order)
    return chunked_loss.score(model.states(batch, order), llm.table, target, mask, chunk)


def every_scale(model: VLM, batch: Batch, *, chunk: int = 0) -> Sums:
    """`next_token` at each of the compressor's `scales`: the mean of their sums, as M3 is trained.

    The encoder, where it runs, and the compressor's layers are passed through once for all of them.
    """
    if not has_images(batch):
        return next_token(model, batch, chunk=chunk)
    seen = model.compressor.every_scale(model.levels(batch))
    sums = [next_token(model, {**batch, "visual": tokens}, chunk=chunk) for tokens in seen]
    return jax.tree.map(lambda *parts: sum(parts) / len(parts), *sums)


def drawn_model(model: VLM, batch: Batch) -> VLM:
    """The model at the V for which a batch was drawn, the length of its `slots`; as it is for a
    batch without (text alone). Each V is a program of its own."""
    return model.at(batch["slots"].shape[1]) if "slots" in batch else model


def at_drawn(objective: Callable[[VLM, Batch], Sums], model: VLM, batch: Batch) -> Sums:
    """`objective` of `drawn_model`."""
    return objective(drawn_model(model, batch), batch)


def of_stage(name: str, compressor: Compressor, *, chunk: int) -> Callable[[VLM, Batch], Sums]:
    """What stage `name` minimises for a model with this compressor; `chunk` is
    config.loss_chunk."""
    each_scale = name == "finetune" and compressor.scales
    objective = functools.partial(every_scale if each_scale else next_token, chunk=chunk)
    return functools.partial(at_drawn, objective) if compressor.drawn else objective


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
        lambda: reader(size, classes, seed=seed), compiler_options=mesh.known(cpu.DRAW_ONCE)
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
