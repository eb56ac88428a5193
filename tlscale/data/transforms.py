"""Transform images to the input of a backbone (size, crop, interpolation, normalisation), in batches.

Promise: the evaluation transform gives, pixel for pixel, what timm's own gives for the same backbone. Images stay
uint8 up to the device, where `to_input` makes them numbers.

Shape letters: B images of a batch, C channels, H height, W width, 4 the edges of a box.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from tlscale.errors import RecipeError
from tlscale.recipe.schema import DataSection

Pixels = npt.NDArray[np.uint8]

# What timm takes where a backbone's configuration is silent.
_DEFAULTS: dict[str, Any] = {
    "input_size": (3, 224, 224),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
}
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "hamming": Image.Resampling.HAMMING,
    "box": Image.Resampling.BOX,
}
MOST_RESIZED_PIXELS = 1 << 25
"""Larger results of a resize are cropped piece by piece."""
_CROP_MODES = ("center", "squash", "border")
_SHOW_ALL = ("squash", "border")  # who names one of them in a recipe wants nothing cut off


@dataclass(frozen=True, slots=True)
class InputSpec:
    """How an image file becomes the backbone's input."""

    image_size: int  # height and width, in pixels
    in_chans: int
    mean: tuple[float, ...]  # of each channel, 0..1
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str = "center"  # timm's: keep the aspect and cut, `squash` it, or pad it with a `border`

    def to_plain(self) -> dict[str, Any]:
        """Return values that JSON and YAML know."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> InputSpec:
        """Read what `to_plain` gave, also after a trip through JSON."""
        lists: dict[str, Any] = {key: tuple(value) for key, value in plain.items() if isinstance(value, list)}
        return cls(**{**plain, **lists})

    @property
    def mean_color(self) -> tuple[int, ...]:
        """The mean as a uint8 color: what normalisation makes (nearly) zero."""
        return tuple(round(255 * value) for value in self.mean)


def resolve_input(
    section: DataSection, *, in_chans: int, pretrained_cfg: Mapping[str, Any], image_hw: tuple[int, int]
) -> InputSpec:
    """Resolve the input of a backbone: what the recipe says, else what the backbone was pretrained with.

    For one channel, timm keeps the three numbers of its mean and std; here both are averaged over the channels, since
    the first filters are summed over theirs and so see a grey image as an RGB image with equal channels.

    Args:
        section: its `image_size`, `interpolation`, `crop_mode`, `crop_pct`, `mean` and `std` win.
        pretrained_cfg: timm's, as a mapping; keys that are missing or None have timm's defaults. A model that cannot
            take another size than its own reports that itself, when it is built.
        image_hw: height and width that stand for those of all images (`sizes.median_side_px`). Images smaller than the
            resized image that a crop would be cut from are not cropped (crop_pct 1): enlarging them just to cut their
            edges off helps nobody.

    Raises:
        RecipeError: the backbone's own size is not square, or its interpolation is unknown, and the recipe gives none.
    """
    known = _DEFAULTS | {key: value for key, value in pretrained_cfg.items() if value is not None}
    image_size = section.image_size or _square(known["input_size"])
    crop_pct = section.crop_pct
    if crop_pct is None and section.crop_mode in _SHOW_ALL:
        crop_pct = 1.0
    elif crop_pct is None:
        crop_pct = float(known["crop_pct"])
        crop_pct = crop_pct if min(image_hw) >= math.ceil(image_size / crop_pct) else 1.0
    return InputSpec(
        image_size=image_size,
        in_chans=in_chans,
        mean=_per_channel(section.mean or known["mean"], in_chans),
        std=_per_channel(section.std or known["std"], in_chans),
        interpolation=_interpolation(section.interpolation, known["interpolation"]),
        crop_pct=crop_pct,
        crop_mode=_crop_mode(section.crop_mode, known["crop_mode"]),
    )


def _square(input_size: tuple[int, int, int]) -> int:
    _, height, width = input_size
    if height != width:
        raise RecipeError(
            f"the backbone was pretrained on images of {height} x {width} pixels, and tlscale feeds square ones",
            remedy=f"Set data.image_size, such as {min(height, width)}, if the backbone can take it.",
        )
    return height


def _crop_mode(asked: str, pretrained: str) -> str:
    if asked != "auto":
        return asked
    return pretrained if pretrained in _CROP_MODES else "center"


def _interpolation(asked: str, pretrained: str) -> str:
    if asked != "auto":
        return asked
    if pretrained == "random":  # in training only; timm's evaluation has no such thing either
        return "bicubic"
    if pretrained not in _FILTERS:
        raise RecipeError(
            f"the backbone's configuration names the interpolation '{pretrained}', which is not one of "
            f"{', '.join(_FILTERS)}",
            remedy="Set data.interpolation.",
        )
    return pretrained


def _per_channel(values: list[float] | tuple[float, ...], in_chans: int) -> tuple[float, ...]:
    if len(values) == in_chans:
        return tuple(float(value) for value in values)
    return (sum(values) / len(values),) * in_chans


def eval_transform(image_HWC: Pixels, spec: InputSpec) -> Pixels:
    """Transform an image for evaluation: resize and crop it to the size of the spec, as timm does it.

    Args:
        image_HWC: uint8, C as in the spec.

    Returns:
        uint8 of shape (image_size, image_size, C); the very same array where there is nothing to do.
    """
    height, width = image_HWC.shape[:2]
    target_hw = _resized_hw(height, width, spec)
    if target_hw[0] * target_hw[1] > MOST_RESIZED_PIXELS:
        image_HWC = _resize_strip(image_HWC, target_hw, spec)
    elif (height, width) != target_hw:
        image_HWC = _resize(image_HWC, target_hw, spec)
    if image_HWC.shape[:2] != (spec.image_size, spec.image_size):
        image_HWC = _center_crop(_pad(image_HWC, spec), (spec.image_size, spec.image_size))
    return image_HWC


def seen_share(height: int, width: int, spec: InputSpec) -> float:
    """Return the share of an image's area that the evaluation transform shows the network."""
    resized_h, resized_w = _resized_hw(height, width, spec)
    return min(1.0, spec.image_size / resized_h) * min(1.0, spec.image_size / resized_w)


