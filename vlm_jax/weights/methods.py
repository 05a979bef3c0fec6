# SPDX-License-Identifier: Apache-2.0
"""The compressor inside a published LLaVA: its method and sizes, from config.json and tensors.

Fields mean what they mean in the published code: locuslab/llava-token-compression (986db5b),
CircleRadon/TokenPacker (c38f140), gordonhu608/MQT-LLaVA (92c35d0), mu-cai/matryoshka-mm (163ac77).
PruMerge has no weights and no fields of its own: it runs on a plain LLaVA.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_jax.compressors import COMPRESSORS
from vlm_jax.compressors.method import Method
from vlm_jax.compressors.none import NoneMethod
from vlm_jax.weights import sizes, text_tower
from vlm_jax.weights.classes import allow
from vlm_jax.weights.sizes import Shapes
from vlm_jax.weights.values import value_text, whole

Section = dict[str, Any]

PLAIN = ("0.weight", "0.bias", "2.weight", "2.bias")  # LLaVA's own projector
RAW_WIDTH = 1024  # of the published towers


@dataclass(frozen=True)
class Wish:
    """The user's flags about the compressor; None for flags that are not given.

    `projector` is a file of stage 1 with its weights; without it they are drawn with `seed`.
    `replace` allows it to replace a trained compressor. `text_tower` is the folder of a CLIP.
    """

    kind: str | None = None
    tokens: int | None = None
    heads: int | None = None
    levels: tuple[int, ...] | None = None
    query: str | None = None
    projector: Path | None = None
    seed: int = 0
    replace: bool = False
    text_tower: Path | None = None

    def flags(self) -> list[str]:
        """The given flags as text."""
        levels = self.levels and ",".join(map(str, self.levels))
        values = dict(
            compressor=self.kind, tokens=self.tokens, heads=self.heads, levels=levels,
            query=self.query, projector=self.projector,
        )  # fmt: skip
        values["text-tower"] = self.text_tower
        flags = [f"--{name}={value}" for name, value in values.items() if value is not None]
        return flags + ["--replace-compressor"] * self.replace


@dataclass(frozen=True)
class Trained:
    """A trained compressor and the levels that it reads."""

    method: Method
    levels: tuple[int, ...]

    def describe(self) -> str:
        """The description in words."""
        section = self.method.section()
        words = [f"{section['tokens']} tokens", f"levels {','.join(map(str, self.levels))}"]
        words += [f"{section[name]} heads" for name in ("heads",) if name in section]
        words += [f"query {section[name]}" for name in ("query",) if name in section]
        return f"{self.method.kind} ({', '.join(words)})"


@dataclass(frozen=True)
class Published:
    """A published LLaVA, as `Method.of_published` reads the compressor inside it.

    `fields` is its config.json if that is flat, else empty; `shapes` are those of the compressor's
    tensors, by their names in `mm_projector`; `vit` has the one level that its configuration names.
    Flags (`wish`) are used only for what the files do not say.
    """

    fields: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    vit: Section
    wish: Wish

    @property
    def side(self) -> int:
        """Patches on each side. Raises ValueError if the class token is kept as well."""
        if self.vit["keep_class"]:
            raise ValueError(
                "mm_vision_select_feature='cls_patch' keeps the class token, which only a LLaVA "
                "without compression reads; supported is patch"
            )
        return self.vit["image_size"] // self.vit["patch_size"]

    @property
    def rows(self) -> int:
        """Rows that the tower gives for an image, including a kept class token."""
        return sizes.patches(self.vit) + self.vit["keep_class"]

    @property
    def levels(self) -> tuple[int, ...]:
        """The one block that the configuration names."""
        return self.vit["levels"]

    @property
    def tokens(self) -> int | None:
        """V of the flag --tokens."""
        return self.wish.tokens

    def whole(self, name: str, value: Any, **limits: int) -> int:
        """A whole number in a field; ValueError with the field's name."""
        return whole(name, value, **limits)

    def value_text(self, value: Any) -> str:
        """A value as shown in a message."""
        return value_text(value)

    def heads(self, kind: str, published: int, *, fixed: bool = False) -> int:
        """The number of heads of a trained compressor, which neither config nor tensors contain.

        It is `published` if the published code has it `fixed` or the width is the published one;
        for another width the flag may give it.
        """
        width = self.vit["width"]
        fixed = fixed or width == RAW_WIDTH
        if self.wish.heads is not None and (not fixed or width % published):
            return self.wish.heads
        if width % published:
            raise ValueError(
                f"the {published} heads of the published {kind} do not divide the tower's width of "
                f"{width}: give their number with --heads=N"
            )
        return published

    def levels_of(self, name: str, published: tuple[int, ...]) -> tuple[int, ...]:
        """The blocks that the keys read: `published` if the tower has them, else those of the flag.

        `name` is the tensor of the first layer of the keys.
        """
        vit, wish = self.vit, self.wish
        width, shape = vit["width"], self.shapes.get(name)
        inputs = shape[-1] if shape else 0
        count = inputs // width
        if count < 1 or inputs % width:
            raise ValueError(
                f"compressor.{name} is {shape or 'missing'}: its inputs are channels of several "
                f"blocks, {width} of each"
            )
        levels = published
        if vit["depth"] < published[-1] or count != len(published):
            if wish.levels is None:
                raise ValueError(
                    f"it reads {count} blocks of a tower of {vit['depth']}, and the published ones "
                    f"are {','.join(map(str, published))} of 24: say with --levels which they are"
                )
            levels = wish.levels
            if len(levels) != count:
                raise ValueError(
                    f"--levels={','.join(map(str, levels))}: its keys read {count} blocks"
                )
        if vit["levels"] != levels[-1:]:
            raise ValueError(
                f"mm_vision_select_layer is block {vit['levels'][0]} of {vit['depth']}, and the "
                f"last of the blocks that its keys read is {levels[-1]}: they must be the same"
            )
        return levels


