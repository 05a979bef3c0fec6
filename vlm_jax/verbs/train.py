# SPDX-License-Identifier: Apache-2.0
"""Configuration to checkpoint: the encoder where it is to be made, then align, then finetune.

    vlm-jax train --config=configs/demo.py --workdir=runs/one --config.llm.depth=4
    vlm-jax train --config=configs/finetune.py --dry-run

The same command resumes: a finished stage is read back, a broken one goes on behind its newest
whole checkpoint, with the same numbers as if it had never stopped. The folder is this run's from
its first step on: an attempt that failed before that claims nothing.
"""

import argparse

from vlm_jax import progress
from vlm_jax.verbs import cli, configuration
from vlm_jax.verbs.parser import Parser


def add_flags(parser: Parser) -> None:
    """The flags of the verb."""
    add = parser.add_argument
    add("--workdir", metavar="DIR", help="the folder of the run (needed but for --dry-run)")
    add("--dry-run", action="store_true", help="print what the run would take, and stop")


def run(options: argparse.Namespace) -> int:
    """Trains; 0."""
    given = configuration.read(options.config)
    workdir = None if options.dry_run else cli.workdir_of(options.workdir)
    cli.say_warnings()
    cli.join(options)
    import jax

    from vlm_jax import mesh
    from vlm_jax.training import fields, forecast, stages
    from vlm_jax.training.recipe import Recipe
    from vlm_jax.training.workdir import flat

    given_fields = flat(given.config)
    fields.check_names(given_fields)
    fields.check(given_fields)
    config = stages.with_start(given.config)
    fields_now = flat(config)
    for name, value in given.overrides.items():
        if fields_now.get(name) != given_fields.get(name):
            progress.say(
                f"start: {name}={fields.value_text(value)} gives way to "
                f"{fields.value_text(fields_now[name])} of start_from={config.start_from}"
            )
    if workdir is None:
        with jax.set_mesh(mesh.make(**config.mesh)):
            recipe = Recipe.of(config)
            stages.check(recipe)
            forecast.dry_run(recipe)
        return 0
    return stages.run(config, workdir)
