"""Find images that are in two splits, byte for byte and under whatever name, and leave them out where that is wanted.

Promise: nothing is read only to compare it, unless the recipe asks for `data.duplicates: drop` or `error`, which hold
before anything is drawn; under these equal images of train are never divided by a hold-out, and no test image is
dropped.

Shape letters: N images of a split, M of them that are in another one, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tlscale.data.content import Digests
from tlscale.data.sources.tables import ImageSplit, Ints, LabelledTable, Role
from tlscale.errors import DataError
from tlscale.recipe.schema import DataSection

PAIRS: tuple[tuple[Role, Role], ...] = (("test", "train"), ("test", "validation"), ("validation", "train"))
"""First the split whose figures are too good."""
_KEY = "data.duplicates"


@dataclass(frozen=True, eq=False)
class Shared:
    """Images that two splits have."""

    one: ImageSplit
    """The split whose figures are too good."""
    other: ImageSplit
    positions_M: Ints
    """In `one`, ascending."""
    others_M: Ints
    """In `other`: the first that is equal to each."""

    @property
    def example(self) -> str:
        """Return where two that are equal are."""
        return f"{self.one.where(int(self.positions_M[0]))} = {self.other.where(int(self.others_M[0]))}"


def find_shared(splits: Mapping[Role, ImageSplit]) -> Iterator[Shared]:
    """Yield, for each pair of splits, the images that both have, as far as their contents are known here."""
    for role, other_role in PAIRS:
        one, other = splits.get(role), splits.get(other_role)
        if one is None or other is None:
            continue
        positions_M, others_M = _equal(*one.noted_digests(), *other.noted_digests())
        if len(positions_M):
            yield Shared(one, other, positions_M, others_M)


def _equal(
    own_N: Digests, known_N: npt.NDArray[np.bool_], theirs_K: Digests, theirs_known_K: npt.NDArray[np.bool_]
) -> tuple[Ints, Ints]:
    """Return positions in one split of images that the other has, and there the first that is equal to each."""
    positions_N, others_K = np.flatnonzero(known_N), np.flatnonzero(theirs_known_K)
    distinct, firsts = np.unique(theirs_K[others_K], return_index=True)
    if not len(distinct):
        return positions_N[:0], others_K[:0]
    at_N = np.minimum(np.searchsorted(distinct, own_N[positions_N]), len(distinct) - 1)
    is_there_N = distinct[at_N] == own_N[positions_N]
    return positions_N[is_there_N], others_K[firsts[at_N[is_there_N]]]


@dataclass(frozen=True, eq=False)
class Dropped:
    """What `data.duplicates` leaves out, before anything is drawn."""

    rows: Mapping[Role, Sequence[int]]
    """Rows of whole splits, ascending."""
    contents_N: Ints
    """By row of train: equal for equal images."""
    notes: tuple[str, ...]
    digests: Mapping[Role, tuple[Ints, Digests]]
    """Rows that were read, and their contents."""

    @property
    def counts(self) -> dict[Role, int]:
        return {role: len(rows) for role, rows in self.rows.items() if len(rows)}

    def hand_over(self, tables: Mapping[Role, LabelledTable]) -> None:
        """Give the contents to tables that were opened since."""
        for role, (rows_N, digests_N) in self.digests.items():
            tables[role].take_digests(rows_N, digests_N)


def drop_shared(
    section: DataSection, tables: Mapping[Role, LabelledTable], bad: Mapping[Role, Sequence[int]]
) -> Dropped:
    """Read all images of the source's splits, and find those of train and validation that a split before has.

    Args:
        bad: rows that are skipped anyway.

    Raises:
        DataError: there are some, and the recipe calls that an error; nothing would be left; or one cannot be read.
    """
    whole = {
        role: ImageSplit(role, table, np.delete(np.arange(len(table)), list(bad.get(role, ()))))
        for role, table in tables.items()
    }
    digests = {role: (split.rows_N, split.digests()) for role, split in whole.items()}
    rows: dict[Role, Ints] = {}
    notes = []
    for shared in find_shared(whole):
        role = shared.other.name
        if section.duplicates == "error":
            raise DataError(
                f"{len(shared.positions_M):,} of {len(shared.one):,} images of {shared.one.name} are, byte for byte, "
                f"in {role} too, such as {shared.example}",
                key=_KEY,
                remedy=f"Take them out; drop leaves them out of {role}, and warn takes them as they are",
            )
        equal_N = np.isin(shared.other.noted_digests()[0], shared.one.noted_digests()[0][shared.positions_M])
        found = np.union1d(rows.get(role, shared.other.rows_N[:0]), shared.other.rows_N[equal_N])
        notes.append(
            f"DROPPED: {int(equal_N.sum()):,} of {len(shared.other):,} images of {role} are, byte for byte, in "
            f"{shared.one.name} too ({_KEY}: drop), such as {shared.example}"
        )
        if len(found) == len(shared.other):
            raise DataError(f"all {len(found):,} images of {role} are in other splits, byte for byte", key=_KEY)
        rows[role] = found
    plain = {role: found.tolist() for role, found in rows.items()}
    return Dropped(plain, _number_contents(tables["train"]), tuple(notes), digests)


def _number_contents(table: LabelledTable) -> Ints:
    """Return a number for each row, equal for rows that are known to be equal."""
    digests_N, known_N = table.noted_digests(np.arange(len(table)))
    numbers_N = np.arange(len(table), dtype=np.int64)
    _, firsts, of_known = np.unique(digests_N[known_N], return_index=True, return_inverse=True)
    numbers_N[known_N] = np.flatnonzero(known_N)[firsts][of_known.reshape(-1)]
    return numbers_N
