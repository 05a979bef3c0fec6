# SPDX-License-Identifier: Apache-2.0
"""A model folder: published tensors under one naming, a configuration and a tokenizer beside them.

docs/weights.md has the layout. A folder appears whole or not at all.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vlm_jax import compressors, files
from vlm_jax.compressors.compressor import Compressor
from vlm_jax.compressors.tensors import Table
from vlm_jax.models import vlm
from vlm_jax.models.pruning import NONE, parse, prunes
from vlm_jax.models.sizes import LLMSize, ViTSize, VLMSize
from vlm_jax.models.vlm import VLM
from vlm_jax.weights import names, sections, sizes
from vlm_jax.weights.classes import within
from vlm_jax.weights.files import read_json, read_tensors
from vlm_jax.weights.stored import (
    DTYPES,
    NAMES,
    WEIGHTS,
    Pending,
    Stored,
    all_finite,
    equal,
    write_safetensors,
)

M = TypeVar("M")
MODEL_TYPE, FORMAT = "vlm_jax", 1
SECTIONS = ("vit", "llm", "compressor")
# What the compressor of a published LLaVA has, and a folder that was made before a field was born.
PLAIN = dict(
    kind="none",
    heads=1,
    query="none",
    downsample="conv",
    queries=0,
    scales=(),
    prefusion=4,
    elastic=(),
)

# What a tokenizer consists of; a folder has some of them.
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
# Those with its words: one of them has to be there.
WORDS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass
class Model:
    """A model that is not in memory: its configuration, and where each of its tensors lies.

    vit, llm, compressor, pruning: sections of a configuration. facts: what generation needs to know
    besides (`image`: see preprocessor.py; `image_token`, `max_length`, `template`, `ends`).
    tensors: under the names of `names.py`. tokenizer: the folder that has its files.
    text_tokenizer: that of CLIP's text tower, if the compressor has one.
    """

    vit: dict[str, Any]
    llm: dict[str, Any]
    compressor: dict[str, Any]
    facts: dict[str, Any]
    tensors: dict[str, Stored | np.ndarray]
    tokenizer: PurePath | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    pruning: dict[str, Any] = field(default_factory=lambda: dict(NONE))
    text_tokenizer: PurePath | None = None

    def size(self) -> VLMSize:
        """The description of the model."""
        compressor = compressors.describe(PLAIN | self.compressor)
        vit, llm = ViTSize.of(self.vit), LLMSize.of(self.llm)
        return VLMSize(vit, compressor, llm, kernels="xla").pruned(self.pruning)

    def pruned(self, text: str | None) -> "Model":
        """The same model with the pruning that a flag describes; as it is for None."""
        return self if text is None else replace(self, pruning=parse(text))

    def dtype(self) -> str:
        """What it is computed in unless somebody chooses: float32 if stored so, else bfloat16."""
        kind = NAMES[self.tensors["llm.embed_tokens.weight"].dtype]
        return "float32" if kind == "F32" else "bfloat16"

    def config(self) -> ConfigDict:
        """The part of a configuration that makes the model."""
        made = dict(vit=self.vit, llm=self.llm, compressor=PLAIN | self.compressor,
                    pruning=dict(self.pruning))  # fmt: skip
        # JSON has lists alone.
        for section in made.values():
            section |= {k: tuple(v) for k, v in section.items() if isinstance(v, list)}
        return ConfigDict(made | dict(remat="none", compute_dtype="float32", kernels="xla"))

    def check(self, **allowed) -> tuple[list[str], list[str]]:
        """Missing and surplus tensors as allowed; ValueError where the tensors make no such model.

        Surplus tensors are dropped, and so are those that nothing reads.
        """
        self.tie()
        shapes = vlm.shapes(self.size())
        wanted = names.shapes(names.model_table(shapes), shapes)
        found = {name: tensor.shape for name, tensor in self.tensors.items()}
        missing, surplus = names.fit(wanted, found, **allowed)
        self.tensors = {name: x for name, x in self.tensors.items() if name in wanted}
        for name, tensor in self.tensors.items():
            if NAMES.get(tensor.dtype) not in WEIGHTS:
                raise ValueError(
                    f"{name} has dtype {tensor.dtype}, as quantized weights have: supported are "
                    f"{', '.join(WEIGHTS)}; get the weights as they were before quantization"
                )
        return missing, surplus

    def tie(self) -> None:
        """Drops an output layer that repeats a tied embedding; one that differs unties the two.

        As transformers does: what is stored counts for more than what a config.json says.
        """
        head, words = (self.tensors.get(f"llm.{n}.weight") for n in ("lm_head", "embed_tokens"))
        if head is None or words is None or not self.llm["tied_embeddings"]:
            return
        if equal(head, words):
            del self.tensors["llm.lm_head.weight"]
            return
        self.llm = self.llm | dict(tied_embeddings=False)
        self.notes["untied"] = (
            "the stored output layer (lm_head) differs from the embedding, so it is used, although "
            "tie_word_embeddings is true"
        )


def is_model(path: PurePath) -> bool:
    """Whether a folder says that it is a model folder."""
    about = Path(path) / "config.json"
    return about.is_file() and read_json(about).get("model_type") == MODEL_TYPE


def read(folder: str | Path) -> Model:
    """A model folder, headers alone.

    Raises:
      FileNotFoundError: where there is none.
      ValueError: for a folder of another format.
    """
    folder = Path(folder)
    fields = read_json(folder / "config.json")
    if fields.get("model_type") != MODEL_TYPE or fields.get("format") != FORMAT:
        raise ValueError(
            f"{folder} is no model folder of format {FORMAT}: its config.json says model_type="
            f"{fields.get('model_type')!r}, format={fields.get('format')!r}; make one with "
            f"vlm-jax convert --from={folder} --to=DIR"
        )
    with within(f"{folder}/config.json"):
        sections.check(fields)
    tensors = read_tensors(folder)
    vit = fields["vit"] | dict(levels=tuple(fields["vit"]["levels"]))
    with within(str(folder)):
        sizes.check(vit, fields["llm"], {name: x.shape for name, x in tensors.items()})
        sizes.check_compressor(vit, fields["compressor"], tensors)
        if fields["llm"]["tied_embeddings"] and "llm.lm_head.weight" in tensors:
            raise ValueError(
                "config.json says llm.tied_embeddings=true, and there is an llm.lm_head.weight: "
                "convert the model again"
            )
    tokenizer, text_tokenizer = folder / "tokenizer", folder / "text_tokenizer"
    return Model(
        vit,
        fields["llm"],
        fields["compressor"],
        fields["facts"],
        tensors,
        tokenizer if tokenizer.is_dir() else None,
        fields.get("notes", {}),
        fields.get("pruning", dict(NONE)),
        text_tokenizer if text_tokenizer.is_dir() else None,
    )


def write(model: Model, target: Path, *, dtype: str | None = None) -> None:
    """Makes the model folder `target`; numbers are cast to `dtype`, or stay as they are."""
    described = {name: getattr(model, name) for name in (*SECTIONS, "facts", "notes")}
    if prunes(model.pruning):
        described["pruning"] = model.pruning
    text = json.dumps(dict(model_type=MODEL_TYPE, format=FORMAT, **described), indent=1)
    # What no verb would read again is not written.
    sections.check(json.loads(text))
    with appearing(target) as fresh:
        write_safetensors(fresh, pending(model.tensors, dtype))
        if model.tokenizer and any((model.tokenizer / name).is_file() for name in TOKENIZER):
            copy_tokenizer(model.tokenizer, fresh / "tokenizer")
        if model.text_tokenizer:
            copy_tokenizer(model.text_tokenizer, fresh / "text_tokenizer")
        (fresh / "config.json").write_text(text + "\n")


def pending(tensors: dict[str, Stored | np.ndarray], dtype: str | None) -> list[Pending]:
    """The tensors as they will be written."""
    return [
        Pending(
            name,
            np.dtype(dtype) if dtype else tensor.dtype,
            tensor.shape,
            tensor.pieces if isinstance(tensor, Stored) else lambda tensor=tensor: [tensor],
            f"{tensor.path}: " if isinstance(tensor, Stored) else "",
        )
        for name, tensor in tensors.items()
    ]


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the files of a tokenizer that are there, and the kind of the model beside it, by which
    transformers chooses the class that reads them."""
    target.mkdir(exist_ok=True)
    for name in TOKENIZER:
        if (source / name).is_file():
            shutil.copy(source / name, target / name)
    if (source / "config.json").is_file():
        fields = read_json(source / "config.json")
        kept = {k: fields[k] for k in ("model_type", "tokenizer_class") if k in fields}
        if kept and kept.get("model_type") != MODEL_TYPE:
            (target / "config.json").write_text(json.dumps(kept) + "\n")


