"""Groups: images that belong together, such as photos of one patient, named by a column or by a part of their path.

Promise: an image without a group is a group of its own, an expression that does not fit every path is an error, and so
is a group in two splits of the source unless the recipe allows it, which the result then says.

Shape letters: N rows of a split, M rows of all splits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlscale.data.sources.grouped_draws import Units, grouped_holdout, grouped_subset, num_units_by_class
from tlscale.data.sources.joined import JoinedStore
from tlscale.data.sources.labels import check_alike, is_text
from tlscale.data.sources.stores import FileStore
from tlscale.data.sources.tables import GroupNames, Ints, LabelledTable, RawStore, Role, SourceSplit, number_groups
from tlscale.errors import DataError, counted, first_few, one_line, quoted
from tlscale.recipe.matching import check_time
from tlscale.recipe.schema import DataSection

_TRIED_PATHS = 1000  # for how long an expression takes; the longest ones


@dataclass(frozen=True)
class Shared:
    """Groups that two splits of the source have."""

    splits: tuple[Role, Role]
    num_groups: int
    example: str


@dataclass(frozen=True)
class Groups:
    """What a run knows of its groups."""

    by: str
    """The key of the recipe, and what it names."""
    counts: Mapping[Role, int]
    """Groups by split, images without one not counted."""
    alone: Mapping[Role, int]
    """Images without a group by split."""
    shared: tuple[Shared, ...]
    """What the recipe allows."""
    draw: bool
    """Whether they decide what is limited or held out."""

    def to_plain(self) -> dict[str, Any]:
        """Return plain values for `run.json` and `result.json`."""
        shared = [
            {"splits": list(one.splits), "num_groups": one.num_groups, "example": one.example} for one in self.shared
        ]
        return {"by": self.by, "num_groups": dict(self.counts), "num_alone": dict(self.alone), "in_two_splits": shared}


def groups_of_column(column: pa.ChunkedArray, where: str) -> GroupNames:
    """Return the group of each row; null where it is empty.

    Args:
        column: of text, whole numbers (also as floating point, which is what is made of a column with gaps), booleans,
            or a dictionary of such.

    Raises:
        DataError: another type, or no row has a group.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if pa.types.is_floating(kind):
        column = _whole_numbers(column, where)
    elif not (is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise DataError(f"{where}: groups are of type {kind}; expected text or whole numbers", key="data.group_column")
    names_N = pc.utf8_trim_whitespace(column.cast(pa.large_string())).combine_chunks()
    names_N = pc.if_else(pc.equal(names_N, ""), pa.scalar(None, pa.large_string()), names_N)
    if names_N.null_count == len(names_N) and len(names_N):
        raise DataError(f"{where}: all {len(names_N):,} rows are empty", key="data.group_column")
    return names_N


def _whole_numbers(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    column = pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise DataError(f"{where}: groups are text or whole numbers: {error}", key="data.group_column") from None


def name_by_path(section: DataSection, splits: Mapping[Role, SourceSplit]) -> dict[Role, SourceSplit]:
    """Give the images of all splits the groups that `data.group_regex` finds in their paths.

    Raises:
        DataError: the images have no paths, or the expression matches none of them, or not all.
        RecipeError: it takes too long.
    """
    assert section.group_regex is not None
    paths: dict[Role, list[str]] = {}
    for role, split in splits.items():
        if not isinstance(split.store, FileStore):
            raise DataError(
                "it is matched against paths, and the images are in the table",
                key="data.group_regex",
                remedy="Name a column of groups: data.group_column",
            )
        paths[role] = split.store.paths_N.to_pylist()
    every = [path for some in paths.values() for path in some]
    tried = tuple(sorted(every, key=len)[-_TRIED_PATHS:])
    check_time(section.group_regex, tried, "data.group_regex", searches=True)
    pattern = re.compile(section.group_regex)
    names = {role: [_group_in(pattern, path) for path in some] for role, some in paths.items()}
    _refuse_unmatched(section.group_regex, every, [name for some in names.values() for name in some])
    return {
        role: replace(split, groups_N=pa.array([name or None for name in names[role]], pa.large_string()))
        for role, split in splits.items()
    }


def _group_in(pattern: re.Pattern[str], path: str) -> str | None:
    """Return the group in a path: what the brackets of the expression match, else all of it; None: no match."""
    match = pattern.search(path)
    if match is None:
        return None
    return "/".join(part or "" for part in match.groups()).strip("/ ") if pattern.groups else match[0].strip()


def _refuse_unmatched(regex: str, paths: Sequence[str], names: Sequence[str | None]) -> None:
    unmatched = [path for path, name in zip(paths, names, strict=True) if name is None]
    if unmatched:
        how_many = "none" if len(unmatched) == len(paths) else f"only {len(paths) - len(unmatched):,}"
        raise DataError(
            f"'{one_line(regex)}' matches {how_many} of the {len(paths):,} paths; not, for example, "
            f"'{one_line(unmatched[0])}'",
            key="data.group_regex",
            remedy="Write one that matches every path; an image for which its brackets ( ) match nothing is a group of "
            "its own: .*?(patient[0-9]+)|. for example.",
        )
    if paths and not any(names):
        raise DataError(
            f"'{one_line(regex)}' gives no image a group: its brackets match nothing", key="data.group_regex"
        )


def check_groups(
    section: DataSection,
    tables: Mapping[Role, LabelledTable],
    good: Mapping[Role, Ints],
    place: str,
    *,
    pooled: bool = False,
) -> tuple[Shared, ...]:
    """Find groups that two splits of the source have.

    Args:
        good: rows that are not left out.
        pooled: images of train and validation are dealt out anew, so that groups of both are in no two splits.

    Raises:
        DataError: there are some, and the recipe does not allow it; or two names of groups look alike.
    """
    named = {role: _names_in(table, good[role]) for role, table in tables.items() if table.groups_N is not None}
    key = "data.group_column" if section.group_regex is None else "data.group_regex"
    every = dict.fromkeys(name for names in named.values() for name in names)
    check_alike(every, place, called=("groups", "groups"), key=key)  # a patient of two spellings would be on both sides
    found = []
    for one, other in combinations(named, 2):
        both = sorted(named[one].keys() & named[other].keys())
        if both and not (pooled and {one, other} == {"train", "validation"}):
            found.append((Shared((one, other), len(both), both[0]), named[one][both[0]], named[other][both[0]]))
    if found and section.groups_across_splits == "error":
        shared, row, other_row = found[0]
        one, other = shared.splits
        are = "is" if shared.num_groups == 1 else "are"
        raise DataError(
            f"{place}: {counted(shared.num_groups, 'group')} {are} in both {one} and {other}, such as "
            f"{shared.example!r} ({tables[one].where(row)} and {tables[other].where(other_row)})",
            key="data.groups_across_splits",
            remedy="Divide the images by group. Or write allow to take them as they are, which the result then says",
        )
    return tuple(shared for shared, _, _ in found)


def _names_in(table: LabelledTable, rows_N: Ints) -> dict[str, int]:
    """Return the groups of some rows of a table, with the first row of each."""
    rows: dict[str, int] = {}
    assert table.groups_N is not None
    for row, name in zip(rows_N.tolist(), table.groups_N.take(pa.array(rows_N)).to_pylist(), strict=True):
        if name is not None:
            rows.setdefault(name, row)
    return rows


def describe_groups(
    section: DataSection,
    tables: Mapping[Role, LabelledTable],
    good: Mapping[Role, Ints],
    shared: tuple[Shared, ...],
    *,
    draw: bool,
) -> Groups | None:
    """Return what is known of the groups of all `good` rows of the source; None where the recipe names none."""
    named = {
        role: table.groups_N.take(pa.array(good[role])) for role, table in tables.items() if table.groups_N is not None
    }
    if not named:
        return None
    key = "group_regex" if section.group_regex is not None else "group_column"
    counts = {role: pc.count_distinct(names_N).as_py() for role, names_N in named.items()}
    alone = {role: names_N.null_count for role, names_N in named.items()}
    return Groups(f"data.{key}: {getattr(section, key)}", counts, alone, shared, draw)


def notes_on_groups(groups: Groups, good: Mapping[Role, Ints], across_splits: str) -> list[str]:
    """Return what a person should know of them.

    Args:
        good: the rows that are not left out.
        across_splits: `data.groups_across_splits`.
    """
    notes = []
    for role, count in groups.counts.items():
        alone = groups.alone[role]
        of_its_own = "is a group" if alone == 1 else "are a group each"
        note = f"{role}: {counted(len(good[role]), 'image')} in {counted(count, 'group')} ({groups.by})"
        notes.append(note + (f"; {counted(alone, 'image')} without one {of_its_own}" if alone else ""))
    if groups.counts and all(groups.counts[role] + groups.alone[role] == len(good[role]) for role in groups.counts):
        notes.append("groups: each has one image, so that they change nothing")
    if across_splits == "allow" and not groups.shared:
        notes.append("groups: none is in two splits, so that data.groups_across_splits: allow changes nothing")
    for one in groups.shared:
        first, second = one.splits
        are = "is" if one.num_groups == 1 else "are"
        notes.append(
            f"LEAK: {counted(one.num_groups, 'group')} {are} in both {first} and {second}, such as {one.example!r} "
            f"(data.groups_across_splits: allow): figures on {second} are too good"
        )
    return notes


class GroupedDraw:
    """Draw images of a table in whole groups; rows of one file stay together, too."""

    unit = "group"

    def __init__(self, table: LabelledTable, files_N: Ints | None, rows_N: Ints) -> None:
        """Find what is never divided.

        Args:
            rows_N: those that there are to draw from.
        """
        self._labels_N, self._keys = table.labels_N, image_keys(table.store)
        self._units = units_of(table, files_N)
        self._sizes_G = np.bincount(self._units.numbers_N[rows_N], minlength=len(self._units.names))

    def subset(self, rows_N: Ints, count: int, seed: int) -> Ints:
        """Return positions in `rows_N`."""
        keys = [self._keys[row] for row in rows_N.tolist()]
        return grouped_subset(self._labels_N[rows_N], self._units.of(rows_N), keys, count, seed)

    def holdout(self, rows_N: Ints, fraction: float, seed: int) -> Ints:
        """Return positions in `rows_N`; a group that a limit has cut is not held out."""
        units, numbers_M = self._units.of(rows_N), np.unique(self._units.numbers_N[rows_N])
        cut = np.flatnonzero(units.sizes() < self._sizes_G[numbers_M]).tolist()
        return grouped_holdout(self._labels_N[rows_N], units, fraction, seed, stay=cut)

    def num_units(self, rows_N: Ints) -> int:
        return len(np.unique(self._units.numbers_N[rows_N]))

    def classes_of_one(self, rows_N: Ints) -> list[int]:
        """Return the classes of which there is one group."""
        counts_C = num_units_by_class(self._labels_N[rows_N], self._units.numbers_N[rows_N])
        return [int(label) for label in np.flatnonzero(counts_C == 1)]


def units_of(table: LabelledTable, files_N: Ints | None) -> Units:
    """Return which rows of a table are never divided: those of a group, and those of a file."""
    keys = image_keys(table.store)
    groups: list[str | None] = [None] * len(table) if table.groups_N is None else table.groups_N.to_pylist()
    numbers_N = np.arange(len(table), dtype=np.int64) if table.groups_N is None else number_groups(table.groups_N)
    if files_N is not None and len(np.unique(files_N)) < len(files_N):
        numbers_N = _joined(numbers_N, files_N)
    names: dict[int, str] = {}
    for unit, group, key in zip(numbers_N.tolist(), groups, keys, strict=True):
        name = f"image {key}" if group is None else f"group {group}"
        names[unit] = min(names.get(unit, name), name)
    return Units(numbers_N, [names[unit] for unit in range(len(names))])


def _joined(one_N: Ints, other_N: Ints) -> Ints:
    """Return the finest numbers that are equal wherever any of the two are, from 0."""
    numbers_N = one_N
    while True:
        before_N = numbers_N
        for parts_N in (other_N, one_N):
            _, parts = np.unique(parts_N, return_inverse=True)
            least = np.full(parts.max() + 1, len(one_N), dtype=np.int64)
            np.minimum.at(least, parts.reshape(-1), numbers_N)
            numbers_N = least[parts.reshape(-1)]
        if np.array_equal(before_N, numbers_N):
            return np.unique(numbers_N, return_inverse=True)[1].reshape(-1).astype(np.int64)


def image_keys(store: RawStore) -> list[str]:
    """Return what a draw knows each image by: its path, else its row; in joined splits with the number of the split."""
    if isinstance(store, JoinedStore):
        return [f"{number} {key}" for number, part in enumerate(store.parts) for key in image_keys(part)]
    if isinstance(store, FileStore):
        paths: list[str] = store.paths_N.to_pylist()
        return paths
    return store.places(np.arange(len(store)))


def refuse_wrong_columns(group: str | None, others: Mapping[str, str], where: str) -> None:
    """Check that the column of groups is not read as something else, too.

    Args:
        others: what each of the other columns that are read holds.
    """
    if group is not None and group in others:
        raise DataError(
            f"{where}: column {group!r} holds the {others[group]}",
            key="data.group_column",
            remedy=f"Name the column that tells which images belong together. Read are: {first_few(quoted(others))}",
        )
