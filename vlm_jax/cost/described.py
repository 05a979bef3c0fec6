# SPDX-License-Identifier: Apache-2.0
"""Sizes of models read from configuration files, which are run and not imported."""

import re
import runpy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_jax.cost.parameters import llm_parameters
from vlm_jax.models.pruning import prunes
from vlm_jax.models.sizes import LLMSize, ViTSize

PACKAGE = Path(__file__).resolve().parents[1]
# Next to the package in a checkout; a wheel has its own copy (setup.py). The folder that holds
# `configs`, which is not the package itself, goes on the path of a configuration that is run.
INSTALLED, CHECKOUT = PACKAGE / "shipped" / "configs", PACKAGE.parent / "configs"
CONFIGS = INSTALLED if INSTALLED.is_dir() else CHECKOUT


def config_path(path: str | Path) -> Path:
    """The path of a configuration; `configs/NAME.py` that does not exist is the package's own."""
    shipped = CONFIGS.parent / path
    in_configs = Path(path).parts[:1] == ("configs",)
    return shipped if in_configs and shipped.is_file() and not Path(path).is_file() else Path(path)


def import_paths(path: Path) -> tuple[str, str]:
    """The first and the last entry of sys.path for a configuration that imports `configs`."""
    return str(path.resolve().parent.parent), str(CONFIGS.parent)


def load(path: str | Path, name: str) -> Any:
    """The object `name` of a configuration file, which may import its neighbors.

    Raises ValueError if there is no such file.
    """
    path, before = config_path(path), list(sys.path)
    if not path.is_file():
        raise ValueError(f"no configuration at {path}: name a file that exists")
    first, last = import_paths(path)
    sys.path[:] = [first, *before, last]
    try:
        return runpy.run_path(str(path))[name]
    finally:
        sys.path[:] = before


def base() -> Any:
    """The configuration that every run starts from: the encoder is CLIP ViT-L/14-336."""
    return load(CONFIGS / "base.py", "get_config")()


def open_config(config: Any = None) -> Any:
    """The given configuration, the one at a path, or configs/base.py.

    Raises ValueError if there is no such file.
    """
    if config is None:
        return base()
    return load(config, "get_config")() if isinstance(config, (str, Path)) else config


@dataclass(frozen=True)
class Models:
    """The models to choose from under a configuration.

    `llms` is name -> (billions of parameters, shape): those of its grid if it has one (`own`), else
    the published sizes. The other fields describe its encoder and its compressor, whose `elastic`
    names the V that a model gives, if it gives several.
    """

    llms: Mapping[str, tuple[float, LLMSize]]
    own: bool
    vit: ViTSize
    kind: str
    query: str
    heads: int
    elastic: tuple[int, ...] = ()


def models(config: Any = None) -> Models:
    """The models of a configuration, of the one at a path, or of configs/base.py.

    ValueError for one that prunes: a plan chooses V, and a pruning leaves some of them out.
    """
    config = open_config(config)
    if prunes(config.pruning):
        raise ValueError(
            f"pruning.kind={config.pruning.kind!r}: a plan prices models in which every layer "
            "reads all V visual tokens; set pruning.kind='none'"
        )
    own = len(config.grid.llms) > 0
    return Models(
        grid_llms(config.llm, config.grid.llms) if own else published_llms(),
        own,
        ViTSize.of(config.vit),
        config.compressor.kind,
        config.compressor.query,
        config.compressor.heads,
        tuple(config.compressor.elastic),
    )


def published_llms() -> dict[str, tuple[float, LLMSize]]:
    """Name -> (nominal billions of parameters, shape) of configs/sizes.py."""
    published = load(CONFIGS / "sizes.py", "LLM")
    nominal = {name: float(re.sub(r".*?([\d.]+)b$", r"\1", name)) for name in published}
    return {name: (nominal[name], LLMSize.of(fields)) for name, fields in published.items()}


def grid_llms(base: Any, sizes: Any) -> dict[str, tuple[float, LLMSize]]:
    """Name -> (billions of parameters, shape) of a grid: `base` with the fields of each size.

    ValueError for one that starts from a folder and does not say its size, which is known there.
    """
    for name, entry in sizes.items():
        if entry.get("start_from") and "depth" not in entry:
            raise ValueError(
                f"grid.llms.{name} has its size from the folder start_from={entry['start_from']}, "
                "which is not read here: write the fields of llm beside it, as "
                "configs/demo_llm.py does"
            )
    shapes = {name: LLMSize.of({**base, **fields}) for name, fields in sizes.items()}
    return {name: (llm_parameters(llm) / 1e9, llm) for name, llm in shapes.items()}