def has_tokenizer(path: Path) -> bool:
    """Whether a folder of weights has the words of a tokenizer too."""
    return any((path / name).is_file() for name in WORDS)


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` only if the body ends well; otherwise it goes.

    Raises:
      ValueError: where `target` holds something already.
      OSError: where it cannot be written; nothing is left behind.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--to={target} is there already: choose another, or remove it")
    with files.making(target) as fresh:
        fresh.mkdir()
        yield fresh


def place(
    shapes: M, table: Table, tensors: dict[str, Stored | np.ndarray], *, dtype: str | None = None
) -> M:
    """The module that `shapes` describes, on the current mesh, filled from `tensors` one by one.

    Args:
      table: where each tensor belongs; together they are all parameters.
      dtype: of the parameters; what `shapes` has unless given. The host holds one tensor at a time.
    Raises:
      ValueError: for a tensor with NaN or infinite numbers.
    """
    mesh = jax.sharding.get_mesh()
    ours = names.parameters(shapes)
    filled: dict[str, jax.Array] = {}
    for name, row in table.items():
        keys = [".".join(path) for path in row.paths]
        stack = row.layer is not None
        tensor = tensors[name]
        numbers = tensor.read() if isinstance(tensor, Stored) else tensor
        if not all_finite(numbers):
            raise ValueError(
                f"{name} holds NaN or infinite numbers: a model with them answers nothing; convert "
                "again, or take a checkpoint from before they came"
            )
        parts = row.split(numbers, [row.item_shape(ours[key].shape) for key in keys])
        for key, part in zip(keys, parts, strict=True):
            like = ours[key]
            kind = np.dtype(dtype or like.dtype)
            spec = jax.sharding.PartitionSpec(*row.item_shape(tuple(like.sharding.spec)))
            sharding = jax.sharding.NamedSharding(mesh, spec)
            array = jax.make_array_from_callback(part.shape, sharding, part.__getitem__)
            if not stack:
                filled[key] = array if array.dtype == kind else _cast(array, kind)
                continue
            if key not in filled:
                whole = jax.sharding.NamedSharding(mesh, like.sharding.spec)
                filled[key] = jnp.zeros(like.shape, kind, device=whole)
            filled[key] = _put(filled[key], array, row.layer, row.axis)
            filled[key].block_until_ready()  # or the tensors read since would pile up
    return jax.tree.unflatten(jax.tree.structure(shapes), [filled[key] for key in ours])


@jax.jit(static_argnums=1)
def _cast(array: jax.Array, dtype: np.dtype) -> jax.Array:
    return array.astype(dtype)


@jax.jit(donate_argnums=0, static_argnums=3)
def _put(stack: jax.Array, layer: jax.Array, index: int | jax.Array, axis: int) -> jax.Array:
    layer = jnp.expand_dims(layer.astype(stack.dtype), axis)
    return jax.lax.dynamic_update_slice_in_dim(stack, layer, index, axis)


def fresh(size: VLMSize, wanted: list[str], *, seed: int) -> dict[str, np.ndarray]:
    """Published tensors of a new model; of the others no number is computed."""
    shapes = vlm.shapes(size)
    table = names.model_table(shapes)
    keys = {".".join(path) for name in wanted for path in table[name].paths}

    def of(model: VLM) -> dict[str, jax.Array]:
        return {key: x for key, x in names.parameters(model).items() if key in keys}

    ours = vlm.create(size, seed=seed, of=of)
    return published({name: table[name] for name in wanted}, ours)


def tensors_of(model: VLM) -> dict[str, np.ndarray]:
    """The published tensors of a model in memory, under their names."""
    return published(names.model_table(model), names.parameters(model))


def compressor_tensors(compressor: Compressor) -> dict[str, np.ndarray]:
    """The published tensors of a compressor alone, in the order of its published module."""
    return published(names.compressor_table(compressor), names.parameters(compressor))


def published(table: Table, ours: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """The tensors of a table, from the arrays of a model under dotted names."""
    found = {}
    for name, row in table.items():
        found[name] = row.join([row.item(ours[".".join(path)]) for path in row.paths])
    return found


def kind_of(name: str) -> str:
    """A dtype that weights may be written in, by the name that JAX users give it."""
    known = {str(DTYPES[kind]): str(DTYPES[kind]) for kind in WEIGHTS[:3]}
    if name not in known:
        raise ValueError(f"--dtype={name}: choose one of {', '.join(known)}")
    return known[name]
