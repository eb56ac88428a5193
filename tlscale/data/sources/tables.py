"""The types that every source gives: images by row, and labels with them.

Promise: a table is cheap to hold and to send to another process (Arrow and NumPy buffers, no Python object an image),
and can always report where a person finds one of its images.

Readers give a `Source`: the splits as they are stored, with labels as text. `splits` turns that into class numbers.
A store (`stores`) reads the images of one split; a new kind of store is one class there.

Shape letters: N rows of a table or images of a split, C classes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tlscale.data.content import ContentIndex, Contents, Digests
from tlscale.data.sources.split_names import Role as Role
from tlscale.data.workers import map_in_threads
from tlscale.distributed.signals import check_stop
from tlscale.tracking.progress import Pace

Ints = npt.NDArray[np.int64]
Labels = npt.NDArray[Any]
"""What each row is: the number of its class, int64 (N,); of several labels which classes it has, bool (N, C)."""
GroupNames: TypeAlias = pa.LargeStringArray
"""The name of the group of each row; null of an image that is a group of its own."""
Raw = bytes | npt.NDArray[Any]
NO_LABEL = -1
JOINER = "|"
"""Between several labels of an image, in text."""


class RawStore(Protocol):
    """Images by row."""

    @property
    def content(self) -> str:
        """A cheap identity of the images: equal images give equal text; changed images give other text."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> Raw:
        """Return encoded bytes, or decoded uint8 pixels; raise `DataError` where there is nothing to be read."""

    def where(self, row: int) -> str:
        """Return the place of the image, for messages."""

    def file_of(self, row: int) -> Path | None:
        """Return the file that holds this image and nothing else; None where there is none."""

    def places(self, rows_N: Ints) -> list[str]:
        """Return what stands for each image while its content is not known: its name, and its size if known."""

    def stamps(self, rows_N: Ints) -> list[bytes | None] | None:
        """Return what the index of contents knows each image by; None where all images are in memory anyway."""


def number_groups(groups_N: GroupNames) -> Ints:
    """Return the number of the group of each row, from 0; rows without one have a number each."""
    encoded = groups_N.dictionary_encode()
    numbers_N: Ints = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    alone_M = np.flatnonzero(numbers_N < 0)
    numbers_N = numbers_N.copy()
    numbers_N[alone_M] = len(encoded.dictionary) + np.arange(len(alone_M))
    return numbers_N


def has_several(labels_N: Labels) -> bool:
    """Report whether these are several labels an image."""
    return labels_N.ndim == 2


def label_numbers(labels_N: Labels) -> Ints:
    """Return a number for each image, equal for equal labels: the class, or of several labels one of the whole set."""
    if not has_several(labels_N):
        return labels_N
    numbers_N: Ints = np.unique(labels_N, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)
    return numbers_N


def label_text(label: Any, names: Sequence[str]) -> str:  # noqa: ANN401 (a number, or a row of booleans)
    """Return the label of one image as text; several are joined by `joined_labels`."""
    return names[label] if np.ndim(label) == 0 else joined_labels(names[i] for i in np.flatnonzero(label).tolist())


def joined_labels(labels: Iterable[str]) -> str:
    """Join labels so that they can be told apart again: a bar in a name has a backslash before it."""
    return JOINER.join(label.replace("\\", "\\\\").replace(JOINER, f"\\{JOINER}") for label in labels)


def class_counts(labels_N: Labels, num_classes: int) -> Ints:
    """Return the number of images of each class, (C,)."""
    if has_several(labels_N):
        return np.asarray(labels_N.sum(axis=0), dtype=np.int64)
    return np.bincount(labels_N, minlength=num_classes).astype(np.int64)


