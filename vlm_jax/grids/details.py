# SPDX-License-Identifier: Apache-2.0
"""What a row says of its cell beside the scores: its method, its V, the lengths of its requests."""

from typing import Any

import jax
import numpy as np

from vlm_jax import hosts
from vlm_jax.compressors.compressor import Compressor
from vlm_jax.compressors.method import Method
from vlm_jax.models import lora
from vlm_jax.models.sizes import LoRASize
from vlm_jax.training.features import batches_of
from vlm_jax.training.stages import Inputs


def adapters_of(adapters: LoRASize) -> dict[str, Any]:
    """What a row says of the adapters that its model was trained by."""
    return vars(adapters) | dict(targets=lora.check(adapters))


def tokens_read(compressor: Compressor, features: np.ndarray) -> int | float:
    """V: visual tokens of an image, their mean over these features where an image chooses."""
    if not compressor.adaptive:
        return compressor.tokens
    count = jax.jit(lambda module, levels: module(levels).count)
    unread = np.isnan(features[:, 0, 0])
    features = features[~unread] if unread.any() else features
    means = [hosts.fetched(count(compressor, part)) for part in batches_of(features)]
    return float(np.concatenate(means)[: len(features)].mean())


def method_of(method: Method) -> dict[str, str]:
    """What a row says of its compressor: kind, who reads the question for it, what is not its
    published form."""
    return dict(compressor=method.kind, query=method.query, variant=method.variant)


def request_lengths(
    test: Inputs, *, prefix: bool = False, sample: int = 500
) -> tuple[float, float, float]:
    """Mean tokens of prompts, answers and questions of the evaluation split (an even sample of it).

    The question is what a question-reading compressor reads, or with `prefix` all text before the
    image.
    """
    picked = np.linspace(0, len(test.source) - 1, min(sample, len(test.source))).astype(int)
    prompts = [test.processor.text(test.source[int(i)], answer=False) for i in picked]
    wholes = [int(test.processor.text(test.source[int(i)])["length"]) for i in picked]
    prompt = np.mean([int(prompt_row["length"]) for prompt_row in prompts])
    question = np.mean(
        [int(prompt_row["image_at" if prefix else "question_length"]) for prompt_row in prompts]
    )
    return float(prompt), float(np.mean(wholes) - prompt), float(question)
