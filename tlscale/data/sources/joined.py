"""Join splits of a source to one, the rows of one table behind those of the other.

Shape letters: N rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from tlscale.data.content import digest_of_parts
from tlscale.data.sources.tables import Ints, LabelledTable, Raw, RawStore


@dataclass(frozen=True, eq=False)
class JoinedStore:
    """The stores of several splits, one behind the other."""

    parts: Sequence[RawStore]

    @property
    def content(self) -> str:
        return digest_of_parts(part.content for part in self.parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def read(self, row: int) -> Raw:
        part, at = self._at(row)
        return part.read(at)

    def where(self, row: int) -> str:
        part, at = self._at(row)
        return part.where(at)

    def file_of(self, row: int) -> Path | None:
        part, at = self._at(row)
        return part.file_of(at)

    def places(self, rows_N: Ints) -> list[str]:
        return [place for part, at_N in self.runs(rows_N) for place in part.places(at_N)]

    def stamps(self, rows_N: Ints) -> list[bytes | None] | None:
        found = [part.stamps(at_N) for part, at_N in self.runs(rows_N)]
        known = [stamp for stamps in found if stamps is not None for stamp in stamps]
        return None if None in found else known

    def runs(self, rows_N: Ints) -> Iterator[tuple[RawStore, Ints]]:
        """Give each run of rows that lie in one part, in order: the part, and the rows in it."""
        ends = np.cumsum([len(part) for part in self.parts])
        parts_N = np.searchsorted(ends, rows_N, side="right")
        for some_N in np.split(np.arange(len(rows_N)), np.flatnonzero(np.diff(parts_N)) + 1):
            if len(some_N):
                number = int(parts_N[some_N[0]])
                yield self.parts[number], rows_N[some_N] - (int(ends[number]) - len(self.parts[number]))

    def _at(self, row: int) -> tuple[RawStore, int]:
        for part in self.parts:
            if row < len(part):
                return part, row
            row -= len(part)
        raise IndexError(row)


def join_tables(tables: Sequence[LabelledTable]) -> LabelledTable:
    """Return the rows of all tables as one; that of one table is the table itself."""
    if len(tables) == 1:
        return tables[0]
    groups = [table.groups_N for table in tables if table.groups_N is not None]
    return LabelledTable(
        JoinedStore([table.store for table in tables]),
        np.concatenate([table.labels_N for table in tables]),
        pa.concat_arrays(groups) if groups else None,  # the recipe names them of all splits, or of none
    )


def join_files(files: Sequence[Ints | None], tables: Sequence[LabelledTable]) -> Ints | None:
    """Return the number of the file of each row of joined tables; None: each is a file of its own.

    Args:
        files: of each table; equal numbers are equal files, whatever the table.
        tables: as they are joined.
    """
    if all(files_N is None for files_N in files):
        return None
    first = 1 + max(int(files_N.max()) for files_N in files if files_N is not None)
    numbers = []
    for files_N, table in zip(files, tables, strict=True):
        numbers.append(first + np.arange(len(table), dtype=np.int64) if files_N is None else files_N)
        first += len(table)
    return np.concatenate(numbers)
