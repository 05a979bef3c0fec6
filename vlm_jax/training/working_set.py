# SPDX-License-Identifier: Apache-2.0
"""Bytes that a training step works in, by formula: beside weights, gradients and optimizer.

A step is a chain of loops: over the encoder's blocks, the LLM's blocks, the chunks of the loss, and
the LLM's blocks backward. What outlives a loop counts once: what `remat` keeps of each block, and
the blocks' weights rounded for the products. Of one turn of each loop the largest counts, where
one loop takes the memory that another has freed. On a TPU the turns of all loops are added: its
compiler gives a step 1.4 to 1.6 times the most that is alive at once (docs/pods.md, "The formula").
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from vlm_jax.compressors.method import Number
from vlm_jax.cost.parameters import block_weights
from vlm_jax.models.llm import SHORTEST
from vlm_jax.models.sizes import VLMSize
from vlm_jax.training import chunked_loss
from vlm_jax.training.recipe import Recipe

FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class WorkingSet:
    """Bytes on one device, by the loop that works in them.

    Attributes:
      saved: what the forward pass leaves for the backward pass. rounded: weights of the LLM's
        blocks, all layers, in the type of the products.
      encoder, forward, loss, backward: one turn of each loop.
      beside: whether the loops have memory of their own.
    """

    saved: Number
    rounded: Number
    encoder: Number
    forward: Number
    loss: Number
    backward: Number
    beside: bool

    @property
    def total(self) -> int:
        loops = (self.encoder, self.forward, self.loss, self.backward)
        return round(self.saved + self.rounded + (sum if self.beside else max)(loops))


def number_size(recipe: Recipe, platform: str) -> int:
    """Bytes of a number of an activation; a CPU computes in float32 whatever is asked for."""
    return FLOAT32 if platform == "cpu" or recipe.model.compute_dtype == "float32" else 2


def of_step(recipe: Recipe, name: str, shards: Mapping[str, int], platform: str) -> WorkingSet:
    """What a step of "align" or "finetune" works in.

    Args:
      shards: devices along each axis of the mesh: data, fsdp, tensor.
      platform: "tpu", "gpu" or "cpu".
    """
    stage, model = recipe.stage(name), recipe.model
    llm, size = model.llm, number_size(recipe, platform)
    parts, fsdp = shards["tensor"], shards["fsdp"]
    rows = math.ceil(stage.batch / stage.accumulate / (shards["data"] * fsdp))
    length, images, places = recipe.row
    frozen = name == "align" or recipe.lora.rank > 0  # the LLM, its table included
    shown = model.compressor.trained_tokens(model.vit.side) if name == "finetune" else ()
    passes = max(len(shown), 1)

    own = _Pass(recipe, platform, size, parts, rows, places)
    # Of an image alone, before the row.
    alone = _Pass(recipe, platform, size, parts, rows * images,
                  round(model.compressor.condensed(model.vit.rows)))  # fmt: skip

    narrow = size < FLOAT32 and not (frozen and recipe.frozen_dtype != "float32")
    rounded = size * llm.depth * block_weights(llm) / (fsdp * parts) if narrow else 0
    # Of the largest matrices one is read while the next is gathered, each as it comes and as a
    # product takes it.
    gathered = size * llm.width * llm.mlp / parts if fsdp > 1 else 0

    vocab = math.ceil(llm.vocab / parts)
    table = size * vocab * llm.width
    whole = FLOAT32 * vocab * llm.width
    chunk = chunked_loss.positions(recipe.loss_chunk, rows=rows, length=length, vocab=vocab)
    if chunk:
        # The table as it is gathered, and once more of what a chunk keeps; scores and their mask.
        loss = 2 * table + (FLOAT32 + 1) * rows * chunk * vocab
        # Its gradient: the sum, a chunk's, and the sum with its rounding until it is scattered.
        loss += 0 if frozen else 3 * whole + table
    else:
        loss = 2.5 * passes * FLOAT32 * rows * length * vocab + (table if fsdp > 1 else 0)
    return WorkingSet(
        # Layers before the LLM read the patches too.
        saved=(passes * llm.depth + model.compressor.prefusion * (1 + model.vit.patches / places))
        * own.kept
        + passes * llm.depth * alone.kept,
        rounded=rounded,
        encoder=encoder(model, rows * images, size),
        forward=max(own.forward, alone.forward) + 4 * gathered,
        loss=loss,
        backward=max(own.backward, alone.backward) + 2 * gathered,
        beside=platform == "tpu",
    )


class _Pass:
    """Bytes of a pass of the LLM over `rows` of `places` tokens on one device.

    Attributes:
      kept: what the forward pass of a block leaves. forward, backward: one turn of each.
    """

    def __init__(
        self, recipe: Recipe, platform: str, size: int, parts: int, rows: int, places: int
    ):
        model, llm = recipe.model, recipe.model.llm
        x = size * rows * places * llm.width
        mlp = size * rows * places * llm.mlp / parts
        wide = FLOAT32 / size * mlp  # gate and up are multiplied in float32
        heads = size * rows * places * llm.head_size / parts
        # Scores exist where the kernel of long rows does not run.
        kernel = platform == "tpu" and model.kernels != "xla" and places >= SHORTEST
        kernel &= not model.compressor.summarizes  # whose mask the kernel does not have
        scores = 0 if kernel else FLOAT32 * rows * places**2 * llm.heads / parts
        self.kept = {
            "full": x,
            # The products' results, with the block's input; down's is the next block's.
            "dots": 2 * x + heads * (llm.heads + 2 * llm.kv_heads) + 2 * mlp,
            "none": 8 * x + 4 * mlp + 3 * scores,
        }[model.remat]
        self.forward = 2 * wide + 2 * x + 2 * scores
        # Three of float32 (gate, up and the gradient of their product) and the same rounded; the
        # rest are queries, keys, values, their turned forms, attention's results, and gradients.
        self.backward = 3 * (wide + mlp) + 17 * x + 2 * scores


def encoder(model: VLMSize, images: int, size: int) -> Number:
    """Bytes of one block of the frozen encoder and of its levels, for the images of a device."""
    vit = model.vit
    patches = images * vit.patches
    scores = FLOAT32 * patches * vit.patches * vit.heads
    levels = FLOAT32 * patches * len(vit.levels) * vit.width
    return 2 * scores + 3 * size * patches * vit.mlp + levels
