# SPDX-License-Identifier: Apache-2.0
"""The real step of a configuration, compiled for a real slice of TPUs on a machine without one.

    vlm-jax compile --config=configs/finetune.py --topology=v5p:4x4x4 --config.mesh.fsdp=64 \\
        --config.mesh.data=1
    vlm-jax compile --config=configs/finetune.py --topology=v6e:4x4 --mode=decode
    vlm-jax compile --config=configs/finetune.py --topology=v5e:8x8 --search

Prints one JSON object on stdout and a table on stderr: memory of a device by kind, FLOPs,
collectives, estimated times. Exit status 3 where it does not fit. Needs libtpu (extra aot);
docs/pods.md explains every number and where it misleads.
"""

import argparse
import json
import sys

from vlm_jax.verbs import cli, configuration
from vlm_jax.verbs.parser import Parser

MODES = ("align", "finetune", "prefill", "decode", "evaluate")
DOES_NOT_FIT = 3


def add_flags(parser: Parser) -> None:
    """The flags of the verb."""
    add = parser.add_argument
    add("--topology", required=True, metavar="NAME",
        help="the slice, KIND:SHAPE, such as v5e:8x8, v5p:4x4x4, v6e:8x8, tpu7x:2x2x1")  # fmt: skip
    add("--mode", choices=MODES, default="finetune",
        help="what is compiled: a training step of a stage, a serving program, or both of these as "
        "evaluation runs them; serving takes evaluate.batch requests of data.text_length tokens "
        "and evaluate.max_new_tokens new ones")  # fmt: skip
    add("--examples", type=int, metavar="N",
        help="rows of an epoch (default: steps x batch of the stage)")  # fmt: skip
    add("--dollars-per-chip-hour", type=float, metavar="USD",
        help="price of a chip, for dollars per epoch (default: none, prices differ)")  # fmt: skip
    add("--search", action="store_true",
        help="try meshes, remat and micro-batches, and rank what fits")  # fmt: skip
    add("--most", type=int, metavar="N", default=8, help="compilations of --search at most")


def run(options: argparse.Namespace) -> int:
    """Compiles; 0, or 3 where it does not fit."""
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
        result = search.search(config, options.mode, slice_, most=options.most)
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
