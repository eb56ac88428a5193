"""Transform images on their way from the decoder to the network: for an evaluation, or augment them; normalise and mix.

Promise: the evaluation transform gives, pixel for pixel, what timm's own gives for the same backbone. What augmentation
does to an image follows from its key alone (made from the seed, the epoch and the image's number), never from the
worker, the process, the batch or the images before it; the random generators of Python, NumPy and torch are as before
afterwards. Images stay uint8 (float32 in 0..1 where the recipe gives a range) up to the device, where `to_input`
normalises them.

Shape letters: B images of a batch, C channels, H height, W width, 4 the edges of a box.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from tlscale.data.decode import Pixels
from tlscale.data.input_spec import InputSpec
from tlscale.data.resize import resize_and_crop
from tlscale.data.views import CENTER, PLAIN, View
from tlscale.distributed.device import TensorBatch
from tlscale.distributed.settings import cpu_threads

Box = tuple[int, int, int, int]
_RANDAUGMENT_OPERATIONS = 2


# -- evaluate ---------------------------------------------------------------------------------------------------------


def eval_transform(image_HWC: Pixels, spec: InputSpec, places: Sequence[str] = (CENTER,)) -> Pixels:
    """Transform an image for evaluation: resize and crop it to the size of the spec, as timm does it.

    Args:
        image_HWC: as `decode_image` gives it, C as in the spec.
        places: where it is cropped, the centre or corners (`data.views`).

    Returns:
        Of the same type, of the height and width of the spec, and C, or the crops of several places side by side in C;
        the very same array where there is nothing to do.
    """
    crops = resize_and_crop(image_HWC, spec, places)
    return crops[0] if len(crops) == 1 else np.concatenate(crops, axis=2)


# -- augment ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mixes:
    """With which other image each image is mixed, and how."""

    partners_B: npt.NDArray[np.int64]
    lam_B: npt.NDArray[np.float32]  # share of the image itself
    boxes_B4: npt.NDArray[np.int64]  # y0 y1 x0 x1, pasted from the partner; all zero for mixup


class Augmenter:
    """The augmentations of a recipe."""

    def __init__(self, augment: Mapping[str, float | None], spec: InputSpec) -> None:
        """
        Args:
            augment: names with their numbers, as `augmentation_values` gives them; their order has no effect.
            spec: of the images.
        """
        assert set(augment) <= {*STEPS, *MIXES}, f"the schema takes no others than {[*STEPS, *MIXES]}"
        self._mix_alphas = {name: augment[name] or 0.0 for name in MIXES if name in augment}
        self._image_hw = spec.image_hw
        self._steps = [build(augment[name] or 0.0, spec) for name, build in STEPS.items() if name in augment]

    @property
    def mixes(self) -> bool:
        """Whether each image needs a partner."""
        return bool(self._mix_alphas)

    def augment(self, images: Iterable[Tensor], keys_B: npt.NDArray[np.uint64]) -> Tensor:
        """Augment images.

        Args:
            images: B tensors (C, H, W), of the spec's size unless there is a crop.
            keys_B: one key for each image.

        Returns:
            (B, C, H, W) of the same type.
        """
        if not self._steps:
            return images if isinstance(images, Tensor) else torch.stack(list(images))
        augmented = []
        with _own_randomness() as generator:
            for image_CHW, key in zip(images, keys_B, strict=True):
                # torch's CPU generator takes the low 32 bits of a seed: some images share their draws; no harm.
                generator.manual_seed(int(key))
                for step in self._steps:
                    image_CHW = step(image_CHW)
                augmented.append(image_CHW)
        return torch.stack(augmented)

    def draw_mixes(self, keys_B: npt.NDArray[np.uint64], num_images: int) -> Mixes:
        """Draw a partner for each image among all `num_images` of the split, so that the batch has no part in it."""
        draws = [self._draw_mix(int(key), num_images) for key in keys_B]
        partners, lams, boxes = zip(*draws, strict=True)
        return Mixes(np.array(partners, np.int64), np.array(lams, np.float32), np.array(boxes, np.int64))

    def _draw_mix(self, key: int, num_images: int) -> tuple[int, float, Box]:
        rng = np.random.Generator(np.random.Philox(key=key))
        partner, kind, y, x = rng.random(4)
        names = list(self._mix_alphas)
        name = names[int(kind * len(names))]  # both named: each image takes one, by a coin
        alpha = self._mix_alphas[name]
        lam = float(rng.beta(alpha, alpha))
        return int(partner * num_images), *MIXES[name](lam, y, x, self._image_hw)


def _cutmix(lam: float, y: float, x: float, image_hw: tuple[int, int]) -> tuple[float, Box]:
    """Return the share and place of a box of area 1 - lam and the image's proportions, around any of its points."""
    height, width = image_hw
    box_h, box_w = (int(side * (1.0 - lam) ** 0.5) for side in image_hw)
    top, left = int(y * height) - box_h // 2, int(x * width) - box_w // 2
    box = max(0, top), min(height, top + box_h), max(0, left), min(width, left + box_w)
    # The box is cut off at the edges and has whole pixels, so its area is what counts (Yun et al. 2019, CutMix).
    return 1.0 - (box[1] - box[0]) * (box[3] - box[2]) / (height * width), box


