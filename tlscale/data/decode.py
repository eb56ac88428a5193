"""Decode the bytes of an image file, or an array, to pixels: uint8, height x width x channels.

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

Shape letters: H height, W width, C channels.
"""

from __future__ import annotations

import importlib.util
import io
import warnings
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, UnidentifiedImageError, features

from tlscale.data.formats.jpeg import DamagedError, load_jpeg
from tlscale.data.formats.others import HEAD_BYTES, other_kind
from tlscale.data.formats.png import fault_of, lacks_rows, scaled_key
from tlscale.data.formats.tiff import Meaning, UnreadTiffError, describe, is_tiff, meaning_of
from tlscale.data.formats.webp import has_hole
from tlscale.errors import DataError, render

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
EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp")
    + (".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm")
    + ((".avif",) if "AVIF" in FORMATS else ())
    + ((".heic", ".heif", ".hif") if READS_HEIF else ())
)
"""File name endings, in small letters, of those formats."""

LEAVE_OUT = "data.on_bad_image: skip leaves out what cannot be read"
"""What to do about a bad image."""

Pixels = npt.NDArray[np.uint8]
_MOST_ASPECT = 10_000  # the shorter side of a resized image has some 256 pixels, and its longer side so many times more
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WITH_ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")


class BadImageError(DataError):
    """One image cannot be read, or is too large; the message starts with its place.

    Attributes:
        why: the message without the place.
        image: its split and its position there, where it is of a run's data.
    """

    why = ""
    image: tuple[str, int] | None = None

    @classmethod
    def at(cls, where: str, why: str, remedy: str | None = LEAVE_OUT) -> BadImageError:
        """Return the error of the image at a place."""
        error = cls(f"{where}: {why}", remedy=remedy)
        error.why = why
        return error


def decode_image(raw: bytes | npt.NDArray[Any] | Image.Image, *, in_chans: int, max_pixels: int, where: str) -> Pixels:
    """Decode one image to pixels.

    Args:
        raw: an encoded file; decoded uint8 pixels as H x W, H x W x 1 or H x W x 3; or an image of Pillow's.
        in_chans: channels wanted, 1 or 3.
        max_pixels: most height x width that is accepted.
        where: the place of the image, for messages.

    Returns:
        A new uint8 array, H x W x C, C = `in_chans`.

    Raises:
        BadImageError: not readable as a whole, not of `FORMATS`, or too large.
    """
    assert in_chans in (1, 3), in_chans
    try:
        return _channels(_opened(raw, max_pixels), in_chans)
    except _BadError as error:
        raise BadImageError.at(where, str(error)) from None
    except Exception as error:  # on hostile bytes Pillow's decoders raise nearly anything
        why = f"the image is damaged or cut short ({type(error).__name__}: {error})"
        raise BadImageError.at(where, why) from error


def header_hw(file: BinaryIO, where: str) -> tuple[int, int]:
    """Return height and width from the header of an encoded image; nothing is decoded.

    Raises:
        BadImageError: it has no header that can be read.
    """
    head = file.read(HEAD_BYTES)
    file.seek(0)
    try:
        _refuse_others(head)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are checked when the image is decoded
            image = Image.open(file, formats=FORMATS)
        return image.height, image.width
    except UnidentifiedImageError:
        raise BadImageError.at(where, _NO_IMAGE) from None
    except _BadError as error:
        raise BadImageError.at(where, str(error)) from None
    except Exception as error:  # on hostile bytes Pillow's readers raise nearly anything
        raise BadImageError.at(where, f"the header cannot be read ({type(error).__name__}: {error})") from error


class _BadError(Exception):
    """What is wrong with the image; `decode_image` puts the place in front."""


def _opened(raw: bytes | npt.NDArray[Any] | Image.Image, max_pixels: int) -> Image.Image:
    if isinstance(raw, np.ndarray):
        return _from_array(raw, max_pixels)
    return _from_pillow(raw, max_pixels) if isinstance(raw, Image.Image) else _from_bytes(raw, max_pixels)


def _from_pillow(image: Image.Image, max_pixels: int) -> Image.Image:
    """Take an image of Pillow's as the file that it was read from would be."""
    _check_size(image.width, image.height, max_pixels)
    # A copy: the caller's may be used by other threads, and is left as it is.
    return _upright(_eight_bits(image.copy(), Meaning()))


def _from_array(pixels: npt.NDArray[Any], max_pixels: int) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise _BadError(
            f"an array of shape {pixels.shape} and type {pixels.dtype}; expected uint8 of H x W, H x W x 1 or H x W x 3"
        )
    _check_size(pixels.shape[1], pixels.shape[0], max_pixels)
    return Image.fromarray(pixels)


