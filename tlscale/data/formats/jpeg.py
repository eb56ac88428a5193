"""Decode JPEG, and find out whether all of its data were there and were used up.

Promise: data that end before the picture is complete, data that are left over when it is, and scans or restart markers
that are missing are errors; `djpeg` warns of them, and Pillow passes over the warnings. A sound file is never refused.

Nothing is decoded twice. Pillow's decoder takes data in pieces and reports how much it has consumed. While it decodes,
it keeps a piece that is too short for the next block; between the last block of a scan and the next marker it drops
what it gets. So it is queried twice for each stretch of coded data: shortly before the end of the stretch it must still
be decoding, and at the end, with a few bytes of padding, it must not want more.

What cannot be found: damage after which the number of blocks and that of bytes still fit (a flipped bit may do that,
and other data in the place of some), and arithmetic coding, which this decoder cannot take in pieces.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile

Ints = npt.NDArray[np.int64]

_SOI, _EOI, _SOS, _DRI = 0xD8, 0xD9, 0xDA, 0xDD
_RST = range(0xD0, 0xD8)
_BARE = frozenset((0x01, _SOI, *_RST))  # markers without a length
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_HUFFMAN_FRAMES = frozenset((0xC0, 0xC1, 0xC2))
_PROGRESSIVE = 0xC2
# Cameras leave a few bytes over; data that are out of step leave more, or want more.
_MOST_LEFT_OVER = 64
# As many bits as the decoder reads ahead, all ones: no code is so, so they are hardly taken for further blocks.
_PADDING = b"\xff\x00" * 9
_LEAST_CHECKED = 1024  # bytes between restart markers; to look behind fewer would cost more than it finds
_PROBE = b"\x55"


class DamagedError(Exception):
    """What is wrong with the data."""


@dataclass
class _Layout:
    """Where the coded data are."""

    frame: int = 0
    """Marker of the frame: the kind of coding."""
    ends: list[int] = field(default_factory=list)
    """Positions of the markers behind each stretch of coded data: restart markers, and what ends a scan."""
    left_C64: dict[int, Ints] = field(default_factory=dict)
    """Bits of each coefficient of a component that no scan has given; -1: all."""
    restarts: list[list[int]] = field(default_factory=list)
    """Restart markers of each scan, 0..7 each."""
    num_restarts: list[int] = field(default_factory=list)
    """How many a scan must have at least."""
    has_end: bool = False
    height_width: tuple[int, int] = (0, 0)
    sampling: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Of each component, down and across."""
    interval: int = 0
    """Blocks (MCUs) between restart markers; 0: there are none."""


def load_jpeg(image: ImageFile.ImageFile, raw: bytes) -> None:
    """Decode an image that is open, as its `load` does.

    Raises:
        DamagedError: a part of the picture is missing.
    """
    layout = _layout(raw)
    if layout is None or layout.frame not in _HUFFMAN_FRAMES or len(image.tile) != 1:
        image.load()
        return
    _check(layout)
    image.load_prepare()
    name, extents, offset, args = image.tile[0]
    decoder = Image._getdecoder(image.mode, name, args, image.decoderconfig)
    try:
        decoder.setimage(image.im, extents)
        _decode(_Feed(decoder), raw, offset, layout)
    finally:
        decoder.cleanup()
    image.tile = []
    image.load_end()


def _check(layout: _Layout) -> None:
    if not layout.has_end:
        raise DamagedError("there is no end marker")
    lacking = [component for component, left_64 in layout.left_C64.items() if left_64.any()]
    if lacking:
        raise DamagedError(f"scans of {len(lacking)} of {len(layout.left_C64)} components are missing")
    for numbers, least in zip(layout.restarts, layout.num_restarts, strict=True):
        if len(numbers) < least or any(number != at % 8 for at, number in enumerate(numbers)):
            raise DamagedError(f"restart markers are missing: {len(numbers):,} are there, {least:,} are needed")


