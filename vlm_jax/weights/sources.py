# SPDX-License-Identifier: Apache-2.0
"""What a user has, gathered into one model: a published LLaVA, or tower, compressor and LLM."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.models import vlm
from vlm_jax.models.sizes import VLMSize
from vlm_jax.weights import architectures, ends, folder, methods, names, preprocessor, sizes
from vlm_jax.weights.classes import within
from vlm_jax.weights.files import read_json, read_tensors
from vlm_jax.weights.fitting import fitted, projector, same_projector, with_compressor
from vlm_jax.weights.folder import Model
from vlm_jax.weights.methods import Wish
from vlm_jax.weights.stored import Stored
from vlm_jax.weights.values import value_text

Section = dict[str, Any]


def llava(path: Path, *, vision: Path | None, wish: Wish) -> Model:
    """A whole published model, its compressor with it, or a model folder of ours.

    `vision` is where the tower of a LLaVA in its first layout lies; `wish` is what the flags say of
    the compressor, which is replaced only where they say so by name.
    """
    fields = read_json(path / "config.json")
    if fields.get("model_type") == folder.MODEL_TYPE:
        if given := wish.flags() + ([f"--vision={vision}"] if vision else []):
            raise ValueError(
                f"{path} is a model folder already: it is converted as it is, without "
                f"{' '.join(given)}"
            )
        return folder.read(path)
    described = architectures.read(path)
    if described.kind in ("tower", "llm"):
        raise ValueError(
            f"{path} holds a {described.kind} alone: give --vision=DIR and --llm=DIR to make a "
            "model of the two"
        )
    stored = read_tensors(path)
    with within(str(path)):
        tensors = names.renamed(stored)
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
            # What stage 1 has saved beside a model whose configuration tells of it.
            tensors |= projector(wish.projector)
        trained = methods.inside(flat, {n: x.shape for n, x in tensors.items()}, vit, wish)
    told = facts(path, vision or path, vit, described)
    model = Model(
        vit,
        described.llm,
        folder.PLAIN | dict(tokens=sizes.patches(vit) + vit["keep_class"]),
        told,
        tensors,
        path,
        preprocessor.notes(vision or path, told["image"]) | notes,
    )
    if trained is None or wish.replace:
        return fitted(model, wish) if wish.flags() else model
    trained = methods.chosen(trained, wish, vit, path)
    model.compressor |= folder.PLAIN | trained.method.section()
    model.vit |= dict(levels=trained.levels)
    if wish.projector:
        same_projector(model, wish)
    return model


def refuse_newline(tensors: dict[str, Stored]) -> None:
    """ValueError for the tensor with which LLaVA-1.6 ends each row of an image's tiles."""
    if found := [name for name in tensors if name.rpartition(".")[2] == "image_newline"]:
        raise ValueError(
            f"it has {found[0]}: LLaVA-1.6 and NeXT cut images into tiles, which is not supported: "
            "take a LLaVA-1.5"
        )


def tower_of_llava15(
    path: Path, vision: Path | None, choice: Section, tensors: dict[str, Stored]
) -> tuple[Section, Section]:
    """The `vit` section of a LLaVA in its first layout, and what is to be noted of its tower, whose
    tensors join `tensors`."""
    fields = read_json(path / "config.json")
    name = fields.get("mm_vision_tower", "openai/clip-vit-large-patch14-336")
    if vision is None:
        raise ValueError(
            f"{path} is a LLaVA-1.5 as first published, whose vision tower lies elsewhere: give "
            f"--vision=DIR, a folder with {value_text(name).strip(chr(39))}"
        )
    vit, tower = of_tower(vision)
    notes: Section = {}
    # The published code ignores a tower inside unless it was trained.
    if not fields.get("unfreeze_mm_vision_tower"):
        if inside := [n for n in tensors if n.startswith("vit.")]:
            notes["tower"] = (
                f"{len(inside)} tensors of the tower inside were left for those of {vision}, as "
                "config.json has no unfreeze_mm_vision_tower"
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


def assembled(vision: Path, llm: Path, wish: Wish) -> Model:
    """A new model of a tower, a compressor and a language model."""
    if wish.replace:
        raise ValueError("--replace-compressor is for --from: a new model has none to replace")
    vit, tensors = of_tower(vision)
    described = architectures.read(llm)
    if described.kind != "llm":
        raise ValueError(f"--llm={llm} holds a {described.kind}, not a language model alone")
    stored = read_tensors(llm)
    with within(f"--llm={llm}"):
        tensors |= alone("llm.", names.renamed(stored), "language model")
        sizes.check(vit, described.llm, {n: x.shape for n, x in tensors.items()})
    none = folder.PLAIN | dict(tokens=sizes.patches(vit))
    told = facts(llm, vision, vit, described)
    about = preprocessor.notes(vision, told["image"])
    made = Model(vit, described.llm, none, told, tensors, llm, about)
    return with_compressor(made, wish)


def alone(part: str, tensors: dict[str, Stored], what: str) -> dict[str, Stored]:
    """The tensors of one part; ValueError where there are others, which would be lost."""
    strange = [n for n in tensors if not n.startswith(part) and not names.matches(n, names.UNREAD)]
    if strange:
        raise ValueError(f"it is no {what} alone: it also has {names.names_text(strange, 4)}")
    return {name: x for name, x in tensors.items() if name.startswith(part)}


def of_tower(path: Path) -> tuple[Section, dict[str, Stored]]:
    """The `vit` section and the tensors of a vision tower, alone or the half of a CLIP."""
    described = architectures.read(path)
    if described.kind != "tower":
        raise ValueError(f"--vision={path} holds a {described.kind}, not a vision tower")
    vit = described.vit | dict(levels=(described.vit["depth"] - 1,))
    stored = read_tensors(path)
    with within(f"--vision={path}"):
        return vit, alone("vit.", names.renamed(stored), "vision tower")


def facts(path: Path, vision: Path, vit: Section, described: architectures.Published) -> Section:
    """What generation needs to know besides the sizes."""
    return dict(
        image=preprocessor.facts(vision, vit, pad=described.image_fit == "pad"),
        image_token=described.image_token,
        template=template(path, described),
        max_length=described.length,
        ends=ends.of(path, described.family),
    )


def template(path: Path, described: architectures.Published) -> str:
    """How a conversation is written for this model: a name of data.template."""
    own = any((path / name).is_file() for name in ("chat_template.jinja", "chat_template.json"))
    if not own and (path / "tokenizer_config.json").is_file():
        own = bool(read_json(path / "tokenizer_config.json").get("chat_template"))
    if described.kind == "llava-1.5" or not own:
        return "chatml" if "qwen" in described.family else "vicuna_v1"
    # Qwen's own template is chatml, the system text apart, which changed between its versions.
    return "chatml" if described.kind == "llm" and "qwen" in described.family else "checkpoint"


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
    compressor = vlm.shapes(VLMSize.of(config)).compressor
    # Rows had room for as many as it can give: of a request's V, or of an image that chooses.
    most = max(compressor.tokens, config.compressor.tokens, *compressor.buckets)
    return Model(
        config.vit.to_dict(),
        config.llm.to_dict(),
        config.compressor.to_dict(),
        dict(
            image=preprocessor.of_data(config.data),
            image_token=None,
            max_length=config.data.text_length + most * config.data.images_per_row,
            template=config.data.template,
            ends=ends.of_run(config.start_from),
        ),
        {},
        Path(config.data.tokenizer) if config.data.tokenizer else path / "tokenizer",
    )
