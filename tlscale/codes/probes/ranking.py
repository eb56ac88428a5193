"""Tell how well scores rank the images that have a class before those that have not.

Letters: N images, C classes, M images in the descending order of their scores.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

DEFAULT_THRESHOLD = 0.5
"""Probability from which on an image has a class, where no images chose another one."""
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


def mean_average_precision(scores_NC: Floats, labels_NC: Bools) -> float | None:
    """Return the mean over the classes that any image has; None where there is none."""
    pairs = zip(scores_NC.T, labels_NC.T, strict=True)
    found = [Curve(scores_N, has_N).average_precision() for scores_N, has_N in pairs if has_N.any()]
    return math.fsum(found) / len(found) if found else None


class Curve:
    """Hold the images in the descending order of their scores for one class; images of one score count together."""

    def __init__(self, scores_N: Floats, has_N: Bools) -> None:
        self._order_M = np.argsort(-scores_N, kind="stable")
        self._has_M = has_N[self._order_M]
        sorted_M = scores_N[self._order_M]
        self._ends = np.flatnonzero(np.append(sorted_M[1:] != sorted_M[:-1], True))
        self._scores = sorted_M[self._ends]

    def average_precision(self, counts_N: npt.NDArray[np.int64] | None = None) -> float:
        """Compute it; `counts_N`: how often each image counts. NaN where no image of the class is drawn."""
        weights_M = np.ones(len(self._has_M)) if counts_N is None else counts_N[self._order_M].astype(np.float64)
        hits = np.cumsum(weights_M * self._has_M)[self._ends]
        taken = np.cumsum(weights_M)[self._ends]
        if not hits[-1]:
            return math.nan
        precisions = np.divide(hits, taken, out=np.ones_like(hits), where=taken > 0)
        return float(np.sum(np.diff(hits, prepend=0.0) / hits[-1] * precisions))

    def best_threshold(self) -> float:
        """Return the threshold of the highest F1."""
        answered = self._scores >= 0
        if not answered.any():
            return DEFAULT_THRESHOLD
        scores, lower = self._scores[answered], np.append(self._scores[answered][1:], 0.0)
        hits, taken = np.cumsum(self._has_M)[self._ends][answered], self._ends[answered] + 1
        f1s = 2 * hits / (np.count_nonzero(self._has_M) + taken)
        middles = (scores + lower) / 2
        middles = np.where(middles > lower, middles, scores)  # of two neighbouring numbers it is one of them
        best = middles[f1s == f1s.max()]
        return float(best[np.abs(best - DEFAULT_THRESHOLD).argmin()])
