# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters as PEFT publishes them: written from a trained model, and merged into a base.

A folder has adapter_config.json, adapter_model.safetensors (`base_model.model.` + the module's name
in its transformers class + `.lora_A.weight` [r inputs], `.lora_B.weight` [outputs r]) and, as
LLaVA's own LoRA has it, non_lora_trainables for what was trained whole and no such class holds.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import regex

from vlm_jax.compressors import pretrained
from vlm_jax.compressors.tensors import Table, Tensor
from vlm_jax.models import lora
from vlm_jax.models.vlm import VLM
from vlm_jax.weights import folder, hf, names
from vlm_jax.weights.classes import within
from vlm_jax.weights.files import READERS, read_json
from vlm_jax.weights.folder import Model
from vlm_jax.weights.layouts import refuse_quantized
from vlm_jax.weights.stored import Stored, write_file
from vlm_jax.weights.values import number, value_text, whole

CONFIG, WEIGHTS, BESIDE = "adapter_config.json", "adapter_model", "non_lora_trainables"
PEFT = "base_model.model."
# Names of our parts in transformers' classes: of a LLaVA, and of a language model alone.
LLAVA = {
    "llm.": "model.language_model.",
    "compressor.0.": "model.multi_modal_projector.linear_1.",
    "compressor.2.": "model.multi_modal_projector.linear_2.",
}
LANGUAGE = {"llm.": "model.", "compressor.": "model.mm_projector."}

# What an adapter_config.json may ask for that A and B alone do not say, and nothing here does.
ELSEWHERE = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
SECONDS = 0.5  # for one match of a pattern
# Beginnings of A and B that leave the base as it is; others (PiSSA, CorDA ...) subtract from it.
INITS = (None, True, False, "gaussian", "orthogonal", "eva")


# --- out ------------------------------------------------------------------------------------------


def table(model: VLM) -> Table:
    """The published tensors of a model's adapters, under their one name."""
    found: Table = {}
    for target in lora.adapted(model):
        layer, path = lora.at(model, target), lora.TARGETS[target]
        module = f"{'self_attn' if path[0] == 'attention' else 'mlp'}.{target}"
        depth, outputs = layer.lora_b[...].shape[0], layer.lora_b[...].ndim - 2
        for k in range(depth):
            for part, count in (("A", 1), ("B", outputs)):
                ours = ("llm", "blocks", *path, f"lora_{part.lower()}")
                name = f"llm.layers.{k}.{module}.lora_{part}.weight"
                found[name] = Tensor((ours,), outputs=count, layer=k)
    return found


