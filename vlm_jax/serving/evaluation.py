# SPDX-License-Identifier: Apache-2.0
"""Evaluates a trained model on a split: predictions.jsonl and scores.json in its folder."""

import json
import logging
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from vlm_jax import files, hosts, mesh, progress
from vlm_jax.data import loader, sources
from vlm_jax.evals import embedded
from vlm_jax.serving.predict import predict, write_predictions
from vlm_jax.serving.subject import Subject, name_of
from vlm_jax.training import fields
from vlm_jax.training.workdir import digest, flat, lock

log = logging.getLogger(__name__)


def mesh_of(config: ConfigDict, overrides: Mapping[str, Any]) -> jax.sharding.Mesh:
    """The configured mesh, or all devices on its first axis if it is that of another machine."""
    try:
        return mesh.make(**config.mesh)
    except ValueError as error:
        if any(name.startswith("mesh.") for name in overrides):
            raise
        progress.say(f"{error}; here all devices share the batch")
        return mesh.make()


def evaluate(subject: Subject, given: ConfigDict, overrides: Mapping[str, Any]) -> None:
    """Writes predictions and scores of `subject` into its folder, and prints the scores.

    Args:
      given: the configuration; `overrides` are the fields that were set on the command line, by
        dotted name: what was trained cannot be changed, all else makes another evaluation.
    Raises:
      ValueError: for an unknown field or a field of the trained model, and for a folder that holds
        the scores of another evaluation with the same name.
    """
    fields.check_names(flat(given))
    config = subject.requested(given, overrides)
    fields.check(flat(config))
    settings = subject.settings(config, overrides)
    hosts.check_same("configuration or --workdir", [str(subject.folder), digest(config)])
    with jax.set_mesh(mesh_of(config, overrides)), lock(subject.folder):
        processor = subject.processor(config)
        with progress.doing("opening the data"):
            source = sources.open_source(sources.Origin.of(config), config.evaluate.split)
        hosts.check_same("data", source.data_hash)
        progress.say(f"data: {json.dumps(source.describe())}")
        name = name_of(settings, source.data_hash)
        settings |= {"data_hash": source.data_hash} if name else {}
        ending = f"-{name}" if name else ""
        path = subject.folder / f"scores{ending}.json"
        before = hosts.from_writer(
            lambda: json.loads(path.read_text()).get("settings") if path.exists() else None
        )
        if before not in (None, json.loads(json.dumps(settings))):
            raise ValueError(
                f"{path} is of another evaluation ({fields.value_text(before)}): move it away, "
                "or give the data another name"
            )
        with progress.doing("loading the model"):
            model = subject.model(config)
        faults: loader.Faults = {}
        records = list(predict(config, model, source, processor, faults=faults))
        scores = embedded.score(source.protocol, records, loader.not_answered(source, faults))
        if summary := embedded.summary(scores):
            log.warning(summary)
        scores |= {"settings": settings} if name else {}
        if hosts.is_writer():
            write_predictions(subject.folder / f"predictions{ending}.jsonl", records)
            files.write_json(path, scores)
        print(json.dumps(scores, indent=1, sort_keys=True))
        progress.say(f"predictions{ending}.jsonl and {path.name} are in {subject.folder}")
