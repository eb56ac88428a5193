"""List the kinds of probes: how each is fitted, and the hyper-parameter that held-out images choose.

A new kind is a file with its fit, a row here, and its name in the recipe's schema.

Letters: N training images, M held-out images, D features, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor, nn

from tlscale.codes.probes.blockwise import has_few_of_class, is_large
from tlscale.codes.probes.knn import fit_knn
from tlscale.codes.probes.large_logistic import fit_large_logistic
from tlscale.codes.probes.linear import fit_linear
from tlscale.codes.probes.logistic import logistic_path
from tlscale.codes.probes.one_against_rest import fit_one_against_rest
from tlscale.codes.probes.ridge import fit_large_ridge, ridge_path
from tlscale.codes.probes.scikit import sklearn_path
from tlscale.codes.probes.weighted import fit_weighted_logistic, fit_weighted_ridge, fit_weighted_sklearn
from tlscale.errors import RecipeError, sentences, suggestion


class Fit(Protocol):
    """Hold classifiers of raw codes, one for each value of the hyper-parameter."""

    @property
    def converged(self) -> tuple[bool, ...]:
        """Report for each value whether it was solved to the tolerance."""

    def logits(self, codes_MD: Tensor) -> Iterator[Tensor | None]:
        """Yield the logits (M, C) by each classifier, in the order of the values; None: it was rejected on a sample."""

    def head(self, index: int) -> nn.Module:
        """Build the module that maps raw codes (B, D) to logits (B, C), in float32."""


@dataclass(frozen=True)
class Setting:
    """Describe the hyper-parameter of a kind; a larger value means a smoother classifier."""

    name: str
    key: str
    """Its key under `probe`, a list of values."""
    defaults: tuple[float, ...]
    is_right: Callable[[float, int], bool]
    """Whether a value can be tried with so many training images."""
    remedy: str
    """What to do about one that cannot."""

    def values(self, given: Sequence[float] | None, num_images: int, num_held: int) -> tuple[float, ...]:
        """Return the values to try: those of the recipe, or else all defaults that are possible.

        Raises:
            RecipeError: a value is wrong, or there are several and no held-out image to choose by.
        """
        if given is None:
            values = tuple(value for value in self.defaults if self.is_right(value, num_images))
        else:
            values = tuple(float(value) for value in given)
        key = f"probe.{self.key}"
        for value in values:
            if not self.is_right(value, num_images):
                problem = f"{value:g} is not possible with {num_images:,} training images"
                raise RecipeError(problem, key=key, remedy=self.remedy)
        if not values or len(set(values)) < len(values):
            raise RecipeError(f"{list(values)} must hold one value or more, all different", key=key)
        if len(values) > 1 and not num_held:
            one = f"{key}=[{values[len(values) // 2]:g}]"
            remedy = f"Set data.validation_fraction above 0 (such as 0.1), or give one value, such as {one}"
            raise RecipeError(f"{len(values)} values, and no held-out images to choose by", key=key, remedy=remedy)
        return values


_STRENGTH = Setting(
    "strength",
    "strengths",
    (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001),
    is_right=lambda value, num_images: 0 < value < math.inf,
    remedy="Give numbers above 0",
)
_NEIGHBOURS = Setting(
    "neighbours",
    "neighbours",
    (1.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0),
    is_right=lambda value, num_images: value.is_integer() and 1 <= value <= num_images,
    remedy="Give whole numbers from 1 to the number of training images",
)


@dataclass(frozen=True)
class ProbeKind:
    """Hold one row of the table."""

    fit: Callable[[Tensor, Tensor, int, Sequence[float]], Fit]
    """From raw codes (N, D), labels (N,), C, and values of the hyper-parameter."""
    setting: Setting
    follows_precision: bool = True
    """Its head is cast to the dtype of the run; False: it works in float32, whatever the run's is."""
    fit_large: Callable[..., Fit] | None = None
    """The same for more than `blockwise.MOST_EXACT`; None: `fit`."""
    searches: bool = False
    """`fit` goes on step by step; `fit_large` takes its place where classes have few images, too, and is given a
    classifier of nearly the same images, weights of classes, and the figure by which a sample rejects strengths."""
    fit_weighted: Callable[[Tensor, Tensor, int, Sequence[float], Tensor], Fit] | None = None
    """The same where classes have weights, (C,); None: it cannot."""
    fit_several: Callable[[Tensor, Tensor, Sequence[float]], Fit] | None = None
    """The same for several labels an image, bool (N, C); None: it cannot."""

    def is_by_blocks(self, num_images: int, width: int, num_classes: int) -> bool:
        """Report whether so many images, features and classes are fitted by `fit_large`."""
        size = num_images, width, num_classes
        return self.fit_large is not None and (is_large(*size) or (self.searches and has_few_of_class(*size)))

    def fit_by_size(
        self,
        codes_ND: Tensor,
        labels_N: Tensor,
        num_classes: int,
        values: Sequence[float],
        near: nn.Module | None = None,
        *,
        weights_C: Tensor | None = None,
        select: str = "top1",
    ) -> Fit:
        """Fit in the way that is for so many images, features and classes, or for several labels (N, C)."""
        if labels_N.ndim == 2:
            assert self.fit_several is not None, "the recipe refuses other kinds"
            assert weights_C is None, "the recipe refuses weights"
            return self.fit_several(codes_ND, labels_N, values)
        if self.fit_large is not None and self.is_by_blocks(codes_ND.shape[0], codes_ND.shape[1], num_classes):
            if self.searches:
                return self.fit_large(codes_ND, labels_N, num_classes, values, near, weights_C, select)
            if weights_C is None:
                return self.fit_large(codes_ND, labels_N, num_classes, values)
        if weights_C is not None:
            assert self.fit_weighted is not None, "the recipe refuses other kinds"
            return self.fit_weighted(codes_ND, labels_N, num_classes, values, weights_C)
        return self.fit(codes_ND, labels_N, num_classes, values)


PROBE_KINDS: dict[str, ProbeKind] = {
    # quasi-Newton, all strengths side by side; where there is much, few of them, block by block
    "logistic": ProbeKind(
        partial(fit_linear, logistic_path),
        _STRENGTH,
        fit_large=fit_large_logistic,
        searches=True,
        fit_weighted=fit_weighted_logistic,
        fit_several=fit_one_against_rest,
    ),
    # one eigendecomposition; scaled so that the softmax of the scores is a probability
    "ridge": ProbeKind(
        partial(fit_linear, ridge_path), _STRENGTH, fit_large=fit_large_ridge, fit_weighted=fit_weighted_ridge
    ),
    # scikit-learn's LogisticRegression, once for each strength; needs scikit-learn
    "sklearn": ProbeKind(partial(fit_linear, sklearn_path), _STRENGTH, fit_weighted=fit_weighted_sklearn),
    # votes of the nearest by cosine of standardised codes, which are compared as they were found
    "knn": ProbeKind(fit_knn, _NEIGHBOURS, follows_precision=False),
}


def kind_of(name: str) -> ProbeKind:
    """Look a kind up; raise `RecipeError` where there is none of this name."""
    if name not in PROBE_KINDS:
        remedy = sentences(suggestion(name, PROBE_KINDS), f"Write one of {', '.join(PROBE_KINDS)}")
        raise RecipeError(f"{name!r} is not a kind of probe", key="probe.kind", remedy=remedy)
    return PROBE_KINDS[name]
