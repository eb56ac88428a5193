"""Fit multinomial logistic regression for a whole path of strengths at once.

Letters: N images, D features, R principal axes, C classes with images, L strengths, A strengths not yet solved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tlscale.codes.probes.blockwise import DOING
from tlscale.codes.probes.linear import LinearPath, principal_axes
from tlscale.distributed.signals import check_stop

TOLERANCE = 1e-3
"""Most relative error of W: the loss is `lam`-strongly convex, so |W - optimum| <= |gradient| / lam, and the search
stops when |gradient| <= TOLERANCE * lam * |W|. The loss is then within |gradient|^2 / (2 lam) of the lowest."""

_MOST_STEPS = 2000
_MOST_TRIALS = 30  # of one line search
_MEMORY = 10  # pairs of the quasi-Newton history
_MOST_LOGITS = 2**26  # of all strengths solved side by side; half a GiB in float64


def logistic_path(codes_ND: Tensor, labels_N: Tensor, num_classes: int, strengths: Sequence[float]) -> LinearPath:
    """Solve multinomial logistic regression by quasi-Newton steps on all strengths side by side.

    Limited-memory BFGS (Nocedal 1980) in the principal axes, where a bound of the Hessian that holds everywhere
    (Böhning 1992, "Multinomial logistic regression algorithm") is diagonal, the same for all strengths but for `lam`,
    and serves as first guess of it. Logits are linear in W, so a step costs two matrix products over the codes for
    all strengths together, and its length none. Steps are made in float32; the float64 search that starts where they
    end tests their result, and makes further steps if it has to.
    """
    return solve(Problem, codes_ND, labels_N, num_classes, strengths)


def solve(
    kind: type[Problem], codes_ND: Tensor, labels_N: Tensor, num_classes: int, strengths: Sequence[float]
) -> LinearPath:
    """Search for the lowest loss of a kind of problem, for each strength, as `logistic_path` says."""
    axes_DR, variances_R = principal_axes(codes_ND)
    rotated_NR = codes_ND @ axes_DR
    problem = kind(rotated_NR, labels_N, num_classes, variances_R)
    rough = kind(rotated_NR.float(), labels_N, num_classes, variances_R.float())
    at_once = max(1, _MOST_LOGITS // (len(labels_N) * num_classes))
    solutions, converged = [], []
    for first in range(0, len(strengths), at_once):
        lam_L = variances_R.new_tensor(strengths[first : first + at_once])
        start_QLC = rotated_NR.new_zeros(len(variances_R) + 1, len(lam_L), num_classes)
        start_QLC = _minimise(rough, lam_L.float(), start_QLC.float(), TOLERANCE / 2)[0].double()
        # At the optimum of multinomial regression the classes sum to zero, here but for the rounding of float32.
        start_QLC = problem.centred(start_QLC)
        solution_QLC, converged_L = _minimise(problem, lam_L, start_QLC, TOLERANCE)
        solutions.append(solution_QLC)
        converged += converged_L.tolist()
    all_QLC = torch.cat(solutions, dim=1)
    weights_LDC = torch.stack([axes_DR @ solution for solution in all_QLC[:-1].unbind(1)])
    return LinearPath(weights_LDC, all_QLC[-1], tuple(converged))


class Problem:
    """Hold what all strengths share, of multinomial regression.

    Q = R + 1 rows of parameters: the last one is the bias, on a feature that is 1.
    """

    def __init__(self, codes_NR: Tensor, labels_N: Tensor, num_classes: int, variances_R: Tensor) -> None:
        self.codes_NQ = torch.cat([codes_NR, codes_NR.new_ones(len(codes_NR), 1)], dim=1)
        self.targets_N1C = self.targets(labels_N, num_classes).to(codes_NR.dtype)[:, None]
        # Half the second moments bound the Hessian: the largest eigenvalue of diag(p) - p p' is at most 1/2.
        self.bound_Q11 = torch.cat([variances_R, variances_R.new_ones(1)])[:, None, None] / 2

    def targets(self, labels_N: Tensor, num_classes: int) -> Tensor:
        """Return the probabilities to be learned, (N, C)."""
        return F.one_hot(labels_N, num_classes)

    def logits(self, params_QAC: Tensor) -> Tensor:
        return (self.codes_NQ @ params_QAC.flatten(1)).view(-1, *params_QAC.shape[1:])

    def residuals(self, logits_NAC: Tensor) -> Tensor:
        """Compute the derivative of each image's loss by its logits."""
        return logits_NAC.softmax(2).sub_(self.targets_N1C)

    def gradient(self, residuals_NAC: Tensor, params_QAC: Tensor, lam_QA1: Tensor) -> Tensor:
        total_QX = self.codes_NQ.T @ residuals_NAC.flatten(1)
        gradient_QAC = total_QX.view(-1, *residuals_NAC.shape[1:]) / len(self.codes_NQ) + lam_QA1 * params_QAC
        return self.centred(gradient_QAC)

    def centred(self, gradient_QAC: Tensor) -> Tensor:
        """Return a gradient without its mean over the classes.

        It sums to zero over classes but for rounding, which would grow from step to step: nothing is learnt there.
        """
        return gradient_QAC - gradient_QAC.mean(2, keepdim=True)

    def curvature(self, residuals_NAC: Tensor, change_NAC: Tensor) -> Tensor:
        """Compute the second derivative of the mean loss along a change of the logits: its variance by the answer."""
        shares_NAC = residuals_NAC + self.targets_N1C
        mean_NA1 = (shares_NAC * change_NAC).sum(2, keepdim=True)
        return _dot(shares_NAC, (change_NAC - mean_NA1).square()) / len(change_NAC)


