"""Find what an image has to be read by that is not of 8 bits and one or three channels: its own channels and numbers.

Promise: what is written is what `decode_image` then reads the same images by; images that do not go with the others are
named with a reason.

Shape letters: H height, W width, C channels.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from tlscale.data.decode import FORMATS, Raw, Reading, numbers_of
from tlscale.data.formats.arrays import NPY_START, read_npy
from tlscale.data.formats.dicom import bits_stored, is_dicom
from tlscale.data.formats.few_bits import grey_bits
from tlscale.data.formats.tiff import UNREAD_TIFF, is_tiff
from tlscale.data.formats.unread import Reason
from tlscale.errors import DataError, counted

OTHER_NUMBERS = frozenset(("another array", "other numbers", UNREAD_TIFF))
"""Kinds of reasons why an image is not read as 8 bits, though it may be sound."""
_MOST_CHANNELS = 64  # of `backbone.in_chans`
_BITS_16 = 65_535
_MOST_LOOKED_AT = 64_000_000  # pixels
_FLOAT = "-bit floating point"
_LEAST_OF_16 = _BITS_16 / 2
"""Grey of 16 bits that reaches no further is mostly of 10, 12 or 14 bits, and nearly black on the scale of 16."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What the numbers of one image are."""

    shape: tuple[int, int, int]
    """H x W x C, or C x H x W of an array that has its channels first."""
    low: float
    high: float
    dtype: str
    is_array: bool = False
    is_grey_16: bool = False
    """Whether it can be read without a range as well: as grey of 16 bits."""

    @property
    def is_8_bit(self) -> bool:
        """Whether it takes no range."""
        return self.dtype == "uint8"

    @property
    def looks_channels_first(self) -> bool:
        """Whether the first side is so short, and the last one so long, that it counts channels."""
        first, second, last = self.shape
        return self.is_array and first <= _MOST_CHANNELS and first < min(second, last)


def stored_numbers(raw: Raw, max_pixels: int, *, is_grey_16: bool = False) -> Stored | None:
    """Read the numbers of an image as they are stored; None where they cannot be told, or are no finite numbers."""
    try:
        numbers = numbers_of(raw, None, max_pixels, Reading((0.0, 0.0)))
        low, high = float(numbers.min()), float(numbers.max())
        if isinstance(raw, bytes) and (is_dicom(raw) or is_tiff(raw)):
            # Where white is the lowest number they were turned round, about the middle of the range.
            turned = numbers_of(raw, None, max_pixels, Reading((0.0, 1.0)))
            low, high = (-high, -low) if float(turned.max()) != high else (low, high)
    except Exception:  # what is wrong with it is told by who reads it as an image
        return None
    if not (math.isfinite(low) and math.isfinite(high)) or numbers.ndim != 3:
        return None
    rows, columns, channels = numbers.shape
    is_array = isinstance(raw, np.ndarray) or (isinstance(raw, bytes) and raw.startswith(NPY_START))
    return Stored((rows, columns, channels), low, high, str(numbers.dtype), is_array, is_grey_16)


def is_wide_grey(raw: Any) -> bool:  # noqa: ANN401 (bytes or an array)
    """Return whether Pillow reads more than 8 bits of grey in it; nothing is decoded."""
    if not isinstance(raw, bytes):
        return False
    try:
        return Image.open(io.BytesIO(raw), formats=FORMATS).mode.startswith("I")
    except Exception:  # what Pillow does not read it does not read as grey
        return False


