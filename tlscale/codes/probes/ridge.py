"""Fit ridge regression on one-hot targets, in closed form.

Letters: N images, D features, R principal axes, C classes with images, L strengths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tlscale.codes.probes.blockwise import DOING, HeadsFit, Rotation, blocks, by_class_order, to_compute
from tlscale.codes.probes.linear import LinearPath, principal_axes
from tlscale.distributed.signals import check_stop

MOST_SCORES = 2**22  # of the images that find the scale: 32 MiB


def ridge_path(codes_ND: Tensor, labels_N: Tensor, num_classes: int, strengths: Sequence[float]) -> LinearPath:
    """Solve ridge regression on targets 1 and 0, in closed form for all strengths from one eigendecomposition.

    Its scores are no logits. They are multiplied by the one number by which their softmax fits best (`best_scale`) on
    the scores that each image has when it is left out of the fit (which are known in closed form: Allen 1974, "The
    relationship between variable selection and data augmentation and a method for prediction"). Answers stay what they
    were.
    """
    axes_DR, variances_R = principal_axes(codes_ND)
    rotated_NR, targets_NC = codes_ND @ axes_DR, F.one_hot(labels_N, num_classes).double()
    means_C = targets_NC.mean(0)
    product_RC = rotated_NR.T @ (targets_NC - means_C) / len(codes_ND)
    weights, biases = [], []
    for strength in strengths:
        check_stop(DOING)
        solution_RC = product_RC / (variances_R + strength)[:, None]
        leverage_N = (1 + rotated_NR.square() @ (variances_R + strength).reciprocal()) / len(codes_ND)
        fitted_NC = rotated_NR @ solution_RC + means_C
        left_out_NC = (fitted_NC - leverage_N[:, None] * targets_NC) / (1 - leverage_N).clamp_min(1e-9)[:, None]
        scale = best_scale(left_out_NC, labels_N)
        weights.append(axes_DR @ solution_RC * scale)
        biases.append(means_C * scale)
    return LinearPath(torch.stack(weights), torch.stack(biases), (True,) * len(strengths))


def fit_large_ridge(codes_ND: Tensor, labels_N: Tensor, num_classes: int, strengths: Sequence[float]) -> HeadsFit:
    """Fit ridge regression as `ridge_path` does, block by block; the scale is found by some of the images."""
    codes_ND, labels_N = to_compute(codes_ND, labels_N)
    rotation, order_N = Rotation.of(codes_ND), by_class_order(labels_N).to(codes_ND.device)
    present_C, relabelled_N = torch.unique(labels_N, return_inverse=True)
    num_images = len(codes_ND)
    means_C = relabelled_N.bincount() / num_images
    sums_CR = torch.zeros(len(present_C), len(rotation.variances_R), dtype=torch.float64, device=codes_ND.device)
    for rows in blocks(*codes_ND.shape):
        sums_CR.index_add_(0, relabelled_N[rows], rotation.apply(codes_ND[rows]))
    some = order_N[: max(2, min(num_images, MOST_SCORES // len(present_C)))]
    some_NR, targets_NC = rotation.apply(codes_ND[some]), F.one_hot(relabelled_N[some], len(present_C)).double()
    heads = []
    for strength in strengths:
        check_stop(DOING)
        shrunk_R = (rotation.variances_R + strength).reciprocal()
        solution_RC = sums_CR.T / num_images * shrunk_R[:, None]
        leverage_N1 = (1 + some_NR.square() @ shrunk_R)[:, None] / num_images
        left_out_NC = (some_NR @ solution_RC + means_C - leverage_N1 * targets_NC) / (1 - leverage_N1).clamp_min(1e-9)
        scale = best_scale(left_out_NC, relabelled_N[some])
        params_QC = torch.cat([solution_RC, means_C[None].double()]) * scale
        if len(present_C) < num_classes:
            whole_QC = params_QC.new_zeros(len(params_QC), num_classes)
            whole_QC[-1] = (some_NR @ params_QC[:-1] + params_QC[-1]).logsumexp(1).min() - math.log(num_images + 1)
            whole_QC[:, present_C] = params_QC
            params_QC = whole_QC
        heads.append(rotation.head(params_QC))
    return HeadsFit(tuple(heads), (True,) * len(heads))


def best_scale(scores_NC: Tensor, labels_N: Tensor, weights_N: Tensor | None = None) -> float:
    """Find the factor from 0.01 to 1,000 by which `softmax(factor * scores)` fits the labels best; images may weigh.

    The cross-entropy is convex in the factor. Its targets leave a doubt of 1 / (N + 2) to the other classes, which is
    Laplace's rule of succession: the next answer after N right ones out of N is right with (N + 1) / (N + 2). Without
    the doubt (Platt 1999, "Probabilistic outputs for support vector machines") the best factor for scores that are all
    right would be infinite, and every answer sure.
    """
    num_images, num_classes = scores_NC.shape
    doubt = 1 / (num_images + 2)
    targets_NC = torch.full_like(scores_NC, doubt / (num_classes - 1)).scatter_(1, labels_N[:, None], 1 - doubt)
    wanted_N = (targets_NC * scores_NC).sum(1)
    low, high = math.log(1e-2), math.log(1e3)
    for _ in range(40):
        middle = (low + high) / 2
        slopes_N = ((math.exp(middle) * scores_NC).softmax(1) * scores_NC).sum(1).sub(wanted_N)
        slope = slopes_N.mean() if weights_N is None else (weights_N * slopes_N).mean()
        low, high = (low, middle) if slope > 0 else (middle, high)
    return math.exp((low + high) / 2)