def _dot(first_QAC: Tensor, second_QAC: Tensor) -> Tensor:
    """Compute the inner product for each strength, summed in float64."""
    return (first_QAC * second_QAC).sum((0, 2), dtype=torch.float64)


@dataclass(eq=False)
class _Search:
    """Hold the state of the search, for the strengths that are not yet solved; all tensors have A in dimension 1."""

    params_QAC: Tensor
    logits_NAC: Tensor
    gradient_QAC: Tensor
    lam_QA1: Tensor  # 0 in the row of the bias
    history: list[tuple[Tensor, Tensor, Tensor]]  # steps, what they changed in the gradient, products of the two

    def keep(self, kept_A: Tensor) -> _Search:
        return _Search(
            self.params_QAC[:, kept_A],
            self.logits_NAC[:, kept_A],
            self.gradient_QAC[:, kept_A],
            self.lam_QA1[:, kept_A],
            [(step[:, kept_A], change[:, kept_A], product[kept_A]) for step, change, product in self.history],
        )


def _minimise(problem: Problem, lam_L: Tensor, start_QLC: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Search the parameters for each strength; return them, and whether they are within the tolerance."""
    lam_QL1 = lam_L[None, :, None].repeat(len(start_QLC), 1, 1)
    lam_QL1[-1] = 0
    logits_NLC = problem.logits(start_QLC)
    gradient_QLC = problem.gradient(problem.residuals(logits_NLC), start_QLC, lam_QL1)
    search = _Search(start_QLC, logits_NLC, gradient_QLC, lam_QL1, [])
    result_QLC, converged_L = start_QLC.clone(), torch.zeros_like(lam_L, dtype=torch.bool)
    unsolved_A = torch.arange(len(lam_L), device=lam_L.device)
    for number in range(_MOST_STEPS + 1):
        solved_A = _is_solved(search, lam_L[unsolved_A], tolerance)
        stopped_A = solved_A if number < _MOST_STEPS else torch.ones_like(solved_A)
        if stopped_A.any():
            result_QLC[:, unsolved_A[stopped_A]] = search.params_QAC[:, stopped_A]
            converged_L[unsolved_A] = solved_A
            unsolved_A, search = unsolved_A[~stopped_A], search.keep(~stopped_A)
        if not len(unsolved_A):
            break
        check_stop(DOING)
        stuck_A = _step(problem, search)
        if stuck_A.any():
            # Rounding hides the way down: nothing further can be gained in this precision.
            result_QLC[:, unsolved_A[stuck_A]] = search.params_QAC[:, stuck_A]
            unsolved_A, search = unsolved_A[~stuck_A], search.keep(~stuck_A)
            if not len(unsolved_A):
                break
    return result_QLC, converged_L


def _is_solved(search: _Search, lam_A: Tensor, tolerance: float) -> Tensor:
    weights_RAC = search.params_QAC[:-1]
    least_A = tolerance * lam_A * _dot(weights_RAC, weights_RAC).sqrt()
    # Where the optimum is W = 0 no gradient would be small enough in comparison; this one is nothing but rounding.
    rounding = 10 * torch.finfo(lam_A.dtype).eps
    return _dot(search.gradient_QAC, search.gradient_QAC).sqrt() <= least_A.clamp_min(rounding)


def _step(problem: Problem, search: _Search) -> Tensor:
    """Go to a lower point on each problem; return which ones have none in this precision, and stay: (A,)."""
    direction_QAC = _direction(problem, search)
    change_NAC = problem.logits(direction_QAC)
    length_A1, residuals_NAC, stuck_A = _length(problem, search, direction_QAC, change_NAC)
    step_QAC = length_A1 * direction_QAC
    search.params_QAC = search.params_QAC + step_QAC
    search.logits_NAC = search.logits_NAC + length_A1 * change_NAC
    gradient_QAC = problem.gradient(residuals_NAC, search.params_QAC, search.lam_QA1)
    turn_QAC = gradient_QAC - search.gradient_QAC
    search.history = [*search.history[1 - _MEMORY :], (step_QAC, turn_QAC, _dot(step_QAC, turn_QAC))]
    search.gradient_QAC = gradient_QAC
    return stuck_A


def _direction(problem: Problem, search: _Search) -> Tensor:
    """Compute minus the estimated inverse Hessian times the gradient (the two loops of Nocedal 1980)."""
    bound_QA1, result_QAC, factors = problem.bound_Q11 + search.lam_QA1, search.gradient_QAC, []
    dtype = result_QAC.dtype
    for step_QAC, change_QAC, product_A in reversed(search.history):
        factor_A = _dot(step_QAC, result_QAC) / product_A
        factors.append(factor_A)
        result_QAC = result_QAC - factor_A.to(dtype)[:, None] * change_QAC
    result_QAC = result_QAC / bound_QA1
    if search.history:
        _, change_QAC, product_A = search.history[-1]
        scale_A = product_A / _dot(change_QAC, change_QAC / bound_QA1)
        result_QAC = result_QAC * scale_A.to(dtype)[:, None]
    for (step_QAC, change_QAC, product_A), factor_A in zip(search.history, reversed(factors), strict=True):
        factor_A = factor_A - _dot(change_QAC, result_QAC) / product_A
        result_QAC = result_QAC + factor_A.to(dtype)[:, None] * step_QAC
    return -result_QAC


def _length(
    problem: Problem, search: _Search, direction_QAC: Tensor, change_NAC: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Find how far to go in each problem (A, 1), the residuals there, and where rounding hides that (A,): not at all.

    Newton's method on the slope along the direction, kept between points of either sign. The slope at the end is at
    most half of that at the start: since the loss is convex, that implies the approximate Wolfe conditions (Hager and
    Zhang 2005), which need no difference of losses and so hold down to rounding.
    """
    regular_A = _dot(search.lam_QA1 * direction_QAC, direction_QAC)
    at_start_A = _dot(search.lam_QA1 * search.params_QAC, direction_QAC)
    enough_A = -_dot(search.gradient_QAC, direction_QAC) / 2
    length_A, low_A, high_A = (torch.full_like(enough_A, value) for value in (1.0, 0.0, math.inf))
    for _ in range(_MOST_TRIALS):
        length_A1 = length_A.to(change_NAC.dtype)[:, None]
        residuals_NAC = problem.residuals(search.logits_NAC + length_A1 * change_NAC)
        slope_A = _dot(residuals_NAC, change_NAC) / len(change_NAC) + at_start_A + length_A * regular_A
        right_A = slope_A.abs() <= enough_A
        if (right_A | ~(enough_A > 0)).all():
            break
        low_A, high_A = torch.where(slope_A < 0, length_A, low_A), torch.where(slope_A > 0, length_A, high_A)
        newton_A = length_A - slope_A / (problem.curvature(residuals_NAC, change_NAC) + regular_A)
        middle_A = torch.where(high_A.isinf(), 2 * length_A, (low_A + high_A) / 2)
        inside_A = (newton_A > low_A) & (newton_A < high_A)
        length_A = torch.where(right_A, length_A, torch.where(inside_A, newton_A, middle_A))
    return length_A1 * right_A[:, None], residuals_NAC, ~right_A
