"""Say how well scores rank the images of a class before all others: AUROC, average precision, and their curve.

Promise: exact, from counts: images with equal scores are taken together, in whatever order they come. The figures are
those of scikit-learn's `roc_auc_score` and `average_precision_score`.

Shape letters: N images, T different scores, R recalls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tlscale.data.sources.tables import Ints

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_CURVE_RECALLS = np.arange(1, 21) / 20


@dataclass(frozen=True)
class Ranking:
    """Hold the counts at each score, the highest first, when all images with so high a score are taken."""

    scores_T: Floats
    taken_T: Ints
    """Images taken."""
    found_T: Ints
    """Of these, images of the class."""

    @classmethod
    def of(cls, is_class_N: Bools, scores_N: Floats) -> Ranking:
        """Count; scores have no NaN."""
        order_N = np.argsort(-scores_N)
        sorted_N = scores_N[order_N]
        last_T = np.flatnonzero(np.append(sorted_N[1:] != sorted_N[:-1], len(sorted_N) > 0))
        found_N = np.cumsum(is_class_N[order_N], dtype=np.int64)
        return cls(sorted_N[last_T], last_T + 1, found_N[last_T])

    @property
    def num_found(self) -> int:
        """Images of the class."""
        return int(self.found_T[-1]) if len(self.found_T) else 0

    @property
    def auroc(self) -> float | None:
        """Return the share of pairs of an image of the class and another that are ranked right; of equal scores half.

        None where there is no such pair.
        """
        num_others = (int(self.taken_T[-1]) if len(self.taken_T) else 0) - self.num_found
        if not self.num_found or not num_others:
            return None
        others_T = np.diff(self.taken_T - self.found_T, prepend=0)
        twice_right = (others_T * (self.found_T + np.append(0, self.found_T[:-1]))).sum()
        return float(twice_right / 2 / self.num_found / num_others)

    @property
    def average_precision(self) -> float | None:
        """Return the mean of the precision at each image of the class (not interpolated); None without such images."""
        if not self.num_found:
            return None
        return float((np.diff(self.found_T, prepend=0) / self.num_found) @ (self.found_T / self.taken_T))

    def curve(self) -> dict[str, list[float]] | None:
        """Return precision by recall at 20 points, each the highest score that finds 5, 10, ... 100 % of the class.

        None without images of the class.
        """
        if not self.num_found:
            return None
        wanted_R = np.ceil(_CURVE_RECALLS * self.num_found - 1e-9)
        at_R = np.searchsorted(self.found_T, wanted_R)
        precision_R = self.found_T[at_R] / self.taken_T[at_R]
        recall_R = self.found_T[at_R] / self.num_found
        return {"recall": recall_R.tolist(), "precision": precision_R.tolist(), "score": self.scores_T[at_R].tolist()}


def mean_known(values: list[Any]) -> float | None:
    """Return the mean of those that are not None; None of none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
