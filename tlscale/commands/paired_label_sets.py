"""Test in pairs whether the mean average precision of two runs differs by more than chance: of several labels an image.

Promise: both runs are resampled by the same draws of images (of groups, where there are any), with a fixed seed. The
standard deviation of the difference over the draws is its standard error, and p is that of Student's t with one degree
of freedom less than there are units. Ranks of one image hang on all others, so that no exact test of single images
holds, as it does for right answers. Over several seeds the difference is the mean of theirs, and over repeats of folds
each image is drawn with all its answers.

Shape letters: N answers of a run, U units (images, or groups of them), S samples at once, D all of them, P seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from tlscale.codes.probes.ranking import Floats
from tlscale.data.sources.tables import Ints
from tlscale.distributed.signals import check_stop
from tlscale.training.class_scores import samples_of_units
from tlscale.training.label_set_metrics import LabelFigures

_DRAWS = (200, 1000)  # at least, at most
_MOST_RESAMPLED = 400_000_000  # labels of all draws: seconds
_SEED = 20_243
_LEVEL = 0.95
Pairs = Sequence[tuple[LabelFigures, LabelFigures]]


@dataclass(frozen=True)
class Difference:
    """Hold by how much the first of two runs is ahead."""

    value: float
    interval95: tuple[float, float] | None
    """None of one unit, which tells nothing of others, and of equal answers."""
    p: float


def difference_of_maps(pairs: Pairs, units: Sequence[Ints], num_units: int) -> Difference | None:
    """Test the difference of the mean average precisions of two runs of each seed; None where no image has a label.

    Args:
        pairs: the two runs of each seed, answer by answer the same images in the same order.
        units: of each seed, the unit of each answer (N,), from 0, the same number in all seeds.
        num_units: U.
    """
    maps = [(one.mean_average_precision(), other.mean_average_precision()) for one, other in pairs]
    known = [first - second for first, second in maps if first is not None and second is not None]
    if not known:
        return None
    value, drawn = fmean(known), _drawn_differences(pairs, units, num_units) if num_units > 1 else np.zeros(0)
    # The spread over draws of U units is that of U - 1 too few.
    error = float(np.std(drawn, ddof=1)) * math.sqrt(num_units / (num_units - 1)) if len(drawn) > 1 else 0.0
    return _by_students_t(value, error, num_units - 1) if error > 0 else Difference(value, None, 1.0)


def _drawn_differences(pairs: Pairs, units: Sequence[Ints], num_units: int) -> Floats:
    """Return the difference in each draw that has a label, the mean over seeds."""
    size = sum(one.labels_NC.size + other.labels_NC.size for one, other in pairs)
    num_draws = min(max(_MOST_RESAMPLED // size, _DRAWS[0]), _DRAWS[1])
    found = []
    for counts_SU in samples_of_units(num_units, num_draws, max(one.num_images for one, _ in pairs), seed=_SEED):
        check_stop("comparing")
        leads_PS = np.stack(
            [
                one.drawn_mean_average_precisions(counts_SU[:, units_N])
                - other.drawn_mean_average_precisions(counts_SU[:, units_N])
                for (one, other), units_N in zip(pairs, units, strict=True)
                if one.labels_NC.any()
            ]
        )
        found.append(leads_PS.mean(axis=0))
    leads_D = np.concatenate(found)
    known_D: Floats = leads_D[~np.isnan(leads_D)]
    return known_D


def _by_students_t(value: float, error: float, freedom: int) -> Difference:
    from scipy.stats import t  # takes half a second

    reach = float(t.ppf((1 + _LEVEL) / 2, freedom)) * error
    return Difference(value, (value - reach, value + reach), float(2 * t.sf(abs(value) / error, freedom)))
