# SPDX-License-Identifier: Apache-2.0
"""Parameters and FLOPs of a vision language model, from its sizes alone.

2 FLOPs per multiply-add; matrix products and attention only (norms, activations, softmax, pooling
are under 1 % at every published size). Prefill attention is counted as it runs: the full S x S
score matrix under a mask, nothing halved. `roofline.py` turns these counts into bytes and time on a
chip. Formulas, and how they are held to the compiler's count: docs/cost.md.

Here V and Q are visual and text tokens, G generated tokens, P patches, S keys.
"""

import dataclasses
import math
from typing import Any

Number = int | float  # plans may ask for 12.1 visual tokens, and mean lengths are not integers

MQT_QUERIES = 256  # learned queries, a 16 x 16 grid; arXiv 2405.19315 and its code
PRUMERGE_NEIGHBOURS = 32  # tokens merged into each kept one; arXiv 2403.15388 and its code

# Methods whose windows tile the patch grid: V must be a square whose side divides the grid's side.
TILING = ("pool", "quecc", "token_packer", "m3", "downsample")
KINDS = ("none", *TILING, "mqt", "prumerge", "prumerge_plus")


def _read(cls: type, section: Any) -> dict[str, Any]:
    """The fields of `cls` out of a mapping or ConfigDict that holds more; none may be missing."""
    names = [field.name for field in dataclasses.fields(cls)]
    if missing := [name for name in names if name not in section]:
        raise ValueError(f"{cls.__name__} needs {names}; {missing} missing in {sorted(section)}")
    return {name: section[name] for name in names}


@dataclasses.dataclass(frozen=True)
class LLM:
    """Sizes of a Llama- or Qwen-style decoder, field for field those of config.llm."""

    vocab: int
    depth: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    head_size: int
    qkv_bias: bool
    tied_embeddings: bool

    @classmethod
    def of(cls, section: Any) -> "LLM":
        """These sizes out of a configuration section; its other fields are ignored."""
        return cls(**_read(cls, section))


@dataclasses.dataclass(frozen=True)
class ViT:
    """Sizes of a CLIP-style encoder, field for field those of config.vit."""

    image_size: int
    patch_size: int
    depth: int
    width: int
    mlp: int
    heads: int
    levels: tuple[int, ...]

    @classmethod
    def of(cls, section: Any) -> "ViT":
        """These sizes out of a configuration section; its other fields are ignored."""
        return cls(**_read(cls, section))

    @property
    def patches(self) -> int:
        """P, patch tokens of one image."""
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class Compressor:
    """A visual-token compressor, field for field config.compressor; `tokens` is V."""

    kind: str
    tokens: Number
    heads: int
    query: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"compressor kind {self.kind!r} has no cost: choose one of {KINDS}")

    @classmethod
    def of(cls, section: Any) -> "Compressor":
        """These sizes out of a configuration section; its other fields are ignored."""
        return cls(**_read(cls, section))


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


def visual_tokens(compressor: Compressor, vit: ViT) -> Number:
    """V that the LLM reads: every patch without a compressor, else what the compressor makes."""
    return vit.patches if compressor.kind == "none" else compressor.tokens


# --- parameters ---------------------------------------------------------------------------------


def _linear(inputs: Number, outputs: Number) -> Number:
    return inputs * outputs + outputs


def _block_parameters(llm: LLM) -> int:
    """Weights of one decoder block that enter matrix products, without biases and norms."""
    attention = 2 * llm.width * (llm.heads + llm.kv_heads) * llm.head_size
    return attention + 3 * llm.width * llm.mlp


def llm_parameters(llm: LLM) -> int:
    """Parameters of the decoder: embeddings included, a tied head counted once."""
    biases = (llm.heads + 2 * llm.kv_heads) * llm.head_size if llm.qkv_bias else 0
    blocks = llm.depth * (_block_parameters(llm) + biases + 2 * llm.width)
    return blocks + llm.width + llm.vocab * llm.width * (1 if llm.tied_embeddings else 2)


def vit_parameters(vit: ViT) -> int:
    """Parameters of the published tower: all `vit.depth` blocks and the norm after the last."""
    embedding = 3 * vit.patch_size**2 * vit.width + vit.width + (vit.patches + 1) * vit.width
    block = 4 * _linear(vit.width, vit.width) + 4 * vit.width
    block += _linear(vit.width, vit.mlp) + _linear(vit.mlp, vit.width)
    return embedding + 2 * vit.width + vit.depth * block + 2 * vit.width


