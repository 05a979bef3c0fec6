# SPDX-License-Identifier: Apache-2.0
"""The rows of a file of JSON or of JSON lines, told apart by what it holds, not by its name.

What spoils a file is refused; what spoils one row is that row's own fault.
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
# What moves between the values of a list: a whole text, a bracket, or a comma.
_MARKS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]', re.DOTALL)


class Fault(Exception):
    """Why a row is bad: a word to count it under, and what came and what was allowed."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Twice(dict):
    """An object with `repeated` keys, those that came more than once: the last would just win."""

    repeated: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rows:
    """What a file holds: a value for each row, or the Fault that stands in its place.

    Attributes:
      rows: in file order. lines: the line of each row, counted from 1; None where the file is one
        JSON list.
      sha256: of the bytes of the file.
    """

    rows: list
    lines: list[int] | None
    sha256: str

    def place(self, number: int) -> str:
        """Where row `number` (from 0) stands, as an error names it."""
        return f"row {number}" if self.lines is None else f"line {self.lines[number]}"


def read_rows(path: Path) -> Rows:
    """The rows of a file that holds a JSON list, or an object on each line.

    Raises:
      FileNotFoundError: where there is no such file.
      ValueError: where it is neither, or cut short, or not a list at its top.
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
    """The text of a file: UTF-8, or UTF-16 or UTF-32 as its first bytes tell.

    A byte that is no UTF-8 becomes half of a surrogate pair, and is found in the row that has it.
    """
    encoding = json.detect_encoding(data)
    return data.decode(encoding, "surrogateescape" if "utf-8" in encoding else "surrogatepass")


def _parsed(text: str, path: Path) -> tuple[list, list[int] | None]:
    """Rows, and their lines where each has its own."""
    is_list = text.lstrip()[:1] == "["
    try:
        whole = json_value(text)
    except (ValueError, RecursionError) as error:
        rows, lines = _of_lines(text)
        # The last line of a JSON list that is broken may be an object too.
        if sum(isinstance(row, dict) for row in rows) > is_list:
            return rows, lines
        if isinstance(error, RecursionError):
            return ([_row(piece) for piece in _pieces(text)], None) if is_list else (rows, lines)
        raise
    if isinstance(whole, list):
        return whole, None
    if isinstance(whole, dict) and "conversations" in whole:
        return [whole], [1]
    lists = (
        [key for key, value in whole.items() if isinstance(value, list)]
        if isinstance(whole, dict)
        else []
    )
    raise ValueError(
        f"{path} holds a JSON {type(whole).__name__} at the top, not {SHAPE}"
        + (f": save what stands under {lists[0]!r:.40} alone" if lists else "")
    )


def _of_lines(text: str) -> tuple[list, list[int]]:
    """A row for each line that is not blank, whatever it holds, and its number."""
    found = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [_row(line) for _, line in found], [n for n, _ in found]


def _row(text: str) -> Any:
    """One value, or the Fault that it cannot be read."""
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
    """What a text of JSON says; objects with keys that came more than once are `Twice`."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict:
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    made = Twice(made)
    made.repeated = tuple(k for k, n in Counter(k for k, _ in pairs).items() if n > 1)
    return made


def check_text(name: str, text: str) -> None:
    """Raises a Fault for half of a surrogate pair: no tokenizer and no file can hold it."""
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
    """Ids of our own for rows, and what was given.

    Attributes:
      own: unique, by row. given: what a row gave where its own id is another, else "".
      missing: how many rows gave none that can be used.
    """

    own: list[str]
    given: list[str]
    missing: int

    @property
    def repeated(self) -> int:
        """How many rows gave the id of an earlier one."""
        return sum(map(bool, self.given))

    def shown(self, number: int) -> str:
        """What a user finds in the file for row `number`."""
        own = self.own[number]
        return self.given[number] or own


def own_ids(given: Sequence[Any]) -> Ids:
    """An id for each row: the given one where it is the first of its kind, then ID#2, ID#3, ...

    A row without an id (or with one that is neither text nor number) is #ROW, counted from 0. They
    follow from the file alone, whichever of its rows are bad, and never meet an id that is given.
    """
    names = [_named(value) for value in given]
    taken, seen, numbers = set(names), set(), {}
    own, told = [], []
    for row, name in enumerate(names):
        made = base = f"#{row}" if name is None else name
        if name is None or name in seen:
            number = numbers.get(base, 1)
            while made in taken:
                number += 1
                made = f"{base}#{number}"
            numbers[base] = number
        seen.add(name)
        taken.add(made)
        own.append(made)
        told.append("" if name in (None, made) else name)
    return Ids(own, told, names.count(None))


def _named(value: Any) -> str | None:
    """An id as text; None where a row gives no usable id."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    return str(value) if number or (isinstance(value, str) and value) else None
