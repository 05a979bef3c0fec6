# SPDX-License-Identifier: Apache-2.0
"""What a method says of itself, without JAX: the V it can give, its parameters, FLOPs and tensors.

V visual tokens (`tokens`)  P patches  E vit width  D llm width
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from vlm_jax.compressors.tensors import LLAVA, Table

Number = int | float  # plans may ask for 12.1 visual tokens, and mean lengths are not integers

# How a compressor is computed: as its published code does; as it is built here, trained, and equal
# in exact arithmetic; and as it is built for inference, layers without anything between multiplied
# together and what no image enters computed beforehand (only MQT differs).
FORMS = ("published", "built", "folded")


@dataclasses.dataclass(frozen=True)
class Interface:
    """What a compressor stands between: the patches of an encoder and the width of an LLM.

    Attributes:
        side: patches on each side of the image's grid.
        width: E, channels of one level.
        levels: how many levels the encoder keeps of each patch.
        llm_width: D.
        kept: rows that stand before the patches, 1 for an encoder that keeps its class token.
    """

    side: int
    width: int
    levels: int
    llm_width: int
    kept: int = 0

    @property
    def patches(self) -> int:
        """P."""
        return self.side**2

    @property
    def rows(self) -> int:
        """What the encoder keeps of an image, patches and all."""
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


@dataclasses.dataclass(frozen=True)
class Method(ABC):
    """The frozen description of one compressor; a method overrides what differs.

    The fields of a derived class are the fields of config.compressor that the method reads, under
    their names there. Class variables say what holds for every compressor of the method.
    """

    kind: ClassVar[str]  # under which name config.compressor.kind asks for it
    # Who reads the question for it: "none", "separate" (a pass of the LLM over it alone) or
    # "prefix" (the LLM's own pass over the text before the image). A method with a choice makes it
    # a field, which is why it is not annotated here.
    query = "none"
    reads_keys: ClassVar[bool] = False  # the levels come with what ViT's `keys=True` adds, float32
    any_tokens: ClassVar[bool] = False  # one model serves several V: `tokens` is of requests
    draws_tokens: ClassVar[bool] = False  # finetune draws V for each micro-batch: `prefixes`
    compresses: ClassVar[bool] = True  # False: every row that the encoder keeps becomes a token
    projected: ClassVar[bool] = False  # its only weights are LLaVA-1.5's projector
    # How a published model is known to have it: tensors (beginnings of names behind
    # `mm_projector.`) that this method alone has, and fields of a config.json with the value that
    # names it (None: whatever it is).
    marks: ClassVar[tuple[str, ...]] = ()
    named_by: ClassVar[tuple[tuple[str, str | None], ...]] = ()
    # Whether the published code looks at mm_projector_type, which then must be LLaVA-1.5's.
    heeds_projector_type: ClassVar[bool] = True

    tokens: Number

    @classmethod
    def of(cls, section: Any) -> "Method":
        """The description in a `compressor` section, whose other fields are ignored.

        ValueError for a field without a default that is not there.
        """
        return cls(**read(cls, section, f"compressor {cls.kind!r}"))

    @staticmethod
    @abstractmethod
    def module() -> type:
        """The flax module, a `Compressor`; imported when asked for: a description needs no JAX."""

    def build(self, interface: Interface, *, rngs: Any, kernels: str = "auto") -> Any:
        """The compressor with fresh weights on the current mesh.

        Its levels have their patches window-major in its `window`. ValueError with the choices for
        a number of tokens that the method cannot give, and for heads that do not divide.
        """
        return self.module()(self, interface, rngs=rngs, kernels=kernels)

    # --- V ----------------------------------------------------------------------------------------

    @staticmethod
    def supported(side: int) -> list[int]:
        """Ascending numbers of visual tokens on a `side` x `side` patch grid: what tiles it."""
        return tilings(side)

    @classmethod
    def usual(cls, side: int) -> int | None:
        """V where nobody says how many; None where somebody has to."""
        return None

    @classmethod
    def planned(cls, side: int) -> list[int]:
        """The V that a plan looks through unless it is told others."""
        return cls.supported(side)

    @classmethod
    def supports(cls, side: int, tokens: Number) -> bool:
        """Whether a plan may ask for so many tokens."""
        return tokens in cls.planned(side)

    @property
    def adaptive(self) -> bool:
        """Whether the image decides how many of its slots it fills."""
        return False

    def check(self, interface: Interface) -> None:
        """Raises ValueError, with what would do, where there is no such compressor there."""
        self.check_rows(interface)
        if self.tokens not in self.supported(interface.side):
            raise self.impossible(interface, f"one of {self.supported(interface.side)}")

    def check_rows(self, interface: Interface) -> None:
        """Raises ValueError where rows that are no patches come with the patches."""
        if interface.kept:
            raise ValueError(
                f"compressor.kind={self.kind!r} reads patches alone: vit.keep_class=True is for "
                "compressor.kind='none'"
            )

    def impossible(self, interface: Interface, choices: str) -> ValueError:
        """The error for a number of tokens that the method cannot give."""
        side = interface.side
        return ValueError(
            f"compressor {self.kind!r} cannot make {self.tokens} visual tokens from a {side}x{side}"
            f" patch grid: choose {choices}"
        )

    def visual_tokens(self, rows: int) -> Number:
        """V, the slots that the LLM reads, where the encoder keeps `rows` of an image."""
        return self.tokens

    def at(self, tokens: Number) -> "Method":
        """The same compressor giving another number of tokens."""
        return dataclasses.replace(self, tokens=tokens)

    # Of a method that serves any V:

    def buckets(self, side: int) -> tuple[int, ...]:
        """Ascending V to run requests at, the largest last; () where a model has one V."""
        return ()

    def prefixes(self, side: int) -> tuple[int, ...]:
        """V of which a step of finetune draws one for each micro-batch; () where it draws none."""
        return ()

    def trained_tokens(self, side: int) -> tuple[int, ...]:
        """V that a step of finetune shows all together; () where it shows one."""
        return ()

    # --- What it reads ----------------------------------------------------------------------------

    @property
    def reads_question(self) -> bool:
        """Whether the question's feature is an input."""
        return self.query != "none"

    @property
    def reads_prefix(self) -> bool:
        """Whether that comes from the LLM's own pass over the text before the image."""
        return self.query == "prefix"

    def shrink(self, side: int) -> int:
        """How many times smaller on each side the encoder sees the image."""
        return 1

    def encoded(self, side: int) -> Number:
        """How many of a `side` x `side` grid's patches the encoder runs over."""
        return side**2

    @property
    def variant(self) -> str:
        """What a results row calls it beside its kind and query; "" for the published form."""
        return ""

    # --- What it costs ----------------------------------------------------------------------------

    @abstractmethod
    def parameters(self, interface: Interface) -> int:
        """Parameters, the projection into the LLM included; V that does not tile is rounded."""

    @abstractmethod
    def products(self, interface: Interface, form: str) -> Products:
        """FLOPs for one image, the projection into the LLM included; `form` is one of FORMS."""

    # --- Published tensors ------------------------------------------------------------------------

    @abstractmethod
    def published(self) -> Table:
        """Its published tensors: names behind `mm_projector.` (MQT's: `query_abstractor.`), and
        which parameters of the module each holds."""

    @classmethod
    def of_published(cls, llava: Any) -> "tuple[Method, tuple[int, ...]]":
        """The compressor inside a published LLaVA, and the blocks of the tower that it reads.

        `llava` is a `weights.methods.Published`. ValueError where config.json and tensors do not
        agree, and for what the module does not have.
        """
        raise ValueError(f"no published model of {cls.kind} is known")

    def section(self) -> dict[str, Any]:
        """The fields of a `compressor` section that describe it."""
        return dict(kind=self.kind) | dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Projected(Method):
    """What the methods have in common whose only weights are LLaVA-1.5's projector."""

    projected: ClassVar[bool] = True

    def parameters(self, interface: Interface) -> int:
        return projector_parameters(interface)

    def products(self, interface: Interface, form: str) -> Products:
        V = self.visual_tokens(interface.rows)
        return Products(reading=V * interface.up, other=V * interface.down)

    def published(self) -> Table:
        return LLAVA


