"""Figures by which held-out images choose, as `training.metrics` and `ranking` define them for results.

Letters: M images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tlscale.codes.probes.ranking import Columns, Floats, Ranking, mean_known

_CHUNK = 1_000_000  # logits
OF_CLASSES = ("macro_f1", "balanced_accuracy")
"""Means over classes that answers give."""
OF_SCORES = ("auroc", "mean_average_precision")
"""Means over classes, each against the rest, that the order of the images by a class's probability gives."""


def figure_of_classes(name: str, answers_M: Tensor, labels_M: Tensor, num_classes: int) -> float:
    """Return the mean, over the classes that have images, of F1 or of the share that is answered right."""
    images_C, answers_C, hits_C = (
        torch.bincount(some, minlength=num_classes).double()
        for some in (labels_M, answers_M, labels_M[answers_M == labels_M])
    )
    of_class_C = 2 * hits_C / (images_C + answers_C) if name == "macro_f1" else hits_C / images_C
    return float(of_class_C[images_C > 0].mean())


def figure_by(name: str, logits_MC: Tensor, labels_M: Tensor) -> float | None:
    """Return the figure that chooses, where it is neither top1 nor the loss; None: it is one of these."""
    if name in OF_CLASSES:
        return figure_of_classes(name, logits_MC.argmax(1), labels_M.to(logits_MC.device), logits_MC.shape[1])
    if name not in OF_SCORES:
        return None
    figure = mean_over(name, class_rankings(ClassShares(logits_MC.cpu().numpy()), labels_M.cpu().numpy()))
    return 0.0 if figure is None else figure


class ClassShares(Columns):
    """Iterate over the classes: the softmax of the images in double precision, without holding it for all."""

    def __init__(self, logits_MC: npt.NDArray[np.floating[Any]]) -> None:
        super().__init__(logits_MC)
        self._largest_M, self._sums_M = np.zeros(len(logits_MC)), np.zeros(len(logits_MC))
        at_once = max(_CHUNK // logits_MC.shape[1], 1)
        for start in range(0, len(logits_MC), at_once):
            part = slice(start, start + at_once)
            self._largest_M[part], self._sums_M[part] = softmax_parts(np.nan_to_num(logits_MC[part]))

    def _converted(self, values_CN: npt.NDArray[np.floating[Any]]) -> Floats:
        shares_CN: Floats = np.nan_to_num(values_CN).astype(np.float64)
        shares_CN -= self._largest_M
        np.exp(shares_CN, out=shares_CN)
        shares_CN /= self._sums_M
        return shares_CN


def softmax_parts(logits_MC: Floats) -> tuple[Floats, Floats]:
    """Return the largest logit of each image, and the sum over classes of exponentials of what they are below it.

    Sums are in the order of size, so that images that differ in the order of their logits alone tie.
    """
    sorted_MC = np.sort(logits_MC, axis=1).astype(np.float64)
    return sorted_MC[:, -1], np.exp(sorted_MC - sorted_MC[:, -1:]).sum(axis=1)


def class_rankings(shares: ClassShares, labels_M: np.ndarray) -> list[Ranking]:
    """Return how the probability of each class ranks the images."""
    return [Ranking(labels_M == number, shares_M) for number, shares_M in enumerate(shares)]


def mean_over(name: str, rankings: Sequence[Ranking]) -> float | None:
    """Return the mean over the classes for which the figure can be told; None where there is none."""
    return mean_known(one.auroc() if name == "auroc" else one.average_precision() for one in rankings)


def rank_of(name: str, top1: float, loss: float, of_classes: float | None) -> tuple[float, float]:
    """Return a sort key, the smallest for the best: by the figure of this name, then by the loss (or top1)."""
    if name == "loss":
        return loss, -top1
    return (-top1 if of_classes is None else -of_classes), loss
