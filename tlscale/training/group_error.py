"""The standard error of a validation figure of images that come in groups: how far it would move with other groups.

Promise: a function of what the images were answered, the same on any number of processes; of groups of one image each
it is what `metrics.standard_error` gives.

Shape letters: N images of a split, B of a batch, G groups, K kinds of images (group, true class, answer), C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tlscale.data.sources.tables import GroupNames, Ints, number_groups
from tlscale.training.metrics import BY_CLASS, NUM_RESAMPLED, RESAMPLING_SEED, error_over_draws
from tlscale.training.predictions import answers


def num_error_groups(groups_N: GroupNames | None) -> int | None:
    """Return how many groups an error is over; None: it is over images, as no group has more than one."""
    if groups_N is None or not len(groups_N):
        return None
    num_groups = int(number_groups(groups_N).max()) + 1
    return num_groups if num_groups < len(groups_N) else None


class GroupError:
    """Collect what each image of this process adds to a figure, without waiting for the device."""

    def __init__(self, groups_N: GroupNames, figure: str, num_classes: int) -> None:
        """`figure` is one of `metrics.standard_error`, or a loss that `add` is given."""
        self._groups_N, self._figure, self._num_classes = number_groups(groups_N), figure, num_classes
        self._parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def add(self, positions_B: Tensor, labels_B: Tensor, logits_BC: Tensor, losses: Mapping[str, Tensor]) -> None:
        """Take a batch; positions are those in the split, `losses` of each image (B,) by their names."""
        answers_B = answers(logits_BC)[1]
        values_B = losses.get(self._figure, answers_B == labels_B)
        self._parts.append((positions_B, labels_B, answers_B, values_B.detach()))

    def error(self, total: Callable[[Tensor], Tensor]) -> float | None:
        """Return the standard error; None of one group, or of a loss that is not finite.

        `total` sums over all processes, which then have to call this all.
        """
        images = torch.zeros(3, len(self._groups_N), dtype=torch.float64)
        for positions_B, *columns in self._parts:
            # Each image is one process's: the others add 0 to it.
            images[:, positions_B.cpu()] = torch.stack([column.cpu().double() for column in columns])
        labels_N, answers_N, values_N = total(images).cpu().numpy()
        if int(self._groups_N.max()) < 1:
            return None
        if self._figure in BY_CLASS:
            return self._of_classes(labels_N.astype(np.int64), answers_N.astype(np.int64))
        sums_G = np.bincount(self._groups_N, values_N).astype(np.float64)
        return error_of_ratio(sums_G, np.bincount(self._groups_N))

    def _of_classes(self, labels_N: Ints, answers_N: Ints) -> float:
        answers_N = np.where(answers_N < 0, self._num_classes, answers_N)
        triples = np.stack([self._groups_N, labels_N, answers_N])
        (groups_K, labels_K, answers_K), counts_K = np.unique(triples, axis=1, return_counts=True)

        def draws() -> Iterator[npt.NDArray[np.int64]]:
            generator, num_groups = np.random.default_rng(RESAMPLING_SEED), int(groups_K.max()) + 1
            for _ in range(NUM_RESAMPLED):
                drawn_G = np.bincount(generator.integers(num_groups, size=num_groups), minlength=num_groups)
                yield drawn_G[groups_K] * counts_K

        kinds_K = labels_K, answers_K, labels_K == answers_K
        return error_over_draws(draws(), kinds_K, BY_CLASS[self._figure], self._num_classes)


def error_of_ratio(sums_G: npt.NDArray[np.float64], images_G: Ints) -> float | None:
    """Return the standard error of sum / images over groups that are drawn whole: linearised, over G - 1 groups."""
    num_groups, num_images, total = len(images_G), int(images_G.sum()), float(sums_G.sum())
    if num_groups < 2 or not math.isfinite(total):
        return None
    misses_G = sums_G - total / num_images * images_G
    return math.sqrt(num_groups / (num_groups - 1) * float(np.square(misses_G).sum())) / num_images
