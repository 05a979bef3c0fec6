# SPDX-License-Identifier: Apache-2.0
"""Every cell of a scaling run: train, evaluate, one row; then the law and the report.

    vlm-jax grid --config=configs/demo.py --workdir=runs/demo
    vlm-jax grid --config=configs/demo.py --workdir=runs/demo --config.grid.seeds="(0,1)"
    vlm-jax grid --config=configs/demo.py --dry-run
    vlm-jax grid --config=configs/demo.py --list-cells
    vlm-jax grid --config=configs/demo.py --workdir=runs/demo --cell=10k-v4-token_packer-s0

A cell is an LLM size x a number of visual tokens x a seed, or one of the baselines. All cells share
one frozen encoder, pretrained first, and its cached features. Repeating the command continues where
it stopped. Several jobs may work in one folder, each on its own cells (--cell); a job waits for
what another one is making, and then reuses it.
"""

import argparse
import json

from vlm_jax.verbs import cli, configuration
from vlm_jax.verbs.parser import Parser


def add_flags(parser: Parser) -> None:
    """The flags of the verb."""
    add = parser.add_argument
    add("--workdir", metavar="DIR", help="the folder of the run (required to run anything)")
    add("--dry-run", action="store_true", help="print the cells and the memory, and stop")
    add("--list-cells", action="store_true", help="print the names of the cells, and stop")
    add(
        "--cell",
        action="append",
        metavar="NAME",
        help="run this cell; repeat the flag for several; default: all cells",
    )


def run(options: argparse.Namespace) -> int:
    """Trains and evaluates all cells, or some; 0."""
    config = configuration.read(options.config).config
    only = options.cell or []
    if (options.dry_run or options.list_cells) and only:
        raise ValueError("--cell names what to run: drop it, or drop --dry-run and --list-cells")
    if options.list_cells:
        from vlm_jax.grids.run import cell_names

        print(*cell_names(config), sep="\n")
        return 0
    folder = None if options.dry_run else cli.workdir_of(options.workdir)
    cli.say_warnings()
    cli.join(options)
    import jax

    from vlm_jax import mesh, preemption
    from vlm_jax.grids import run as grids
    from vlm_jax.training import stages
    from vlm_jax.training.cells import cells_of, dry_run
    from vlm_jax.training.forecast import memory_of
    from vlm_jax.training.recipe import Recipe
    from vlm_jax.training.workdir import claim

    config = grids.checked(config)
    kept = "finished cells and checkpoints are kept, the same command continues"
    with jax.set_mesh(mesh.make(**config.mesh)), preemption.keeping(kept):
        if folder is None:
            stages.check(Recipe.of(config))
            cells = cells_of(config)
            dry_run(config, cells)
            print(memory_of(cells))
            return 0
        command = " ".join(["vlm-jax grid", *options.words])
        if only:
            print(json.dumps(grids.run_some(folder, config, command, only)))
            return 0
        with claim(folder, config, grid=True) as claimed:
            print(json.dumps(grids.run(claimed, command)))
    return 0
