# SPDX-License-Identifier: Apache-2.0
"""Configuration to checkpoint: the encoder where it is to be made, then align, then finetune.

    vlm-jax train --config=configs/demo.py --workdir=runs/one [--config.llm.depth=4]
    vlm-jax train --config=configs/finetune.py --dry-run

The same command resumes: a finished stage is read back, a broken one goes on behind its newest
whole checkpoint, with the same numbers as if it had never stopped. The folder is this run's from
its first step on: an attempt that failed before that claims nothing.
"""

import jax

from vlm_jax import mesh, progress
from vlm_jax.training import fields, forecast, stages
from vlm_jax.training.recipe import Recipe
from vlm_jax.training.workdir import flat
from vlm_jax.verbs import cli


def main(argv: list[str] | None = None) -> int:
    config, flags = cli.parse(
        "train",
        __doc__,
        argv,
        strings={"workdir": "where the run lives"},
        booleans={"dry-run": "print what the run would take and stop"},
    )
    cli.say_warnings()

    def body() -> int:
        asked = flat(config)
        fields.check_names(asked)
        fields.check(asked)
        made = stages.adopted(config)
        found = flat(made)
        for name, value in cli.overrides(flags).items():
            if found.get(name) != asked.get(name):
                progress.say(
                    f"start: {name}={fields.shown(value)} gives way to "
                    f"{fields.shown(found[name])} of start_from={config.start_from}"
                )
        if flags["dry-run"].value:
            with jax.set_mesh(mesh.make(**made.mesh)):
                recipe = Recipe.of(made)
                stages.check(recipe)
                forecast.dry_run(recipe)
            return 0
        return stages.run(made, cli.workdir_of(flags))

    return cli.report_errors("train", body)
