"""Standardise and rotate codes block by block, for fits whose arrays of images x classes would not fit in memory.

Letters: N images, B images of a block, D features, R principal axes, C classes, Q = R + 1 rows of parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tlscale.distributed.signals import check_stop

MOST_EXACT = 250_000_000
"""Images x features x classes up to which a fit holds everything at once, and solves it as exactly as it can."""

_FEW = 8  # images of a class
_MOST_EXACT_OF_FEW = 5_000_000
"""The same, for searches where classes have few images. There weak strengths take hundreds of steps, and these are of
small products: minutes in all where other processes keep the cores busy."""

_MOST_NUMBERS = 2**22  # of a block: 16 MiB in float32
DOING = "fitting the probe"


def is_large(num_images: int, width: int, num_classes: int) -> bool:
    """Report whether a fit is made block by block."""
    return num_images * width * num_classes > MOST_EXACT


def has_few_of_class(num_images: int, width: int, num_classes: int) -> bool:
    """Report whether a search is made from strength to strength because classes have few images."""
    return num_images < _FEW * num_classes and num_images * width * num_classes > _MOST_EXACT_OF_FEW


def blocks(num_images: int, width: int) -> Iterator[slice]:
    """Divide images into blocks, of arrays as wide as this; ask before each whether the process is to stop."""
    rows = max(1, _MOST_NUMBERS // width)
    for start in range(0, num_images, rows):
        check_stop(DOING)
        yield slice(start, min(start + rows, num_images))


@dataclass(frozen=True, eq=False)
class Rotation:
    """Hold the scale of some codes, and the axes along which they vary once they are standardised; float64."""

    mean_D: Tensor
    std_D: Tensor
    axes_DR: Tensor
    variances_R: Tensor

    @classmethod
    def of(cls, codes_ND: Tensor) -> Rotation:
        """Compute it in two passes over the codes, which are not copied."""
        sums = [codes_ND[rows].double().sum(0) for rows in blocks(*codes_ND.shape)]
        mean_D = torch.stack(sums).sum(0) / len(codes_ND)
        square_DD = torch.zeros(len(mean_D), len(mean_D), dtype=torch.float64, device=codes_ND.device)
        for rows in blocks(*codes_ND.shape):
            centred_BD = codes_ND[rows].double() - mean_D
            square_DD += centred_BD.T @ centred_BD
        constant_D = (codes_ND == codes_ND[0]).all(dim=0)
        std_D = torch.where(constant_D, 1.0, (square_DD.diag() / len(codes_ND)).sqrt())
        square_DD = square_DD / std_D / std_D[:, None]
        square_DD[constant_D], square_DD[:, constant_D] = 0, 0  # their mean may miss them by a rounding
        squares, axes_DD = torch.linalg.eigh(square_DD)
        kept = squares > squares[-1] * torch.finfo(squares.dtype).eps * len(codes_ND)
        return cls(mean_D, std_D, axes_DD[:, kept], squares[kept] / len(codes_ND))

    def apply(self, codes_BD: Tensor) -> Tensor:
        """Standardise and rotate some codes: (B, R), float64."""
        return ((codes_BD.double() - self.mean_D) / self.std_D) @ self.axes_DR

    def whole(self, codes_ND: Tensor, order_N: Tensor) -> Tensor:
        """Standardise and rotate all codes, in an order, with a feature that is 1: (N, Q), float32."""
        result_NQ = codes_ND.new_ones((len(codes_ND), len(self.variances_R) + 1), dtype=torch.float32)
        for rows in blocks(*codes_ND.shape):
            result_NQ[rows, :-1] = self.apply(codes_ND[order_N[rows]]).float()
        return result_NQ

    def head(self, params_QC: Tensor) -> nn.Linear:
        """Build the layer that maps raw codes to logits, in float32: scale and rotation are folded into its weights."""
        weights_DC = self.axes_DR @ params_QC[:-1].double() / self.std_D[:, None]
        layer = nn.Linear(weights_DC.shape[0], weights_DC.shape[1], device=weights_DC.device)
        with torch.no_grad():
            layer.weight.copy_(weights_DC.T)
            layer.bias.copy_(params_QC[-1].double() - self.mean_D @ weights_DC)
        return layer

    def params_of(self, layer: nn.Linear) -> Tensor:
        """Return the parameters (Q, C) that have the logits of a layer, as far as the axes reach; float32."""
        weights_DC = layer.weight.detach().double().T
        bias_C = layer.bias.detach().double() + self.mean_D @ weights_DC
        return torch.cat([self.axes_DR.T @ (self.std_D[:, None] * weights_DC), bias_C[None]]).float()


@dataclass(frozen=True, eq=False)
class HeadsFit:
    """Hold a layer for each strength that was carried on, None for the others."""

    heads: tuple[nn.Linear | None, ...]
    converged: tuple[bool, ...]

    def logits(self, codes_MD: Tensor) -> Iterator[Tensor | None]:
        """Yield the logits (M, C) of raw codes for each strength, in order."""
        for head in self.heads:
            if head is None:
                yield None
                continue
            weights_DC, bias_C = head.weight.detach().double().T, head.bias.detach().double()
            parts = [codes_MD[rows].double() @ weights_DC + bias_C for rows in blocks(len(codes_MD), len(bias_C))]
            yield torch.cat(parts).float()

    def head(self, index: int) -> nn.Linear:
        """Return the layer of a strength that was carried on."""
        head = self.heads[index]
        assert head is not None, "a strength that was rejected on a sample is not chosen"
        return head


def to_compute(codes_ND: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return both where float64 is known: a device without it (mps) leaves the work to the CPU."""
    device = torch.device("cpu") if codes_ND.device.type == "mps" else codes_ND.device
    return codes_ND.to(device), labels_N.to(device)


def by_class_order(labels_N: Tensor) -> Tensor:
    """Order images such that the first of them, however many, hold each class in its proportion; the same each time."""
    shuffled_N = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(0))
    labels_N = labels_N.cpu()[shuffled_N]
    counts_C = labels_N.bincount()
    sorted_N = labels_N.argsort(stable=True)
    starts_C = counts_C.cumsum(0) - counts_C
    rank_N = torch.empty_like(sorted_N)
    rank_N[sorted_N] = torch.arange(len(labels_N)) - starts_C[labels_N[sorted_N]]
    return shuffled_N[(rank_N / counts_C[labels_N]).argsort(stable=True)]
