"""Find out how large the images of a data set are, from the headers of a few of them.

Promise: the answer depends on the training split as the source holds it, not on the seed, a limit, a hold-out or what
is skipped, so that all runs on one data set see their images in the same way.
"""

from __future__ import annotations

import io
import statistics

import numpy as np

from tlscale.data.decode import BadImageError, header_hw
from tlscale.data.sources.tables import LabelledTable
from tlscale.errors import DataError

MOST_HEADERS = 256


def sampled_sizes(table: LabelledTable) -> list[tuple[int, int]]:
    """Return height and width of at most `MOST_HEADERS` images, evenly spaced over the table.

    An image whose header cannot be read does not count: it is for those who decode it to find it bad.

    Raises:
        DataError: none of the headers can be read.
    """
    rows = np.unique(np.linspace(0, len(table) - 1, min(MOST_HEADERS, len(table))).round().astype(np.int64)).tolist()
    sizes: list[tuple[int, int]] = []
    errors: list[DataError] = []
    for row in rows:
        try:
            sizes.append(_size(table, row))
        except DataError as error:
            errors.append(error)
    if not sizes:
        raise DataError(f"none of {len(rows)} training images can be read; the first: {errors[0]}")
    return sizes


def median_side_px(sizes: list[tuple[int, int]]) -> int:
    """Return the median of the shorter sides."""
    return statistics.median_low([min(size) for size in sizes])


def _size(table: LabelledTable, row: int) -> tuple[int, int]:
    where, path = table.where(row), table.file_of(row)
    if path is not None:
        try:
            with path.open("rb") as file:  # a header is a small part of a photo
                return header_hw(file, where)
        except OSError as error:
            raise BadImageError(f"{where}: cannot be read: {error.strerror or error}") from None
    raw = table.read(row)
    return raw.shape[:2] if isinstance(raw, np.ndarray) else header_hw(io.BytesIO(raw), where)
