"""Recognise by its first bytes what is no image of the formats that are read: photos of telephones, sound, video, text.

Promise: nothing here takes a file for another that one of those formats could begin like.
"""

from __future__ import annotations

import string
from collections.abc import Collection
from typing import NamedTuple

HEAD_BYTES = 512
"""So many bytes tell."""
_CONVERT = "Convert it to JPEG or PNG"


class _Other(NamedTuple):
    """A kind of file; `where` its first bytes stand; its `format`, by Pillow's name, where some machines read it."""

    start: bytes
    name: str
    remedy: str = ""
    where: int = 0
    format: str = ""


_HEIF = "Install what reads it: pip install 'tlscale[heif]'; or convert it to JPEG or PNG, with heif-convert, say"
_AVIF = "Install what reads it: Pillow 11.3 or later; or convert it to JPEG or PNG, with avifdec, say"
_DICOM = "Install what reads it: pip install 'tlscale[dicom]'; or convert it to PNG"
_OTHERS = (
    *(
        _Other(b"ftyp" + brand, "HEIC, as telephones write it", _HEIF, 4, "HEIF")
        for brand in (b"heic", b"heix", b"hevc", b"hevx")
    ),
    *(_Other(b"ftyp" + brand, "HEIF", _HEIF, 4, "HEIF") for brand in (b"heim", b"heis", b"mif1", b"msf1")),
    *(_Other(b"ftyp" + brand, "AVIF", _AVIF, 4, "AVIF") for brand in (b"avif", b"avis")),
    _Other(b"ftyp", "a video (MP4 or MOV)", "", 4),
    _Other(b"\0\0\0\x0cJXL ", "JPEG XL", _CONVERT),
    _Other(b"\xff\x0a", "JPEG XL", _CONVERT),
    _Other(b"\0\0\0\x0cjP  ", "JPEG 2000", _CONVERT),
    _Other(b"\xff\x4f\xff\x51", "JPEG 2000", _CONVERT),
    _Other(b"8BPS", "a Photoshop file", _CONVERT),
    _Other(b"\x76\x2f\x31\x01", "OpenEXR", _CONVERT),
    _Other(b"DICM", "DICOM", _DICOM, 128, "DICOM"),
    _Other(b"WAVE", "a sound (WAV)", "", 8),
    _Other(b"AIF", "a sound (AIFF)", "", 8),
    _Other(b"ID3", "a sound (MP3)"),
    *(_Other(bytes((0xFF, second)), "a sound (MP3 or AAC)") for second in (0xFB, 0xF3, 0xF2, 0xFA, 0xF1, 0xF9)),
    _Other(b"OggS", "a sound or a video (Ogg)"),
    _Other(b"fLaC", "a sound (FLAC)"),
    _Other(b"MThd", "a sound (MIDI)"),
    _Other(b".snd", "a sound (AU)"),
    _Other(b"AVI ", "a video (AVI)", "", 8),
    _Other(b"\x1aE\xdf\xa3", "a video (Matroska or WebM)"),
    _Other(b"\0\0\x01\xba", "a video (MPEG)"),
    _Other(b"\0\0\x01\xb3", "a video (MPEG)"),
    _Other(b"FLV\x01", "a video (FLV)"),
    _Other(b"0&\xb2u\x8ef\xcf\x11", "a video or a sound (Windows Media)"),
    _Other(b"%!PS", "PostScript"),
    _Other(b"\xc5\xd0\xd3\xc6", "PostScript"),
    _Other(b"%PDF", "PDF"),
    _Other(b"version https://git-lfs", "a pointer of Git LFS", "'git lfs pull' fetches the file"),
    _Other(b"PK\x03\x04", "a ZIP archive", "Unpack it"),
    _Other(b"\x1f\x8b", "gzipped", "Unpack it"),
    _Other(b"7z\xbc\xaf\x27\x1c", "a 7z archive", "Unpack it"),
    _Other(b"Rar!", "a RAR archive", "Unpack it"),
    _Other(b"\x89HDF", "HDF5"),
    _Other(b"\x7fELF", "a program"),
)
_MARKUP = b"<"
_NETPBM = (*(b"P%d" % digit for digit in range(1, 8)), b"Pf", b"PF")


def other_kind(head: bytes, readable: Collection[str] = ()) -> tuple[str, str]:
    """Return what the file is that begins so, and what to do about it; empty for what may be an image, or anything.

    Args:
        readable: formats, by Pillow's names, that are read here; of those that some machines do not read.
    """
    if not head:
        return "empty", ""
    for other in _OTHERS:
        if head.startswith(other.start, other.where):
            if other.format in readable:
                break
            return other.name, other.remedy
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(_MARKUP):
        return "HTML, XML or SVG", ""
    if _is_text(head):
        return "text", ""
    return "", ""


def _is_text(head: bytes) -> bool:
    """Return whether it is text, in ASCII or UTF-8; but for what Netpbm's formats begin with, which are text too."""
    if head.startswith(_NETPBM):
        return False
    try:
        text = head.decode()
    except UnicodeDecodeError as error:  # the end may be in the middle of a letter
        if error.start < len(head) - 3:
            return False
        text = head[: error.start].decode()
    return all(sign.isprintable() or sign in string.whitespace for sign in text)