@dataclass(frozen=True, eq=False)
class LabelledTable:
    """A whole split as the source holds it, with class numbers."""

    store: RawStore
    labels_N: Labels
    """Class numbers by row; of several labels a row of booleans each."""
    groups_N: GroupNames | None = None
    """None: the recipe names no groups."""

    @cached_property
    def _contents(self) -> Contents:
        return Contents(len(self))

    def __len__(self) -> int:
        return len(self.labels_N)

    def label(self, row: int, classes: Sequence[str]) -> str:
        """Return the label of an image, for messages; several are joined."""
        return label_text(self.labels_N[row], classes)

    def read(self, row: int) -> Raw:
        """Return encoded bytes, or decoded uint8 pixels; raise `DataError` where there is nothing to be read."""
        raw = self.store.read(row)
        if not self._contents.read_N[row]:
            self._contents.note(row, raw)
        return raw

    def read_hashed(self, row: int) -> tuple[Raw, bytes]:
        """Return what `read` gives, and its digest."""
        raw = self.store.read(row)
        return raw, self._contents.note(row, raw)

    def places(self, rows_N: Ints) -> list[str]:
        return self.store.places(rows_N)

    def known_digests(self, rows_N: Ints) -> tuple[Digests, npt.NDArray[np.bool_]]:
        """Return the digests of images that were read, now or by an earlier run, and which of them are known."""
        contents = self._contents
        unknown = rows_N[~contents.known_N[rows_N]]
        if len(unknown):
            stamps = self.store.stamps(unknown)
            if stamps is None:
                for row in unknown.tolist():
                    check_stop("hashing images")
                    self.read(row)
            else:
                contents.recall(unknown, stamps, ContentIndex())
        return self.noted_digests(rows_N)

    def noted_digests(self, rows_N: Ints) -> tuple[Digests, npt.NDArray[np.bool_]]:
        """Return the digests of images as far as they are known here, and which are."""
        return self._contents.digests_N[rows_N], self._contents.known_N[rows_N]

    def take_digests(self, rows_N: Ints, digests_N: Digests) -> None:
        """Take digests that another process read."""
        self._contents.take(rows_N, digests_N)

    def remember(self) -> None:
        """Give the index of contents what was read."""
        rows = self._contents.unsaved()
        stamps = self.store.stamps(rows) if len(rows) else None
        if stamps is not None:
            self._contents.remember(rows, stamps, ContentIndex())

    def where(self, row: int) -> str:
        return self.store.where(row)

    def file_of(self, row: int) -> Path | None:
        return self.store.file_of(row)


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """The rows of a table that belong to one split; `i` below is a position, 0 <= i < len(split)."""

    name: Role
    table: LabelledTable
    rows_N: Ints
    """Rows of the table, ascending."""

    @cached_property
    def labels_N(self) -> Labels:  # noqa: N802
        """Class numbers by position; of several labels a row of booleans each."""
        return self.table.labels_N[self.rows_N]

    @cached_property
    def groups_N(self) -> GroupNames | None:  # noqa: N802
        """Names of the groups by position; None where the recipe names no groups."""
        groups_N = self.table.groups_N
        return None if groups_N is None else groups_N.take(pa.array(self.rows_N))

    def __len__(self) -> int:
        return len(self.rows_N)

    def read(self, i: int) -> Raw:
        """Return encoded bytes, or decoded uint8 pixels; raise `DataError` where there is nothing to be read."""
        return self.table.read(int(self.rows_N[i]))

    def read_hashed(self, i: int) -> tuple[Raw, bytes]:
        """Return what `read` gives, and its digest."""
        return self.table.read_hashed(int(self.rows_N[i]))

    def where(self, i: int) -> str:
        """Return the place of the image, for messages."""
        return self.table.where(int(self.rows_N[i]))

    def file_of(self, i: int) -> Path | None:
        """Return the file that holds this image and nothing else; None where there is none."""
        return self.table.file_of(int(self.rows_N[i]))

    def places(self) -> list[str]:
        """Return what stands for each image while its content is not known."""
        return self.table.places(self.rows_N)

    def noted_digests(self) -> tuple[Digests, npt.NDArray[np.bool_]]:
        """Return the digests of the images as far as they are known here, and which are."""
        return self.table.noted_digests(self.rows_N)

    def known_digests(self) -> tuple[Digests, npt.NDArray[np.bool_]]:
        """Return the digests of the images that were read, now or by an earlier run, and which of them are known."""
        return self.table.known_digests(self.rows_N)

    def digests(self, wanted_N: npt.NDArray[np.bool_] | None = None) -> Digests:
        """Return the digests of all images, or at least of those that are wanted; what is not known is read.

        Raises:
            DataError: an image cannot be read.
        """
        unread_N = ~self.known_digests()[1]
        unread = np.flatnonzero(unread_N if wanted_N is None else unread_N & wanted_N).tolist()
        pace = Pace(len(unread), f"hashing {self.name}")
        try:
            for _ in map_in_threads(self.read, unread, "hashing images"):
                pace.add(1)
        finally:
            self.table.remember()  # what was read before a stop as well
        return self.noted_digests()[0]

    def without(self, positions: Collection[int]) -> ImageSplit:
        """Return the same split without these positions, such as those of bad images."""
        kept_N = np.ones(len(self), dtype=bool)
        kept_N[np.fromiter(positions, dtype=np.int64, count=len(positions))] = False
        return ImageSplit(self.name, self.table, self.rows_N[kept_N])


@dataclass(frozen=True, eq=False)
class SourceSplit:
    """One split as it is stored, before anything is chosen from it."""

    name: str
    """Its name in the source."""
    store: RawStore
    label_names: tuple[str, ...]
    """Label texts; not all of them need occur."""
    label_ids_N: Labels
    """Places in `label_names`, by row; `NO_LABEL` where the source withholds the label. Of several labels which of
    `label_names` each row has, bool (N, K)."""
    files_N: Ints | None = None
    """Number of the file of each row, equal for equal files of all splits; None: each row is a file of its own."""
    groups_N: GroupNames | None = None
    """None: the recipe names no groups."""

    def used_names(self) -> list[str]:
        """Return the label texts that occur, in the order of `label_names`."""
        return list(self.counts())

    def counts(self) -> dict[str, int]:
        """Return the number of images of each label text that occurs, in the order of `label_names`."""
        ids_N = self.label_ids_N[~self.unlabelled_N]
        counts_C = class_counts(ids_N, len(self.label_names)).tolist()
        return {name: count for name, count in zip(self.label_names, counts_C, strict=True) if count}

    @property
    def unlabelled_N(self) -> npt.NDArray[np.bool_]:  # noqa: N802
        """Tell which rows have no label because the source withholds it; one of several labels may have none."""
        ids_N = self.label_ids_N
        return np.zeros(len(ids_N), dtype=bool) if has_several(ids_N) else ids_N == NO_LABEL


@dataclass(frozen=True)
class Source:
    """All that a reader found."""

    place: str
    """Where it was found: a folder, a file, or a name on the hub."""
    splits: Mapping[Role, SourceSplit]
    declared_classes: tuple[str, ...] | None = None
    """Class names in order, where the source itself fixes them."""
    identity: Mapping[str, object] = field(default_factory=dict)
    """What identifies the data beyond their content: a commit, checksums."""
    notes: tuple[str, ...] = ()
    is_sample: bool = False
