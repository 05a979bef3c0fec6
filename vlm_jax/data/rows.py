# SPDX-License-Identifier: Apache-2.0
"""The rows of a file of JSON or of JSON lines, recognized by its content, not by its name.

A fault of the file is an error; a fault of one row concerns that row only.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHAPE = "a list of rows with id, image and conversations"
# Tokens that separate the values of a list: a whole text, a bracket or a comma.
_MARKS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]', re.DOTALL)


class Fault(Exception):
    """Why a row is bad: `kind`, under which it is counted, and what came and what was allowed."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Twice(dict):
    """A JSON object with repeated keys (`repeated`), of which the last one would silently win."""

    repeated: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rows:
    """The content of a file: a value for each row, or a Fault in its place.

    Attributes:
      rows: in file order. lines: the line of each row, counted from 1; None if the file is one
        JSON list.
      sha256: of the bytes of the file.
    """

    rows: list
    lines: list[int] | None
    sha256: str

    def place(self, number: int) -> str:
        """The place of row `number` (from 0) for a message."""
        return f"row {number}" if self.lines is None else f"line {self.lines[number]}"


def read_rows(path: Path) -> Rows:
    """The rows of a file that holds a JSON list, or an object on each line.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is neither, or cut short, or not a list at its top.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no such file: {path}: set data.path to a JSON list of LLaVA rows, or JSON lines"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}") from error
    if not data.strip():
        raise ValueError(f"{path} is empty ({len(data)} bytes): it should hold {SHAPE}")
    digest = hashlib.sha256(data).hexdigest()
    try:
        text = _decoded(data)
        rows, lines = _parsed(text, path)
    except (ValueError, RecursionError) as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(
            f"{path} is not JSON, or cut short ({len(data)} bytes): {error}; download it again, "
            f"or give {SHAPE} as a JSON list or as JSON lines"
        ) from error
    return Rows(rows, lines, digest)


def _decoded(data: bytes) -> str:
    """The text of a file: UTF-8, or UTF-16 or UTF-32 according to its first bytes.

    A byte that is not UTF-8 becomes a lone surrogate, which is found in the row that has it.
    """
    encoding = json.detect_encoding(data)
    return data.decode(encoding, "surrogateescape" if "utf-8" in encoding else "surrogatepass")


def _parsed(text: str, path: Path) -> tuple[list, list[int] | None]:
    """Rows, and their lines if each has its own."""
    is_list = text.lstrip()[:1] == "["
    try:
        value = json_value(text)
    except (ValueError, RecursionError) as error:
        rows, lines = _of_lines(text)
        # The last line of a JSON list that is broken may be an object too.
        if sum(isinstance(row, dict) for row in rows) > is_list:
            return rows, lines
        if isinstance(error, RecursionError):
            return ([_row(piece) for piece in _pieces(text)], None) if is_list else (rows, lines)
        raise
    if isinstance(value, list):
        return value, None
    if isinstance(value, dict) and "conversations" in value:
        return [value], [1]
    lists = (
        [key for key, value in value.items() if isinstance(value, list)]
        if isinstance(value, dict)
        else []
    )
    raise ValueError(
        f"{path} holds a JSON {type(value).__name__} at the top, not {SHAPE}"
        + (f": save the list {lists[0]!r:.40} alone" if lists else "")
    )


def _of_lines(text: str) -> tuple[list, list[int]]:
    """A row for each line that is not blank, and its number."""
    numbered = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [_row(line) for _, line in numbered], [n for n, _ in numbered]


def _row(text: str) -> Any:
    """One value, or a Fault if it cannot be read."""
    try:
        return json_value(text)
    except RecursionError:
        return Fault("json", "JSON that is nested too deep to be read")
    except ValueError as error:
        return Fault("json", f"not JSON, or cut short: {error}")


def _pieces(text: str) -> Iterator[str]:
    """The text of each value of a list, without reading the values."""
    depth, start = 0, 0
    for mark in _MARKS.finditer(text):
        character = mark.group()
        if character in ("[", "{"):
            depth += 1
            start = mark.end() if depth == 1 else start
        elif depth == 1 and character in (",", "]"):
            if text[start : mark.start()].strip():
                yield text[start : mark.start()]
            start = mark.end()
        if character in ("]", "}"):
            depth -= 1
    if depth:
        raise ValueError(f"{depth} brackets are not closed")


def json_value(text: str) -> Any:
    """The value of a JSON text; objects with repeated keys are `Twice`."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict:
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    value = Twice(value)
    value.repeated = tuple(k for k, n in Counter(k for k, _ in pairs).items() if n > 1)
    return value


def check_text(name: str, text: str) -> None:
    """Raises a Fault for a lone surrogate, which no tokenizer and no file can hold."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise Fault(
            "text",
            f"{name} holds {half!a} at character {error.start}, half of a surrogate pair, which "
            "is no character (or a byte that is no UTF-8)",
        ) from None


def check_keys(name: str, value: dict) -> None:
    """Raises a Fault for an object that has a key twice."""
    if isinstance(value, Twice):
        raise Fault("repeated_key", f"{name} has {value.repeated[0]!r:.40} more than once")


@dataclass(frozen=True)
class Ids:
    """Unique ids of rows, and the ids in the file.

    Attributes:
      own: the unique id of each row. given: the id in the file if it differs from `own`, else "".
      missing: the number of rows without a usable id.
    """

    own: list[str]
    given: list[str]
    missing: int

    @property
    def repeated(self) -> int:
        """The number of rows with the id of an earlier one."""
        return sum(map(bool, self.given))

    def in_file(self, number: int) -> str:
        """The id of row `number` in the file, if it has one."""
        own = self.own[number]
        return self.given[number] or own


def own_ids(given: Sequence[Any]) -> Ids:
    """A unique id for each row: the given one at its first occurrence, then ID#2, ID#3, ...

    A row without an id (or with one that is neither text nor number) is #ROW, counted from 0. Ids
    depend on the file alone, whichever of its rows are bad, and never equal a given id.
    """
    names = [_named(value) for value in given]
    used, seen, numbers = set(names), set(), {}
    own, replaced = [], []
    for row, name in enumerate(names):
        unique = base = f"#{row}" if name is None else name
        if name is None or name in seen:
            number = numbers.get(base, 1)
            while unique in used:
                number += 1
                unique = f"{base}#{number}"
            numbers[base] = number
        seen.add(name)
        used.add(unique)
        own.append(unique)
        replaced.append("" if name in (None, unique) else name)
    return Ids(own, replaced, names.count(None))


def _named(value: Any) -> str | None:
    """An id as text; None if it is not usable."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    return str(value) if number or (isinstance(value, str) and value) else None
