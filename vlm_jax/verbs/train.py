# SPDX-License-Identifier: Apache-2.0
"""Configuration to checkpoint: the encoder if it is trained, then align, then finetune.

    vlm-jax train --config=configs/demo.py --workdir=runs/one --config.llm.depth=4
    vlm-jax train --config=configs/finetune.py --dry-run

The same command resumes: a finished stage is read back, an interrupted one continues from its
newest intact checkpoint, with the same numbers as without the interruption. The folder belongs to
the run from its first step: an attempt that failed before that claims nothing.
"""

import argparse
import functools
import logging
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

from vlm_jax import files, progress
from vlm_jax.verbs import cli, configuration
from vlm_jax.verbs.parser import Parser


def add_flags(parser: Parser) -> None:
    """The flags of the verb."""
    add = parser.add_argument
    add("--workdir", metavar="DIR", help="the folder of the run (required except for --dry-run)")
    add("--dry-run", action="store_true", help="print what the run would need, and stop")


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
                f"start: {name}={fields.value_text(value)} is replaced by "
                f"{fields.value_text(fields_now[name])} of start_from={config.start_from}"
            )
    if workdir is None:
        with jax.set_mesh(mesh.make(**config.mesh)):
            recipe = Recipe.of(config)
            stages.check(recipe)
            forecast.dry_run(recipe)
        return 0
    return stages.run(config, workdir, outside_of(config, workdir) if config.eval_every else None)


def outside_of(config: Any, workdir: PurePath) -> Any:
    """What validation needs of rooms above training: answers, and curves if they can be drawn."""
    from vlm_jax.reports import canvas, loss_figure
    from vlm_jax.serving import validation
    from vlm_jax.training.validation import Outside

    def no_curves(folder: PurePath) -> None:
        """The lines of validation.jsonl are there without them."""

    draw: Callable[[PurePath], Any] = loss_figure.draw
    if files.is_bucket(workdir):
        logging.warning(
            "eval_every: no curves are drawn into a bucket, validation.jsonl is written"
        )
        draw = no_curves
    try:
        canvas.require_matplotlib()
    except ModuleNotFoundError as error:
        logging.warning(f"eval_every: no curves are drawn, validation.jsonl is written: {error}")
        draw = no_curves
    return Outside(functools.partial(validation.answers, config), draw)
