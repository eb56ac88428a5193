"""The loss of each image, to be summed and divided by the count over all processes: cross-entropy, and what a teacher
adds to it.

Promise: what is trained on is w[y] times the cross-entropy with the smoothed target, averaged over the images of the
batch over all processes; w has a mean of 1 over the training images, so that it changes what an image weighs among
others and not the size of the step. What is reported (`cross_entropy`) has neither weights nor smoothing.

Shapes: B images, C classes, D numbers of a teacher's codes, O outputs of the network, T targets of the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tlscale.errors import RecipeError, did_you_mean
from tlscale.recipe.schema import DistillSection, LossSection


class Batch(Protocol):
    """What the loss needs of a batch, of images or of codes."""

    @property
    def labels_B(self) -> Tensor: ...  # noqa: N802
    @property
    def partner_labels_B(self) -> Tensor | None: ...  # noqa: N802
    @property
    def lam_B(self) -> Tensor | None: ...  # noqa: N802


def cross_entropy(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Return the plain cross-entropy of each image, in float32 at least; shape (B,).

    This is the `loss` of every evaluation: weights and smoothing are means of training, and a figure that had them
    could not be compared with that of another recipe.
    """
    return F.cross_entropy(_at_least_float32(logits_BC), labels_B, reduction="none")


def _at_least_float32(logits_BC: Tensor) -> Tensor:
    return logits_BC.float() if logits_BC.dtype in (torch.float16, torch.bfloat16) else logits_BC


class Objective:
    """What is trained on: cross-entropy with label smoothing, class weights and mixed labels.

    Args:
        section: the recipe's loss.
        class_weights_C: from `class_weights`, or None.

    Attributes:
        lesson_names: of what `lessons` gives.
    """

    lesson_names: tuple[str, ...] = ()

    def __init__(self, section: LossSection, class_weights_C: Tensor | None) -> None:
        self._smoothing = section.label_smoothing
        self._class_weights_C = class_weights_C

    def logits(self, outputs_BO: Tensor) -> Tensor:
        """Of what the network gives, the logits, (B, C): all of it."""
        return outputs_BO

    def of_batch(self, outputs_BO: Tensor, batch: Batch) -> Tensor:
        """What is trained on: the loss of each image, shape (B,)."""
        return self._of_labels(outputs_BO, batch)

    def lessons(self, outputs_BO: Tensor, batch: Batch) -> dict[str, Tensor]:
        """What a teacher adds to the loss of each image, by the names that figures have; each (B,)."""
        return {}

    def _of_labels(self, logits_BC: Tensor, batch: Batch) -> Tensor:
        if batch.partner_labels_B is None or batch.lam_B is None:
            return self.losses(logits_BC, batch.labels_B)
        return self.mixed_losses(logits_BC, batch.labels_B, batch.partner_labels_B, batch.lam_B)

    def losses(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        """Compute w[y] times the smoothed cross-entropy of each image, in float32 at least; shape (B,).

        The weight is that of the image's own label alone. PyTorch's own `weight` beside `label_smoothing` weighs each
        class of the smoothed target by the weight of that class, so that an image of a common class is pulled to a
        rare one more than to its own.
        """
        logits_BC = _at_least_float32(logits_BC)
        losses_B = F.cross_entropy(logits_BC, labels_B, label_smoothing=self._smoothing, reduction="none")
        if self._class_weights_C is None:
            return losses_B
        return self._class_weights_C.to(losses_B.dtype)[labels_B] * losses_B

    def mixed_losses(self, logits_BC: Tensor, labels_B: Tensor, partner_labels_B: Tensor, lam_B: Tensor) -> Tensor:
        """Loss of images that are `lam` of one label and 1 - `lam` of another (mixup, cutmix).

        Each of the two labels has its own weight, lam * w[a] * CE(a) + (1 - lam) * w[b] * CE(b): partners are drawn
        evenly, so the mean weight of an image stays 1. Without weights this equals the loss of the mixed target, since
        cross-entropy is linear in it.
        """
        lam_B = lam_B.to(logits_BC.dtype if logits_BC.dtype == torch.float64 else torch.float32)
        own_B = self.losses(logits_BC, labels_B)
        return lam_B * own_B + (1 - lam_B) * self.losses(logits_BC, partner_labels_B)


class DistillObjective(Objective):
    """Cross-entropy, the squared error of predicted codes, and the divergence from a teacher's classes.

    The network gives logits and then predicted codes side by side, (B, C + D); the teacher's targets are its
    standardised codes and then, where they are learned, its logits.

    Args:
        section: the recipe's loss.
        class_weights_C: from `class_weights`, or None.
        distill: the recipe's weights of each.
        num_classes: C.
    """

    def __init__(
        self, section: LossSection, class_weights_C: Tensor | None, distill: DistillSection, num_classes: int
    ) -> None:
        super().__init__(section, class_weights_C)
        self._distill, self._num_classes = distill, num_classes
        weights = (("codes_loss", distill.codes), ("logits_loss", distill.logits), ("distill_loss", 1.0))
        self.lesson_names = tuple(name for name, weight in weights if weight > 0)

    def logits(self, outputs_BO: Tensor) -> Tensor:
        return outputs_BO[:, : self._num_classes]

    def of_batch(self, outputs_BO: Tensor, batch: Batch) -> Tensor:
        # A head that nothing else trains is trained on features that hand no gradient back.
        weight = self._distill.labels if labels_teach(self._distill) else 1.0
        losses_B = self.lessons(outputs_BO, batch)["distill_loss"]
        return losses_B if weight == 0 else losses_B + weight * self._of_labels(self.logits(outputs_BO), batch)

    def lessons(self, outputs_BO: Tensor, batch: Batch) -> dict[str, Tensor]:
        targets_BT: Tensor | None = getattr(batch, "targets_BT", None)
        assert targets_BT is not None, "a batch without what the teacher says"
        targets_BT = targets_BT.to(outputs_BO.device)
        logits_BC, codes_BD = outputs_BO[:, : self._num_classes], outputs_BO[:, self._num_classes :]
        found: dict[str, Tensor] = {}
        total_B = outputs_BO.new_zeros(len(outputs_BO))
        if self._distill.codes > 0:
            found["codes_loss"] = (codes_BD - targets_BT[:, : codes_BD.shape[1]]).square().mean(1)
            total_B = total_B + self._distill.codes * found["codes_loss"]
        if self._distill.logits > 0:
            teacher_BC = targets_BT[:, codes_BD.shape[1] :]
            found["logits_loss"] = _softened_divergence(logits_BC, teacher_BC, self._distill.temperature)
            total_B = total_B + self._distill.logits * found["logits_loss"]
        return {**found, "distill_loss": total_B}


def labels_teach(distill: DistillSection) -> bool:
    """Whether the loss on logits, of labels or of a teacher's classes, has a part in what the backbone learns."""
    return distill.labels > 0 or distill.logits > 0


def _softened_divergence(logits_BC: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of each image, times the temperature's square, so that the gradient's size does not
    depend on it (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2)."""
    logits_BC = logits_BC if logits_BC.dtype == torch.float64 else logits_BC.float()
    own_BC = F.log_softmax(logits_BC / temperature, dim=1)
    wanted_BC = F.log_softmax(teacher_BC.to(logits_BC.dtype) / temperature, dim=1)
    return F.kl_div(own_BC, wanted_BC, reduction="none", log_target=True).sum(1) * temperature**2


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
