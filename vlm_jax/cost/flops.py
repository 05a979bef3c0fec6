# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a vision language model, from its sizes alone.

2 FLOPs per multiply-add; matrix products and attention only (norms, activations, softmax, pooling
are under 1 % at every published size). Prefill attention is counted as the full S x S score matrix
under a mask, the most that runs: behind every 128 queries the program leaves the hidden keys out.
`roofline.py` turns these counts into bytes and time on a chip. Formulas, and how they are held to
the compiler's count: docs/cost.md.

Here V and Q are visual and text tokens, G generated tokens, P patches, S keys.
"""

import dataclasses
import math

from vlm_jax.cost.sizes import (
    LLM,
    PRUMERGE_NEIGHBOURS,
    Compressor,
    Number,
    ViT,
    block_weights,
    mqt_queries,
    visual_tokens,
)

# Sizes and parameters are part of what a caller of this file asks for.
from vlm_jax.cost.sizes import compressor_parameters as compressor_parameters
from vlm_jax.cost.sizes import llm_parameters as llm_parameters
from vlm_jax.cost.sizes import lora_parameters as lora_parameters
from vlm_jax.cost.sizes import tilings as tilings
from vlm_jax.cost.sizes import vit_parameters as vit_parameters

# How a compressor is computed: as its published code does; as it is built here, trained, and equal
# in exact arithmetic; and as it is built for inference, layers without anything between multiplied
# together and what no image enters computed beforehand (only MQT differs).
FORMS = ("published", "built", "folded")


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
        return sum(dataclasses.astuple(self))


# --- FLOPs of a request ---------------------------------------------------------------------------


def encoder_flops(vit: ViT, compressor: Compressor) -> Number:
    """FLOPs of the encoder for one image: patch embedding and the blocks up to the last level.

    PruMerge also needs the next block's key projection, and its query of the class token;
    "downsample" shrinks the image itself to V patches.
    """
    patches = compressor.tokens if compressor.kind == "downsample" else vit.patches
    tokens = patches + 1
    block = 2 * tokens * (4 * vit.width**2 + 2 * vit.width * vit.mlp) + 4 * tokens**2 * vit.width
    flops = 2 * patches * 3 * vit.patch_size**2 * vit.width + max(vit.levels) * block
    if compressor.kind.startswith("prumerge"):
        flops += 2 * (tokens + 1) * vit.width**2
    return flops


@dataclasses.dataclass(frozen=True)
class Products:
    """Forward FLOPs of a compressor, by what each product has in its backward pass."""

    fixed: Number = 0  # of frozen features with each other: none
    reading: Number = 0  # of weights with frozen features: the weight's gradient
    other: Number = 0  # the gradients of both operands
    constant: Number = 0  # of weights alone, the same for all images of a batch: both, once

    def forward(self, batch: Number) -> Number:
        """For one image of `batch`."""
        return self.fixed + self.reading + self.other + self.constant / batch

    def training(self, batch: Number) -> Number:
        """Forward and backward, for one image of `batch`."""
        return self.fixed + 2 * self.reading + 3 * (self.other + self.constant / batch)


def _window_attention(compressor: Compressor, vit: ViT, form: str) -> Number:
    """FLOPs of one query per window: its projections, those of keys and values, scores and sums.

    Here keys and values are not projected where the query can absorb it for less: each head then
    asks the patches at full width, with its query times the key projection.
    """
    V, P, width = compressor.tokens, vit.patches, vit.width
    projected = 4 * P * width**2 + 4 * P * width
    absorbed = 4 * V * width**2 + 4 * P * width * compressor.heads
    return 4 * V * width**2 + (projected if form == "published" else min(projected, absorbed))


def _mqt(compressor: Compressor, vit: ViT, llm: LLM, form: str) -> Products:
    """MQT's keys hold no image: the weights of its attention are the same for every image.

    Here they are computed once for a batch, and for few queries the patches are averaged before the
    value projection and not after it.
    """
    V, P, width = compressor.tokens, vit.patches, vit.width
    side, grid = math.isqrt(P), math.isqrt(mqt_queries(compressor, vit))
    keys = 2 * P * width**2 + 2 * V * width**2 + 2 * V * P * width
    values = 2 * P * width**2 + 2 * V * P * width
    out, last = 2 * V * width**2, 2 * V * width * llm.width
    if form == "published":
        return Products(other=keys + values + out + last)
    averaged = 2 * compressor.heads * V * P * width + 2 * V * width**2
    of_image = min(values, averaged) + last
    if form == "folded":
        return Products(other=of_image)
    resampled = 2 * width * side * grid * (grid + side)  # the position table, as dense products
    return Products(other=of_image + out, constant=keys + resampled)


def compressor_products(
    compressor: Compressor, vit: ViT, llm: LLM, *, form: str = "built"
) -> Products:
    """FLOPs of the compressor for one image, projection into the LLM included.

    `form` is one of FORMS. As published, every key and value is projected, M3 pools what its whole
    MLP made, MQT attends anew for every image and PruMerge scores every pair of tokens. PruMerge's
    scores belong to the compressor here, though the encoder computes them.
    """
    if form not in FORMS:
        raise ValueError(f"form {form!r} of a compressor: choose one of {FORMS}")
    published = form == "published"
    V, P, width = visual_tokens(compressor, vit), vit.patches, vit.width
    square = 2 * width**2  # one token through a width -> width product
    up, down = 2 * width * llm.width, 2 * llm.width**2  # one token into the LLM's width
    read = 2 * P * len(vit.levels) * square  # first layer of keys and of values
    write = 2 * P * square  # their second layer
    match compressor.kind:
        case "quecc":
            first = P * square  # of the query
            other = write + P * square + V * (up + down) + _window_attention(compressor, vit, form)
            if compressor.downsample == "conv":
                other += 2 * P * width
            if not compressor.reads_question:
                return Products(reading=read + first, other=other)
            read += 2 * llm.width * width
            # Published, the question is added to every patch before the query's first layer; here
            # it goes through that layer by itself.
            if published:
                return Products(reading=read, other=other + first)
            return Products(reading=read + first, other=other + square)
        case "token_packer":
            attend = _window_attention(compressor, vit, form)
            return Products(reading=read + V * square, other=write + attend + V * (up + down))
        case "mqt":
            return _mqt(compressor, vit, llm, form)
        case "m3":
            return Products(reading=P * up, other=(P if published else V) * down)
        case "prumerge" | "prumerge_plus":
            # Each kept token finds its likes among all and adds them; the last one adds the rest.
            # Adding is a product with a matrix that is zero for all others.
            scores = 2 * (P + 1) * (P + 1 if published else 1) * width
            alike = 2 * (V - 1) * P * width
            added = 2 * (V - 1) * (PRUMERGE_NEIGHBOURS if published else P) * width
            fixed = scores + alike + added + 2 * P * width
            return Products(fixed=fixed, reading=V * up, other=V * down)
        case _:
            return Products(reading=V * up, other=V * down)


def compressor_flops(
    compressor: Compressor, vit: ViT, llm: LLM, *, batch: Number = 1, form: str = "built"
) -> Number:
    """FLOPs of the compressor for one image of `batch`, projection into the LLM included.

    `form` as in `compressor_products`. An infinite batch leaves out what no image enters.
    """
    return compressor_products(compressor, vit, llm, form=form).forward(batch)


def _attention(llm: LLM, queries: Number, keys: Number) -> Number:
    """FLOPs of scores and weighted values, all layers."""
    return 4 * queries * keys * llm.heads * llm.head_size * llm.depth


def llm_flops(llm: LLM, tokens: Number, *, cached: Number = 0, logits: Number = 1) -> Number:
    """FLOPs of one pass over `tokens` new tokens that also see `cached` earlier ones.

    `logits` is the number of positions whose next-token scores are computed.
    """
    linear = 2 * tokens * llm.depth * block_weights(llm)
    head = 2 * logits * llm.vocab * llm.width
    return linear + _attention(llm, tokens, cached + tokens) + head


def decode_flops(llm: LLM, *, context: Number, G: Number) -> Number:
    """FLOPs of generating G tokens after `context`: G - 1 passes, since prefill gives the first."""
    passes = max(G - 1, 0)
    seen = passes * context + passes * (passes + 1) / 2  # each pass also sees itself
    return passes * llm_flops(llm, 1) + _attention(llm, 1, seen - passes)


def request_flops(
    vit: ViT,
    compressor: Compressor,
    llm: LLM,
    *,
    Q: Number,
    G: Number,
    question: Number | None = None,
    cached_text: bool = False,
    form: str = "folded",
) -> Flops:
    """FLOPs of answering one question of Q text tokens about one image with G generated tokens.

    Args:
        vit, compressor, llm: the sizes.
        Q: text tokens of the whole prompt.
        G: generated tokens, the closing one included.
        question: tokens that QueCC reads as the question, Q when None: those of its separate pass
            (published QueCC also computes vocabulary scores there, which nothing reads: not
            counted), or with query "prefix" those before the image, which prefill reads in a pass
            of their own that the rest goes on from.
        cached_text: keys and values of the text are kept from an earlier request, so prefill
            computes the V visual tokens only, and no question pass runs.
        form: of the compressor (see `compressor_products`).
    """
    V = visual_tokens(compressor, vit)
    asked = Q if question is None else question
    separate = compressor.reads_question and compressor.query == "separate" and not cached_text
    prefix = compressor.reads_question and compressor.query == "prefix" and not cached_text
    first = asked if prefix else 0
    new, cached = (V, Q) if cached_text else (Q + V - first, first)
    return Flops(
        encoder=encoder_flops(vit, compressor),
        compressor=compressor_flops(compressor, vit, llm, form=form),
        question=llm_flops(llm, asked if separate else 0, logits=0),
        prefill=llm_flops(llm, first, logits=0) + llm_flops(llm, new, cached=cached),
        decode=decode_flops(llm, context=Q + V, G=G),
    )


def paper_flops(N: Number, V: Number, *, Q: Number) -> Number:
    """The paper's simple cost 2 N (Q + V), with N in billions of parameters (arXiv 2411.03312)."""
    return 2e9 * N * (Q + V)


