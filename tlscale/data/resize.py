"""Resize and crop images to the size of a backbone's input, as an evaluation sees them.

Promise: at the centre it gives, pixel for pixel, what timm's own transform gives for the same backbone.

Shape letters: C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from tlscale.data.decode import Pixels
from tlscale.data.input_spec import FILTERS, InputSpec
from tlscale.data.views import CENTER

MOST_RESIZED_PIXELS = 1 << 25
"""Larger results of a resize are cropped piece by piece."""


def resize_and_crop(image_HWC: Pixels, spec: InputSpec, places: Sequence[str]) -> list[Pixels]:
    """Return the parts of an image at some places, each of the height and width of the spec."""
    height, width = image_HWC.shape[:2]
    target_hw = _resized_hw(height, width, spec)
    if target_hw[0] * target_hw[1] > MOST_RESIZED_PIXELS:
        return [_cropped(_resize_strip(image_HWC, target_hw, spec, place), spec, place) for place in places]
    resized_HWC = image_HWC if (height, width) == target_hw else _resize(image_HWC, target_hw, spec)
    return [_cropped(resized_HWC, spec, place) for place in places]


def _cropped(image_HWC: Pixels, spec: InputSpec, place: str) -> Pixels:
    if image_HWC.shape[:2] == spec.image_hw:
        return image_HWC
    return _crop_at(_pad(image_HWC, spec), spec.image_hw, place)


def seen_share(height: int, width: int, spec: InputSpec) -> float:
    """Return the share of an image's area that the evaluation transform shows the network."""
    resized_hw = _resized_hw(height, width, spec)
    shown_h, shown_w = (min(1.0, side / resized) for side, resized in zip(spec.image_hw, resized_hw, strict=True))
    return shown_h * shown_w


def _resized_hw(height: int, width: int, spec: InputSpec) -> tuple[int, int]:
    """Return to which height and width an image is resized before it is cropped: those that timm resizes it to."""
    target_h, target_w = (math.floor(side / spec.crop_pct) for side in spec.image_hw)
    if spec.crop_mode == "squash":
        return target_h, target_w
    if spec.crop_mode == "border" or target_h != target_w:
        choose = max if spec.crop_mode == "border" else min
        ratio = choose(height / target_h, width / target_w)
        return max(1, round(height / ratio)), max(1, round(width / ratio))
    # timm has torchvision resize to a square, which rounds the longer side down.
    longer = int(target_h * max(height, width) / min(height, width))
    return (target_h, longer) if height <= width else (longer, target_h)


def _resize(image_HWC: Pixels, target_hw: tuple[int, int], spec: InputSpec) -> Pixels:
    def resized(pixels: Pixels) -> Pixels:
        picture = Image.fromarray(pixels).resize((target_hw[1], target_hw[0]), FILTERS[spec.interpolation])
        return np.asarray(picture)

    if spec.in_chans == 3 and spec.range is None:
        return resized(image_HWC)
    # Pillow has neither other numbers of channels nor colour of more than 8 bits.
    planes = [resized(np.ascontiguousarray(image_HWC[:, :, channel])) for channel in range(spec.in_chans)]
    resized_HWC = planes[0][:, :, None] if len(planes) == 1 else np.stack(planes, axis=2)
    # As 8 bits are, where a filter overshoots.
    return resized_HWC if spec.range is None else np.clip(resized_HWC, 0.0, 1.0)


def _resize_strip(image_HWC: Pixels, target_hw: tuple[int, int], spec: InputSpec, place: str) -> Pixels:
    """Resize an image of 1 x 8000 pixels, say, of which the crop sees a small part, without the memory for all of it.

    Returns:
        That place of what `_resize` gives, by the same pixels: Pillow resizes the rows first and then the columns,
        each line for itself, and so it can be done in pieces that are cropped at once.
    """
    height, width = spec.image_hw
    widened_HWC = _resize(image_HWC, (image_HWC.shape[0], target_hw[1]), spec)
    image_HWC = _crop_at(widened_HWC, (image_HWC.shape[0], width), place)
    columns = max(1, MOST_RESIZED_PIXELS // (2 * target_hw[0]))
    pieces = [image_HWC[:, start : start + columns] for start in range(0, width, columns)]
    resized = (_resize(np.ascontiguousarray(piece), (target_hw[0], piece.shape[1]), spec) for piece in pieces)
    return np.concatenate([_crop_at(piece, (height, piece.shape[1]), place) for piece in resized], axis=1)


def _pad(image_HWC: Pixels, spec: InputSpec) -> Pixels:
    """Pad an image that is smaller than the crop with the mean color (`border` only)."""
    missing_h, missing_w = (max(0, side - own) for side, own in zip(spec.image_hw, image_HWC.shape[:2], strict=True))
    if not missing_h and not missing_w:
        return image_HWC
    top, left = missing_h // 2, missing_w // 2
    height, width = image_HWC.shape[:2]
    padded = np.empty((height + missing_h, width + missing_w, spec.in_chans), image_HWC.dtype)
    padded[:] = spec.mean_color
    padded[top : top + height, left : left + width] = image_HWC
    return padded


def _crop_at(image_HWC: Pixels, size_hw: tuple[int, int], place: str) -> Pixels:
    rest_h, rest_w = (side - size for side, size in zip(image_HWC.shape[:2], size_hw, strict=True))
    # Python's rounding to even of half a pixel, because torchvision's crop, and so timm's, has it.
    top, left = round(rest_h / 2.0), round(rest_w / 2.0)
    if place != CENTER:
        top, left = (rest_h if place.startswith("bottom") else 0), (rest_w if place.endswith("right") else 0)
    return np.ascontiguousarray(image_HWC[top : top + size_hw[0], left : left + size_hw[1]])
