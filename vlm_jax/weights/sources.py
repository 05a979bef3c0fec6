# SPDX-License-Identifier: Apache-2.0
"""What a user has, gathered into one model: a published LLaVA, or tower, compressor and LLM."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.models import pretrained, vlm
from vlm_jax.weights import architectures, ends, folder, names, preprocessor
from vlm_jax.weights.files import read_json, read_tensors
from vlm_jax.weights.folder import Model
from vlm_jax.weights.stored import Stored

Section = dict[str, Any]


@dataclass(frozen=True)
class Compressor:
    """Which compressor stands between tower and LLM, and where its weights come from.

    `fields` are those of the configuration's `compressor` section, `levels` the blocks that it
    reads (None: the last but one), `projector` a file of stage 1 (None: fresh weights of `seed`).
    """

    fields: Section
    levels: tuple[int, ...] | None = None
    projector: Path | None = None
    seed: int = 0


def llava(path: Path, *, vision: Path | None, compressor: Compressor | None) -> Model:
    """A whole published model, or a model folder of ours; `compressor` replaces its own.

    `vision` is where the tower of a LLaVA-1.5 in its first layout lies.
    """
    if read_json(path / "config.json").get("model_type") == folder.MODEL_TYPE:
        if vision or compressor:
            raise ValueError(f"{path} is a model folder already: it is converted as it is")
        return folder.read(path)
    described = architectures.read(path)
    if described.kind in ("tower", "llm"):
        raise ValueError(
            f"{path} holds a {described.kind} alone: give --vision=DIR and --llm=DIR to make a "
            "model of the two"
        )
    tensors = names.renamed(read_tensors(path))
    vit = described.vit
    if described.kind == "llava-1.5":
        vit = tower_of_llava15(path, vision, described.vit, tensors)
    elif vision:
        raise ValueError(f"{path} has its own vision tower: leave --vision out")
    rows = (vit["image_size"] // vit["patch_size"]) ** 2 + vit["keep_class"]
    told = facts(path, vision or path, vit, described)
    model = Model(
        vit,
        described.llm,
        folder.PLAIN | dict(tokens=rows),
        told,
        tensors,
        path,
        preprocessor.notes(vision or path, told["image"]),
    )
    return model if compressor is None else with_compressor(model, compressor)


def tower_of_llava15(
    path: Path, vision: Path | None, choice: Section, tensors: dict[str, Stored]
) -> Section:
    """The `vit` section of a LLaVA-1.5 in its first layout; its tower's tensors join `tensors`."""
    fields = read_json(path / "config.json")
    name = fields.get("mm_vision_tower", "openai/clip-vit-large-patch14-336")
    if vision is None:
        raise ValueError(
            f"{path} is a LLaVA-1.5 as first published, whose vision tower lies elsewhere: give "
            f"--vision=DIR, a folder with {name}"
        )
    vit, tower = of_tower(vision)
    # The published code ignores a tower inside unless it was trained.
    if not fields.get("unfreeze_mm_vision_tower"):
        for inside in [n for n in tensors if n.startswith("vit.")]:
            del tensors[inside]
        tensors |= tower
    architectures.choose_level(vit, choice["layer"], choice["strategy"])
    return vit


