"""Give a student its teacher's targets: cached codes, standardised, next to each batch of images.

Promise: the teacher sees each image (and, with augmentation, each view of it) once, in the pixels' own size for it but
with the same cut, flip and colours as the student; codes that are cached are not computed again.

Shapes: B images of a batch, N of a split, D numbers of a code, T of all that is learned.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tlscale.codes.batches import CodeViews
from tlscale.codes.cache import CodesCache
from tlscale.codes.parts import Part, layer_parts
from tlscale.codes.reader import Codes
from tlscale.data.sampler import Ints, MicroBatch
from tlscale.data.sources.open import ImageSplit
from tlscale.data.transforms import ImageBatch
from tlscale.training.distillation.teacher import LOGITS, Teacher

_CHUNK = 4096


class TeacherTargets:
    """Give the teacher's answers on the images of a run.

    Codes are standardised, each number by its mean and deviation over all views of the training images: every number
    counts alike, whatever layer it is of. Logits are as they are, in the order of the run's classes.
    """

    def __init__(self, teacher: Teacher, codes_cache: CodesCache, views: Sequence[int], dtype: torch.dtype) -> None:
        """Get or compute the codes of the training images: of those views that the run sees.

        Raises:
            DataError: an image cannot be read.
            Stopped: the run was asked to stop; what was computed stays.
        """
        self._teacher, self._codes_cache, self._dtype = teacher, codes_cache, dtype
        self._parts = _parts(teacher)
        self._train = codes_cache.train_views(teacher.module, self._parts, views)
        self._splits: dict[str, CodeViews] = {}
        self._mean_D, self._std_D = _mean_and_deviation(self._chunks(self._train))

    def codes(self) -> dict[str, Codes]:
        """Return the codes that are open by now, by split and view."""
        return self._train.by_name("train") | {name: kept.views[0] for name, kept in self._splits.items()}

    def of_training(self, batch: ImageBatch, epoch: int) -> ImageBatch:
        """Return a batch of the epoch with its targets."""
        return self._taught(batch, self._train, epoch)

    def of_split(self, split: ImageSplit, batches: Iterable[ImageBatch]) -> Generator[ImageBatch, None, None]:
        """Give batches of a split, as it is evaluated, with their targets."""
        if split.name not in self._splits:
            codes = self._codes_cache.codes(self._teacher.module, self._parts, split)
            self._splits[split.name] = CodeViews({0: codes}, split.labels_N)
        for batch in batches:
            yield self._taught(batch, self._splits[split.name], 0)

    def _taught(self, batch: ImageBatch, kept: CodeViews, epoch: int) -> ImageBatch:
        rows_B = batch.rows_B.numpy()
        values = kept.batch(MicroBatch(epoch, rows_B, batch.num_real)).codes
        num_layers = len(self._teacher.layers)
        parts = []
        if num_layers:
            parts.append(((_joined(values[:num_layers]) - self._mean_D) / self._std_D).to(self._dtype))
        if self._teacher.class_order_C is not None:
            parts.append(values[num_layers].to(self._dtype)[:, self._teacher.class_order_C])
        targets_BT = torch.cat(parts, 1)
        if batch.images_BCHW.is_pinned():  # else the host would wait for the device in each step, for this copy
            targets_BT = targets_BT.pin_memory()
        return replace(batch, targets_BT=targets_BT)

    def _chunks(self, kept: CodeViews) -> Iterator[Tensor]:
        """Give all codes of all views, (at most `_CHUNK`, D) float64 at a time."""
        if not self._teacher.layers:
            return
        for codes in kept.views.values():
            for start in range(0, len(codes), _CHUNK):
                positions_B: Ints = np.arange(start, min(start + _CHUNK, len(codes)))
                yield _joined(codes.take(positions_B)[: len(self._teacher.layers)])


def _parts(teacher: Teacher) -> list[Part]:
    """Name the codes as a probe does, so that they may be cached already."""
    parts = layer_parts(teacher.backbone, [(layer, "avg") for layer in teacher.layers]) if teacher.layers else []
    return [*parts, *([Part(teacher.digest, (LOGITS,), ("as is",))] if teacher.asks_logits else [])]


def _joined(values: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([value.double() for value in values], 1)


def _mean_and_deviation(chunks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute both of each number, (D,) float64; one that never changes has a deviation of 1, and so a target of 0."""
    kept = [(len(chunk_BD), chunk_BD.sum(0), chunk_BD.square().sum(0)) for chunk_BD in chunks]
    if not kept:
        return torch.zeros(0), torch.ones(0)
    count = sum(length for length, _, _ in kept)
    mean_D = torch.stack([total_D for _, total_D, _ in kept]).sum(0) / count
    variance_D = torch.stack([square_D for _, _, square_D in kept]).sum(0) / count - mean_D.square()
    # What is left of a constant by rounding is no deviation.
    is_constant_D = variance_D <= 1e-10 * mean_D.square().clamp(min=1e-20)
    return mean_D, torch.where(is_constant_D, torch.ones_like(mean_D), variance_D.clamp(min=0).sqrt())
