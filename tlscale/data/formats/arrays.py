"""Read arrays of NumPy, from `.npy` files or as they are, as height x width x channels.

Promise: nothing is unpickled, no number is converted, and a file that holds fewer or more bytes than its header says is
damaged.
"""

from __future__ import annotations

import io
import math
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tlscale.data.formats.unread import OtherChannelsError, UnreadError

NPY_START = b"\x93NUMPY"
Array = npt.NDArray[Any]
Shape = tuple[int, ...]
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npy(raw: bytes) -> Array:
    """Read a `.npy` file as the array that it holds, without a copy.

    Raises:
        UnreadError: it is damaged, or holds anything but numbers.
    """
    file = io.BytesIO(raw)
    shape, is_fortran, dtype = _header(file)
    found, expected = len(raw) - file.tell(), math.prod(shape) * dtype.itemsize
    if found != expected:
        problem = f"the array is damaged or cut short: {found:,} bytes of numbers, where it has {expected:,}"
        raise UnreadError(problem, kind="damaged")
    numbers = np.frombuffer(raw, dtype, offset=file.tell())
    return numbers.reshape(shape, order="F" if is_fortran else "C")


def npy_shape(file: BinaryIO) -> Shape:
    """Return the shape that a `.npy` file's header gives.

    Raises:
        UnreadError: it holds anything but numbers.
    """
    return _header(file)[0]


def _header(file: BinaryIO) -> tuple[Shape, bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise UnreadError(f"an array in version {'.'.join(map(str, version))} of NumPy's format")
    shape, is_fortran, dtype = _HEADERS[version](file)
    if dtype.hasobject:
        raise UnreadError("an array of Python objects, which could run code when it is read", "Save it as numbers")
    return tuple(shape), bool(is_fortran), dtype


def height_width_of(shape: Shape, *, channels_first: bool) -> tuple[int, int]:
    """Return height and width of an image of this shape.

    Raises:
        UnreadError: it is no image's.
    """
    if len(shape) not in (2, 3):
        expected = "C x H x W" if channels_first else "H x W x C"
        raise UnreadError(f"an array of {_words(shape)}, where H x W or {expected} is expected", kind="another array")
    height, width = shape[1:] if channels_first and len(shape) == 3 else shape[:2]
    return height, width


def channels_last(array: Array, *, channels_first: bool) -> Array:
    """Return an array as H x W x C.

    Raises:
        UnreadError: it is no image.
    """
    if array.dtype.kind not in "buif":
        raise UnreadError(f"an array of {array.dtype}, and no numbers of an image")
    height_width_of(array.shape, channels_first=channels_first)
    if array.ndim == 2:
        return array[:, :, None]
    return np.moveaxis(array, 0, 2) if channels_first else array


def wrong_channels(shape: Shape, in_chans: int, channels_first: bool) -> OtherChannelsError:
    """Return the error of an image (H x W x C) with other channels than the backbone takes."""
    count = shape[2]
    many = "1 channel" if count == 1 else f"{count} channels"
    hint = f"Set backbone.in_chans: {count}, if all images have so many"
    if not channels_first and shape[0] == in_chans:
        hint = "If channels come first in arrays, set data.channels_first: true"
    problem = f"it has {many} ({_words(shape)}), and the network takes {in_chans}"
    return OtherChannelsError(problem, hint, kind="other channels", of_recipe=True)


def other_numbers(numbers: Array) -> UnreadError:
    """Return the error of numbers that are not of 8 bits, where there is no range to scale them by."""
    problem = f"numbers of {numbers.dtype} from {numbers.min():g} to {numbers.max():g}, and no telling which is white"
    remedy = "Set data.range: [low, high], the same for all images"
    return UnreadError(problem, remedy, kind="other numbers", of_recipe=True)


def _words(shape: Shape) -> str:
    return " x ".join(map(str, shape)) or "one number"
