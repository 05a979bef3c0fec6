# SPDX-License-Identifier: Apache-2.0
"""The cells of a grid, one after another: train, evaluate, one row; then the law and the report.

All cells share one frozen encoder, pretrained first, and its cached features. A restart reuses what
is finished.
"""

import gc
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Any

import jax
from ml_collections import ConfigDict

from vlm_jax import files, hosts, mesh, preemption, progress
from vlm_jax.compressors.selector import selecting
from vlm_jax.cost import described
from vlm_jax.cost import flops as cost
from vlm_jax.data import loader, targets
from vlm_jax.evals import embedded
from vlm_jax.grids import details, kept, starts
from vlm_jax.grids.phases import Phases
from vlm_jax.grids.shared import Shared, prepare, sights_of
from vlm_jax.kernels import window_attention
from vlm_jax.models import vlm
from vlm_jax.models.vlm import VLM
from vlm_jax.reports import report
from vlm_jax.rows import records
from vlm_jax.serving.predict import Clock, predict, write_predictions
from vlm_jax.training import fields, fingerprint, memory, stages
from vlm_jax.training.cells import Cell, cells_of, describe, train_flops
from vlm_jax.training.features import Features, blind_to
from vlm_jax.training.forecast import largest, standing
from vlm_jax.training.inputs import Inputs
from vlm_jax.training.recipe import Recipe
from vlm_jax.training.workdir import (
    Claim,
    another,
    claim,
    digest,
    flat,
    lock,
    of_json,
    provenance,
)

log = logging.getLogger(__name__)


def run_cell(cell: Cell, folder: PurePath, shared: Shared, facts: dict) -> records.Row:
    """Trains and evaluates one cell; its row, which includes `facts`."""
    config, recipe, training = cell.config, cell.recipe, cell.training
    size = recipe.model
    read, asked = shared.inputs(cell)
    inputs = as_read(cell, training, read, shared.encoded(cell, training), "train")
    test = as_read(cell, recipe, asked, shared.encoded(cell, recipe), "test")
    if inputs.processor.query == "prefix" != read.processor.query:
        # Such rows have less space than those that were checked when the data was opened.
        if note := targets.check(inputs.source, inputs.processor, skip=recipe.skip):
            progress.say(f"{cell.name}: {note}")
    folder.mkdir(parents=True, exist_ok=True)
    home = folder.parent / cell.model
    then = time.monotonic()
    model = stages.train(training, home, inputs, encoder=shared.encoder, seed=cell.seed)
    took = time.monotonic() - then
    # The first cell trains; others of the model, and a restart, report its training time.
    train_seconds = hosts.from_writer(lambda: once(home / "trained.json", took))
    if size.compressor.selects:
        model = VLM(model.vit, selecting(model.compressor, size.compressor), model.llm)
    elif cell.shares:
        model = model.at(config.compressor.tokens)
    then = time.monotonic()
    clock, faults = Clock(), {}
    predictions = list(
        predict(
            config,
            model,
            test.source,
            test.processor,
            features=test.features,
            texts=test.texts(answer=False, skip=recipe.skip),
            clock=clock,
            faults=faults,
        )
    )
    seconds = time.monotonic() - then
    if hosts.is_writer():
        write_predictions(folder / "predictions.jsonl", predictions)
    protocol = test.source.protocol
    scores = embedded.score(protocol, predictions, loader.not_answered(test.source, faults))
    if summary := embedded.summary(scores):
        log.warning(f"{cell.name}: {summary}")
    method = details.method_of(size)
    Q, G, question = details.request_lengths(test, prefix=method["query"] == "prefix")
    steps = config.align.steps + config.finetune.steps
    # Only the writer reads the losses that it wrote.
    stages_run = [s for s in ("align", "finetune") if config[s].steps]
    began = hosts.from_writer(lambda: fingerprint.of_run(home, stages_run))
    return records.Row(
        cell=cell.name,
        llm=cell.llm,
        llm_parameters=vlm.parameters(model.llm),
        vit_parameters=vlm.parameters(model.vit),
        compressor_parameters=vlm.parameters(model.compressor),
        **method,
        blind=cell.blind,
        V=details.tokens_read(model, test.features, frames=cell.frames),
        frames=cell.frames,
        Q=Q,
        G=G,
        seed=cell.seed,
        tasks=scores,
        families=records.families_of(scores),
        flops=vars(
            cost.request_flops(
                size.vit,
                size.compressor,
                size.llm,
                Q=Q,
                G=G,
                question=question,
                frames=cell.frames,
                pruning=size.pruning,
            )
        ),
        train=dict(
            steps=steps,
            examples=sum(config[s].steps * config[s].batch for s in ("align", "finetune")),
            flops=train_flops(training, text=details.text_places(recipe, inputs, seed=cell.seed)),
            seconds=round(train_seconds, 2),
            encoder=shared.fingerprint,
            **({"start": shared.starts[recipe.start_from]} if recipe.start_from else {}),
            **began,
            **({"lora": details.adapters_of(recipe.lora)} if recipe.lora.rank else {}),
        ),
        evaluate_seconds=round(seconds, 2),
        timing=clock.timing(),
        trained_with=cell.model if cell.shares else "",
        llm_weights=cell.llm_weights,
        protocol=protocol,
        prompt=config.data.template,
        parser=embedded.PROTOCOLS[protocol][1],
        data_hash=test.source.data_hash,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
    )