def bits_of(raw: Any) -> str:  # noqa: ANN401 (bytes or an array)
    """Return in how many bits the numbers of an image are stored, in words."""
    try:
        if isinstance(raw, bytes) and raw.startswith(NPY_START):
            raw = read_npy(raw)
        if isinstance(raw, np.ndarray):
            return f"{8 * raw.dtype.itemsize}{_FLOAT if raw.dtype.kind == 'f' else ' bits'}"
        if is_dicom(raw):
            return f"{bits_stored(raw)} bits"
        mode = Image.open(io.BytesIO(raw), formats=FORMATS).mode
        if mode in ("1", "L"):
            return counted(grey_bits(raw), "bit")
    except Exception:  # of many bands, say
        stored = stored_numbers(raw, _MOST_LOOKED_AT)
        return "not known" if stored is None else bits_of(np.zeros(0, stored.dtype))
    return {"F": f"32{_FLOAT}", "I": "16 bits"}.get(mode, "16 bits" if mode.startswith("I;16") else "8 bits")


@dataclass(frozen=True)
class Numbers:
    """What all images of a data set are read by."""

    keys: dict[str, Any]
    """Of the recipe's section `data`."""
    in_chans: int | None
    """None: grey or RGB."""
    about: tuple[str, ...]
    """What was found, and what follows from it, in lines of text."""

    def hw_of(self, stored: Stored) -> tuple[int, int]:
        """Return height and width."""
        first, second, last = stored.shape
        return (second, last) if self._is_first(stored) else (first, second)

    def why_not(self, stored: Stored) -> Reason | None:
        """Return why an image does not go with the others; None if it does."""
        count = stored.shape[0 if self._is_first(stored) else 2]
        wanted = self.in_chans or 3
        if count == wanted or {count, wanted} == {1, 3}:
            return None
        return Reason(f"it has {count} channels, and most have {wanted}", "other channels")

    def _is_first(self, stored: Stored) -> bool:
        return stored.is_array and bool(self.keys.get("channels_first"))


def numbers_for(stored: Sequence[Stored], num_plain: int, of_training: Sequence[Stored]) -> Numbers | None:
    """Choose the keys that read images of other numbers or channels; None where 8 bits of grey or RGB read all.

    Args:
        stored: of all images that are not plainly of 8 bits.
        num_plain: how many images are.
        of_training: of these the images to train on, which give the range.
    """
    if not stored or num_plain:  # with a range, images of 8 bits would be black
        return None
    if all(one.is_grey_16 for one in stored) and max(one.high for one in stored) > _LEAST_OF_16:
        return None
    arrays = [one for one in stored if one.is_array]
    keys: dict[str, Any] = {}
    if arrays and all(one.looks_channels_first for one in arrays):
        keys["channels_first"] = True
    found = Numbers(keys, None, ())
    counts = Counter(one.shape[0 if found._is_first(one) else 2] for one in stored)
    count = counts.most_common(1)[0][0]
    if count > _MOST_CHANNELS:
        raise DataError(f"images have {count} channels; at most {_MOST_CHANNELS} are read")
    in_chans = None if count in (1, 3) else count
    about = [f"in_chans: images have {count} channels."] if in_chans is not None else []
    about += ["channels_first: the first side of arrays is so short that it counts channels."] if keys else []
    if not all(one.is_8_bit for one in stored):
        keys["range"], line = _range_of(of_training or stored)
        about.append(line)
    return Numbers(keys, in_chans, tuple(about))


def _range_of(stored: Sequence[Stored]) -> tuple[list[float], str]:
    """Return the numbers that become 0 and 1, and how they were found."""
    low, high = min(one.low for one in stored), max(one.high for one in stored)
    types = "/".join(sorted({one.dtype for one in stored}))
    found = f"range: the numbers ({types}) of the training images go from {low:g} to {high:g}"
    is_whole = all(one.dtype.startswith(("u", "i")) for one in stored) and low >= 0 and high > 0
    if is_whole and high <= _BITS_16:
        bits = max(int(high).bit_length(), 8)
        return [0, 2**bits - 1], f"{found}, which takes {bits} bits; what is beyond the range is clipped."
    high = high if high > low else low + 1
    return [low, high], f"{found}; what is beyond is clipped. Write wider ones where new images may have them."
