"""Undo what Pillow does to the numbers of PGM and PPM: it scales them from the file's own white to 255 or 65535.

Promise: of an image that `remember_white` saw before it was decoded, `as_stored` gives the numbers of the file.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFile

from tlscale.data.formats.arrays import Array
from tlscale.data.formats.unread import UnreadError

_WHITE = "tlscale_white"


def remember_white(image: ImageFile.ImageFile) -> None:
    """Write down which number of the file is white, where Pillow is to scale it; only known before it decodes."""
    args = image.tile[0].args if image.format == "PPM" and image.tile else None
    if isinstance(args, tuple) and isinstance(args[-1], int) and image.mode in ("L", "I", "RGB"):
        image.info[_WHITE] = args[-1]


def as_stored(numbers: Array, image: Image.Image) -> Array:
    """Return the numbers of a file, of those that Pillow made of them.

    Raises:
        UnreadError: Pillow keeps 8 bits of more.
    """
    white, most = image.info.get(_WHITE), 65535 if image.mode == "I" else 255
    if white is None or white == most:
        return numbers
    if white > most:
        raise UnreadError("16-bit colour in a PPM, of which 8 bits are read", "Save it as TIFF or .npy")
    # No two numbers became one, as there are no more of them than steps of the scale.
    stored: Array = np.rint(numbers * (white / most)).astype(np.int32)
    return stored
