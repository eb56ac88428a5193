"""Compute the loss of images that have several labels each: of every class whether the image has it.

Promise: the loss of an image is the mean over the classes of the weighted binary loss of each. The weights of a class
have a mean of 1 over the training images. What is reported (`binary_cross_entropy`) has no weights.

Shapes: B images, C classes, N training images, 2: without the label, and with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tlscale.errors import RecipeError
from tlscale.recipe.schema import LossSection


def binary_cross_entropy(logits_BC: Tensor, labels_BC: Tensor) -> Tensor:
    """Return the binary cross-entropy of each image, the mean over the classes, in float32 at least; shape (B,)."""
    logits_BC = _at_least_float32(logits_BC)
    losses_BC = F.binary_cross_entropy_with_logits(logits_BC, labels_BC.to(logits_BC.dtype), reduction="none")
    return losses_BC.mean(dim=1)


def _at_least_float32(logits_BC: Tensor) -> Tensor:
    return logits_BC.float() if logits_BC.dtype in (torch.float16, torch.bfloat16) else logits_BC


class BinaryLoss:
    """Compute the binary cross-entropy of every class, with weights and mixed labels."""

    aux_names: tuple[str, ...] = ()

    def __init__(self, section: LossSection, weights_2C: Tensor | None) -> None:
        self._section, self._weights_2C = section, weights_2C

    def __call__(self, outputs_BO: Tensor, batch: Any) -> Tensor:  # noqa: ANN401 (of images, or of codes)
        own_B: Tensor = self.losses(outputs_BO, batch.labels_B)
        if batch.partner_labels_B is None or batch.lam_B is None:
            return own_B
        # Linear in the target: that of the mixed labels.
        lam_B: Tensor = batch.lam_B.to(own_B.dtype)
        return lam_B * own_B + (1 - lam_B) * self.losses(outputs_BO, batch.partner_labels_B)

    def logits(self, outputs_BO: Tensor) -> Tensor:
        return outputs_BO

    def aux_losses(self, outputs_BO: Tensor, batch: Any) -> dict[str, Tensor]:  # noqa: ANN401
        return {}

    def losses(self, logits_BC: Tensor, labels_BC: Tensor) -> Tensor:
        """Compute the loss of each image, in float32 at least; shape (B,)."""
        logits_BC = _at_least_float32(logits_BC)
        losses_BC = self.of_classes(logits_BC, labels_BC)
        if self._weights_2C is not None:
            weights_2C = self._weights_2C.to(losses_BC.dtype)
            losses_BC = torch.where(labels_BC, weights_2C[1], weights_2C[0]) * losses_BC
        return losses_BC.mean(dim=1)

    def of_classes(self, logits_BC: Tensor, labels_BC: Tensor) -> Tensor:
        """Compute the loss of each class of each image, without weights."""
        return F.binary_cross_entropy_with_logits(logits_BC, labels_BC.to(logits_BC.dtype), reduction="none")


class AsymmetricLoss(BinaryLoss):
    """Compute the asymmetric loss (Ridnik et al. 2021), in which labels that an image lacks weigh less.

    They are the many, and easy ones hide the few that it has. With a probability p of the class, and q = max(p -
    margin, 0): -log(p) of a label that the image has, -q^gamma log(1 - q) of one that it lacks.
    """

    def of_classes(self, logits_BC: Tensor, labels_BC: Tensor) -> Tensor:
        """Compute the loss of each class of each image, without weights."""
        section, tiny = self._section, torch.finfo(logits_BC.dtype).tiny
        # Clamped where the power or the logarithm would have no finite slope; there the slope is 0.
        shifted_BC = (logits_BC.sigmoid() - section.negative_margin).clamp_min(tiny)
        missed_BC = (logits_BC.neg().sigmoid() + section.negative_margin).clamp(tiny, 1.0)
        lacking_BC = -(shifted_BC**section.negative_gamma) * missed_BC.log()
        return torch.where(labels_BC, -F.logsigmoid(logits_BC), lacking_BC)


def label_weights(section: LossSection, labels_NC: np.ndarray, classes: Sequence[str], named: _Named) -> Tensor | None:
    """Return the weight of each class where an image lacks it and where it has it, (2, C) float64; None: all are 1.

    `balanced`: those with the label and those without have equal weight in all, as scikit-learn has it of one class
    against the rest. By name: those with the label weigh so many times as much as those without.

    Args:
        named: looks the weights of classes up by their names, (C,).

    Raises:
        RecipeError: weights for classes that are not there, or classes without one.
    """
    if section.class_weights == "none":
        return None
    num_images = len(labels_NC)
    with_C = labels_NC.sum(axis=0).astype(np.float64)
    without_C = num_images - with_C
    if section.class_weights == "balanced":
        # Of a label that all images have, or none, one side has no image to weigh.
        sides_C = np.where((with_C > 0) & (without_C > 0), 2.0, 1.0)
        weights_2C = num_images / (sides_C * np.maximum(np.stack([without_C, with_C]), 1.0))
        return torch.from_numpy(weights_2C)
    weights_C = named(section.class_weights, classes)
    totals_C = without_C + weights_C * with_C
    if (totals_C <= 0).any():
        name = classes[int((totals_C <= 0).argmax())]
        problem = f"the weight of '{name}' is 0, and all training images have that label: nothing is learned of it"
        raise RecipeError(problem, key="loss.class_weights")
    return torch.from_numpy(np.stack([np.ones_like(weights_C), weights_C]) * num_images / totals_C)


_Named = Callable[[dict[str, float], Sequence[str]], np.ndarray]
