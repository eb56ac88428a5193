"""Choose a temperature and a threshold for sets of labels, and say how far probabilities are from shares.

Shape letters: N images, C classes, U units (images, or groups of them), M bins of the confidence, V these and
the number of images, D draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tlscale.codes.probes.ranking import Bools, Floats
from tlscale.data.sources.tables import Ints
from tlscale.models.calibration import Calibration, LabelSets
from tlscale.training.metrics import NUM_BINS

_NUM_DRAWS = 4000
_SEED = 20_242


def bins_of(confidence_N: Floats) -> Ints:
    """Return the bin of each confidence, as `metrics.Tally` finds it, in single precision."""
    places_N = np.ceil(confidence_N.astype(np.float32) * np.float32(NUM_BINS)).astype(np.int64) - 1
    bins_N: Ints = np.clip(places_N, 0, NUM_BINS - 1)
    return bins_N


def calibration_error(confidence_N: Floats, is_hit_N: Bools) -> float | None:
    """Compute the expected calibration error, as `metrics.summary` does; None of no image."""
    if not len(confidence_N):
        return None
    gaps_M = np.bincount(bins_of(confidence_N), is_hit_N - confidence_N, NUM_BINS)
    return float(np.abs(gaps_M).sum() / len(confidence_N))


def calibration_interval(
    confidence_N: Floats, is_hit_N: Bools, groups_N: Ints | None = None
) -> tuple[float, float] | None:
    """Return a 95% interval of the calibration error, by a bootstrap over images, or over groups, with a fixed seed.

    Sums over a draw of many units are normal, and are drawn as such, with the mean and covariance that draws of units
    have: that takes milliseconds for any number of images.

    Chance alone makes bins differ from their confidence, so the error of a draw is too high, and so is that of the
    scored images themselves, by as much: the interval is the basic bootstrap's, which takes the excess off twice
    (Davison and Hinkley 1997, 5.2), while percentiles of draws would hardly ever hold the error of good probabilities.
    It begins at 0 where chance alone would give so large an error in one case of 40 or more.
    """
    if len(confidence_N) < 2:
        return None
    groups_N = np.arange(len(confidence_N)) if groups_N is None else groups_N
    num_units = int(groups_N.max()) + 1
    cells_N = groups_N * NUM_BINS + bins_of(confidence_N)
    gaps_UM = np.bincount(cells_N, is_hit_N - confidence_N, num_units * NUM_BINS).reshape(num_units, NUM_BINS)
    values_UV = np.column_stack([gaps_UM, np.bincount(groups_N, minlength=num_units)])
    totals_V = values_UV.sum(axis=0)
    values_UV -= totals_V / num_units
    covariance_VV = values_UV.T @ values_UV
    np.fill_diagonal(covariance_VV, covariance_VV.diagonal() + 1e-12 * covariance_VV.trace() + 1e-300)
    noise_DV = np.random.default_rng(_SEED).normal(size=(_NUM_DRAWS, NUM_BINS + 1))
    off_DV = noise_DV @ np.linalg.cholesky(covariance_VV).T
    error = float(np.abs(totals_V[:-1]).sum() / totals_V[-1])
    images_D = np.maximum(totals_V[-1] + off_DV[:, -1], 1.0)
    low, high = np.quantile(np.abs(totals_V[:-1] + off_DV[:, :-1]).sum(axis=1) / images_D, [0.025, 0.975])
    by_chance = np.quantile(np.abs(off_DV[:, :-1]).sum(axis=1) / images_D, 0.975)
    least = 0.0 if error <= by_chance else max(2 * error - float(high), 0.0)
    return least, min(max(2 * error - float(low), 0.0), 1.0)


# -- the temperature, and the sets ------------------------------------------------------------------------------------

_MOST_LOGITS = 1_000_000  # that choose a temperature: one number is known well by far fewer
_MOST_STEPS = 100
SET_LEVEL = 0.9
"""How often the set of labels of an image is to have the true one."""
_HOTTEST = 20.0
"""Temperatures are between its inverse and it."""


def choose_calibration(
    labels_N: Ints, logits_NC: npt.NDArray[np.floating[Any]], groups_N: Ints | None = None
) -> Calibration | None:
    """Choose by images that were not fitted; None where there is none.

    The temperature is 1, and probabilities stay what they are, where these images, or the groups of them, do not tell
    it from 1: one that is chosen by few of them would make good probabilities worse.

    Args:
        groups_N: equal numbers for images that do not stand alone; None: all do.
    """
    if not len(labels_N):
        return None
    temperature = choose_temperature(labels_N, logits_NC)
    if not _is_told_from_one(temperature, labels_N, logits_NC, groups_N):
        temperature = 1.0
    undecided = Calibration(
        temperature=temperature, num_images=len(labels_N), sets=LabelSets(level=SET_LEVEL, threshold=0.0)
    )
    shares_NC = undecided.probabilities(torch.from_numpy(logits_NC)).numpy()
    threshold = set_threshold(np.take_along_axis(shares_NC, labels_N[:, None], axis=1)[:, 0], groups_N)
    return undecided.model_copy(update={"sets": LabelSets(level=SET_LEVEL, threshold=threshold)})


def _is_told_from_one(
    temperature: float, labels_N: Ints, logits_NC: npt.NDArray[np.floating[Any]], groups_N: Ints | None
) -> bool:
    """Return whether a temperature lowers the cross-entropy by more than one standard error of the difference.

    Of a temperature that fits best, that is two standard errors of its own, as the gain grows with its square.
    """
    rows = choosing_rows(logits_NC)
    logits = torch.from_numpy(np.nan_to_num(logits_NC[rows]).astype(np.float64))
    labels = torch.from_numpy(labels_N[rows])[:, None]
    before_N, after_N = ((logits / each).log_softmax(1).gather(1, labels)[:, 0] for each in (1.0, temperature))
    return gains_more_than_its_error((after_N - before_N).numpy(), None if groups_N is None else groups_N[rows])


def gains_more_than_its_error(gains_N: Floats, groups_N: Ints | None = None) -> bool:
    """Return whether the mean of what each image gains is more than one standard error above 0.

    The images of a group do not stand alone: the error is of as many groups as there are.
    """
    if groups_N is None:
        return len(gains_N) > 1 and float(gains_N.mean()) * math.sqrt(len(gains_N)) > float(gains_N.std(ddof=1))
    _, units_N, sizes_U = np.unique(groups_N, return_inverse=True, return_counts=True)
    num_units = len(sizes_U)
    # What each group gains beyond its share of the whole.
    beyond_U = np.bincount(units_N.reshape(-1), gains_N, num_units) - sizes_U * gains_N.mean()
    return num_units > 1 and float(gains_N.sum()) > math.sqrt(num_units / (num_units - 1) * float(beyond_U @ beyond_U))


def set_threshold(true_share_N: Floats, groups_N: Ints | None = None) -> float:
    """Return the probability that the true class of a new image reaches in a share `SET_LEVEL` of cases, at least.

    As Sadinle et al. 2019 for this score: 0, and so all classes in each set, for less than 9 images, or groups of them.
    """
    reached = reached_by(true_share_N, SET_LEVEL, groups_N)
    return 0.0 if reached is None else reached


def reached_by(scores_N: Floats, level: float, groups_N: Ints | None = None) -> float | None:
    """Return the score that a new image reaches in a share `level` of cases, at least; None of too few images.

    With the correction for few images (Vovk et al. 2005). The images of a group do not stand alone: each group weighs
    the same, whatever its size, and the correction is that of as many images as there are groups. That holds for an
    image of a new group (Lee, Barber and Willett 2023, hierarchical conformal prediction).
    """
    weights_N, num_units = np.ones(len(scores_N)), len(scores_N)
    if groups_N is not None:
        _, units_N, sizes_U = np.unique(groups_N, return_inverse=True, return_counts=True)
        weights_N, num_units = 1 / sizes_U[units_N.reshape(-1)], len(sizes_U)
    falling_N = np.argsort(-scores_N, kind="stable")
    weight_N = np.cumsum(weights_N[falling_N])  # of the images with at least this score
    place = int(np.searchsorted(weight_N, (num_units + 1) * level - 1e-9))
    return float(scores_N[falling_N[place]]) if place < len(scores_N) else None


def least_units(level: float) -> int:
    """Return how many images, or groups of them, `reached_by` takes at least."""
    return math.ceil(level / (1 - level) - 1e-9)


def drawn_rows(num_rows: int, most: int) -> Ints:
    """Return all rows, or `most` of them by a fixed draw, in order: at equal distances they might be of one class."""
    if num_rows <= most:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng(_SEED).permutation(num_rows)[:most])


def choosing_rows(logits_NC: npt.NDArray[np.floating[Any]]) -> Ints:
    """Return the rows that choose a temperature."""
    return drawn_rows(len(logits_NC), max(_MOST_LOGITS // logits_NC.shape[1], 1))


def choose_temperature(labels_N: Ints, logits_NC: npt.NDArray[np.floating[Any]]) -> float:
    """Choose the temperature with the least cross-entropy (Guo et al. 2017) on images that were not fitted.

    That of few images that are all answered right would be 0, and all confidence 1: as in Platt 1999, the target of the
    true class is not 1 but (N + 1) / (N + 2), and the other classes share the rest.
    """
    rows = choosing_rows(logits_NC)
    labels_N, logits_NC = labels_N[rows], np.nan_to_num(logits_NC[rows]).astype(np.float64)
    num_images, num_classes = logits_NC.shape
    logits_NC -= logits_NC.max(axis=1, keepdims=True)
    true_N = np.take_along_axis(logits_NC, labels_N[:, None], axis=1)[:, 0]
    target = (num_images + 1) / (num_images + 2)
    targets_N = target * true_N + (1 - target) / (num_classes - 1) * (logits_NC.sum(axis=1) - true_N)

    def slope_and_curvature(factor: float) -> tuple[float, float]:
        shares_NC = np.exp(logits_NC * factor)
        shares_NC /= shares_NC.sum(axis=1, keepdims=True)
        mean_N = (shares_NC * logits_NC).sum(axis=1)
        slope = float((mean_N - targets_N).mean())
        return slope, float((shares_NC * (logits_NC - mean_N[:, None]) ** 2).sum(axis=1).mean())

    return 1 / least_by_newton(slope_and_curvature)


def least_by_newton(slope_and_curvature: Callable[[float], tuple[float, float]]) -> float:
    """Return the factor on the logits at which the cross-entropy is least: it is convex in that.

    By Newton's steps within a bracket; `slope_and_curvature` gives its first and second derivative.
    """
    low, high, factor = 1 / _HOTTEST, _HOTTEST, 1.0
    for _ in range(_MOST_STEPS):
        slope, curvature = slope_and_curvature(factor)
        low, high = (low, factor) if slope > 0 else (factor, high)
        then = factor - slope / curvature if curvature > 0 else 0.0
        then = then if low < then < high else float(np.sqrt(low * high))
        if abs(then - factor) <= 1e-12 * factor:
            break
        factor = then
    return factor
