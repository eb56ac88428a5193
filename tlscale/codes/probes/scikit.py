"""Fit scikit-learn's own logistic regression, as a second opinion on ours.

Letters: N images, D features, C classes with images.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from tlscale.codes.probes.blockwise import DOING
from tlscale.codes.probes.linear import LinearPath
from tlscale.distributed.signals import stoppable
from tlscale.errors import RecipeError
from tlscale.tracking.progress import each

_MOST_STEPS = 2000


def sklearn_path(
    codes_ND: Tensor,
    labels_N: Tensor,
    num_classes: int,
    strengths: Sequence[float],
    weights_C: Tensor | None = None,
) -> LinearPath:
    """Fit `LogisticRegression` (solver lbfgs, its default tolerance) for each strength; `RecipeError` without it."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        remedy = "Install it (pip install scikit-learn), or write 'kind: logistic', which solves the same problem"
        problem = "'sklearn' needs scikit-learn, which is not installed"
        raise RecipeError(problem, key="probe.kind", remedy=remedy) from None
    # Of two classes scikit-learn fits one weight vector w where we have two, w/2 and -w/2, whose squares are half.
    images = len(labels_N) / (2 if num_classes == 2 else 1)
    codes, labels = codes_ND.cpu().numpy(), labels_N.cpu().numpy()
    models: list[Any] = []
    for strength in each(strengths, lambda strength: f"probe: scikit-learn, strength {strength:g}"):
        by_class = None if weights_C is None else dict(enumerate(weights_C.tolist()))
        model = LogisticRegression(C=1 / (strength * images), max_iter=_MOST_STEPS, class_weight=by_class)
        with warnings.catch_warnings(), stoppable(DOING):
            # What it would say is in `converged`.
            warnings.simplefilter("ignore", ConvergenceWarning)
            models.append(model.fit(codes, labels))
    both = [_both_classes(model.coef_.T, model.intercept_) for model in models]
    weights, biases = (codes_ND.new_tensor(np.stack(parts)) for parts in zip(*both, strict=True))
    return LinearPath(weights, biases, tuple(bool(model.n_iter_.max() < _MOST_STEPS) for model in models))


def _both_classes(weights: Any, biases: Any) -> tuple[Any, Any]:
    if weights.shape[1] > 1:
        return weights, biases
    return np.concatenate([-weights, weights], axis=1) / 2, np.concatenate([-biases, biases]) / 2
