# SPDX-License-Identifier: Apache-2.0
"""The one frozen description of each part of a model: what is built, counted, stored and planned.

Made from the sections of a configuration or of a model folder; needs no JAX.
"""

import dataclasses
from typing import Any, TypeVar

from vlm_jax import compressors
from vlm_jax.compressors.method import Interface, Method, read
from vlm_jax.models import pruning as prunings
from vlm_jax.models.pruning import Pruning

S = TypeVar("S", bound="VLMSize")


@dataclasses.dataclass(frozen=True)
class ViTSize:
    """A CLIP- or SigLIP-style encoder, field for field config.vit, which explains them.

    ValueError where the fields do not describe an encoder.
    """

    image_size: int
    patch_size: int
    depth: int
    width: int
    mlp: int
    heads: int
    norm_eps: float
    levels: tuple[int, ...]
    # What came later has the value with which nothing changes.
    activation: str = "quick_gelu"
    class_token: bool = True
    keep_class: bool = False
    patch_bias: bool = False
    pre_norm: bool = True
    final_norm: bool = False
    cut_border: bool = False

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size and not self.cut_border:
            raise ValueError(
                f"patches of {self.patch_size} pixels do not tile an image of {self.image_size}: "
                "choose others, or vit.cut_border=True to leave pixels at the right and bottom out"
            )
        if self.keep_class and not self.class_token:
            raise ValueError(
                "vit.keep_class=True, but vit.class_token=False: there is none to keep"
            )
        if self.width % self.heads:
            raise ValueError(
                f"vit.heads={self.heads} does not divide vit.width={self.width}: "
                f"choose one of {[n for n in range(1, 65) if self.width % n == 0]}"
            )
        levels, depth = self.levels, self.depth
        if sorted(set(levels)) != list(levels) or not levels or levels[0] < 1 or levels[-1] > depth:
            raise ValueError(f"vit.levels={levels}: ascending block numbers from 1 to {depth}")
        if self.final_norm and levels[-1] != depth:
            raise ValueError(
                f"vit.final_norm=True is for the output of the last block, and vit.levels={levels} "
                f"ends before block {depth}: set one or the other"
            )

    @classmethod
    def of(cls, section: Any) -> "ViTSize":
        """The description in a `vit` section; ValueError for a field that is missing."""
        return cls(**read(cls, section, "vit"))

    @property
    def side(self) -> int:
        """Patches on each side of an image."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """P, patch tokens of one image."""
        return self.side**2

    @property
    def rows(self) -> int:
        """What the levels keep of one image."""
        return self.patches + self.kept

    @property
    def first(self) -> int:
        """Rows that stand before those of the patches."""
        return int(self.class_token)

    @property
    def kept(self) -> int:
        """Of them, those that the levels keep."""
        return int(self.keep_class)

    def rows_before(self, reads: str) -> int:
        """Rows before those of the patches, if a method reads this beside the levels."""
        return int(reads == "own_keys") or self.kept

    def check_reads(self, reads: str) -> None:
        """Raises ValueError unless the encoder has what a method reads beside the levels."""
        if reads in ("", "image_id", "image_size"):
            return
        if self.kept or not self.first:
            raise ValueError(
                "the compressor asks the class token which patches matter: it needs an encoder "
                "with vit.class_token=True and vit.keep_class=False, such as CLIP"
            )
        if reads == "keys" and self.levels[-1] == self.depth:
            raise ValueError(
                f"PruMerge reads the keys of the block behind the last level, and "
                f"vit.levels={self.levels} ends with the last of vit.depth={self.depth} blocks: "
                f"raise vit.depth to {self.depth + 1}, or let vit.levels end at {self.depth - 1}"
            )


@dataclasses.dataclass(frozen=True)
class LLMSize:
    """A Llama- or Qwen-style decoder, field for field config.llm, which explains them.

    ValueError where the fields do not describe a decoder.
    """

    vocab: int
    depth: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    head_size: int
    rope_theta: float
    norm_eps: float
    qkv_bias: bool
    tied_embeddings: bool
    # What came later has the value with which nothing changes.
    qk_norm: bool = False
    rope_kind: str = "default"
    rope_factor: float = 1.0
    rope_low_frequency: float = 1.0
    rope_high_frequency: float = 4.0
    rope_original_length: int = 8192

    def __post_init__(self) -> None:
        heads = self.heads
        if heads % self.kv_heads:
            raise ValueError(
                f"llm.kv_heads={self.kv_heads} does not divide llm.heads={heads}: "
                f"choose one of {[n for n in range(1, heads + 1) if heads % n == 0]}"
            )
        if self.head_size % 2:
            raise ValueError(f"llm.head_size={self.head_size} is odd: rotary positions need pairs")

    @classmethod
    def of(cls, section: Any) -> "LLMSize":
        """The description in an `llm` section; ValueError for a field that is missing."""
        return cls(**read(cls, section, "llm"))


@dataclasses.dataclass(frozen=True)
class LoRASize:
    """Adapters beside an LLM's linear layers, field for field config.lora; of rank 0, none."""

    rank: int
    alpha: float = 16.0
    targets: tuple[str, ...] = ()

    @classmethod
    def of(cls, section: Any) -> "LoRASize":
        """The description in a `lora` section."""
        return cls(**read(cls, section, "lora"))


def interface(vit: ViTSize, llm: LLMSize) -> Interface:
    """What a compressor between the two stands between."""
    return Interface(
        vit.side, vit.width, len(vit.levels), llm.width, vit.kept, vit.heads, vit.patch_size
    )


@dataclasses.dataclass(frozen=True)
class VLMSize:
    """A whole model: its three parts, and how it is computed.

    ValueError where the parts do not go together.
    """

    vit: ViTSize
    compressor: Method
    llm: LLMSize
    remat: str = "none"  # what the backward pass recomputes
    compute_dtype: str = "float32"  # of activations and matrix products
    kernels: str = "auto"  # of windowed attention
    pruning: Pruning | None = None  # of visual tokens between the LLM's layers

    def __post_init__(self) -> None:
        self.compressor.check(self.interface)
        self.vit.check_reads(self.compressor.reads)
        if self.pruning is not None:
            self.pruning.check(self.read)
            if self.compressor.summarizes:
                raise ValueError(
                    f"pruning.kind={self.pruning.kind!r}: no text reads the patches of "
                    f"compressor.kind={self.compressor.kind!r}; set pruning.kind='none'"
                )

    @classmethod
    def of(cls, config: Any) -> "VLMSize":
        """The model that a configuration describes: its sections and three of its fields."""
        size = cls(
            ViTSize.of(config.vit),
            compressors.describe(config.compressor),
            LLMSize.of(config.llm),
            config.remat,
            config.compute_dtype,
            config.kernels,
        )
        return size.pruned(config.pruning)

    def pruned(self: S, section: Any) -> S:
        """The same model with what a `pruning` section describes; ValueError as `check` raises."""
        return dataclasses.replace(self, pruning=prunings.describe(section, self.read))

    @property
    def read(self) -> prunings.Read:
        """What a pruning depends on."""
        buckets = self.compressor.buckets(self.vit.side)
        most = buckets[-1] if buckets else self.visual_tokens
        return prunings.Read(self.llm.depth, most, self.compressor)

    @property
    def interface(self) -> Interface:
        """What the compressor stands between."""
        return interface(self.vit, self.llm)

    @property
    def visual_tokens(self) -> int:
        """V: the slots of an image in the LLM's rows."""
        return self.compressor.visual_tokens(self.vit.rows)
