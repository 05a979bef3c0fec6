# SPDX-License-Identifier: Apache-2.0
"""Evaluates a trained model: greedy answers to every example of a split, and their scores.

    vlm-jax evaluate --workdir=runs/one
    vlm-jax evaluate --workdir=runs/one --config.evaluate.split=val
    vlm-jax evaluate --workdir=runs/demo/cells/30k-v4-token_packer-s0
    vlm-jax evaluate --workdir=models/llava --config=configs/base.py --config.data.path=FILE

The folder is that of a finished `vlm-jax train`, which has its configuration (--config may be
given, and must agree), a cell of a grid, or a model folder, whose data --config names.
predictions.jsonl and scores.json are written into it.

A different split, file, prompt, batch, number of answer tokens or, if the compressor serves any,
number of visual tokens is another evaluation of the same model, with its own files:
predictions-val.jsonl, scores-val.json. Their names and the `settings` in them say what differs.
Fields that the training depends on cannot be changed.
"""

import argparse

from vlm_jax.verbs import cli, configuration
from vlm_jax.verbs.parser import Parser


def add_flags(parser: Parser) -> None:
    """The flags of the verb."""
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        help="the folder of a finished `vlm-jax train`, a grid's cell, or a model",
    )


def run(options: argparse.Namespace) -> int:
    """Evaluates; 0."""
    cli.say_warnings()
    cli.join(options)
    from vlm_jax.serving.evaluation import evaluate
    from vlm_jax.serving.subject import Subject

    path = options.workdir
    subject = Subject.of(path)
    if subject.stored is not None and not configuration.value_of(options.config, "config"):
        raise ValueError(
            f"{path} is a model folder, which names no data: give --config=FILE (configs/base.py) "
            "and what differs, such as --config.data.path=ROWS.json --config.data.images=DIR"
        )
    given = configuration.read(options.config, default=subject.default())
    evaluate(subject, given.config, given.overrides)
    return 0
