"""Find rows that are one and the same file, however it is spelt: `a.png`, `./a.png`, by an absolute path or a link.

Promise: a file with two labels is an error, one in two splits is announced, and rows of one file are never divided.

Shape letters: N rows of a split, M rows of all splits, 4 the numbers that identify a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from tlscale.data.sources.tables import Ints, LabelledTable, Role, label_numbers
from tlscale.errors import DataError


def number_files(stamps: Sequence[Ints]) -> list[Ints] | None:
    """Return for each split the number of the file of each row, equal for equal files over all splits.

    Args:
        stamps: (N, 5) for each split, the `content.file_stamp` of each row.

    Returns:
        None where the file system numbers no files.
    """
    # Device, inode, size and time of the last write identify a file, whatever its name is.
    all_M4 = np.concatenate(stamps)[:, :4]
    if not len(all_M4) or (all_M4[:, 1] == 0).any():
        return None
    _, numbers_M = np.unique(all_M4, axis=0, return_inverse=True)
    return np.split(numbers_M.reshape(-1).astype(np.int64), np.cumsum([len(part) for part in stamps])[:-1])


def check_files(
    tables: Mapping[Role, LabelledTable],
    files: Mapping[Role, Ints | None],
    good: Mapping[Role, Ints],
    classes: Sequence[str],
    place: str,
    *,
    pooled: bool = False,
) -> list[str]:
    """Return notes on files that several rows name.

    Args:
        good: rows that are not left out; the notes are on these.
        pooled: images of train and validation are dealt out anew, so that files of both are in no two splits.

    Raises:
        DataError: one file has two labels.
    """
    numbered = {role: numbers_N for role, numbers_N in files.items() if numbers_N is not None and role in tables}
    if not numbered:
        return []
    files_M = np.concatenate(list(numbered.values()))
    labels_M = label_numbers(np.concatenate([tables[role].labels_N for role in numbered]))
    order_M = np.lexsort((labels_M, files_M))
    same_M = files_M[order_M][1:] == files_M[order_M][:-1]
    clash = np.flatnonzero(same_M & (labels_M[order_M][1:] != labels_M[order_M][:-1]))
    if len(clash):
        rows = [(role, row) for role in numbered for row in range(len(numbered[role]))]
        pair = [rows[order_M[clash[0] + step]] for step in (0, 1)]
        both = " and ".join(f"{tables[role].where(row)} is {tables[role].label(row, classes)!r}" for role, row in pair)
        raise DataError(
            f"{place}: {len(clash):,} file{'s have' if len(clash) > 1 else ' has'} two labels: {both}",
            remedy="Keep the row (or the link) that is right",
        )
    return _notes(tables, {role: numbers_N[good[role]] for role, numbers_N in numbered.items()}, good, pooled=pooled)


def _notes(
    tables: Mapping[Role, LabelledTable], numbered: Mapping[Role, Ints], good: Mapping[Role, Ints], *, pooled: bool
) -> list[str]:
    """Return notes on files that several rows of a split name, and on those that two splits share."""
    notes = []
    for role, files_N in numbered.items():
        count = len(files_N) - len(np.unique(files_N))
        if count:
            notes.append(
                f"{role}: {count:,} rows name a file that another row names too; rows of one file are never divided"
            )
    for one, other in combinations(numbered, 2):
        shared = np.intersect1d(numbered[one], numbered[other])
        if len(shared) and not (pooled and {one, other} == {"train", "validation"}):
            row = int(good[other][np.flatnonzero(numbered[other] == shared[0])[0]])
            notes.append(
                f"LEAK: rows name {len(shared):,} file{'s' * (len(shared) > 1)} in both {one} and {other}, such as "
                f"{tables[other].where(row)}: figures on {other} are too good"
            )
    return notes
