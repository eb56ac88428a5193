"""The loss: cross-entropy for each image, to be summed and divided by the count over all processes.

Shapes: B images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tlscale.errors import RecipeError, did_you_mean
from tlscale.recipe.schema import LossSection


class Objective:
    """Cross-entropy with label smoothing, class weights and mixed labels.

    Args:
        section: the recipe's loss.
        class_weights_C: from `class_weights`, or None.
    """

    def __init__(self, section: LossSection, class_weights_C: Tensor | None) -> None:
        self._smoothing = section.label_smoothing
        self._class_weights_C = class_weights_C

    def losses(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        """Loss of each image, in float32 at least; shape (B,)."""
        logits_BC = logits_BC.float() if logits_BC.dtype in (torch.float16, torch.bfloat16) else logits_BC
        weights_C = self._class_weights_C
        if weights_C is not None and weights_C.dtype != logits_BC.dtype:
            weights_C = weights_C.to(logits_BC.dtype)
        return F.cross_entropy(logits_BC, labels_B, weight=weights_C, label_smoothing=self._smoothing, reduction="none")

    def mixed_losses(self, logits_BC: Tensor, labels_B: Tensor, partner_labels_B: Tensor, lam_B: Tensor) -> Tensor:
        """Loss of images that are `lam` of one label and 1 - `lam` of another (mixup, cutmix).

        Cross-entropy is linear in its target, so this equals the loss of the mixed target.
        """
        lam_B = lam_B.to(logits_BC.dtype if logits_BC.dtype == torch.float64 else torch.float32)
        own_B = self.losses(logits_BC, labels_B)
        return lam_B * own_B + (1 - lam_B) * self.losses(logits_BC, partner_labels_B)


def class_weights(section: LossSection, labels_N: np.ndarray, classes: Sequence[str]) -> Tensor | None:
    """Weight of each class, shape (C,) float64, scaled to a mean of 1 over the training images.

    Args:
        section: the recipe's loss.
        labels_N: class numbers of the N training images.
        classes: names of the C classes.

    Raises:
        RecipeError: weights for classes that are not there, or classes without one.
    """
    if section.class_weights == "none":
        return None
    counts_C = np.bincount(labels_N, minlength=len(classes)).astype(np.float64)
    if section.class_weights == "balanced":
        weights_C = 1.0 / np.maximum(counts_C, 1.0)
    else:
        weights_C = _weights_by_name(section.class_weights, classes)
    mean = float((weights_C * counts_C).sum() / counts_C.sum())
    if mean <= 0:
        raise RecipeError("loss.class_weights: all weights of the training images are 0; there is nothing to learn")
    return torch.from_numpy(weights_C / mean)


def _weights_by_name(weights: dict[str, float], classes: Sequence[str]) -> np.ndarray:
    for name, weight in weights.items():
        if name not in classes:
            raise RecipeError(
                f"loss.class_weights: there is no class '{name}'.{did_you_mean(name, classes)} "
                f"The classes are: {', '.join(classes)}"
            )
        if weight < 0:
            raise RecipeError(f"loss.class_weights: the weight of '{name}' is {weight}; it must be at least 0")
    missing = [name for name in classes if name not in weights]
    if missing:
        raise RecipeError(f"loss.class_weights: no weight for {', '.join(missing)}; give one for every class")
    return np.array([weights[name] for name in classes], dtype=np.float64)
