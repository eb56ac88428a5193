"""Resolve how images become the input of a backbone: size, crop, interpolation, normalisation.

Promise: what stands for the size of all images depends on the training split as the source holds it, not on the seed, a
limit, a hold-out or what is skipped, so that all runs on one data set see their images in the same way.
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from tlscale.data.decode import PLAIN, BadImageError, Reading, header_hw
from tlscale.data.sources.tables import LabelledTable
from tlscale.errors import DataError, RecipeError
from tlscale.recipe.image_size import ImageSize, height_width, image_size_of
from tlscale.recipe.schema import DataSection

MOST_HEADERS = 256
SMALL_SHARE = 0.5
"""Of an image: who shows the network less of it should know. A photo of 4:3 under the usual crop keeps more."""
# What timm takes where a backbone's configuration is silent.
_DEFAULTS: dict[str, Any] = {
    "input_size": (3, 224, 224),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
}
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "hamming": Image.Resampling.HAMMING,
    "box": Image.Resampling.BOX,
}
_CROP_MODES = ("center", "squash", "border")
_SHOW_ALL = ("squash", "border")  # who names one of them in a recipe wants nothing cut off


@dataclass(frozen=True, slots=True)
class InputSpec:
    """How an image file becomes the backbone's input."""

    image_size: ImageSize  # in pixels: one number for a square, else height and width
    in_chans: int
    mean: tuple[float, ...]  # of each channel, 0..1
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str = "center"  # timm's: keep the aspect and cut, `squash` it, or pad it with a `border`
    range: tuple[float, float] | None = None  # the numbers that become 0 and 1; None: pixels of 8 bits
    channels_first: bool = False  # of arrays

    def to_plain(self) -> dict[str, Any]:
        """Return values that JSON and YAML know, those of `Reading` only where they are not the usual ones."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {key: value for key, value in plain.items() if key not in ("range", "channels_first") or value}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> InputSpec:
        """Read what `to_plain` gave, also after a trip through JSON."""
        lists: dict[str, Any] = {key: tuple(value) for key, value in plain.items() if isinstance(value, list)}
        return cls(**{**plain, **lists})

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width, in pixels."""
        return height_width(self.image_size)

    @property
    def shape_CHW(self) -> tuple[int, int, int]:  # noqa: N802
        """The shape of one image."""
        return (self.in_chans, *self.image_hw)

    @property
    def is_usual(self) -> bool:
        """Whether images are square, and grey or RGB of 8 bits."""
        return isinstance(self.image_size, int) and self.in_chans in (1, 3) and self.reading == PLAIN

    @property
    def reading(self) -> Reading:
        """What the numbers of images mean."""
        return Reading(self.range, self.channels_first)

    @property
    def mean_color(self) -> tuple[float, ...]:
        """The mean as a color of the pixels' type: what normalisation makes (nearly) zero."""
        return self.mean if self.range is not None else tuple(round(255 * value) for value in self.mean)


Measure = Callable[[], tuple[tuple[float, ...], tuple[float, ...]]]
"""Measures mean and deviation of each channel."""


def resolve_input(
    section: DataSection,
    *,
    in_chans: int,
    pretrained_cfg: Mapping[str, Any],
    sizes: Sequence[tuple[int, int]],
    measure: Measure | None = None,
) -> InputSpec:
    """Resolve the input of a backbone: what the recipe says, else what the backbone was pretrained with.

    For one channel, timm keeps the three numbers of its mean and std; here both are averaged over the channels, since
    the first filters are summed over theirs and so see a grey image as an RGB image with equal channels.

    Args:
        section: its `image_size`, `interpolation`, `crop_mode`, `crop_pct`, `mean` and `std` win.
        pretrained_cfg: timm's, as a mapping; keys that are missing or None have timm's defaults. A model that cannot
            take another size than its own reports that itself, when it is built.
        sizes: heights and widths that stand for those of all images (`sampled_sizes`). If most are smaller than the
            resized image that a crop would be cut from, nothing is cropped (crop_pct 1): enlarging images just to cut
            their edges off helps nobody.
        measure: what neither grey nor RGB has, as the backbone knows no mean of its channels.

    Raises:
        RecipeError: the backbone's interpolation is unknown, and the recipe gives none.
    """
    known = _DEFAULTS | {key: value for key, value in pretrained_cfg.items() if value is not None}
    image_size = section.image_size or image_size_of(*known["input_size"][1:])
    crop_pct = section.crop_pct
    if crop_pct is None and section.crop_mode in _SHOW_ALL:
        crop_pct = 1.0
    elif crop_pct is None:
        crop_pct = float(known["crop_pct"])
        crop_pct = crop_pct if _are_larger(sizes, height_width(image_size), crop_pct) else 1.0
    mean, std = section.mean or known["mean"], section.std or known["std"]
    if section.mean is None and measure is not None and len(mean) != in_chans and in_chans != 1:
        mean, std = measure()
    return InputSpec(
        image_size=image_size,
        in_chans=in_chans,
        mean=_per_channel(mean, in_chans),
        std=_per_channel(std, in_chans),
        interpolation=_interpolation(section.interpolation, known["interpolation"]),
        crop_pct=crop_pct,
        crop_mode=_crop_mode(section.crop_mode, known["crop_mode"]),
        range=None if section.range is None else (section.range[0], section.range[1]),
        channels_first=section.channels_first,
    )


