"""Tell how well scores rank the images that have a class before those that have not.

Promise: exact, from counts: images with equal scores are taken together, in whatever order they come. The figures are
those of scikit-learn's `roc_auc_score` and `average_precision_score`.

Figures change where an image of the class is found alone. So a ranking holds those places, which all classes have about
as many of together as there are images, and not the images.

Letters: N images, T different scores, K those that images of the class have, in descending order, P images of the
class, S samples, R recalls, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

DEFAULT_THRESHOLD = 0.5
"""Probability from which on an image has a class, where no images chose another one."""
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_CURVE_RECALLS = np.arange(1, 21) / 20
_COLUMNS = 64
_MOST_IN_FLOAT32 = 2**24


@dataclass(frozen=True, slots=True)
class Samples:
    """Hold how often each image is in each of some samples."""

    counts_NS: npt.NDArray[np.floating[Any]]
    """Whole numbers."""
    totals_S: Ints
    """Images of each sample."""

    @classmethod
    def of(cls, counts_SN: Ints) -> Samples:
        """Take them, in the narrowest type that adds them up exactly."""
        totals_S = counts_SN.sum(axis=1)
        is_small = totals_S.max(initial=0) < _MOST_IN_FLOAT32
        return cls(np.ascontiguousarray(counts_SN.T, dtype=np.float32 if is_small else np.float64), totals_S)


class Columns:
    """Iterate over the columns of a matrix, as often as wanted: each is contiguous, and few are copied at a time."""

    def __init__(self, values_NC: npt.NDArray[np.floating[Any]]) -> None:
        self._values_NC = values_NC

    def __iter__(self) -> Iterator[Floats]:
        for start in range(0, self._values_NC.shape[1], _COLUMNS):
            yield from self._converted(np.ascontiguousarray(self._values_NC[:, start : start + _COLUMNS].T))

    def _converted(self, values_CN: npt.NDArray[np.floating[Any]]) -> Floats:
        return values_CN.astype(np.float64, copy=False)


class Ranking:
    """Hold the places of the images of a class among all, in the descending order of scores; these have no NaN."""

    def __init__(self, has_N: Bools, scores_N: Floats) -> None:
        self._images_P = np.flatnonzero(has_N)
        ascending_N = np.sort(scores_N)
        is_new_N = np.append(True, ascending_N[1:] != ascending_N[:-1])[: len(ascending_N)]
        lower_K, self._place_P, num_K = np.unique(-scores_N[self._images_P], return_inverse=True, return_counts=True)
        self._scores_K: Floats = -lower_K
        self._found_K: Ints = np.cumsum(num_K)
        """Images of the class with so high a score."""
        first_K = np.searchsorted(ascending_N, self._scores_K, side="left")
        self._taken_K: Ints = len(scores_N) - first_K
        self._before_K: Ints = len(scores_N) - np.searchsorted(ascending_N, self._scores_K, side="right")
        """Images with a higher score."""
        self._num_scores = int(np.count_nonzero(is_new_N))
        self._at_K: Ints = self._num_scores - np.cumsum(is_new_N)[first_K]
        """Higher scores, of all images."""
        self._lower_K: Floats = np.where(first_K > 0, np.maximum(ascending_N[first_K - 1], 0.0), 0.0)
        self.num_found = len(self._images_P)
        """Images of the class."""
        is_answered = not self.num_found or self._scores_K[0] >= 0
        self._unfound_T: Floats = np.empty(0) if is_answered else ascending_N[is_new_N & (ascending_N >= 0)][::-1]
        """Scores that are answers, of a class whose own images have none."""
        self._num_images = len(scores_N)

    def auroc(self) -> float | None:
        """Return the share of pairs of an image of the class and another that are ranked right; of equal scores half.

        None where there is no such pair.
        """
        return _known(_auroc(self._counts()))

    def average_precision(self) -> float | None:
        """Return the mean of the precision at each image of the class (not interpolated); None without such images."""
        return _known(self._average_precision(self._counts()))

    def drawn(self, figure: str, samples: Samples, scores_N: Floats) -> Floats:
        """Return `auroc`, or another figure, of S samples; NaN for None. `scores_N` are those of the ranking."""
        num_different, counts_NS = len(self._scores_K), samples.counts_NS
        if not num_different:
            return np.full(len(samples.totals_S), np.nan)
        own_KS = _sums(self._place_P, num_different, counts_NS[self._images_P])
        # Before the first place, in it, between it and the second, in the second and so on. What is after the last one,
        # most images where the ranking is good, is not added up.
        is_before_N = scores_N >= self._scores_K[-1]
        before_B = scores_N[is_before_N]
        place_B = num_different - np.searchsorted(self._scores_K[::-1], before_B, side="right")
        place_B = 2 * place_B + (before_B == self._scores_K[place_B])
        sums_KS = np.cumsum(_sums(place_B, 2 * num_different, counts_NS, is_before_N), axis=0)
        counts = _Counts(own_KS.T, np.cumsum(own_KS, axis=0).T, sums_KS[1::2].T, sums_KS[::2].T, samples.totals_S)
        return _auroc(counts) if figure == "auroc" else self._average_precision(counts)

    def curve(self) -> dict[str, list[float]] | None:
        """Return precision by recall at 20 points, each the highest score that finds 5, 10, ... 100 % of the class.

        None without images of the class.
        """
        if not self.num_found:
            return None
        wanted_R = np.ceil(_CURVE_RECALLS * self.num_found - 1e-9)
        at_R = np.searchsorted(self._found_K, wanted_R)
        precision_R = self._found_K[at_R] / self._taken_K[at_R]
        recall_R = self._found_K[at_R] / self.num_found
        return {"recall": recall_R.tolist(), "precision": precision_R.tolist(), "score": self._scores_K[at_R].tolist()}

    def best_threshold(self) -> float:
        """Return that of the highest F1, or `DEFAULT_THRESHOLD` without the class; scores below 0 are no answer."""
        answered_K = self._scores_K >= 0
        scores_K, lower_K = self._scores_K[answered_K], self._lower_K[answered_K]
        f1_K = 2 * self._found_K[answered_K] / (self.num_found + self._taken_K[answered_K])
        if len(self._unfound_T):  # none is found by any
            scores_K, lower_K = self._unfound_T, np.append(self._unfound_T[1:], 0.0)
            f1_K = np.zeros(len(scores_K))
        if not len(scores_K):
            return DEFAULT_THRESHOLD
        middle_K = (scores_K + lower_K) / 2
        middle_K = np.where(middle_K > lower_K, middle_K, scores_K)  # of two neighbouring numbers it is one of them
        best = middle_K[f1_K == f1_K.max()]
        return float(best[np.abs(best - DEFAULT_THRESHOLD).argmin()])

    def _counts(self) -> _Counts:
        """Return them where each image counts once."""
        own_K = np.diff(self._found_K, prepend=0)
        return _Counts(
            own_K[None],
            self._found_K[None],
            self._taken_K[None],
            self._before_K[None],
            np.array([self._num_images]),
        )

    def _average_precision(self, counts: _Counts) -> Floats:
        own_SK, found_SK = counts.own_SK, counts.found_SK
        num_found_S = own_SK.sum(axis=1)
        precision_SK = found_SK / np.maximum(counts.taken_SK, 1)  # where none is taken none is found
        shares_SK, means_S = _divided(own_SK, num_found_S[:, None]), np.full(len(own_SK), np.nan)
        # A sum over all scores, zeros between the places: on their number and place the last bit hangs, and on the
        # strides, as the first version had them: BLAS adds up in another order where numbers do not lie side by side.
        shares_T, precision_T = np.zeros(self._num_scores), np.zeros((self._num_scores, min(len(own_SK), 2)))[:, 0]
        for sample in np.flatnonzero(num_found_S).tolist():
            shares_T[self._at_K], precision_T[self._at_K] = shares_SK[sample], precision_SK[sample]
            means_S[sample] = shares_T @ precision_T
        return means_S


@dataclass(frozen=True, slots=True)
class _Counts:
    """Hold the images of each place, where they count as often as S samples have them."""

    own_SK: Ints
    """Of the class, with this score."""
    found_SK: Ints
    """Of the class, with this score or a higher one."""
    taken_SK: Ints
    """All, with this score or a higher one."""
    before_SK: Ints
    """All, with a higher one."""
    totals_S: Ints


def _sums(
    places_B: Ints, num_places: int, counts_NS: npt.NDArray[np.floating[Any]], is_there_N: Bools | None = None
) -> Ints:
    """Add up the counts of the images (of those that are there) by their place: (places, S)."""
    from scipy.sparse import csc_array  # takes a third of a second

    num_images = len(counts_NS)
    ends_N = np.arange(num_images + 1) if is_there_N is None else np.append(0, np.cumsum(is_there_N))
    ones_B = np.ones(len(places_B), counts_NS.dtype)
    sums: Ints = (csc_array((ones_B, places_B, ends_N), shape=(num_places, num_images)) @ counts_NS).astype(np.int64)
    return sums


# The order of the operations is that of the first version, on which the last bits of figures in older results hang.


def _auroc(counts: _Counts) -> Floats:
    num_found_S = counts.own_SK.sum(axis=1)
    lower_SK = (counts.totals_S - num_found_S)[:, None] - (counts.taken_SK - counts.found_SK)
    equal_SK = counts.taken_SK - counts.before_SK - counts.own_SK
    twice_right_S = (counts.own_SK * (2 * lower_SK + equal_SK)).sum(axis=1)
    return _divided(_divided(twice_right_S / 2, num_found_S), counts.totals_S - num_found_S)


def _divided(parts: Floats | Ints, wholes: Ints) -> Floats:
    """Divide; NaN where the whole is 0."""
    shares: Floats = np.divide(parts, wholes, out=np.full(parts.shape, np.nan), where=wholes > 0)
    return shares


def _known(value_1: Floats) -> float | None:
    return None if np.isnan(value_1[0]) else float(value_1[0])


def mean_average_precision(scores_NC: Floats, labels_NC: Bools) -> float | None:
    """Return the mean over the classes that any image has; None where there is none."""
    pairs = zip(labels_NC.T, Columns(scores_NC), strict=True)
    return mean_known(Ranking(has_N, scores_N).average_precision() for has_N, scores_N in pairs)


def mean_known(values: Iterable[float | None]) -> float | None:
    """Return the mean of those that are not None; None of none."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
