# SPDX-License-Identifier: Apache-2.0
"""What several readers of official files share: rows of the Hugging Face hub, and errors that name
the row."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlm_jax.evals.task import found, json_lines


@contextmanager
def row_of(path: Path, number: int | str) -> Iterator[None]:
    """Makes what a row lacks a ValueError with the file and the row's number, from 0, or key."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path}, row {number}: it has no field {error}") from error
    except (TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}, row {number}: a field is not as expected: {error}") from error
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}, row {number}: {error}") from error


def text_of(value: Any) -> str:
    """A text, or a number as text. Raises TypeError for other values, such as null."""
    if isinstance(value, str) or type(value) is int:
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(value)
    raise TypeError(f"{value!r:.60} where a text or a number is needed")


def texts_of(values: Any) -> tuple[str, ...]:
    """The texts of a list. Raises TypeError for no list, and as `text_of` does."""
    if not isinstance(values, list | tuple):
        raise TypeError(f"{values!r:.60} where a list is needed")
    return tuple(map(text_of, values))


def hub_rows(path: Path, names: Sequence[str], task: str) -> tuple[Path, list[dict[str, Any]]]:
    """The file and its rows: a data set of the hub, saved as JSON lines (`Dataset.to_json`)."""
    path = found(path, names, task)
    if path.suffix == ".parquet":
        raise ValueError(
            f"{path}: save the rows as JSON lines and the images beside them, in images/; "
            "datasets.Dataset.to_json does the first"
        )
    return path, [row for _, row in json_lines(path)]


def hub_image(path: Path, row: Mapping[str, Any], field: str) -> Path | None:
    """The path of a row's image, relative to the file; None if it has none."""
    value = row.get(field)
    if isinstance(value, dict):
        value = value.get("path")
    return path.parent / value if value else None
