"""What every source gives: images by row, and labels beside them.

Promise: a table is cheap to hold and to send to another process (Arrow and NumPy buffers, no Python object an image),
and can always say where a person finds one of its images.

Readers give a `Source`: the splits as they lie, with labels as text. `data.splits` turns that into class numbers.

Shape letters: N rows of a table or images of a split, C classes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tlscale.data.content import ContentIndex, Contents, Digests, stamp_bytes
from tlscale.data.sources.split_names import Role as Role
from tlscale.data.sources.split_names import lookalikes, role_of
from tlscale.data.workers import map_in_threads
from tlscale.errors import DataError, did_you_mean
from tlscale.recipe.schema import DataSection

Ints = npt.NDArray[np.int64]
Raw = bytes | npt.NDArray[Any]
VALIDATION_NAMES = ("validation", "valid", "val")
"""Names of a validation split that are found without being told."""
NO_LABEL = -1
_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")


class ImageStore(Protocol):
    """Images by row."""

    @property
    def content(self) -> str:
        """A cheap identity of the images: equal images give equal text; changed images give other text."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> Raw:
        """Encoded bytes, or decoded uint8 pixels; `DataError` where there is nothing to be read."""

    def where(self, row: int) -> str:
        """The place of the image, for messages."""

    def places(self, rows_N: Ints) -> list[str]:
        """Return what stands for each image while its content is not known: its name, and its size if known."""

    def stamps(self, rows_N: Ints) -> list[bytes | None] | None:
        """Return what the index of contents knows each image by; None where all images are in memory anyway."""


