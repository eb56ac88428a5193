"""Find holes in a WebP: stretches of zeros (or of ones) where coded data were.

Promise: a sound file is never taken for one with a hole. WebP has no checksum, and its decoder reads whatever stands
there; but data that were overwritten with zeros hardly ever need as many bytes as were there. So where a stretch of
equal bytes is suspicious, the same image is decoded again with its end cut off: a sound one then lacks data, one with
a hole does not miss them.

What cannot be found: data in the place of which other data stand, and holes in the transparency or behind the first
frame.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

from PIL import Image

_SUSPICIOUS = (bytes(32), b"\xff" * 32)
_MOST_LEFT_OVER = 64
_HEADER = 16  # at least, of the coded data


def has_hole(raw: bytes) -> bool:
    """Return whether an image that can be decoded was coded with other data than stand there."""
    if not any(run in raw for run in _SUSPICIOUS):
        return False
    frame = next(((kind, data) for kind, data in _chunks(raw, 12) if kind in (b"VP8 ", b"VP8L")), None)
    if frame is None or len(frame[1]) < _HEADER + _MOST_LEFT_OVER:
        return False
    kind, data = frame
    if not any(run in data for run in _SUSPICIOUS):
        return False
    short = _chunk(kind, data[:-_MOST_LEFT_OVER])
    try:
        with Image.open(io.BytesIO(_chunk(b"RIFF", b"WEBP" + short)), formats=("WEBP",)) as image:
            image.load()
    except Exception:  # whatever it lacks, it lacks something
        return False
    return True


def _chunks(raw: bytes, at: int) -> Iterator[tuple[bytes, bytes]]:
    while at + 8 <= len(raw):
        kind, size = raw[at : at + 4], int.from_bytes(raw[at + 4 : at + 8], "little")
        if kind == b"ANMF":  # a frame: 16 bytes, and chunks of its own
            yield from _chunks(raw[at + 8 : at + 8 + size], 16)
        else:
            yield kind, raw[at + 8 : at + 8 + size]
        at += 8 + size + size % 2


def _chunk(kind: bytes, data: bytes) -> bytes:
    return kind + len(data).to_bytes(4, "little") + data + bytes(len(data) % 2)
