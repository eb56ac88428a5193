"""Fit logistic regression of each class against the rest, for a whole path of strengths at once.

It is the search of `logistic`, with the classes of a strength as one problem: their losses have no parameter in common,
and so the lowest sum is the lowest of each. A strength is `lam` in

    mean over images of the sum over classes of the binary cross-entropy + lam/2 * |W|^2

so it means for each class what it means in scikit-learn's `LogisticRegression(C=1 / (lam * N))`.

Letters: N images, D features, R principal axes, C classes, L strengths, A strengths not yet solved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tlscale.codes.probes.linear import LinearFit, LinearPath, standardise
from tlscale.codes.probes.logistic import Problem, solve


class _BinaryProblem(Problem):
    """Hold what all strengths share, of as many classes as an image may have."""

    def __init__(self, codes_NR: Tensor, labels_NC: Tensor, num_classes: int, variances_R: Tensor) -> None:
        super().__init__(codes_NR, labels_NC, num_classes, variances_R)
        self.bound_Q11 = self.bound_Q11 / 2  # p (1 - p) is at most 1/4

    def targets(self, labels_N: Tensor, num_classes: int) -> Tensor:
        return labels_N

    def residuals(self, logits_NAC: Tensor) -> Tensor:
        return logits_NAC.sigmoid().sub_(self.targets_N1C)

    def centred(self, gradient_QAC: Tensor) -> Tensor:
        return gradient_QAC

    def curvature(self, residuals_NAC: Tensor, change_NAC: Tensor) -> Tensor:
        shares_NAC = residuals_NAC + self.targets_N1C
        weights_NAC = shares_NAC * (1 - shares_NAC)
        return (weights_NAC * change_NAC.square()).sum((0, 2), dtype=torch.float64) / len(change_NAC)


def fit_one_against_rest(codes_ND: Tensor, labels_NC: Tensor, strengths: Sequence[float]) -> LinearFit:
    """Standardise raw codes, and fit a classifier of every class for each strength.

    A class that no image has, or all have, gets zero weights, and a bias that gives all but 1 image in N + 2 the right
    answer: its own optimum would be infinite.

    Args:
        codes_ND: of any precision.
        labels_NC: bool.
        strengths: to try.
    """
    scale, standard_ND = standardise(codes_ND)
    labels_NC = labels_NC.to(standard_ND.device)
    mixed_C = labels_NC.any(dim=0) & ~labels_NC.all(dim=0)
    path = solve(_BinaryProblem, standard_ND, labels_NC[:, mixed_C], int(mixed_C.sum()), strengths)
    num_images, num_classes = labels_NC.shape
    weights_LDC = path.weights_LDC.new_zeros(len(strengths), standard_ND.shape[1], num_classes)
    weights_LDC[:, :, mixed_C] = path.weights_LDC
    sure = math.log(num_images + 1)
    biases_LC = torch.where(labels_NC.all(dim=0), sure, -sure).to(weights_LDC.dtype).repeat(len(strengths), 1)
    biases_LC[:, mixed_C] = path.biases_LC
    return LinearFit(LinearPath(weights_LDC, biases_LC, path.converged), scale)
