"""Compute a figure by the order of all validation images, and its standard error: AUROC and average precision.

Promise: a function of all images in the order of the split, which is the same on any number of processes. As of the
final figures, it is of images that have an answer, the mean over the classes that have images here (of AUROC, and
others as well).

Letters: N images of a split, B of a batch, C classes, G groups (or single images), S samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tlscale.codes.probes.class_figures import ClassShares, class_rankings, mean_over
from tlscale.codes.probes.ranking import Floats, Ranking, Samples, mean_known
from tlscale.data.sources.tables import GroupNames, Ints, number_groups

_DRAWS = (50, 200)  # at least, at most
_MOST_RESAMPLED = 200_000_000  # labels of all draws: seconds
_RESAMPLING_SEED = 20_242
_AT_ONCE = 2_000_000  # images of samples


class ClassScores:
    """Collect the logits of this process's images."""

    def __init__(self, figure: str, num_images: int, groups_N: GroupNames | None = None) -> None:
        """`figure` is one of `class_figures.OF_SCORES`; `groups_N`: its error is over these, None: over images."""
        self._figure = figure
        self._units_N = np.arange(num_images) if groups_N is None else number_groups(groups_N)
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def add(self, positions_B: Tensor, labels_B: Tensor, logits_BC: Tensor) -> None:
        """Take a batch, without waiting for the device; positions are those in the split."""
        logits_BC = logits_BC if logits_BC.dtype == torch.float64 else logits_BC.float()
        self._parts.append((positions_B, labels_B, logits_BC.detach()))

    def over_all(self, gather: Callable[[Any], list[Any]]) -> dict[str, float | None]:
        """Return the figure and `<figure>_se`; of processes all call this."""
        own = [tuple(values.cpu().numpy() for values in part) for part in self._parts]
        self._parts.clear()
        positions_N, labels_N, logits_NC = _in_order([part for parts in gather(own) for part in parts])
        del own
        answered_N = ~np.isnan(logits_NC).any(axis=1)
        if not answered_N.all():
            positions_N, labels_N, logits_NC = positions_N[answered_N], labels_N[answered_N], logits_NC[answered_N]
        shares = ClassShares(logits_NC)
        rankings = class_rankings(shares, labels_N)
        error = error_over_rankings(self._figure, rankings, shares, self._units_N[positions_N])
        return {self._figure: mean_over(self._figure, rankings), f"{self._figure}_se": error}


def _in_order(parts: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Join positions, labels and logits of batches in the order of the positions; a part goes when it is copied."""
    positions_N = np.concatenate([positions_B for positions_B, _, _ in parts])
    place_N, end = np.argsort(np.argsort(positions_N)), len(positions_N)
    logits_NC = np.empty((len(positions_N), parts[0][2].shape[1]), np.result_type(*(part[2].dtype for part in parts)))
    labels_N = np.empty(len(positions_N), parts[0][1].dtype)
    while parts:
        _, labels_B, logits_BC = parts.pop()
        place_B = place_N[end - len(labels_B) : end]
        labels_N[place_B], logits_NC[place_B] = labels_B, logits_BC
        end -= len(labels_B)
    return np.sort(positions_N), labels_N, logits_NC


def samples_of_units(num_units: int, num_draws: int, num_images: int, *, seed: int) -> Iterator[Ints]:
    """Yield how often each unit is drawn, (S, G), for as many of the samples at once as memory is meant for.

    Args:
        num_units: G.
        num_draws: number of samples.
        num_images: that the units have together.
        seed: of the draws.
    """
    generator, at_once = np.random.default_rng(seed), max(_AT_ONCE // num_images, 1)
    for start in range(0, num_draws, at_once):
        draws = (generator.integers(num_units, size=num_units) for _ in range(start, min(start + at_once, num_draws)))
        yield np.stack([np.bincount(drawn_G, minlength=num_units) for drawn_G in draws])


def error_over_rankings(
    figure: str, rankings: Sequence[Ranking], scores: Iterable[Floats], units_N: Ints
) -> float | None:
    """Return the standard error of a mean over classes by a bootstrap with a fixed seed: units are drawn whole.

    `scores` gives those of each ranking, in their order, as often as wanted. None of one unit, or where no draw has the
    figure.
    """
    num_classes = sum(ranking.num_found > 0 for ranking in rankings)
    _, units_N = np.unique(units_N, return_inverse=True)
    num_units, num_images = int(units_N.max(initial=-1)) + 1, len(units_N)
    if num_units < 2 or not num_classes:
        return None
    num_draws, found = min(max(_MOST_RESAMPLED // (num_images * num_classes), _DRAWS[0]), _DRAWS[1]), []
    for drawn_SG in samples_of_units(num_units, num_draws, num_images, seed=_RESAMPLING_SEED):
        samples = Samples.of(drawn_SG[:, units_N])
        pairs = zip(rankings, scores, strict=True)
        figures_CS = np.stack([one.drawn(figure, samples, scores_N) for one, scores_N in pairs if one.num_found])
        found += [mean_known(None if math.isnan(one) else one for one in column) for column in figures_CS.T.tolist()]
    known = [value for value in found if value is not None]
    return float(np.std(known, ddof=1)) if len(known) > 1 else None
