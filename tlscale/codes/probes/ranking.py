"""Tell how well scores rank the images that have a class before those that have not.

Promise: exact, from counts: images with equal scores are taken together, in whatever order they come. The figures are
those of scikit-learn's `roc_auc_score` and `average_precision_score`.

Letters: N images, M images in the descending order of their scores, T different scores, S samples, R recalls,
C classes.
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

    def auroc(self) -> float | None:
        """Return the share of pairs of an image of the class and another that are ranked right; of equal scores half.

        None where there is no such pair.
        """
        return _known(_auroc(self._found_T[None], self._taken_T[None]))

    def average_precision(self) -> float | None:
        """Return the mean of the precision at each image of the class (not interpolated); None without such images."""
        return _known(_average_precision(self._found_T[None], self._taken_T[None]))

    def drawn(self, figure: str, counts_SN: Ints) -> Floats:
        """Return `auroc`, or another figure, of S samples, in which each image counts so often; NaN for None."""
        counts_SM = counts_SN[:, self._order_M]
        found_ST, taken_ST = (np.cumsum(each, axis=1)[:, self._last_T] for each in (counts_SM * self._has_M, counts_SM))
        return (_auroc if figure == "auroc" else _average_precision)(found_ST, taken_ST)

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


# The order of the operations is that of the first version, on which the last bits of figures in older results hang.


def _auroc(found_ST: Ints, taken_ST: Ints) -> Floats:
    others_ST = np.diff(taken_ST - found_ST, prepend=0, axis=1)
    before_ST = np.concatenate([np.zeros_like(found_ST[:, :1]), found_ST[:, :-1]], axis=1)
    twice_right_S = (others_ST * (found_ST + before_ST)).sum(axis=1)
    return _divided(_divided(twice_right_S / 2, found_ST[:, -1:].sum(axis=1)), others_ST.sum(axis=1))


def _average_precision(found_ST: Ints, taken_ST: Ints) -> Floats:
    precision_ST = found_ST / np.maximum(taken_ST, 1)  # where none is taken none is found
    shares_ST = _divided(np.diff(found_ST, prepend=0, axis=1), found_ST[:, -1:])
    means_S: Floats = (shares_ST[:, None, :] @ precision_ST[:, :, None])[:, 0, 0]
    return np.where(found_ST[:, -1:].sum(axis=1) > 0, means_S, np.nan)


def _divided(parts: Floats | Ints, wholes: Ints) -> Floats:
    """Divide; NaN where the whole is 0."""
    shares: Floats = np.divide(parts, wholes, out=np.full(parts.shape, np.nan), where=wholes > 0)
    return shares


def _known(value_1: Floats) -> float | None:
    return None if np.isnan(value_1[0]) else float(value_1[0])


def mean_average_precision(scores_NC: Floats, labels_NC: Bools) -> float | None:
    """Return the mean over the classes that any image has; None where there is none."""
    pairs = zip(labels_NC.T, scores_NC.T, strict=True)
    return mean_known(Ranking(has_N, scores_N).average_precision() for has_N, scores_N in pairs)


def mean_known(values: Iterable[float | None]) -> float | None:
    """Return the mean of those that are not None; None of none."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
