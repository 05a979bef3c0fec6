# SPDX-License-Identifier: Apache-2.0
"""Descriptions of methods, without JAX: supported V, parameters, FLOPs and published tensors.

V visual tokens (`tokens`)  P patches  E vit width  D llm width
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from vlm_jax.compressors.tensors import LLAVA, Table

Number = int | float  # plans may have 12.1 visual tokens, and mean lengths are not integers

# How a compressor is computed: as in its published code; as built here for training, equal in exact
# arithmetic; and as built for inference, with consecutive linear layers multiplied together and
# parts that no image enters precomputed (only MQT differs).
FORMS = ("published", "built", "folded")

# What an encoder gives beside the outputs of the levels' blocks, in float32 (`ViT.__call__`):
# nothing; keys and the class token's attention of the block behind the last level; the attention
# of the last level's own block; that with its keys and the class token; the image's number; or its
# width and height before it was padded to a square.
READS = ("", "keys", "own_attention", "own_keys", "image_id", "image_size")


@dataclasses.dataclass(frozen=True)
class Interface:
    """What a compressor connects: the patches of an encoder and the width of an LLM.

    Attributes:
        side: patches on each side of the image's grid.
        width: E, channels of one level.
        levels: number of levels that the encoder keeps of each patch.
        llm_width: D.
        kept: rows before the patches: 1 if the encoder keeps its class token.
        heads: of the encoder's attention.
        patch_size: pixels on each side of a patch.
    """

    side: int
    width: int
    levels: int
    llm_width: int
    kept: int = 0
    heads: int = 1
    patch_size: int = 14

    @property
    def head(self) -> int:
        """H, channels of one head of the encoder's attention."""
        return self.width // self.heads

    @property
    def patches(self) -> int:
        """P, the number of patches."""
        return self.side**2

    @property
    def rows(self) -> int:
        """Rows that the encoder gives for an image: the patches and the rows before them."""
        return self.patches + self.kept

    @property
    def up(self) -> int:
        """FLOPs of one token's product into the LLM's width."""
        return 2 * self.width * self.llm_width

    @property
    def down(self) -> int:
        """FLOPs of one token's product inside the LLM's width."""
        return 2 * self.llm_width**2

    @property
    def square(self) -> int:
        """FLOPs of one token's product inside the encoder's width."""
        return 2 * self.width**2


@dataclasses.dataclass(frozen=True)
class Products:
    """Forward FLOPs of a compressor, grouped by the gradients that each product needs."""

    fixed: Number = 0  # frozen features with each other: no gradient
    reading: Number = 0  # weights with frozen features: the gradient of the weight
    other: Number = 0  # the gradients of both operands
    constant: Number = 0  # weights alone, the same for all images of a batch: both, once

    def forward(self, batch: Number) -> Number:
        """FLOPs of the forward pass for one image of `batch`."""
        return self.fixed + self.reading + self.other + self.constant / batch

    def training(self, batch: Number) -> Number:
        """FLOPs of the forward and backward pass for one image of `batch`."""
        return self.fixed + 2 * self.reading + 3 * (self.other + self.constant / batch)


