"""Figures by which held-out images choose a probe, as `training.metrics` defines them for results.

Letters: M images, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

OF_CLASSES = ("macro_f1", "balanced_accuracy")


def figure_of_classes(name: str, answers_M: Tensor, labels_M: Tensor, num_classes: int) -> float:
    """Return the mean, over the classes that have images, of F1 or of the share that is answered right."""
    images_C, answers_C, hits_C = (
        torch.bincount(some, minlength=num_classes).double()
        for some in (labels_M, answers_M, labels_M[answers_M == labels_M])
    )
    of_class_C = 2 * hits_C / (images_C + answers_C) if name == "macro_f1" else hits_C / images_C
    return float(of_class_C[images_C > 0].mean())


def rank_of(name: str, top1: float, loss: float, of_classes: float | None) -> tuple[float, float]:
    """Return a sort key, the smallest for the best: by the figure of this name, then by the loss (or top1)."""
    if name == "loss":
        return loss, -top1
    return (-top1 if of_classes is None else -of_classes), loss
