"""Fit probes to images that weigh by their class: w[y] times the loss of each, the mean of w over the images being 1.

So `lam` of `linear` means what it means without weights, and scikit-learn's `class_weight` is w. Standardisation has no
weights, as scikit-learn's has none.

Letters: N images, B of a block, D features, R principal axes, C classes, A strengths not yet solved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tlscale.codes.probes.blockwise import DOING, HeadsFit, Rotation, blocks, by_class_order, to_compute
from tlscale.codes.probes.linear import LinearFit, LinearPath, fit_linear
from tlscale.codes.probes.logistic import Problem, solve
from tlscale.codes.probes.ridge import MOST_SCORES, best_scale
from tlscale.codes.probes.scikit import sklearn_path
from tlscale.distributed.signals import check_stop


class _WeightedProblem(Problem):
    """Hold what all strengths share, of multinomial regression with weights above 0."""

    def __init__(
        self, weights_C: Tensor, codes_NR: Tensor, labels_N: Tensor, num_classes: int, variances_R: Tensor
    ) -> None:
        super().__init__(codes_NR, labels_N, num_classes, variances_R)
        self._weights_N11 = weights_C.to(codes_NR)[labels_N][:, None, None]

    def residuals(self, logits_NAC: Tensor) -> Tensor:
        return super().residuals(logits_NAC).mul_(self._weights_N11)

    def curvature(self, residuals_NAC: Tensor, change_NAC: Tensor) -> Tensor:
        shares_NAC = residuals_NAC / self._weights_N11 + self.targets_N1C
        mean_NA1 = (shares_NAC * change_NAC).sum(2, keepdim=True)
        spread_NAC = self._weights_N11 * shares_NAC * (change_NAC - mean_NA1).square()
        return spread_NAC.sum((0, 2), dtype=torch.float64) / len(change_NAC)


def fit_weighted_logistic(
    codes_ND: Tensor, labels_N: Tensor, num_classes: int, strengths: Sequence[float], weights_C: Tensor
) -> LinearFit:
    """Fit multinomial logistic regression to the error of `logistic`."""

    def solver(codes_ND: Tensor, labels_N: Tensor, num_present: int, strengths: Sequence[float]) -> LinearPath:
        kind = cast("type[Problem]", partial(_WeightedProblem, present_C))
        return solve(kind, codes_ND, labels_N, num_present, strengths)

    present_C = weights_C.to(labels_N.device)[torch.unique(labels_N)]
    return fit_linear(solver, codes_ND, labels_N, num_classes, strengths)


def fit_weighted_sklearn(
    codes_ND: Tensor, labels_N: Tensor, num_classes: int, strengths: Sequence[float], weights_C: Tensor
) -> LinearFit:
    """Fit scikit-learn's `LogisticRegression` with `class_weight`."""
    present_C = weights_C[torch.unique(labels_N).cpu()]
    return fit_linear(partial(sklearn_path, weights_C=present_C), codes_ND, labels_N, num_classes, strengths)


def fit_weighted_ridge(
    codes_ND: Tensor, labels_N: Tensor, num_classes: int, strengths: Sequence[float], weights_C: Tensor
) -> HeadsFit:
    """Fit weighted ridge regression in closed form, block by block; the scale of `ridge_path` by some of the images."""
    codes_ND, labels_N = to_compute(codes_ND, labels_N)
    rotation, order_N = Rotation.of(codes_ND), by_class_order(labels_N).to(codes_ND.device)
    present_C, labels_N = torch.unique(labels_N, return_inverse=True)
    num_images, weights_C = len(codes_ND), weights_C.to(codes_ND.device, torch.float64)[present_C]
    shares_C = weights_C * labels_N.bincount() / num_images  # of the weights; they sum to 1
    mean_R, product_RC, square_RR = _moments(rotation, codes_ND, labels_N, weights_C)
    squares, axes = torch.linalg.eigh(square_RR)
    axes, variances = axes[:, squares > 0], squares[squares > 0]
    some = order_N[: max(2, min(num_images, MOST_SCORES // len(present_C)))]
    some_NR = (rotation.apply(codes_ND[some]) - mean_R) @ axes
    targets_NC, weights_N = F.one_hot(labels_N[some], len(present_C)).double(), weights_C[labels_N[some]]
    heads = []
    for strength in strengths:
        check_stop(DOING)
        solution = axes.T @ product_RC / (variances + strength)[:, None]
        leverage_N = weights_N * (1 + some_NR.square() @ (variances + strength).reciprocal()) / num_images
        fitted_NC = some_NR @ solution + shares_C
        left_out_NC = (fitted_NC - leverage_N[:, None] * targets_NC) / (1 - leverage_N).clamp_min(1e-9)[:, None]
        scale = best_scale(left_out_NC, labels_N[some], weights_N=weights_N)
        params_QC = torch.cat([axes @ solution, (shares_C - mean_R @ axes @ solution)[None]]) * scale
        if len(present_C) < num_classes:
            whole_QC = params_QC.new_zeros(len(params_QC), num_classes)
            whole_QC[-1] = (fitted_NC * scale).logsumexp(1).min() - math.log(num_images + 1)
            whole_QC[:, present_C] = params_QC
            params_QC = whole_QC
        heads.append(rotation.head(params_QC))
    return HeadsFit(tuple(heads), (True,) * len(heads))


def _moments(
    rotation: Rotation, codes_ND: Tensor, labels_N: Tensor, weights_C: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the weighted mean of rotated codes, their covariances with the classes, and with each other."""
    num_images, width = len(codes_ND), len(rotation.variances_R)
    sums_CR = torch.zeros(len(weights_C), width, dtype=torch.float64, device=codes_ND.device)
    square_RR = torch.zeros(width, width, dtype=torch.float64, device=codes_ND.device)
    for rows in blocks(*codes_ND.shape):
        rotated_BR, weights_B1 = rotation.apply(codes_ND[rows]), weights_C[labels_N[rows], None]
        sums_CR.index_add_(0, labels_N[rows], weights_B1 * rotated_BR)
        square_RR += (weights_B1 * rotated_BR).T @ rotated_BR
    mean_R, shares_C = sums_CR.sum(0) / num_images, weights_C * labels_N.bincount() / num_images
    product_RC = sums_CR.T / num_images - mean_R[:, None] * shares_C
    return mean_R, product_RC, square_RR / num_images - mean_R[:, None] * mean_R
