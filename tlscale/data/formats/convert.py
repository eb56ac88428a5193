"""Convert what Pillow decoded to grey or RGB of 8 bits; the rules stand at the head of `tlscale.data.decode`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tlscale.data.formats.arrays import Array
from tlscale.data.formats.tiff import Meaning
from tlscale.data.formats.unread import UnreadError

ORIENTATION_TAG = 0x0112
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


def upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF orientation says."""
    # Read after load(): TIFF has been turned by then, and PNG may carry EXIF behind the pixels.
    try:
        turn = _TURNS.get(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata do not make the pixels bad
        turn = None
    return image if turn is None else image.transpose(turn)


def upright_array(numbers_HWC: Array, orientation: int) -> Array:
    """Turn an array as `upright` turns an image."""
    if orientation in (5, 6, 7, 8):
        numbers_HWC = numbers_HWC.transpose(1, 0, 2)
    rows, columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return numbers_HWC[:: -1 if rows else 1, :: -1 if columns else 1]


def grey_or_rgb(image: Image.Image, in_chans: int) -> npt.NDArray[np.uint8]:
    """Return the pixels of an image as grey (1 channel) or RGB (3), H x W x C."""
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


def eight_bits(image: Image.Image, meaning: Meaning) -> Image.Image:
    """Scale the numbers of wider grey to 8 bits.

    Raises:
        UnreadError: there is no telling which is white.
    """
    if image.mode == "F":
        return _from_float(np.asarray(image), is_inverted=meaning.is_inverted)
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    wide_HW = np.asarray(image).astype(np.int64)
    if wide_HW.min() < 0 or wide_HW.max() > meaning.most:
        problem = f"32-bit integers from {wide_HW.min()} to {wide_HW.max()}, and no telling which is white; "
        raise UnreadError(problem + "save it as 8 or 16 bits", kind="other numbers")
    wide_HW = meaning.most - wide_HW if meaning.is_inverted else wide_HW
    grey_HW = ((wide_HW * 255 + meaning.most // 2) // meaning.most).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey_HW[wide_HW == clear] = 255
    return Image.fromarray(grey_HW)


def turned(numbers: Array, meaning: Meaning, value_range: tuple[float, float] | None) -> Array:
    """Turn numbers round where white is the lowest of them: in the range, as those of DICOM are, where there is one."""
    if not meaning.is_inverted:
        return numbers
    # What the recipe says of the numbers is truer than how many bits hold them.
    most = meaning.most if value_range is None else float(sum(value_range))
    result: Array = most - numbers
    return result


def _from_float(grey_HW: npt.NDArray[Any], *, is_inverted: bool) -> Image.Image:
    if not (np.isfinite(grey_HW).all() and grey_HW.min() >= 0 and grey_HW.max() <= 1):
        raise UnreadError(
            "floating point outside 0..1, and no telling which is white; save it as 8 or 16 bits", kind="other numbers"
        )
    grey_HW = 1 - grey_HW if is_inverted else grey_HW
    return Image.fromarray(np.rint(grey_HW * 255).astype(np.uint8))
