# SPDX-License-Identifier: Apache-2.0
"""Chips and LLMs of your own, from a small TOML or JSON file.

    [chips.mine]
    peak_tflops = {bf16 = 100.0, int8 = 200.0}   # dense
    gb_per_s = 900.0                             # of its memory
    memory_gib = 22.5                            # what a program can use
    link_gb_per_s = 32.0                         # optional: sent to its neighbors in a ring
    price_per_hour = 0.8                         # optional: dollars
    source = "data sheet, page 3"

    [llms.mine-3b]
    billions = 3.0                               # optional: N of the law, counted if left out
    vocab = 151936
    depth = 36
    width = 2048
    mlp = 11008
    heads = 16
    kv_heads = 2                                 # optional, as are head_size and the other fields

The fields of an LLM are those of config.llm (configs/base.py).
"""

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_jax.cost.chips import CHIPS, GIB, Chip
from vlm_jax.cost.parameters import llm_parameters
from vlm_jax.errors import suggestion
from vlm_jax.models.sizes import LLMSize

CHIP_FIELDS = ("peak_tflops", "gb_per_s", "memory_gib", "source")
CHIP_OPTIONS = ("link_gb_per_s", "price_per_hour")
LLM_FIELDS = ("vocab", "depth", "width", "mlp", "heads")


@dataclasses.dataclass(frozen=True)
class Catalog:
    """Chips by name, and name -> (billions of parameters, shape) of LLMs."""

    chips: Mapping[str, Chip] = dataclasses.field(default_factory=dict)
    llms: Mapping[str, tuple[float, LLMSize]] = dataclasses.field(default_factory=dict)

    def chip(self, name: str) -> Chip | None:
        """The chip of this name, the file's before the built-in ones; None if there is none."""
        return self.chips.get(name) or CHIPS.get(name)


def read(path: str | Path) -> Catalog:
    """The chips and LLMs of a .toml or .json file.

    Raises OSError if there is no such file, and ValueError, with the place, for what is wrong in
    it.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        fields = json.loads(text) if Path(path).suffix == ".json" else tomllib.loads(text)
    except ValueError as problem:
        raise ValueError(f"{path} is neither TOML nor JSON as its name says: {problem}") from None
    known(fields, ("chips", "llms"), str(path))
    return Catalog(
        {name: _chip(name, x, f"{path} chips.{name}") for name, x in tables(fields, "chips", path)},
        {name: _llm(x, f"{path} llms.{name}") for name, x in tables(fields, "llms", path)},
    )


def tables(fields: Mapping[str, Any], kind: str, path: Any) -> list[tuple[str, Any]]:
    """Name and fields of each table of a kind; ValueError if one is no table."""
    found = fields.get(kind, {})
    if not isinstance(found, Mapping) or not all(isinstance(x, Mapping) for x in found.values()):
        raise ValueError(f"{path} {kind}: a table of tables is needed, such as [{kind}.mine]")
    return list(found.items())


def known(fields: Mapping[str, Any], names: tuple[str, ...], place: str) -> None:
    """Raises ValueError for a field that is not one of `names`, with the nearest."""
    for name in fields:
        if name not in names:
            hint = suggestion(name, names)
            raise ValueError(f"{place}: unknown field {name}{hint} (there are {', '.join(names)})")


def needed(fields: Mapping[str, Any], names: tuple[str, ...], place: str) -> None:
    """Raises ValueError for fields that are missing."""
    if missing := [name for name in names if name not in fields]:
        raise ValueError(f"{place}: {', '.join(missing)} missing")


def positive(value: Any, place: str) -> float:
    """A number above 0; ValueError with the place otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise ValueError(f"{place}: {value!r} is not a number above 0")
    return float(value)


def _chip(name: str, fields: Mapping[str, Any], place: str) -> Chip:
    known(fields, CHIP_FIELDS + CHIP_OPTIONS, place)
    needed(fields, CHIP_FIELDS, place)
    peaks = fields["peak_tflops"]
    peaks = peaks if isinstance(peaks, Mapping) else {"bf16": peaks}
    needed(peaks, ("bf16",), f"{place} peak_tflops")
    flops = {kind: 1e12 * positive(x, f"{place} peak_tflops.{kind}") for kind, x in peaks.items()}
    options = {k: positive(fields[k], f"{place} {k}") for k in CHIP_OPTIONS if k in fields}
    return Chip(
        name,
        flops.pop("bf16"),
        1e9 * positive(fields["gb_per_s"], f"{place} gb_per_s"),
        GIB * positive(fields["memory_gib"], f"{place} memory_gib"),
        2,
        str(fields["source"]),
        flops,
        1e9 * options.get("link_gb_per_s", 0.0),
        options.get("price_per_hour"),
    )


def _llm(fields: Mapping[str, Any], place: str) -> tuple[float, LLMSize]:
    sizes = {field.name: field for field in dataclasses.fields(LLMSize)}
    known(fields, ("billions", *sizes), place)
    needed(fields, LLM_FIELDS, place)
    shape = {name: value for name, value in fields.items() if name != "billions"}
    for name in LLM_FIELDS:
        positive(shape[name], f"{place} {name}")
    usual = dict(
        kv_heads=shape["heads"],
        head_size=shape["width"] // shape["heads"],
        rope_theta=1e4,
        norm_eps=1e-6,
        qkv_bias=False,
        tied_embeddings=False,
    )
    try:
        llm = LLMSize(**(usual | shape))
    except (ValueError, TypeError) as problem:
        raise ValueError(f"{place}: {problem}") from None
    nominal = fields.get("billions", llm_parameters(llm) / 1e9)
    return positive(nominal, f"{place} billions"), llm
