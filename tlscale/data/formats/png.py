"""Check what Pillow leaves unchecked in a PNG: checksums, rows that are missing, colour keys that it compares wrongly.

Promise: a chunk that the picture is made of and whose checksum is wrong makes it a bad image, and so do fewer rows than
its header says. (Pillow stops when it has all rows, and sees neither this checksum nor the one behind the data; where
the data end sooner, though packed soundly, it leaves the rest black.)
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from PIL import Image

PNG_START = b"\x89PNG\r\n\x1a\n"
_SIGNATURE_BYTES = 8
_NEEDED = (b"IHDR", b"PLTE", b"IDAT")
_DEPTH, _COLOUR_TYPE = 24, 25  # places in the file of the bytes of IHDR
_INTERLACED = 28
_GREY, _RGB = 0, 2
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a pixel, by colour type
_PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""Of an interlaced image (Adam7): first row and column, steps down and across."""


def fault_of(raw: bytes) -> str | None:
    """Return what is wrong with a PNG, or what in it is not read."""
    kinds = set()
    for kind, data, checksum in _chunks(raw):
        kinds.add(kind)
        if kind in _NEEDED and zlib.crc32(data, zlib.crc32(kind)) != checksum:
            return f"the image is damaged: the checksum of a chunk {kind.decode()} is wrong"
    if b"tRNS" in kinds and raw[_DEPTH] == 16 and raw[_COLOUR_TYPE] == _RGB:
        return "a PNG that is not read (16-bit RGB with one transparent colour); save it as 8-bit RGB"
    return None


def is_wide_colour(raw: bytes) -> bool:
    """Return whether a PNG has colours, or transparency, of 16 bits, of which Pillow gives 8."""
    return len(raw) > _COLOUR_TYPE and raw[_DEPTH] == 16 and raw[_COLOUR_TYPE] != _GREY


def lacks_rows(raw: bytes, image: Image.Image) -> bool:
    """Return whether a PNG that was decoded has fewer data than its rows need."""
    width, height = image.size
    # Only what ends in a zero is unpacked again. Of an interlaced image the last row of an odd number comes last.
    last = height - 1 - height % 2 if raw[_INTERLACED] and height > 1 else height - 1
    if image.crop((width - 1, last, width, last + 1)).tobytes().rstrip(b"\0"):
        return False
    packed = b"".join(data for kind, data, _ in _chunks(raw) if kind == b"IDAT")
    return len(zlib.decompressobj().decompress(packed)) < _num_bytes(raw, width, height)


def _num_bytes(raw: bytes, width: int, height: int) -> int:
    """Return how many bytes the rows are unpacked: each begins with the number of its filter."""
    bits, num_bytes = raw[_DEPTH] * _SAMPLES[raw[_COLOUR_TYPE]], 0
    for row, column, down, across in _PASSES if raw[_INTERLACED] else ((0, 0, 1, 1),):
        rows, columns = -(-(height - row) // down), -(-(width - column) // across)
        num_bytes += rows * (1 + -(-columns * bits // 8)) if rows > 0 and columns > 0 else 0
    return num_bytes


def scaled_key(raw: bytes, key: int) -> int:
    """Return the transparent grey of a PNG as Pillow scales its pixels, to 8 bits where they have fewer."""
    depth = raw[_DEPTH]
    return key * 255 // (2**depth - 1) if raw[_COLOUR_TYPE] == _GREY and depth in (2, 4) else key


def _chunks(raw: bytes) -> Iterator[tuple[bytes, memoryview, int]]:
    """Yield kind, data and checksum of each chunk that is whole."""
    view, at = memoryview(raw), _SIGNATURE_BYTES
    while at + 12 <= len(raw):
        end = at + 8 + int.from_bytes(view[at : at + 4])
        if end + 4 > len(raw):
            return
        kind = bytes(view[at + 4 : at + 8])
        yield kind, view[at + 8 : end], int.from_bytes(view[end : end + 4])
        if kind == b"IEND":
            return
        at = end + 4
