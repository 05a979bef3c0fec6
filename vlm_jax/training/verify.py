# SPDX-License-Identifier: Apache-2.0
"""Verifies checkpoints: every piece is read and compared with its digest."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from etils import epath

from vlm_jax import progress
from vlm_jax.training import checkpoint, digest
from vlm_jax.training.arrays import READERS, Arrays, Box, Damaged, Manifest
from vlm_jax.training.fields import STAGES


@dataclass
class Found:
    """The result for one step.

    Args:
      problems: array, box and what is wrong; an empty array name means the whole step.
      unchecked: arrays that could be read but have no digest.
    """

    step: str
    arrays: int = 0
    bytes: int = 0
    problems: list[dict[str, str]] = field(default_factory=list)
    unchecked: int = 0

    @property
    def result(self) -> str:
        """whole, damaged, or unchecked: readable, but without a digest."""
        return "damaged" if self.problems else "unchecked" if self.unchecked else "whole"

    def problem(self, what: object, array: str = "", box: Box | str = "") -> None:
        what = str(what).removeprefix(f"{array}{box}").strip()
        self.problems.append({"array": array, "piece": str(box), "what": what})


def steps_under(path: Any) -> list[epath.Path]:
    """The steps in a folder: of a step, a stage, a training or a grid.

    Raises:
      FileNotFoundError: if there are none.
    """
    path = epath.Path(path)
    if path.name.isdigit() and (path / "state").exists():
        return [path]
    cells = path / "cells"
    runs = [path, *(sorted(cells.iterdir()) if cells.is_dir() else [])]
    stages = [path, *(run / stage for run in runs for stage in STAGES)]
    steps = [stage / str(n) for stage in stages for n in checkpoint.numbered(stage)]
    if not steps:
        raise FileNotFoundError(
            f"there are no checkpoints in {path}: give the folder of a `vlm-jax train` or `vlm-jax "
            "grid`, of one of its stages, or of one step"
        )
    return steps


def check_step(step: epath.Path) -> Found:
    """Reads one whole step, a few pieces at a time."""
    result = Found(str(step))
    # Sums of whole arrays, of versions without digests of pieces.
    older: dict[str, int | None] | None = {}
    manifest = None
    try:
        older = checkpoint.read_notes(step).get("crc32")
    except Damaged as error:
        result.problem(error)
    try:
        manifest = Manifest.read(step)
        if manifest is None and older is None:
            result.problem("it has no digests")
        arrays = Arrays(step / "state")
    except Damaged as error:
        result.problem(error)
        return result
    if manifest is not None:
        if missing := sorted(manifest.arrays.keys() - arrays.names):
            result.problem("it is missing", missing[0])
        if more := sorted(arrays.names - manifest.arrays.keys()):
            result.problem("it has no digest", more[0])
    for name in sorted(arrays.names):
        pieces = manifest.arrays[name][2] if manifest and name in manifest.arrays else None
        check_array(arrays, name, pieces, (older or {}).get(name), result)
    return result


def check_array(
    arrays: Arrays,
    name: str,
    pieces: list[tuple[Box, int]] | None,
    crc32: int | None,
    result: Found,
) -> None:
    """Reads an array by the pieces in which it was written, or whole if they are unknown."""
    try:
        stored = arrays.open(name)
    except Damaged as error:
        result.problem(error, name)
        return
    shape = tuple(stored.shape)
    result.arrays += 1
    result.bytes += math.prod(shape) * stored.dtype.numpy_dtype.itemsize
    whole = Box((0,) * len(shape), shape)

    def check(piece: tuple[Box, int] | None) -> tuple[Box | str, object]:
        box, expected = piece or (whole, None)
        try:
            x = arrays.read(name, stored, box)
        except Damaged as error:
            return box, error
        if expected is not None and digest.of_piece(x, box.start, shape) != expected:
            return box, "its digest differs"
        if expected is None and crc32 is not None and checkpoint.checksum_of(x) != crc32:
            return "", "its checksum differs"
        return box, None

    with ThreadPoolExecutor(READERS) as pool:
        for box, error in pool.map(check, pieces or [None]):
            if error is not None:
                result.problem(error, name, box)
    result.unchecked += pieces is None and crc32 is None


def verify(path: Any) -> list[Found]:
    """The results of all steps under a folder, in order."""
    steps, results = steps_under(path), []
    with progress.doing("reading checkpoints", len(steps)) as task:
        task.note(0)
        for step in steps:
            results.append(check_step(step))
            task.note(len(results))
    return results


def table(results: list[Found]) -> str:
    """The results as lines of text, with the problems below each step."""
    width = max(len(f.step) for f in results)
    lines = [f"{'step':{width}}  {'arrays':>6}  {'MB':>10}  result"]
    for f in results:
        lines.append(f"{f.step:{width}}  {f.arrays:6}  {f.bytes / 1e6:10,.1f}  {f.result}")
        lines += [
            "    " + " ".join(x for x in (p["array"] + p["piece"], p["what"]) if x)
            for p in f.problems
        ]
    return "\n".join(lines)


def described(results: list[Found]) -> dict[str, Any]:
    """The results as one JSON object."""
    steps = [vars(f) | {"result": f.result} for f in results]
    counts = {r: sum(f.result == r for f in results) for r in ("whole", "damaged", "unchecked")}
    return counts | {"steps": steps}
