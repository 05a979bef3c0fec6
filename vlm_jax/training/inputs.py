# SPDX-License-Identifier: Apache-2.0
"""What a training reads: its split, the processor of its examples, and what is held out of it."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import numpy as np

from vlm_jax import hosts, progress
from vlm_jax.data import processor, sources, subset, targets, word_tokenizer
from vlm_jax.data.texts import Texts
from vlm_jax.data.tokenizer import check_vocabulary, hash_of, keep_tokenizer
from vlm_jax.training.recipe import Recipe
from vlm_jax.training.workdir import Claim


@dataclass(frozen=True)
class Inputs:
    """A split, the processor of its examples, its cached features if any, and the examples for
    validation if any."""

    source: sources.Source
    processor: processor.Processor
    features: np.ndarray | None = None  # [images, P, Z], raster order
    validation: sources.Source | None = None
    _texts: dict[tuple, Texts] = field(default_factory=dict, repr=False)

    def texts(self, *, answer: bool, skip: bool) -> Texts:
        """The texts of the split, tokenized once for all stages and all cells that read them alike.

        The cells of a grid share these inputs by `dataclasses.replace`; their texts differ only in
        what is read as the question (`Processor.reading_as`).
        """
        key = (self.processor.query, answer, skip)
        if key not in self._texts:
            self._texts[key] = Texts(self.source, self.processor, answer=answer, skip=skip)
        return self._texts[key]


def tokenizer_of(named: str, vocab: int, kept: PurePath | None, source: sources.Source) -> Any:
    """The tokenizer of this name, or the one kept in a run's folder, or a small one trained on the
    training texts."""
    if named:
        tokenizer = processor.load_tokenizer(named)
    elif kept is not None and kept.is_dir():
        tokenizer = processor.load_tokenizer(kept)
    else:
        texts = (text for i in range(len(source)) for turn in source[i].turns for text in turn)
        tokenizer = word_tokenizer.train_tokenizer(texts, vocab)
    check_vocabulary(tokenizer, vocab)
    return tokenizer


def open_inputs(claimed: Claim, recipe: Recipe, **hashes: str) -> tuple[Inputs, Callable[[], None]]:
    """The training split of a claimed folder's run, as `recipe` describes it, and a function that
    records the run in the folder.

    ValueError if the folder was started with different data, a different tokenizer, or anything
    else with different `hashes`.
    """
    named, kept = claimed.config.data.tokenizer, claimed.folder / "tokenizer"
    with progress.doing("opening the training data"):
        source = sources.open_source(recipe.origin, "train")
        held_out = None
        if recipe.validation.hold_out:
            source, held_out = subset.hold_out(source, recipe.validation.hold_out)
    progress.say(f"data: {json.dumps(source.describe())}")
    validation = None
    if recipe.validation.every:
        with progress.doing("opening the validation data"):
            validation = held_out or sources.open_source(recipe.origin, recipe.validation.split)
        progress.say(f"validation data: {json.dumps(validation.describe())}")
    with progress.doing("making or reading the tokenizer"):
        folder = kept if claimed.recorded else None
        tokenizer = tokenizer_of(named, recipe.model.llm.vocab, folder, source)
    claimed.reads(data=source.data_hash, tokenizer=hash_of(tokenizer), **hashes)

    def begin() -> None:
        fresh = claimed.recorded is None
        if fresh and not named and hosts.is_writer():
            keep_tokenizer(tokenizer, kept)
        claimed.begin()

    row_processor = processor.Processor(tokenizer, recipe.rows)
    with progress.doing("looking for rows without an answer"):
        note = targets.check(source, row_processor, skip=recipe.skip)
    if note:
        progress.say(note)
    return Inputs(source, row_processor, validation=validation), begin
