# SPDX-License-Identifier: Apache-2.0
"""The table of visual-token compressors: from the patches of an image to V tokens of LLM width.

A method is a folder: its description (`__init__.py`), without JAX, and its flax module.
"""

from typing import Any

from vlm_jax.compressors.cdpruner import CDPrunerMethod
from vlm_jax.compressors.divprune import DivPruneMethod
from vlm_jax.compressors.downsample import DownsampleMethod
from vlm_jax.compressors.elastic import Elastic
from vlm_jax.compressors.fwd2bot import Fwd2BotMethod
from vlm_jax.compressors.llava_mini import LlavaMiniMethod
from vlm_jax.compressors.m3 import M3Method
from vlm_jax.compressors.method import Method
from vlm_jax.compressors.mmtok import MMTokMethod
from vlm_jax.compressors.mqt import MQTMethod
from vlm_jax.compressors.none import NoneMethod
from vlm_jax.compressors.pixel_unshuffle import PixelUnshuffleMethod
from vlm_jax.compressors.pool import PoolMethod
from vlm_jax.compressors.prumerge import PruMergeMethod, PruMergePlusMethod
from vlm_jax.compressors.quecc import QueCCMethod
from vlm_jax.compressors.random import RandomMethod
from vlm_jax.compressors.token_packer import TokenPackerMethod
from vlm_jax.compressors.uniform import UniformMethod
from vlm_jax.compressors.visionzip import VisionZipMethod
from vlm_jax.compressors.vispruner import VisPrunerMethod
from vlm_jax.compressors.voco import VocoMethod

COMPRESSORS: dict[str, type[Method]] = {
    method.kind: method
    for method in (
        CDPrunerMethod,
        DivPruneMethod,
        DownsampleMethod,
        Fwd2BotMethod,
        LlavaMiniMethod,
        M3Method,
        MMTokMethod,
        MQTMethod,
        NoneMethod,
        PixelUnshuffleMethod,
        PoolMethod,
        PruMergeMethod,
        PruMergePlusMethod,
        QueCCMethod,
        RandomMethod,
        TokenPackerMethod,
        UniformMethod,
        VisionZipMethod,
        VisPrunerMethod,
        VocoMethod,
    )
}

# Those that one training can make for several V.
ELASTIC = [kind for kind, method in COMPRESSORS.items() if issubclass(method, Elastic)]


def named(kind: str) -> type[Method]:
    """The method of this name. Raises ValueError, with the choices, for an unknown name."""
    if kind not in COMPRESSORS:
        raise ValueError(f"compressor.kind={kind!r}: choose one of {sorted(COMPRESSORS)}")
    return COMPRESSORS[kind]


def describe(section: Any) -> Method:
    """The compressor that a `compressor` section describes: `kind`, and the fields it reads.

    Raises ValueError for `elastic` with a method that has one V, or needs none.
    """
    method = named(section["kind"])
    if (elastic := section.get("elastic", ())) and not issubclass(method, Elastic):
        raise ValueError(
            f"compressor.elastic={tuple(elastic)}: compressor.kind={method.kind!r} "
            f"{method.inelastic}; set compressor.elastic=(), or choose one of {ELASTIC}"
        )
    return method.of(section)