def assembled(vision: Path, llm: Path, compressor: Compressor) -> Model:
    """A new model of a tower, a compressor and a language model."""
    vit, tensors = of_tower(vision)
    described = architectures.read(llm)
    if described.kind != "llm":
        raise ValueError(f"--llm={llm} holds a {described.kind}, not a language model alone")
    tensors |= names.renamed(read_tensors(llm))
    rows = (vit["image_size"] // vit["patch_size"]) ** 2
    none = folder.PLAIN | dict(tokens=rows)
    told = facts(llm, vision, vit, described)
    about = preprocessor.notes(vision, told["image"])
    made = Model(vit, described.llm, none, told, tensors, llm, about)
    return with_compressor(made, compressor)


def of_tower(path: Path) -> tuple[Section, dict[str, Stored]]:
    """The `vit` section and the tensors of a vision tower, alone or the half of a CLIP."""
    described = architectures.read(path)
    if described.kind != "tower":
        raise ValueError(f"--vision={path} holds a {described.kind}, not a vision tower")
    vit = described.vit | dict(levels=(described.vit["depth"] - 1,))
    tensors = names.renamed(read_tensors(path))
    return vit, {name: x for name, x in tensors.items() if name.startswith("vit.")}


def with_compressor(model: Model, compressor: Compressor) -> Model:
    """`model` with the weights of another compressor, from a file or fresh."""
    levels = compressor.levels or (model.vit["depth"] - 1,)
    # A chosen level is an output of a block: without the class token, and no norm behind it.
    model.vit |= dict(levels=levels, keep_class=False, final_norm=False)
    model.compressor = model.compressor | compressor.fields
    if model.compressor["kind"] == "none":
        model.compressor["tokens"] = (model.vit["image_size"] // model.vit["patch_size"]) ** 2
    kept = {n: x for n, x in model.tensors.items() if not n.startswith("compressor.")}
    if compressor.projector:
        found = names.renamed(read_tensors(compressor.projector))
        if strange := [name for name in found if not name.startswith("compressor.")]:
            raise ValueError(
                f"{compressor.projector} is no projector of stage 1: it also has "
                f"{names.shown(strange)}"
            )
        # These files may repeat embeddings and the like; what does not fit is found by the check.
        made = found
    else:
        made = vlm.create(model.config(), seed=compressor.seed, of=lambda model: model.compressor)
        made = {f"compressor.{name}": x for name, x in pretrained.export(made).items()}
    model.tensors = kept | made
    return model


def facts(path: Path, vision: Path, vit: Section, described: architectures.Published) -> Section:
    """What generation needs to know besides the sizes."""
    text = read_json(path / "config.json")
    text = text.get("text_config", text)
    return dict(
        image=preprocessor.facts(vision, vit, pad=described.image_fit == "pad"),
        image_token=described.image_token,
        template=template(path, described, text.get("model_type", "")),
        max_length=text.get("max_position_embeddings", 4096),
        ends=ends.of(path),
    )


def template(path: Path, described: architectures.Published, llm: str) -> str:
    """How a conversation is written for this model: a name of data.template."""
    own = any((path / name).is_file() for name in ("chat_template.jinja", "chat_template.json"))
    if not own and (path / "tokenizer_config.json").is_file():
        own = bool(read_json(path / "tokenizer_config.json").get("chat_template"))
    if described.kind == "llava-1.5" or not own:
        return "chatml" if "qwen" in llm else "vicuna_v1"
    # Qwen's own template is chatml, the system text apart, which changed between its versions.
    return "chatml" if described.kind == "llm" and "qwen" in llm else "checkpoint"


def numbers(text: str | None) -> tuple[int, ...] | None:
    """Ascending block numbers written with commas."""
    if text is None:
        return None
    parts: Sequence[str] = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"--levels={text}: block numbers with commas, such as 12,16,22,23")
    return tuple(int(part) for part in parts)


def of_run(path: Path, config: ConfigDict, model: vlm.VLM) -> Model:
    """A model that `vlm-jax train` made, from its configuration and its weights in memory."""
    about = described_run(path, config)
    about.tensors = folder.tensors_of(model)
    return about


def described_run(path: Path, config: ConfigDict) -> Model:
    """What a run's configuration says of its model; no tensor is in it."""
    compressor = vlm.shapes(config).compressor
    # Rows had room for as many as it can give: of a request's V, or of an image that chooses.
    most = max(compressor.tokens, config.compressor.tokens, *compressor.buckets)
    return Model(
        config.vit.to_dict(),
        config.llm.to_dict(),
        config.compressor.to_dict(),
        dict(
            image=preprocessor.of_data(config.data),
            image_token=None,
            max_length=config.data.text_length + most,
            template=config.data.template,
        ),
        {},
        Path(config.data.tokenizer) if config.data.tokenizer else path / "tokenizer",
    )
