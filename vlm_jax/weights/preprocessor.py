# SPDX-License-Identifier: Apache-2.0
"""How a published model prepares its images: preprocessor_config.json read, and written again.

Every field is honored or refused. A field that is absent has the default of the processor class
that the file names, which is asked of transformers.

What is read becomes `facts.image` of a model folder and `data.image_*` of a configuration: `fit`,
`mean`, `std`, `resample`, `resize`, `rescale`, `normalize`, as vlm_jax/data/images.py describes
them.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_jax.data.images import CLIP_MEAN, CLIP_STD, FILTERS, largest_edge
from vlm_jax.weights.files import read_json

Section = dict[str, Any]

NAME, WHOLE = "preprocessor_config.json", "processor_config.json"
NUMBERED = {int(how): name for name, how in FILTERS.items()}  # as its files have them
# openai/clip-vit-large-patch14-336 and google/siglip-so400m-patch14-384
CLIP = dict(mean=[*CLIP_MEAN], std=[*CLIP_STD], fit="crop")
SIGLIP = dict(mean=[0.5] * 3, std=[0.5] * 3, fit="stretch")
# What a model folder has that was made before a field was born.
OLDER = dict(resample="bicubic", resize=[], rescale=1 / 255, normalize=True)

# Processors that resize, crop, rescale and normalize in this order and do nothing else; LLaVA's may
# pad to a square first.
LLAVA = "LlavaImageProcessor"
KNOWN = (
    "CLIPImageProcessor",
    "SiglipImageProcessor",
    LLAVA,
    "ViTImageProcessor",
    "DeiTImageProcessor",
    "BitImageProcessor",
    "BlipImageProcessor",
    "ChineseCLIPImageProcessor",
)
OF_MODEL = {"llava": LLAVA}  # where no class is named, transformers takes that of the model
FLAGS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb", "do_pad")
SIZES = ("size", "crop_size", "pad_size")
COLORS = ("image_mean", "image_std")
NEEDED = (
    ("do_resize", "size", "resample"),
    ("do_center_crop", "crop_size"),
    ("do_rescale", "rescale_factor"),
    ("do_normalize", "image_mean", "image_std"),
    ("do_pad", "image_mean"),
)
READ = (*FLAGS, *SIZES, *COLORS, "resample", "rescale_factor", "default_to_square")
# Names, and the form of what a processor returns: no pixel depends on them.
OTHER = (
    "image_processor_type feature_extractor_type processor_class _processor_class name_or_path "
    "_name_or_path _commit_hash transformers_version model_input_names use_fast backend "
    "return_tensors data_format input_data_format device disable_grouping image_seq_length "
    "_valid_processor_keys _valid_kwargs_names"
).split()


def facts(folder: Path, vit: Section, *, pad: bool = False) -> Section:
    """`facts.image` of a published model whose tower is `vit`, from the files of its folder.

    `pad` makes images square first, with the mean color, as config.json of a LLaVA-1.5 may ask.

    Raises:
      ValueError: for a field that is not known or wrong, and where the pixels are not those that
        the tower takes, naming the file.
    """
    kind, side = CLIP if vit["class_token"] else SIGLIP, vit["image_size"]
    found = fields_of(folder)
    if found is None:
        made = OLDER | kind
    else:
        path, fields = found
        try:
            made = described(fields, class_of(path.parent, fields, vit), side)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    if pad and made["fit"] == "stretch" and len(made["resize"]) == 2:
        raise ValueError(
            f"{folder}: image_aspect_ratio='pad' of config.json makes squares, and size="
            f"{made['resize']} of {NAME} is none: set a square size"
        )
    return refitted(made, "pad") if pad else made


def refitted(image: Section, fit: str) -> Section:
    """`facts.image` with images made square in another way."""
    image = OLDER | image
    if fit == image["fit"]:
        return image
    # A square's sides are one length: of a shortest and a longest edge the smaller decides.
    return image | dict(fit=fit, resize=[min(image["resize"])] if image["resize"] else [])


def fields_of(folder: Path) -> tuple[Path, Section] | None:
    """The file that describes an image processor, and its fields; None where there is none."""
    plain, whole = folder / NAME, folder / WHOLE
    within = read_json(whole).get("image_processor") if whole.is_file() else None
    alone = read_json(plain) if plain.is_file() else None
    if within is None:
        return None if alone is None else (plain, alone)
    if not isinstance(within, dict):
        raise ValueError(f"{whole}: image_processor={within!r:.80}: an object was expected")
    return whole, within


def notes(folder: Path, image: Section) -> Section:
    """What a user should know of where `facts.image` comes from: {"images": sentence}, or {}."""
    plain, found = folder / NAME, fields_of(folder)
    if found is None:
        said = f"{folder} has no {NAME}: images are prepared as its kind of tower usually is, by "
        return dict(images=f"{said}{image['fit']!r} and with the published mean and deviation")
    path, fields = found
    if path != plain and plain.is_file():
        alone = read_json(plain)
        if any(alone.get(k) != fields.get(k) for k in READ):
            said = f"{path} says how images are prepared; {NAME} beside it says something else and"
            return dict(images=f"{said} is not read, as in transformers")
    return {}


def class_of(folder: Path, fields: Section, vit: Section) -> str:
    """The image processor that the fields are of, by its name in transformers."""
    for field in ("image_processor_type", "feature_extractor_type"):
        if (name := fields.get(field)) is not None:
            break
    else:
        config = folder / "config.json"
        model = read_json(config).get("model_type") if config.is_file() else None
        tower = "CLIPImageProcessor" if vit["class_token"] else "SiglipImageProcessor"
        return OF_MODEL.get(model, tower) if isinstance(model, str) else tower
    if not isinstance(name, str):
        raise ValueError(f"{field}={name!r:.80}: the name of a class was expected")
    if field == "feature_extractor_type":
        name = name.replace("FeatureExtractor", "ImageProcessor")
    base = name.removesuffix("Fast").removesuffix("Pil")
    if base not in KNOWN:
        raise ValueError(
            f"{field}={name!r} is not supported: its pixels may be others; supported are "
            f"{', '.join(KNOWN)}"
        )
    return base


def described(fields: Section, kind: str, side: int) -> Section:
    """`facts.image` that the fields of a processor class `kind` give, for a tower of `side` pixels.

    Raises:
      ValueError: naming the field, what came, and what was allowed.
    """
    check(fields)
    full = processor_of(kind, fields)
    pads = kind == LLAVA and bool(full.do_pad)
    # null is a value too: a flag that is off, and of what is needed nothing.
    for flag, *needed in NEEDED:
        for name in needed if getattr(full, flag) and (flag != "do_pad" or pads) else ():
            _allow(name, getattr(full, name), getattr(full, name) is not None, f"one with {flag}")
    made = dict(
        mean=color("image_mean", full.image_mean or 0.0),
        std=color("image_std", full.image_std or 1.0),
        resample=NUMBERED[int(full.resample or 0)],
        rescale=float(full.rescale_factor) if full.do_rescale else 1.0,
        normalize=bool(full.do_normalize),
    )
    if pads and not 0 <= min(made["mean"]) <= max(made["mean"]) <= 1:
        raise ValueError(f"image_mean={made['mean']}: do_pad pads with this color, from 0 to 1")
    size = dict(full.size) if full.do_resize else {}
    crop = dict(full.crop_size or {}) if full.do_center_crop else None
    if crop is not None and crop.keys() != {"height", "width"}:
        raise ValueError(f"crop_size={crop}: a whole number, or height and width")
    if not size:
        fit, resize, left = "crop", [0], None
    elif size.keys() == {"height", "width"}:
        fit, resize, left = "stretch", [size["height"], size["width"]], size
    elif size.keys() in ({"shortest_edge"}, {"shortest_edge", "longest_edge"}):
        fit, resize, left = "crop", [size[k] for k in sorted(size, reverse=True)], None
    else:
        raise ValueError(
            f"size={size} is not supported: a whole number, {{height, width}}, {{shortest_edge}} "
            "or {shortest_edge, longest_edge}"
        )
    if pads:
        if fit == "stretch" and resize[0] != resize[1]:
            raise ValueError(f"size={size}: do_pad makes squares: give a square")
        fit, resize = "pad", [min(resize)]
        left = dict(height=resize[0], width=resize[0]) if size else None
    check_side(crop or left, side, fields, size=size, crop=crop)
    largest = largest_edge(side)
    _allow("size", size, max(resize) <= largest, f"at most {largest} for a tower of {side} pixels")
    check_padding(full, side, kind)
    if fit == "stretch" and resize[0] == resize[1]:
        resize = resize[:1]
    return made | dict(fit=fit, resize=[] if resize == [side] else resize)


def check(fields: Section) -> None:
    """ValueError for a field that nothing here knows, or that has no value of its kind."""
    for name, value in fields.items():
        if name == "auto_map":
            if isinstance(value, Mapping) and not {"AutoImageProcessor", "AutoFeatureExtractor"} & {
                *value
            }:
                continue
            raise ValueError(
                f"auto_map={value!r:.120}: images are prepared by code beside the weights, which "
                "is not run; remove the field if the class of transformers does the same"
            )
        if value is None or name in OTHER or (value is False and name not in READ):
            continue
        if name not in READ:
            raise ValueError(
                f"{name}={value!r:.80} is not supported: the pixels may depend on it; remove the "
                f"field if they do not. Fields that are read: {', '.join(READ)}"
            )
        if name in FLAGS or name == "default_to_square":
            _allow(name, value, isinstance(value, bool), "true or false")
        elif name in SIZES:
            several = list(value.values()) if isinstance(value, Mapping) else value
            several = several if isinstance(several, list) else [several]
            _allow(name, value, all(map(_whole, several)) and several, "whole numbers above 0")
            _allow(name, value, not isinstance(value, list) or len(value) == 2, "two numbers")
        elif name == "resample":
            known = ", ".join(f"{k} ({v})" for k, v in sorted(NUMBERED.items()))
            _allow(name, value, type(value) is int and value in NUMBERED, known)
        elif name == "rescale_factor":
            _allow(name, value, _number(value) and value > 0, "a number above 0")
        else:
            color(name, value)
            low = name == "image_std" and min(color(name, value)) <= 0
            _allow(name, value, not low, "three numbers above 0")


def color(name: str, value: Any) -> list[float]:
    """Three numbers for red, green and blue; one number stands for all three."""
    several = list(value) if isinstance(value, (list, tuple)) else [value] * 3
    _allow(name, value, len(several) == 3 and all(map(_number, several)), "three numbers")
    return [float(x) for x in several]


def _allow(name: str, value: Any, right: Any, allowed: str) -> None:
    if not right:
        raise ValueError(f"{name}={value!r:.80}: expected {allowed}")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and type(value) is not bool and math.isfinite(value)


def _whole(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 10_000


def processor_of(kind: str, fields: Section) -> Any:
    """transformers' own processor of a class with fields; what is absent has its default."""
    # Deferred: transformers takes seconds to import.
    import transformers

    chosen = {k: v for k, v in fields.items() if k in READ}
    try:
        return getattr(transformers, f"{kind}Pil")(**chosen)
    except (ValueError, TypeError, KeyError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"transformers cannot make a {kind} of it ({said})") from None


