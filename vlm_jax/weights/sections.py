# SPDX-License-Identifier: Apache-2.0
"""The config.json of a model folder: every field is of its kind, none is missing or strange.

What a field may be is what the description that has it says: its annotation there.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlm_jax.compressors import COMPRESSORS
from vlm_jax.models.sizes import LLMSize, ViTSize
from vlm_jax.weights import ends
from vlm_jax.weights.classes import DEEPEST, allow
from vlm_jax.weights.preprocessor import FILTERS, OLDER
from vlm_jax.weights.values import LARGEST, finite, number, table, text, value_text, whole

MOST = {"depth": DEEPEST, "image_size": 2**16, "patch_size": 2**16}
ZERO = ("compressor.tokens", "compressor.queries")  # sizes of which 0 means something


def check(fields: dict[str, Any]) -> None:
    """ValueError with the first field of a model folder's config.json that cannot be read."""
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
    """ValueError with the first field of `facts.image` that cannot be read."""
    for name in ("mean", "std"):
        three(f"facts.image.{name}", image.get(name), positive=name == "std")
    allow("facts.image.fit", image.get("fit"), ("pad", "crop", "stretch"))
    # What older folders lack has the value with which nothing changed.
    image = OLDER | image
    allow("facts.image.resample", image["resample"], tuple(FILTERS.values()))
    # 0 alone stands for no resizing.
    if image["resize"] not in ([0], (0,)):
        typed("facts.image.resize", image["resize"], tuple[int, ...])
    typed("facts.image.rescale", image["rescale"], float)
    typed("facts.image.normalize", image["normalize"], bool)


def check_model(fields: dict[str, Any]) -> None:
    """ValueError with the first field of the sections that make a model which cannot be read.

    A field of `vit` or `llm` that is absent gets the value that changed nothing when it was born.
    """
    for name, cls in (("vit", ViTSize), ("llm", LLMSize)):
        taken = dataclasses.fields(cls)
        born = {of.name: of.default for of in taken if of.default is not dataclasses.MISSING}
        needed = [of.name for of in taken if of.name not in born]
        section(name, fields, {of.name: of.type for of in taken}, needed)
        fields[name] = born | fields[name]
    section("compressor", fields, compressor_fields(), ("kind", "tokens"))
    allow("compressor.kind", fields["compressor"]["kind"], tuple(sorted(COMPRESSORS)))


def compressor_fields() -> dict[str, Any]:
    """Every field that some method reads, and of which kind it is: a folder has all of them."""
    found: dict[str, Any] = {"kind": str}
    for method in COMPRESSORS.values():
        found |= {of.name: of.type for of in dataclasses.fields(method)}
    return found | {"tokens": int}  # never a part of one, as a plan may ask for


def section(
    name: str, fields: dict[str, Any], kinds: Mapping[str, Any], needed: tuple[str, ...] | list[str]
) -> None:
    """ValueError unless a section has all that is needed, and what it has is of its kind."""
    found = table(name, fields.get(name))
    if absent := [key for key in needed if key not in found]:
        raise ValueError(f"{name} lacks {', '.join(absent)}: convert the model again")
    for key, value in found.items():
        if key not in kinds:
            raise ValueError(
                f"{name}.{value_text(key).strip(chr(39))} is no field that is known here: a newer "
                f"version made the folder, or another program; known are {', '.join(kinds)}"
            )
        typed(f"{name}.{key}", value, kinds[key])


def typed(name: str, value: Any, kind: Any) -> None:
    """ValueError unless a value is of a kind: int, float, bool, str, or a sequence of ints."""
    if kind is int:
        whole(name, value, least=int(name not in ZERO), most=MOST.get(name.split(".")[-1], LARGEST))
    elif kind is float:
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
    """ValueError unless there is a number for red, green and blue."""
    numbers = value if isinstance(value, list | tuple) else []
    good = [type(x) in (int, float) and finite(x) and (x > 0 or not positive) for x in numbers]
    if len(good) != 3 or not all(good):
        above = " above 0" if positive else ""
        raise ValueError(f"{name}={value_text(value)}: three finite numbers{above} are needed")
