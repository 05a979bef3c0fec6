# SPDX-License-Identifier: Apache-2.0
"""The table of visual-token compressors: from the patches of an image to V tokens of LLM width."""

from typing import Any

from flax import nnx

from vlm_jax.compressors.downsample import Downsample
from vlm_jax.compressors.m3 import M3
from vlm_jax.compressors.matryoshka import Matryoshka
from vlm_jax.compressors.mqt import MQT
from vlm_jax.compressors.none import Projector
from vlm_jax.compressors.pool import AveragePool
from vlm_jax.compressors.prumerge import PruMerge, PruMergePlus
from vlm_jax.compressors.quecc import QueCC
from vlm_jax.compressors.token_packer import TokenPacker

COMPRESSORS: dict[str, type[nnx.Module]] = {
    "downsample": Downsample,
    "m3": M3,
    "mqt": MQT,
    "none": Projector,
    "pool": AveragePool,
    "prumerge": PruMerge,
    "prumerge_plus": PruMergePlus,
    "quecc": QueCC,
    "token_packer": TokenPacker,
}


def serves_any_tokens(kind: str) -> bool:
    """Whether one model of this kind serves several V: `compressor.tokens` then is of requests, not
    of training."""
    return issubclass(COMPRESSORS.get(kind, nnx.Module), Matryoshka)


def build(
    kind: str,
    *,
    tokens: int,
    side: int,
    width: int,
    levels: int,
    llm_width: int,
    heads: int,
    query: str,
    rngs: nnx.Rngs,
    **options: Any,
) -> nnx.Module:
    """The compressor that `kind` names, with fresh weights on the current mesh.

    It maps `levels` feature levels of `width` channels on a `side` x `side` patch grid, patches
    window-major in its `window`, to `tokens` visual tokens of `llm_width`. Each method takes those
    `options` that it has. ValueError with the choices: an unknown kind, a token count that the
    method cannot give, heads that do not divide.
    """
    if kind not in COMPRESSORS:
        raise ValueError(f"compressor.kind={kind!r}: choose one of {sorted(COMPRESSORS)}")
    return COMPRESSORS[kind](
        tokens=tokens,
        side=side,
        width=width,
        levels=levels,
        llm_width=llm_width,
        heads=heads,
        query=query,
        rngs=rngs,
        **{name: options[name] for name in COMPRESSORS[kind].options if name in options},
    )
