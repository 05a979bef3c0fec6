# SPDX-License-Identifier: Apache-2.0
"""Training that starts from a model that is there: its sizes, its weights, its tokenizer."""

import dataclasses
import hashlib
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlm_jax import compressors, progress
from vlm_jax.compressors.method import Method
from vlm_jax.models import vlm
from vlm_jax.models.llm import LLM
from vlm_jax.models.sizes import LLMSize, VLMSize
from vlm_jax.models.vlm import VLM
from vlm_jax.weights import folder, names, preprocessor
from vlm_jax.weights.stored import Stored


def adopt(config: ConfigDict, model: folder.Model) -> ConfigDict:
    """The configuration with encoder, LLM and tokenizer of `model`, which `config.start_from`
    names, and with how that encoder's images are prepared.

    A model without compression (kind none) may get any compressor, which reads
    `config.vit.levels`: a fresh one, or one whose only weights are the projector that is there. Any
    other model has a trained one, and the configuration must name it.

    Raises:
      ValueError: for another compressor.
    """
    config = config.copy_and_resolve_references()
    vit, compressor = model.vit, folder.PLAIN | model.compressor
    if replaced(compressors.named(config.compressor.kind), model):
        vit = vit | dict(levels=config.vit.levels, keep_class=False, final_norm=False)
    elif changed := [
        k
        for k, v in compressor.items()
        if matters(k, compressor, config.compressor) and not same(config.compressor[k], v)
    ]:
        asked = {k: config.compressor[k] for k in changed}
        raise ValueError(
            f"start_from={config.start_from} has the compressor {compressor}, the configuration "
            f"says {asked}: give the same, or start from a model without compression"
        )
    config.data.update(prepared(config, model))
    config.vit.update(vit)
    config.llm.update(model.llm)
    if not config.data.tokenizer and model.tokenizer:
        config.data.tokenizer = str(model.tokenizer)
    return config


def prepared(config: ConfigDict, model: folder.Model) -> dict[str, Any]:
    """`data.image_*` as the folder prepares images for its encoder.

    To pad or to crop is the recipe's choice, as LLaVA crops in align and pads in finetune; to
    stretch is the encoder's.
    """
    theirs, ours = model.facts["image"], config.data.image_fit
    image = preprocessor.configured(theirs)
    if (fit := image["image_fit"]) == ours:
        return image
    chosen, reason = (ours, "data.image_fit") if fit != "stretch" else (fit, config.start_from)
    progress.say(
        f"start: images are made square by {chosen!r}, as {reason} says; data.image_fit is "
        f"{ours!r}, and {config.start_from} was made with {fit!r}"
    )
    return preprocessor.configured(preprocessor.refitted(theirs, chosen))


def replaced(method: type[Method], model: folder.Model) -> bool:
    """Whether a compressor of this method is a fresh one in place of none."""
    old = compressors.named(model.compressor["kind"])
    return not old.compresses and method is not old


def matters(field: str, theirs: dict[str, Any], ours: Any) -> bool:
    """Whether a field of the folder's section must be that of the configuration's.

    A model of one V may go on as one of several: no weight depends on V there.
    """
    method = compressors.named(theirs["kind"])
    if field == "tokens":
        return not (method.any_tokens or ours["elastic"])  # of requests
    if field == "elastic":
        return bool(theirs["elastic"])
    return field == "kind" or field in (of.name for of in dataclasses.fields(method))


def keeps_projector(size: VLMSize, model: folder.Model) -> bool:
    """Whether the compressor in place of none has the weights that the folder's projector has, and
    reads what it was trained on."""
    return (
        size.compressor.projected
        and size.vit.levels[-1:] == tuple(model.vit["levels"])[-1:]
        and not (model.vit["keep_class"] or model.vit["final_norm"])
    )


def same(ours: Any, theirs: Any) -> bool:
    """Whether two values of a configuration are equal, as JSON would give them back."""
    sequences = isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple))
    return list(ours) == list(theirs) if sequences else ours == theirs


def load(size: VLMSize, model: folder.Model, *, start_from: str, seed: int) -> VLM:
    """`model` as the training of an adopted configuration starts from it, on the current mesh, in
    float32; `start_from` names it.

    ValueError for another LLM than the folder's.
    """
    same_llm(size.llm, model, start_from=start_from)
    model.check()
    shapes = vlm.shapes(size)
    if not replaced(type(size.compressor), model):
        return folder.place(shapes, names.model_table(shapes), model.tensors)
    if size.compressor.clip:
        raise ValueError(
            f"compressor.kind={size.compressor.kind!r} reads questions with CLIP's text tower, "
            f"which start_from={start_from} does not have: convert it first (`vlm-jax convert "
            f"--from={start_from} --compressor={size.compressor.kind} --tokens=V "
            "--text-tower=DIR`)"
        )
    kept = keeps_projector(size, model)
    progress.say(
        f"start: encoder{', projector' * kept} and LLM of {start_from}, "
        + f"{'as' if kept else 'a fresh'} {size.compressor.kind}"
        + " in place of its trained projector" * (not kept)
    )
    if kept:
        return folder.place(shapes, names.model_table(shapes), model.tensors)
    tables = {"vit": names.vit_table(shapes.vit), "llm": names.llm_table(shapes.llm)}
    parts = {
        part: folder.place(
            getattr(shapes, part),
            {f"{part}.{name}": row for name, row in table.items()},
            model.tensors,
        )
        for part, table in tables.items()
    }
    fresh = vlm.create(size, seed=seed, of=lambda model: model.compressor)
    return VLM(parts["vit"], fresh, parts["llm"])


def same_llm(size: LLMSize, model: folder.Model, *, start_from: str) -> None:
    """Raises ValueError unless the folder has an LLM of this size."""
    theirs = dataclasses.asdict(LLMSize.of(model.llm))
    if other := [k for k, v in theirs.items() if getattr(size, k) != v]:
        raise ValueError(
            f"start_from={start_from} has an LLM that differs from the configuration's in "
            f"{', '.join(other)}: its sizes are taken from the folder, set none"
        )


def language_model(size: VLMSize, model: folder.Model, *, start_from: str) -> LLM:
    """The LLM of a folder alone, on the current mesh, in float32.

    ValueError for another LLM than that of `size`.
    """
    same_llm(size.llm, model, start_from=start_from)
    model.check()
    shapes = vlm.shapes(size).llm
    table = {f"llm.{name}": row for name, row in names.llm_table(shapes).items()}
    return folder.place(shapes, table, model.tensors)


def digest(model: folder.Model) -> str:
    """Sixteen hex digits of the LLM's tensors, whatever files they are in."""
    found = hashlib.sha256()
    for name in sorted(name for name in model.tensors if name.startswith("llm.")):
        tensor = model.tensors[name]
        found.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        pieces = tensor.pieces() if isinstance(tensor, Stored) else [np.ascontiguousarray(tensor)]
        for piece in pieces:
            found.update(piece.view(np.uint8).reshape(-1))
    return found.hexdigest()[:16]
