"""Decode the bytes of an image file, or an array, to pixels, height x width x channels: uint8, or float32 in 0..1.

Promise: what cannot be read whole is a `BadImageError` that names the place, never another image and, as far as the
format lets anybody find out, never a part of one. Only the formats below are tried (Pillow would run Ghostscript on an
EPS that calls itself .jpg), and the size in the header is checked before a pixel is decoded.

What is found of data that are cut off, lost or overwritten:
- PNG: everything, by its checksums and the number of its rows.
- JPEG: whatever leaves data over or lacks some, scans and restart markers that are missing (`jpeg`). Not found: damage
  after which the numbers of blocks and of bytes still agree, as after some flipped bits and some short stretches of
  other data; that between restart markers less than 1 KiB apart; and any but a cut where arithmetic coding was used.
- WebP: what is cut off, and stretches of equal bytes where data were (`webp`). Not found: other data in their place,
  and damage to the transparency.
- AVIF, HEIF (with the extra `heif`): what is cut off. Not found: other data in place of theirs.
- GIF, TIFF, BMP, PPM: what is cut off, and what their decoders stumble over. Pixels that are stored as they are can be
  overwritten by anything.

What becomes of what is not plain grey or RGB:
- EXIF orientation is applied; not that of HEIF, whose own turn counts, and is applied.
- Transparent pixels lie over white, also those of palettes and of PNG's colour key.
- 16-bit and 12-bit grey is scaled to 8 bits (Pillow would clip it); 32-bit integers count as 16-bit ones and must lie
  in 0..65535; floating point must lie in 0..1. There is no telling what other ranges mean, so they are bad images.
- 16-bit colour loses its lower 8 bits. A TIFF of a kind that would come out inverted, dark or garbled, or off by more
  than that, is a bad image, and the error describes it (`tiff`).
- CMYK and YCbCr become RGB without a colour profile; of an animation or a multi-page file the first frame is taken.
- One channel is ITU-R 601 luma; three channels from grey are three times the same.
- Arrays (`.npy`) are of uint8. DICOM is scaled to 8 bits by the window that the file has (`dicom`).

That is so without a range of values, for one channel or three. With a range, numbers stay what they are stored as, in
whatever type, until they are scaled to float32: low is 0 and high is 1, and what is beyond is clipped. Grey of 1, 2 and
4 bits is 0 to 1, 3 and 15 then, and a bad image with a range beyond. Any other number of channels is taken from an
array, a TIFF, or an image with so many bands as it is stored; without a range of uint8.

Shape letters: H height, W width, C channels.
"""

from __future__ import annotations

import importlib.util
import io
import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, UnidentifiedImageError, features

from tlscale.data.formats.arrays import (
    NPY_START,
    Array,
    channels_last,
    height_width_of,
    npy_shape,
    other_numbers,
    read_npy,
    wrong_channels,
)
from tlscale.data.formats.bands import read_bands
from tlscale.data.formats.convert import eight_bits, grey_or_rgb, turned, upright
from tlscale.data.formats.dicom import READS_DICOM, dicom_size, is_dicom, read_dicom
from tlscale.data.formats.few_bits import grey_bits, in_few_bits
from tlscale.data.formats.jpeg import DamagedError, load_jpeg
from tlscale.data.formats.others import HEAD_BYTES, other_kind
from tlscale.data.formats.png import PNG_START, fault_of, is_wide_colour, lacks_rows, scaled_key
from tlscale.data.formats.ppm import as_stored, remember_white
from tlscale.data.formats.tiff import UNREAD_TIFF, Meaning, describe, is_tiff, meaning_of, needs_bands, tiff_size
from tlscale.data.formats.unread import OtherChannelsError, Reason, UnreadError
from tlscale.data.formats.webp import has_hole
from tlscale.errors import DataError
from tlscale.recipe.schema import DataSection

READS_HEIF = importlib.util.find_spec("pillow_heif") is not None  # the extra `heif`
if READS_HEIF:
    import pillow_heif

    pillow_heif.register_heif_opener()
FORMATS = (
    *("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"),
    *(("AVIF",) if features.check("avif") else ()),
    *(("HEIF",) if READS_HEIF else ()),
)
"""Pillow's names of the formats that are read here; MPO (phone cameras) comes in as JPEG."""
_NO_IMAGE = f"not an image of the formats {', '.join(FORMATS)}"
DICOMS = frozenset((".dcm", ".dicom"))
"""Endings of DICOM, which are among `EXTENSIONS` where it is read."""
EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp")
    + (".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm")
    + ((".avif",) if "AVIF" in FORMATS else ())
    + ((".heic", ".heif", ".hif") if READS_HEIF else ())
    + (tuple(DICOMS) if READS_DICOM else ())
)
"""File name endings, in small letters, of those formats."""
ARRAYS = frozenset((".npy",))
"""Endings of files that may hold an image, or anything: a folder is searched for them where it has no others."""