def write(model: VLM, about: Model, target: Path, *, dtype: str | None = None) -> dict[str, Any]:
    """Makes a PEFT folder of `model`'s adapters and its compressor; returns what it holds.

    `about` describes the model. Where transformers has a LLaVA class for it, the adapter is of that
    class and holds the projector (`modules_to_save`); else it is of the language model alone, and
    the compressor lies beside it. ValueError for a model without adapters.
    """
    if (described := lora.described(model)) is None:
        raise ValueError("the model has no adapters")
    whole = hf.inexpressible(about) is None
    prefixes = LLAVA if whole else LANGUAGE
    adapters = folder.published(table(model), names.parameters(model))
    compressor = {f"compressor.{n}": x for n, x in pretrained.export(model.compressor).items()}
    files = {WEIGHTS: adapters | compressor} if whole else {WEIGHTS: adapters, BESIDE: compressor}
    any_of = "|".join(described["targets"])
    alpha = described["alpha"]
    config = dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path=None,
        r=described["rank"],
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        lora_dropout=0.0,
        # In a LLaVA the bare names would mean the layers of the tower too.
        target_modules=rf"model\.language_model\.layers\.\d+\.\w+\.({any_of})"
        if whole
        else described["targets"],
        modules_to_save=["multi_modal_projector"] if whole else None,
        bias="none",
        fan_in_fan_out=False,
        inference_mode=True,
        init_lora_weights=True,
        use_dora=False,
        use_rslora=False,
    )
    with folder.appearing(target) as fresh:
        for name, tensors in files.items():
            named = {renamed(n, prefixes): x for n, x in tensors.items()}
            write_file(fresh / f"{name}.safetensors", folder.pending(named, dtype))
        (fresh / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    held = adapters | compressor
    return dict(
        layout="peft",
        base="LlavaForConditionalGeneration" if whole else "the language model alone",
        tensors=len(held),
        parameters=sum(x.size for x in held.values()),
    )


def renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """The name of one of our tensors in an adapter."""
    prefix = next(p for p in prefixes if name.startswith(p))
    return PEFT + prefixes[prefix] + name.removeprefix(prefix)


# --- in -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Updated(Stored):
    """A stored matrix plus `scale` B A, summed in float32 as it is read, piece by piece.

    `dtype` is what it is stored in, and in what it is written unless told otherwise.
    """

    a: np.ndarray  # [r inputs]
    b: np.ndarray  # [outputs r]
    scale: float

    def part(self, start: int, stop: int) -> np.ndarray:
        """The sums from place `start` up to `stop`, in order, flat, in float32."""
        columns = self.shape[1]
        first, last = start // columns, math.ceil(stop / columns)
        update = (self.scale * self.b[first:last]) @ self.a
        update = update.reshape(-1)[start - first * columns : stop - first * columns]
        return super().part(start, stop).astype(np.float32) + update


def updated(base: Stored | np.ndarray, a: np.ndarray, b: np.ndarray, scale: float):
    """`base` with scale B A added, in the same form."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    if isinstance(base, Stored):
        return Updated(base.path, base.offset, base.dtype, base.shape, a, b, scale)
    return (base.astype(np.float32) + (scale * b) @ a).astype(base.dtype)


def merge(model: Model, path: Path, **allowed) -> tuple[list[str], list[str]]:
    """Adds a published adapter to the weights of `model`; missing and surplus tensors as allowed.

    Tensors that it holds whole replace those of the model.

    Raises:
      FileNotFoundError: where there is no adapter.
      ValueError: for an adapter of another kind or model; every tensor that does not fit is listed.
    """
    settings = settings_of(path)
    stored = read(path)
    found = {names.canonical(name): tensor for name, tensor in stored.items()}
    low = {name: tensor for name, tensor in found.items() if ".lora_" in name}
    if not low:
        raise ValueError(f"{path} holds no LoRA tensors, only {names.names_text(list(found))}")
    bases = {n.removesuffix(".weight") for n, x in model.tensors.items() if len(x.shape) == 2}
    if model.llm["tied_embeddings"]:
        bases -= {"llm.lm_head"}  # it is the embedding, which such an adapter leaves alone
    modules = {name.rpartition(".lora_")[0] for name in low} & bases
    modules |= expected(settings, stored, bases)
    wanted = {}
    for module in sorted(modules):
        outputs, inputs = model.tensors[f"{module}.weight"].shape
        half = low.get(f"{module}.lora_A.weight")
        rank = settings["r"] if half is None else half.shape[0]
        if rank != settings["r"] and not settings.get("rank_pattern"):
            raise ValueError(
                f"{path / CONFIG} says r={settings['r']} and no rank_pattern, and the rank of "
                f"{module} is {rank}: the two are not of one adapter"
            )
        wanted[f"{module}.lora_A.weight"] = (rank, inputs)
        wanted[f"{module}.lora_B.weight"] = (outputs, rank)
    try:
        missing, surplus = names.fit(wanted, {n: x.shape for n, x in low.items()}, **allowed)
    except ValueError as error:
        raise ValueError(f"adapter {path}: {error}") from None
    whole = {name: tensor for name, tensor in found.items() if name not in low}
    if over := sorted(name for name in whole if name in model.tensors):
        model.notes["adapted"] = (
            f"{len(over)} tensors replaced by those that {path} holds whole: "
            f"{names.names_text(over, 4)}"
        )
    model.tensors |= whole
    for module in sorted(modules):
        halves = [low.get(f"{module}.lora_{part}.weight") for part in "AB"]
        if None in halves:
            continue
        a, b = (half.read() for half in halves)
        scale = settings["lora_alpha"] / (len(a) ** 0.5 if settings.get("use_rslora") else len(a))
        name = f"{module}.weight"
        model.tensors[name] = updated(model.tensors[name], a, b, scale)
    return missing, surplus


def settings_of(path: Path) -> dict[str, Any]:
    """An adapter_config.json; ValueError where A, B, r and alpha are not all that it asks for."""
    settings = read_json(path / CONFIG)
    with within(f"{path / CONFIG}"):
        refuse_quantized(settings)
    if (kind := settings.get("peft_type")) != "LORA":
        raise ValueError(f"{path} is an adapter of kind {kind!r}; supported is LORA")
    asked = {name: settings[name] for name in ELSEWHERE if settings.get(name)}
    if settings.get("bias", "none") != "none":
        asked["bias"] = settings["bias"]
    if (init := settings.get("init_lora_weights")) not in INITS:
        asked["init_lora_weights"] = init
    if asked:
        said = ", ".join(f"{name}={value!r}" for name, value in asked.items())
        raise ValueError(
            f"{path}: {said} is not supported: merge the adapter with PEFT and convert the result"
        )
    if absent := [name for name in ("r", "lora_alpha", "target_modules") if name not in settings]:
        raise ValueError(f"{path / CONFIG} lacks {', '.join(absent)}")
    with within(f"{path / CONFIG}"):
        whole("r", settings["r"])
        number("lora_alpha", settings["lora_alpha"])
        targets = settings["target_modules"]
        several = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
        if not several and not isinstance(targets, str):
            raise ValueError(f"target_modules={value_text(targets)}: a pattern or names are needed")
        if settings.get("use_rslora") not in (None, True, False):
            raise ValueError(
                f"use_rslora={value_text(settings['use_rslora'])}: true or false is needed"
            )
    return settings


def read(path: Path) -> dict[str, Stored]:
    """The tensors of an adapter and those beside it, under the names of the adapted class."""
    found = {}
    for name in (WEIGHTS, BESIDE):
        files = [path / f"{name}{suffix}" for suffix in (".safetensors", ".bin")]
        there = [file for file in files if file.is_file()]
        if name == WEIGHTS and not there:
            raise FileNotFoundError(f"{path} is no adapter: it has no {files[0].name}")
        for file in there[:1]:
            found |= READERS[file.suffix](file)
    # A layer that is adapted and saved whole besides is a part of its adapter there.
    return {n.removeprefix(PEFT).replace(".base_layer.", "."): x for n, x in found.items()}


def expected(settings: dict[str, Any], stored: Mapping[str, Stored], bases: set[str]) -> set[str]:
    """The layers of the language model that `target_modules` names, by PEFT's rule.

    Of the tower's nothing is said: a published LoRA of the LLM may name them alike and leave them.
    """
    if settings.get("layers_to_transform") is not None or settings.get("exclude_modules"):
        return set()
    target = settings["target_modules"]
    found = {names.canonical(name): name for name in stored if ".lora_" in name}
    ours = next((name for name in found if name.startswith("llm.layers.")), None)
    if ours is None:
        return set()
    prefix = found[ours].removesuffix(ours.removeprefix("llm."))

    def named(module: str) -> bool:
        theirs = prefix + module.removeprefix("llm.")
        if isinstance(target, str):
            return fits(target, theirs)
        return any(theirs == name or theirs.endswith(f".{name}") for name in target)

    return {module for module in bases if module.startswith("llm.layers.") and named(module)}


def fits(pattern: str, name: str) -> bool:
    """Whether a stranger's pattern matches a whole name; ValueError where that is hard to say."""
    try:
        # Python's own `re` may take years over a short pattern, and cannot be told to stop.
        return regex.fullmatch(pattern, name, timeout=SECONDS) is not None
    except (regex.error, TimeoutError, RecursionError, OverflowError, MemoryError) as error:
        said = "takes too long" if isinstance(error, TimeoutError) else f"is none ({error})"
        raise ValueError(
            f"{CONFIG}: the pattern target_modules={value_text(pattern)} {said}: merge the adapter "
            "with PEFT and convert the result"
        ) from None
