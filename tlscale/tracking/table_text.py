"""Lay tables out for a screen: as wide as it at most, wrapped, and in several parts where there are too many columns.

Promise: no cell is cut. Words are broken on a terminal alone, so that what is in a file can be searched and copied.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

_NUMBER = re.compile(r"[-+]?[0-9][0-9.,_]*(e[-+]?[0-9]+)?\s?%?|-|")
_GAP = 2  # columns between two columns of a table
_EDGES = 2
_COMFORTABLE = 16  # a column that is no narrower is read with ease
_LEAST = 6  # to which a word is broken

Cells = Sequence[Sequence[str]]


def tables_that_fit(
    title: str, heads: Sequence[str], rows: Cells, room: int, *, breaks_words: bool, num_keys: int
) -> Iterator[tuple[int, Table]]:
    """Yield one table, or several that have the first columns in common, each with its width.

    Args:
        room: columns of the screen.
        breaks_words: a word that is too long is broken; else it makes its column, and the table, wider.
        num_keys: so many columns begin each table.
    """
    columns = [_Column(head, [row[at] for row in rows]) for at, head in enumerate(heads)]
    for part in _parts(columns, room, num_keys):
        widths = _widths(part, room, breaks_words=breaks_words)
        yield _total(widths), _table(title, part, widths)
        title = ""


class _Column:
    """Hold a column, its width with nothing wrapped, and with everything wrapped that may be."""

    def __init__(self, head: str, cells: Sequence[str]) -> None:
        self.head, self.cells = head, cells
        self.are_numbers = all(_NUMBER.fullmatch(cell) for cell in cells)
        self.natural = max(1, *map(cell_len, [head, *cells]))
        words = [*head.split(), *(cells if self.are_numbers else (word for cell in cells for word in cell.split()))]
        self.least = max([1, *map(cell_len, words)])

    @property
    def comfortable(self) -> int:
        """Return the width from which on it is read with ease."""
        return min(self.natural, _COMFORTABLE)


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + _GAP * (len(widths) - 1) + _EDGES


def _parts(columns: list[_Column], room: int, num_keys: int) -> list[list[_Column]]:
    """Split the columns into groups, each of which can be read at this width."""
    if _total([min(column.least, _COMFORTABLE) for column in columns]) <= room:
        return [columns]
    keys, parts = columns[:num_keys], list[list[_Column]]()
    for column in columns[num_keys:]:
        wider = [*(parts[-1] if parts else keys), column]
        if parts and _total([one.comfortable for one in wider]) <= room:
            parts[-1] = wider
        else:
            parts.append([*keys, column])
    return parts


def _widths(columns: Sequence[_Column], room: int, *, breaks_words: bool) -> list[int]:
    """Narrow the widest columns first, down to their longest words, and further where words may be broken."""
    widths = [column.natural for column in columns]
    _narrow(widths, [column.least for column in columns], room)
    if breaks_words:
        _narrow(widths, [_LEAST] * len(columns), room)
    return widths


def _narrow(widths: list[int], least: Sequence[int], room: int) -> None:
    """Narrow the widest column again and again, until they fit or are at their least."""
    while _total(widths) > room:
        wide = [at for at, width in enumerate(widths) if width > least[at]]
        if not wide:
            return
        widths[max(wide, key=lambda at: widths[at])] -= 1


def _table(title: str, columns: Sequence[_Column], widths: Sequence[int]) -> Table:
    table = Table(
        title=Text(title) if title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        collapse_padding=False,
        pad_edge=False,
    )
    for column, width in zip(columns, widths, strict=True):
        justify = "right" if column.are_numbers else "left"
        table.add_column(Text(column.head), justify=justify, overflow="fold", width=width)  # type: ignore[arg-type]
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*map(Text, cells))
    return table
