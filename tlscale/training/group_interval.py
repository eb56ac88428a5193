"""The interval of a share of images that come in groups: how far it would move with other groups.

Promise: a function of the counts alone, in whatever order the groups come; a fixed seed, so that a resumed run finds
what an unbroken one does.

Shape letters: N images of a split, B of a batch, P pairs of a group and a class that occur, G groups, K kinds of groups
(with equal counts), D draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tlscale.codes.probes.ranking import Bools
from tlscale.data.sources.tables import GroupNames, ImageSplit, Ints, number_groups
from tlscale.training.metrics import wilson

_NUM_DRAWS = 4000
_SEED = 20_241
_LEVEL = 0.95


def group_interval(hits_G: Ints, images_G: Ints) -> list[float] | None:
    """Return the 95% interval of hits / images by a bootstrap over groups (percentiles); None of no group.

    Where all groups agree, or there is one, draws of them tell nothing: then it is Wilson's, as if each group were one
    image.
    """
    num_groups, share = len(images_G), float(hits_G.sum()) / max(int(images_G.sum()), 1)
    if not num_groups:
        return None
    if num_groups == 1 or share in (0.0, 1.0):
        return wilson(share * num_groups, num_groups)
    kinds_K2, counts_K = np.unique(np.stack([hits_G, images_G], axis=1), axis=0, return_counts=True)
    drawn_DK = np.random.default_rng(_SEED).multinomial(num_groups, counts_K / num_groups, size=_NUM_DRAWS)
    sums_D2 = drawn_DK @ kinds_K2
    low, high = np.quantile(sums_D2[:, 0] / sums_D2[:, 1], [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return [min(float(low), share), max(float(high), share)]


def interval_over_units(units_N: Ints, hits_N: Bools) -> list[float] | None:
    """Return the 95% interval of a share of answers, of which those with an equal unit do not stand alone."""
    _, of_answer = np.unique(units_N, return_inverse=True)
    hits_G = np.bincount(of_answer, weights=hits_N).astype(np.int64)
    return group_interval(hits_G, np.bincount(of_answer))


class GroupHits:
    """Count right answers by group and class, on the CPU."""

    def __init__(self, split: ImageSplit, groups_N: GroupNames) -> None:
        numbers_N = number_groups(groups_N)
        pairs_2P, of_images = np.unique(np.stack([numbers_N, split.labels_N]), axis=1, return_inverse=True)
        self._groups_P, self._labels_P = pairs_2P
        self._pairs_N: Tensor = torch.from_numpy(of_images.reshape(-1))
        self._images_P = np.bincount(of_images.reshape(-1))
        self._hits_P = torch.zeros(len(self._images_P), dtype=torch.int64)

    def add(self, positions_B: Tensor, is_hit_B: Tensor) -> None:
        """Take a batch: positions in the split, and which of them are answered right."""
        self._hits_P.index_add_(0, self._pairs_N[positions_B], is_hit_B.long())

    def over_groups(
        self, figures: dict[str, Any], classes: Sequence[str], total: Callable[[Tensor], Tensor]
    ) -> dict[str, Any]:
        """Return the figures with intervals over groups in place of those over images, and the number of groups.

        `total` sums counts over all processes, which then have to call this all.
        """
        hits_P = total(self._hits_P).numpy()
        sums = (np.bincount(self._groups_P, counts_P).astype(np.int64) for counts_P in (hits_P, self._images_P))
        per_class = {name: dict(row) for name, row in figures["per_class"].items()}
        for label, name in enumerate(classes):
            own_P = self._labels_P == label
            per_class[name]["accuracy_interval95"] = group_interval(hits_P[own_P], self._images_P[own_P])
        by = {"groups": int(self._groups_P.max()) + 1}
        return {
            **figures,
            "top1_interval95": group_interval(*sums),
            "top1_interval95_by": by,
            "per_class": per_class,
        }
