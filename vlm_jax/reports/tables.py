# SPDX-License-Identifier: Apache-2.0
"""A table of a page as values: what each cell says and sorts by; templates/parts.html writes it."""

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_jax.reports.amounts import amount_text, parameters_text, seconds_text


@dataclass(frozen=True)
class TableCell:
    """What a cell says and sorts by; `open` marks a difference that is not settled."""

    text: str
    sort: int | float | str = ""
    open: bool = False


@dataclass(frozen=True)
class Table:
    """A table that sorts by any column; the first cell of a row is its head.

    `keys` (none, or one per row) become data-cell attributes, by which a row can be found again.
    """

    caption: str
    titles: Sequence[str]
    rows: Sequence[Sequence[TableCell]]
    keys: Sequence[str] = ()

    @property
    def textual(self) -> list[bool]:
        """Of each column, whether it sorts as words; ValueError where a row has other columns."""
        columns = zip(self.titles, *self.rows, strict=True)
        return [all(isinstance(cell.sort, str) for cell in cells) for _, *cells in columns]


def words(text: str) -> TableCell:
    """A cell that sorts as it reads."""
    return TableCell(text, text)


def numeral(value: int | float | None, text: str | None = None) -> TableCell:
    """A cell that sorts by `value`; a dash where there is none."""
    if value is None:
        return TableCell("–")
    return TableCell(f"{value:.3g}" if text is None else text, value)


def parameters(count: int) -> TableCell:
    return numeral(count, parameters_text(count / 1e9))


def amount(value: int | float | None) -> TableCell:
    return numeral(value, value is not None and amount_text(value) or None)


def seconds(value: int | float | None) -> TableCell:
    return numeral(value, value is not None and seconds_text(value) or None)
