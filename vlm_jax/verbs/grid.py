# SPDX-License-Identifier: Apache-2.0
"""Every cell of a scaling run: train, evaluate, one row; then the law and the report.

    vlm-jax grid --config=configs/demo.py --workdir=runs/demo [--config.grid.seeds="(0,1)"]

A cell is an LLM size x a number of visual tokens x a seed, or one of the baselines. All cells share
one frozen encoder, pretrained first, and its cached features. Repeating the command goes on where
it stopped.
"""

import json
import sys

from vlm_jax.verbs import cli


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    config, flags = cli.parse(
        "grid",
        __doc__,
        argv,
        strings={"workdir": "where the run lives"},
        booleans={"dry-run": "print the cells and stop"},
    )
    cli.say_warnings()

    def body() -> int:
        import jax

        from vlm_jax import mesh
        from vlm_jax.grids import run
        from vlm_jax.training import fields
        from vlm_jax.training.cells import cells_of, dry_run
        from vlm_jax.training.forecast import memory_of
        from vlm_jax.training.workdir import claim, flat

        fields.check_names(flat(config))
        fields.check(flat(config))
        if config.start_from:
            raise ValueError(
                f"start_from={config.start_from}: a grid makes models of its own sizes; only "
                "`vlm-jax train` starts from a model that is there"
            )
        with jax.set_mesh(mesh.make(**config.mesh)):
            if flags["dry-run"].value:
                cells = cells_of(config)
                dry_run(config, cells)
                print(memory_of(cells))
                return 0
            folder = cli.workdir_of(flags)
            # Cells of one size and V are one program, and a restart compiles nothing twice.
            if not jax.config.jax_compilation_cache_dir:  # JAX_COMPILATION_CACHE_DIR
                jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
            with claim(folder, config, grid=True) as claimed:
                print(json.dumps(run.run(claimed, " ".join(["vlm-jax grid", *argv]))))
        return 0

    return cli.report_errors("grid", body)
