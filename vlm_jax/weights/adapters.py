# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters as PEFT publishes them: written from a trained model, and merged into a base.

A folder has adapter_config.json, adapter_model.safetensors (`base_model.model.` + the module's name
in its transformers class + `.lora_A.weight` [r inputs], `.lora_B.weight` [outputs r]) and, as in
LLaVA's own LoRA, non_lora_trainables for fully trained modules that are not in that class.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import regex

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
# Names of the parts in transformers' classes: in a LLaVA, and in a language model alone.
LLAVA = {
    "llm.": "model.language_model.",
    "compressor.0.": "model.multi_modal_projector.linear_1.",
    "compressor.2.": "model.multi_modal_projector.linear_2.",
}
LANGUAGE = {"llm.": "model.", "compressor.": "model.mm_projector."}

# Settings of an adapter_config.json that need more than A and B; none is supported.
UNSUPPORTED = (
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
# Initial values of A and B that leave the base as it is; others (PiSSA, CorDA ...) change it.
INITS = (None, True, False, "gaussian", "orthogonal", "eva")


# --- out ------------------------------------------------------------------------------------------


def table(model: VLM) -> Table:
    """The published tensors of a model's adapters, by canonical name."""
    rows: Table = {}
    for target in lora.adapted(model):
        layer, path = lora.at(model, target), lora.TARGETS[target]
        module = f"{'self_attn' if path[0] == 'attention' else 'mlp'}.{target}"
        depth, outputs = layer.lora_b[...].shape[0], layer.lora_b[...].ndim - 2
        for k in range(depth):
            for part, count in (("A", 1), ("B", outputs)):
                parameter = ("llm", "blocks", *path, f"lora_{part.lower()}")
                name = f"llm.layers.{k}.{module}.lora_{part}.weight"
                rows[name] = Tensor((parameter,), outputs=count, layer=k)
    return rows


def write(
    model: VLM, description: Model, target: Path, *, dtype: str | None = None
) -> dict[str, Any]:
    """Writes `model`'s adapters and its compressor as a PEFT folder; returns what it holds.

    If transformers has a LLaVA class for the model that `description` describes, the adapter is for
    that class and holds the projector (`modules_to_save`); else it is for the language model alone
    and the compressor has a file of its own. Raises ValueError for a model without adapters.
    """
    if (adapters_of_model := lora.described(model)) is None:
        raise ValueError("the model has no adapters")
    as_llava = hf.inexpressible(description) is None
    prefixes = LLAVA if as_llava else LANGUAGE
    adapters = folder.published(table(model), names.parameters(model))
    compressor = folder.compressor_tensors(model.compressor)
    compressor = {f"compressor.{name}": x for name, x in compressor.items()}
    files = (
        {WEIGHTS: adapters | compressor} if as_llava else {WEIGHTS: adapters, BESIDE: compressor}
    )
    names_pattern = "|".join(adapters_of_model["targets"])
    alpha = adapters_of_model["alpha"]
    config = dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path=None,
        r=adapters_of_model["rank"],
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        lora_dropout=0.0,
        # In a LLaVA the bare names would mean the layers of the tower too.
        target_modules=rf"model\.language_model\.layers\.\d+\.\w+\.({names_pattern})"
        if as_llava
        else adapters_of_model["targets"],
        modules_to_save=["multi_modal_projector"] if as_llava else None,
        bias="none",
        fan_in_fan_out=False,
        inference_mode=True,
        init_lora_weights=True,
        use_dora=False,
        use_rslora=False,
    )
    with folder.appearing(target) as fresh:
        for name, tensors in files.items():
            named = {adapter_name(n, prefixes): x for n, x in tensors.items()}
            write_file(fresh / f"{name}.safetensors", folder.pending(named, dtype))
        (fresh / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    all_tensors = adapters | compressor
    return dict(
        layout="peft",
        base="LlavaForConditionalGeneration" if as_llava else "the language model alone",
        tensors=len(all_tensors),
        parameters=sum(x.size for x in all_tensors.values()),
    )


def adapter_name(name: str, prefixes: Mapping[str, str]) -> str:
    """The name of a canonical tensor in an adapter."""
    prefix = next(p for p in prefixes if name.startswith(p))
    return PEFT + prefixes[prefix] + name.removeprefix(prefix)


# --- in -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Updated(Stored):
    """A stored matrix `base` plus `scale` B A, summed in float32 when it is read, piece by piece.

    `dtype` is the type in which it is stored, and by default written.
    """

    base: Stored
    a: np.ndarray  # [r inputs]
    b: np.ndarray  # [outputs r]
    scale: float

    def part(self, start: int, stop: int) -> np.ndarray:
        """The sums from position `start` up to `stop`, in order, flat, in float32."""
        columns = self.shape[1]
        first, last = start // columns, math.ceil(stop / columns)
        update = (self.scale * self.b[first:last]) @ self.a
        update = update.reshape(-1)[start - first * columns : stop - first * columns]
        return self.base.part(start, stop).astype(np.float32) + update


def add_update(base: Stored | np.ndarray, a: np.ndarray, b: np.ndarray, scale: float):
    """`base` with scale B A added, in the same form."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    if isinstance(base, Stored):
        return Updated(base.path, base.offset, base.dtype, base.shape, base, a, b, scale)
    return (base.astype(np.float32) + (scale * b) @ a).astype(base.dtype)


def merge(model: Model, path: Path, **allowed) -> tuple[list[str], list[str]]:
    """Adds a published adapter to the weights of `model`; returns missing and surplus tensors.

    `allowed` is allow_missing and allow_surplus of `names.fit`. Complete tensors in the adapter
    replace those of the model.

    Raises:
      FileNotFoundError: if there is no adapter.
      ValueError: for an adapter of another kind or model; every tensor that does not fit is listed.
    """
    settings = settings_of(path)
    stored = read(path)
    canonical = {names.canonical(name): tensor for name, tensor in stored.items()}
    halves_by_name = {name: tensor for name, tensor in canonical.items() if ".lora_" in name}
    if not halves_by_name:
        raise ValueError(f"{path} holds no LoRA tensors, only {names.names_text(list(canonical))}")
    bases = {n.removesuffix(".weight") for n, x in model.tensors.items() if len(x.shape) == 2}
    if model.llm["tied_embeddings"]:
        bases -= {"llm.lm_head"}  # it is the embedding, which such an adapter leaves alone
    modules = {name.rpartition(".lora_")[0] for name in halves_by_name} & bases
    modules |= expected(settings, stored, bases)
    shapes = {}
    for module in sorted(modules):
        outputs, inputs = model.tensors[f"{module}.weight"].shape
        half = halves_by_name.get(f"{module}.lora_A.weight")
        rank = settings["r"] if half is None else half.shape[0]
        if rank != settings["r"] and not settings.get("rank_pattern"):
            raise ValueError(
                f"{path / CONFIG} says r={settings['r']} and no rank_pattern, and the rank of "
                f"{module} is {rank}: the two are not of one adapter"
            )
        shapes[f"{module}.lora_A.weight"] = (rank, inputs)
        shapes[f"{module}.lora_B.weight"] = (outputs, rank)
    try:
        missing, surplus = names.fit(
            shapes, {n: x.shape for n, x in halves_by_name.items()}, **allowed
        )
    except ValueError as error:
        raise ValueError(f"adapter {path}: {error}") from None
    complete = {name: tensor for name, tensor in canonical.items() if name not in halves_by_name}
    if replaced := sorted(name for name in complete if name in model.tensors):
        model.notes["adapted"] = (
            f"{len(replaced)} tensors replaced by those that {path} holds whole: "
            f"{names.names_text(replaced, 4)}"
        )
    model.tensors |= complete
    for module in sorted(modules):
        halves = [halves_by_name.get(f"{module}.lora_{part}.weight") for part in "AB"]
        if None in halves:
            continue
        a, b = (half.read() for half in halves)
        scale = settings["lora_alpha"] / (len(a) ** 0.5 if settings.get("use_rslora") else len(a))
        name = f"{module}.weight"
        model.tensors[name] = add_update(model.tensors[name], a, b, scale)
    return missing, surplus


def settings_of(path: Path) -> dict[str, Any]:
    """An adapter_config.json. Raises ValueError if it needs more than A, B, r and alpha."""
    settings = read_json(path / CONFIG)
    with within(f"{path / CONFIG}"):
        refuse_quantized(settings)
    if (kind := settings.get("peft_type")) != "LORA":
        raise ValueError(f"{path} is an adapter of kind {kind!r}; supported is LORA")
    unsupported = {name: settings[name] for name in UNSUPPORTED if settings.get(name)}
    if settings.get("bias", "none") != "none":
        unsupported["bias"] = settings["bias"]
    if (init := settings.get("init_lora_weights")) not in INITS:
        unsupported["init_lora_weights"] = init
    if unsupported:
        listed = ", ".join(f"{name}={value!r}" for name, value in unsupported.items())
        raise ValueError(
            f"{path}: {listed} is not supported: merge the adapter with PEFT and convert the result"
        )
    if missing := [name for name in ("r", "lora_alpha", "target_modules") if name not in settings]:
        raise ValueError(f"{path / CONFIG} lacks {', '.join(missing)}")
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
    """The tensors of an adapter and of its extra file, by the names of the adapted class."""
    tensors = {}
    for name in (WEIGHTS, BESIDE):
        files = [path / f"{name}{suffix}" for suffix in (".safetensors", ".bin")]
        existing = [file for file in files if file.is_file()]
        if name == WEIGHTS and not existing:
            raise FileNotFoundError(f"{path} is no adapter: it has no {files[0].name}")
        for file in existing[:1]:
            tensors |= READERS[file.suffix](file)
    # A layer that is both adapted and saved completely is a part of its adapter there.
    return {n.removeprefix(PEFT).replace(".base_layer.", "."): x for n, x in tensors.items()}


def expected(settings: dict[str, Any], stored: Mapping[str, Stored], bases: set[str]) -> set[str]:
    """The layers of the language model that `target_modules` names, by PEFT's rule.

    Layers of the tower do not count: a LoRA of the LLM may match their names and not adapt them.
    """
    if settings.get("layers_to_transform") is not None or settings.get("exclude_modules"):
        return set()
    target = settings["target_modules"]
    stored_names = {names.canonical(name): name for name in stored if ".lora_" in name}
    example = next((name for name in stored_names if name.startswith("llm.layers.")), None)
    if example is None:
        return set()
    prefix = stored_names[example].removesuffix(example.removeprefix("llm."))

    def named(module: str) -> bool:
        stored_name = prefix + module.removeprefix("llm.")
        if isinstance(target, str):
            return fits(target, stored_name)
        return any(stored_name == name or stored_name.endswith(f".{name}") for name in target)

    return {module for module in bases if module.startswith("llm.layers.") and named(module)}


def fits(pattern: str, name: str) -> bool:
    """Whether a pattern from a file matches a whole name; ValueError if that takes too long."""
    try:
        # Python's own `re` may take years for a short pattern and has no time limit.
        return regex.fullmatch(pattern, name, timeout=SECONDS) is not None
    except (regex.error, TimeoutError, RecursionError, OverflowError, MemoryError) as error:
        problem = "takes too long" if isinstance(error, TimeoutError) else f"is not valid ({error})"
        raise ValueError(
            f"{CONFIG}: the pattern target_modules={value_text(pattern)} {problem}: merge the "
            "adapter with PEFT and convert the result"
        ) from None