def compressor_parameters(compressor: Compressor, vit: ViT, llm: LLM) -> int:
    """Parameters of the compressor with its projection into the LLM; non-tiling V is rounded."""
    width, levels = vit.width, len(vit.levels) * vit.width
    projector = _linear(width, llm.width) + _linear(llm.width, llm.width)
    attention = 4 * _linear(width, width)
    norm = 2 * width
    reader = _linear(levels, width) + _linear(width, width) + norm  # keys; the same for values
    match compressor.kind:
        case "quecc":
            taps = round(vit.patches / compressor.tokens)
            query = 2 * _linear(width, width) + norm + width * (taps + 1)
            question = 0 if compressor.query == "none" else _linear(llm.width, width) + norm
            return query + 2 * reader + attention + question + projector
        case "token_packer":
            return width * width + norm + 2 * reader + attention + projector
        case "mqt":
            return 2 * MQT_QUERIES * width + attention + 3 * norm + width * llm.width
        case _:
            return projector


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


def _compressor_terms(compressor: Compressor, vit: ViT, llm: LLM) -> tuple[Number, Number]:
    """Forward FLOPs (of products that read the frozen features first, of all others)."""
    V, P, width = visual_tokens(compressor, vit), vit.patches, vit.width
    square = 2 * width**2  # one token through a width -> width product
    project = 2 * (width * llm.width + llm.width**2)  # one token into the LLM's width
    read = 2 * P * 2 * len(vit.levels) * width**2  # first layer of keys and of values
    write = 2 * P * square  # their second layer
    # Keys and values in, queries in and out, and one query per window.
    attend = 2 * P * square + 2 * V * square + 4 * P * width
    match compressor.kind:
        case "quecc":
            question = 0 if compressor.query == "none" else 2 * llm.width * width
            query = P * square + 2 * P * width
            return read + P * square + question, query + write + attend + V * project
        case "token_packer":
            return read + V * square, write + attend + V * project
        case "mqt":
            keys = P * square + 2 * V * square + 4 * V * P * width + V * 2 * width * llm.width
            return P * square, keys
        case "none" | "m3":
            tokens = P
        case _:
            tokens = V
    merge = 0
    if compressor.kind.startswith("prumerge"):
        merge = 2 * (P + 1) ** 2 * width + 2 * V * P * width + 2 * V * PRUMERGE_NEIGHBOURS * width
    return merge + tokens * 2 * width * llm.width, tokens * 2 * llm.width**2


def compressor_flops(compressor: Compressor, vit: ViT, llm: LLM) -> Number:
    """FLOPs of the compressor for one image as published, projection into the LLM included."""
    return sum(_compressor_terms(compressor, vit, llm))


def _attention(llm: LLM, queries: Number, keys: Number) -> Number:
    """FLOPs of scores and weighted values, all layers."""
    return 4 * queries * keys * llm.heads * llm.head_size * llm.depth


def llm_flops(llm: LLM, tokens: Number, *, cached: Number = 0, logits: Number = 1) -> Number:
    """FLOPs of one pass over `tokens` new tokens that also see `cached` earlier ones.

    `logits` is the number of positions whose next-token scores are computed.
    """
    linear = 2 * tokens * llm.depth * _block_parameters(llm)
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
) -> Flops:
    """FLOPs of answering one question of Q text tokens about one image with G generated tokens.

    Args:
        vit, compressor, llm: the sizes.
        Q: text tokens of the whole prompt.
        G: generated tokens, the closing one included.
        question: tokens that the separate question pass reads (QueCC with query "separate"); Q
            when None. Published QueCC also computes vocabulary scores there, which nothing reads:
            not counted.
        cached_text: keys and values of the text are kept from an earlier request, so prefill
            computes the V visual tokens only, and no question pass runs.
    """
    V = visual_tokens(compressor, vit)
    separate = compressor.kind == "quecc" and compressor.query == "separate" and not cached_text
    asked = (Q if question is None else question) if separate else 0
    new, cached = (V, Q) if cached_text else (Q + V, 0)
    return Flops(
        encoder=encoder_flops(vit, compressor),
        compressor=compressor_flops(compressor, vit, llm),
        question=llm_flops(llm, asked, logits=0),
        prefill=llm_flops(llm, new, cached=cached),
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
        question: tokens of the separate question pass (no gradient goes through it).
        recompute: the backward pass recomputes the LLM's blocks (config.remat "full").
    """
    if stage not in ("align", "finetune"):
        raise ValueError(f"stage {stage!r} is not trained: choose align or finetune")
    linear = 2 * tokens * llm.depth * _block_parameters(llm)
    attention = _attention(llm, tokens, tokens)
    head = 2 * (tokens if logits is None else logits) * llm.vocab * llm.width
    weights = linear + head if stage == "finetune" else 0
    again = linear + attention if recompute else 0
    language = 2 * (linear + head) + 3 * attention + weights + again
    reading, rest = _compressor_terms(compressor, vit, llm)
    encoder = 0 if vit_cached else encoder_flops(vit, compressor)
    return encoder + 2 * reading + 3 * rest + language + llm_flops(llm, question, logits=0)


def tilings(patches: int) -> list[int]:
    """The V whose square windows tile a square grid of `patches`, ascending."""
    side = math.isqrt(patches)
    return [d * d for d in range(1, side + 1) if side % d == 0]
