"""Compute a figure by the order of all validation images, and its standard error: AUROC and average precision.

Promise: a function of all images in the order of the split, which is the same on any number of processes. As of the
final figures, it is of images that have an answer, the mean over the classes that have images here (of AUROC, and
others as well).

Letters: N images of a split, B of a batch, C classes, G groups (or single images), S samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tlscale.codes.probes.class_figures import class_rankings, mean_over, probabilities
from tlscale.codes.probes.ranking import Ranking, mean_known
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
        own = [np.concatenate([part.cpu().numpy() for part in column]) for column in zip(*self._parts, strict=True)]
        parts = [part for part in gather(own) if part]
        positions_N, labels_N, logits_NC = (np.concatenate(column) for column in zip(*parts, strict=True))
        order_N = np.argsort(positions_N)
        order_N = order_N[~np.isnan(logits_NC[order_N]).any(axis=1)]
        rankings = class_rankings(probabilities(logits_NC[order_N]), labels_N[order_N])
        error = error_over_rankings(self._figure, rankings, self._units_N[positions_N[order_N]])
        return {self._figure: mean_over(self._figure, rankings), f"{self._figure}_se": error}


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


def error_over_rankings(figure: str, rankings: Sequence[Ranking], units_N: Ints) -> float | None:
    """Return the standard error of a mean over classes by a bootstrap with a fixed seed: units are drawn whole.

    None of one unit, or where no draw has the figure.
    """
    rankings = [ranking for ranking in rankings if ranking.num_found]
    _, units_N = np.unique(units_N, return_inverse=True)
    num_units, num_images = int(units_N.max(initial=-1)) + 1, len(units_N)
    if num_units < 2 or not rankings:
        return None
    num_draws, found = min(max(_MOST_RESAMPLED // (num_images * len(rankings)), _DRAWS[0]), _DRAWS[1]), []
    for drawn_SG in samples_of_units(num_units, num_draws, num_images, seed=_RESAMPLING_SEED):
        figures_CS = np.stack([ranking.drawn(figure, drawn_SG[:, units_N]) for ranking in rankings])
        found += [mean_known(None if math.isnan(one) else one for one in column) for column in figures_CS.T.tolist()]
    known = [value for value in found if value is not None]
    return float(np.std(known, ddof=1)) if len(known) > 1 else None