def _from_bytes(raw: bytes, max_pixels: int) -> Image.Image:
    _refuse_others(raw[:HEAD_BYTES])
    try:
        meaning = meaning_of(raw) if is_tiff(raw) else Meaning()
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
    except UnreadTiffError as error:
        raise _BadError(str(error)) from None
    except UnidentifiedImageError:
        if is_tiff(raw):
            raise _BadError(describe(raw)) from None
        raise _BadError(_NO_IMAGE) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _BadError(f"too many pixels: {error}") from None
    _check_size(image.width, image.height, max_pixels)
    _load(image, raw)
    return _upright(_eight_bits(image, meaning))


def _refuse_others(head: bytes) -> None:
    """Refuse what its first bytes tell to be of a format that is not read, whatever its name ends in."""
    kind, remedy = other_kind(head, readable=FORMATS)
    if kind:
        raise _BadError(render(f"{_NO_IMAGE}; it is {kind}", remedy=remedy))


def _load(image: ImageFile.ImageFile, raw: bytes) -> None:
    """Decode, and check that no data were missing."""
    fault = fault_of(raw) if image.format == "PNG" else None
    if fault is not None:
        raise _BadError(fault)
    try:
        if image.format in ("JPEG", "MPO"):
            load_jpeg(image, raw)
            return
    except DamagedError as error:
        raise _BadError(f"the image is damaged or cut short: {error}") from None
    image.load()
    if image.format == "PNG" and lacks_rows(raw, image):
        raise _BadError("the image is damaged: it has fewer rows than its header says")
    if image.format == "WEBP" and has_hole(raw):
        raise _BadError("the image is damaged: bytes are equal where data should be")
    if image.format == "PNG" and image.mode == "L" and isinstance(image.info.get("transparency"), int):
        image.info["transparency"] = scaled_key(raw, image.info["transparency"])
    if image.format == "PPM" and image.info.get("scale", 1) != 1:
        raise _BadError(
            "floating point of another scale than 1, and no telling which is white; save it as 8 or 16 bits"
        )


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise _BadError(f"{width} x {height} pixels: nothing to see")
    if max(width, height) > _MOST_ASPECT * min(width, height):
        raise _BadError(f"{width} x {height} pixels: a line more than {_MOST_ASPECT:,} times as long as it is wide")
    if width * height > max_pixels:
        raise _BadError(
            f"{width} x {height} pixels, {width * height / 1e6:.1f} megapixels, more than the "
            f"{max_pixels / 1e6:.1f} of data.max_megapixels"
        )


def _upright(image: Image.Image) -> Image.Image:
    # Read after load(): TIFF has been turned by then, and PNG may carry EXIF behind the pixels.
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata do not make the pixels bad
        turn = None
    return image if turn is None else image.transpose(turn)


def _channels(image: Image.Image, in_chans: int) -> Pixels:
    if image.mode == "La":  # Pillow converts it to nothing; the grey is weighted already
        grey_HW, alpha_HW = np.moveaxis(np.asarray(image).astype(np.int64), 2, 0)
        image = Image.fromarray(np.minimum(grey_HW + 255 - alpha_HW, 255).astype(np.uint8))
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    mode = "L" if in_chans == 1 else "RGB"
    pixels_HWC = np.array(image if image.mode == mode else image.convert(mode), dtype=np.uint8)
    return pixels_HWC[:, :, None] if in_chans == 1 else pixels_HWC


def _eight_bits(image: Image.Image, meaning: Meaning) -> Image.Image:
    if image.mode == "F":
        return _from_float(np.asarray(image), is_inverted=meaning.is_inverted)
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    wide_HW = np.asarray(image).astype(np.int64)
    if wide_HW.min() < 0 or wide_HW.max() > meaning.most:
        raise _BadError(
            f"32-bit integers from {wide_HW.min()} to {wide_HW.max()}, and no telling which is white; "
            "save it as 8 or 16 bits"
        )
    wide_HW = meaning.most - wide_HW if meaning.is_inverted else wide_HW
    grey_HW = ((wide_HW * 255 + meaning.most // 2) // meaning.most).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey_HW[wide_HW == clear] = 255
    return Image.fromarray(grey_HW)


def _from_float(grey_HW: npt.NDArray[Any], *, is_inverted: bool) -> Image.Image:
    if not (np.isfinite(grey_HW).all() and grey_HW.min() >= 0 and grey_HW.max() <= 1):
        raise _BadError("floating point outside 0..1, and no telling which is white; save it as 8 or 16 bits")
    grey_HW = 1 - grey_HW if is_inverted else grey_HW
    return Image.fromarray(np.rint(grey_HW * 255).astype(np.uint8))
