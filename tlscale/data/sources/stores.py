"""Stores: the images of one split, by row, as files, as cells of a table in memory, or as one array.

Promise: a store holds buffers and no image objects; an image that cannot be read is a `BadImageError` with its place.

Shape letters: N rows, H height, W width, 5 the numbers of a `file_stamp`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tlscale.data.content import stamp_bytes
from tlscale.data.decode import BadImageError
from tlscale.data.sources.tables import Ints
from tlscale.errors import irregular_mode, one_line

MOST_FILE_BYTES = 2 << 30
"""A larger file is no image of a size that is read, and reading it would fill the memory."""


def read_image_file(path: Path, where: str) -> bytes:
    """Read a regular file.

    Args:
        where: its place, for messages.

    Raises:
        BadImageError: it is not there, no regular file (reading a pipe waits for ever), or too large for an image.
    """
    try:
        found = path.stat()
        if (what := irregular_mode(found.st_mode)) is not None:
            raise BadImageError.at(where, what, None)
        if found.st_size > MOST_FILE_BYTES:
            size = f"a file of {found.st_size / 2**30:,.1f} GiB"
            raise BadImageError.at(where, f"{size} is no image; the most is {MOST_FILE_BYTES >> 30}", None)
        return path.read_bytes()
    except (OSError, ValueError) as error:  # a name with a zero in it
        why = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        raise BadImageError.at(where, why, None) from None


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
        return [stamp_bytes(stats, self.looked_ns) for stats in self.stats_N5[rows_N].tolist()]

    def where(self, row: int) -> str:
        return one_line(self.file_of(row))

    def file_of(self, row: int) -> Path:
        return Path(self.root, self.paths_N[row].as_py())

    def read(self, row: int) -> bytes:
        return read_image_file(self.file_of(row), self.where(row))


class _InMemory:
    """What is in memory already: no image is a file of its own, and an index could save nothing."""

    def stamps(self, rows_N: Ints) -> None:
        return None

    def file_of(self, row: int) -> None:
        return None


@dataclass(frozen=True, eq=False)
class BytesStore(_InMemory):
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

    def where(self, row: int) -> str:
        return f"{self.file} row {self.rows_N[row]}"

    def read(self, row: int) -> bytes:
        raw: bytes = self.images[int(self.rows_N[row])].as_py()
        return raw


@dataclass(frozen=True, eq=False)
class ArrayStore(_InMemory):
    """Decoded grey images of one size, as in an IDX file."""

    file: str
    images_NHW: npt.NDArray[np.uint8]
    content: str

    def __len__(self) -> int:
        return len(self.images_NHW)

    def places(self, rows_N: Ints) -> list[str]:
        return [str(row) for row in rows_N.tolist()]

    def where(self, row: int) -> str:
        return f"{self.file} image {row}"

    def read(self, row: int) -> npt.NDArray[np.uint8]:
        pixels: npt.NDArray[np.uint8] = self.images_NHW[row]
        return pixels
