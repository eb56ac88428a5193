"""Fit multinomial logistic regression to many images and classes: in float32, block by block, in tens of passes.

So are few images of each of many classes, where a pass is short, and which needs most of them (`has_few_of_class`).
A sample rejects most strengths; the others are solved on all images, each from the solution of the stronger one before.
Every one is solved to `TOLERANCE`, or its `converged` is False.

Letters: N images, B images of a block, D features, R principal axes, C classes, Q = R + 1 rows of parameters: the last
one is the bias, on a feature that is 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tlscale.codes.probes.blockwise import HeadsFit, Rotation, blocks, by_class_order, is_large, to_compute
from tlscale.codes.probes.class_figures import OF_CLASSES, OF_SCORES, figure_by, figure_of_classes, rank_of
from tlscale.distributed.settings import cpu_threads
from tlscale.tracking.progress import each, progress

TOLERANCE = 0.03
"""Most relative error of W, as in `logistic`: the search stops when |gradient| <= TOLERANCE * lam * |W|, by a gradient
over all images. The loss is then within TOLERANCE^2 of lam/2 * |W|^2 of the lowest."""

SAMPLE = 8
"""One image in so many is in the sample that rejects strengths; half as many others score it."""
MOST_CARRIED = 3
"""Strengths that are solved on all images: the best on the sample, and weaker ones, which more images ask for."""
MOST_PASSES = 60
"""Over the images, for one strength."""
MOST_PASSES_OF_FEW = 400
"""The same, where classes have few images."""
MEMORY = 10
"""Pairs of the quasi-Newton history."""

_ROUGH = 0.1  # the tolerance on the sample
_LEAST_OF_CLASS = 4  # images of each class in the sample; with fewer there is none, and nothing is rejected
_STEPS_TO = (30.0, 10.0, 3.0)  # times as strong: where the way to a single strength begins


def fit_large_logistic(
    codes_ND: Tensor,
    labels_N: Tensor,
    num_classes: int,
    strengths: Sequence[float],
    near: nn.Module | None = None,
    weights_C: Tensor | None = None,
    select: str = "top1",
) -> HeadsFit:
    """Fit a classifier for each strength that a sample does not reject.

    Where classes have few images, one thread computes: threads would wait for each other after each of many short
    operations, and that for as long as another process keeps one of their cores.

    Args:
        codes_ND: as they came.
        labels_N: int64.
        num_classes: C. Some may have no image: those are as in `linear.linear_path`.
        strengths: `lam` of `linear`, each above 0.
        near: a classifier of nearly the same images, from which a single strength begins.
        weights_C: of the images of each class, with a mean of 1 over the images; None: all weigh the same.
        select: the figure by which the sample rejects strengths.
    """
    if is_large(codes_ND.shape[0], codes_ND.shape[1], num_classes):
        return _fit(codes_ND, labels_N, num_classes, strengths, near, MOST_PASSES, weights_C, select)
    with cpu_threads(1):
        return _fit(codes_ND, labels_N, num_classes, strengths, near, MOST_PASSES_OF_FEW, weights_C, select)


def _fit(
    codes_ND: Tensor,
    labels_N: Tensor,
    num_classes: int,
    strengths: Sequence[float],
    near: nn.Module | None,
    most_passes: int,
    weights_C: Tensor | None,
    select: str,
) -> HeadsFit:
    codes_ND, labels_N = to_compute(codes_ND, labels_N)
    present_C, labels_N = torch.unique(labels_N, return_inverse=True)
    rotation, order_N = Rotation.of(codes_ND), by_class_order(labels_N).to(codes_ND.device)
    weights_N = None if weights_C is None else weights_C.to(codes_ND.device).float()[present_C][labels_N[order_N]]
    images = Images(rotation.whole(codes_ND, order_N), labels_N[order_N], len(present_C), weights_N)
    bound_Q1 = torch.cat([rotation.variances_R, rotation.variances_R.new_ones(1)])[:, None].float() / 2
    path = sorted(strengths, reverse=True)
    begin = _Point(images.start(), History(bound_Q1), math.nan)
    if isinstance(near, nn.Linear) and len(path) == 1:
        begin = _Point(rotation.params_of(near)[:, present_C], History(bound_Q1), path[0])
    elif len(images.labels_N) >= SAMPLE * _LEAST_OF_CLASS * len(present_C):
        begin, path = _reject(images, path, begin, select)
    solved = {}
    for lam in each(path, lambda lam: f"probe: strength {lam:g} on {len(labels_N):,} images"):
        begin, is_solved = _solve(images, lam, begin, TOLERANCE, most_passes)
        params_QC = begin.params_QC
        if len(present_C) < num_classes:
            params_QC = images.with_absent(params_QC, present_C, num_classes)
        solved[lam] = rotation.head(params_QC), is_solved
    found = [solved.get(lam, (None, False)) for lam in strengths]
    return HeadsFit(tuple(head for head, _ in found), tuple(is_solved for _, is_solved in found))


@dataclass(frozen=True, eq=False)
class Images:
    """Hold rotated images in an order of which any beginning is a sample."""

    codes_NQ: Tensor
    labels_N: Tensor
    num_classes: int
    weights_N: Tensor | None = None

    def __getitem__(self, rows: slice) -> Images:
        weights_N = None if self.weights_N is None else self.weights_N[rows]
        return Images(self.codes_NQ[rows], self.labels_N[rows], self.num_classes, weights_N)

    def start(self) -> Tensor:
        """Return the parameters of the classifier that knows the frequencies alone."""
        counts_C = self.labels_N.bincount(minlength=self.num_classes)
        params_QC = self.codes_NQ.new_zeros(self.codes_NQ.shape[1], self.num_classes)
        params_QC[-1] = counts_C.log() - counts_C.log().mean()
        return params_QC

    def loss(self, params_QC: Tensor, lam: float) -> tuple[float, Tensor]:
        """Compute the regularised loss, summed in float64, and its gradient (Q, C)."""
        total = torch.zeros((), dtype=torch.float64, device=params_QC.device)
        gradient_QC = torch.zeros_like(params_QC, dtype=torch.float64)
        for rows in blocks(len(self.labels_N), self.num_classes):
            codes_BQ, labels_B1 = self.codes_NQ[rows], self.labels_N[rows, None]
            logits_BC = codes_BQ @ params_QC
            norm_B1 = logits_BC.logsumexp(1, keepdim=True)
            losses_B1 = norm_B1 - logits_BC.gather(1, labels_B1)
            shares_BC = logits_BC.sub_(norm_B1).exp_()
            residuals_BC = shares_BC.scatter_add_(1, labels_B1, shares_BC.new_full(labels_B1.shape, -1.0))
            if self.weights_N is not None:
                losses_B1 = self.weights_N[rows, None] * losses_B1
                residuals_BC.mul_(self.weights_N[rows, None])
            total += losses_B1.sum(dtype=torch.float64)
            gradient_QC += codes_BQ.T @ residuals_BC
        gradient_QC /= len(self.labels_N)
        weights_RC = params_QC[:-1].double()
        gradient_QC[:-1] += lam * weights_RC
        # It sums to zero over classes but for rounding: nothing is learnt there.
        gradient_QC -= gradient_QC.mean(1, keepdim=True)
        loss = float(total) / len(self.labels_N) + lam / 2 * float(weights_RC.square().sum())
        return loss, gradient_QC.float()

    def with_absent(self, params_QC: Tensor, present_C: Tensor, num_classes: int) -> Tensor:
        """Add classes without an image: no image gives them a probability above 1 / (N + 2)."""
        num_images = len(self.labels_N)
        least = [
            float((self.codes_NQ[rows] @ params_QC).logsumexp(1).min()) for rows in blocks(num_images, len(present_C))
        ]
        whole_QC = params_QC.new_zeros(len(params_QC), num_classes)
        whole_QC[-1] = min(least) - math.log(num_images + 1)
        whole_QC[:, present_C] = params_QC
        return whole_QC

    def rank(self, params_QC: Tensor, select: str) -> tuple[float, float]:
        """Return a sort key by a figure, the smallest for the best; by top1 the share of wrong answers and the loss."""
        wrong, loss, answers, kept = 0, 0.0, [], []
        for rows in blocks(len(self.labels_N), self.num_classes):
            logits_BC, labels_B = self.codes_NQ[rows] @ params_QC, self.labels_N[rows]
            answers.append(logits_BC.argmax(1))
            wrong += int((answers[-1] != labels_B).sum())
            loss += float(F.cross_entropy(logits_BC, labels_B, reduction="sum"))
            kept += [logits_BC.cpu()] if select in OF_SCORES else []
        wrong_share, loss = wrong / len(self.labels_N), loss / len(self.labels_N)
        if select == "top1":
            return wrong_share, loss
        of_classes = None
        if select in OF_CLASSES:
            of_classes = figure_of_classes(select, torch.cat(answers), self.labels_N, self.num_classes)
        elif kept:
            of_classes = figure_by(select, torch.cat(kept), self.labels_N)
        return rank_of(select, 1 - wrong_share, loss, of_classes)


@dataclass(eq=False)
class History:
    """Estimate the inverse Hessian by the last steps, and what they changed in the gradient (Nocedal 1980)."""

    bound_Q1: Tensor
    """Of the Hessian without regularisation, everywhere (Böhning 1992)."""
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, step_QC: Tensor, change_QC: Tensor) -> None:
        if float((step_QC * change_QC).sum()) > 0:
            self.pairs = [*self.pairs[1 - MEMORY :], (step_QC, change_QC)]

    def at(self, more: float) -> History:
        """Return what it would be with so much more regularisation."""
        changed = []
        for step_QC, change_QC in self.pairs:
            change_QC = change_QC.clone()
            change_QC[:-1] += more * step_QC[:-1]
            changed.append((step_QC, change_QC))
        kept = [(step, change) for step, change in changed if float((step * change).sum()) > 0]
        return History(self.bound_Q1, kept)

    def direction(self, gradient_QC: Tensor, lam: float) -> Tensor:
        """Compute minus the estimated inverse Hessian times the gradient."""
        bound_Q1 = self.bound_Q1 + lam
        bound_Q1[-1] -= lam
        result_QC, factors = gradient_QC, []
        for step_QC, change_QC in reversed(self.pairs):
            factors.append((step_QC * result_QC).sum() / (step_QC * change_QC).sum())
            result_QC = result_QC - factors[-1] * change_QC
        result_QC = result_QC / bound_Q1
        if self.pairs:
            step_QC, change_QC = self.pairs[-1]
            result_QC = result_QC * ((step_QC * change_QC).sum() / (change_QC.square() / bound_Q1).sum())
        for (step_QC, change_QC), factor in zip(self.pairs, reversed(factors), strict=True):
            result_QC = result_QC + (factor - (change_QC * result_QC).sum() / (step_QC * change_QC).sum()) * step_QC
        return -result_QC


@dataclass(frozen=True, eq=False)
class _Point:
    """Hold where a search is, and what it knows."""

    params_QC: Tensor
    history: History
    lam: float
    """That it was found with."""

    def towards(self, lam: float) -> History:
        return self.history if math.isnan(self.lam) else self.history.at(lam - self.lam)


def _reject(images: Images, strengths: list[float], begin: _Point, select: str) -> tuple[_Point, list[float]]:
    """Solve all strengths roughly on a sample, the strongest first, and score them on other images.

    Returns:
        The solution of the first strength that is carried on, and these.
    """
    size = len(images.labels_N) // SAMPLE
    sample, others = images[:size], images[size : size + size // 2]
    progress(f"probe: {len(strengths)} strengths on a sample of {size:,} images")
    single = [factor * strengths[0] for factor in _STEPS_TO] if len(strengths) == 1 else []
    points, scored = {}, []
    for lam in [*single, *strengths]:
        begin, _ = _solve(sample, lam, begin, _ROUGH, MOST_PASSES)
        points[lam] = begin
        scored.append((*others.rank(begin.params_QC, select), -lam))
    best = strengths.index(-min(scored[len(single) :])[2])
    carried = strengths[best : best + MOST_CARRIED]
    if len(strengths) > 1:
        progress(f"probe: carried on are the strengths {', '.join(f'{lam:g}' for lam in carried)}")
    return points[carried[0]], carried


def _solve(images: Images, lam: float, begin: _Point, tolerance: float, most_passes: int) -> tuple[_Point, bool]:
    """Minimise the loss for one strength; return where it ended, and whether that is within the tolerance."""
    history, params_QC = begin.towards(lam), begin.params_QC
    loss, gradient_QC = images.loss(params_QC, lam)
    passes = 1
    while True:
        least = max(tolerance * lam * float(params_QC[:-1].norm()), 10 * torch.finfo(torch.float32).eps)
        is_solved = float(gradient_QC.norm()) <= least
        if is_solved or passes >= most_passes:
            return _Point(params_QC, history, lam), is_solved
        direction_QC = history.direction(gradient_QC, lam)
        slope, length = float((gradient_QC * direction_QC).sum()), 1.0
        for _ in range(most_passes - passes):
            step_QC = length * direction_QC
            new_loss, new_gradient_QC = images.loss(params_QC + step_QC, lam)
            passes += 1
            # Rounding hides differences of the loss near the optimum; there the gradient alone tells.
            excess = new_loss - loss - 1e-7 * abs(loss)
            if excess <= 1e-4 * length * slope or slope >= 0:
                break
            length *= min(0.5, max(0.1, -slope * length / (2 * (excess - slope * length))))
        if excess > 0 or slope >= 0:
            return _Point(params_QC, history, lam), False
        history.add(step_QC, new_gradient_QC - gradient_QC)
        params_QC, loss, gradient_QC = params_QC + step_QC, new_loss, new_gradient_QC
