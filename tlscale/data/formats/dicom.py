"""Read DICOM by pydicom (the extra `dicom`): numbers by slope and intercept, or 8 bits by the window of the file.

Promise: what is black in a viewer is 0, also where the file stores it as the highest number (MONOCHROME1); what no
window and no range tells apart from white is not guessed; one file is one image.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tlscale.data.formats.arrays import Array
from tlscale.data.formats.unread import UnreadError

READS_DICOM = importlib.util.find_spec("pydicom") is not None  # the extra `dicom`
_START, _AT = b"DICM", 128
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")


def is_dicom(raw: bytes) -> bool:
    """Return whether these bytes begin as a DICOM file."""
    return raw[_AT : _AT + len(_START)] == _START


def dicom_size(file: BinaryIO) -> tuple[int, int]:
    """Return height and width; no pixels are read."""
    import pydicom

    tags = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=["Rows", "Columns"])
    return int(tags.Rows), int(tags.Columns)


def bits_stored(raw: bytes) -> int:
    """Return in how many bits a pixel is stored."""
    import pydicom

    return int(pydicom.dcmread(io.BytesIO(raw), stop_before_pixels=True, specific_tags=["BitsStored"]).BitsStored)


def read_dicom(
    raw: bytes, check_size: Callable[[int, int], None], value_range: tuple[float, float] | None = None
) -> Array:
    """Read an image, H x W x C.

    Args:
        check_size: called with width and height before anything is decoded.
        value_range: the numbers that become 0 and 1, after slope and intercept; these are returned then, those of
            MONOCHROME1 turned round in the range. None: uint8 by the window of the file.

    Raises:
        UnreadError: several frames, packed by what is not installed, or no telling which number is white.
    """
    import pydicom

    tags = pydicom.dcmread(io.BytesIO(raw))
    kind = _kind_of(tags)
    check_size(int(tags.Columns), int(tags.Rows))
    numbers = _unpacked(tags)
    if kind in _COLOUR:
        if numbers.dtype != np.uint8:
            raise UnreadError(f"a DICOM of colours of {numbers.dtype}", "Save it as 8 bits")
        return numbers
    is_inverted = kind == "MONOCHROME1"
    numbers_HW = _rescaled(numbers, tags)
    if value_range is None:
        numbers_HW = _windowed(numbers_HW, tags)
    if is_inverted:
        black, white = (0, 255) if value_range is None else map(float, value_range)
        numbers_HW = np.where(_is_padding(numbers, tags), black, black + white - numbers_HW)
    return (numbers_HW.astype(np.uint8) if value_range is None else numbers_HW)[:, :, None]


def _kind_of(tags: Any) -> str:  # noqa: ANN401 (pydicom's)
    """Return how the pixels are to be read."""
    if "PixelData" not in tags:
        raise UnreadError("a DICOM without an image")
    frames = int(tags.get("NumberOfFrames") or 1)
    if frames > 1:
        remedy = "Save each frame (slice, moment) that is to have a label as a file of its own, as .npy, say"
        raise UnreadError(f"a DICOM of {frames:,} frames", remedy, kind="several frames")
    kind = str(tags.get("PhotometricInterpretation", ""))
    if kind not in (*_GREY, *_COLOUR):
        raise UnreadError(f"a DICOM of the kind {kind or 'unknown'}", "Save it as PNG")
    return kind


def _unpacked(tags: Any) -> Array:  # noqa: ANN401
    from pydicom.pixels.utils import pixel_array

    try:
        return np.asarray(pixel_array(tags))  # YBR becomes RGB
    except (RuntimeError, NotImplementedError, ImportError) as error:
        name = getattr(tags.file_meta.get("TransferSyntaxUID"), "name", "unknown")
        remedy = "Unpack it (dcmdjpeg, gdcmconv --raw), or install what pydicom names"
        problem = f"a DICOM that is packed ({name}): {str(error).splitlines()[0]}"
        raise UnreadError(problem, remedy, kind="packed") from None


def _rescaled(numbers_HW: Array, tags: Any) -> Array:  # noqa: ANN401
    from pydicom.pixels.processing import apply_rescale

    if tags.get("ModalityLUTSequence"):
        return np.asarray(apply_rescale(numbers_HW, tags))
    slope, intercept = _first(tags, "RescaleSlope"), _first(tags, "RescaleIntercept")
    slope, intercept = 1.0 if slope is None else slope, 0.0 if intercept is None else intercept
    return numbers_HW if (slope, intercept) == (1, 0) else numbers_HW.astype(np.float64) * slope + intercept


def _is_padding(numbers_HW: Array, tags: Any) -> npt.NDArray[np.bool_]:  # noqa: ANN401
    """Return where the file says that nothing was seen; such numbers are those that are stored."""
    ends = [_first(tags, name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if ends[0] is None:
        return np.zeros(numbers_HW.shape, bool)
    # As the pixels are: some files have the unsigned form of a negative number.
    stored = [int(np.asarray(int(end)).astype(numbers_HW.dtype)) for end in ends if end is not None]
    return (numbers_HW >= min(stored)) & (numbers_HW <= max(stored))


def _windowed(numbers_HW: Array, tags: Any) -> npt.NDArray[np.uint8]:  # noqa: ANN401
    """Scale numbers to 8 bits by the table or the window that the file brings along, the first if there are several."""
    from pydicom.pixels.processing import apply_voi

    center, width = _first(tags, "WindowCenter"), _first(tags, "WindowWidth")
    if tags.get("VOILUTSequence"):
        table = tags.VOILUTSequence[0]
        shares_HW = apply_voi(numbers_HW, tags) / (2 ** int(table.LUTDescriptor[2]) - 1)
    elif center is not None and width is not None and width > 0:
        shares_HW = _share(numbers_HW.astype(np.float64), center, width, str(tags.get("VOILUTFunction") or "LINEAR"))
    elif numbers_HW.dtype == np.uint8:
        return numbers_HW
    else:
        problem = f"a DICOM of {tags.BitsStored} bits without a window, and no telling which number is white"
        raise UnreadError(problem, "Set data.range: [low, high]", kind="other numbers", of_recipe=True)
    return np.asarray(np.rint(np.clip(shares_HW, 0.0, 1.0) * 255), dtype=np.uint8)


def _first(tags: Any, name: str) -> float | None:  # noqa: ANN401
    """Return a number of the file, the first if there are several; None also of what is there and empty."""
    value = tags.get(name)
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = next(iter(value), None)
    return None if value is None or value == "" else float(value)


def _share(numbers_HW: Array, center: float, width: float, function: str) -> Array:
    """Return 0 at the lower end of the window and 1 at the upper, as DICOM has it (part 3, C.11.2.1.2 and 3)."""
    if function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp(np.minimum(-4 * (numbers_HW - center) / width, 700))))
    if function == "LINEAR_EXACT":
        return (numbers_HW - center) / width + 0.5
    return (numbers_HW - (center - 0.5)) / max(width - 1, 1e-9) + 0.5