LEAVE_OUT = "data.on_bad_image: skip leaves out what cannot be read"
"""What to do about a bad image."""

Pixels = npt.NDArray[Any]
"""uint8; float32 in 0..1 where a range of values is given."""
_MOST_ASPECT = 10_000  # the shorter side of a resized image has some 256 pixels, and its longer side so many times more
_LUMA = np.array([[0.299], [0.587], [0.114]])  # ITU-R 601


class BadImageError(DataError):
    """One image cannot be read, or is too large; the message starts with its place.

    Attributes:
        why: the message without the place.
        image: its split and its position there, where it is of a run's data.
    """

    why = Reason("")
    image: tuple[str, int] | None = None

    @classmethod
    def at(cls, where: str, why: str, remedy: str | None = LEAVE_OUT) -> BadImageError:
        """Return the error of the image at a place."""
        error = cls(f"{where}: {why}", remedy=remedy)
        error.why = why if isinstance(why, Reason) else Reason(why)
        return error


@dataclass(frozen=True, slots=True)
class Reading:
    """What the numbers of images mean."""

    value_range: tuple[float, float] | None = None
    """The numbers that become 0 and 1; None: uint8, by the rules of this file."""
    channels_first: bool = False
    """Arrays are C x H x W, and not H x W x C."""

    @classmethod
    def of(cls, section: DataSection) -> Reading:
        """Return what the recipe says of them."""
        value_range = None if section.range is None else (section.range[0], section.range[1])
        return cls(value_range, section.channels_first)

    @property
    def dtype(self) -> type[np.uint8] | type[np.float32]:
        """The type of pixels."""
        return np.uint8 if self.value_range is None else np.float32


PLAIN = Reading()


def decode_image(raw: Raw, *, in_chans: int | None, max_pixels: int, where: str, reading: Reading = PLAIN) -> Pixels:
    """Decode one image to pixels.

    Args:
        raw: an encoded file; an array, H x W or H x W x C; or an image of Pillow's.
        in_chans: channels wanted; None: as many as it has, but grey may become RGB.
        max_pixels: most height x width that is accepted.
        where: the place of the image, for messages.
        reading: what its numbers mean.

    Returns:
        A new array, H x W x C, C = `in_chans`, of uint8, or with a range of float32 in 0..1.

    Raises:
        BadImageError: not readable as a whole, not of `FORMATS`, too large, or with other channels.
    """
    try:
        if reading.value_range is None and in_chans in (1, 3):
            return grey_or_rgb(_opened(raw, max_pixels, reading), in_chans)
        if reading.value_range is None and in_chans is None:
            return _with_any_channels(raw, max_pixels, reading)
        return _pixels(numbers_of(raw, in_chans, max_pixels, reading), in_chans, reading)
    except OtherChannelsError as error:
        raise BadImageError.at(where, error.reason, None) from None
    except UnreadError as error:
        raise BadImageError.at(where, error.reason) from None
    except Exception as error:  # on hostile bytes Pillow's decoders raise nearly anything
        why = f"the image is damaged or cut short ({type(error).__name__}: {error})"
        raise BadImageError.at(where, Reason(why, "damaged")) from error


def header_hw(file: BinaryIO, where: str, reading: Reading = PLAIN) -> tuple[int, int]:
    """Return height and width from the header of an encoded image; nothing is decoded.

    Raises:
        BadImageError: it has no header that can be read.
    """
    head = file.read(HEAD_BYTES)
    file.seek(0)
    try:
        _refuse_others(head)
        if is_dicom(head):
            return dicom_size(file)
        if head.startswith(NPY_START):
            return height_width_of(npy_shape(file), channels_first=reading.channels_first)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are checked when the image is decoded
            image = Image.open(file, formats=FORMATS)
        return image.height, image.width
    except UnidentifiedImageError:
        if is_tiff(head):  # of many bands, say
            return _tiff_size(file, where)
        raise BadImageError.at(where, _NO_IMAGE) from None
    except UnreadError as error:
        raise BadImageError.at(where, error.reason) from None
    except Exception as error:  # on hostile bytes Pillow's readers raise nearly anything
        why = f"the header cannot be read ({type(error).__name__}: {error})"
        raise BadImageError.at(where, Reason(why, "damaged")) from error


Raw = bytes | npt.NDArray[Any] | Image.Image


def _tiff_size(file: BinaryIO, where: str) -> tuple[int, int]:
    file.seek(0)
    try:
        return tiff_size(file)
    except Exception:  # as above
        raise BadImageError.at(where, _NO_IMAGE) from None


