# SPDX-License-Identifier: Apache-2.0
"""A results row says all about one cell; files of rows are never torn and hold no cell twice."""

import dataclasses
import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_jax import files
from vlm_jax.law.points import Cell, Points, of_cells
from vlm_jax.rows import tables

SCHEMA = 1
FLOP_PARTS = ("encoder", "compressor", "question", "prefill", "decode")


@dataclass(frozen=True)
class Row:
    """One trained and evaluated cell of a grid: one JSON line of rows.jsonl.

    Parameters are counts, V, Q (mean prompt text tokens) and G (mean generated tokens) are tokens,
    scores and standard errors are fractions, `flops` is per request, `train` is in optimizer steps,
    examples, FLOPs and seconds, `created` is UTC in ISO 8601. Fields with a default came later: a
    line without them is read as one that did not measure them.
    """

    cell: str
    llm: str
    llm_parameters: int
    vit_parameters: int
    compressor_parameters: int
    compressor: str
    query: str  # "none", "separate" or "prefix"
    blind: bool
    V: int | float  # where the image chooses, the mean
    Q: float
    G: float
    seed: int
    tasks: dict[str, dict[str, Any]]  # task -> family, metric, score, stderr, n
    families: dict[str, dict[str, Any]]  # family -> score, stderr, n
    flops: dict[str, int | float]  # FLOP_PARTS -> FLOPs of one request
    # steps, examples, flops, seconds; lora where adapters were trained; initial_weights, first_loss
    # and last_loss, which differ in some digit where two rows were not trained alike.
    train: dict[str, Any]
    evaluate_seconds: float
    protocol: str
    prompt: str
    parser: str
    data_hash: str
    config_hash: str
    commit: str
    versions: dict[str, str]
    machine: str
    created: str
    schema: int = SCHEMA
    variant: str = ""  # what sets the compressor apart from its default, "pool" for instance
    # batch, seconds_per_example once everything is compiled, and new_tokens per batch (the closing
    # one included), which the longest answer decides; empty where only one batch was run.
    timing: dict[str, Any] = field(default_factory=dict)
    trained_with: str = ""  # names the one trained model that rows of several V share; else empty

    @property
    def method(self) -> str:
        """What compresses the tokens, see `method_of`."""
        return method_of(self.compressor, self.query, self.variant)

    def to_json(self) -> str:
        """The row as one line of JSON, keys sorted, without a newline. Raises ValueError on NaN."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> "Row":
        """The row that `to_json` wrote; ValueError names fields that are missing or unknown."""
        fields = json.loads(line)
        if not isinstance(fields, dict):
            raise ValueError(f"a row is a JSON object, got {type(fields).__name__}")
        if fields.get("schema") != SCHEMA:
            raise ValueError(f"row of schema {fields.get('schema')!r}, this version reads {SCHEMA}")
        known = {field.name: field for field in dataclasses.fields(cls)}
        missing = [name for name in known if name not in fields and name not in LATER]
        unknown = [name for name in fields if name not in known]
        if missing or unknown:
            raise ValueError(f"row with missing fields {missing} and unknown fields {unknown}")
        fields |= {name: float(fields[name]) for name in ("Q", "G", "evaluate_seconds")}
        for name, task in (fields["tasks"] | fields["families"]).items():
            if not 0 <= task["score"] <= 1:  # also refuses NaN
                raise ValueError(f"score of {name} must be a fraction in 0..1, got {task['score']}")
        return cls(**fields)


LATER = ("variant", "timing", "trained_with")


def method_of(compressor: str, query: str, variant: str = "") -> str:
    """A compressor with what tells its models apart: "quecc, pool, query separate"."""
    asked = "" if query in ("", "none") else f"query {query}"
    return ", ".join(word for word in (compressor, variant, asked) if word)


def families_of(tasks: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Family -> score, stderr, n: the unweighted mean over its tasks, taken as independent."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for task in tasks.values():
        grouped.setdefault(task["family"], []).append(task)
    return {
        family: {
            "score": sum(t["score"] for t in members) / len(members),
            "stderr": math.sqrt(sum(t["stderr"] ** 2 for t in members)) / len(members),
            "n": sum(t["n"] for t in members),
        }
        for family, members in sorted(grouped.items())
    }


def read(path: str | Path) -> list[Row]:
    """The rows of a rows.jsonl file, in file order.

    A last line that is torn (a writer was killed) is left out with a warning. Raises ValueError for
    any other bad line, with its number, and for a cell that occurs twice, with its name.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for number, line in numbered:
        try:
            row = Row.from_json(line)
        except json.JSONDecodeError as problem:
            if number == numbered[-1][0]:
                warnings.warn(
                    f"{path}:{number}: torn last line left out; its cell counts as not done",
                    stacklevel=2,
                )
                break
            raise ValueError(f"{path}:{number}: not JSON: {problem}") from None
        except (ValueError, KeyError, TypeError) as problem:
            raise ValueError(f"{path}:{number}: {problem}") from None
        if row.cell in seen:
            raise ValueError(
                f"{path}:{number}: cell {row.cell} was already in line {seen[row.cell]}: remove one"
            )
        seen[row.cell] = number
        rows.append(row)
    return rows


