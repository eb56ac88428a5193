"""Augmentation, as a pure function of an image and of its key.

Promise: what happens to an image follows from its key alone (made from the seed, the epoch and the image's number),
never from the worker, the process, the batch or the images before it. The random generators of Python, NumPy and torch
are as before afterwards.

Shape letters: B images of a batch, C channels, H height, W width, S image size, 4 the edges of a box.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

_RANDAUGMENT_OPERATIONS = 2


@dataclass(frozen=True, slots=True)
class Mixes:
    """With which other image each image is mixed, and how."""

    partners_B: npt.NDArray[np.int64]
    lam_B: npt.NDArray[np.float32]  # share of the image itself
    boxes_B4: npt.NDArray[np.int64]  # y0 y1 x0 x1, pasted from the partner; all zero for mixup


class Augmenter:
    """The augmentations of a recipe."""

    def __init__(
        self,
        augment: Mapping[str, float | None],
        *,
        image_size: int,
        interpolation: str,
        erase_color: tuple[int, ...],
    ) -> None:
        """
        Args:
            augment: names with their numbers, as `augmentation_values` gives them; their order has no effect.
            image_size: S, in pixels.
            interpolation: of a crop's resize; `hamming` and `box`, which tensors do not have, become bilinear.
            erase_color: one number of 0..255 for each channel.
        """
        self._mix_alphas = {name: alpha for name in ("mixup", "cutmix") if (alpha := augment.get(name)) is not None}
        self._image_size = image_size
        self._steps = _image_steps(augment, image_size, interpolation, erase_color)

    @property
    def mixes(self) -> bool:
        """Whether each image needs a partner."""
        return bool(self._mix_alphas)

    def augment(self, images: Iterable[Tensor], keys_B: npt.NDArray[np.uint64]) -> Tensor:
        """The augmented images.

        Args:
            images: B uint8 tensors (C, H, W): of size S x S unless there is a crop.
            keys_B: one key for each image.

        Returns:
            uint8 (B, C, S, S).
        """
        if not self._steps:
            return images if isinstance(images, Tensor) else torch.stack(list(images))
        with _own_randomness() as generator:
            return torch.stack([self._one(image, key, generator) for image, key in zip(images, keys_B, strict=True)])

    def _one(self, image_CHW: Tensor, key: np.uint64, generator: torch.Generator) -> Tensor:
        # torch's CPU generator takes the low 32 bits of a seed: some images share their draws, which does no harm.
        generator.manual_seed(int(key))
        for step in self._steps:
            image_CHW = step(image_CHW)
        return image_CHW

    def draw_mixes(self, keys_B: npt.NDArray[np.uint64], num_images: int) -> Mixes:
        """A partner for each image among all `num_images` of the split, so that the batch has no part in it."""
        draws = [self._draw_mix(int(key), num_images) for key in keys_B]
        partners, lams, boxes = zip(*draws, strict=True)
        return Mixes(np.array(partners, np.int64), np.array(lams, np.float32), np.array(boxes, np.int64))

    def _draw_mix(self, key: int, num_images: int) -> tuple[int, float, tuple[int, int, int, int]]:
        rng = np.random.Generator(np.random.Philox(key=key))
        partner, kind, y, x = rng.random(4)
        names = list(self._mix_alphas)
        name = names[int(kind * len(names))]  # both named: each image takes one, by a coin
        alpha = self._mix_alphas[name]
        lam = float(rng.beta(alpha, alpha))
        partner_row = int(partner * num_images)
        if name == "mixup":
            return partner_row, lam, (0, 0, 0, 0)
        box = _cut_box(lam, y, x, self._image_size)
        # The box is cut off at the edges and has whole pixels, so its area is what counts (Yun et al. 2019, CutMix).
        return partner_row, 1.0 - (box[1] - box[0]) * (box[3] - box[2]) / self._image_size**2, box


def _cut_box(lam: float, y: float, x: float, size: int) -> tuple[int, int, int, int]:
    """A square of area 1 - lam around a point anywhere in the image; y and x are in 0..1."""
    side = int(size * (1.0 - lam) ** 0.5)
    top, left = int(y * size) - side // 2, int(x * size) - side // 2
    return max(0, top), min(size, top + side), max(0, left), min(size, left + side)


def _image_steps(
    augment: Mapping[str, float | None], image_size: int, interpolation: str, erase_color: tuple[int, ...]
) -> list[v2.Transform]:
    """In the usual order: crop, flip, policy, and what is erased last of all."""
    steps: list[v2.Transform] = []
    if (least_area := augment.get("crop")) is not None:
        steps.append(_crop(image_size, least_area, interpolation))
    if (probability := augment.get("flip")) is not None:
        steps.append(v2.RandomHorizontalFlip(probability))
    if "trivialaugment" in augment:
        steps.append(v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR))
    if (magnitude := augment.get("randaugment")) is not None:
        steps.append(
            v2.RandAugment(_RANDAUGMENT_OPERATIONS, round(magnitude), interpolation=InterpolationMode.BILINEAR)
        )
    if (probability := augment.get("erasing")) is not None:
        steps.append(v2.RandomErasing(probability, value=[float(value) for value in erase_color]))
    return steps


def _crop(image_size: int, least_area: float, interpolation: str) -> v2.Transform:
    mode = InterpolationMode("bilinear" if interpolation in ("hamming", "box") else interpolation)
    return v2.RandomResizedCrop(image_size, scale=(least_area, 1.0), interpolation=mode, antialias=True)


@contextmanager
def _own_randomness() -> Iterator[torch.Generator]:
    """torchvision draws from torch's CPU generator; lend it, and give it back as it was.

    One thread, as in a worker process: so that no sum has another order there than here.
    """
    generator = torch.default_generator
    state, num_threads = generator.get_state(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield generator
    finally:
        generator.set_state(state)
        torch.set_num_threads(num_threads)
