"""Fit linear classifiers to codes, one for each of several regularisation strengths, by any of the solvers.

Promise: pure functions of their arguments; nothing is random. Every strength is solved to a stated error, or its
`converged` is False. A strength is `lam` in

    mean over images of the loss + lam/2 * |W|^2        (`logistic`, `sklearn`: cross-entropy)
    mean over images of |y - xW - b|^2 + lam * |W|^2    (`ridge`: y is 1 for the true class and 0 for the others)

so it means the same for any number of images; scikit-learn's `C` is 1 / (lam * N), its ridge `alpha` is lam * N. The
bias b is not regularised.

Letters: N images, M held-out images, D features, R principal axes, C classes, L strengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Scale:
    """Hold mean and standard deviation of each feature, float64; the deviation is 1 where all images agree."""

    mean_D: Tensor
    std_D: Tensor

    def apply(self, codes_MD: Tensor) -> Tensor:
        """Standardise other codes by this scale."""
        return (codes_MD.to(self.mean_D) - self.mean_D) / self.std_D


def standardise(codes_ND: Tensor) -> tuple[Scale, Tensor]:
    """Return the scale of some codes, and them standardised by it: float64 (N, D)."""
    # A device without float64 (mps) leaves the work to the CPU.
    device = torch.device("cpu") if codes_ND.device.type == "mps" else codes_ND.device
    constant_D = (codes_ND == codes_ND[0]).all(dim=0).to(device)
    result_ND = codes_ND.to(device, torch.float64, copy=True)
    mean_D = result_ND.mean(0)
    result_ND -= mean_D
    std_D = torch.where(constant_D, 1.0, result_ND.square().mean(0).sqrt())
    result_ND /= std_D
    # The mean of equal numbers may miss them by a rounding.
    result_ND[:, constant_D] = 0
    return Scale(mean_D, std_D), result_ND


@dataclass(frozen=True, eq=False)
class LinearPath:
    """Hold one classifier for each strength: `logits = codes @ weights + biases`; float64."""

    weights_LDC: Tensor
    biases_LC: Tensor
    converged: tuple[bool, ...]

    def logits(self, index: int, codes_ND: Tensor) -> Tensor:
        """Compute the logits (N, C) of the classifier of one strength."""
        return codes_ND @ self.weights_LDC[index] + self.biases_LC[index]


Solver: TypeAlias = Callable[[Tensor, Tensor, int, Sequence[float]], LinearPath]
"""From standardised codes (N, D), labels (N,) of which every class has an image, C, and strengths."""


@dataclass(frozen=True, eq=False)
class LinearFit:
    """Apply a path to raw codes, by the scale of the codes that it was fitted to."""

    path: LinearPath
    scale: Scale

    @property
    def converged(self) -> tuple[bool, ...]:
        return self.path.converged

    def logits(self, codes_MD: Tensor) -> Iterator[Tensor]:
        standard_MD = self.scale.apply(codes_MD)
        return (self.path.logits(index, standard_MD) for index in range(len(self.path.converged)))

    def head(self, index: int) -> nn.Linear:
        """Build the layer that maps raw codes to logits: the scale is folded into its weights."""
        weights_DC = self.path.weights_LDC[index] / self.scale.std_D[:, None]
        layer = nn.Linear(weights_DC.shape[0], weights_DC.shape[1], device=weights_DC.device)
        with torch.no_grad():
            layer.weight.copy_(weights_DC.T)
            layer.bias.copy_(self.path.biases_LC[index] - self.scale.mean_D @ weights_DC)
        return layer


def fit_linear(
    solver: Solver, codes_ND: Tensor, labels_N: Tensor, num_classes: int, strengths: Sequence[float]
) -> LinearFit:
    """Standardise raw codes, and fit a classifier to them for each strength."""
    scale, standard_ND = standardise(codes_ND)
    return LinearFit(linear_path(solver, standard_ND, labels_N, num_classes, strengths), scale)


def linear_path(
    solver: Solver, codes_ND: Tensor, labels_N: Tensor, num_classes: int, strengths: Sequence[float]
) -> LinearPath:
    """Fit classifiers of `num_classes` columns to labels in which some classes may be absent.

    An absent class gets zero weights, and so low a bias that no training image gives it a probability above
    1 / (N + 2): its own optimum would be minus infinity. Codes are float64, each feature of mean 0; labels int64, at
    least two different ones.
    """
    present_C, relabelled_N = torch.unique(labels_N, return_inverse=True)
    path = solver(codes_ND, relabelled_N, len(present_C), strengths)
    if len(present_C) == num_classes:
        return path
    weights_LDC = path.weights_LDC.new_zeros(len(strengths), codes_ND.shape[1], num_classes)
    weights_LDC[:, :, present_C] = path.weights_LDC
    least = [float(path.logits(index, codes_ND).logsumexp(1).min()) for index in range(len(strengths))]
    biases_L = path.biases_LC.new_tensor(least) - math.log(len(labels_N) + 1)
    biases_LC = biases_L[:, None].repeat(1, num_classes)
    biases_LC[:, present_C] = path.biases_LC
    return LinearPath(weights_LDC, biases_LC, path.converged)


def principal_axes(codes_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Compute orthonormal axes along which the codes vary, (D, R), and the variance along each, (R,), ascending.

    From the smaller one of the D x D covariance and the N x N Gram matrix. Axes without variance, up to rounding, are
    skipped: there the regularised optimum is 0.
    """
    num_images, width = codes_ND.shape
    if num_images >= width:
        squares, axes = torch.linalg.eigh(codes_ND.T @ codes_ND)
    else:
        squares, images = torch.linalg.eigh(codes_ND @ codes_ND.T)
        axes = codes_ND.T @ images / squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()
    kept = squares > squares[-1] * torch.finfo(squares.dtype).eps * max(num_images, width)
    return axes[:, kept], squares[kept] / num_images
