# SPDX-License-Identifier: Apache-2.0
"""Another compressor between tower and LLM: weights of a file or fresh ones, and what they replace.

Nothing trained goes without a flag that says so by name, and what went is noted in the model.
"""

from pathlib import Path

from vlm_jax.compressors import COMPRESSORS, pretrained
from vlm_jax.compressors.none import NoneMethod
from vlm_jax.models import vlm
from vlm_jax.weights import folder, methods, names, sizes
from vlm_jax.weights.classes import within
from vlm_jax.weights.files import read_tensors
from vlm_jax.weights.folder import Model
from vlm_jax.weights.methods import Wish
from vlm_jax.weights.stored import Stored, equal


def fitted(model: Model, wish: Wish) -> Model:
    """`model` with another compressor in the place of the one that it has, if any, which is noted.

    ValueError unless the flags say which.
    """
    if wish.replace and not (wish.kind or wish.projector):
        raise ValueError(
            "--replace-compressor needs --compressor=METHOD --tokens=V for fresh weights, or "
            "--projector=FILE for those of a file"
        )
    old = sorted(name for name in model.tensors if name.startswith("compressor."))
    made = with_compressor(model, wish)
    if old:
        what = wish.projector or f"fresh weights of {made.compressor['kind']}"
        made.notes["replaced"] = f"{len(old)} trained tensors by {what}: {names.names_text(old, 4)}"
    return made


def same_projector(model: Model, wish: Wish) -> None:
    """ValueError where a file of stage 1 holds other numbers than the trained compressor."""
    found = projector(wish.projector)
    mine = {n: x for n, x in model.tensors.items() if n.startswith("compressor.")}
    if found.keys() != mine.keys() or not all(equal(found[n], mine[n]) for n in mine):
        raise ValueError(
            f"--projector={wish.projector} is not the compressor that is there and was trained: "
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
    levels = wish.levels or (model.vit["depth"] - 1,)
    # A chosen level is an output of a block: without the class token, and no norm behind it.
    model.vit |= dict(levels=levels, keep_class=False, final_norm=False)
    model.compressor = folder.PLAIN | fields
    rows = sizes.patches(model.vit)
    if not method.compresses:
        if wish.tokens not in (None, rows):
            raise ValueError(f"--tokens={wish.tokens}: without a compressor there are {rows}")
        if wish.heads is not None or wish.query is not None:
            raise ValueError("--heads and --query are of a compressor: give --compressor=METHOD")
        model.compressor["tokens"] = rows
    kept = {n: x for n, x in model.tensors.items() if not n.startswith("compressor.")}
    if wish.projector:
        # What does not fit is found by the check.
        made = projector(wish.projector)
        with within(f"--projector={wish.projector}"):
            held = methods.method_of({n: x.shape for n, x in made.items()})
            if held is not method and not (held and not held.compresses and method.projected):
                held = held and held.kind
                raise ValueError(
                    f"its tensors are of {held}, and not of --compressor={kind}: give "
                    f"--compressor={held} --tokens=V"
                )
    else:
        made = vlm.create(model.size(), seed=wish.seed, of=lambda model: model.compressor)
        made = {f"compressor.{name}": x for name, x in pretrained.export(made).items()}
        model.notes["new"] = (
            f"{len(made)} tensors of the compressor {kind}, drawn with seed {wish.seed}"
        )
    model.tensors = kept | made
    return model


def projector(path: Path) -> dict[str, Stored]:
    """The tensors of a file of stage 1; ValueError where it holds others too."""
    found = names.renamed(read_tensors(path))
    if strange := [name for name in found if not name.startswith("compressor.")]:
        raise ValueError(
            f"{path} is no projector of stage 1: it also has {names.names_text(strange)}"
        )
    return found