def read(cls: type, section: Any, name: str) -> dict[str, Any]:
    """The fields of a dataclass out of a mapping that may hold more; lists become tuples.

    ValueError where one without a default is missing.
    """
    fields = dataclasses.fields(cls)
    needed = [field.name for field in fields if field.default is dataclasses.MISSING]
    if missing := [field for field in needed if field not in section]:
        raise ValueError(f"{name} needs {needed}; {missing} missing in {sorted(section)}")
    found = {field.name: section[field.name] for field in fields if field.name in section}
    return {key: tuple(x) if isinstance(x, list) else x for key, x in found.items()}


def tilings(side: int) -> list[int]:
    """Ascending numbers of equal square windows that tile a `side` x `side` grid of patches."""
    return [n * n for n in range(1, side + 1) if side % n == 0]


def window_side(tokens: int, side: int) -> int:
    """Side in patches of each of `tokens` windows on a `side` x `side` grid."""
    return side // math.isqrt(tokens)


# The blocks that QueCC and TokenPacker read of a tower of 24, written into their published code.
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
    """Parameters of the keys' and the values' MLPs over all levels, each with its norm."""
    width = interface.width
    return 2 * (linear(interface.levels * width, width) + linear(width, width) + 2 * width)


def window_attention_flops(tokens: Number, interface: Interface, heads: int, form: str) -> Number:
    """FLOPs of one query per window: its projections, those of keys and values, scores and sums.

    Here keys and values are not projected where the query can absorb it for less: each head then
    asks the patches at full width, with its query times the key projection.
    """
    V, P, width = tokens, interface.patches, interface.width
    projected = 4 * P * width**2 + 4 * P * width
    absorbed = 4 * V * width**2 + 4 * P * width * heads
    return 4 * V * width**2 + (projected if form == "published" else min(projected, absorbed))
