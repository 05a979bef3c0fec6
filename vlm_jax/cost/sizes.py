# SPDX-License-Identifier: Apache-2.0
"""The sizes of encoder, compressor and LLM, and the parameters that follow from them.

V is visual tokens, P patches. Formulas, and how they are held to the built models: docs/cost.md.
"""

import dataclasses
import math
from collections.abc import Collection
from typing import Any

Number = int | float  # plans may ask for 12.1 visual tokens, and mean lengths are not integers

MQT_QUERIES = 256  # learned queries, one per patch where those are fewer; arXiv 2405.19315
PRUMERGE_NEIGHBOURS = 32  # tokens merged into each kept one; arXiv 2403.15388 and its code

# Methods whose windows tile the patch grid: V must be a square whose side divides the grid's side.
TILING = ("pool", "quecc", "token_packer", "m3", "downsample")
KINDS = ("none", *TILING, "mqt", "prumerge", "prumerge_plus")
# What QueCC does with the question: nothing, a pass of its own through the LLM, or it stands before
# the image in the prompt, where its keys and values are computed once for both uses.
QUERIES = ("none", "separate", "prefix")
DOWNSAMPLES = ("conv", "pool")  # what makes one of QueCC's queries out of a window


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
    downsample: str = "conv"  # as published; `of` reads the configuration's
    queries: int = 0  # that MQT learns; 0 as published

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kind", self.kind, KINDS),
            ("query", self.query, QUERIES),
            ("downsample", self.downsample, DOWNSAMPLES),
        ):
            if value not in known:
                raise ValueError(f"compressor {name} {value!r} has no cost: choose one of {known}")

    @classmethod
    def of(cls, section: Any) -> "Compressor":
        """These sizes out of a configuration section; its other fields are ignored."""
        return cls(**_read(cls, section))

    @property
    def reads_question(self) -> bool:
        """Whether the question's feature enters the queries."""
        return self.kind == "quecc" and self.query != "none"


def tilings(patches: int) -> list[int]:
    """The V whose square windows tile a square grid of `patches`, ascending."""
    side = math.isqrt(patches)
    return [d * d for d in range(1, side + 1) if side % d == 0]


def visual_tokens(compressor: Compressor, vit: ViT) -> Number:
    """V that the LLM reads: every patch without a compressor, else what the compressor makes.

    PruMerge with tokens=0 lets the image choose: V is then the slots, all of which are computed. An
    outlier lies above the third quartile; PruMerge+ may keep every patch.
    """
    P = vit.patches
    match compressor.kind:
        case "none":
            return P
        case "prumerge" if compressor.tokens == 0:
            return P - 3 * (P - 1) // 4
        case "prumerge_plus" if compressor.tokens == 0:
            return P + 1
    return compressor.tokens


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def block_weights(llm: LLM) -> int:
    """Weights of one decoder block that enter matrix products, without biases and norms."""
    attention = 2 * llm.width * (llm.heads + llm.kv_heads) * llm.head_size
    return attention + 3 * llm.width * llm.mlp


def llm_parameters(llm: LLM) -> int:
    """Parameters of the decoder: embeddings included, a tied head counted once."""
    biases = (llm.heads + 2 * llm.kv_heads) * llm.head_size if llm.qkv_bias else 0
    blocks = llm.depth * (block_weights(llm) + biases + 2 * llm.width)
    return blocks + llm.width + llm.vocab * llm.width * (1 if llm.tied_embeddings else 2)


def lora_parameters(llm: LLM, rank: int, targets: Collection[str] = ()) -> int:
    """Parameters of LoRA adapters of `rank` on these layers of every block, on all where none is
    named; names as in config.lora."""
    heads, kv_heads = llm.heads * llm.head_size, llm.kv_heads * llm.head_size
    sides = {
        "q_proj": llm.width + heads,
        "k_proj": llm.width + kv_heads,
        "v_proj": llm.width + kv_heads,
        "o_proj": heads + llm.width,
        "gate_proj": llm.width + llm.mlp,
        "up_proj": llm.width + llm.mlp,
        "down_proj": llm.mlp + llm.width,
    }
    return llm.depth * rank * sum(sides[name] for name in targets or sides)


def vit_parameters(vit: ViT) -> int:
    """Parameters of the published tower: all `vit.depth` blocks and the norm after the last."""
    embedding = 3 * vit.patch_size**2 * vit.width + vit.width + (vit.patches + 1) * vit.width
    block = 4 * _linear(vit.width, vit.width) + 4 * vit.width
    block += _linear(vit.width, vit.mlp) + _linear(vit.mlp, vit.width)
    return embedding + 2 * vit.width + vit.depth * block + 2 * vit.width


def mqt_queries(compressor: Compressor, vit: ViT) -> int:
    """How many queries MQT learns, whatever V it is run at."""
    return compressor.queries or min(MQT_QUERIES, vit.patches)


def compressor_parameters(compressor: Compressor, vit: ViT, llm: LLM) -> int:
    """Parameters of the compressor with its projection into the LLM; non-tiling V is rounded."""
    width, levels = vit.width, len(vit.levels) * vit.width
    projector = _linear(width, llm.width) + _linear(llm.width, llm.width)
    attention = 4 * _linear(width, width)
    norm = 2 * width
    reader = _linear(levels, width) + _linear(width, width) + norm  # keys; the same for values
    match compressor.kind:
        case "quecc":
            convolved = compressor.downsample == "conv"
            taps = width * (round(vit.patches / compressor.tokens) + 1) if convolved else 0
            query = 2 * _linear(width, width) + norm + taps
            question = _linear(llm.width, width) + norm if compressor.reads_question else 0
            return query + 2 * reader + attention + question + projector
        case "token_packer":
            return width * width + norm + 2 * reader + attention + projector
        case "mqt":
            queries = mqt_queries(compressor, vit)
            return 2 * queries * width + attention + 3 * norm + width * llm.width
        case _:
            return projector