def _resized_hw(height: int, width: int, spec: InputSpec) -> tuple[int, int]:
    resized = math.floor(spec.image_size / spec.crop_pct)
    if spec.crop_mode == "squash":
        return resized, resized
    if spec.crop_mode == "border":
        ratio = max(height / resized, width / resized)
        return max(1, round(height / ratio)), max(1, round(width / ratio))
    longer = int(resized * max(height, width) / min(height, width))
    return (resized, longer) if height <= width else (longer, resized)


def _resize(image_HWC: Pixels, target_hw: tuple[int, int], spec: InputSpec) -> Pixels:
    picture = Image.fromarray(image_HWC[:, :, 0] if spec.in_chans == 1 else image_HWC)
    resized = np.asarray(picture.resize((target_hw[1], target_hw[0]), _FILTERS[spec.interpolation]))
    return resized[:, :, None] if spec.in_chans == 1 else resized


def _resize_strip(image_HWC: Pixels, target_hw: tuple[int, int], spec: InputSpec) -> Pixels:
    """Resize an image of 1 x 8000 pixels, say, of which the crop sees a small part, without the memory for all of it.

    Returns:
        The centre of what `_resize` gives, by the same pixels: Pillow resizes the rows first and then the columns,
        each line for itself, and so it can be done in pieces that are cropped at once.
    """
    size = spec.image_size
    image_HWC = _center_crop(_resize(image_HWC, (image_HWC.shape[0], target_hw[1]), spec), (image_HWC.shape[0], size))
    columns = max(1, MOST_RESIZED_PIXELS // (2 * target_hw[0]))
    pieces = [image_HWC[:, start : start + columns] for start in range(0, size, columns)]
    resized = (_resize(np.ascontiguousarray(piece), (target_hw[0], piece.shape[1]), spec) for piece in pieces)
    return np.concatenate([_center_crop(piece, (size, piece.shape[1])) for piece in resized], axis=1)


def _pad(image_HWC: Pixels, spec: InputSpec) -> Pixels:
    """Pad an image that is smaller than the crop with the mean color (`border` only)."""
    missing_h, missing_w = (max(0, spec.image_size - side) for side in image_HWC.shape[:2])
    if not missing_h and not missing_w:
        return image_HWC
    top, left = missing_h // 2, missing_w // 2
    height, width = image_HWC.shape[:2]
    padded = np.empty((height + missing_h, width + missing_w, spec.in_chans), np.uint8)
    padded[:] = spec.mean_color
    padded[top : top + height, left : left + width] = image_HWC
    return padded


def _center_crop(image_HWC: Pixels, size_hw: tuple[int, int]) -> Pixels:
    # Python's rounding to even of half a pixel, because torchvision's crop, and so timm's, has it.
    top, left = (round((side - size) / 2.0) for side, size in zip(image_HWC.shape[:2], size_hw, strict=True))
    return np.ascontiguousarray(image_HWC[top : top + size_hw[0], left : left + size_hw[1]])


class TensorBatch:
    """Move the tensors of a dataclass, and those in its tuples, as one."""

    __slots__ = ()

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """Copy the batch to `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Copy the batch to page-locked memory; torch's loader calls this by its name."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = change(value)
            elif isinstance(value, tuple):
                values[name] = tuple(map(change, value))
        return type(self)(**values)


@dataclass(slots=True)
class ImageBatch(TensorBatch):
    """Images on their way to the device; rows from `num_real` on are padding and weigh nothing."""

    images_BCHW: Tensor  # uint8
    labels_B: Tensor  # int64
    rows_B: Tensor  # int64: which image of its split
    num_real: int
    # The other image of mixup or cutmix; all four or none.
    partners_BCHW: Tensor | None = None  # uint8
    partner_labels_B: Tensor | None = None  # int64
    lam_B: Tensor | None = None  # float32: share of the image itself, in pixels and in the target
    boxes_B4: Tensor | None = None  # int64, y0 y1 x0 x1: pasted from the partner; without area it is mixup
    targets_BT: Tensor | None = None  # outputs of a teacher for each image


def normalise(images_BCHW: Tensor, spec: InputSpec, dtype: torch.dtype) -> Tensor:
    """Normalise uint8 images to mean 0 and deviation 1, computed in and given as `dtype`."""
    mean_C11, std_C11 = _mean_std(spec.mean, spec.std, dtype, images_BCHW.device)
    return images_BCHW.to(dtype).sub_(mean_C11).div_(std_C11)


def to_input(batch: ImageBatch, spec: InputSpec, dtype: torch.dtype) -> Tensor:
    """Make the backbone's input, on the device of the batch: normalised and, where it has partners, mixed.

    Returns:
        (B, C, H, W) of `dtype`. Computed in float32, or float64 for float64.
    """
    work_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    images_BCHW = normalise(batch.images_BCHW, spec, work_dtype)
    if batch.partners_BCHW is None or batch.lam_B is None or batch.boxes_B4 is None:
        return images_BCHW.to(dtype)
    partners_BCHW = normalise(batch.partners_BCHW, spec, work_dtype)
    height, width = images_BCHW.shape[2:]
    y0_B11, y1_B11, x0_B11, x1_B11 = batch.boxes_B4[:, :, None, None].unbind(1)
    y_H1 = torch.arange(height, device=images_BCHW.device)[:, None]
    x_W = torch.arange(width, device=images_BCHW.device)
    inside_BHW = (y_H1 >= y0_B11) & (y_H1 < y1_B11) & (x_W >= x0_B11) & (x_W < x1_B11)
    is_cut_B11 = (y1_B11 > y0_B11) & (x1_B11 > x0_B11)
    lam_B11 = batch.lam_B.to(work_dtype)[:, None, None]
    share_BHW = torch.where(is_cut_B11, (~inside_BHW).to(work_dtype), lam_B11)
    # lerp is exact at both ends, so pixels outside a box are the image's own.
    return torch.lerp(partners_BCHW, images_BCHW, share_BHW[:, None]).to(dtype)


@dataclass(frozen=True)
class InputPath:
    """Turn a batch of uint8 images into the network's input on this process's device."""

    spec: InputSpec
    dtype: torch.dtype
    device: torch.device
    channels_last: bool

    def __call__(self, batch: ImageBatch) -> tuple[Tensor]:
        if self.device.type == "cuda" and not batch.images_BCHW.is_cuda and not batch.images_BCHW.is_pinned():
            batch = batch.pin_memory()  # else the host would wait until the GPU has computed all before the copy
        images_BCHW = to_input(batch.to(self.device, non_blocking=True), self.spec, self.dtype)
        return (images_BCHW.contiguous(memory_format=torch.channels_last) if self.channels_last else images_BCHW,)


@functools.lru_cache(maxsize=32)
def _mean_std(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Put mean and deviation on the device, once: done in each step, the host would wait for the device."""
    with torch.inference_mode(False):  # made in an evaluation, they serve in training as well
        both = torch.tensor([mean, std], dtype=torch.float64).mul(255).to(dtype).to(device)
        return both[0, :, None, None], both[1, :, None, None]