class ImageTable(Protocol):
    """A whole split as the source holds it, with class numbers."""

    @property
    def labels_N(self) -> Ints:  # noqa: N802
        """Class numbers by row."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> Raw:
        """Encoded bytes, or decoded uint8 pixels; `DataError` where there is nothing to be read."""

    def read_hashed(self, row: int) -> tuple[Raw, bytes]:
        """Return what `read` gives, and its digest."""

    def where(self, row: int) -> str:
        """The place of the image, for messages."""

    def places(self, rows_N: Ints) -> list[str]:
        """Return what stands for each image while its content is not known: its name, and its size if known."""

    def noted_digests(self, rows_N: Ints) -> tuple[Digests, npt.NDArray[np.bool_]]:
        """Return the digests of images as far as they are known here, and which are."""

    def known_digests(self, rows_N: Ints) -> tuple[Digests, npt.NDArray[np.bool_]]:
        """Return the digests of images that were read, now or by an earlier run, and which of them are known."""

    def take_digests(self, rows_N: Ints, digests_N: Digests) -> None:
        """Take digests that another process read."""

    def remember(self) -> None:
        """Give the index of contents what was read."""


@dataclass(frozen=True, eq=False)
class LabelledTable:
    """An `ImageTable`: a store, and the class number of each of its rows."""

    store: ImageStore
    labels_N: Ints

    @cached_property
    def _contents(self) -> Contents:
        return Contents(len(self))

    def __len__(self) -> int:
        return len(self.labels_N)

    def read(self, row: int) -> Raw:
        raw = self.store.read(row)
        if not self._contents.read_N[row]:
            self._contents.note(row, raw)
        return raw

    def read_hashed(self, row: int) -> tuple[Raw, bytes]:
        raw = self.store.read(row)
        return raw, self._contents.note(row, raw)

    def places(self, rows_N: Ints) -> list[str]:
        return self.store.places(rows_N)

    def known_digests(self, rows_N: Ints) -> tuple[Digests, npt.NDArray[np.bool_]]:
        contents = self._contents
        unknown = rows_N[~contents.known_N[rows_N]]
        if len(unknown):
            stamps = self.store.stamps(unknown)
            if stamps is None:
                for row in unknown.tolist():
                    self.read(row)
            else:
                contents.recall(unknown, stamps, ContentIndex())
        return self.noted_digests(rows_N)

    def noted_digests(self, rows_N: Ints) -> tuple[Digests, npt.NDArray[np.bool_]]:
        return self._contents.digests_N[rows_N], self._contents.known_N[rows_N]

    def take_digests(self, rows_N: Ints, digests_N: Digests) -> None:
        self._contents.take(rows_N, digests_N)

    def remember(self) -> None:
        rows = self._contents.unsaved()
        stamps = self.store.stamps(rows) if len(rows) else None
        if stamps is not None:
            self._contents.remember(rows, stamps, ContentIndex())

    def where(self, row: int) -> str:
        return self.store.where(row)


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """The rows of a table that belong to one split; `i` below is a position, 0 <= i < len(split)."""

    name: Role
    table: ImageTable
    rows_N: Ints
    """Rows of the table, ascending."""

    @cached_property
    def labels_N(self) -> Ints:  # noqa: N802
        """Class numbers by position."""
        return self.table.labels_N[self.rows_N]

    def __len__(self) -> int:
        return len(self.rows_N)

    def read(self, i: int) -> Raw:
        """Encoded bytes, or decoded uint8 pixels; `DataError` where there is nothing to be read."""
        return self.table.read(int(self.rows_N[i]))

    def read_hashed(self, i: int) -> tuple[Raw, bytes]:
        """Return what `read` gives, and its digest."""
        return self.table.read_hashed(int(self.rows_N[i]))

    def where(self, i: int) -> str:
        """The place of the image, for messages."""
        return self.table.where(int(self.rows_N[i]))

    def places(self) -> list[str]:
        """Return what stands for each image while its content is not known."""
        return self.table.places(self.rows_N)

    def noted_digests(self) -> tuple[Digests, npt.NDArray[np.bool_]]:
        """Return the digests of the images as far as they are known here, and which are."""
        return self.table.noted_digests(self.rows_N)

    def known_digests(self) -> tuple[Digests, npt.NDArray[np.bool_]]:
        """Return the digests of the images that were read, now or by an earlier run, and which of them are known."""
        return self.table.known_digests(self.rows_N)

    def digests(self) -> Digests:
        """Return the digests of all images; what is not known is read.

        Raises:
            DataError: an image cannot be read.
        """
        _, known_N = self.known_digests()
        list(map_in_threads(self.read, np.flatnonzero(~known_N).tolist()))
        self.table.remember()
        return self.known_digests()[0]

    def without(self, positions: Collection[int]) -> ImageSplit:
        """The same split less these positions, such as those of bad images."""
        kept_N = np.ones(len(self), dtype=bool)
        kept_N[np.fromiter(positions, dtype=np.int64, count=len(positions))] = False
        return ImageSplit(self.name, self.table, self.rows_N[kept_N])


class ScoredSection(DataSection):
    """`data` of images that are only scored: none of the usual splits has to be there."""


@dataclass(frozen=True, eq=False)
class SourceSplit:
    """One split as it lies, before anybody chose from it."""

    name: str
    """Its name in the source."""
    store: ImageStore
    label_names: tuple[str, ...]
    """Label texts; not all of them need occur."""
    codes_N: Ints
    """Places in `label_names`, by row; `NO_LABEL` where the source withholds the label."""
    files_N: Ints | None = None
    """Number of the file of each row, equal for equal files of all splits; None: each row is a file of its own."""

    def used_names(self) -> list[str]:
        """The label texts that occur, in the order of `label_names`."""
        used_C = np.unique(self.codes_N[self.codes_N != NO_LABEL])
        return [self.label_names[code] for code in used_C]


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


@dataclass(frozen=True, eq=False)
class FileStore:
    """Image files below a folder (or, with absolute paths, anywhere)."""

    root: str
    paths_N: pa.LargeStringArray
    content: str
    stats_N5: Ints
    """`file_stamp` of each file."""
    looked_ns: int
    """When they were looked up."""

    def __len__(self) -> int:
        return len(self.paths_N)

    def places(self, rows_N: Ints) -> list[str]:
        paths = self.paths_N.take(pa.array(rows_N)).to_pylist()
        return [f"{size} {path}" for size, path in zip(self.stats_N5[rows_N, 2].tolist(), paths, strict=True)]

    def stamps(self, rows_N: Ints) -> list[bytes | None]:
        return [stamp_bytes(facts, self.looked_ns) for facts in self.stats_N5[rows_N].tolist()]

    def where(self, row: int) -> str:
        return str(Path(self.root, self.paths_N[row].as_py()))

    def read(self, row: int) -> bytes:
        try:
            return Path(self.where(row)).read_bytes()
        except OSError as error:
            raise DataError(f"{self.where(row)}: cannot be read: {error.strerror or error}") from None


@dataclass(frozen=True, eq=False)
class BytesStore:
    """Encoded images in some of the rows of an Arrow column of binary (whole, so that splits share it)."""

    file: str
    images: pa.ChunkedArray
    rows_N: Ints
    """Row numbers in the file, and in `images`, from 0."""
    content: str

    def __len__(self) -> int:
        return len(self.rows_N)

    def places(self, rows_N: Ints) -> list[str]:
        return [str(row) for row in self.rows_N[rows_N].tolist()]

    def stamps(self, rows_N: Ints) -> None:
        return None

    def where(self, row: int) -> str:
        return f"{self.file} row {self.rows_N[row]}"

    def read(self, row: int) -> bytes:
        raw: bytes = self.images[int(self.rows_N[row])].as_py()
        return raw


@dataclass(frozen=True, eq=False)
class ArrayStore:
    """Decoded grey images of one size, as in an IDX file."""

    file: str
    images_NHW: npt.NDArray[np.uint8]
    content: str

    def __len__(self) -> int:
        return len(self.images_NHW)

    def places(self, rows_N: Ints) -> list[str]:
        return [str(row) for row in rows_N.tolist()]

    def stamps(self, rows_N: Ints) -> None:
        return None

    def where(self, row: int) -> str:
        return f"{self.file} image {row}"

    def read(self, row: int) -> npt.NDArray[np.uint8]:
        pixels: npt.NDArray[np.uint8] = self.images_NHW[row]
        return pixels


def is_integer(text: str) -> bool:
    """Whether a label is an integer as a computer writes it (`7`, not `007` and not `7.0`)."""
    return _INTEGER.fullmatch(text) is not None


def sort_labels(names: Iterable[str]) -> tuple[str, ...]:
    """Each name once: by number where all of them are integers, else by code point."""
    distinct = set(names)
    return tuple(sorted(distinct, key=int) if all(map(is_integer, distinct)) else sorted(distinct))


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds text, also as a dictionary."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def encode_labels(labels_N: pa.ChunkedArray, where: str) -> tuple[tuple[str, ...], Ints]:
    """Label texts, sorted, and the place of each row's label among them.

    Args:
        labels_N: a column of text, whole numbers, booleans, or a dictionary of such.
        where: the column, for messages.

    Raises:
        DataError: another type, or rows with an empty label.
    """
    if pa.types.is_dictionary(labels_N.type):
        labels_N = labels_N.cast(labels_N.type.value_type)
    kind = labels_N.type
    if not (is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise DataError(f"{where}: labels are of type {kind}; expected text or whole numbers")
    text_N = labels_N.cast(pa.large_string()).combine_chunks()
    empty = len(text_N) - (pc.sum(pc.not_equal(pc.utf8_trim_whitespace(text_N), "")).as_py() or 0)
    if empty:
        raise DataError(f"{where}: {empty:,} of {len(text_N):,} rows have no label; fill them in or take them out")
    encoded = text_N.dictionary_encode()
    texts = encoded.dictionary.to_pylist()
    spaced = [text for text in texts if text != text.strip()]
    if spaced:
        raise DataError(f"{where}: labels with spaces around them: {first_few(quoted(spaced))}; take the spaces out")
    names = sort_labels(texts)
    place = {name: i for i, name in enumerate(names)}
    sorted_C = np.array([place[text] for text in texts], dtype=np.int64)
    return names, sorted_C[encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)]


def pick_splits(
    section: DataSection, available: Sequence[str], where: str, *, any_word: bool = False
) -> dict[Role, str]:
    """Which split of the source plays which role; validation and test may be missing.

    Args:
        any_word: an unused name with a word such as 'test' in it is refused too, not only one that is such a word.

    Raises:
        DataError: a split that the recipe names is not there, one split has two roles, or a split that nothing uses
            is called like a role that nothing plays.
    """
    picked: dict[Role, str] = {}
    if section.train_split in available or not isinstance(section, ScoredSection):
        picked["train"] = _named_split(section.train_split, "train_split", available, where)
    validation = section.validation_split
    if validation is not None and not (isinstance(section, ScoredSection) and validation not in available):
        picked["validation"] = _named_split(validation, "validation_split", available, where)
    else:
        usual = [name for name in VALIDATION_NAMES if name in available and name not in (section.train_split, "test")]
        usual = [name for name in usual if name != section.test_split]
        if len(usual) > 1:
            raise DataError(f"{where} has validation splits {_quoted(usual)}; say which in data.validation_split")
        if usual:
            picked["validation"] = usual[0]
    if section.test_split in available or (section.test_split != "test" and not isinstance(section, ScoredSection)):
        picked["test"] = _named_split(section.test_split, "test_split", available, where)
    for role, name in picked.items():
        twin = next((other for other, its in picked.items() if its == name and other != role), None)
        if twin is not None:
            raise DataError(f"{where}: split {name!r} would be both {role} and {twin}; each needs its own")
    if not picked:
        _named_split(section.train_split, "train_split", available, where)  # which says what there is
    unused = [name for name in available if name not in picked.values()]
    for name, role in lookalikes(unused, picked, any_word=any_word).items():
        raise DataError(
            f"{where}: unknown split {name!r}. Did you mean {role!r}? Name it in the recipe (data.{role}_split: "
            f"{name!r}), or rename it; one that is not to be used must not be called like a split"
        )
    return picked


def _named_split(name: str, key: str, available: Sequence[str], where: str) -> str:
    if name not in available:
        raise DataError(
            f"{where} has no split {name!r} (data.{key}); it has {_quoted(available)}.{did_you_mean(name, available)}"
        )
    return name


def pick_column(given: str | None, usual: Sequence[str], columns: Sequence[str], key: str, where: str) -> str:
    """The column that the recipe names, or the one with a usual name.

    Raises:
        DataError: not there; none or several have a usual name.
    """
    if given is not None:
        if given not in columns:
            raise DataError(
                f"{where} has no column {given!r} (data.{key}); it has {_quoted(columns)}."
                f"{did_you_mean(given, columns)}"
            )
        return given
    found = [column for column in columns if column.strip().lower() in usual]
    if len(found) != 1:
        what = f"columns {_quoted(found)} may all be it" if found else f"no column is called {' or '.join(usual)}"
        raise DataError(f"{where}: {what}; say which in data.{key}. The columns are {_quoted(columns)}")
    return found[0]


def column_note(column: str, values: Collection[str], where: str, remedy: str) -> str:
    """Return the note on a column that names splits, and that nothing reads."""
    shown = first_few(quoted(list(values)))
    held = " and ".join(sorted({str(role_of(value)) for value in values} - {"train"}))
    return (
        f"SPLITS IGNORED: {where}, column {column!r} is not used: it has the values {shown}, but rows of {held} are "
        f"treated like all others. {remedy}"
    )


def digest(parts: Iterable[bytes | str]) -> str:
    """SHA-256, in hex, of parts and their lengths."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()


def first_few(items: Sequence[str], limit: int = 5) -> str:
    """`a, b, c and 7 more`."""
    rest = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {rest:,} more" if rest > 0 else "")


def quoted(names: Sequence[str]) -> list[str]:
    """The names as a message shows them, in quotes and with what cannot be printed escaped."""
    return [repr(name) for name in names]


def _quoted(names: Sequence[str], limit: int = 20) -> str:
    return first_few(quoted(names), limit) if names else "none"
