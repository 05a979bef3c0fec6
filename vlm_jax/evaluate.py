# SPDX-License-Identifier: Apache-2.0
"""Trained model to predictions: greedy answers to every example of a split, and their scores.

    vlm-jax evaluate --workdir=runs/one
    vlm-jax evaluate --workdir=runs/one --config.evaluate.split=val
    vlm-jax evaluate --workdir=runs/demo/cells/30k-v4-token_packer-s0
    vlm-jax evaluate --workdir=models/llava --config=configs/base.py --config.data.path=FILE

The folder is that of a finished `vlm-jax train`, which has its configuration (--config may be
given, and must agree), a cell of a grid, or a model folder, whose data --config names.
predictions.jsonl and scores.json are written into it.

Another split, file, prompt, batch, number of answer tokens or, where the compressor serves any,
number of visual tokens is another evaluation of the same model: predictions-val.jsonl,
scores-val.json. Its name and its `settings` say what differs. What was trained cannot be changed.
"""

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vlm_jax import cli, mesh, progress
from vlm_jax.data import loader, sources
from vlm_jax.data.processor import Processor
from vlm_jax.decoding import Decoder
from vlm_jax.evals import tasks
from vlm_jax.evaluations import Subject, name_of
from vlm_jax.learn import fields
from vlm_jax.learn.workdir import flat, lock, write_json
from vlm_jax.models.vlm import VLM

log = logging.getLogger(__name__)


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
    clock: Clock | None = None,
    faults: loader.Faults | None = None,
) -> Iterator[dict[str, Any]]:
    """One record per example: id, task, family, cluster, prediction, answer; given_id where the
    data set repeats an id.

    `clock` notes what answering each batch took, loading and decoding of text apart. `faults` is
    filled with the examples that have no record because they cannot be used.
    """
    tokenizer = processor.tokenizer
    if model.compressor.buckets:  # trained for any V
        model = model.at(config.compressor.tokens)
    answer = Decoder(model, stop_ids=processor.stop_ids)
    batches = loader.evaluation_batches(
        source,
        processor,
        batch=config.evaluate.batch,
        features=features,
        skip=config.data.on_bad_example == "skip",
        mesh=jax.sharding.get_mesh(),
        faults=faults,
    )
    with progress.doing(f"answers to the {source.split} split", len(source)) as task:
        task.note(0)
        for batch in batches:
            valid, index = np.asarray(batch.pop("valid")), np.asarray(batch.pop("index"))
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


def write_predictions(path: Path, records: list[dict[str, Any]]) -> None:
    """One JSON line per record, whole or not at all."""
    fresh = path.with_suffix(".tmp")
    fresh.write_text("".join(json.dumps(r, sort_keys=True) + "\n" for r in records))
    fresh.replace(path)


def mesh_of(config: ConfigDict, overrides: Mapping[str, Any]) -> jax.sharding.Mesh:
    """The configured mesh; all devices side by side where it is that of another machine."""
    try:
        return mesh.make(**config.mesh)
    except ValueError as error:
        if any(name.startswith("mesh.") for name in overrides):
            raise
        print(f"{error}; here all devices stand side by side", file=sys.stderr)
        return mesh.make()


def run(argv: list[str]) -> int:
    """Evaluates as the command line says."""
    wanted = not {"--help", "-h"} & set(argv)
    path = cli.value_of(argv, "workdir")
    subject = Subject.of(path) if wanted and path else None
    if subject and subject.stored is not None and not cli.value_of(argv, "config"):
        raise ValueError(
            f"{path} is a model folder, which names no data: give --config=FILE (configs/base.py) "
            "and what differs, such as --config.data.path=ROWS.json --config.data.images=DIR"
        )
    given, flags = cli.parse(
        "evaluate",
        __doc__,
        argv,
        strings={"workdir": "folder of a finished `vlm-jax train`, a grid's cell, or a model"},
        required=["workdir"],
        default=subject and subject.default(),
    )
    cli.say_warnings()
    overrides = cli.overrides(flags)
    fields.check_names(flat(given))
    config = subject.asked(given, overrides)
    fields.check(flat(config))
    settings = subject.settings(config, overrides)
    with jax.set_mesh(mesh_of(config, overrides)), lock(subject.folder):
        processor = subject.processor(config)
        with progress.doing("opening the data"):
            source = sources.open_source(config, config.evaluate.split)
        progress.say(f"data: {json.dumps(source.describe())}")
        name = name_of(settings, source.data_hash)
        settings |= {"data_hash": source.data_hash} if name else {}
        ending = f"-{name}" if name else ""
        path = subject.folder / f"scores{ending}.json"
        before = json.loads(path.read_text()).get("settings") if path.exists() else None
        if before not in (None, json.loads(json.dumps(settings))):
            raise ValueError(
                f"{path} is of another evaluation ({fields.shown(before)}): move it away, "
                "or give the data another name"
            )
        with progress.doing("loading the model"):
            model = subject.model(config)
        faults: loader.Faults = {}
        records = list(predict(config, model, source, processor, faults=faults))
        scores = tasks.score(source.protocol, records, loader.not_answered(source, faults))
        if said := tasks.told(scores):
            log.warning(said)
        write_predictions(subject.folder / f"predictions{ending}.jsonl", records)
        scores |= {"settings": settings} if name else {}
        write_json(path, scores)
        print(json.dumps(scores, indent=1, sort_keys=True))
        print(f"predictions{ending}.jsonl and {path.name} are in {subject.folder}", file=sys.stderr)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Evaluates; 0, or 2 after saying on stderr what was wrong."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return cli.report_errors("evaluate", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
