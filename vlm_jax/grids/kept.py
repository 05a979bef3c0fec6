# SPDX-License-Identifier: Apache-2.0
"""Rows of a grid's rows.jsonl whose cells were run in another folder: the run goes on from them.

Such a row counts as one that was made here if it has the configuration, the data and the LLM to
start from of its cell; its model is elsewhere.
"""

from collections.abc import Mapping, Sequence
from pathlib import PurePath

from vlm_jax import files, hosts, progress
from vlm_jax.grids.shared import Shared
from vlm_jax.rows import records
from vlm_jax.training.cells import Cell

WAYS = "move the file away, or choose another --workdir"


def written(folder: PurePath) -> list[records.Row]:
    """The rows of a folder's rows.jsonl; none where there is no such file."""
    with files.copied(folder, ("rows.jsonl",)) as home:
        path = home / "rows.jsonl"
        return records.read(path) if path.is_file() else []


def rows_of(
    folder: PurePath, cells: Sequence[Cell], hashes: Mapping[str, str]
) -> dict[str, records.Row]:
    """The rows of rows.jsonl whose cells were not run in this folder, by cell.

    `hashes` are the configurations' digests, by cell. ValueError for a row of another grid.
    """

    def read() -> list[str]:
        home = folder / "cells"
        found = written(folder)
        return [row.to_json() for row in found if not (home / row.cell / "row.json").exists()]

    rows = [records.Row.from_json(line) for line in hosts.from_writer(read)]
    known = {cell.name for cell in cells}
    for row in rows:
        why = "" if row.cell in known else "this grid has no such cell"
        if not why and row.config_hash != hashes[row.cell]:
            why = (
                f"its configuration has the hash {row.config_hash}, this one {hashes[row.cell]} "
                "(paths count too)"
            )
        if why:
            raise ValueError(
                f"{folder}/rows.jsonl has a row of {row.cell} that was not made in this folder, "
                f"and {why}: {WAYS}"
            )
    if rows:
        progress.say(f"rows.jsonl: {len(rows)} rows of cells that were run elsewhere are kept")
    return {row.cell: row for row in rows}


def check(rows: Mapping[str, records.Row], cells: Sequence[Cell], shared: Shared) -> None:
    """Raises ValueError if kept rows are of other data or of other LLMs to start from; says if
    their encoder is another."""
    starts = {cell.name: cell.config.start_from for cell in cells}
    data = {cell.name: shared.inputs(cell)[1].source.data_hash for cell in cells}
    for row in rows.values():
        for what, then, now in (
            ("data", row.data_hash, data[row.cell]),
            ("LLM to start from", row.train.get("start"), shared.starts.get(starts[row.cell])),
        ):
            if then != now:
                raise ValueError(
                    f"rows.jsonl has a row of {row.cell} with another {what} ({str(then)[:12]}, "
                    f"here {str(now)[:12]}): {WAYS}"
                )
    if others := {str(row.train.get("encoder")) for row in rows.values()} - {shared.fingerprint}:
        progress.say(
            f"the encoder here ({shared.fingerprint}) is not bit for bit that of the kept rows "
            f"({', '.join(sorted(others))}), as after training on another processor: each row says "
            "in train.encoder which it had"
        )