@dataclasses.dataclass(frozen=True)
class Method(ABC):
    """The frozen description of one compressor; a method overrides what differs.

    The fields of a derived class are the fields of config.compressor that the method reads, with
    the same names. Class variables hold for every compressor of the method.
    """

    kind: ClassVar[str]  # its name in config.compressor.kind
    # Layers before the LLM in which the text reads the image; a method with any makes it a field.
    prefusion = 0
    # Where the question's feature comes from: "none", "separate" (a pass of the LLM over the
    # question alone) or "prefix" (the LLM's own pass over the text before the image). "words" and
    # "clip" read its tokens: the LLM's input embeddings of its words, or ids of CLIP's text tower.
    # A method with a choice makes it a field, so it has no annotation here.
    query = "none"
    reads: ClassVar[str] = ""  # what the levels include beside the patches' outputs, one of READS
    any_tokens: ClassVar[bool] = False  # every model of it serves several V, chosen by request
    draws_tokens: ClassVar[bool] = False  # finetune draws V for each micro-batch from `prefixes`
    summarizes: ClassVar[bool] = False  # text reads the last `tokens` of an image's tokens alone
    condenses: ClassVar[bool] = False  # the LLM makes the visual tokens, in a pass before
    compresses: ClassVar[bool] = True  # False: every row of the encoder becomes a token
    selects: ClassVar[bool] = False  # it shows patches of a model that was trained on all of them
    in_place: ClassVar[bool] = True  # token k stands for the same place of every image
    projected: ClassVar[bool] = False  # its only weights are LLaVA-1.5's projector
    clip: ClassVar[bool] = False  # its other weights are those of a CLIP, which are not trained
    # Why a model of it is not trained for the V of config.compressor.elastic.
    inelastic: ClassVar[str] = "is not trained for several V"
    # How a published model is recognized: tensors (beginnings of names after `mm_projector.`) that
    # only this method has, and fields of a config.json with the value that names the method (None:
    # any value).
    marks: ClassVar[tuple[str, ...]] = ()
    named_by: ClassVar[tuple[tuple[str, str | None], ...]] = ()
    # Whether the published code reads mm_projector_type, which then must be LLaVA-1.5's.
    checks_projector_type: ClassVar[bool] = True

    tokens: Number

    @classmethod
    def of(cls, section: Any) -> "Method":
        """The description in a `compressor` section, whose other fields are ignored.

        Raises ValueError if a field without a default is missing.
        """
        return cls(**read(cls, section, f"compressor {cls.kind!r}"))

    @staticmethod
    @abstractmethod
    def module() -> type:
        """The flax module, a `Compressor`; imported on call, because descriptions need no JAX."""

    def build(self, interface: Interface, *, rngs: Any, kernels: str = "auto", **parts: Any) -> Any:
        """The compressor with fresh weights on the current mesh.

        `parts` are those that models make for it: `fusion` if it has `prefusion` layers. Its levels
        have their patches window-major in its `window`. Raises ValueError, with the
        choices, for an unsupported number of tokens and for heads that do not divide the width.
        """
        return self.module()(self, interface, rngs=rngs, kernels=kernels, **parts)

    # --- V ----------------------------------------------------------------------------------------

    @staticmethod
    def supported(side: int) -> list[int]:
        """Supported V on a `side` x `side` patch grid, ascending: the numbers that tile it."""
        return tilings(side)

    @classmethod
    def usual(cls, side: int) -> int | None:
        """V if none is given; None if it has to be given."""
        return None

    @classmethod
    def planned(cls, side: int) -> list[int]:
        """The V that a plan searches by default."""
        return cls.supported(side)

    @classmethod
    def supports(cls, side: int, tokens: Number) -> bool:
        """Whether a plan may choose this number of tokens."""
        return tokens in cls.planned(side)

    @property
    def adaptive(self) -> bool:
        """Whether the number of filled slots depends on the image."""
        return False

    def check(self, interface: Interface) -> None:
        """Raises ValueError, with the supported values, if the method cannot be built here."""
        self.check_rows(interface)
        if self.tokens not in self.supported(interface.side):
            raise self.impossible(interface, f"one of {self.supported(interface.side)}")

    def check_rows(self, interface: Interface) -> None:
        """Raises ValueError if the encoder gives rows that are not patches."""
        if interface.kept:
            raise ValueError(
                f"compressor.kind={self.kind!r} reads patches alone: vit.keep_class=True is for "
                "compressor.kind='none'"
            )

    def impossible(self, interface: Interface, choices: str) -> ValueError:
        """The error for a number of tokens that the method does not support."""
        side = interface.side
        return ValueError(
            f"compressor {self.kind!r} cannot make {self.tokens} visual tokens from a "
            f"{side}x{side} patch grid: choose {choices}"
        )

    def visual_tokens(self, rows: int) -> Number:
        """V, the slots that the LLM reads, if the encoder gives `rows` rows per image."""
        return self.tokens

    def at(self, tokens: Number) -> "Method":
        """The same compressor with another number of tokens."""
        return dataclasses.replace(self, tokens=tokens)

    # For methods that serve any V:

    @property
    def serves_several(self) -> bool:
        """Whether one model of this description serves several V, chosen by request."""
        return self.any_tokens

    def given(self, side: int) -> list[int]:
        """Ascending V that one model of this description serves, if it serves several."""
        return [V for V in self.supported(side) if V <= max(self.buckets(side), default=V)]

    def buckets(self, side: int) -> tuple[int, ...]:
        """Ascending V at which requests run; () if a model has one V."""
        return ()

    def prefixes(self, side: int) -> tuple[int, ...]:
        """V from which finetune draws one for each micro-batch; () if it draws none."""
        return ()

    def fixed(self, tokens: Number) -> "Method":
        """The same compressor of a model that has this V alone, if a model may have one."""
        return self.at(tokens)

    def drawn_tokens(self, side: int) -> tuple[int, ...]:
        """V of which each step of align and finetune runs one; () if a step has the same V."""
        return ()

    def trained_tokens(self, side: int) -> tuple[int, ...]:
        """V that a step of finetune trains all together; () if it trains one."""
        return ()

    # --- What it reads ----------------------------------------------------------------------------

    @property
    def reads_question(self) -> bool:
        """Whether the question's feature is an input."""
        return self.query != "none"

    @property
    def reads_prefix(self) -> bool:
        """Whether that feature comes from the LLM's own pass over the text before the image."""
        return self.query == "prefix"

    def condensed(self, rows: int) -> Number:
        """The tokens of an image that the LLM reads in a pass of its own before the row; 0 if there
        is none."""
        return 0

    def shrink(self, side: int) -> int:
        """How many times smaller on each side the encoder sees the image."""
        return 1

    def encoded(self, side: int) -> Number:
        """The number of patches of a `side` x `side` grid that the encoder processes."""
        return side**2

    @property
    def variant(self) -> str:
        """Its name in results rows in addition to kind and query; "" for the published form."""
        return ""

    # --- What it costs ----------------------------------------------------------------------------

    @abstractmethod
    def parameters(self, interface: Interface) -> int:
        """Parameters, including the projection into the LLM; V that does not tile is rounded."""

    @abstractmethod
    def products(self, interface: Interface, form: str) -> Products:
        """FLOPs for one image, including the projection into the LLM; `form` is one of FORMS."""

    # --- Published tensors ------------------------------------------------------------------------

    @abstractmethod
    def published(self) -> Table:
        """The table of its published tensors, with the parameters of the module that each holds.

        Names are those after `mm_projector.` (for MQT after `query_abstractor.`).
        """

    @classmethod
    def of_published(cls, llava: Any) -> "tuple[Method, tuple[int, ...]]":
        """The compressor inside a published LLaVA, and the blocks of the tower that it reads.

        `llava` is a `weights.methods.Published`. Raises ValueError if config.json and tensors do
        not agree, and for features that the module does not have.
        """
        raise ValueError(f"no published model of {cls.kind} is known")

    @classmethod
    def keeps_projector(cls) -> bool:
        """Whether LLaVA-1.5's trained projector is all that it learns."""
        return cls.projected or cls.clip

    def section(self) -> dict[str, Any]:
        """The fields of a `compressor` section that describe it."""
        return dict(kind=self.kind) | dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Projected(Method):
    """The base of methods whose only weights are LLaVA-1.5's projector."""

    projected: ClassVar[bool] = True

    def parameters(self, interface: Interface) -> int:
        return projector_parameters(interface)

    def products(self, interface: Interface, form: str) -> Products:
        V = self.visual_tokens(interface.rows)
        return Products(reading=V * interface.up, other=V * interface.down)

    def published(self) -> Table:
        return LLAVA