def _are_larger(sizes: Sequence[tuple[int, int]], image_hw: tuple[int, int], crop_pct: float) -> bool:
    """Return whether at least half of the images are as large as what a crop would be cut from, on both sides."""
    least_hw = [math.ceil(side / crop_pct) for side in image_hw]
    return statistics.median_low([min(height - least_hw[0], width - least_hw[1]) for height, width in sizes]) >= 0


def _crop_mode(asked: str, pretrained: str) -> str:
    if asked != "auto":
        return asked
    return pretrained if pretrained in _CROP_MODES else "center"


def _interpolation(asked: str, pretrained: str) -> str:
    if asked != "auto":
        return asked
    if pretrained == "random":  # in training only; timm's evaluation has no such thing either
        return "bicubic"
    if pretrained not in FILTERS:
        raise RecipeError(
            f"the backbone's configuration names the interpolation '{pretrained}', which is not one of "
            f"{', '.join(FILTERS)}",
            remedy="Set data.interpolation.",
        )
    return pretrained


def _per_channel(values: list[float] | tuple[float, ...], in_chans: int) -> tuple[float, ...]:
    if len(values) == in_chans:
        return tuple(float(value) for value in values)
    return (sum(values) / len(values),) * in_chans


def sampled_rows(images: Sized) -> list[int]:
    """Return at most `MOST_HEADERS` rows of a table, or positions in a split, evenly spaced over it."""
    rows = np.linspace(0, len(images) - 1, min(MOST_HEADERS, len(images))).round().astype(np.int64)
    return [int(row) for row in np.unique(rows)]


def sampled_sizes(table: LabelledTable, reading: Reading = PLAIN) -> list[tuple[int, int]]:
    """Return height and width of at most `MOST_HEADERS` images, evenly spaced over the table.

    An image whose header cannot be read does not count: it is for those who decode it to find it bad.

    Raises:
        DataError: none of the headers can be read.
    """
    rows = sampled_rows(table)
    sizes: list[tuple[int, int]] = []
    errors: list[DataError] = []
    for row in rows:
        try:
            sizes.append(_size(table, row, reading))
        except DataError as error:
            errors.append(error)
    if not sizes:
        raise DataError(f"none of {len(rows)} training images can be read; the first: {errors[0]}")
    return sizes


def _size(table: LabelledTable, row: int, reading: Reading) -> tuple[int, int]:
    height, width = _size_in_header(table, row, reading)
    if min(height, width) < 1:
        raise BadImageError.at(table.where(row), f"{width} x {height} pixels: nothing to see", None)
    return height, width


def _size_in_header(table: LabelledTable, row: int, reading: Reading) -> tuple[int, int]:
    where, path = table.where(row), table.file_of(row)
    if path is not None:
        try:
            with path.open("rb") as file:  # a header is a small part of a photo
                return header_hw(file, where, reading)
        except OSError as error:
            raise BadImageError.at(where, f"cannot be read: {error.strerror or error}", None) from None
    raw = table.read(row)
    return raw.shape[:2] if isinstance(raw, np.ndarray) else header_hw(io.BytesIO(raw), where, reading)