def write(path: str | Path, rows: Iterable[Row]) -> None:
    """Replaces the file by these rows, sorted by cell; a crash leaves all of the old ones."""
    ordered = sorted(rows, key=lambda row: row.cell)
    files.write_text(path, "".join(row.to_json() + "\n" for row in ordered))


def methods(rows: Iterable[Row]) -> dict[str, int]:
    """Method -> its number of sighted cells, most first, then by name; blind rows do not count."""
    cells: dict[str, set[tuple[int, int | float, int]]] = {}
    for row in rows:
        if not row.blind:
            cells.setdefault(row.method, set()).add((row.llm_parameters, row.V, row.seed))
    counts = {name: len(members) for name, members in cells.items()}
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def main_method(rows: Sequence[Row]) -> str:
    """The method of the grid proper: the one with most sighted cells. ValueError when two tie."""
    counts = methods(rows)
    if not counts:
        raise ValueError(f"none of the {len(rows)} rows is of a model that sees the image")
    most = next(iter(counts.values()))
    tied = [name for name, count in counts.items() if count == most]
    if len(tied) > 1:
        raise ValueError(
            f"the methods {' and '.join(tied)} have {most} cells each: choose with --compressor, "
            f'such as --compressor="{tied[0]}"'
        )
    return tied[0]


def of_method(rows: Sequence[Row], name: str) -> list[Row]:
    """The rows of one method, or of a compressor where all of its rows are one method.

    Raises ValueError for a name that no row has, and for a compressor with several methods.
    """
    kept = [row for row in rows if row.method == name]
    kept = kept or [row for row in rows if row.compressor == name]
    found = list(dict.fromkeys(row.method for row in kept))
    if not found:
        raise ValueError(f"no row of {name!r}; there are {'; '.join(methods(rows)) or 'none'}")
    if len(found) > 1:
        raise ValueError(
            f"{name} was run as {'; '.join(found)}: these are different models, choose one of them"
        )
    return kept


def cells(
    rows: Sequence[Row], *, blind: bool = False, method: str | None = None, by: str = "families"
) -> list[Cell]:
    """The fit's cells: sighted rows (or blind ones) of one method, by default the grid's main one.

    `by` takes the errors from "families" or "tasks". Seeds stay separate cells. Raises ValueError
    when two rows share LLM size, V and seed: one of them belongs to another run.
    """
    kept = [row for row in rows if row.blind == blind]
    if method is None and not blind:
        method = main_method(rows)
    if method is not None:
        kept = of_method(kept, method)
    seen: dict[tuple[int, int | float, str, int], str] = {}
    for row in kept:
        key = (row.llm_parameters, row.V, row.method, row.seed)
        if key in seen:
            raise ValueError(
                f"rows {seen[key]} and {row.cell} are both {row.llm_parameters:,} parameters, "
                f"V={row.V}, {row.method}, seed {row.seed}: keep one, or give them different seeds"
            )
        seen[key] = row.cell
    return [
        Cell(
            N=row.llm_parameters / 1e9,
            V=float(row.V),
            Q=row.Q,
            label=row.llm,
            seed=row.seed,
            errors={name: (1.0 - t["score"], t["stderr"]) for name, t in getattr(row, by).items()},
        )
        for row in kept
    ]


def points(
    rows: Sequence[Row],
    family: str | None = None,
    *,
    blind: bool = False,
    method: str | None = None,
) -> Points:
    """The points of one family or task (None: the mean over families), filtered as `cells` does."""
    task = family is not None and any(family in row.tasks for row in rows)
    by = "tasks" if task and not any(family in row.families for row in rows) else "families"
    return of_cells(cells(rows, blind=blind, method=method, by=by), family)


def doubts(rows: Sequence[Row], chip: str) -> list[str]:
    """What is doubtful about times of this chip that are fitted to these rows."""
    found = []
    machines = sorted({row.machine for row in rows if ("cpu" in row.machine) != (chip == "cpu")})
    if machines:
        found.append(
            f"the rows of --measured were evaluated on {', '.join(machines)}, "
            f"not on {chip}: their efficiency says nothing of it"
        )
    if not any(row.timing for row in rows):
        found.append(
            "the rows of --measured have no times of single batches: "
            "loading and compiling count against the chip"
        )
    return found


def is_rows(path: str | Path) -> bool:
    """Whether the file holds rows of this project (as opposed to somebody's table)."""
    if Path(path).suffix not in (".jsonl", ".ndjson"):
        return False
    with open(path, encoding="utf-8") as file:
        first = next((line for line in file if line.strip()), "")
    try:
        return "llm_parameters" in json.loads(first)
    except (json.JSONDecodeError, TypeError):
        return False


def read_points(
    path: str | Path,
    family: str | None = None,
    *,
    method: str | None = None,
    n_unit: str | None = None,
    text_tokens: float = 0.0,
) -> Points:
    """The points of a results file: our own rows.jsonl, or somebody's table.

    Args:
      family: one family or task; the mean over families unless given.
      method: of a grid's rows; the one with most cells unless given.
      n_unit, text_tokens: of a table, as `tables.read` has them.
    Raises:
      OSError, ValueError: for a file that is none, saying where.
    """
    if is_rows(path):
        return points(read(path), family, method=method)
    return of_cells(tables.read(path, n_unit=n_unit, text_tokens=text_tokens), family)
