"""Fit the score of unknown images to codes of training images, and choose its threshold by validation images.

Shapes: N training images, M validation images, C classes, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tlscale.data.sources.tables import ImageSplit, Ints, Labels, has_several, number_groups
from tlscale.models.features import PENULTIMATE
from tlscale.models.unknown import MOST_FEATURES, UnknownScore, UnknownSettings
from tlscale.training.calibration import drawn_rows, least_units, reached_by

RECALL = 0.95
"""The share of images of known classes that are to be known."""
_MOST_IMAGES = 4_000  # that it is fitted to, or as many as there are features twice
_MOST_JUDGED = 2_000  # images that choose the threshold, or judge it
_LEAST_SHRINKAGE = 1e-3  # so that features of which one follows from others do no harm


def images_to_fit(labels_N: Ints, num_features: int) -> Ints:
    """Choose training images: all, or equally many of each class, at equal distances, for which a second is enough."""
    most = max(_MOST_IMAGES, 2 * num_features)
    if len(labels_N) <= most:
        return np.arange(len(labels_N))
    each = max(most // len(np.unique(labels_N)), 1)
    rows = [np.flatnonzero(labels_N == number) for number in np.unique(labels_N)]
    chosen = [some[np.arange(min(each, len(some))) * len(some) // min(each, len(some))] for some in rows]
    return np.sort(np.concatenate(chosen))


def images_to_judge(num_images: int) -> Ints:
    """Choose validation or scored images: all, or some by a fixed draw, in order."""
    return drawn_rows(num_images, _MOST_JUDGED)


def fit_unknown(
    codes_ND: Tensor, labels_N: Ints, held_MD: Tensor, held_groups_M: Ints | None = None
) -> UnknownScore | None:
    """Fit to codes of training images; None where codes are all the same or validation images are too few (19).

    The covariance of features of equal size is shrunk as in Ledoit and Wolf 2004: they may be more than the images.

    Args:
        held_MD: codes of the validation images that choose the threshold.
        held_groups_M: equal numbers for those that do not stand alone, of which there are then to be 19 groups.
    """
    num_units = len(held_MD) if held_groups_M is None else len(np.unique(held_groups_M))
    if num_units < least_units(RECALL):
        return None
    codes_ND = codes_ND.cpu().double()
    numbers, of_image = np.unique(labels_N, return_inverse=True)
    belongs_NC = torch.nn.functional.one_hot(torch.from_numpy(of_image.reshape(-1)), len(numbers)).double()
    means_CD = belongs_NC.T @ codes_ND / belongs_NC.sum(0)[:, None]
    whitening_DD = _whitening(codes_ND - belongs_NC @ means_CD)
    if whitening_DD is None:
        return None
    undecided = UnknownSettings(threshold=0.0, recall=RECALL, num_images=len(held_MD))
    fitted = UnknownScore(undecided, means_CD.float(), whitening_DD.float())
    threshold = reached_by(-fitted.scores(held_MD), RECALL, held_groups_M)
    assert threshold is not None, "there are enough"
    settings = undecided.model_copy(update={"threshold": -threshold})
    return UnknownScore(settings, fitted.means_CD, fitted.whitening_DD)


def _whitening(centred_ND: Tensor) -> Tensor | None:
    """Return what makes the covariance of codes the identity; None where nothing varies."""
    num_images, num_features = centred_ND.shape
    scale_D = centred_ND.square().mean(0).sqrt()
    if not 0 < float(scale_D.max()) < math.inf:
        return None
    # What never varied is not infinitely far away at once.
    scale_D = torch.where(scale_D > 1e-6 * scale_D.max(), scale_D, scale_D.mean())
    scaled_ND = centred_ND / scale_D
    scaled_ND = scaled_ND.float()  # twice as fast, and much closer than the shrinkage
    found_DD, identity_DD = (
        (scaled_ND.T @ scaled_ND).double() / num_images,
        torch.eye(num_features, dtype=torch.float64),
    )
    size = float(found_DD.trace()) / num_features
    off_DD = found_DD - size * identity_DD
    spread = float(off_DD.square().sum())
    noise = float(scaled_ND.square().sum(1).square().mean() - found_DD.square().sum()) / num_images
    share = min(max(noise / spread, _LEAST_SHRINKAGE), 1.0) if spread > 0 else 1.0
    lower_DD = torch.linalg.cholesky(found_DD - share * off_DD)
    whitening_DD: Tensor = torch.linalg.solve_triangular(lower_DD, identity_DD, upper=False).T / scale_D[:, None]
    return whitening_DD


Codes = Callable[[str, Ints], Tensor]
"""Gives pooled codes of some rows of a split, by its name."""


def unknown_by(
    codes: Codes, labels_N: Labels, held: ImageSplit | None, *, layer: str | None = None
) -> UnknownScore | str:
    """Fit the score, or tell why not.

    Args:
        codes: gives those of train and validation.
        labels_N: of the training images.
        held: the validation split.
        layer: of a probe, whose codes it is fitted to.
    """
    if has_several(labels_N):
        return "an image has several labels"
    if held is None or not len(held):
        return "there is no validation split"
    num_features = codes("validation", np.arange(1)).shape[1]
    if num_features > MOST_FEATURES:
        return f"the frozen codes have {num_features:,} numbers, more than {MOST_FEATURES:,}"
    rows = images_to_fit(labels_N, num_features)
    judges = images_to_judge(len(held))
    groups_M = None if held.groups_N is None else number_groups(held.groups_N)[judges]
    fitted = fit_unknown(codes("train", rows), labels_N[rows], codes("validation", judges), groups_M)
    if fitted is None:
        few = "validation images" if groups_M is None else "groups of validation images"
        return f"{few} are too few ({least_units(RECALL)}), or their codes all the same"
    if layer != PENULTIMATE:
        return fitted
    return replace(fitted, settings=fitted.settings.model_copy(update={"layer": layer}))


def about_unknown(found: UnknownScore | str, scored_MD: Tensor | None) -> dict[str, Any]:
    """Return what `result.json` tells of the score of unknown images.

    `scored_MD`: codes of scored images, if they did not choose the threshold.
    """
    if isinstance(found, str):
        return {"threshold": None, "why": found}
    known = None if scored_MD is None else float((found.scores(scored_MD) <= found.settings.threshold).mean())
    num_features = int(found.means_CD.shape[1])
    settings = found.settings.model_dump(exclude_none=True)
    return {**settings, "num_features": num_features, "bytes": found.num_bytes, "known": known}
