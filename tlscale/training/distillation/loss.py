"""Compute the loss of a student: of labels, of predicted codes, and of a teacher's classes.

Shapes: B images, C classes, D numbers of a teacher's codes, O outputs of the network, T targets of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tlscale.recipe.schema import DistillSection


class TaughtBatch(Protocol):
    """Tell of a batch of images what its teacher's targets are."""

    @property
    def targets_BT(self) -> Tensor | None: ...  # noqa: N802


class DistillationLoss:
    """Add up the loss of labels, the squared error of predicted codes, and the divergence from a teacher's classes.

    The network gives logits and then predicted codes side by side, (B, C + D); the teacher's targets are its
    standardised codes and then, where they are learned, its logits. `label_loss` maps logits and a batch to (B,).
    """

    def __init__(self, label_loss: Callable[[Tensor, Any], Tensor], distill: DistillSection, num_classes: int) -> None:
        self._label_loss, self._distill, self._num_classes = label_loss, distill, num_classes
        weights = (("codes_loss", distill.codes), ("logits_loss", distill.logits), ("distill_loss", 1.0))
        self.aux_names = tuple(name for name, weight in weights if weight > 0)

    def __call__(self, outputs_BO: Tensor, batch: TaughtBatch) -> Tensor:
        # A head that nothing else trains is trained on features that hand no gradient back.
        weight = self._distill.labels if labels_teach(self._distill) else 1.0
        losses_B = self.aux_losses(outputs_BO, batch)["distill_loss"]
        return losses_B if weight == 0 else losses_B + weight * self._label_loss(self.logits(outputs_BO), batch)

    def logits(self, outputs_BO: Tensor) -> Tensor:
        return outputs_BO[:, : self._num_classes]

    def aux_losses(self, outputs_BO: Tensor, batch: TaughtBatch) -> dict[str, Tensor]:
        targets_BT = batch.targets_BT
        assert targets_BT is not None, "a batch without its teacher's targets"
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
    """Return whether the loss on logits, of labels or of a teacher's classes, teaches the backbone."""
    return distill.labels > 0 or distill.logits > 0


def _softened_divergence(logits_BC: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
    """Compute the Kullback-Leibler divergence of each image, times the square of the temperature.

    So the size of the gradient does not depend on the temperature (Hinton et al. 2015, "Distilling the Knowledge in a
    Neural Network", section 2).
    """
    logits_BC = logits_BC if logits_BC.dtype == torch.float64 else logits_BC.float()
    own_BC = F.log_softmax(logits_BC / temperature, dim=1)
    wanted_BC = F.log_softmax(teacher_BC.to(logits_BC.dtype) / temperature, dim=1)
    return F.kl_div(own_BC, wanted_BC, reduction="none", log_target=True).sum(1) * temperature**2
