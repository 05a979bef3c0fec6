# SPDX-License-Identifier: Apache-2.0
"""What the cells of a grid share: data, the encoder and its features, tokenizers, LLMs to start
from."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ml_collections import ConfigDict

from vlm_jax import files, hosts, progress
from vlm_jax.data import processor, sources, targets
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

Words = tuple  # what the rows of a cell depend on besides its images: fields of `data`, vocabulary


@dataclass(frozen=True)
class Shared:
    """What all cells share: splits, the encoder, and its features of their images.

    Attributes:
      words: the two splits with the processors of cells whose tokenizer, template or lengths are
        not those of the grid.
      starts: folder -> digest of the LLM in it, of those that cells start from.
      fingerprint: of the encoder.
    """

    train: Inputs
    test: Inputs
    features: dict[Sight, Features]
    encoder: ViT
    words: dict[Words, tuple[Inputs, Inputs]] = field(default_factory=dict)
    starts: dict[str, str] = field(default_factory=dict)
    fingerprint: str = ""

    def inputs(self, cell: Cell) -> tuple[Inputs, Inputs]:
        """The two splits as this cell reads them."""
        return self.words.get(words_of(cell.config), (self.train, self.test))


def words_of(config: ConfigDict) -> Words:
    """What tells the rows of one cell from those of another: what an LLM may set in `data`."""
    return tuple(config.data[name] for name in OWN["data"])


def sights_of(cells: Sequence[Cell]) -> list[Sight]:
    """The different ways in which images are encoded for these cells."""
    # They depend only on the compressor: the cells of one LLM and seed have all of them.
    distinct = [c for c in cells if (c.llm, c.seed) == (cells[0].llm, cells[0].seed)]
    sights = [Sight.of(vlm.shapes(cell.recipe.model).compressor) for cell in distinct]
    return list(dict.fromkeys(sights))


def prepare(
    claimed: Claim,
    phase: Phases,
    sights: Sequence[Sight] = (Sight(),),
    cells: Sequence[Cell] = (),
) -> Shared:
    """Data, encoder, features and tokenizers, made once and reused by a restart.

    ValueError if the folder was started with other data, tokenizers or LLMs to start from.
    """
    folder, recipe = claimed.folder, Recipe.of(claimed.config)
    with phase("data"):
        with progress.doing("opening the evaluation data"):
            test = sources.open_source(recipe.origin, claimed.config.evaluate.split)
        folders = starts.digests(claimed.config)
        own = {c.llm: c for c in cells if words_of(c.config) != words_of(claimed.config)}
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
        inputs, begin = stages.open_inputs(claimed, recipe, evaluation=test.data_hash, **hashes)
        train, base = inputs.source, inputs.processor
        progress.say(f"data: {json.dumps(test.describe())}")
        words: dict[Words, tuple[Inputs, Inputs]] = {}
        for cell in own.values():
            if (key := words_of(cell.config)) in words:
                continue
            rows = RowFormat.of(cell.config)
            tokenizer = tokenizers.get(cell.config.data.tokenizer, base.tokenizer)
            check_vocabulary(tokenizer, rows.vocab)
            theirs = processor.Processor(
                tokenizer, replace(rows, query=base.query, blind=base.blind)
            )
            if note := targets.check(train, theirs, skip=recipe.skip):
                progress.say(f"{cell.llm}: {note}")
            words[key] = Inputs(train, theirs), Inputs(test, theirs)
    with phase("encoder"):
        encoder = stages.pretrain_encoder(recipe, folder, inputs, begin=begin)
    begin()
    hosts.check_same("evaluation data", test.data_hash)
    if hosts.is_writer():
        files.write_json(folder / "baselines.json", {"majority": sources.majority(train, test)})
    with phase("features"):
        features = {
            sight: Features(
                *(
                    features_of(
                        encoder,
                        source,
                        base,
                        sight,
                        folder / "features",
                        skip=recipe.skip,
                    )
                    for source in (train, test)
                ),
                blind_of(encoder, base, sight),
            )
            for sight in sights
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