def as_read(cell: Cell, recipe: Recipe, inputs: Inputs, encoded: Features, split: str) -> Inputs:
    """The rows of a split as the compressor of `recipe` reads them."""
    compressor, features = recipe.model.compressor, getattr(encoded, split)
    return replace(
        inputs,
        processor=inputs.processor.reading_as(compressor.query, compressor.reads),
        features=blind_to(features, encoded.blind) if cell.blind else features,
    )


def once(path: PurePath, seconds: float) -> float:
    """The seconds in the file, which is first written with `seconds` if it does not exist."""
    if not path.exists():
        files.write_json(path, {"seconds": seconds})
    return json.loads(path.read_text())["seconds"]


def same_cells(claimed: Claim, cells: Sequence[Cell]) -> None:
    """Raises ValueError if a grid lost or changed a cell that was started; more cells are fine."""
    if claimed.recorded is None:
        return
    now = {cell.name: cell.config for cell in cells}
    home = claimed.folder / "cells"
    started = [c for c in cells_of(of_json(claimed.recorded)) if (home / c.name).is_dir()]
    if lost := [cell.name for cell in started if cell.name not in now]:
        raise ValueError(
            f"{claimed.folder} has cells that this grid lacks ({', '.join(lost[:4])}): cells can "
            "be added to a grid, not removed; name them too, or choose another --workdir"
        )
    for cell in started:
        then, is_now = flat(cell.config), flat(now[cell.name])
        if changed := [
            name
            for name in fields.differing(then, is_now)
            if fields.change_of(name, then, is_now) in (fields.RUN, fields.SHOWN)
        ]:
            named = fields.changes(changed, then, is_now)
            raise ValueError(another(claimed.folder, f"cell {cell.name}: {named}"))


def checked(config: ConfigDict) -> ConfigDict:
    """The configuration of a grid, with the sizes of the folders that its LLMs start from.

    ValueError for an unknown field, or one that no grid has, and for a folder without such an LLM.
    """
    fields.check_names(flat(config))
    fields.check(flat(config))
    if config.start_from:
        raise ValueError(
            f"start_from={config.start_from}: a grid makes models of several sizes: let one of "
            "them start from that folder (grid.llms.NAME.start_from)"
        )
    return starts.adopted(config)


def open_config(config: Any) -> ConfigDict:
    """A configuration, or the one in a file, checked for a grid."""
    return checked(described.open_config(config))


def cell_names(config: Any) -> list[str]:
    """The cells of a configuration's grid, LLM size x visual tokens x seed, in their order.

    Args:
      config: a configuration, or the path of one.
    Raises:
      ValueError: if it is not the configuration of a grid.
    """
    return [cell.name for cell in cells_of(open_config(config))]


def train_cell(config: Any, workdir: str | PurePath, *, cell: str) -> records.Row:
    """Trains and evaluates one cell of a grid; its row, which is read back if it is finished.

    What cells share (encoder, features, tokenizer) is made by the first call. `workdir` is the
    folder of the grid: `vlm-jax grid` with the same configuration continues in it, and other
    processes may train other cells there. Repeat a call that was killed to continue it.

    Args:
      config: a configuration, or the path of one.
      workdir: a folder, created if it does not exist.
      cell: one of `cell_names(config)`.
    Raises:
      ValueError: for an unknown cell, or a folder of another run.
      Diverged: if the loss is no longer finite.
    """
    config, folder = open_config(config), files.path_of(workdir)
    command = f"vlm_jax.train_cell(config, {str(workdir)!r}, cell={cell!r})"
    with jax.set_mesh(mesh.make(**config.mesh)):
        run_some(folder, config, command, [cell])
    path = folder / "cells" / cell / "row.json"
    if path.exists():
        return records.Row.from_json(path.read_text())
    return next(row for row in kept.written(folder) if row.cell == cell)


