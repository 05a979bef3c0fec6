# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a vision language model, from its sizes alone.

2 FLOPs per multiply-add; matrix products and attention only (norms, activations, softmax, pooling
are under 1 % at every published size). Prefill attention is counted as the full S x S score matrix,
an upper bound: the program skips keys that a block of 128 queries cannot see. `roofline.py` turns
these counts into bytes and time on a chip. Formulas, and how they are compared with the compiler's
count: docs/cost.md.

Here V and Q are visual and text tokens, G generated tokens, P patches, S keys.
"""

import dataclasses
from functools import partial
from itertools import pairwise

from vlm_jax.compressors.method import FORMS, Method, Number, Products
from vlm_jax.cost.parameters import block_weights

# Callers of this file need the parameters too.
from vlm_jax.cost.parameters import compressor_parameters as compressor_parameters
from vlm_jax.cost.parameters import llm_parameters as llm_parameters
from vlm_jax.cost.parameters import lora_parameters as lora_parameters
from vlm_jax.cost.parameters import vit_parameters as vit_parameters
from vlm_jax.models.pruning import Pruning
from vlm_jax.models.sizes import LLMSize, ViTSize, interface


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one request, by phase."""

    encoder: Number
    compressor: Number
    question: Number
    prefill: Number
    decode: Number

    @property
    def total(self) -> Number:
        """FLOPs of all phases together."""
        return sum(dataclasses.astuple(self))


PHASES = tuple(field.name for field in dataclasses.fields(Flops))


# --- FLOPs of a request ---------------------------------------------------------------------------


def visual_tokens(compressor: Method, vit: ViTSize) -> Number:
    """V that the LLM reads; for an adaptive method the slots, of which it fills what it needs."""
    return compressor.visual_tokens(vit.rows)


def given_tokens(
    compressor: Method, vit: ViTSize, frames: Number, pruning: Pruning | None
) -> Number:
    """Visual tokens of a row that the first layer of the LLM reads, of `frames` images."""
    V = visual_tokens(compressor, vit)
    return frames * V if pruning is None else pruning.given(V, frames)


def encoder_flops(vit: ViTSize, compressor: Method) -> Number:
    """FLOPs of the encoder for one image: patch embedding and the blocks up to the last level.

    A method that shrinks the image (downsample) is encoded from fewer patches; one that reads keys
    or the class token's attention (PruMerge, VisionZip, VisPruner) also needs a block's key
    projection in float32, and its query of the class token.
    """
    patches = compressor.encoded(vit.side)
    tokens = patches + vit.first
    block = 2 * tokens * (4 * vit.width**2 + 2 * vit.width * vit.mlp) + 4 * tokens**2 * vit.width
    flops = 2 * patches * 3 * vit.patch_size**2 * vit.width + max(vit.levels) * block
    if compressor.reads in ("keys", "own_keys", "own_attention"):
        flops += 2 * (tokens + 1) * vit.width**2
    return flops


def compressor_products(
    compressor: Method, vit: ViTSize, llm: LLMSize, *, form: str = "built"
) -> Products:
    """FLOPs of the compressor for one image, projection into the LLM included.

    `form` is one of FORMS. In the form "published" every key and value is projected, M3 pools the
    output of its MLP, MQT computes its attention for every image and PruMerge scores every pair of
    tokens. PruMerge's scores count for the compressor, although the encoder computes them.
    """
    if form not in FORMS:
        raise ValueError(f"form {form!r} of a compressor: choose one of {FORMS}")
    return compressor.products(interface(vit, llm), form)


def compressor_flops(
    compressor: Method, vit: ViTSize, llm: LLMSize, *, batch: Number = 1, form: str = "built"
) -> Number:
    """FLOPs of the compressor for one image of `batch`, projection into the LLM included.

    `form` as in `compressor_products`. An infinite batch leaves out products that no image enters.
    """
    return compressor_products(compressor, vit, llm, form=form).forward(batch)


def _attention(llm: LLMSize, queries: Number, keys: Number) -> Number:
    """FLOPs of scores and weighted values, all layers."""
    return 4 * queries * keys * llm.heads * llm.head_size * llm.depth


def llm_flops(llm: LLMSize, tokens: Number, *, cached: Number = 0, logits: Number = 1) -> Number:
    """FLOPs of one pass over `tokens` new tokens that also see `cached` earlier ones.

    `logits` is the number of positions whose next-token scores are computed.
    """
    linear = 2 * tokens * llm.depth * block_weights(llm)
    head = 2 * logits * llm.vocab * llm.width
    return linear + _attention(llm, tokens, cached + tokens) + head


