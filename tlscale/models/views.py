"""Average what a network says of several views of an image (test-time augmentation).

Promise: what comes out is one answer an image, in the place of logits: its softmax (of several labels its sigmoid) is
the mean over the views. Each view goes through the network by itself, in the batch that the plain images have.

Shapes: V views, B images, C classes, O outputs of the network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mean_of_views(logits: Sequence[Tensor], *, several: bool) -> Tensor:
    """Return the logarithm of the mean softmax of (B, C) each; of several labels the logit of the mean sigmoid.

    In float32 at least. One view is given back as it is.
    """
    if len(logits) == 1:
        return logits[0]
    as_float = [one if one.dtype == torch.float64 else one.float() for one in logits]
    logits_VBC = torch.nan_to_num(torch.stack(as_float), nan=math.nan)  # NaN stays what it is: no answer
    if several:
        return F.logsigmoid(logits_VBC).logsumexp(0) - F.logsigmoid(-logits_VBC).logsumexp(0)
    return logits_VBC.log_softmax(2).logsumexp(0) - math.log(len(logits))


class ViewsMean(nn.Module):
    """Wrap a network: of the values of all views, one after the other, give one answer."""

    def __init__(self, network: nn.Module, num_views: int, num_classes: int, *, several: bool) -> None:
        """`num_classes`: the first outputs are logits; what a student gives behind them is that of the first view."""
        super().__init__()
        self.network = network
        self._num_views, self._num_classes, self._several = num_views, num_classes, several
        self.training = network.training

    def forward(self, *values: Tensor) -> Tensor:
        each = len(values) // self._num_views
        outputs = [self.network(*values[start : start + each]) for start in range(0, len(values), each)]
        logits_BC = mean_of_views([one[:, : self._num_classes] for one in outputs], several=self._several)
        others_BO = outputs[0][:, self._num_classes :]
        return torch.cat([logits_BC, others_BO.to(logits_BC.dtype)], dim=1) if others_BO.shape[1] else logits_BC


def over_views(network: nn.Module, num_views: int, num_classes: int, *, several: bool) -> nn.Module:
    """Return the network; where there are several views, wrapped."""
    return network if num_views == 1 else ViewsMean(network, num_views, num_classes, several=several)
