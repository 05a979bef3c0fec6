# SPDX-License-Identifier: Apache-2.0
"""Compiles the real step of a configuration for a real TPU slice, on a machine without a TPU.

    vlm-jax compile --config=configs/finetune.py --topology=v5p:4x4x4 --config.mesh.fsdp=64 \\
        --config.mesh.data=1
    vlm-jax compile --config=configs/finetune.py --topology=v6e:4x4 --mode=decode
    vlm-jax compile --config=configs/finetune.py --topology=v5e:8x8 --search

Prints one JSON object on stdout and a table on stderr: memory of a device by kind, FLOPs,
collectives, estimated times. Exit status 3 if it does not fit. Needs libtpu (extra aot);
docs/pods.md explains every number and its limits.
"""

import argparse
import json
import math
import sys

from vlm_jax.arguments import whole_number
from vlm_jax.verbs import cli, configuration
from vlm_jax.verbs.parser import Parser

MODES = ("align", "finetune", "prefill", "decode", "evaluate")
DOES_NOT_FIT = 3
MOST = 8


def add_flags(parser: Parser) -> None:
    """The flags of the verb."""
    add = parser.add_argument
    add("--topology", required=True, metavar="NAME",
        help="the slice, KIND:SHAPE, such as v5e:8x8, v5p:4x4x4, v6e:8x8, tpu7x:2x2x1")  # fmt: skip
    add("--mode", choices=MODES, default="finetune",
        help="what to compile: a training step of a stage, a serving program, or both serving "
        "programs as evaluation runs them; serving takes evaluate.batch requests of "
        "data.text_length tokens and evaluate.max_new_tokens new ones")  # fmt: skip
    add("--examples", type=int, metavar="N",
        help="rows of an epoch (default: steps x batch of the stage)")  # fmt: skip
    add("--dollars-per-chip-hour", type=float, metavar="USD",
        help="price of a chip, for dollars per epoch (default: none, prices differ)")  # fmt: skip
    add("--search", action="store_true",
        help="try meshes, remat and micro-batches, and rank what fits")  # fmt: skip
    add("--most", type=int, metavar="N", help=f"most compilations of --search (default: {MOST})")


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for numbers that mean nothing, and for flags that would not be used."""
    for name, value in (("--examples", options.examples), ("--most", options.most)):
        if value is not None:
            whole_number(name, value)
    dollars = options.dollars_per_chip_hour
    if dollars is not None and not (math.isfinite(dollars) and dollars > 0):
        raise ValueError(f"--dollars-per-chip-hour={dollars:g}: give a price above 0")
    if options.search and (options.examples or dollars):
        raise ValueError(
            "--search ranks by the time of a step and has no epochs: drop --examples and "
            "--dollars-per-chip-hour, or compile the configuration that it finds without --search"
        )
    if options.most and not options.search:
        raise ValueError(f"--most={options.most} is of --search: add that, or drop --most")


def run(options: argparse.Namespace) -> int:
    """Compiles; 0, or 3 if it does not fit."""
    check(options)
    from vlm_jax.aot import topology

    slice_ = topology.named(options.topology)
    given = configuration.read(options.config)
    topology.prepare()
    cli.say_warnings()
    from vlm_jax.aot import report, search, table
    from vlm_jax.training import fields, stages
    from vlm_jax.training.workdir import flat

    given_fields = flat(given.config)
    fields.check_names(given_fields)
    fields.check(given_fields)
    config = stages.with_start(given.config)
    if options.search:
        result = search.search(config, options.mode, slice_, most=options.most or MOST)
        print(json.dumps(result))
        print(table.of_search(result), file=sys.stderr)
        return 0 if any(one["fits"] for one in result["tried"]) else DOES_NOT_FIT
    result = report.of_config(
        config,
        options.mode,
        slice_,
        examples=options.examples,
        dollars_per_chip_hour=options.dollars_per_chip_hour,
    )
    print(json.dumps(result))
    print(table.of_report(result), file=sys.stderr)
    return 0 if result["fits"] else DOES_NOT_FIT
