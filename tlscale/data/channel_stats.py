"""Measure mean and deviation of each channel, which no network knows of images that are neither grey nor RGB.

Promise: they depend on the training split as the source holds it, as what stands for the size of all images, and not on
the seed, a limit or a hold-out: all runs on one data set see their images in the same way.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tlscale.data.decode import Reading, decode_image
from tlscale.data.input_spec import sampled_rows
from tlscale.data.sources.tables import LabelledTable
from tlscale.data.workers import map_in_threads
from tlscale.errors import DataError
from tlscale.recipe.schema import DataSection

_DIGITS = 4  # as such figures are given; so that no order of summation shows in them
_LEAST_STD = 1e-4


def channel_stats(
    table: LabelledTable, section: DataSection, in_chans: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation of each channel, 0..1, over images evenly spaced over the table.

    Each image counts the same, whatever its size; one that cannot be read does not count.

    Raises:
        DataError: none of them can be read.
    """
    reading = Reading.of(section)
    max_pixels = round(section.max_megapixels * 1e6)

    def moments(row: int) -> npt.NDArray[np.float64] | DataError:
        try:
            where = table.where(row)
            pixels_HWC = decode_image(
                table.read(row), in_chans=in_chans, max_pixels=max_pixels, where=where, reading=reading
            )
        except DataError as error:
            return error
        shares_HWC = pixels_HWC.astype(np.float64) / (255 if reading.value_range is None else 1)
        return np.stack([shares_HWC.mean((0, 1)), (shares_HWC**2).mean((0, 1))])

    found = list(map_in_threads(moments, sampled_rows(table)))
    known = [one for one in found if not isinstance(one, DataError)]
    if not known:
        raise DataError(f"none of {len(found)} training images can be read; the first: {found[0]}")
    mean_C, square_C = np.mean(known, axis=0)
    std_C = np.sqrt(np.maximum(square_C - mean_C**2, _LEAST_STD**2))
    return tuple(np.round(mean_C, _DIGITS).tolist()), tuple(np.round(std_C, _DIGITS).tolist())