def method_of(shapes: Shapes) -> type[Method] | None:
    """The method to which these tensors belong; None if none belongs to a compressor.

    Raises:
      ValueError: for tensors of two methods, or of an unknown one.
    """
    names = [n.removeprefix("compressor.") for n in shapes if n.startswith("compressor.")]
    marked = {method: method.marks for method in COMPRESSORS.values() if method.marks}
    kinds = {
        tensors: sorted(n for n in names if n.startswith(marks))
        for tensors, marks in marked.items()
    }
    kinds = {method: tensors for method, tensors in kinds.items() if tensors}
    if len(kinds) > 1:
        listed = "; ".join(
            f"of {method.kind}: {', '.join(tensors[:3])}" for method, tensors in kinds.items()
        )
        raise ValueError(f"it has the tensors of several compressors ({listed}): keep one of them")
    if kinds or not names:
        return next(iter(kinds), None)
    if unknown := sorted(set(names) - set(PLAIN)):
        raise ValueError(
            f"its projector is of no known method: it has {', '.join(unknown[:4])}; known are "
            "LLaVA's of two layers (mlp2x_gelu) and those of "
            f"{', '.join(method.kind for method in marked)}"
        )
    return NoneMethod


def named(fields: dict) -> tuple[type[Method] | None, str]:
    """The method that a flat config.json names and the field that names it, or (None, "").

    Raises:
      ValueError: for an unknown method, and if two fields name different ones.
    """
    choices: dict[str, dict[str | None, type[Method]]] = {}
    for method in COMPRESSORS.values():
        for field, value in method.named_by:
            choices.setdefault(field, {})[value] = method
    claims: dict[str, type[Method]] = {}
    for field, methods in choices.items():
        value = fields.get(field)
        plain = ("mlp2x_gelu", "linear") if field == "mm_projector_type" else ()
        if value is None or value in plain:
            continue
        if None in methods:
            claims[field] = methods[None]
            continue
        allow(field, value, (*methods, *plain[:1]))
        claims[f"{field}={value_text(value)}"] = methods[value]
    if len(set(claims.values())) > 1:
        raise ValueError(f"{' and '.join(claims)} name different compressors")
    return next(((method, field) for field, method in claims.items()), (None, ""))


def trained_compressor(fields: dict, shapes: Shapes, vit: Section, wish: Wish) -> Trained | None:
    """The trained compressor of a published LLaVA; None if it has no tensors of one.

    Arguments are the attributes of `Published`, with the `shapes` of the whole model.

    Raises:
      ValueError: if config and tensors do not agree, and for properties that are not supported.
    """
    (claimed, field), method = named(fields), method_of(shapes)
    if method is None:
        if claimed and not wish.replace and not wish.projector:
            raise ValueError(
                f"{field} names the compressor {claimed.kind}, and none of its tensors exists: "
                "give --projector=FILE with them, or --replace-compressor for fresh ones"
            )
        return None
    if claimed and claimed.projected and not method.compresses:
        method = claimed  # its tensors are LLaVA's
    if claimed not in (None, method):
        raise ValueError(
            f"{field} names the compressor {claimed.kind}, and the tensors are of {method.kind}"
        )
    if fields and method.checks_projector_type:
        allow("mm_projector_type", fields.get("mm_projector_type", "linear"), ("mlp2x_gelu",))
    own = {
        n.removeprefix("compressor."): s for n, s in shapes.items() if n.startswith("compressor.")
    }
    return Trained(*method.of_published(Published(fields, own, vit, wish)))


def apply_flags(trained: Trained, wish: Wish, vit: Section, path: Path) -> Trained:
    """The trained compressor under the flags, without replacing its weights.

    A plain LLaVA may become a method whose only weights are its projector's; all other flags must
    agree with the trained compressor.

    Raises:
      ValueError: for flags that do not agree, with what the model has.
    """
    method = trained.method
    requested = COMPRESSORS[wish.kind] if wish.kind else type(method)
    conflicts = []
    if requested is not type(method):
        if method.projected and requested.keeps_projector() and not vit["keep_class"]:
            method = projected(wish, requested, vit)
        else:
            conflicts.append(f"--compressor={requested.kind}")
    if wish.tokens not in (None, method.tokens) and not method.serves_several:
        conflicts.append(f"--tokens={wish.tokens}")
    for name, plain in (("heads", 1), ("query", "none")):
        if getattr(wish, name) not in (None, getattr(method, name, plain)):
            conflicts.append(f"--{name}={getattr(wish, name)}")
    if wish.levels not in (None, trained.levels):
        conflicts.append(f"--levels={','.join(map(str, wish.levels))}")
    if conflicts:
        raise ValueError(
            f"{path} has a trained compressor, {trained.describe()}, and not "
            f"{' '.join(conflicts)}: leave these flags out, or add --replace-compressor to drop "
            "its weights for fresh ones"
        )
    return Trained(method, trained.levels)


def projected(wish: Wish, requested: type[Method], vit: Section) -> Method:
    """Another method around LLaVA's trained projector; of one that has CLIP's text tower too, the
    sizes are those of the flag's."""
    tokens = wish.tokens
    if tokens is None:
        tokens = requested.usual(vit["image_size"] // vit["patch_size"])
    if tokens is None:
        raise ValueError(f"--compressor={requested.kind} needs --tokens=V")
    tower = text_tower.read(wish.text_tower, requested.kind).section if requested.clip else {}
    return requested(tokens=tokens, **tower)
