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

import sys

from vlm_jax.verbs import cli


def run(argv: list[str]) -> int:
    """Evaluates as the command line says."""
    strings = {"workdir": "folder of a finished `vlm-jax train`, a grid's cell, or a model"}
    if {"--help", "-h"} & set(argv):
        cli.parse("evaluate", __doc__, argv, strings=strings)
    from vlm_jax.serving.evaluation import evaluate
    from vlm_jax.serving.subject import Subject

    path = cli.value_of(argv, "workdir")
    subject = Subject.of(path) if path else None
    if subject and subject.stored is not None and not cli.value_of(argv, "config"):
        raise ValueError(
            f"{path} is a model folder, which names no data: give --config=FILE (configs/base.py) "
            "and what differs, such as --config.data.path=ROWS.json --config.data.images=DIR"
        )
    given, flags = cli.parse(
        "evaluate",
        __doc__,
        argv,
        strings=strings,
        required=["workdir"],
        default=subject and subject.default(),
    )
    cli.say_warnings()
    evaluate(subject, given, cli.overrides(flags))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Evaluates; 0, or 2 after saying on stderr what was wrong."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return cli.report_errors("evaluate", lambda: run(argv))
