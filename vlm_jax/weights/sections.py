# SPDX-License-Identifier: Apache-2.0
"""Checks the config.json of a model folder: types of fields, missing and unknown fields.

The type of a field is its annotation in the description (`LLMSize`, `ViTSize`, methods).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlm_jax.compressors import COMPRESSORS
from vlm_jax.data.images import FILTERS
from vlm_jax.models.pruning import NONE, PRUNINGS
from vlm_jax.models.sizes import LLMSize, ViTSize
from vlm_jax.weights import ends
from vlm_jax.weights.classes import DEEPEST, allow
from vlm_jax.weights.preprocessor import OLDER
from vlm_jax.weights.values import LARGEST, finite, number, table, text, value_text, whole

MOST = {
    "depth": DEEPEST,
    "prefusion": DEEPEST,
    "text_depth": DEEPEST,
    "image_size": 2**16,
    "patch_size": 2**16,
}
ZERO = (
    "compressor.tokens",
    "compressor.queries",
    "compressor.prefusion",
    "compressor.selection_seed",
    "pruning.dropped",
)  # sizes of which 0 means something


def check(fields: dict[str, Any]) -> None:
    """Raises ValueError with the first invalid field of a model folder's config.json."""
    check_model(fields)
    facts = table("facts", fields.get("facts"))
    check_image(table("facts.image", facts.get("image")))
    text("facts.template", facts.get("template"))
    whole("facts.max_length", facts.get("max_length"))
    if facts.get("image_token") is not None:
        whole("facts.image_token", facts["image_token"], least=0)
    ends.check(table("facts.ends", facts.get("ends", {})))
    table("notes", fields.get("notes", {}))


def check_image(image: dict[str, Any]) -> None:
    """Raises ValueError with the first invalid field of `facts.image`."""
    for name in ("mean", "std"):
        three(f"facts.image.{name}", image.get(name), positive=name == "std")
    allow("facts.image.fit", image.get("fit"), ("pad", "crop", "stretch"))
    # Fields that older folders lack have the value that changes nothing.
    image = OLDER | image
    allow("facts.image.resample", image["resample"], tuple(FILTERS))
    # 0 alone stands for no resizing.
    if image["resize"] not in ([0], (0,)):
        typed("facts.image.resize", image["resize"], tuple[int, ...])
    typed("facts.image.rescale", image["rescale"], float)
    typed("facts.image.normalize", image["normalize"], bool)


def check_model(fields: dict[str, Any]) -> None:
    """Raises ValueError with the first invalid field of the sections that describe a model.

    A missing field of `vit` or `llm` that has a default gets it.
    """
    for name, cls in (("vit", ViTSize), ("llm", LLMSize)):
        size_fields = dataclasses.fields(cls)
        defaults = {f.name: f.default for f in size_fields if f.default is not dataclasses.MISSING}
        needed = [f.name for f in size_fields if f.name not in defaults]
        section(name, fields, {f.name: f.type for f in size_fields}, needed)
        fields[name] = defaults | fields[name]
    if "pruning" in fields:
        ints = tuple[int, ...]
        kinds = dict(kind=str, layers=ints, tokens=ints, weight=float, dropped=float)
        section("pruning", fields, kinds, [name for name in kinds if name != "dropped"])
        fields["pruning"] = NONE | fields["pruning"]  # older folders have no `dropped`
        allow("pruning.kind", fields["pruning"]["kind"], ("none", *sorted(PRUNINGS)))
    section("compressor", fields, compressor_fields(), ("kind", "tokens"))
    allow("compressor.kind", fields["compressor"]["kind"], tuple(sorted(COMPRESSORS)))


def compressor_fields() -> dict[str, Any]:
    """The fields of all methods and their types; a folder has all of them."""
    kinds: dict[str, Any] = {"kind": str}
    for method in COMPRESSORS.values():
        kinds |= {f.name: f.type for f in dataclasses.fields(method)}
    return kinds | {"tokens": int}  # not fractional, as in a plan


def section(
    name: str, fields: dict[str, Any], kinds: Mapping[str, Any], needed: tuple[str, ...] | list[str]
) -> None:
    """Raises ValueError unless a section has all needed fields, and all fields have their type."""
    values = table(name, fields.get(name))
    if missing := [key for key in needed if key not in values]:
        raise ValueError(f"{name} lacks {', '.join(missing)}: convert the model again")
    for key, value in values.items():
        if key not in kinds:
            raise ValueError(
                f"{name}.{value_text(key).strip(chr(39))} is not a known field: a newer "
                f"version made the folder, or another program; known are {', '.join(kinds)}"
            )
        typed(f"{name}.{key}", value, kinds[key])


def typed(name: str, value: Any, kind: Any) -> None:
    """Raises ValueError unless a value has the type `kind`: int, float, bool, str or ints."""
    if kind is int:
        whole(name, value, least=int(name not in ZERO), most=MOST.get(name.split(".")[-1], LARGEST))
    elif kind is float:
        if value != 0 or name not in ZERO:
            number(name, value)
    elif kind is bool:
        if type(value) is not bool:
            raise ValueError(f"{name}={value_text(value)}: true or false is needed")
    elif kind is str:
        text(name, value)
    else:
        if not isinstance(value, list | tuple) or len(value) > DEEPEST:
            raise ValueError(f"{name}={value_text(value)}: a list of whole numbers is needed")
        for part in value:
            whole(name, part)


def three(name: str, value: Any, *, positive: bool) -> None:
    """Raises ValueError unless there is a number for red, green and blue."""
    numbers = value if isinstance(value, list | tuple) else []
    good = [type(x) in (int, float) and finite(x) and (x > 0 or not positive) for x in numbers]
    if len(good) != 3 or not all(good):
        above = " above 0" if positive else ""
        raise ValueError(f"{name}={value_text(value)}: three finite numbers{above} are needed")
