"""Compute the focal loss, which turns to the images that the network is least sure of (Lin et al. 2017).

Shapes: B images, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class FocalLoss:
    """Compute w[y] (1 - p)^gamma times the cross-entropy of each image, p the probability of its own class.

    It is not linear in its target, and so has no meaning for images that are mixed of two labels.
    """

    aux_names: tuple[str, ...] = ()

    def __init__(self, gamma: float, class_weights_C: Tensor | None) -> None:
        self._gamma = gamma
        self._class_weights_C = class_weights_C

    def __call__(self, outputs_BO: Tensor, batch: Any) -> Tensor:  # noqa: ANN401 (of images, or of codes)
        labels_B = batch.labels_B
        logits_BC = outputs_BO if outputs_BO.dtype == torch.float64 else outputs_BO.float()
        losses_B = F.cross_entropy(logits_BC, labels_B, reduction="none")
        # 1 - p from the loss itself: exact where p is all but 1, where the difference would be rounded to 0.
        losses_B = (-torch.expm1(-losses_B)).clamp_min(torch.finfo(losses_B.dtype).tiny) ** self._gamma * losses_B
        if self._class_weights_C is None:
            return losses_B
        return self._class_weights_C.to(losses_B.dtype)[labels_B] * losses_B

    def logits(self, outputs_BO: Tensor) -> Tensor:
        return outputs_BO

    def aux_losses(self, outputs_BO: Tensor, batch: Any) -> dict[str, Tensor]:  # noqa: ANN401
        return {}
