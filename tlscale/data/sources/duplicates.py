"""Find images that are in two splits, byte for byte and under whatever name, and leave them out where that is wanted.

Promise: nothing is read only to compare it, unless the recipe asks for `data.duplicates: drop` or `error`, which hold
before anything is drawn; under these equal images of train are never divided by a hold-out and have one label, and no
test image is dropped.

Shape letters: N images of a split, M of them that are in another one, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tlscale.data.content import Digests
from tlscale.data.sources.tables import ImageSplit, Ints, LabelledTable, Role, label_numbers, label_text
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
    contents: Mapping[Role, Ints]
    """By row of train and validation: equal for equal images, of both."""
    notes: tuple[str, ...]

    @property
    def counts(self) -> dict[Role, int]:
        return {role: len(rows) for role, rows in self.rows.items() if len(rows)}


def drop_shared(
    section: DataSection,
    tables: Mapping[Role, LabelledTable],
    classes: Sequence[str],
    bad: Mapping[Role, Sequence[int]],
) -> Dropped:
    """Read all images of the source's splits, and find those of train and validation that are to be left out.

    These are images that a split before has; and all that are equal within one split, but under different labels, as
    one label at most is right and nothing tells which.

    Args:
        bad: rows that are skipped anyway.

    Raises:
        DataError: there are some, and the recipe calls that an error; nothing would be left; or one cannot be read.
    """
    whole = {
        role: ImageSplit(role, table, np.delete(np.arange(len(table)), list(bad.get(role, ()))))
        for role, table in tables.items()
    }
    for split in whole.values():
        split.digests()
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
        rows[role] = np.union1d(rows.get(role, shared.other.rows_N[:0]), shared.other.rows_N[equal_N])
        notes.append(
            f"DROPPED: {int(equal_N.sum()):,} of {len(shared.other):,} images of {role} are, byte for byte, in "
            f"{shared.one.name} too ({_KEY}: drop), such as {shared.example}"
        )
    for role, split in whole.items():
        left = ImageSplit(role, split.table, np.setdiff1d(split.rows_N, rows.get(role, split.rows_N[:0])))
        if len(clashing := _under_two_labels(left)):
            notes.append(_clash_note(section, left, clashing, classes))
            if role != "test":
                rows[role] = np.union1d(rows.get(role, split.rows_N[:0]), left.rows_N[clashing])
        if len(rows.get(role, ())) == len(split):
            problem = f"all {len(split):,} images of {role} are in other splits, or under two labels, byte for byte"
            raise DataError(problem, key=_KEY)
    plain = {role: found.tolist() for role, found in rows.items()}
    return Dropped(plain, _number_contents(tables), tuple(notes))


def _under_two_labels(split: ImageSplit) -> Ints:
    """Return the positions of images that another one of the split equals, under another label."""
    _, of_image = np.unique(split.noted_digests()[0], return_inverse=True)
    of_image = of_image.reshape(-1)
    least, most = np.full(len(split), np.iinfo(np.int64).max), np.full(len(split), -1)
    labels_N = label_numbers(split.labels_N)
    np.minimum.at(least, of_image, labels_N)
    np.maximum.at(most, of_image, labels_N)
    return np.flatnonzero((least < most)[of_image]).astype(np.int64)


def _clash_note(section: DataSection, split: ImageSplit, clashing: Ints, classes: Sequence[str]) -> str:
    """Return a note on images under two labels; where the recipe calls that an error, raise it."""
    digests_N, labels_N = split.noted_digests()[0], label_numbers(split.labels_N)
    first = int(clashing[0])
    equal_N = (digests_N[clashing] == digests_N[first]) & (labels_N[clashing] != labels_N[first])
    other = int(clashing[equal_N][0])
    pair = " and ".join(f"{split.where(at)} is {label_text(split.labels_N[at], classes)!r}" for at in (first, other))
    what = (
        f"{len(clashing):,} of {len(split):,} images of {split.name} are, byte for byte, there under another label too"
    )
    if section.duplicates == "error":
        raise DataError(
            f"{what}: {pair}",
            key=_KEY,
            remedy="Keep the label that is right; drop leaves all of them out, and warn takes them as they are",
        )
    if split.name == "test":
        return f"LABELS: {what}, so that not all can be answered right: {pair}"
    return f"DROPPED: {what} ({_KEY}: drop): {pair}"


def _number_contents(tables: Mapping[Role, LabelledTable]) -> dict[Role, Ints]:
    """Return a number for each row of train and validation, equal for rows that are known to be equal."""
    pooled: tuple[Role, ...] = ("train", "validation")
    roles = [role for role in pooled if role in tables]
    noted = [tables[role].noted_digests(np.arange(len(tables[role]))) for role in roles]
    digests_N, known_N = (np.concatenate(parts) for parts in zip(*noted, strict=True))
    numbers_N = np.arange(len(known_N), dtype=np.int64)
    _, firsts, of_known = np.unique(digests_N[known_N], return_index=True, return_inverse=True)
    numbers_N[known_N] = np.flatnonzero(known_N)[firsts][of_known.reshape(-1)]
    ends = np.cumsum([len(tables[role]) for role in roles])[:-1]
    return dict(zip(roles, np.split(numbers_N, ends), strict=True))
