"""Measure mean and deviation of each channel, which no network knows of images that are neither grey nor RGB.

Promise: they are of the images that a run trains on alone. None that is held out, or is in the fold that is scored, has
a part in them, though runs with other hold-outs then see the same image in slightly other ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from tlscale.data.decode import Reading, decode_image
from tlscale.data.input_spec import Measure, sampled_rows
from tlscale.data.sources.tables import ImageSplit
from tlscale.data.workers import map_in_threads
from tlscale.errors import DataError
from tlscale.recipe.schema import DataSection

_DIGITS = 4  # as such figures are given; so that no order of summation shows in them
_LEAST_STD = 1e-4


Began = Mapping[str, Any] | None
"""`input` of `run.json` of a run that began earlier; None: it begins now."""


def channels_of(split: ImageSplit, section: DataSection, in_chans: int, began: Began) -> Measure:
    """Return what measures the channels of training images; a run that began earlier keeps what it measured then."""
    if began is not None and {"mean", "std"} <= began.keys():
        return lambda: (tuple(began["mean"]), tuple(began["std"]))
    return partial(channel_stats, split, section, in_chans)


def channel_stats(
    split: ImageSplit, section: DataSection, in_chans: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation of each channel, 0..1, over images evenly spaced over the training split.

    Each image counts the same, whatever its size; one that cannot be read does not count.

    Raises:
        DataError: none of them can be read.
    """
    reading = Reading.of(section)
    max_pixels = round(section.max_megapixels * 1e6)

    def moments(i: int) -> npt.NDArray[np.float64] | DataError:
        try:
            where = split.where(i)
            pixels_HWC = decode_image(
                split.read(i), in_chans=in_chans, max_pixels=max_pixels, where=where, reading=reading
            )
        except DataError as error:
            return error
        shares_HWC = pixels_HWC.astype(np.float64) / (255 if reading.value_range is None else 1)
        return np.stack([shares_HWC.mean((0, 1)), (shares_HWC**2).mean((0, 1))])

    found = list(map_in_threads(moments, sampled_rows(split)))
    known = [one for one in found if not isinstance(one, DataError)]
    if not known:
        raise DataError(f"none of {len(found)} training images can be read; the first: {found[0]}")
    mean_C, square_C = np.mean(known, axis=0)
    std_C = np.sqrt(np.maximum(square_C - mean_C**2, _LEAST_STD**2))
    return tuple(np.round(mean_C, _DIGITS).tolist()), tuple(np.round(std_C, _DIGITS).tolist())
