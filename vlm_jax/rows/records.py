# SPDX-License-Identifier: Apache-2.0
"""Results rows: everything about one cell in one JSON line, and files of unique rows."""

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


@dataclass(frozen=True)
class Row:
    """One trained and evaluated cell of a grid: one JSON line of rows.jsonl.

    Parameters are counts, V, Q (mean prompt text tokens) and G (mean generated tokens) are tokens,
    scores and standard errors are fractions, `flops` is per request, `train` is in optimizer steps,
    examples, FLOPs and seconds, `created` is UTC in ISO 8601. Fields with a default were added
    later: in lines without them these values were not measured.
    """

    cell: str
    llm: str
    llm_parameters: int
    vit_parameters: int
    compressor_parameters: int
    compressor: str
    query: str  # "none", "separate" or "prefix"
    blind: bool
    V: int | float  # the mean, for methods whose number depends on the image
    Q: float
    G: float
    seed: int
    tasks: dict[str, dict[str, Any]]  # task -> family, metric, score, stderr, n
    families: dict[str, dict[str, Any]]  # family -> score, stderr, n
    flops: dict[str, int | float]  # of one request: of encoder, compressor, question, ...
    # steps, examples, flops, seconds; lora if adapters were trained; start, the digest of the LLM
    # that it started from; encoder, the fingerprint of the grid's; initial_weights, first_loss and
    # last_loss, which differ in some digit if two rows were not trained in the same way.
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
    variant: str = ""  # how the compressor differs from its default, for example "pool"
    # batch, seconds_per_example after compilation, and new_tokens per batch (the closing one
    # included), set by the longest answer; empty if only one batch was run.
    timing: dict[str, Any] = field(default_factory=dict)
    trained_with: str = ""  # the trained model that rows of several V share; else empty
    # How the LLM came by its weights, where the grid's LLMs differ in that: "pretrained, frozen".
    llm_weights: str = ""
    frames: int = 1  # of a clip, the images of a request; V is of one of them, `flops` of all

    @property
    def method(self) -> str:
        """The compressor with its variant and query, and the LLM's weights; see `method_of`."""
        return method_of(self.compressor, self.query, self.variant, self.llm_weights)

    def to_json(self) -> str:
        """The row as one line of JSON, keys sorted, without a newline. Raises ValueError on NaN."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> "Row":
        """The row that `to_json` wrote. Raises ValueError for missing or unknown fields."""
        fields = json.loads(line)
        if not isinstance(fields, dict):
            raise ValueError(f"a row is a JSON object, got {type(fields).__name__}")
        if fields.get("schema") != SCHEMA:
            raise ValueError(f"row of schema {fields.get('schema')!r}, this version reads {SCHEMA}")
        columns = {field.name: field for field in dataclasses.fields(cls)}
        missing = [name for name in columns if name not in fields and name not in LATER]
        unknown = [name for name in fields if name not in columns]
        if missing or unknown:
            raise ValueError(f"row with missing fields {missing} and unknown fields {unknown}")
        fields |= {name: float(fields[name]) for name in ("Q", "G", "evaluate_seconds")}
        for name, task in (fields["tasks"] | fields["families"]).items():
            if not 0 <= task["score"] <= 1:  # also refuses NaN
                raise ValueError(f"score of {name} must be a fraction in 0..1, got {task['score']}")
        return cls(**fields)


LATER = ("variant", "timing", "trained_with", "llm_weights", "frames")


def method_of(compressor: str, query: str, variant: str = "", llm_weights: str = "") -> str:
    """The name of a compressor with its variant and query, "quecc, pool, query separate", and with
    how the LLM behind it came by its weights, "token_packer, pretrained, LoRA"."""
    question = "" if query in ("", "none") else f"query {query}"
    return ", ".join(word for word in (compressor, variant, question, llm_weights) if word)


def comparable(rows: Sequence[Row]) -> list[Row]:
    """The rows with `llm_weights` where they tell models apart: where LLMs of one size came by
    their weights in several ways. Otherwise without, so that all sizes are of one method, as LLMs
    of several makers are."""
    ways: dict[tuple[int, str], set[str]] = {}
    for row in rows:
        key = (row.llm_parameters, method_of(row.compressor, row.query, row.variant))
        ways.setdefault(key, set()).add(row.llm_weights)
    if any(len(found) > 1 for found in ways.values()):
        return list(rows)
    return [dataclasses.replace(row, llm_weights="") for row in rows]


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

    An incomplete last line (a writer was killed) is left out with a warning. Raises ValueError for
    any other bad line, with its number, and for a cell that occurs twice, with its name.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    rows: list[Row] = []
    lines_of: dict[str, int] = {}
    for number, line in numbered:
        try:
            row = Row.from_json(line)
        except json.JSONDecodeError as problem:
            if number == numbered[-1][0]:
                warnings.warn(
                    f"{path}:{number}: incomplete last line left out; its cell counts as not done",
                    stacklevel=2,
                )
                break
            raise ValueError(f"{path}:{number}: not JSON: {problem}") from None
        except (ValueError, KeyError, TypeError) as problem:
            raise ValueError(f"{path}:{number}: {problem}") from None
        if row.cell in lines_of:
            raise ValueError(
                f"{path}:{number}: cell {row.cell} was already in line {lines_of[row.cell]}: "
                "remove one"
            )
        lines_of[row.cell] = number
        rows.append(row)
    return rows


def write(path: str | Path, rows: Iterable[Row]) -> None:
    """Replaces the file by these rows, sorted by cell; after a crash the old rows are intact."""
    ordered = sorted(rows, key=lambda row: row.cell)
    files.write_text(path, "".join(row.to_json() + "\n" for row in ordered))


def methods(rows: Iterable[Row]) -> dict[str, int]:
    """Method -> its number of sighted cells, most first, then by name; blind rows do not count."""
    cells: dict[str, set[tuple[int, int | float, int, int]]] = {}
    for row in rows:
        if not row.blind:
            cells.setdefault(row.method, set()).add(
                (row.llm_parameters, row.V, row.frames, row.seed)
            )
    counts = {name: len(members) for name, members in cells.items()}
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def main_method(rows: Sequence[Row]) -> str:
    """The main method of a grid: the one with the most sighted cells. ValueError if two tie."""
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
    """The rows of one method, or of a compressor if all of its rows have one method.

    Raises ValueError for an unknown name, and for a compressor with several methods.
    """
    chosen = [row for row in rows if row.method == name]
    chosen = chosen or [row for row in rows if row.compressor == name]
    names = list(dict.fromkeys(row.method for row in chosen))
    if not names:
        raise ValueError(f"no row of {name!r}; there are {'; '.join(methods(rows)) or 'none'}")
    if len(names) > 1:
        raise ValueError(
            f"{name} was run as {'; '.join(names)}: these are different models, choose one of them"
        )
    return chosen


def cells(
    rows: Sequence[Row], *, blind: bool = False, method: str | None = None, by: str = "families"
) -> list[Cell]:
    """The cells to fit: sighted (or blind) rows of one method, by default the grid's main one.

    `by` takes the errors from "families" or "tasks". Seeds stay separate cells. Raises ValueError
    if two rows have the same LLM size, V and seed: one of them belongs to another run.
    """
    chosen = [row for row in rows if row.blind == blind]
    if method is None and not blind:
        method = main_method(rows)
    if method is not None:
        chosen = of_method(chosen, method)
    first: dict[tuple[int, int | float, int, str, int], str] = {}
    for row in chosen:
        key = (row.llm_parameters, row.V, row.frames, row.method, row.seed)
        if key in first:
            raise ValueError(
                f"rows {first[key]} and {row.cell} are both {row.llm_parameters:,} parameters, "
                f"V={row.V}, {row.method}, seed {row.seed}: keep one, or give them different seeds"
            )
        first[key] = row.cell
    return [
        Cell(
            N=row.llm_parameters / 1e9,
            V=float(row.V),
            Q=row.Q,
            label=row.llm,
            seed=row.seed,
            model=row.trained_with,
            frames=float(row.frames),
            errors={name: (1.0 - t["score"], t["stderr"]) for name, t in getattr(row, by).items()},
        )
        for row in chosen
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


def timing_warnings(rows: Sequence[Row], chip: str) -> list[str]:
    """Warnings about times of this chip that are fitted to these rows, one sentence each."""
    sentences = []
    machines = sorted({row.machine for row in rows if ("cpu" in row.machine) != (chip == "cpu")})
    if machines:
        sentences.append(
            f"the rows of --measured were evaluated on {', '.join(machines)}, "
            f"not on {chip}: their efficiency does not apply to it"
        )
    if not any(row.timing for row in rows):
        sentences.append(
            "the rows of --measured have no times of single batches: "
            "loading and compiling count against the chip"
        )
    return sentences


def is_rows(path: str | Path) -> bool:
    """Whether the file holds rows of this project and not a table of another tool."""
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
    """The points of a results file: rows.jsonl of a grid, or a table of another tool.

    Args:
      family: one family or task; by default the mean over families.
      method: the method of a grid's rows; by default the one with the most cells.
      n_unit, text_tokens: for tables, see `tables.read`.
    Raises:
      OSError: if the file cannot be read.
      ValueError: if it is not a results file, with the line.
    """
    if is_rows(path):
        return points(comparable(read(path)), family, method=method)
    return of_cells(tables.read(path, n_unit=n_unit, text_tokens=text_tokens), family)
