# SPDX-License-Identifier: Apache-2.0
"""Descriptions of prunings: after which layers how many visual tokens are kept, and by what.

V visual tokens of a row  L layers
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

from vlm_jax.compressors.method import Method, Number

# Prunes nothing.
NONE: dict[str, Any] = dict(kind="none", layers=(), tokens=(), weight=0.5, dropped=0.0)
# Fields that one kind alone reads.
ALONE = {"weight": "tokencarve", "dropped": "evs"}


class Read(NamedTuple):
    """What a model reads, as far as a pruning depends on it."""

    depth: int  # L
    visual: int  # V, the slots of an image
    compressor: Method


class Run(NamedTuple):
    """Layers `first` to `end` - 1, which read `tokens` visual tokens of a row at most."""

    first: int
    end: int
    tokens: Number


@dataclasses.dataclass(frozen=True)
class Pruning(ABC):
    """Visual tokens that later layers of a prefill leave out; a method overrides what differs.

    Nothing is trained: training reads all tokens, generation and evaluation prune. Text is kept.

    Attributes:
      layers: how many layers run before each cut, ascending.
      tokens: visual tokens of a row after each cut.
    """

    kind: ClassVar[str]  # its name in config.pruning.kind
    # Whether tokens are scored by the attention of the layer behind a cut, not of the one before.
    looks_ahead: ClassVar[bool] = False
    # Whether positions are counted again after a cut, without gaps; otherwise tokens keep theirs.
    packs: ClassVar[bool] = False
    # Whether the caches of the layers before a cut lose the same tokens.
    forgets: ClassVar[bool] = False
    # Whether a row may hold the frames of a clip, and not one image alone.
    of_clips: ClassVar[bool] = False

    layers: tuple[int, ...]
    tokens: tuple[int, ...]

    @classmethod
    def of(cls, fields: Mapping[str, Any], read: Read) -> "Pruning":
        """The description in a section, () replaced by what was published for such a model.

        ValueError where that is nothing, for a field that is not read, and as `check` raises.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name, kind in ALONE.items():
            if name not in names and fields[name] != NONE[name]:
                raise ValueError(
                    f"pruning.{name}={fields[name]} is of pruning.kind={kind!r}, not of "
                    f"{cls.kind!r}: leave it out"
                )
        values = {name: fields[name] for name in names}
        values["layers"] = values["layers"] or cls.usual_layers(read.depth)
        values["tokens"] = values["tokens"] or cls.usual_tokens(read.visual)
        if not values["tokens"]:
            raise ValueError(
                f"pruning.tokens=(): pruning.kind={cls.kind!r} needs the number of visual tokens "
                f"that are kept, such as ({max(read.visual // 4, 1)},)"
            )
        made = cls(**values)
        made.check(read)
        return made

    @classmethod
    @abstractmethod
    def usual_layers(cls, depth: int) -> tuple[int, ...]:
        """`layers` as published, in a model of `depth` layers."""

    @classmethod
    def usual_tokens(cls, visual: int) -> tuple[int, ...]:
        """`tokens` as published, of `visual` tokens; () where they have to be chosen."""
        return ()

    def check(self, read: Read) -> None:
        """ValueError, with what is possible, unless a model that reads `read` can be pruned so."""
        layers, tokens = self.layers, self.tokens
        if sorted(set(layers)) != list(layers) or not 1 <= layers[0] <= layers[-1] < read.depth:
            raise ValueError(
                f"pruning.layers={layers}: layers that run before each cut, ascending from 1 to "
                f"{read.depth - 1} in a model of {read.depth}"
            )
        if len(layers) != len(tokens):
            raise ValueError(
                f"pruning.layers={layers}, pruning.tokens={tokens}: give as many numbers of tokens "
                "as cuts"
            )
        if sorted(tokens, reverse=True) != list(tokens) or not 1 <= tokens[-1]:
            raise ValueError(f"pruning.tokens={tokens}: 1 or more, and never more than before")
        if tokens[0] > read.visual:
            raise ValueError(
                f"pruning.tokens={tokens}: the LLM reads {read.visual} visual tokens of an image, "
                "and a cut keeps no more than there are"
            )

    @abstractmethod
    def cut(self) -> Callable[..., Any]:
        """The function of `cuts.py`, without JAX until it is asked for; its arguments are those of
        `cuts.by_attention`."""

    @property
    def inside(self) -> "Pruning | None":
        """What happens between the layers; None where nothing does."""
        return self

    def before(self) -> Callable[..., Any] | None:
        """The function of `models/dropped.py` that leaves tokens out before the LLM, if any."""
        return None

    def given(self, visual: Number, frames: Number) -> Number:
        """Visual tokens of a row that the first layer reads, of `frames` images with `visual`."""
        return frames * visual

    def runs(self, depth: int, visual: Number) -> tuple[Run, ...]:
        """The layers between two cuts and the visual tokens that they read, of `visual`."""
        ends, kept = (*self.layers, depth), (visual, *(min(n, visual) for n in self.tokens))
        starts = (0, *self.layers)
        return tuple(Run(*one) for one in zip(starts, ends, kept, strict=True))

    def average(self, depth: int, visual: Number) -> float:
        """Mean over layers of the visual tokens that they read, of `visual`."""
        runs = self.runs(depth, visual)
        return sum((run.end - run.first) * run.tokens for run in runs) / depth

    def cached(self, depth: int, visual: Number) -> float:
        """Mean over layers of the visual tokens that their caches hold after a prefill."""
        if self.forgets:
            return float(self.runs(depth, visual)[-1].tokens)
        return self.average(depth, visual)

    def flops(self, llm: Any, *, length: Number, cached: Number, visual: Number) -> Number:
        """FLOPs of choosing the tokens of one cut, with everything that is run for it.

        Args:
          llm: an `LLMSize`.
          length: tokens of the row before the cut, `cached` ones left out.
          visual: those of them that are visual.
        """
        width = llm.heads * llm.head_size
        asked = 2 * llm.width * width + 2 * (cached + length) * width  # one query, its scores
        if self.looks_ahead:
            asked += 2 * length * llm.width * llm.kv_heads * llm.head_size
        return asked

    @property
    def variant(self) -> str:
        """Its name in results rows, which does not tell how many tokens are kept."""
        return f"{self.kind} after {','.join(map(str, self.layers))}"

    def section(self) -> dict[str, Any]:
        """The fields of a `pruning` section that describe it."""
        return NONE | dict(kind=self.kind) | dataclasses.asdict(self)
