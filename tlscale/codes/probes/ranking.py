"""Tell how well scores rank the images that have a class before those that have not.

Promise: exact, from counts: images with equal scores are taken together, in whatever order they come. The figures are
those of scikit-learn's `roc_auc_score` and `average_precision_score`.

Letters: N images, M images in the descending order of their scores, T different scores, R recalls, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

DEFAULT_THRESHOLD = 0.5
"""Probability from which on an image has a class, where no images chose another one."""
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_CURVE_RECALLS = np.arange(1, 21) / 20


class Ranking:
    """Hold the images in the descending order of their scores for one class; scores have no NaN."""

    def __init__(self, has_N: Bools, scores_N: Floats) -> None:
        self._order_M = np.argsort(-scores_N, kind="stable")
        self._has_M = has_N[self._order_M]
        sorted_M = scores_N[self._order_M]
        self._last_T = np.flatnonzero(np.append(sorted_M[1:] != sorted_M[:-1], len(sorted_M) > 0))
        self._scores_T = sorted_M[self._last_T]
        self._taken_T: Ints = self._last_T + 1  # images, where all with so high a score are
        self._found_T: Ints = np.cumsum(self._has_M, dtype=np.int64)[self._last_T]  # of these, images of the class
        self.num_found = int(np.count_nonzero(has_N))
        """Images of the class."""

    @property
    def auroc(self) -> float | None:
        """Return the share of pairs of an image of the class and another that are ranked right; of equal scores half.

        None where there is no such pair.
        """
        num_others = len(self._has_M) - self.num_found
        if not self.num_found or not num_others:
            return None
        others_T = np.diff(self._taken_T - self._found_T, prepend=0)
        twice_right = (others_T * (self._found_T + np.append(0, self._found_T[:-1]))).sum()
        return float(twice_right / 2 / self.num_found / num_others)

    def average_precision(self, counts_N: Ints | None = None) -> float | None:
        """Return the mean of the precision at each image of the class (not interpolated); None without such images.

        `counts_N`: how often each image counts; None: once.
        """
        found_T, taken_T = self._found_T, self._taken_T
        if counts_N is not None:
            counts_M = counts_N[self._order_M]
            found_T, taken_T = (np.cumsum(each_M)[self._last_T] for each_M in (counts_M * self._has_M, counts_M))
        if not len(found_T) or not found_T[-1]:
            return None
        precision_T = found_T / np.maximum(taken_T, 1)  # where none is taken none is found
        return float(np.sum(np.diff(found_T, prepend=0) / found_T[-1] * precision_T))

    def curve(self) -> dict[str, list[float]] | None:
        """Return precision by recall at 20 points, each the highest score that finds 5, 10, ... 100 % of the class.

        None without images of the class.
        """
        if not self.num_found:
            return None
        wanted_R = np.ceil(_CURVE_RECALLS * self.num_found - 1e-9)
        at_R = np.searchsorted(self._found_T, wanted_R)
        precision_R = self._found_T[at_R] / self._taken_T[at_R]
        recall_R = self._found_T[at_R] / self.num_found
        return {"recall": recall_R.tolist(), "precision": precision_R.tolist(), "score": self._scores_T[at_R].tolist()}

    def best_threshold(self) -> float:
        """Return that of the highest F1, or `DEFAULT_THRESHOLD` without the class; scores below 0 are no answer."""
        answered_T = self._scores_T >= 0
        if not self.num_found or not answered_T.any():
            return DEFAULT_THRESHOLD
        scores_T = self._scores_T[answered_T]
        lower_T = np.append(scores_T[1:], 0.0)
        f1_T = 2 * self._found_T[answered_T] / (self.num_found + self._taken_T[answered_T])
        middle_T = (scores_T + lower_T) / 2
        middle_T = np.where(middle_T > lower_T, middle_T, scores_T)  # of two neighbouring numbers it is one of them
        best = middle_T[f1_T == f1_T.max()]
        return float(best[np.abs(best - DEFAULT_THRESHOLD).argmin()])


def mean_average_precision(scores_NC: Floats, labels_NC: Bools) -> float | None:
    """Return the mean over the classes that any image has; None where there is none."""
    pairs = zip(labels_NC.T, scores_NC.T, strict=True)
    return mean_known(Ranking(has_N, scores_N).average_precision() for has_N, scores_N in pairs)


def mean_known(values: Iterable[float | None]) -> float | None:
    """Return the mean of those that are not None; None of none."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