def _opened(raw: Raw, max_pixels: int, reading: Reading) -> Image.Image:
    if isinstance(raw, bytes) and raw.startswith(NPY_START):
        raw = read_npy(raw)
    if isinstance(raw, bytes) and is_dicom(raw):
        _refuse_others(raw[:HEAD_BYTES])
        return _from_array(read_dicom(raw, partial(_check_size, max_pixels=max_pixels)), max_pixels)
    if isinstance(raw, np.ndarray):
        return _from_array(np.moveaxis(raw, 0, 2) if reading.channels_first and raw.ndim == 3 else raw, max_pixels)
    return _from_pillow(raw, max_pixels) if isinstance(raw, Image.Image) else _from_bytes(raw, max_pixels)


def _from_pillow(image: Image.Image, max_pixels: int) -> Image.Image:
    """Take an image of Pillow's as the file that it was read from would be."""
    _check_size(image.width, image.height, max_pixels)
    # A copy: the caller's may be used by other threads, and is left as it is.
    return upright(eight_bits(image.copy(), Meaning()))


def _from_array(pixels: npt.NDArray[Any], max_pixels: int) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        expected = "expected uint8 of H x W, H x W x 1 or H x W x 3"
        problem = f"an array of shape {pixels.shape} and type {pixels.dtype}; {expected}"
        remedy = "Other numbers: set data.range: [low, high]. Other channels: set backbone.in_chans"
        raise UnreadError(problem, remedy, kind="another array", of_recipe=True)
    _check_size(pixels.shape[1], pixels.shape[0], max_pixels)
    return Image.fromarray(pixels)


def _from_bytes(raw: bytes, max_pixels: int) -> Image.Image:
    image, meaning = _decoded(raw, max_pixels)
    return upright(eight_bits(image, meaning))


def _decoded(raw: bytes, max_pixels: int) -> tuple[Image.Image, Meaning]:
    _refuse_others(raw[:HEAD_BYTES])
    try:
        meaning = meaning_of(raw) if is_tiff(raw) else Meaning(grey_bits=grey_bits(raw))
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
    except UnidentifiedImageError:
        if is_tiff(raw):
            raise UnreadError(describe(raw), kind=UNREAD_TIFF) from None
        raise UnreadError(_NO_IMAGE) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadError(f"too many pixels: {error}", kind="too many pixels") from None
    _check_size(image.width, image.height, max_pixels)
    remember_white(image)
    _load(image, raw)
    return image, meaning


def _refuse_others(head: bytes) -> None:
    """Refuse what its first bytes tell to be of a format that is not read, whatever its name ends in."""
    kind, remedy = other_kind(head, readable=(*FORMATS, *(("DICOM",) if READS_DICOM else ())))
    if kind:
        raise UnreadError(f"{_NO_IMAGE}; it is {kind}", remedy)


def _load(image: ImageFile.ImageFile, raw: bytes) -> None:
    """Decode, and check that no data were missing."""
    fault = fault_of(raw) if image.format == "PNG" else None
    if fault is not None:
        raise UnreadError(fault)
    try:
        if image.format in ("JPEG", "MPO"):
            load_jpeg(image, raw)
            return
    except DamagedError as error:
        raise UnreadError(f"the image is damaged or cut short: {error}", kind="damaged") from None
    image.load()
    if image.format == "PNG" and lacks_rows(raw, image):
        raise UnreadError("the image is damaged: it has fewer rows than its header says", kind="damaged")
    if image.format == "WEBP" and has_hole(raw):
        raise UnreadError("the image is damaged: bytes are equal where data should be", kind="damaged")
    if image.format == "PNG" and image.mode == "L" and isinstance(image.info.get("transparency"), int):
        image.info["transparency"] = scaled_key(raw, image.info["transparency"])
    if image.format == "PPM" and image.info.get("scale", 1) != 1:
        raise UnreadError(
            "floating point of another scale than 1, and no telling which is white; save it as 8 or 16 bits"
        )


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise UnreadError(f"{width} x {height} pixels: nothing to see", kind="no pixels")
    if max(width, height) > _MOST_ASPECT * min(width, height):
        problem = f"{width} x {height} pixels: a line more than {_MOST_ASPECT:,} times as long as it is wide"
        raise UnreadError(problem, kind="a line")
    if width * height > max_pixels:
        problem = f"{width} x {height} pixels, {width * height / 1e6:.1f} megapixels"
        problem += f", more than the {max_pixels / 1e6:.1f} of data.max_megapixels"
        raise UnreadError(problem, kind="too many pixels")


