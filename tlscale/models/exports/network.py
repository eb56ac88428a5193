"""Write a trained model as a network without hooks or blocks, which exporters can follow.

Promise: it computes what the model computes; that is not believed but compared, on what the exporter made of it.

Shapes: B images, C classes, D features, K neighbours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tlscale.models.classifier import CodesClassifier
from tlscale.models.features import PENULTIMATE, at_least_float32, layout_of, only_tensor
from tlscale.models.knn import VOTE_TEMPERATURE, KnnHead


def exportable(model: nn.Module, images_BCHW: Tensor) -> nn.Module:
    """Return the network for exporters; the model is left as it is.

    Args:
        images_BCHW: at least one, from which is read what form a layer's codes have.
    """
    if not isinstance(model, CodesClassifier):
        return model.eval()
    head = _Votes(model.head) if isinstance(model.head, KnnHead) else model.head
    if model.layer == PENULTIMATE:
        return nn.Sequential(model.backbone, head).eval()
    return _EarlyCodes(model, head, images_BCHW).eval()


class _EarlyCodes(nn.Module):
    """Take the codes of a layer by a hook that stays; what comes behind the layer has no part in the result."""

    def __init__(self, model: CodesClassifier, head: nn.Module, images_BCHW: Tensor) -> None:
        super().__init__()
        self.backbone, self.head = copy.deepcopy(model.backbone), head  # the hook is its own
        self._layer, self._pool = model.layer, model.pool
        self._taken: list[Tensor] = []
        self._take: Callable[[Tensor], Tensor] = lambda value: value
        self.backbone.get_submodule(self._layer).register_forward_hook(self._keep)
        with torch.no_grad():
            self.backbone(images_BCHW)
        # Once, as exporters know sizes as symbols, which decide nothing.
        layout = layout_of(at_least_float32(self._taken.pop()), self._layer, self.backbone, images_BCHW.shape)
        self._take = lambda value: layout.positions(value).pooled(self._pool, self._layer)

    def _keep(self, _module: nn.Module, _inputs: object, value: object) -> None:
        tensor = only_tensor(value)
        assert tensor is not None, "the model was loaded with this layer"
        self._taken.append(self._take(at_least_float32(tensor)))

    def forward(self, images: Tensor) -> Tensor:
        self._taken.clear()
        self.backbone(images)
        return cast(Tensor, self.head(self._taken.pop()))


class _Votes(nn.Module):
    """The votes of nearest neighbours, of all images at once: blocks would tie the network to a number of images."""

    known_ND: Tensor
    labels_N: Tensor
    mean_D: Tensor
    std_D: Tensor

    def __init__(self, head: KnnHead) -> None:
        super().__init__()
        self.k, self.num_classes = head.k, head.num_classes
        self.register_buffer("known_ND", head.codes_ND)
        self.register_buffer("mean_D", head.mean_D)
        self.register_buffer("std_D", head.std_D)
        self.register_buffer("labels_N", head.labels_N)

    def forward(self, codes_BD: Tensor) -> Tensor:
        unit_BD = F.normalize((codes_BD.to(self.mean_D) - self.mean_D) / self.std_D, dim=1)
        top = (unit_BD @ self.known_ND.T).topk(self.k, dim=1)
        # As `KnnHead.votes`, which scatters them into a tensor whose size exporters would take for a constant.
        weights_BK = (top.values / VOTE_TEMPERATURE).softmax(dim=1) * self.k
        classes_C = torch.arange(self.num_classes, device=codes_BD.device)
        is_for_BKC = self.labels_N[top.indices][:, :, None] == classes_C
        votes_BC = (weights_BK[:, :, None] * is_for_BKC).sum(1) + 1 / self.num_classes
        return (votes_BC / (self.k + 1)).log()
