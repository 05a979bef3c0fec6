# SPDX-License-Identifier: Apache-2.0
"""What the cells of a grid share: data, the encoder and its features, tokenizers, LLMs to start
from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from ml_collections import ConfigDict

from vlm_jax import files, hosts, progress
from vlm_jax.data import clips, processor, sources, targets
from vlm_jax.data.example import Source
from vlm_jax.data.processor import RowFormat
from vlm_jax.data.tokenizer import check_vocabulary, hash_of
from vlm_jax.grids import starts
from vlm_jax.grids.phases import Phases
from vlm_jax.models import vlm
from vlm_jax.models.vit import ViT
from vlm_jax.training import fingerprint, stages
from vlm_jax.training.cells import Cell
from vlm_jax.training.features import Features, Sight, blind_of, features_of
from vlm_jax.training.llms import OWN
from vlm_jax.training.recipe import Recipe
from vlm_jax.training.stages import Inputs
from vlm_jax.training.workdir import Claim

Words = tuple  # what the rows of a cell depend on: frames of a clip, and fields of `data`


@dataclass(frozen=True)
class Shared:
    """What all cells share: splits, the encoder, and its features of their images.

    Attributes:
      train, test: with the most frames of a clip, if there are several numbers of them.
      features: of the images of each number of frames, by sight.
      words: the two splits with the processors of cells whose frames, tokenizer, template or
        lengths are not those of the grid.
      starts: folder -> digest of the LLM in it, of those that cells start from.
      fingerprint: of the encoder.
    """

    train: Inputs
    test: Inputs
    features: dict[tuple[int, Sight], Features]
    encoder: ViT
    words: dict[Words, tuple[Inputs, Inputs]] = field(default_factory=dict)
    starts: dict[str, str] = field(default_factory=dict)
    fingerprint: str = ""

    def inputs(self, cell: Cell) -> tuple[Inputs, Inputs]:
        """The two splits as this cell reads them."""
        return self.words.get(words_of(cell.config), (self.train, self.test))

    def encoded(self, cell: Cell, recipe: Recipe) -> Features:
        """The features that a model of a cell reads."""
        return self.features[cell.config.data.frames, sight_of(recipe)]


def words_of(config: ConfigDict) -> Words:
    """What tells the rows of one cell from those of another: frames, and what an LLM may set in
    `data`."""
    return (config.data.frames, *(config.data[name] for name in OWN["data"]))


def sight_of(recipe: Recipe) -> Sight:
    """How the images of a model are encoded."""
    return Sight.of(vlm.shapes(recipe.model).compressor)


def sights_of(cells: Sequence[Cell]) -> dict[Sight, bool]:
    """The ways in which images are encoded for these cells -> whether a model is trained on it."""
    # They depend only on the compressor: the cells of one LLM and seed have all of them.
    distinct = [c for c in cells if (c.llm, c.seed) == (cells[0].llm, cells[0].seed)]
    answering = dict.fromkeys((sight_of(cell.recipe) for cell in distinct), False)
    return answering | dict.fromkeys((sight_of(cell.training) for cell in distinct), True)


def opened(recipe: Recipe, frames: Sequence[int], split: str) -> dict[int, Source]:
    """A split with each of these numbers of frames of its clips."""
    return {T: sources.open_source(replace(recipe.origin, frames=T), split) for T in frames}


def prepare(
    claimed: Claim,
    phase: Phases,
    sights: Mapping[Sight, bool] = MappingProxyType({Sight(): True}),
    cells: Sequence[Cell] = (),
) -> Shared:
    """Data, encoder, features and tokenizers, made once and reused by a restart.

    ValueError if the folder was started with other data, tokenizers or LLMs to start from, and for
    frames that not every example has.
    """
    folder, config = claimed.folder, claimed.config.copy_and_resolve_references()
    shown = sorted({c.config.data.frames for c in cells}) or [config.data.frames]
    config.data.frames = shown[-1]
    recipe = Recipe.of(config)
    with phase("data"):
        with progress.doing("opening the evaluation data"):
            tests = opened(recipe, shown, config.evaluate.split)
        test = tests[shown[-1]]
        folders = starts.digests(claimed.config)
        own = {c.llm: c for c in cells if words_of(c.config)[1:] != words_of(config)[1:]}
        tokenizers = {
            path: processor.load_tokenizer(path)
            for cell in own.values()
            if (path := cell.config.data.tokenizer)
        }
        hashes = {
            f"LLM in grid.llms.{name}.start_from": folders[entry.start_from]
            for name, entry in claimed.config.grid.llms.items()
            if entry.get("start_from")
        } | {
            f"tokenizer of grid.llms.{name}": hash_of(tokenizers[cell.config.data.tokenizer])
            for name, cell in own.items()
            if cell.config.data.tokenizer
        }
        hashes |= {f"evaluation of {T} frames": tests[T].data_hash for T in shown[:-1]}
        inputs, begin = stages.open_inputs(claimed, recipe, evaluation=test.data_hash, **hashes)
        train, base = inputs.source, inputs.processor
        trains = opened(recipe, shown[:-1], "train") | {shown[-1]: train}
        for T in filter(None, shown):
            for source in (trains[T], tests[T]):
                clips.check_all(source, T)
        progress.say(f"data: {json.dumps(test.describe())}")
        words: dict[Words, tuple[Inputs, Inputs]] = {}
        for cell in cells:
            if (key := words_of(cell.config)) in words or key == words_of(config):
                continue
            rows = RowFormat.of(cell.config)
            tokenizer = tokenizers.get(cell.config.data.tokenizer, base.tokenizer)
            check_vocabulary(tokenizer, rows.vocab)
            theirs = processor.Processor(
                tokenizer, replace(rows, query=base.query, blind=base.blind)
            )
            T = cell.config.data.frames
            if cell.llm in own and (note := targets.check(train, theirs, skip=recipe.skip)):
                progress.say(f"{cell.llm}: {note}")
            words[key] = Inputs(trains[T], theirs), Inputs(tests[T], theirs)
    with phase("encoder"):
        encoder = stages.pretrain_encoder(recipe, folder, inputs, begin=begin)
    begin()
    hosts.check_same("evaluation data", test.data_hash)
    if hosts.is_writer():
        files.write_json(folder / "baselines.json", {"majority": sources.majority(train, test)})
    with phase("features"):
        features = {
            (T, sight): Features(
                *(
                    features_of(
                        encoder,
                        source,
                        base,
                        sight,
                        folder / "features" / (f"frames{T}" if len(shown) > 1 else ""),
                        skip=recipe.skip,
                    )
                    if wanted
                    else None
                    for source, wanted in ((trains[T], trained), (tests[T], True))
                ),
                blind_of(encoder, base, sight),
            )
            for T in shown
            for sight, trained in sights.items()
        }
    return Shared(
        inputs,
        Inputs(test, base),
        features,
        encoder,
        words,
        folders,
        fingerprint.of_weights(encoder),
    )