class _Feed:
    """A decoder that is fed in pieces."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._pending = b""
        self.is_done = False

    def give(self, data: bytes) -> bool:
        """Feed data; return whether all of them were consumed, or the picture is complete without them."""
        if self.is_done:
            return True
        self._pending += data
        consumed, error = self._decoder.decode(self._pending)
        self.is_done = consumed < 0
        if consumed < 0 and error < 0:
            raise DamagedError("the data cannot be decoded")
        self._pending = b"" if self.is_done else self._pending[consumed:]
        return not self._pending


def _decode(feed: _Feed, raw: bytes, start: int, layout: _Layout) -> None:
    for number, end in enumerate(layout.ends, start=1):
        of = f" (stretch {number:,} of {len(layout.ends):,})" if len(layout.ends) > 1 else ""
        early = end - _MOST_LEFT_OVER
        while early > start and 0xFF in raw[early - 1 : early + 1]:  # it must divide no pair of bytes
            early -= 1
        if early > start:
            is_idle = feed.give(raw[start:early])
            # At the end of a block all may be consumed too; but one byte more is then kept for the next block.
            if is_idle and feed.give(raw[early : early + 1]):
                raise DamagedError(f"more than {_MOST_LEFT_OVER} bytes of its data are left over{of}")
            start = early + 1 if is_idle else early
        if not feed.give(raw[start:end] + _PADDING) or not feed.give(_PROBE):
            raise DamagedError(f"its data end before the picture is complete{of}")
        start = end
    feed.give(raw[start:])
    if not feed.is_done:
        raise DamagedError("there is no end marker")


def _layout(raw: bytes) -> _Layout | None:
    """Find where things are; return None where the markers do not tell."""
    layout, at = _Layout(), 0
    places: Ints | None = None
    try:
        while (place := raw.find(0xFF, at)) >= 0:
            kind, at = raw[place + 1], place + 1
            if kind in (0, 0xFF) or kind in _BARE:
                continue
            if kind == _EOI:
                layout.has_end = True
                break
            body = raw[place + 4 : place + 2 + int.from_bytes(raw[place + 2 : place + 4])]
            at = place + 4 + len(body)
            if kind in _FRAMES:
                _note_frame(layout, kind, body)
            elif kind == _DRI:
                layout.interval = int.from_bytes(body)
            elif kind == _SOS:
                _note_scan(layout, body)
                places = _markers(raw) if places is None else places
                at = _note_data(layout, raw, at, places)
    except (IndexError, KeyError, ValueError):
        return None
    return layout


def _markers(raw: bytes) -> Ints:
    """Return the places of all that looks like a marker."""
    bytes_N = np.frombuffer(raw, np.uint8)
    places = np.flatnonzero(bytes_N[:-1] == 0xFF)
    kinds = bytes_N[places + 1]
    found: Ints = places[(kinds != 0) & (kinds != 0xFF)]
    return found


def _note_frame(layout: _Layout, kind: int, body: bytes) -> None:
    layout.frame = kind
    first = -1 if kind == _PROGRESSIVE else 1
    places = range(6, 6 + 3 * body[5], 3)
    layout.left_C64 = {body[place]: np.full(64, first) for place in places}
    layout.sampling = {body[place]: (body[place + 1] & 15, body[place + 1] >> 4) for place in places}
    layout.height_width = int.from_bytes(body[1:3]), int.from_bytes(body[3:5])


def _note_scan(layout: _Layout, body: bytes) -> None:
    components = [body[1 + 2 * number] for number in range(body[0])]
    low, high, bits = body[1 + 2 * body[0] :][:3]
    for component in components:
        if layout.frame == _PROGRESSIVE:
            layout.left_C64[component][low : high + 1] = bits & 15
        else:
            layout.left_C64[component][:] = 0
    blocks = _num_blocks(layout, components)
    layout.num_restarts.append((blocks - 1) // layout.interval if layout.interval else 0)


def _num_blocks(layout: _Layout, components: list[int]) -> int:
    """Return the number of blocks (MCUs) of a scan."""
    height, width = layout.height_width
    down, across = (max(sides[axis] for sides in layout.sampling.values()) for axis in (0, 1))
    if len(components) > 1:  # each holds some blocks of each component
        return -(-height // (8 * down)) * -(-width // (8 * across))
    own_down, own_across = layout.sampling[components[0]]
    height, width = -(-height * own_down // down), -(-width * own_across // across)
    return -(-height // 8) * -(-width // 8)


def _note_data(layout: _Layout, raw: bytes, start: int, places: Ints) -> int:
    """Note the stretches of a scan, and return the place behind it."""
    restarts: list[int] = []
    for place in places[np.searchsorted(places, start) :].tolist():
        end = place
        while end > start and raw[end - 1] == 0xFF:  # padding of the marker
            end -= 1
        if raw[place + 1] not in _RST:
            layout.restarts.append(restarts)
            layout.ends.append(end)
            return int(place)
        restarts.append(raw[place + 1] - _RST.start)
        if end - start >= _LEAST_CHECKED:
            layout.ends.append(end)
            start = place + 2
    return len(raw)
