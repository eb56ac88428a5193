"""Classify by the nearest training images.

Letters: N images, M held-out images, D features, C classes, K neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tlscale.codes.probes.blockwise import DOING
from tlscale.codes.probes.linear import standardise
from tlscale.distributed.signals import check_stop
from tlscale.models.knn import KnnHead


@dataclass(frozen=True, eq=False)
class KnnFit:
    """Vote with several numbers of nearest neighbours."""

    most: KnnHead
    """Has the largest of these numbers."""
    numbers: tuple[int, ...]

    @property
    def converged(self) -> tuple[bool, ...]:
        return (True,) * len(self.numbers)  # there is nothing to solve

    def logits(self, codes_MD: Tensor) -> Iterator[Tensor]:
        parts = []
        for block_BD in torch.split(codes_MD, self.most.at_once):
            check_stop(DOING)
            parts.append(self.most.neighbours(block_BD))
        cosines_MK, labels_MK = (torch.cat(part) for part in zip(*parts, strict=True))  # once for all numbers
        return (self.most.votes(cosines_MK[:, :k], labels_MK[:, :k]) for k in self.numbers)

    def head(self, index: int) -> KnnHead:
        return KnnHead(self.most.state(), self.numbers[index], self.most.num_classes)


def fit_knn(codes_ND: Tensor, labels_N: Tensor, num_classes: int, numbers: Sequence[float]) -> KnnFit:
    """Standardise raw codes and scale each to length 1; that is all a search by cosine needs."""
    scale, standard_ND = standardise(codes_ND)
    state = {
        "codes_ND": F.normalize(standard_ND, dim=1).float(),
        "labels_N": labels_N.to(scale.mean_D.device),
        "mean_D": scale.mean_D.float(),
        "std_D": scale.std_D.float(),
    }
    ks = tuple(int(number) for number in numbers)
    return KnnFit(KnnHead(state, max(ks), num_classes), ks)