def prefill_flops(
    llm: LLMSize,
    tokens: Number,
    *,
    visual: Number,
    cached: Number = 0,
    pruning: Pruning | None = None,
) -> Number:
    """FLOPs of the pass over `tokens`, of which `visual` may be left out between layers.

    It gives the scores of one next token, and sees `cached` earlier tokens. What is run to choose
    the visual tokens is counted.
    """
    if pruning is None:
        return llm_flops(llm, tokens, cached=cached)
    runs = pruning.runs(llm.depth, visual)
    total = llm_flops(llm, 0)  # the scores
    for run in runs:
        layers = dataclasses.replace(llm, depth=run.end - run.first)
        left = tokens - visual + run.tokens
        total += llm_flops(layers, left, cached=cached, logits=0)
    for run, after in pairwise(runs):
        if after.tokens < run.tokens:
            length = tokens - visual + run.tokens
            total += pruning.flops(llm, length=length, cached=cached, visual=run.tokens)
    return total


def decode_flops(llm: LLMSize, *, context: Number, G: Number) -> Number:
    """FLOPs of generating G tokens after `context`: G - 1 passes; prefill gives the first token."""
    passes = max(G - 1, 0)
    keys = passes * context + passes * (passes + 1) / 2  # each pass also sees itself
    return passes * llm_flops(llm, 1) + _attention(llm, 1, keys - passes)


def request_flops(
    vit: ViTSize,
    compressor: Method,
    llm: LLMSize,
    *,
    Q: Number,
    G: Number,
    question: Number | None = None,
    cached_text: bool = False,
    frames: Number = 1,
    form: str = "folded",
    pruning: Pruning | None = None,
) -> Flops:
    """FLOPs of answering one question of Q text tokens about one image with G generated tokens.

    Args:
        vit, compressor, llm: the sizes.
        Q: text tokens of the whole prompt.
        G: generated tokens, the closing one included.
        question: tokens that QueCC reads as the question, Q when None. With query "separate" they
            have a pass of their own (published QueCC also computes vocabulary scores there, which
            nothing reads: not counted). With query "prefix" they stand before the image: prefill
            reads them first and the rest in a second pass.
        cached_text: keys and values of the text are kept from an earlier request, so prefill
            computes the V visual tokens only, and no question pass runs.
        frames: of a video. Encoder and compressor run once for each, as does a separate pass over
            the question, and the LLM reads V tokens of each.
        form: of the compressor (see `compressor_products`).
        pruning: of visual tokens between the layers of the LLM.
    Raises:
        ValueError: for a pruning with cached text, whose last token has to be read to choose, and
            with frames, unless it is of clips; for cached text that reads the image first.
    """
    if pruning is not None and (cached_text or (frames != 1 and not pruning.of_clips)):
        raise ValueError(
            f"cached_text={cached_text}, frames={frames}: pruning.kind={pruning.kind!r} chooses "
            "visual tokens of one image by what the prompt attends to: set pruning.kind='none'"
        )
    if cached_text and (compressor.prefusion or compressor.summarizes):
        raise ValueError(
            f"cached_text=True: the text of compressor {compressor.kind!r} has read the image, so "
            "its keys and values are of one image: cached_text=False"
        )
    V = given_tokens(compressor, vit, frames, pruning)
    question_tokens = Q if question is None else question
    separate = compressor.query == "separate" and not cached_text
    prefix = compressor.reads_prefix and not cached_text
    first = question_tokens if prefix else 0
    new, cached = (V, Q) if cached_text else (Q + V - first, first)
    return Flops(
        encoder=frames * encoder_flops(vit, compressor),
        compressor=frames
        * (
            compressor_flops(compressor, vit, llm, form=form)
            + fusion_flops(compressor, vit, llm, Q)
            + condensing_flops(compressor, vit, llm)
        ),
        question=frames * llm_flops(llm, question_tokens if separate else 0, logits=0),
        prefill=llm_flops(llm, first, logits=0)
        + prefill_flops(llm, new, visual=V, cached=cached, pruning=pruning),
        decode=decode_flops(llm, context=Q + cached_tokens(V, compressor, llm, pruning), G=G),
    )


def fusion_flops(compressor: Method, vit: ViTSize, llm: LLMSize, text: Number) -> Number:
    """FLOPs of the layers before the LLM that a compressor has, over the patches of an image, its
    visual tokens and `text` tokens; 0 for one without."""
    if not compressor.prefusion:
        return 0
    tokens = vit.patches + visual_tokens(compressor, vit) + text
    layers = dataclasses.replace(llm, depth=compressor.prefusion)
    return llm_flops(layers, tokens, logits=0)


