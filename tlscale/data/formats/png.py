"""Check what Pillow leaves unchecked in a PNG: the checksums of its data, and colour keys that it compares wrongly.

Promise: a chunk that the picture is made of and whose checksum is wrong makes it a bad image. (Pillow stops when it has
all rows, and sees neither this checksum nor the one behind the data.)
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

_SIGNATURE_BYTES = 8
_NEEDED = (b"IHDR", b"PLTE", b"IDAT")
_DEPTH, _COLOUR_TYPE = 24, 25  # places in the file of the bytes of IHDR
_GREY, _RGB = 0, 2


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
