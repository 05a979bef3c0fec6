# SPDX-License-Identifier: Apache-2.0
"""The compressor inside a published LLaVA: its method and sizes, from config.json and tensors.

Read as the code that made such files reads them: locuslab/llava-token-compression (986db5b),
CircleRadon/TokenPacker (c38f140), gordonhu608/MQT-LLaVA (92c35d0), mu-cai/matryoshka-mm (163ac77).
PruMerge has no weights and no field of its own: a plain LLaVA is what it runs on.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_jax.compressors import COMPRESSORS, serves_any_tokens
from vlm_jax.weights import sizes
from vlm_jax.weights.classes import allow
from vlm_jax.weights.sizes import Shapes
from vlm_jax.weights.values import shown, whole

Section = dict[str, Any]

# Tensors that one method alone has, behind `compressor.`; the first that fits is taken.
MARKS = {
    "quecc": ("0.clip_attn.", "0.q_downsample."),
    "token_packer": ("q_proj_1.", "clip_attn.", "ln_q_1."),
    "mqt": ("query", "pos_embed", "attn.", "proj"),
}
PLAIN = ("0.weight", "0.bias", "2.weight", "2.bias")  # LLaVA's own projector
# Methods whose only weights are LLaVA's projector.
PROJECTED = ("none", "m3", "pool", "downsample", "prumerge", "prumerge_plus")
LEVELS = (12, 16, 22, 23)  # what QueCC and TokenPacker read of a tower of 24 blocks
HEADS = {"quecc": 8, "token_packer": 8, "mqt": 16}  # in the published code, at width 1024
RAW_WIDTH = 1024
TEXTED = "compressor.0.text_projection.0.weight"  # QueCC's, where it reads the question


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

    def said(self) -> list[str]:
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
    """A compressor with the weights it was trained to: its `compressor` section and its levels."""

    section: Section
    levels: tuple[int, ...]

    def said(self) -> str:
        """It in words."""
        section = self.section
        words = [f"{section['tokens']} tokens", f"levels {','.join(map(str, self.levels))}"]
        words += [f"{section['heads']} heads"] * (section["kind"] in HEADS)
        words += [f"query {section['query']}"] * (section["kind"] == "quecc")
        return f"{section['kind']} ({', '.join(words)})"


def found(shapes: Shapes) -> str | None:
    """The method whose tensors these are; None where there are none of a compressor.

    Raises:
      ValueError: for tensors of two methods, or of none that is known.
    """
    names = [n.removeprefix("compressor.") for n in shapes if n.startswith("compressor.")]
    kinds = {kind: sorted(n for n in names if n.startswith(marks)) for kind, marks in MARKS.items()}
    kinds = {kind: of for kind, of in kinds.items() if of}
    if len(kinds) > 1:
        said = "; ".join(f"of {kind}: {', '.join(of[:3])}" for kind, of in kinds.items())
        raise ValueError(f"it has the tensors of several compressors ({said}): keep one of them")
    if kinds or not names:
        return next(iter(kinds), None)
    if strange := sorted(set(names) - set(PLAIN)):
        raise ValueError(
            f"its projector is of no known method: it has {', '.join(strange[:4])}; known are "
            f"LLaVA's of two layers (mlp2x_gelu) and those of {', '.join(MARKS)}"
        )
    return "none"


def named(fields: dict) -> tuple[str | None, str]:
    """The method that a flat config.json names, and the field that names it; None where none does.

    Raises:
      ValueError: for one that is not known, and where two fields name different ones.
    """
    said: dict[str, str] = {}
    for field, known in (
        ("mm_vision_token_compression_type", {"quecc": "quecc", "token-packer": "token_packer"}),
        ("query_abstractor_type", {"matry_query": "mqt"}),
        ("mm_projector_type", {"tokenpacker": "token_packer"}),
    ):
        value = fields.get(field)
        plain = ("mlp2x_gelu", "linear") if field == "mm_projector_type" else ()
        if value is None or value in plain:
            continue
        allow(field, value, (*known, *plain[:1]))
        said[f"{field}={shown(value)}"] = known[value]
    if fields.get("matryoshka_vis_token_scale") is not None:
        said["matryoshka_vis_token_scale"] = "m3"
    if len(set(said.values())) > 1:
        raise ValueError(f"{' and '.join(said)} name different compressors")
    return next(((kind, field) for field, kind in said.items()), (None, ""))


def inside(fields: dict, shapes: Shapes, vit: Section, wish: Wish) -> Trained | None:
    """The trained compressor of a published LLaVA; None where no tensor of one is there.

    `fields` is its config.json where that is flat, else nothing; `vit` has the one level that its
    configuration names. Of the flags only those are heard that say what files do not.

    Raises:
      ValueError: where config and tensors do not agree, and for what our models do not have.
    """
    (claimed, field), there = named(fields), found(shapes)
    if there is None:
        if claimed and not wish.replace and not wish.projector:
            raise ValueError(
                f"{field} names the compressor {claimed}, and none of its tensors is there: give "
                "--projector=FILE with them, or --replace-compressor for fresh ones"
            )
        return None
    kind = "m3" if (there, claimed) == ("none", "m3") else there
    if claimed not in (None, kind):
        raise ValueError(f"{field} names the compressor {claimed}, and the tensors are of {kind}")
    # The code of these two never looks at the field.
    if fields and kind not in ("token_packer", "mqt"):
        allow("mm_projector_type", fields.get("mm_projector_type", "linear"), ("mlp2x_gelu",))
    return READERS[kind](fields, shapes, vit, wish)


def heads_of(kind: str, vit: Section, wish: Wish) -> int:
    """How many heads a trained compressor has, which neither config nor tensors say.

    QueCC's are written into its code; those of the others go with the published width, and for
    another width the flag may say more.
    """
    heads, fixed = HEADS[kind], kind == "quecc" or vit["width"] == RAW_WIDTH
    if wish.heads is not None and (not fixed or vit["width"] % heads):
        return wish.heads
    if vit["width"] % heads:
        raise ValueError(
            f"the {heads} heads of the published {kind} do not divide the tower's width of "
            f"{vit['width']}: say with --heads=N how many it has"
        )
    return heads


def levels_of(shapes: Shapes, name: str, vit: Section, wish: Wish) -> tuple[int, ...]:
    """The blocks that QueCC and TokenPacker read: written into their code, for 24 blocks."""
    width, inputs = vit["width"], shapes.get(name, (0, 0))[-1]
    count = inputs // width
    if count < 1 or inputs % width:
        raise ValueError(
            f"{name} is {shapes.get(name, 'missing')}: its inputs are channels of several blocks, "
            f"{width} of each"
        )
    levels = LEVELS
    if vit["depth"] < LEVELS[-1] or count != len(LEVELS):
        if wish.levels is None:
            raise ValueError(
                f"it reads {count} blocks of a tower of {vit['depth']}, and the published ones are "
                f"{','.join(map(str, LEVELS))} of 24: say with --levels which they are"
            )
        levels = wish.levels
        if len(levels) != count:
            raise ValueError(f"--levels={','.join(map(str, levels))}: its keys read {count} blocks")
    if vit["levels"] != levels[-1:]:
        raise ValueError(
            f"mm_vision_select_layer is block {vit['levels'][0]} of {vit['depth']}, and the last "
            f"of the blocks that its keys read is {levels[-1]}: they must be the same"
        )
    return levels


def quecc(fields: dict, shapes: Shapes, vit: Section, wish: Wish) -> Trained:
    """QueCC of the paper's own code."""
    side = patches(vit)
    counted = fields.get("mm_vision_output_token_count", 576)
    if whole("mm_vision_output_token_count", counted) != side**2:
        raise ValueError(
            f"mm_vision_output_token_count={counted}, and the tower has {side**2} patches"
        )
    taps = shapes.get("compressor.0.q_downsample.weight", ())
    if len(taps) != 4 or taps[2] != taps[3]:
        raise ValueError(f"compressor.0.q_downsample.weight is {taps or 'missing'}, no convolution")
    kernel = whole("mm_vision_token_compression_kernel_size",
                   fields.get("mm_vision_token_compression_kernel_size", taps[3]))  # fmt: skip
    stride = whole("mm_vision_token_compression_stride",
                   fields.get("mm_vision_token_compression_stride", 4))  # fmt: skip
    if kernel != taps[3]:
        raise ValueError(
            f"mm_vision_token_compression_kernel_size={kernel}, and compressor.0.q_downsample."
            f"weight is {taps}"
        )
    if kernel != stride or side % kernel:
        raise ValueError(
            f"mm_vision_token_compression_kernel_size={kernel} with mm_vision_token_compression_"
            f"stride={stride} on a {side}x{side} grid is not supported: both must be one number "
            f"that divides {side}"
        )
    if TEXTED in shapes:
        size = fields.get("mm_vision_output_text_embedding_size")
        if size is not None and size != shapes[TEXTED][-1]:
            raise ValueError(
                f"mm_vision_output_text_embedding_size={shown(size)}, and {TEXTED} is "
                f"{shapes[TEXTED]}"
            )
    query = "separate" if TEXTED in shapes else "none"
    levels = levels_of(shapes, "compressor.0.k_proj.0.weight", vit, wish)
    heads = heads_of("quecc", vit, wish)
    return Trained(
        dict(kind="quecc", tokens=(side // kernel) ** 2, heads=heads, query=query), levels
    )


def token_packer(fields: dict, shapes: Shapes, vit: Section, wish: Wish) -> Trained:
    """TokenPacker: the field was renamed, and before it had a name it was 2."""
    side = patches(vit)
    names = ("scale_factor", "down_rate", "token_packer_down_rate")
    name = next((n for n in names if fields.get(n) is not None), names[0])
    factor = whole(name, fields.get(name, 2))
    if side % factor:
        raise ValueError(f"{name}={factor} does not divide the {side}x{side} grid of the tower")
    levels = levels_of(shapes, "compressor.k_proj_1.0.weight", vit, wish)
    heads = heads_of("token_packer", vit, wish)
    section = dict(kind="token_packer", tokens=(side // factor) ** 2, heads=heads, query="none")
    return Trained(section, levels)


def mqt(fields: dict, shapes: Shapes, vit: Section, wish: Wish) -> Trained:
    """MQT: one model for any number of tokens, of which all are made unless somebody says less."""
    side, queries = patches(vit), shapes.get("compressor.query", ())
    if len(queries) != 2 or math.isqrt(queries[0]) ** 2 != queries[0]:
        raise ValueError(f"compressor.query is {queries or 'missing'}: a square grid of queries")
    asked = fields.get("num_visual_tokens")
    # What training showed says nothing about requests.
    if asked in (None, "first_stage", "second_stage"):
        asked = queries[0]
    if isinstance(asked, str) and asked.isdecimal() and len(asked) < 9:
        asked = int(asked)
    tokens = whole("num_visual_tokens", asked, most=queries[0])
    tokens = tokens if wish.tokens is None else wish.tokens
    section = dict(kind="mqt", tokens=tokens, heads=heads_of("mqt", vit, wish), query="none")
    # 0 stands for as many as a new model of these sizes has.
    usual = len(COMPRESSORS["mqt"].supported(side))
    section["queries"] = 0 if queries[0] == usual else queries[0]
    return Trained(section, vit["levels"])


def m3(fields: dict, shapes: Shapes, vit: Section, wish: Wish) -> Trained:
    """M3: a LLaVA whose config.json lists the numbers of tokens that it was trained to give."""
    del shapes
    scales = fields["matryoshka_vis_token_scale"]
    if isinstance(scales, str):
        scales = [int(x) if x.strip().isdecimal() and len(x) < 9 else x for x in scales.split(",")]
    scales = scales if isinstance(scales, list) else [scales]
    scales = tuple(whole("matryoshka_vis_token_scale", x, most=patches(vit) ** 2) for x in scales)
    if not scales:
        raise ValueError("matryoshka_vis_token_scale=[]: numbers of tokens are needed")
    tokens = max(scales) if wish.tokens is None else wish.tokens
    return Trained(
        dict(kind="m3", tokens=tokens, heads=1, query="none", scales=scales), vit["levels"]
    )


def plain(fields: dict, shapes: Shapes, vit: Section, wish: Wish) -> Trained:
    """LLaVA's own projector."""
    del fields, shapes, wish
    rows = sizes.patches(vit) + vit["keep_class"]
    return Trained(dict(kind="none", tokens=rows, heads=1, query="none"), vit["levels"])


READERS = {"none": plain, "m3": m3, "mqt": mqt, "quecc": quecc, "token_packer": token_packer}


def patches(vit: Section) -> int:
    """Patches on each side of an image; ValueError where a class token stays beside them."""
    if vit["keep_class"]:
        raise ValueError(
            "mm_vision_select_feature='cls_patch' keeps the class token, which only a LLaVA "
            "without compression reads; supported is patch"
        )
    return vit["image_size"] // vit["patch_size"]


def chosen(trained: Trained, wish: Wish, vit: Section, path: Path) -> Trained:
    """What the flags make of a trained compressor without replacing it.

    A plain LLaVA may become a method whose only weights are its projector's; everything else that
    the flags ask for must be what is there.

    Raises:
      ValueError: with what is there, for flags that ask for something else.
    """
    section, wanted = trained.section, wish.kind or trained.section["kind"]
    other = []
    if wanted != section["kind"]:
        if section["kind"] in PROJECTED and wanted in PROJECTED and not vit["keep_class"]:
            section = projected(wish, wanted, vit)
        else:
            other.append(f"--compressor={wanted}")
    if wish.tokens not in (None, section["tokens"]) and not serves_any_tokens(section["kind"]):
        other.append(f"--tokens={wish.tokens}")
    for name in ("heads", "query"):
        if getattr(wish, name) not in (None, section[name]):
            other.append(f"--{name}={getattr(wish, name)}")
    if wish.levels not in (None, trained.levels):
        other.append(f"--levels={','.join(map(str, wish.levels))}")
    if other:
        raise ValueError(
            f"{path} has a trained compressor, {trained.said()}, and not {' '.join(other)}: leave "
            "these flags out, or add --replace-compressor to drop its weights for fresh ones"
        )
    return Trained(section, trained.levels)


def projected(wish: Wish, kind: str, vit: Section) -> Section:
    """The section of another method around LLaVA's trained projector."""
    tokens = wish.tokens
    if tokens is None and kind in ("none", "m3"):
        tokens = patches(vit) ** 2
    if tokens is None:
        raise ValueError(f"--compressor={kind} needs --tokens=V")
    return dict(kind=kind, tokens=tokens, heads=1, query="none")