@dataclasses.dataclass(frozen=True)
class UpToPatches(Method):
    """The base of methods that give any V up to the patches; plans search what others give too."""

    @staticmethod
    def supported(side: int) -> list[int]:
        return list(range(1, side**2 + 1))

    @classmethod
    def planned(cls, side: int) -> list[int]:
        return tilings(side)


def read(cls: type, section: Any, name: str) -> dict[str, Any]:
    """The fields of a dataclass from a mapping that may hold more; lists become tuples.

    Raises ValueError if one without a default is missing.
    """
    fields = dataclasses.fields(cls)
    needed = [field.name for field in fields if field.default is dataclasses.MISSING]
    if missing := [field for field in needed if field not in section]:
        raise ValueError(f"{name} needs {needed}; {missing} missing in {sorted(section)}")
    values = {field.name: section[field.name] for field in fields if field.name in section}
    return {key: tuple(x) if isinstance(x, list) else x for key, x in values.items()}


def tilings(side: int) -> list[int]:
    """Ascending numbers of equal square windows that tile a `side` x `side` grid of patches."""
    return [n * n for n in range(1, side + 1) if side % n == 0]


def window_side(tokens: int, side: int) -> int:
    """Side in patches of each of `tokens` windows on a `side` x `side` grid."""
    return side // math.isqrt(tokens)


# The blocks of a 24-block tower that QueCC and TokenPacker read, fixed in their published code.
LEVELS = (12, 16, 22, 23)

# --- Formulas that methods share ------------------------------------------------------------------


def linear(inputs: int, outputs: int) -> int:
    """Parameters of a linear layer with a bias."""
    return inputs * outputs + outputs


def projector_parameters(interface: Interface) -> int:
    """Parameters of LLaVA-1.5's two-layer projector."""
    width = interface.llm_width
    return linear(interface.width, width) + linear(width, width)


def keys_and_values_parameters(interface: Interface) -> int:
    """Parameters of the MLPs of keys and of values over all levels, each with its norm."""
    width = interface.width
    return 2 * (linear(interface.levels * width, width) + linear(width, width) + 2 * width)


def window_attention_flops(tokens: Number, interface: Interface, heads: int, form: str) -> Number:
    """FLOPs of one query per window: its projections, those of keys and values, scores and sums.

    Here keys and values are not projected if absorbing the projection into the query costs less:
    each head then attends to the patches at full width, with its query times the key projection.
    """
    V, P, width = tokens, interface.patches, interface.width
    projected = 4 * P * width**2 + 4 * P * width
    absorbed = 4 * V * width**2 + 4 * P * width * heads
    return 4 * V * width**2 + (projected if form == "published" else min(projected, absorbed))