# -- numbers as they are stored ---------------------------------------------------------------------------------------


def _with_any_channels(raw: Raw, max_pixels: int, reading: Reading) -> Pixels:
    try:
        return grey_or_rgb(_opened(raw, max_pixels, reading), 3)
    except UnreadError:
        if isinstance(raw, bytes) and not (is_tiff(raw) or raw.startswith(NPY_START)):
            raise
    return _pixels(numbers_of(raw, None, max_pixels, reading), None, reading)


def numbers_of(raw: Raw, in_chans: int | None, max_pixels: int, reading: Reading) -> Array:
    """Return the numbers of an image, H x W x C, in the type that they are stored in."""
    check_size = partial(_check_size, max_pixels=max_pixels)
    if isinstance(raw, bytes):
        _refuse_others(raw[:HEAD_BYTES])
        if raw.startswith(NPY_START):
            raw = read_npy(raw)
        elif is_dicom(raw):
            return read_dicom(raw, check_size, reading.value_range)
        elif raw.startswith(PNG_START) and is_wide_colour(raw):
            raise UnreadError("16-bit colour in a PNG, of which 8 bits are read", "Save it as TIFF or .npy")
        elif is_tiff(raw) and needs_bands(raw, in_chans):
            return read_bands(raw, check_size, reading.value_range)
    if isinstance(raw, np.ndarray):
        numbers_HWC = channels_last(raw, channels_first=reading.channels_first)
        check_size(numbers_HWC.shape[1], numbers_HWC.shape[0])
        return numbers_HWC
    return _stored(*_unconverted(raw, max_pixels), in_chans, reading)


def _stored(image: Image.Image, meaning: Meaning, in_chans: int | None, reading: Reading) -> Array:
    """Return the numbers of what Pillow decoded as they are in the file; of inverted ones black is the lower."""
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        wide_HW = np.asarray(upright(image))
        if meaning.is_inverted and image.mode == "F":
            raise UnreadError("floating point with white as 0", "Save it with black as 0")
        wide_HW = wide_HW.view(np.uint32) if meaning.is_unsigned and image.mode == "I" else wide_HW
        return turned(as_stored(wide_HW, image), meaning, reading.value_range)[:, :, None]
    image = upright(image)
    if in_chans not in (1, 3, None):
        bands = np.asarray(image)
        return bands if bands.ndim == 3 else bands[:, :, None]
    numbers_HWC = grey_or_rgb(image, 1 if image.mode in ("1", "L") and "transparency" not in image.info else 3)
    if reading.value_range is None:
        return as_stored(numbers_HWC, image)
    stored_HWC = in_few_bits(as_stored(numbers_HWC, image), meaning.grey_bits, reading.value_range)
    black = 2**meaning.grey_bits - 1  # where Pillow has turned it
    turn = replace(meaning, is_inverted=meaning.is_turned)
    return turned(black - stored_HWC if meaning.is_turned else stored_HWC, turn, reading.value_range)


def _unconverted(raw: bytes | Image.Image, max_pixels: int) -> tuple[Image.Image, Meaning]:
    if isinstance(raw, bytes):
        return _decoded(raw, max_pixels)
    _check_size(raw.width, raw.height, max_pixels)
    return raw.copy(), Meaning(grey_bits=1 if raw.mode == "1" else 8)


def _pixels(numbers_HWC: Array, in_chans: int | None, reading: Reading) -> Pixels:
    """Bring numbers to the channels that are wanted, and scale them."""
    count = numbers_HWC.shape[2]
    if in_chans is not None and count != in_chans:
        # Grey becomes RGB, and RGB grey; no other number of channels becomes another.
        if {count, in_chans} != {1, 3}:
            raise wrong_channels(numbers_HWC.shape, in_chans, reading.channels_first)
        numbers_HWC = np.repeat(numbers_HWC, 3, axis=2) if in_chans == 3 else numbers_HWC @ _LUMA
    return _as_bytes(numbers_HWC) if reading.value_range is None else _scaled(numbers_HWC, reading.value_range)


def _as_bytes(numbers_HWC: Array) -> Pixels:
    if numbers_HWC.dtype != np.uint8:
        raise other_numbers(numbers_HWC)
    return np.array(numbers_HWC)


def _scaled(numbers_HWC: Array, value_range: tuple[float, float]) -> Pixels:
    low, high = value_range
    if numbers_HWC.dtype.kind == "f" and not np.isfinite(numbers_HWC).all():
        raise UnreadError("it has NaN or infinite numbers", "Write other numbers in their place")
    shares_HWC = (numbers_HWC.astype(np.float64) - low) / (high - low)
    return np.clip(shares_HWC, 0.0, 1.0).astype(np.float32)