MIXES: dict[str, Callable[[float, float, float, tuple[int, int]], tuple[float, Box]]] = {
    "mixup": lambda lam, y, x, image_hw: (lam, (0, 0, 0, 0)),
    "cutmix": _cutmix,
}
"""By name, a function from (share of the image itself as drawn, place of the box down and across in 0..1, the image's
height and width) to the share of the image itself and the box. Where both are named, the order decides which of them a
draw takes."""


def _crop(number: float, spec: InputSpec) -> Callable[[Tensor], Tensor]:
    # Tensors have no `hamming` and `box`.
    mode = InterpolationMode("bilinear" if spec.interpolation in ("hamming", "box") else spec.interpolation)
    if mode is InterpolationMode.LANCZOS and not _takes_lanczos(spec):
        mode = InterpolationMode.BICUBIC
    # The usual range of a square crop's proportions, so that a picture is never distorted more than that.
    proportions = spec.image_hw[1] / spec.image_hw[0]
    ratio = (3 / 4 * proportions, 4 / 3 * proportions)
    crop = v2.RandomResizedCrop(spec.image_hw, scale=(number, 1.0), ratio=ratio, interpolation=mode, antialias=True)
    if spec.range is not None:  # whose filters overshoot, where 8 bits are clipped
        return lambda image_CHW: crop(image_CHW).clamp(0.0, 1.0)
    if mode is InterpolationMode.LANCZOS and not _tensors_have_lanczos():
        return lambda image_CHW: v2.functional.pil_to_tensor(crop(v2.functional.to_pil_image(image_CHW)))
    return crop  # type: ignore[no-any-return]


def _takes_lanczos(spec: InputSpec) -> bool:
    """Return whether torch has it, or Pillow, which has only grey and RGB of 8 bits."""
    return (spec.range is None and spec.in_chans in (1, 3)) or _tensors_have_lanczos()


@functools.cache
def _tensors_have_lanczos() -> bool:
    """Return whether torch resizes tensors so; where it does not, as torch 2.11, Pillow does."""
    try:
        F.interpolate(torch.zeros(1, 1, 2, 2), size=1, mode="lanczos", antialias=True)
    except (NotImplementedError, ValueError):
        return False
    return True


def _fill(spec: InputSpec) -> list[float]:
    return [float(value) for value in spec.mean_color]