# --- FLOPs of a training step ---------------------------------------------------------------------


def train_step_flops(
    vit_cached: bool,
    compressor: Compressor,
    llm: LLM,
    *,
    vit: ViT,
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

    The encoder is frozen: it runs forward once, or never when its features are cached, and products
    that read its features need no input gradient. "align" trains the compressor: gradients pass
    through the LLM, none of its weights gets one.

    Args:
        vit_cached: features come from a cache.
        compressor, llm, vit: the sizes.
        tokens: length of the LLM's rows, text and visual tokens and padding together.
        stage: what is trained.
        logits: positions whose vocabulary scores are computed; all `tokens` when None.
        question: tokens that QueCC reads as the question: of a separate pass (no gradient goes
            through it), or of the first part of the rows with query "prefix". Other compressors
            read none.
        recompute: the backward pass recomputes the LLM's blocks (config.remat "full").
        batch: examples of the step; one's share of what all of them share.
        form: of the compressor (see `compressor_products`).
        adapters: parameters of LoRA adapters, which finetune trains in place of the LLM's weights
            (`lora_parameters`); 0 where there are none.
        images: for which a row has room; each is encoded and compressed, and has a question pass.
    """
    if stage not in ("align", "finetune"):
        raise ValueError(f"stage {stage!r} is not trained: choose align or finetune")
    linear = 2 * tokens * llm.depth * block_weights(llm)
    separate = compressor.reads_question and compressor.query == "separate"
    prefix = compressor.reads_question and compressor.query == "prefix"
    first = question if prefix else 0
    attention = _attention(llm, first, first) + _attention(llm, tokens - first, tokens)
    head = 2 * (tokens if logits is None else logits) * llm.vocab * llm.width
    low = 2 * tokens * adapters * (stage == "finetune")
    weights = linear + head if stage == "finetune" and not adapters else low
    linear += low
    again = linear + attention if recompute else 0
    language = 2 * (linear + head) + 3 * attention + weights + again
    products = compressor_products(compressor, vit, llm, form=form)
    encoder = 0 if vit_cached else encoder_flops(vit, compressor)
    return language + images * (
        encoder
        + products.training(batch * images)
        + llm_flops(llm, question * separate, logits=0)
        + low / tokens * question * separate
    )
