# SPDX-License-Identifier: Apache-2.0
"""Greedy answers to every example of a split, and what they took."""

import json
import time
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vlm_jax import files, hosts, preemption, progress
from vlm_jax.data import loader, sources
from vlm_jax.data.processor import Processor
from vlm_jax.data.texts import Texts
from vlm_jax.models import vlm
from vlm_jax.models.vlm import VLM
from vlm_jax.serving.decoder import Decoder


class Clock:
    """What batches of one shape take to answer, once everything is compiled."""

    def __init__(self) -> None:
        self.seconds, self.new_tokens, self.batch = [], [], 0

    def note(self, seconds: float, shape: tuple[int, int]) -> None:
        """One batch of answers [B, n] took `seconds`."""
        self.seconds.append(seconds)
        self.batch, count = shape
        self.new_tokens.append(count)

    def timing(self) -> dict[str, Any]:
        """batch, seconds_per_example (the median batch's) and mean new_tokens; {} of one batch.

        The first batch compiles, and is left out.
        """
        if len(self.seconds) < 2:
            return {}
        return dict(
            batch=self.batch,
            seconds_per_example=float(np.median(self.seconds[1:])) / self.batch,
            new_tokens=float(np.mean(self.new_tokens[1:])),
        )


def predict(
    config: ConfigDict,
    model: VLM,
    source: sources.Source,
    processor: Processor,
    *,
    features: np.ndarray | None = None,
    texts: Texts | None = None,
    clock: Clock | None = None,
    faults: loader.Faults | None = None,
    stops: bool = True,
) -> Iterator[dict[str, Any]]:
    """One record per example: id, task, family, cluster, prediction, answer; given_id where the
    data set repeats an id.

    Every process has all records; it reads the images of its own devices' rows alone.

    `clock` notes what answering each batch took, loading and decoding of text apart. `faults` is
    filled with the examples that have no record because they cannot be used. With `stops` a SIGTERM
    ends it between batches; within a training, which has steps to save, it does not.
    """
    tokenizer, pruning = processor.tokenizer, model.llm.pruning
    if pruning is not None and pruning.of_clips and config.data.images_per_row > 1:
        raise ValueError(f"data.images_per_row={config.data.images_per_row}: {vlm.ONE_CLIP}")
    if buckets := config.data.buckets:
        # Training rows may be longer: of several questions, or with long answers.
        skip = config.data.on_bad_example == "skip"
        texts = texts or Texts(source, processor, answer=False, skip=skip)
        texts = texts.shortened(buckets)
        processor = texts.processor
    if model.compressor.buckets:  # trained for any V
        model = model.at(config.compressor.tokens)
    answer = Decoder(model, stop_ids=processor.stop_ids, brief=True)
    batches = loader.evaluation_batches(
        source,
        processor,
        batch=config.evaluate.batch,
        features=features,
        texts=texts,
        skip=config.data.on_bad_example == "skip",
        mesh=jax.sharding.get_mesh(),
        faults=faults,
    )
    with progress.doing(f"answers to the {source.split} split", len(source)) as task:
        task.note(0)
        for batch in batches:
            if stops:
                preemption.point("the same command makes the answers anew")
            valid, index = hosts.fetched((batch.pop("valid"), batch.pop("index")))
            then = time.perf_counter()
            answers = answer(batch, new_tokens=config.evaluate.max_new_tokens)
            if clock is not None:
                clock.note(time.perf_counter() - then, answers.shape)
            for i, ids, counts in zip(index, answers, valid, strict=True):
                if not counts:
                    continue
                example = source[int(i)]
                ended = np.flatnonzero(np.isin(ids, processor.stop_ids))
                text = tokenizer.decode(ids[: ended[0]] if ended.size else ids).strip()
                yield dict(
                    id=example.id,
                    task=example.task,
                    family=example.family,
                    cluster=example.cluster,
                    prediction=text,
                    answer=example.turns[-1][1],
                    **({"given_id": example.given} if example.given else {}),
                )
            task.note(int(index[-1]) + 1)
    if faults is not None:
        for found in hosts.collected(list(faults.items())):
            faults |= {example: tuple(fault) for example, fault in found}


def write_predictions(path: PurePath, records: list[dict[str, Any]]) -> None:
    """One JSON line per record, whole or not at all."""
    files.write_text(path, "".join(json.dumps(r, sort_keys=True) + "\n" for r in records))
