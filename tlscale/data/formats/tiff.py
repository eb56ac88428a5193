"""Check by its tags that a TIFF is one of those that Pillow decodes correctly, and read what its numbers mean.

Promise: a TIFF that would come out inverted, dark or garbled is refused, and the error describes it. TIFF leaves
much open (what 0 is, how many bits, where the planes are), and Pillow decodes some of it wrongly without an error:
what is let through here was compared with files written byte by byte (tests/unit/data/test_tiff.py).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from PIL import TiffImagePlugin

from tlscale.data.formats.unread import UnreadError

UNREAD_TIFF = "a TIFF that is not read"
_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_WIDTH, _HEIGHT = 256, 257
_SUBFILE, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 254, 258, 259, 262, 266
_ORIENTATION, _SAMPLES, _PLANAR, _COLOUR_MAP, _INK_SET, _EXTRA, _FORMAT = 274, 277, 284, 320, 332, 338, 339
_RAW, _FAX, _JPEGS = 1, (2, 3, 4), (6, 7)
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6
_COLOURS = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _PALETTE: 1, _CMYK: 4, _YCBCR: 3}
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3
_PHOTOMETRICS = {
    None: "no word on what 0 is (PhotometricInterpretation)",
    _WHITE_IS_ZERO: "grey with white as 0",
    _BLACK_IS_ZERO: "grey",
    _RGB: "RGB",
    _PALETTE: "palette",
    4: "mask",
    _CMYK: "CMYK",
    _YCBCR: "YCbCr",
    8: "CIE Lab",
    9: "ICC Lab",
    10: "ITU Lab",
    32803: "raw sensor",
    34892: "linear raw sensor",
}
_FORMATS = {_UNSIGNED: "", _SIGNED: "signed ", _FLOAT: "floating point "}


@dataclass(frozen=True)
class Meaning:
    """What the numbers of a file mean, of a TIFF above all."""

    most: int = 65535
    """White, or black where `is_inverted`."""
    is_inverted: bool = False
    is_turned: bool = False
    """Whether Pillow has turned white and black round, of 255."""
    is_unsigned: bool = False
    """Of 32-bit integers, which Pillow takes for signed ones."""
    grey_bits: int = 8
    """Of grey that Pillow gives in 8 bits: how many it has in the file; for fewer Pillow scales."""


@dataclass(frozen=True)
class _Tags:
    is_big_endian: bool
    subfile: int
    bits: tuple[int, ...]
    compression: int
    photometric: int | None
    fill_order: int
    samples: int
    planes_apart: bool
    colour_map: tuple[int, ...]
    ink_set: int
    extra: tuple[int, ...]
    formats: tuple[int, ...]

    @property
    def num_colours(self) -> int:
        """Samples that are colour; the others are alpha, or anything."""
        return _COLOURS.get(self.photometric, 0) if self.photometric is not None else 0

    @property
    def is_inverted(self) -> bool:
        return self.photometric == _WHITE_IS_ZERO


def is_tiff(raw: bytes) -> bool:
    """Return whether these bytes begin as a TIFF."""
    return raw.startswith(_STARTS)


def meaning_of(raw: bytes) -> Meaning:
    """Return what the numbers of a TIFF mean.

    Raises:
        UnreadError: it is of a kind that does not come out right.
    """
    try:
        tags = _read(raw)
    except Exception:  # on damaged tags Pillow's reader raises nearly anything; its decoder will report it
        return Meaning()
    why = next(_faults(tags), None)
    if why is not None:
        raise UnreadError(f"{describe(raw)}: {why}", kind=UNREAD_TIFF)
    return Meaning(
        4095 if tags.bits[0] == 12 else 65535,
        is_inverted=tags.is_inverted and tags.bits[0] > 8,
        is_turned=tags.is_inverted and tags.bits[0] <= 8,
        is_unsigned=tags.bits[0] == 32 and tags.formats[0] == _UNSIGNED,
        grey_bits=min(tags.bits[0], 8) if tags.photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO) else 8,
    )


def needs_bands(raw: bytes, in_chans: int | None) -> bool:
    """Return whether the numbers of a TIFF, as they are stored, are more than Pillow gives.

    Args:
        in_chans: channels wanted; for one or three, grey and 8-bit RGB are enough. None: as many as there are.
    """
    try:
        tags = _read(raw)
    except Exception:  # as in `meaning_of`
        return False
    if tags.subfile & 5:  # what is not read at all
        return False
    if in_chans not in (1, 3, None) or (in_chans is None and tags.samples > 3):
        return True
    is_colour = tags.samples > 1 and tags.bits[0] != 8
    is_strange = tags.bits[0] > 32 or (tags.formats[0] == _FLOAT and tags.bits[0] != 32)
    return is_colour or (
        (is_strange or next(_faults(tags), None) is not None) and tags.photometric in (_BLACK_IS_ZERO, _RGB)
    )


def tiff_size(file: BinaryIO) -> tuple[int, int]:
    """Return height and width from the tags of a TIFF, when it is upright."""
    head = file.read(16)
    tags = TiffImagePlugin.ImageFileDirectory_v2(head if 43 in head[2:4] else head[:8])
    file.seek(tags.next)
    tags.load(file)
    height, width = int(tags[_HEIGHT]), int(tags[_WIDTH])
    return (width, height) if tags.get(_ORIENTATION) in (5, 6, 7, 8) else (height, width)  # as Pillow has it


def describe(raw: bytes) -> str:
    """Return what a TIFF that is not read is, and what to do."""
    try:
        tags = _read(raw)
    except Exception:
        return "a TIFF whose tags cannot be read"
    kind = "".join(_FORMATS.get(number, f"sample format {number} ") for number in dict.fromkeys(tags.formats))
    bits = " and ".join(str(number) for number in dict.fromkeys(tags.bits))
    colour = _PHOTOMETRICS.get(tags.photometric, f"photometric interpretation {tags.photometric}")
    parts = [
        f"{bits}-bit {kind}{colour}",
        f"{tags.samples} sample{'s' * (tags.samples > 1)} a pixel",
        *(["planes apart"] if tags.planes_apart else []),
        *([f"compression {tags.compression}"] if tags.compression != _RAW else []),
        *(["big-endian"] if tags.is_big_endian else []),
    ]
    return f"{UNREAD_TIFF} ({', '.join(parts)}); save it as 8-bit grey or RGB"


def _read(raw: bytes) -> _Tags:
    header = raw[:16] if raw[2] == 43 or raw[3] == 43 else raw[:8]
    file = io.BytesIO(raw)
    tags = TiffImagePlugin.ImageFileDirectory_v2(header)
    file.seek(tags.next)
    tags.load(file)
    samples = int(tags.get(_SAMPLES, 1))
    bits = tuple(int(number) for number in tags.get(_BITS, (1,)))
    return _Tags(
        is_big_endian=raw[:1] == b"M",
        subfile=int(tags.get(_SUBFILE, 0)),
        bits=bits,
        compression=int(tags.get(_COMPRESSION, _RAW)),
        photometric=tags.get(_PHOTOMETRIC),
        fill_order=int(tags.get(_FILL_ORDER, 1)),
        samples=samples,
        planes_apart=tags.get(_PLANAR, 1) == 2,
        colour_map=tuple(tags.get(_COLOUR_MAP, ())),
        ink_set=int(tags.get(_INK_SET, 1)),
        extra=tuple(tags.get(_EXTRA, ())),
        formats=tuple(int(number) for number in tags.get(_FORMAT, (_UNSIGNED,))),
    )


def _faults(tags: _Tags) -> Iterator[str]:
    """Yield the reasons why this TIFF would not come out right."""
    num_extra = tags.samples - tags.num_colours
    if tags.compression == 6:
        return  # the old form of JPEG leaves most tags out
    if tags.subfile & 5:
        yield "its first page is a reduced copy or a mask of another"
    if tags.photometric not in _COLOURS:
        yield "its colours are not known here"
    if len({*tags.bits}) > 1 or len({*tags.formats}) > 1:
        yield "its samples differ in bits or format"
    if num_extra < 0:
        yield "samples are missing"
    yield from _faults_of_numbers(tags)
    if tags.planes_apart and not _are_planes_read(tags, num_extra):
        yield "its planes lie apart"
    if num_extra > 0 and (tags.is_inverted or tags.bits[0] != 8) and (tags.photometric, tags.bits[0]) != (_RGB, 16):
        yield "it has more samples than colours"
    if tags.bits[0] == 16 and (tags.photometric == _CMYK or (num_extra > 0 and set(tags.extra) != {0})):
        yield "16 bits with CMYK or transparency lose too much"
    if tags.photometric == _YCBCR and tags.compression not in _JPEGS:
        yield "YCbCr is read where it is compressed as JPEG"
    if tags.photometric == _CMYK and tags.ink_set != 1:
        yield "its inks are others than CMYK"
    if tags.photometric == _PALETTE and tags.colour_map and max(tags.colour_map) < 256:
        yield "its palette is black, or not written in 16 bits"


def _faults_of_numbers(tags: _Tags) -> Iterator[str]:
    bits, form = tags.bits[0], tags.formats[0]
    if form == _SIGNED and bits != 32:
        yield "there is no telling which number is white"
    if form in (_SIGNED, _FLOAT) and tags.is_big_endian and tags.compression != _RAW:
        yield "the order of its bytes is not known after unpacking"
    if tags.fill_order == 2 and (tags.compression not in (_RAW, *_FAX) or (bits == 8 and tags.is_inverted)):
        yield "its bits are in reverse order (FillOrder)"


def _are_planes_read(tags: _Tags, num_extra: int) -> bool:
    """Return whether the planes come together as they should; of one sample there is one plane."""
    bits, is_raw = tags.bits[0], tags.compression == _RAW
    if num_extra or tags.fill_order == 2:
        return False
    if tags.samples == 1:  # Pillow takes the first letter of what it knows of the numbers
        return not is_raw or (bits in (1, 8) and not tags.is_inverted)
    return tags.photometric in (_RGB, _CMYK) and (bits == 8 or (bits == 16 and not is_raw))
