"""Augmentation, as a pure function of an image and of its key.

Promise: what happens to an image follows from its key alone (made from the seed, the epoch and the image's number),
never from the worker, the process, the batch or the images before it. The random generators of Python, NumPy and torch
are as before afterwards.

Shape letters: B images of a batch, C channels, H height, W width, S image size, 4 the edges of a box.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from tlscale.errors import RecipeError, did_you_mean

_RANDAUGMENT_OPERATIONS = 2
Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Look:
    """What augmented images look like: size in pixels, how a crop is resized, and the color of what is erased."""

    image_size: int
    interpolation: str
    erase_color: tuple[int, ...]


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

        Raises:
            RecipeError: there is no such augmentation.
        """
        unknown = sorted(set(augment) - {*STEPS, *MIXES})
        if unknown:
            raise RecipeError(
                f"there is no '{unknown[0]}'.{did_you_mean(unknown[0], [*STEPS, *MIXES])} There are: "
                f"{', '.join((*STEPS, *MIXES))}",
                key="data.augment",
            )
        look = Look(image_size, interpolation, erase_color)
        self._mix_alphas = {name: augment[name] or 0.0 for name in MIXES if name in augment}
        self._image_size = image_size
        self._steps = [build(augment[name] or 0.0, look) for name, build in STEPS.items() if name in augment]

    @property
    def mixes(self) -> bool:
        """Whether each image needs a partner."""
        return bool(self._mix_alphas)

    def augment(self, images: Iterable[Tensor], keys_B: npt.NDArray[np.uint64]) -> Tensor:
        """Augment images.

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
        return int(partner * num_images), *MIXES[name](lam, y, x, self._image_size)


def _cut_box(lam: float, y: float, x: float, size: int) -> Box:
    """Return a square of area 1 - lam around a point anywhere in the image; y and x are in 0..1."""
    side = int(size * (1.0 - lam) ** 0.5)
    top, left = int(y * size) - side // 2, int(x * size) - side // 2
    return max(0, top), min(size, top + side), max(0, left), min(size, left + side)


def _mixup(lam: float, y: float, x: float, size: int) -> tuple[float, Box]:
    return lam, (0, 0, 0, 0)


def _cutmix(lam: float, y: float, x: float, size: int) -> tuple[float, Box]:
    box = _cut_box(lam, y, x, size)
    # The box is cut off at the edges and has whole pixels, so its area is what counts (Yun et al. 2019, CutMix).
    return 1.0 - (box[1] - box[0]) * (box[3] - box[2]) / size**2, box


MIXES: dict[str, Callable[[float, float, float, int], tuple[float, Box]]] = {"mixup": _mixup, "cutmix": _cutmix}
"""By name, a function from (share of the image itself as drawn, place of the box down and across in 0..1, image size)
to the share of the image itself and the box. Where both are named, the order decides which of them a draw takes."""


def _crop(number: float, look: Look) -> v2.Transform:
    mode = InterpolationMode("bilinear" if look.interpolation in ("hamming", "box") else look.interpolation)
    return v2.RandomResizedCrop(look.image_size, scale=(number, 1.0), interpolation=mode, antialias=True)


def _flip(number: float, look: Look) -> v2.Transform:
    return v2.RandomHorizontalFlip(number)


def _trivialaugment(number: float, look: Look) -> v2.Transform:
    return v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR)


def _randaugment(number: float, look: Look) -> v2.Transform:
    return v2.RandAugment(_RANDAUGMENT_OPERATIONS, round(number), interpolation=InterpolationMode.BILINEAR)


def _erasing(number: float, look: Look) -> v2.Transform:
    return v2.RandomErasing(number, value=[float(value) for value in look.erase_color])


STEPS: dict[str, Callable[[float, Look], v2.Transform]] = {
    "crop": _crop,
    "flip": _flip,
    "trivialaugment": _trivialaugment,
    "randaugment": _randaugment,
    "erasing": _erasing,
}
"""By name, a function from (number, 0 for those that take none; what images look like) to what is done to each image;
in the order in which they are applied, the usual one: crop, flip, policy, and what is erased last of all.

A new augmentation is a row here (or in `MIXES`) and a row in `tlscale.recipe.field_types.AUGMENTATIONS`."""


@contextmanager
def _own_randomness() -> Iterator[torch.Generator]:
    """Lend torchvision torch's CPU generator, which it draws from, and give it back as it was.

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
