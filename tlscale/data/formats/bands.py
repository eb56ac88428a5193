"""Read TIFF files of any number of bands and bits by tifffile (the extra `bands`), as they are stored.

Promise: no number is converted, and a file without all of its data is damaged. Of several images in a file the first
series is taken, whose pages may be the bands, unless the file says that they are slices or moments. It is turned as its
Orientation says, as Pillow does with others.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from typing import Any

import numpy as np

from tlscale.data.formats.arrays import Array
from tlscale.data.formats.convert import ORIENTATION_TAG, upright_array
from tlscale.data.formats.few_bits import refuse_wider_range
from tlscale.data.formats.unread import UnreadError

# Axes of tifffile -> of them, S the bands; I are pages, and Q is what nobody gave a name.
_ORDERS = {"YX": "YX", "YXS": "YXS", "SYX": "SYX", "CYX": "SYX", "QYX": "SYX", "IYX": "SYX"}
_WHITE_IS_ZERO = 0
_CUT = "the image is damaged or cut short: parts of it are not there"


def read_bands(
    raw: bytes, check_size: Callable[[int, int], None], value_range: tuple[float, float] | None = None
) -> Array:
    """Read the numbers of a TIFF, H x W x C.

    Args:
        check_size: called with width and height before anything is decoded.
        value_range: what the numbers are scaled by.

    Raises:
        UnreadError: it cannot be read, or tifffile is not installed.
    """
    if importlib.util.find_spec("tifffile") is None:
        raise UnreadError(
            "a TIFF of several bands, or of numbers that Pillow does not read",
            "Install what reads it: pip install 'tlscale[bands]'; or save it as .npy",
        )
    import tifffile

    with tifffile.TiffFile(io.BytesIO(raw)) as file:
        series = file.series[0]
        axes = _ORDERS.get(series.axes)
        if axes is None:
            problem = f"a TIFF with the axes {series.axes} ({series.shape})"
            raise UnreadError(problem, "Save one image a file, or .npy", kind=f"axes {series.axes}")
        sizes = dict(zip(axes, series.shape, strict=True))
        check_size(sizes["X"], sizes["Y"])
        if series.dataoffset is not None and series.dataoffset + series.nbytes > len(raw):  # in one piece
            raise UnreadError(_CUT, kind="damaged")
        for page in series.pages:
            _check_page(page, len(raw))
        refuse_wider_range(min(int(bits) for bits in np.atleast_1d(series.keyframe.bitspersample)), value_range)
        orientation = int(getattr(series.keyframe.tags.get(ORIENTATION_TAG), "value", 1))
        numbers = _unpacked(series)
    if numbers.dtype.kind not in "buif":
        raise UnreadError(f"a TIFF of {numbers.dtype}, and no numbers of an image", "Save it as whole numbers")
    if axes == "YX":
        numbers = numbers[:, :, None]
    return upright_array(np.moveaxis(numbers, 0, 2) if axes == "SYX" else numbers, orientation)


def _unpacked(series: Any) -> Array:  # noqa: ANN401 (tifffile's)
    try:
        return np.asarray(series.asarray())
    except Exception as error:
        if "imagecodecs" not in str(error):
            raise
        name = getattr(series.keyframe.compression, "name", "in a way")
        remedy = "Install what unpacks it: pip install imagecodecs; or save it without, by deflate, or as .npy"
        raise UnreadError(f"a TIFF of several bands that is packed ({name})", remedy) from None


def _check_page(page: object, num_bytes: int) -> None:
    """Check that a page has its data: tifffile reads zeros in place of what is not there."""
    if page is None:
        raise UnreadError("the image is damaged: a page of it is not there", kind="damaged")
    places = zip(page.dataoffsets, page.databytecounts, strict=True)  # type: ignore[attr-defined]
    if any(count <= 0 or offset <= 0 or offset + count > num_bytes for offset, count in places):
        raise UnreadError(_CUT, kind="damaged")
    if int(page.keyframe.photometric) == _WHITE_IS_ZERO:  # type: ignore[attr-defined]
        raise UnreadError("a TIFF of several bands with white as 0", "Save it with black as 0")
