"""Tell which packages, but for Pillow, decode a split: another version of theirs may give other pixels, and so codes.

Promise: of images that Pillow reads none is named, so that their codes stay where they are.
"""

from __future__ import annotations

from tlscale.data.formats.dicom import READS_DICOM, is_dicom
from tlscale.data.formats.few_bits import was_scaled
from tlscale.data.formats.others import HEAD_BYTES
from tlscale.data.formats.tiff import is_tiff
from tlscale.data.input_spec import InputSpec
from tlscale.data.sources.open import ImageSplit
from tlscale.errors import DataError

_OF_DICOM = ("pydicom", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg", "python-gdcm")
_OF_BANDS = ("tifffile", "imagecodecs")


def decoders_of(split: ImageSplit, spec: InputSpec) -> tuple[str, ...]:
    """Return the packages that decode its first image, which stands for all: a folder has images of one kind."""
    head = _head(split, is_usual=spec.is_usual)
    if READS_DICOM and is_dicom(head):
        return _OF_DICOM
    return _OF_BANDS if is_tiff(head) and not spec.is_usual else ()


def reading_of(split: ImageSplit, spec: InputSpec) -> dict[str, str]:
    """Return what is read otherwise than once, of its first image, for the key of codes: those of then are others."""
    if spec.range is None:
        return {}
    try:
        raw = split.read(0)
    except (OSError, DataError):  # for those who decode it to tell
        return {}
    return {"few_bits": "as stored"} if was_scaled(raw, spec.range) else {}


def _head(split: ImageSplit, *, is_usual: bool) -> bytes:
    try:
        path = split.file_of(0)
        if path is not None:
            with path.open("rb") as file:
                return file.read(HEAD_BYTES)
        raw = split.read(0) if READS_DICOM or not is_usual else b""
    except (OSError, DataError):  # for those who decode it to tell
        return b""
    return raw[:HEAD_BYTES] if isinstance(raw, bytes) else b""
