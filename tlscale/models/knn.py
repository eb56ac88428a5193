"""The votes of nearest neighbours as a layer: codes to logits, so that a probe of neighbours is a network like others.

Shapes: B images, D features, C classes, N codes that are known, K of them nearest.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tlscale.errors import ModelError

VOTE_TEMPERATURE = 0.07  # as in DINO (Caron et al. 2021), after Wu et al. 2018
_MOST_SIMILARITIES = 2**24  # kept at a time: 64 MiB


class KnnHead(nn.Module):
    """The votes of the K nearest training images, as logits.

    Near means a high cosine of standardised codes. A neighbour's vote weighs `exp(cosine / 0.07)`; weights are scaled
    so that the K of them sum to K, one more vote is shared by all classes alike, and the logits are the logarithms of
    the shares: their softmax is the shares, and no class has a share of 0.

    Args:
        state: what `state_dict()` of such a head gave: `codes_ND` (standardised, of length 1), `labels_N`, `mean_D`
            and `std_D`.
        k: K, at most N.
        num_classes: C.

    Raises:
        ModelError: the state is not that of such a head, or has fewer than k codes.
    """

    codes_ND: Tensor
    labels_N: Tensor
    mean_D: Tensor
    std_D: Tensor

    def __init__(self, state: Mapping[str, Tensor], k: int, num_classes: int) -> None:
        super().__init__()
        self.k, self.num_classes = k, num_classes
        for name in ("codes_ND", "labels_N", "mean_D", "std_D"):
            if name not in state:
                raise ModelError(f"the nearest neighbours lack their {name}", key="probe")
            self.register_buffer(name, state[name])
        self._check(num_classes)
        if not 1 <= k <= len(self.labels_N):
            raise ModelError(
                f"k = {k} nearest neighbours cannot be found among {len(self.labels_N)} codes", key="probe"
            )

    def _check(self, num_classes: int) -> None:
        """Check that shapes and labels go together.

        Raises:
            ModelError: they do not.
        """
        labels, width = self.labels_N, self.mean_D.shape
        whole = self.codes_ND.ndim == 2 and labels.dtype == torch.int64 and self.codes_ND.is_floating_point()
        if not whole or self.codes_ND.shape != (*labels.shape, *width) or self.std_D.shape != width:
            raise ModelError("codes, labels, mean and std of the nearest neighbours do not go together", key="probe")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ModelError(f"the nearest neighbours have labels beyond the {num_classes} classes", key="probe")

    def state(self) -> dict[str, Tensor]:
        """Return the buffers themselves, by name."""
        return dict(self.named_buffers())

    @property
    def at_once(self) -> int:
        """Return how many images are compared at a time."""
        return max(1, _MOST_SIMILARITIES // len(self.labels_N))

    def neighbours(self, codes_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and labels of the nearest, nearest first: (B, K) each. Memory does not grow with B * N."""
        cosines, rows = [], []
        for block_BD in torch.split(codes_BD, self.at_once):
            unit_BD = F.normalize((block_BD.to(self.mean_D) - self.mean_D) / self.std_D, dim=1)
            top = (unit_BD @ self.codes_ND.T).topk(self.k, dim=1)
            cosines.append(top.values)
            rows.append(top.indices)
        return torch.cat(cosines), self.labels_N[torch.cat(rows)]

    def votes(self, cosines_BK: Tensor, labels_BK: Tensor) -> Tensor:
        """Compute logits (B, C) from some nearest neighbours."""
        k = cosines_BK.shape[1]
        weights_BK = (cosines_BK / VOTE_TEMPERATURE).softmax(dim=1) * k
        votes_BC = weights_BK.new_full((len(labels_BK), self.num_classes), 1 / self.num_classes)
        for neighbour in range(k):  # one at a time: a scatter of many adds in no fixed order on a GPU
            votes_BC.scatter_add_(1, labels_BK[:, neighbour, None], weights_BK[:, neighbour, None])
        return (votes_BC / (k + 1)).log()

    def forward(self, codes_BD: Tensor) -> Tensor:
        # In full precision under autocast too: a rounded cosine is another neighbour.
        with torch.autocast(codes_BD.device.type, enabled=False):
            return self.votes(*self.neighbours(codes_BD))
