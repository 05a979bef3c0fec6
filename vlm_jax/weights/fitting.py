# SPDX-License-Identifier: Apache-2.0
"""Replaces the compressor of a model, with weights of a file or fresh ones.

Trained weights are dropped only with an explicit flag, and the model's notes record it.
"""

from pathlib import Path

from vlm_jax.compressors import COMPRESSORS
from vlm_jax.compressors.none import NoneMethod
from vlm_jax.weights import folder, methods, names, sizes, text_tower
from vlm_jax.weights.classes import within
from vlm_jax.weights.files import read_tensors
from vlm_jax.weights.folder import Model
from vlm_jax.weights.methods import Wish
from vlm_jax.weights.stored import Stored, equal


def replace_compressor(model: Model, wish: Wish) -> Model:
    """`model` with the compressor that the flags describe; a replaced one is noted.

    Raises ValueError if the flags do not say which.
    """
    if wish.replace and not (wish.kind or wish.projector):
        raise ValueError(
            "--replace-compressor needs --compressor=METHOD --tokens=V for fresh weights, or "
            "--projector=FILE for those of a file"
        )
    old_names = sorted(name for name in model.tensors if name.startswith("compressor."))
    changed = with_compressor(model, wish)
    if old_names:
        source = wish.projector or f"fresh weights of {changed.compressor['kind']}"
        changed.notes["replaced"] = (
            f"{len(old_names)} trained tensors by {source}: {names.names_text(old_names, 4)}"
        )
    return changed


def same_projector(model: Model, wish: Wish) -> None:
    """Raises ValueError if a file of stage 1 has other weights than the trained compressor."""
    of_file = projector(wish.projector)
    of_model = {n: x for n, x in model.tensors.items() if n.startswith("compressor.")}
    if of_file.keys() != of_model.keys() or not all(
        equal(of_file[n], of_model[n]) for n in of_model
    ):
        raise ValueError(
            f"--projector={wish.projector} differs from the trained compressor of the model: "
            "leave it out, or add --replace-compressor to take the file's weights"
        )


def with_compressor(model: Model, wish: Wish) -> Model:
    """`model` with the weights of another compressor, from a file or fresh."""
    method = COMPRESSORS[wish.kind] if wish.kind else NoneMethod
    kind = method.kind
    fields = dict(
        kind=kind,
        heads=8 if wish.heads is None else wish.heads,
        query="separate" if wish.query is None else wish.query,
    )
    if not method.compresses:
        fields = dict(kind=kind)
    elif wish.tokens is None:
        raise ValueError(f"--compressor={kind} needs --tokens=V")
    fields["tokens"] = wish.tokens
    tower = text_tower.read(wish.text_tower, kind) if method.clip else None
    fields |= tower.section if tower else {}
    levels = wish.levels or (model.vit["depth"] - 1,)
    # A chosen level is the output of a block, without class token and final norm.
    model.vit |= dict(levels=levels, keep_class=False, final_norm=False)
    model.compressor = folder.PLAIN | fields
    rows = sizes.patches(model.vit)
    if not method.compresses:
        if wish.tokens not in (None, rows):
            raise ValueError(f"--tokens={wish.tokens}: without a compressor there are {rows}")
        if wish.heads is not None or wish.query is not None:
            raise ValueError("--heads and --query are of a compressor: give --compressor=METHOD")
        model.compressor["tokens"] = rows
    others = {n: x for n, x in model.tensors.items() if not n.startswith("compressor.")}
    if wish.projector:
        # Shapes are checked later, with all other tensors.
        weights = projector(wish.projector)
        with within(f"--projector={wish.projector}"):
            method_of_file = methods.method_of({n: x.shape for n, x in weights.items()})
            if method_of_file is not method and not (
                method_of_file and not method_of_file.compresses and method.projected
            ):
                method_of_file = method_of_file and method_of_file.kind
                raise ValueError(
                    f"its tensors belong to {method_of_file}, and not to --compressor={kind}: give "
                    f"--compressor={method_of_file} --tokens=V"
                )
    else:
        wanted = [f"compressor.{name}" for name in model.size().compressor.published()]
        wanted = [name for name in wanted if tower is None or name not in tower.tensors]
        weights = folder.fresh(model.size(), wanted, seed=wish.seed)
        model.notes["new"] = (
            f"{len(weights)} tensors of the compressor {kind}, drawn with seed {wish.seed}"
        )
    model.tensors = others | weights
    if tower:
        model.tensors |= tower.tensors
        model.text_tokenizer = tower.tokenizer
    return model


def projector(path: Path) -> dict[str, Stored]:
    """The tensors of a file of stage 1. Raises ValueError if it holds others too."""
    tensors = names.by_canonical_name(read_tensors(path))
    if unknown := [name for name in tensors if not name.startswith("compressor.")]:
        raise ValueError(
            f"{path} is not a projector of stage 1: it also has {names.names_text(unknown)}"
        )
    return tensors
