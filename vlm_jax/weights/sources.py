# SPDX-License-Identifier: Apache-2.0
"""Reads a published model, or a tower, a compressor and an LLM, as one `folder.Model`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlm_jax import compressors, files
from vlm_jax.compressors.method import Method
from vlm_jax.data import clips
from vlm_jax.models import vlm
from vlm_jax.models.sizes import VLMSize
from vlm_jax.weights import (
    architectures,
    ends,
    folder,
    methods,
    names,
    preprocessor,
    sizes,
    text_tower,
)
from vlm_jax.weights.classes import within
from vlm_jax.weights.files import read_json, read_tensors
from vlm_jax.weights.fitting import projector, replace_compressor, same_projector, with_compressor
from vlm_jax.weights.folder import Model
from vlm_jax.weights.gguf import Rows
from vlm_jax.weights.methods import Wish
from vlm_jax.weights.stored import Stored
from vlm_jax.weights.values import value_text

Section = dict[str, Any]


def llava(path: Path, *, vision: Path | None, wish: Wish) -> Model:
    """A whole published model including its compressor, or a model folder.

    `vision` is the folder of the tower for a LLaVA in its first layout. `wish` holds the flags
    about the compressor, which is replaced only with an explicit flag.
    """
    fields = read_json(path / "config.json")
    if fields.get("model_type") == folder.MODEL_TYPE:
        return reselected(folder.read(path), vision=vision, wish=wish, path=path)
    described = architectures.read(path)
    if described.kind in ("tower", "llm"):
        raise ValueError(
            f"{path} holds a {described.kind} alone: give --vision=DIR and --llm=DIR to make a "
            "model of the two"
        )
    stored = read_tensors(path)
    with within(str(path)):
        tensors = names.by_canonical_name(stored)
        refuse_newline(tensors)
    vit, flat, notes = described.vit, {}, {}
    if described.kind == "llava-1.5":
        flat = fields
        vit, notes = tower_of_llava15(path, vision, described.vit, tensors)
    elif vision:
        raise ValueError(f"{path} has its own vision tower: leave --vision out")
    with within(str(path)):
        sizes.check(vit, described.llm, {n: x.shape for n, x in tensors.items()})
        inside = any(name.startswith("compressor.") for name in tensors)
        if wish.projector and not (inside or wish.kind or wish.replace):
            # Weights that stage 1 saved separately from a model whose configuration names them.
            tensors |= projector(wish.projector)
        trained = methods.trained_compressor(
            flat, {n: x.shape for n, x in tensors.items()}, vit, wish
        )
    image = preprocessor.facts(vision or path, vit, pad=described.image_fit == "pad")
    model_facts = facts(path, described, image)
    model = Model(
        vit,
        described.llm,
        folder.PLAIN | dict(tokens=sizes.patches(vit) + vit["keep_class"]),
        model_facts,
        tensors,
        path,
        preprocessor.notes(vision or path, model_facts["image"]) | notes,
    )
    if trained is None or wish.replace:
        return replace_compressor(model, wish) if wish.flags() else model
    trained = methods.apply_flags(trained, wish, vit, path)
    model.compressor |= folder.PLAIN | trained.method.section()
    model.vit |= dict(levels=trained.levels)
    with_text_tower(model, trained.method, wish)
    if wish.projector:
        same_projector(model, wish)
    return model


def reselected(
    model: Model, *, vision: Path | None, wish: Wish, path: PurePath, what: str = "a model folder"
) -> Model:
    """A model of ours as it is, or, if it was trained on all patches, with another selection of
    them behind the same projector.

    Raises ValueError for flags that would change what was trained.
    """
    if not (flags := wish.flags() + ([f"--vision={vision}"] if vision else [])):
        return model
    old = compressors.describe(folder.PLAIN | model.compressor)
    kind = compressors.named(wish.kind) if wish.kind else type(old)
    others = replace(wish, kind=None, tokens=None, text_tower=None) != Wish(seed=wish.seed)
    if vision or others or not (old.selects and kind.selects):
        raise ValueError(
            f"{path} is {what} already: it is converted as it is, without {' '.join(flags)}; one "
            "that was trained on all patches may select some of them (--compressor, --tokens)"
        )
    if kind is type(old):
        method = old.at(wish.tokens)
    else:
        method = methods.projected(wish, kind, model.vit)
        # Of a CLIP that the new method does not read.
        own = {f"compressor.{name}" for name in method.published()}
        model.tensors = {
            name: x
            for name, x in model.tensors.items()
            if name in own or not name.startswith("compressor.")
        }
        model.text_tokenizer = None
        with_text_tower(model, method, wish)
    model.compressor = folder.PLAIN | method.section()
    return model


def with_text_tower(model: Model, method: Method, wish: Wish) -> None:
    """Adds the CLIP that a method reads the question with; `model` is changed in place."""
    if method.clip:
        tower = text_tower.read(wish.text_tower, method.kind)
        model.tensors |= tower.tensors
        model.text_tokenizer = tower.tokenizer


def refuse_newline(tensors: dict[str, Stored]) -> None:
    """Raises ValueError for the tensor with which LLaVA-1.6 ends each row of image tiles."""
    if newlines := [name for name in tensors if name.rpartition(".")[2] == "image_newline"]:
        raise ValueError(
            f"it has {newlines[0]}: LLaVA-1.6 and NeXT cut images into tiles, which is not "
            "supported: take a LLaVA-1.5"
        )


def tower_of_llava15(
    path: Path, vision: Path | None, choice: Section, tensors: dict[str, Stored]
) -> tuple[Section, Section]:
    """The `vit` section of a LLaVA in its first layout, and notes about its tower.

    The tower's tensors are added to `tensors`.
    """
    fields = read_json(path / "config.json")
    name = fields.get("mm_vision_tower", "openai/clip-vit-large-patch14-336")
    if vision is None:
        raise ValueError(
            f"{path} is a LLaVA-1.5 as first published, whose vision tower is elsewhere: give "
            f"--vision=DIR, a folder with {value_text(name).strip(chr(39))}"
        )
    vit, tower = of_tower(vision)
    notes: Section = {}
    # The published code ignores a tower inside unless it was trained.
    if not fields.get("unfreeze_mm_vision_tower"):
        if inside := [n for n in tensors if n.startswith("vit.")]:
            notes["tower"] = (
                f"{len(inside)} tensors of the tower inside were replaced by those of {vision}, "
                "because config.json has no unfreeze_mm_vision_tower"
            )
        for name in inside:
            del tensors[name]
        tensors |= tower
    with within(f"{path}/config.json"):
        width = fields.get("mm_hidden_size", vit["width"])
        if width != vit["width"]:
            raise ValueError(
                f"mm_hidden_size={value_text(width)}, and the tower of --vision={vision} has "
                f"{vit['width']} channels"
            )
        architectures.choose_level(vit, choice["layer"], choice["strategy"])
    return vit, notes


def assemble(vision: Path | ConfigDict | Model, llm: Path, wish: Wish) -> Model:
    """A new model from a tower, a compressor and a language model.

    `vision` is the folder of a tower, a model whose tower is taken, or a configuration whose tower
    is drawn.
    """
    if wish.replace:
        raise ValueError("--replace-compressor is for --from: a new model has none to replace")
    described = architectures.read(llm)
    if described.kind != "llm":
        raise ValueError(f"--llm={llm} holds a {described.kind}, not a language model alone")
    stored = read_tensors(llm)
    if isinstance(vision, ConfigDict):
        vit, image, notes = vision.vit.to_dict(), preprocessor.of_data(vision.data), {}
        tower = new_tower(vit, described.llm, wish.seed)
        wish = replace(wish, levels=wish.levels or vit["levels"])
        notes["tower"] = (
            f"{len(tower)} tensors of a new one, drawn with seed {wish.seed}: it sees nothing "
            "before it is trained"
        )
    elif isinstance(vision, Model):
        vit, image, notes = dict(vision.vit), vision.facts["image"], {}
        tower = {name: x for name, x in vision.tensors.items() if name.startswith("vit.")}
        wish = replace(wish, levels=wish.levels or tuple(vit["levels"]))
    else:
        vit, tower = of_tower(vision)
        image = preprocessor.facts(vision, vit)
        notes = preprocessor.notes(vision, image)
    with within(f"--llm={llm}"):
        tensors = tower | only_part("llm.", names.by_canonical_name(stored), "language model")
        sizes.check(vit, described.llm, {n: x.shape for n, x in tensors.items()})
    if kinds := sorted({x.kind for x in stored.values() if isinstance(x, Rows) and x.kind}):
        notes["dequantized"] = f"tensors of {', '.join(kinds)} became float32"
    none = folder.PLAIN | dict(tokens=sizes.patches(vit))
    model_facts = facts(llm, described, image)
    model = Model(vit, described.llm, none, model_facts, tensors, llm, notes)
    return with_compressor(model, wish)


def new_tower(vit: Section, llm: Section, seed: int) -> dict[str, np.ndarray]:
    """The published tensors of a new tower, in front of any language model."""
    size = Model(vit, llm, folder.PLAIN | dict(tokens=sizes.patches(vit)), {}, {}).size()
    table = names.vit_table(vlm.shapes(size).vit)
    return folder.fresh(size, [f"vit.{name}" for name in table], seed=seed)


def only_part(part: str, tensors: dict[str, Stored], what: str) -> dict[str, Stored]:
    """The tensors of one part. Raises ValueError if there are others, which would be lost."""
    others = [n for n in tensors if not n.startswith(part) and not names.matches(n, names.UNREAD)]
    if others:
        raise ValueError(f"it is not only a {what}: it also has {names.names_text(others, 4)}")
    return {name: x for name, x in tensors.items() if name.startswith(part)}


def of_tower(path: Path) -> tuple[Section, dict[str, Stored]]:
    """The `vit` section and the tensors of a vision tower, alone or as part of a CLIP."""
    described = architectures.read(path)
    if described.kind != "tower":
        raise ValueError(f"--vision={path} holds a {described.kind}, not a vision tower")
    vit = described.vit | dict(levels=(described.vit["depth"] - 1,))
    stored = read_tensors(path)
    with within(f"--vision={path}"):
        return vit, only_part("vit.", names.by_canonical_name(stored), "vision tower")


def facts(path: Path, described: architectures.Published, image: Section) -> Section:
    """Facts that generation needs in addition to the sizes."""
    return dict(
        image=image,
        image_token=described.image_token,
        template=template(path, described),
        max_length=described.length,
        ends=ends.of(path, described.family),
    )


def template(path: Path, described: architectures.Published) -> str:
    """The conversation template of this model: a name of data.template."""
    own = any((path / name).is_file() for name in ("chat_template.jinja", "chat_template.json"))
    if not own and (path / "tokenizer_config.json").is_file():
        own = bool(read_json(path / "tokenizer_config.json").get("chat_template"))
    if described.kind == "llava-1.5" or not own:
        return "chatml" if "qwen" in described.family else "vicuna_v1"
    # Qwen's own template is chatml, except for the system text, which differs between its versions.
    return "chatml" if described.kind == "llm" and "qwen" in described.family else "checkpoint"


def numbers(text: str | None) -> tuple[int, ...] | None:
    """Block numbers from a text with commas; None for None."""
    if text is None:
        return None
    parts: Sequence[str] = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"--levels={text}: block numbers with commas, such as 12,16,22,23")
    return tuple(int(part) for part in parts)


def of_run(path: PurePath, config: ConfigDict, model: vlm.VLM) -> Model:
    """A model trained by `vlm-jax train`, from its configuration and its weights in memory."""
    description = described_run(path, config)
    description.tensors = folder.tensors_of(model)
    return description


def described_run(path: PurePath, config: ConfigDict) -> Model:
    """The model that a run's configuration describes, without tensors."""
    compressor = vlm.shapes(VLMSize.of(config)).compressor
    # Rows had room for the most tokens: the largest V of requests or of an adaptive method.
    largest = max(compressor.tokens, config.compressor.tokens, *compressor.buckets)
    return Model(
        config.vit.to_dict(),
        config.llm.to_dict(),
        config.compressor.to_dict(),
        dict(
            image=preprocessor.of_data(config.data),
            image_token=None,
            max_length=config.data.text_length + largest * clips.room(config.data),
            template=config.data.template,
            ends=ends.of_run(config.start_from),
        ),
        {},
        files.on_disk(config.data.tokenizer or path / "tokenizer"),
        pruning=config.pruning.to_dict(),
    )