class Grid:
    """A grid in a held folder: its cells, their rows, and the facts of the run for each row.

    `kept` are rows of cells that were run elsewhere.
    """

    def __init__(self, claimed: Claim, command: str):
        config, self.folder = claimed.config, claimed.folder
        self.cells, self.started = cells_of(config), time.monotonic()
        same_cells(claimed, self.cells)
        self.facts = provenance(window_attention.form(config.kernels))
        # The law is fitted to the grid's own method if others are run besides it.
        method = records.method_of(
            **details.method_of(self.cells[0].recipe.model),
            llm_weights=self.cells[0].llm_weights,
        )
        # Fields that change no result do not change the hash: rows of one run share it.
        first = claimed.first()
        self.hashes = {cell.name: digest(cell.config) for cell in cells_of(first)}
        about = dict(command=command, config=digest(first), method=method)
        self.phase = Phases(self.folder / "run.json", about | self.facts)
        self.kept = kept.rows_of(self.folder, self.cells, self.hashes)
        stages.check(Recipe.of(config))
        for cell in self.cells:
            describe(cell)  # an impossible cell is refused before the first is trained
            stages.check(cell.recipe, cell=True)
        for cell in largest(self.cells):
            for warning in memory.check_training(cell.training):
                log.warning(warning)

    def rows(self) -> dict[str, records.Row]:
        """The rows that any job has finished, in the order of the cells."""

        def read() -> dict[str, str]:
            paths = {cell.name: self.home(cell) / "row.json" for cell in self.cells}
            return {name: path.read_text() for name, path in paths.items() if path.exists()}

        made = hosts.from_writer(read)
        return {
            cell.name: records.Row.from_json(made[cell.name])
            if cell.name in made
            else self.kept[cell.name]
            for cell in self.cells
            if cell.name in made or cell.name in self.kept
        }

    def home(self, cell: Cell) -> PurePath:
        return self.folder / "cells" / cell.name

    def finish(self, cell: Cell, shared: Shared) -> None:
        """Makes the row of a cell; if another job is making it, waits for it."""
        which = f"cell {self.cells.index(cell) + 1}/{len(self.cells)}: {cell.name}"
        progress.say(which)
        # Cells of one model train it in one place.
        with lock(self.folder / "cells" / cell.model, wait=True), progress.doing(which):
            if cell.name in self.rows():
                progress.say(f"{which} was finished by another job")
                return
            facts = self.facts | dict(config_hash=self.hashes[cell.name])
            row = run_cell(cell, self.home(cell), shared, facts)
            # Cycles of modules and closures would hold its weights beside those of the next.
            gc.collect()
            # The row is written whole or not at all.
            if hosts.is_writer():
                files.write_json(self.home(cell) / "row.json", json.loads(row.to_json()))
        scores = "  ".join(f"{name} {s['score']:.3f}" for name, s in row.families.items())
        progress.say(f"{which}  {scores}")

    def collect(self) -> dict[str, records.Row]:
        """Writes all rows so far to rows.jsonl; the rows."""
        rows = self.rows()
        if hosts.is_writer():
            records.write(self.folder / "rows.jsonl", list(rows.values()))
        return rows

    def report(self) -> dict[str, Any]:
        """Fits the law and writes the report; its summary."""
        self.collect()
        with self.phase("law and report"), progress.doing("law and report"):
            result = hosts.from_writer(lambda: report.write(self.folder))
        seconds = self.phase.seconds
        each = "  ".join(f"{name} {spent:.0f}" for name, spent in seconds.items())
        progress.say(f"seconds per phase: {each}  total {sum(seconds.values()):.0f}")
        return result


def run(claimed: Claim, command: str) -> dict[str, Any]:
    """Runs all cells that have no row yet, then the law and the report; the report's summary."""
    grid = Grid(claimed, command)
    rows = grid.rows()
    if rows:
        progress.say(f"{len(rows)} of {len(grid.cells)} cells were finished before")
    if len(grid.kept) == len(grid.cells):
        return grid.report()
    shared = prepare(claimed, grid.phase, sights_of(grid.cells), grid.cells)
    kept.check(grid.kept, grid.cells, shared)
    for cell in grid.cells:
        if cell.name in rows:
            continue
        preemption.point(f"{len(rows)} of {len(grid.cells)} cells are finished")
        with grid.phase("cells"):
            grid.finish(cell, shared)
        rows = grid.collect()
        progress.say(standing(grid.cells, rows, time.monotonic() - grid.started))
    return grid.report()


def run_some(
    folder: PurePath, config: ConfigDict, command: str, names: Sequence[str]
) -> dict[str, Any]:
    """Runs some cells of a grid, while other jobs may run others in the same folder; the summary of
    the report on all rows so far.

    The folder is held while shared parts are made or read, and while rows are collected; in between
    only the current cell is held. A job waits for what another one holds, and then reuses it.

    Raises:
      ValueError: for a cell that the grid does not have.
    """
    known = {cell.name: cell for cell in cells_of(config)}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"cell={unknown[0]!r}: choose one of {', '.join(known)}")
    with claim(folder, config, grid=True, wait=True) as claimed:
        grid = Grid(claimed, command)
        rows = grid.rows()
        todo = [known[name] for name in dict.fromkeys(names) if name not in rows]
        progress.say(f"{len(todo)} of {len(grid.cells)} cells are to be run here")
        if todo:
            shared = prepare(claimed, grid.phase, sights_of(grid.cells), grid.cells)
            kept.check(grid.kept, grid.cells, shared)
    then = time.monotonic()
    for number, cell in enumerate(todo):
        preemption.point(f"{number} of {len(todo)} cells are finished here")
        grid.finish(cell, shared)
    with claim(folder, config, grid=True, wait=True):
        if todo:
            grid.phase.add("cells", time.monotonic() - then)
        return grid.report()
