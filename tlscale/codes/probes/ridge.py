"""Fit ridge regression on one-hot targets, in closed form.

Letters: N images, D features, R principal axes, C classes with images, L strengths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tlscale.codes.probes.linear import LinearPath, principal_axes


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
        solution_RC = product_RC / (variances_R + strength)[:, None]
        leverage_N = (1 + rotated_NR.square() @ (variances_R + strength).reciprocal()) / len(codes_ND)
        fitted_NC = rotated_NR @ solution_RC + means_C
        left_out_NC = (fitted_NC - leverage_N[:, None] * targets_NC) / (1 - leverage_N).clamp_min(1e-9)[:, None]
        scale = best_scale(left_out_NC, labels_N)
        weights.append(axes_DR @ solution_RC * scale)
        biases.append(means_C * scale)
    return LinearPath(torch.stack(weights), torch.stack(biases), (True,) * len(strengths))


def best_scale(scores_NC: Tensor, labels_N: Tensor, least: float = 1e-2, most: float = 1e3) -> float:
    """Find the factor, within these bounds, by which `softmax(factor * scores)` fits the labels best.

    The cross-entropy is convex in the factor. Its targets leave a doubt of 1 / (N + 2) to the other classes, which is
    Laplace's rule of succession: the next answer after N right ones out of N is right with (N + 1) / (N + 2). Without
    the doubt (Platt 1999, "Probabilistic outputs for support vector machines") the best factor for scores that are all
    right would be infinite, and every answer sure.
    """
    num_images, num_classes = scores_NC.shape
    doubt = 1 / (num_images + 2)
    targets_NC = torch.full_like(scores_NC, doubt / (num_classes - 1)).scatter_(1, labels_N[:, None], 1 - doubt)
    wanted_N = (targets_NC * scores_NC).sum(1)
    low, high = math.log(least), math.log(most)
    for _ in range(40):
        middle = (low + high) / 2
        slope = ((math.exp(middle) * scores_NC).softmax(1) * scores_NC).sum(1).sub(wanted_N).mean()
        low, high = (low, middle) if slope > 0 else (middle, high)
    return math.exp((low + high) / 2)
