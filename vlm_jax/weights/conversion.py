# SPDX-License-Identifier: Apache-2.0
"""Converts a model that was read into a folder: tokenizer, adapters, and a check of every tensor.

Tensors are processed one at a time, whatever the size of the model.
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.compressors import COMPRESSORS
from vlm_jax.models.pruning import prunes
from vlm_jax.weights import adapters, chats, folder, hf, names, processors, sources
from vlm_jax.weights.classes import within
from vlm_jax.weights.folder import Model
from vlm_jax.weights.methods import Wish


@dataclass(frozen=True)
class Converted:
    """The result of a conversion: `facts` as JSON values and `notes`, sentences for the user."""

    facts: dict[str, Any]
    notes: list[str]


def read_source(
    source: Path | None,
    *,
    vision: Path | ConfigDict | Model | None,
    llm: Path | None,
    wish: Wish,
) -> Model:
    """The published model of a folder, or of the folders of its parts, with its tensors unread.

    `vision` is as in `sources.assemble`.

    Raises:
      FileNotFoundError, ValueError: for folders without weights, and for flags that do not fit.
    """
    compresses = wish.kind is not None and COMPRESSORS[wish.kind].compresses
    if wish.replace and compresses and wish.tokens is None:
        raise ValueError(f"--compressor={wish.kind} needs --tokens=V")
    if source is None:
        if not (vision and llm):
            raise ValueError("give --from=DIR, or --vision=DIR and --llm=DIR")
        return sources.assemble(vision, llm, wish)
    if llm:
        raise ValueError("--from=DIR is a whole model: leave --llm out")
    if source.suffix == ".gguf":
        raise ValueError(f"--from={source} is a language model alone: give it as --llm")
    if not source.is_dir():
        raise FileNotFoundError(f"there is no folder --from={source}")
    if isinstance(vision, ConfigDict | Model):
        raise ValueError(
            f"--from={source}: its tower is a published one, or a folder of such: give that as "
            "--vision=DIR"
        )
    return sources.llava(source, vision=vision, wish=wish)


def convert(
    model: Model,
    target: Path,
    *,
    name: str,
    published: Path | None = None,
    tokenizer: Path | None = None,
    adapter: Path | None = None,
    to_hf: bool = False,
    dtype: str | None = None,
    allow_missing: Sequence[str] = (),
    allow_surplus: Sequence[str] = (),
    add_image_token: bool = False,
    seed: int = 0,
) -> Converted:
    """Writes a model as the folder `target`.

    Args:
      name: what errors call the model.
      published: the folder whose files say how a conversation is written.
      tokenizer: a folder that goes before the model's own.
      adapter: the folder of a published LoRA adapter, merged into the model.
      to_hf: make a llava-hf folder where that can hold the model; else a model folder is made.
      dtype: of the weights, as `folder.kind_of` names it; as they are stored unless given.
      allow_missing, allow_surplus: patterns of tensors that may stay fresh or be left out.
      add_image_token: to a tokenizer that has none, of a llava-hf folder.
      seed: of fresh weights.
    Raises:
      OSError: where the disk has no room, before anything is written.
      ValueError: for tensors that are missing, left over or of another shape.
    """
    chats.find_tokenizer(model, published=published, tokenizer=tokenizer)
    patterns = dict(allow_missing=list(allow_missing), allow_surplus=list(allow_surplus))
    model.tie()
    apart: list[list[str]] = [[], []]
    if adapter:
        apart = adapters.merge(model, adapter, **patterns)
    with within(name):
        missing, surplus = model.check(**patterns)
    if missing:
        model.tensors |= folder.fresh(model.size(), missing, seed=seed)
    model.notes |= {
        name: list(of) for name, of in (("fresh", missing), ("left_out", surplus)) if of
    }
    reason = hf.inexpressible(model) if to_hf else None
    check_disk_space(
        target, sum(x.dtype.itemsize * math.prod(x.shape) for x in model.tensors.values())
    )
    as_hf = to_hf and reason is None
    if as_hf:
        words = partial(chats.export, model, add_image_token=add_image_token)
        hf.write(model, target, words=words, dtype=dtype)
    else:
        folder.write(model, target, dtype=dtype)
    facts = dict(
        to=str(target),
        layout="llava-hf" if as_hf else folder.MODEL_TYPE,
        tensors=len(model.tensors),
        parameters=sum(math.prod(x.shape) for x in model.tensors.values()),
        compressor=model.compressor["kind"],
        visual_tokens=model.compressor["tokens"],
        **(dict(pruning=model.pruning["kind"]) if prunes(model.pruning) else {}),
    )
    notes = [about] if (about := model.notes.get("images")) else []
    if reason:
        notes.append(f"{target} is a model folder, not a llava-hf one: {reason}")
    if model.tokenizer is None or not folder.has_tokenizer(model.tokenizer):
        where = processors.looked_for(model)
        notes.append(f"no tokenizer was found{where}: to generate, repeat with --tokenizer=DIR")
    if about := model.notes.get("chat_template"):
        notes.append(about)
    for kind in ("dequantized", "replaced", "new", "tower", "untied", "adapted"):
        if about := model.notes.get(kind):
            notes.append(f"{kind}: {about}")
    lists = {"fresh": missing, "left out": surplus + apart[1], "of the adapter absent": apart[0]}
    notes += [
        f"{len(of)} tensors {kind}: {names.names_text(of)}" for kind, of in lists.items() if of
    ]
    return Converted(facts, notes)


def check_disk_space(target: Path, size: int) -> None:
    """Raises OSError unless the disk of `target` has `size` bytes left."""
    parent = next(p for p in (target.absolute(), *target.absolute().parents) if p.exists())
    if (free := shutil.disk_usage(parent).free) < size:
        raise OSError(
            f"{target} needs about {size / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB left: "
            "make room, or choose another disk"
        )
