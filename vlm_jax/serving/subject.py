# SPDX-License-Identifier: Apache-2.0
"""The model of an evaluation, the fields that an evaluation may change, and its name."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from ml_collections import ConfigDict

from vlm_jax import files
from vlm_jax.data import clips
from vlm_jax.data.processor import Processor, RowFormat, load_tokenizer
from vlm_jax.data.tokenizer import hash_of
from vlm_jax.models.sizes import VLMSize
from vlm_jax.models.vlm import VLM
from vlm_jax.training import fields, runs
from vlm_jax.training.cells import cells_of
from vlm_jax.training.fields import Change
from vlm_jax.training.recipe import Recipe
from vlm_jax.training.workdir import finished, flat
from vlm_jax.weights import folder as model_folders
from vlm_jax.weights import preprocessor
from vlm_jax.weights.processors import processor_of

# Changes that make another evaluation of a model.
NAMED = (Change.SHOWN, Change.PLACE, Change.ANSWERS, Change.BATCH)
# The order of the parts of a name; other fields are between them, by field name.
ORDER = ("evaluate.split", "data.source", "data.path", "data.images", "data.blind")
LAST = {
    "compressor.tokens": "v",
    "pruning.kind": "",
    "pruning.layers": "after",
    "pruning.tokens": "keep",
    "pruning.weight": "weight",
    "pruning.dropped": "dropped",
    "evaluate.batch": "batch",
    "evaluate.max_new_tokens": "new",
}


@dataclass(frozen=True)
class Subject:
    """The model that is evaluated: that of a trained run, or of a model folder.

    `config` is its configuration as far as the folder records it. An evaluation with the folder's
    own settings has the name ""; for a cell (whose folder has the grid's settings) and for a model
    folder (which has none) the name is the split.
    """

    folder: PurePath
    config: ConfigDict
    run: runs.Run | None = None
    stored: model_folders.Model | None = None

    @classmethod
    def of(cls, path: str) -> "Subject":
        """The model in a folder. Raises FileNotFoundError or ValueError if there is none."""
        folder = files.path_of(path)
        if runs.trained_here(path, "--workdir"):
            run = runs.of(path, "--workdir")
            return cls(folder, run.config, run=run)
        stored = model_folders.read(folder)
        return cls(folder, stored.config(), stored=stored)

    def default(self) -> ConfigDict | None:
        """The configuration of an evaluation by the folder's own settings, if it has any."""
        return None if self.run is None else self.run.config.copy_and_resolve_references()

    def requested(self, given: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
        """The configuration for evaluating this model, from the `given` one.

        Raises:
          ValueError: for fields on the command line that describe another model.
        """
        config = given.copy_and_resolve_references()
        if self.stored is not None:
            facts = self.stored.facts
            own = dict(
                vit=self.stored.vit,
                llm=self.stored.llm,
                compressor=dict(self.stored.compressor),
                pruning=self.stored.config().pruning.to_dict(),
                data=dict(
                    template=facts.get("template", config.data.template),
                    tokenizer=str(self.stored.tokenizer or ""),
                    **preprocessor.configured(facts["image"]),
                ),
            )
            for section, values in own.items():
                config[section].update({k: v for k, v in values.items() if k in config[section]})
        elif self.run.grid and "grid" in config:
            named = {cell.name: cell.config for cell in cells_of(config)}
            if self.folder.name not in named:
                raise ValueError(
                    f"--config describes a grid without {self.folder.name}: leave --config out, "
                    "the grid's folder has its own"
                )
            config = named[self.folder.name]
        elif self.run.config.start_from and given.start_from == self.run.config.start_from:
            # As training does.
            for section in ("vit", "llm"):
                config[section].update(self.run.config[section].to_dict())
            for name, value in self.run.config.data.items():
                if name.startswith("image_") or name == "tokenizer":
                    config.data[name] = value
        now = flat(config)
        for name, value in fields.flat(dict(overrides)).items():
            free = self.free(name, now, now | {name: value})
            if name in now and now[name] != value and not free:
                raise ValueError(
                    f"--config.{name}={fields.value_text(value)}: the model in {self.folder} has "
                    f"{fields.value_text(now[name])}, and an evaluation cannot change it; leave it "
                    "out"
                )
            if name in now and free:
                section, _, leaf = name.rpartition(".")
                (config[section] if section else config)[leaf] = overrides[name]
        return config

    def free(self, name: str, then: fields.Flat, now: fields.Flat) -> bool:
        """Whether an evaluation may change a field."""
        if self.stored is not None and name == "data.image_fit":
            return False  # a model folder prepares images by its own description
        return fields.change_of(name, then, now) is not Change.RUN

    def settings(self, config: ConfigDict, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """The fields in which an evaluation differs from the folder's own, with their values.

        Raises:
          ValueError: for a field of the trained model.
        """
        then, now = flat(self.config), flat(config)
        if self.stored is not None:
            named = {"evaluate.split", "data.source", "data.path", *overrides}
            return {
                name: now[name]
                for name in sorted(named & now.keys())
                if now[name] != "" and fields.change_of(name, now, now) in NAMED
            }
        changed, refused = {}, []
        for name in fields.differing(then, now):
            change = fields.change_of(name, then, now)
            if change is Change.RUN:
                refused.append(name)
            elif change in NAMED:
                changed[name] = now.get(name)
        if refused:
            raise ValueError(
                f"{self.folder} holds a model that was trained differently "
                f"({fields.changes(refused, then, now)}): an evaluation may change the data, the "
                "prompt, the batch and the lengths, not the model; leave --config out, the folder "
                "has its own"
            )
        changed.pop("data.tokenizer", None)  # `processor` compares what it holds
        if self.run.grid:
            changed |= {"evaluate.split": config.evaluate.split}
        return changed

    def processor(self, config: ConfigDict) -> Processor:
        """The processor of this model. Raises ValueError for another tokenizer."""
        if self.stored is not None:
            self.stored.facts["template"] = config.data.template
            processor = processor_of(self.stored)
            processor.text_length = config.data.text_length
            processor.question_length = config.data.question_length
            processor.images_per_row = clips.room(config.data)
            processor.blind = config.data.blind
            return processor
        named = config.data.tokenizer or self.run.tokenizer
        tokenizer = load_tokenizer(named)
        if named != self.run.tokenizer:
            # The folder may have moved since; equal tokenizers have equal hashes.
            then = self.run.content().get("tokenizer") or hash_of(
                load_tokenizer(self.run.tokenizer)
            )
            if hash_of(tokenizer) != then:
                raise ValueError(
                    f"data.tokenizer={named} is not the one with which the model in {self.folder} "
                    "was trained: leave it out"
                )
        return Processor(tokenizer, RowFormat.of(config))

    def model(self, config: ConfigDict) -> VLM:
        """The model on the current mesh."""
        if self.run is not None:
            return finished(self.run.home, Recipe.of(config))
        self.stored.check()
        return runs.load(self.stored, VLMSize.of(config), what=f"the model in {self.folder}")


def name_of(settings: Mapping[str, Any], data_hash: str) -> str:
    """The name of an evaluation with these settings: "val", "vqa-1f2e3d4c-v4"; "" for none."""
    parts = []
    others = sorted(settings.keys() - {*ORDER, *LAST})
    for name in [*ORDER, *others, *LAST]:
        if name not in settings:
            continue
        value = fields.value_text(settings[name])
        if isinstance(settings[name], (list, tuple)):
            value = "+".join(map(str, settings[name]))
        if name == "data.path":
            parts.append(f"{Path(value).stem}-{data_hash[:8]}")
        elif name == "data.blind":
            parts.append("blind" if settings[name] else "sighted")
        elif name in LAST:
            parts.append(f"{LAST[name]}{value}")
        elif name in others or name == "data.images":
            parts.append(f"{name.rpartition('.')[2]}-{Path(value).name}")
        else:
            parts.append(value)
    return "-".join(re.sub(r"[^\w.+-]+", "_", part) for part in parts)
