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
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from vlm_jax import mesh, progress
from vlm_jax.data import loader, sources
from vlm_jax.evals import tasks
from vlm_jax.serving.predict import predict, write_predictions
from vlm_jax.serving.subject import Subject, name_of
from vlm_jax.training import fields
from vlm_jax.training.workdir import flat, lock, write_json
from vlm_jax.verbs import cli

log = logging.getLogger(__name__)


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
            source = sources.open_source(sources.Origin.of(config), config.evaluate.split)
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