def condensing_flops(compressor: Method, vit: ViTSize, llm: LLMSize) -> Number:
    """FLOPs of the LLM's pass over an image alone that makes its visual tokens; 0 without one."""
    return llm_flops(llm, compressor.condensed(vit.rows), logits=0)


def cached_tokens(V: Number, compressor: Method, llm: LLMSize, pruning: Pruning | None) -> Number:
    """Visual tokens in the key-value cache, mean over layers; of `V` that the LLM reads."""
    if compressor.summarizes:
        return compressor.tokens
    return V if pruning is None else pruning.cached(llm.depth, V)


def read_tokens(V: Number, llm: LLMSize, pruning: Pruning | None) -> Number:
    """Visual tokens that the LLM's layers read, mean over layers; of `V` in the first."""
    return V if pruning is None else pruning.average(llm.depth, V)


def paper_flops(N: Number, V: Number, *, Q: Number) -> Number:
    """The paper's simple cost 2 N (Q + V), with N in billions of parameters (arXiv 2411.03312)."""
    return 2e9 * N * (Q + V)


# --- FLOPs of a training step ---------------------------------------------------------------------


def train_step_flops(
    vit_cached: bool,
    compressor: Method,
    llm: LLMSize,
    *,
    vit: ViTSize,
    tokens: Number,
    stage: str,
    logits: Number | None = None,
    question: Number = 0,
    recompute: bool = False,
    batch: Number = 1,
    form: str = "built",
    adapters: Number = 0,
    images: int = 1,
) -> Number:
    """FLOPs of one example in one optimizer step, forward and backward.

    The encoder is frozen: it runs forward once, or not at all when its features are cached, and
    products that read its features need no input gradient. "align" trains the compressor: gradients
    pass through the LLM, but its weights get none.

    Args:
        vit_cached: features come from a cache.
        compressor, llm, vit: the sizes.
        tokens: length of the LLM's rows, text and visual tokens and padding together; of a packed
            row too, whose attention runs over the whole row under its mask.
        stage: what is trained.
        logits: positions whose vocabulary scores are computed; all `tokens` when None.
        question: tokens that QueCC reads as the question: those of a separate pass (without
            gradient), or with query "prefix" those of the first part of the rows. Other compressors
            read none.
        recompute: the backward pass recomputes the LLM's blocks (config.remat "full").
        batch: examples of the step, among which shared work is divided.
        form: of the compressor (see `compressor_products`).
        adapters: parameters of LoRA adapters (`lora_parameters`), which finetune trains in place of
            the LLM's weights; 0 without adapters.
        images: the number of images a row holds; each is encoded and compressed, and has a question
            pass. 0: a row of a batch of text alone.
    """
    if stage not in ("align", "finetune"):
        raise ValueError(f"stage {stage!r} is not trained: choose align or finetune")
    separate = compressor.query == "separate"
    first = question if compressor.reads_prefix else 0
    attention = _attention(llm, first, first) + _attention(llm, tokens - first, tokens)
    head = 2 * (tokens if logits is None else logits) * llm.vocab * llm.width
    trained = partial(_trained, llm, stage=stage, recompute=recompute, adapters=adapters)
    language = trained(tokens, attention, head)
    if not images:
        return language
    products = compressor_products(compressor, vit, llm, form=form)
    encoder = 0 if vit_cached else encoder_flops(vit, compressor)
    text = tokens - images * visual_tokens(compressor, vit)
    before = fusion_flops(compressor, vit, llm, text)
    alone = compressor.condensed(vit.rows)
    low = 2 * adapters * (stage == "finetune")
    return language + images * (
        encoder
        + (4 if recompute else 3) * before
        + products.training(batch * images)
        + trained(alone, _attention(llm, alone, alone), 0)
        + llm_flops(llm, question * separate, logits=0)
        + low * question * separate
    )


def _trained(
    llm: LLMSize,
    tokens: Number,
    attention: Number,
    head: Number,
    *,
    stage: str,
    recompute: bool,
    adapters: Number,
) -> Number:
    """FLOPs of a pass of the LLM, forward and backward, whose input gets a gradient."""
    linear = 2 * tokens * llm.depth * block_weights(llm)
    low = 2 * tokens * adapters * (stage == "finetune")
    weights = linear + head if stage == "finetune" and not adapters else low
    linear += low
    again = linear + attention if recompute else 0
    return 2 * (linear + head) + 3 * attention + weights + again