def check_side(
    left: Section | None, side: int, fields: Section, *, size: Section, crop: Section | None
) -> None:
    """ValueError unless every image becomes `side` x `side`."""
    if left is None:
        raise ValueError(
            f"size={size or 'none'} and no do_center_crop: images keep their shape, and the tower "
            f"takes {side} x {side} pixels; set do_center_crop with crop_size={side}, or size="
            f"{{'height': {side}, 'width': {side}}}"
        )
    if (left["height"], left["width"]) != (side, side):
        field = "size" if crop is None else "crop_size"
        absent = "" if field in fields else ", which is absent and has the default of its class"
        raise ValueError(
            f"{field}={left}{absent}: the tower takes {side} x {side} pixels (image_size of its "
            f"config.json): set {field} to {side}"
        )


def check_padding(full: Any, side: int, kind: str) -> None:
    """ValueError where pixels would be added to the finished image."""
    size = dict(full.pad_size or {})
    if full.do_pad and size not in ({}, dict(height=side, width=side)):
        raise ValueError(
            f"pad_size={size} is not supported with a {kind}: a tower of {side} x {side} pixels "
            "has no room for more; remove it"
        )


def files(image: Section, side: int) -> Section:
    """The fields of a preprocessor_config.json that make transformers prepare images so.

    The inverse of `described`: `image` is `facts.image`, `side` the tower's.
    """
    image = OLDER | image
    fit, resize = image["fit"], list(image["resize"])
    first, *second = resize if resize not in ([], [0]) else [side]
    if fit == "crop":
        size = dict(shortest_edge=first) | ({"longest_edge": second[0]} if second else {})
    else:
        size = dict(height=first, width=(second or [first])[0])
    kinds = dict(pad=LLAVA, crop="CLIPImageProcessor", stretch="SiglipImageProcessor")
    made = dict(
        image_processor_type=kinds[fit],
        do_convert_rgb=True,
        do_resize=resize != [0],
        size=size,
        resample=int(FILTERS[image["resample"]]),
        do_center_crop=fit != "stretch" or bool(resize),
        crop_size=dict(height=side, width=side),
        do_rescale=image["rescale"] != 1,
        rescale_factor=image["rescale"],
        do_normalize=image["normalize"],
        image_mean=list(image["mean"]),
        image_std=list(image["std"]),
    )
    return made | ({"do_pad": True} if fit == "pad" else {})


def configured(image: Any) -> Section:
    """The fields `image_*` of `config.data` that `facts.image` of a model folder stands for.

    Raises:
      ValueError: for a description with other fields.
    """
    known = {*CLIP, *OLDER}
    if not isinstance(image, dict) or not {*CLIP} <= image.keys() <= known:
        raise ValueError(
            f"facts.image={image!r:.200} of a model folder: an object with {', '.join(known)} was "
            "expected; convert the model again"
        )
    image = OLDER | image
    for name, kind in dict(fit=str, resample=str, mean=list, std=list, resize=list).items():
        _allow(f"facts.image.{name}", image[name], isinstance(image[name], kind), kind.__name__)
    return {f"image_{name}": tuple(x) if isinstance(x, list) else x for name, x in image.items()}


def of_data(data: Any) -> Section:
    """`facts.image` of a run's `config.data`, which lacks fields that are younger than the run."""
    known = {*CLIP, *OLDER}
    image = {name: data[f"image_{name}"] for name in known if f"image_{name}" in data}
    return OLDER | {n: list(x) if isinstance(x, (list, tuple)) else x for n, x in image.items()}