def _blur(number: float, spec: InputSpec) -> Callable[[Tensor], Tensor]:
    # As SimCLR does it (Chen et al. 2020, appendix A): a kernel of a tenth of the image, sigma from 0.1 to 2 pixels.
    kernel_px = max(3, min(spec.image_hw) // 10 | 1)
    return v2.RandomApply([v2.GaussianBlur(kernel_px, sigma=(0.1, 2.0))], p=number)  # type: ignore[no-any-return]


# The space of TrivialAugment Wide (Mueller and Hutter 2021, table 1) without the operations on color: the largest
# strength of each; a shift is a share of the side, so that a small image is not moved out of sight: 32 pixels of 224.
# One operation an image, each as likely as the others, at a strength between none and the largest.
_MOVES = {"identity": 0.0, "shear_x": 0.99, "shear_y": 0.99, "shift_x": 1 / 7, "shift_y": 1 / 7, "rotate": 135.0}
_NUM_STRENGTHS = 31


def _move(image_CHW: Tensor, fill: list[float]) -> Tensor:
    """Shear, shift or rotate an image by a strength and in a direction that are drawn."""
    operation, strength, sign = (int(torch.randint(many, ())) for many in (len(_MOVES), _NUM_STRENGTHS, 2))
    name = list(_MOVES)[operation]
    by = _MOVES[name] * strength / (_NUM_STRENGTHS - 1) * (1 if sign else -1)
    if by == 0:
        return image_CHW
    angle = by if name == "rotate" else 0.0
    height, width = image_CHW.shape[1:]
    shift = [round(by * width) if name == "shift_x" else 0, round(by * height) if name == "shift_y" else 0]
    shear = [math.degrees(math.atan(by)) if name == f"shear_{axis}" else 0.0 for axis in "xy"]
    moved: Tensor = v2.functional.affine(image_CHW, angle, shift, 1.0, shear, interpolation=_BILINEAR, fill=fill)
    return moved


_BILINEAR = InterpolationMode.BILINEAR
STEPS: dict[str, Callable[[float, InputSpec], Callable[[Tensor], Tensor]]] = {
    "crop": _crop,
    "flip": lambda number, spec: v2.RandomHorizontalFlip(number),
    "vertical_flip": lambda number, spec: v2.RandomVerticalFlip(number),
    "rotation": lambda number, spec: v2.RandomRotation(number, interpolation=_BILINEAR, fill=_fill(spec)),
    "color_jitter": lambda number, spec: v2.ColorJitter(brightness=number, contrast=number, saturation=number),
    "trivialaugment": lambda number, spec: v2.TrivialAugmentWide(interpolation=_BILINEAR),
    "trivialaugment_geometric": lambda number, spec: functools.partial(_move, fill=_fill(spec)),
    "randaugment": lambda number, spec: v2.RandAugment(_RANDAUGMENT_OPERATIONS, round(number), interpolation=_BILINEAR),
    "blur": _blur,
    "erasing": lambda number, spec: v2.RandomErasing(number, value=_fill(spec)),
}
"""By name, a function from (number, 0 for those that take none; the spec of the images) to what is done to each image;
in the order in which they are applied, the usual one: crop, flips, rotation, color, policy, blur,
and what is erased last of all.

A new augmentation is a row here (or in `MIXES`) and a row in `tlscale.recipe.field_types.AUGMENTATIONS`."""


@contextmanager
def _own_randomness() -> Iterator[torch.Generator]:
    """Lend torchvision torch's CPU generator, which it draws from, and give it back as it was.

    One thread, as in a worker process: so that no sum has another order there than here.
    """
    generator = torch.default_generator
    state = generator.get_state()
    try:
        with cpu_threads(1):
            yield generator
    finally:
        generator.set_state(state)


# -- on the device ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class ImageBatch(TensorBatch):
    """Images on their way to the device; rows from `num_real` on are padding and weigh nothing."""

    images_BCHW: Tensor  # uint8, or float32 in 0..1
    labels_B: Tensor  # int64
    rows_B: Tensor  # int64: which image of its split
    num_real: int
    # The other image of mixup or cutmix; all four or none.
    partners_BCHW: Tensor | None = None
    partner_labels_B: Tensor | None = None  # int64
    lam_B: Tensor | None = None  # float32: share of the image itself, in pixels and in the target
    boxes_B4: Tensor | None = None  # int64, y0 y1 x0 x1: pasted from the partner; without area it is mixup
    targets_BT: Tensor | None = None  # outputs of a teacher for each image


def normalise(images_BCHW: Tensor, spec: InputSpec, dtype: torch.dtype) -> Tensor:
    """Normalise images to mean 0 and deviation 1, computed in and given as `dtype`."""
    white = 255 if spec.range is None else 1
    mean_C11, std_C11 = _mean_std(spec.mean, spec.std, white, dtype, images_BCHW.device)
    return images_BCHW.to(dtype, copy=True).sub_(mean_C11).div_(std_C11)


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
        return (self._ordered(to_input(self._moved(batch), self.spec, self.dtype)),)

    def of_views(self, batch: ImageBatch, views: Sequence[View]) -> tuple[Tensor, ...]:
        """Turn a batch into an input for each view; its images have the crops of all their places side by side."""
        if tuple(views) == (PLAIN,):
            return self(batch)
        batch = self._moved(batch)
        places = list(dict.fromkeys(view.place for view in views))
        crops = batch.images_BCHW.chunk(len(places), dim=1)
        inputs = {}
        for place, crop_BCHW in zip(places, crops, strict=True):
            # A slice has strides by which some kernels sum in another order than for images by themselves.
            images_BCHW = crop_BCHW.clone(memory_format=torch.contiguous_format)
            inputs[place] = to_input(replace(batch, images_BCHW=images_BCHW), self.spec, self.dtype)
        return tuple(self._ordered(inputs[view.place].flip(view.dims)) for view in views)

    def _moved(self, batch: ImageBatch) -> ImageBatch:
        if self.device.type == "cuda" and not batch.images_BCHW.is_cuda and not batch.images_BCHW.is_pinned():
            batch = batch.pin_memory()  # else the host would wait until the GPU has computed all before the copy
        return batch.to(self.device, non_blocking=True)

    def _ordered(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW.contiguous(memory_format=torch.channels_last) if self.channels_last else images_BCHW


@functools.lru_cache(maxsize=32)
def _mean_std(
    mean: tuple[float, ...], std: tuple[float, ...], white: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Put mean and deviation on the device, once: done in each step, the host would wait for the device."""
    with torch.inference_mode(False):  # made in an evaluation, they serve in training as well
        both = torch.tensor([mean, std], dtype=torch.float64).mul(white).to(dtype).to(device)
        return both[0, :, None, None], both[1, :, None, None]
