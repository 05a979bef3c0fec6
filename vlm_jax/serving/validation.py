# SPDX-License-Identifier: Apache-2.0
"""Scores of a model's answers while it is trained."""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.data import loader
from vlm_jax.data.example import Source
from vlm_jax.data.processor import Processor
from vlm_jax.data.texts import Texts
from vlm_jax.evals import embedded
from vlm_jax.models.vlm import VLM
from vlm_jax.serving.predict import predict


def answers(
    config: ConfigDict, source: Source, processor: Processor
) -> Callable[[VLM], dict[str, dict[str, Any]]]:
    """A function that generates answers to `source` with a model and scores them by its protocol.

    The texts are tokenized once. Answers are those of `vlm-jax evaluate`: greedy, in batches of
    evaluate.batch, at most evaluate.max_new_tokens. The model may have adapters, and can be trained
    on.
    """
    skip = config.data.on_bad_example == "skip"
    texts = Texts(source, processor, answer=False, skip=skip)

    def scores(model: VLM) -> dict[str, dict[str, Any]]:
        faults: loader.Faults = {}
        records = list(
            predict(config, model, source, processor, texts=texts, faults=faults, stops=False)
        )
        return embedded.score(source.protocol, records, loader.not_answered(source, faults))

    return scores
