# SPDX-License-Identifier: Apache-2.0
"""The compressor inside a published LLaVA: its method and sizes, from config.json and tensors.

Read as the code that made such files reads them: locuslab/llava-token-compression (986db5b),
CircleRadon/TokenPacker (c38f140), gordonhu608/MQT-LLaVA (92c35d0), mu-cai/matryoshka-mm (163ac77).
PruMerge has no weights and no field of its own: a plain LLaVA is what it runs on.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_jax.compressors import COMPRESSORS
from vlm_jax.compressors.method import Method
from vlm_jax.compressors.none import NoneMethod
from vlm_jax.weights import sizes
from vlm_jax.weights.classes import allow
from vlm_jax.weights.sizes import Shapes
from vlm_jax.weights.values import value_text, whole

Section = dict[str, Any]

PLAIN = ("0.weight", "0.bias", "2.weight", "2.bias")  # LLaVA's own projector
RAW_WIDTH = 1024  # of the published towers


@dataclass(frozen=True)
class Wish:
    """What a user's flags say of the compressor; None where they say nothing.

    `projector` is a file of stage 1 with its weights, without which they are fresh ones of `seed`;
    `replace` allows it to stand in the place of a trained one.
    """

    kind: str | None = None
    tokens: int | None = None
    heads: int | None = None
    levels: tuple[int, ...] | None = None
    query: str | None = None
    projector: Path | None = None
    seed: int = 0
    replace: bool = False

    def flags(self) -> list[str]:
        """The flags that were given, as they were written."""
        levels = self.levels and ",".join(map(str, self.levels))
        given = dict(
            compressor=self.kind, tokens=self.tokens, heads=self.heads, levels=levels,
            query=self.query, projector=self.projector,
        )  # fmt: skip
        flags = [f"--{name}={value}" for name, value in given.items() if value is not None]
        return flags + ["--replace-compressor"] * self.replace


@dataclass(frozen=True)
class Trained:
    """A compressor with the weights it was trained to, and its levels."""

    method: Method
    levels: tuple[int, ...]

    def describe(self) -> str:
        """It in words."""
        section = self.method.section()
        words = [f"{section['tokens']} tokens", f"levels {','.join(map(str, self.levels))}"]
        words += [f"{section[name]} heads" for name in ("heads",) if name in section]
        words += [f"query {section[name]}" for name in ("query",) if name in section]
        return f"{self.method.kind} ({', '.join(words)})"


@dataclass(frozen=True)
class Published:
    """A published LLaVA, as `Method.of_published` reads the compressor inside it.

    `fields` is its config.json where that is flat, else nothing; `shapes` has the compressor's
    tensors under the names in `mm_projector`; `vit` has the one level that its configuration names.
    Of the flags (`wish`) only those are heard that say what files do not.
    """

    fields: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    vit: Section
    wish: Wish

    @property
    def side(self) -> int:
        """Patches on each side; ValueError where a class token stays beside them."""
        if self.vit["keep_class"]:
            raise ValueError(
                "mm_vision_select_feature='cls_patch' keeps the class token, which only a LLaVA "
                "without compression reads; supported is patch"
            )
        return self.vit["image_size"] // self.vit["patch_size"]

    @property
    def rows(self) -> int:
        """What the tower keeps of an image, a class token with it."""
        return sizes.patches(self.vit) + self.vit["keep_class"]

    @property
    def levels(self) -> tuple[int, ...]:
        """The one block that the configuration names."""
        return self.vit["levels"]

    @property
    def tokens(self) -> int | None:
        """V that a flag asks for."""
        return self.wish.tokens

    def whole(self, name: str, value: Any, **limits: int) -> int:
        """A whole number that a field has; ValueError by the field's name."""
        return whole(name, value, **limits)

    def value_text(self, value: Any) -> str:
        """A value as it is written in a message."""
        return value_text(value)

    def heads(self, kind: str, published: int, *, fixed: bool = False) -> int:
        """How many heads a trained compressor has, which neither config nor tensors say.

        Those `published` are written into its code where they are `fixed`, else go with the
        published width, and for another width the flag may say more.
        """
        width = self.vit["width"]
        fixed = fixed or width == RAW_WIDTH
        if self.wish.heads is not None and (not fixed or width % published):
            return self.wish.heads
        if width % published:
            raise ValueError(
                f"the {published} heads of the published {kind} do not divide the tower's width of "
                f"{width}: say with --heads=N how many it has"
            )
        return published

    def levels_of(self, name: str, published: tuple[int, ...]) -> tuple[int, ...]:
        """The blocks that the keys read whose first layer has the tensor `name`: those `published`
        of a tower that has them, and else those that a flag says."""
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
    """The method whose tensors these are; None where there are none of a compressor.

    Raises:
      ValueError: for tensors of two methods, or of none that is known.
    """
    names = [n.removeprefix("compressor.") for n in shapes if n.startswith("compressor.")]
    marked = {method: method.marks for method in COMPRESSORS.values() if method.marks}
    kinds = {of: sorted(n for n in names if n.startswith(marks)) for of, marks in marked.items()}
    kinds = {method: of for method, of in kinds.items() if of}
    if len(kinds) > 1:
        said = "; ".join(f"of {method.kind}: {', '.join(of[:3])}" for method, of in kinds.items())
        raise ValueError(f"it has the tensors of several compressors ({said}): keep one of them")
    if kinds or not names:
        return next(iter(kinds), None)
    if strange := sorted(set(names) - set(PLAIN)):
        raise ValueError(
            f"its projector is of no known method: it has {', '.join(strange[:4])}; known are "
            "LLaVA's of two layers (mlp2x_gelu) and those of "
            f"{', '.join(method.kind for method in marked)}"
        )
    return NoneMethod


