# SPDX-License-Identifier: Apache-2.0
"""Fields of a row besides the scores: the cell's method, its V, the lengths of its requests."""

from typing import Any

import jax
import numpy as np

from vlm_jax import hosts
from vlm_jax.compressors.compressor import Compressor
from vlm_jax.cost import flops as cost
from vlm_jax.data import loader
from vlm_jax.models import lora
from vlm_jax.models.sizes import LoRASize, VLMSize
from vlm_jax.models.vlm import VLM
from vlm_jax.training.features import batches_of
from vlm_jax.training.recipe import Recipe
from vlm_jax.training.stages import Inputs


def adapters_of(adapters: LoRASize) -> dict[str, Any]:
    """The fields of a row about the adapters of its model."""
    return vars(adapters) | dict(targets=lora.check(adapters))


def tokens_read(model: VLM, features: np.ndarray, *, frames: int = 1) -> int | float:
    """V: visual tokens that the LLM reads of an image, or of one of the `frames` of a clip.

    The mean over its layers where it prunes, over the frames where it drops tokens of a clip, and
    over these features for an adaptive method.
    """
    V, pruning = tokens_given(model.compressor, features), model.llm.pruning
    if pruning is not None and pruning.of_clips:
        return pruning.given(V, frames) / frames
    return cost.read_tokens(V, model.llm.size, pruning)


def tokens_given(compressor: Compressor, features: np.ndarray) -> int | float:
    """Visual tokens of an image; for an adaptive method their mean over these features."""
    if compressor.method.summarizes:
        return compressor.method.tokens  # what the text reads, and a cache keeps
    if not compressor.adaptive:
        return compressor.tokens
    count = jax.jit(lambda module, levels: module(levels).count)
    unread = np.isnan(features[:, 0, 0])
    features = features[~unread] if unread.any() else features
    means = [hosts.fetched(count(compressor, part)) for part in batches_of(features)]
    return float(np.concatenate(means)[: len(features)].mean())


def method_of(size: VLMSize) -> dict[str, str]:
    """The fields of a row about its compressor: its kind, how it reads the question, and how the
    model differs from its published form, pruning included."""
    method = size.compressor
    variants = (method.variant, size.pruning.variant if size.pruning else "")
    return dict(
        compressor=method.kind,
        query=method.query,
        variant=", ".join(filter(None, variants)),
    )


def text_places(recipe: Recipe, inputs: Inputs, *, seed: int) -> float | None:
    """Places of text of a training row, on average, where rows are as long as their bucket; None
    where all have data.text_length."""
    if not recipe.arrangement.buckets:
        return None
    plan = loader.planned(
        inputs.texts(answer=True, skip=recipe.skip),
        recipe.arrangement,
        batch=recipe.finetune.batch,
        seed=seed,
        visual=recipe.visual,
    )
    return plan.text


def request_lengths(
    test: Inputs, *, prefix: bool = False, sample: int = 500
) -> tuple[float, float, float]:
    """Mean tokens of prompts, answers and questions of the evaluation split (an even sample of it).

    The question is the text that a question-reading compressor reads; with `prefix`, all text
    before the image.
    """
    picked = np.linspace(0, len(test.source) - 1, min(sample, len(test.source))).astype(int)
    prompts = [test.processor.text(test.source[int(i)], answer=False) for i in picked]
    wholes = [int(test.processor.text(test.source[int(i)])["length"]) for i in picked]
    prompt = np.mean([int(prompt_row["length"]) for prompt_row in prompts])
    # The frames of a clip are read with one question.
    name = "image_at" if prefix else "question_length"
    question = np.mean([np.atleast_1d(prompt_row[name])[0] for prompt_row in prompts])
    return float(prompt), float(np.mean(wholes) - prompt), float(question)
