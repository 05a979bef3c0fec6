# SPDX-License-Identifier: Apache-2.0
"""Scores a file of predictions by a benchmark's published rules; needs no model and no JAX.

    vlm-jax score --task=gqa --predictions=answers.jsonl --annotations=eval/gqa
    vlm-jax score --task=pope --protocol=llava --predictions=answers.jsonl --annotations=eval/pope

Predictions are JSON lines with `question_id` and `text`, as LLaVA's scripts and `vlm-jax evaluate
--tasks` write them; a line with `error` in place of `text` is an answer that could not be made. One
JSON object on stdout: value and standard error in the task's unit (percent, or points for MME and
OCRBench), the protocol and its known faults, how many answers each rule of the parser took, and
the hashes of all files. docs/benchmarks.md lists tasks, protocols and where the files are.
"""

import argparse
import json
from pathlib import Path

from vlm_jax.verbs import cli
from vlm_jax.verbs.parser import Parser


def add_flags(parser: Parser) -> None:
    """The flags of the verb."""
    add = parser.add_argument
    add("--task", required=True, metavar="TASK", help="the benchmark, such as gqa or textvqa_ocr")
    add(
        "--protocol",
        default="official",
        metavar="NAME",
        help="the rules: official (the data set's own), llava, lmms-eval or paper",
    )
    add("--predictions", required=True, metavar="FILE", help="JSON lines: question_id, text")
    add(
        "--annotations",
        required=True,
        metavar="PATH",
        help="the benchmark's official file, or the folder with its official layout",
    )
    add(
        "--allow",
        default="",
        metavar="KINDS",
        help="of missing (they count as failed), surplus (left out) and duplicate (the last "
        "counts), with commas between them (default: each is an error)",
    )


def run(options: argparse.Namespace) -> int:
    """Scores; 0."""
    cli.say_warnings()
    from vlm_jax.evals import predictions, scoring

    allow = tuple(filter(None, options.allow.split(",")))
    if wrong := sorted(set(allow) - set(predictions.ALLOWED)):
        raise ValueError(f"--allow={wrong[0]}: choose of {', '.join(predictions.ALLOWED)}")
    scored = scoring.score(
        options.task,
        options.protocol,
        Path(options.predictions),
        Path(options.annotations),
        allow=allow,
    )
    print(json.dumps(scored.described))
    return 0