def named(fields: dict) -> tuple[type[Method] | None, str]:
    """The method that a flat config.json names, and the field that names it; None where none does.

    Raises:
      ValueError: for one that is not known, and where two fields name different ones.
    """
    known: dict[str, dict[str | None, type[Method]]] = {}
    for method in COMPRESSORS.values():
        for field, value in method.named_by:
            known.setdefault(field, {})[value] = method
    said: dict[str, type[Method]] = {}
    for field, methods in known.items():
        value = fields.get(field)
        plain = ("mlp2x_gelu", "linear") if field == "mm_projector_type" else ()
        if value is None or value in plain:
            continue
        if None in methods:
            said[field] = methods[None]
            continue
        allow(field, value, (*methods, *plain[:1]))
        said[f"{field}={value_text(value)}"] = methods[value]
    if len(set(said.values())) > 1:
        raise ValueError(f"{' and '.join(said)} name different compressors")
    return next(((method, field) for field, method in said.items()), (None, ""))


def inside(fields: dict, shapes: Shapes, vit: Section, wish: Wish) -> Trained | None:
    """The trained compressor of a published LLaVA; None where no tensor of one is there.

    Arguments as the attributes of `Published`, `shapes` of the whole model.

    Raises:
      ValueError: where config and tensors do not agree, and for what our models do not have.
    """
    (claimed, field), method = named(fields), method_of(shapes)
    if method is None:
        if claimed and not wish.replace and not wish.projector:
            raise ValueError(
                f"{field} names the compressor {claimed.kind}, and none of its tensors is there: "
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


def chosen(trained: Trained, wish: Wish, vit: Section, path: Path) -> Trained:
    """What the flags make of a trained compressor without replacing it.

    A plain LLaVA may become a method whose only weights are its projector's; everything else that
    the flags ask for must be what is there.

    Raises:
      ValueError: with what is there, for flags that ask for something else.
    """
    method = trained.method
    wanted = COMPRESSORS[wish.kind] if wish.kind else type(method)
    other = []
    if wanted is not type(method):
        if method.projected and wanted.projected and not vit["keep_class"]:
            method = projected(wish, wanted, vit)
        else:
            other.append(f"--compressor={wanted.kind}")
    if wish.tokens not in (None, method.tokens) and not method.any_tokens:
        other.append(f"--tokens={wish.tokens}")
    for name, plain in (("heads", 1), ("query", "none")):
        if getattr(wish, name) not in (None, getattr(method, name, plain)):
            other.append(f"--{name}={getattr(wish, name)}")
    if wish.levels not in (None, trained.levels):
        other.append(f"--levels={','.join(map(str, wish.levels))}")
    if other:
        raise ValueError(
            f"{path} has a trained compressor, {trained.describe()}, and not {' '.join(other)}: "
            "leave these flags out, or add --replace-compressor to drop its weights for fresh ones"
        )
    return Trained(method, trained.levels)


def projected(wish: Wish, wanted: type[Method], vit: Section) -> Method:
    """Another method around LLaVA's trained projector."""
    tokens = wish.tokens
    if tokens is None:
        tokens = wanted.usual(vit["image_size"] // vit["patch_size"])
    if tokens is None:
        raise ValueError(f"--compressor={wanted.kind} needs --tokens=V")
    return wanted(tokens=tokens)
