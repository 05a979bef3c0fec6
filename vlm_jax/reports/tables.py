# SPDX-License-Identifier: Apache-2.0
"""Tables as values: the text and the sort key of each cell; templates/parts.html renders them."""

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_jax.reports.amounts import amount_text, parameters_text, seconds_text

MOST_FIRST = 8  # as many columns as a reader compares without scrolling


@dataclass(frozen=True)
class TableCell:
    """The text and the sort key of a cell; `open` marks a difference that is not significant."""

    text: str
    sort: int | float | str = ""
    open: bool = False

    @property
    def key(self) -> int | float | str | None:
        """The sort key in eight digits; None if the text serves as well."""
        if str(self.sort) == self.text:
            return None
        return float(f"{self.sort:.8g}") if isinstance(self.sort, float) else self.sort


@dataclass(frozen=True)
class Table:
    """A table that sorts by any column; the first cell of a row is its head.

    `keys` (none, or one per row) become data-cell attributes that identify rows. `first` are the
    titles by which a reader decides, at most MOST_FIRST: the other columns fold out (none: all are
    shown).
    """

    caption: str
    titles: Sequence[str]
    rows: Sequence[Sequence[TableCell]]
    keys: Sequence[str] = ()
    first: Sequence[str] = ()

    def __post_init__(self):
        if len(self.first) > MOST_FIRST or not set(self.first) <= set(self.titles):
            raise ValueError(f"at most {MOST_FIRST} of {self.titles} come first: {self.first}")

    @property
    def folded(self) -> list[bool]:
        """For each column whether it folds out."""
        return [bool(self.first) and title not in self.first for title in self.titles]

    @property
    def narrow(self) -> "Table":
        """The columns that come first alone."""
        kept = [i for i, folded in enumerate(self.folded) if not folded]
        rows = [[row[i] for i in kept] for row in self.rows]
        return Table(self.caption, [self.titles[i] for i in kept], rows, self.keys)

    @property
    def textual(self) -> list[bool]:
        """For each column whether it sorts as text. Raises ValueError if rows differ in length."""
        columns = zip(self.titles, *self.rows, strict=True)
        return [all(isinstance(cell.sort, str) for cell in cells) for _, *cells in columns]


def words(text: str) -> TableCell:
    """A cell that sorts by its text."""
    return TableCell(text, text)


def numeral(value: int | float | None, text: str | None = None) -> TableCell:
    """A cell that sorts by `value`; a dash for None."""
    if value is None:
        return TableCell("–")
    return TableCell(f"{value:.3g}" if text is None else text, value)


def parameters(count: int) -> TableCell:
    """A parameter count, such as 25k or 7B."""
    return numeral(count, parameters_text(count / 1e9))


def amount(value: int | float | None) -> TableCell:
    """A count with a metric prefix, or a dash."""
    return numeral(value, value is not None and amount_text(value) or None)


def seconds(value: int | float | None) -> TableCell:
    """A duration, or a dash."""
    return numeral(value, value is not None and seconds_text(value) or None)
