"""Give grey of 1, 2 and 4 bits as it is stored: Pillow scales it to 0..255.

Promise: with a range, a file is read by its own numbers, as files of 8 and 16 bits are. What a range beyond them means
of it nobody can tell (some programs save a picture of 8 bits with fewer where these are enough), and it is refused.
"""

from __future__ import annotations

from tlscale.data.formats.arrays import Array
from tlscale.data.formats.png import PNG_START
from tlscale.data.formats.tiff import is_tiff, meaning_of
from tlscale.data.formats.unread import UnreadError

_DEPTH, _COLOUR_TYPE, _GREY = 24, 25, 0  # of a PNG: places in the file, and of the second one a value
_MOST = 15  # of 4 bits
_BITMAPS = (b"P1", b"P4")  # PBM


def grey_bits(raw: bytes) -> int:
    """Return how many bits the grey of a PNG, PBM or TIFF has; 8 where it has more, or colours, and of other files.

    Raises:
        UnreadError: of a TIFF that is not read.
    """
    if is_tiff(raw):
        return meaning_of(raw).grey_bits
    if raw.startswith(_BITMAPS):
        return 1
    is_grey = raw.startswith(PNG_START) and len(raw) > _COLOUR_TYPE and raw[_COLOUR_TYPE] == _GREY
    return min(raw[_DEPTH], 8) if is_grey else 8


def was_scaled(raw: object, value_range: tuple[float, float] | None) -> bool:
    """Return whether an image is read otherwise with this range than by versions that left it as Pillow scales it.

    Of one bit they were the same, as what is beyond the range is clipped; a range of other files is refused.
    """
    if value_range is None or value_range[1] > _MOST or not isinstance(raw, bytes):
        return False
    try:
        return 1 < grey_bits(raw) < 8
    except UnreadError:
        return False


def refuse_wider_range(bits: int, value_range: tuple[float, float] | None) -> None:
    """Refuse a range that goes beyond the numbers of so few bits.

    Raises:
        UnreadError: it does.
    """
    most = 2**bits - 1
    if bits < 8 and value_range is not None and value_range[1] > most:
        raise UnreadError(
            f"{bits} bit{'s' * (bits > 1)}, numbers of 0 to {most}, and data.range goes up to {value_range[1]:g}",
            "Save it with 8 bits, as numbers of that range; or set data.range to the numbers that all files have",
            kind=f"{bits} bits",
            of_recipe=True,
        )


def in_few_bits(numbers: Array, bits: int, value_range: tuple[float, float]) -> Array:
    """Return the numbers of a file of so many bits, of those that Pillow made of them.

    Raises:
        UnreadError: the range goes beyond them.
    """
    refuse_wider_range(bits, value_range)
    return numbers if bits >= 8 else numbers // (255 // (2**bits - 1))
