"""Compute figures of images that have several labels each, from the logits and the labels of all of them.

Promise: average precision and F1 are scikit-learn's on the same numbers. They are functions of all images in the order
of the split, and so do not hang on batches or processes. A row of logits that holds a NaN is no answer: it has no
label, and ranks behind all others.

Letters: N images, B images of a batch, C classes, U units (images, or groups of them).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tlscale.codes.probes.ranking import (
    DEFAULT_THRESHOLD,
    Bools,
    Columns,
    Floats,
    Ranking,
    Samples,
    mean_known,
)
from tlscale.data.sources.tables import GroupNames, Ints, number_groups
from tlscale.training.calibration import calibration_error
from tlscale.training.class_scores import error_over_rankings
from tlscale.training.group_error import error_of_ratio
from tlscale.training.metrics import error_of_mean

_Z95 = 1.959963984540054
_FIGURE = "mean_average_precision"


def probabilities(logits_NC: Tensor) -> Tensor:
    """Return the probability of each class, float64; NaN where there is no answer."""
    answered_N1 = ~logits_NC.isnan().any(dim=1, keepdim=True)
    return torch.where(answered_N1, logits_NC.double().sigmoid(), math.nan)


def labels_from(probabilities_NC: Tensor, thresholds: Sequence[float] | None) -> Tensor:
    """Return which labels each image has, bool (N, C): those whose probability is their threshold or more."""
    least_C = probabilities_NC.new_tensor(thresholds or [DEFAULT_THRESHOLD] * probabilities_NC.shape[1])
    return probabilities_NC >= least_C  # NaN is not


def label_calibration_error(probabilities_NC: Floats, labels_NC: Bools) -> float | None:
    """Compute the mean over the classes that any image has of the expected calibration error of each.

    That is by how far the probability of a class is off from the share of the images that have it, by bins of it.
    Images without an answer (NaN) are left out.
    """
    return mean_known(_calibration_errors(probabilities_NC, labels_NC))


def _calibration_errors(probabilities_NC: Floats, labels_NC: Bools) -> list[float | None]:
    kept_N = ~np.isnan(probabilities_NC).any(axis=1)
    columns = zip(probabilities_NC[kept_N].T, labels_NC[kept_N].T, strict=True)
    return [calibration_error(shares_N, has_N) if has_N.any() else None for shares_N, has_N in columns]


class LabelScores:
    """Hold what a network says of the images that a process has, in the order of the split."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def update(self, logits_BC: Tensor, labels_BC: Tensor, losses_B: Tensor) -> None:
        """Add a batch, without waiting for the device."""
        logits_BC = logits_BC if logits_BC.dtype == torch.float64 else logits_BC.float()
        self._batches.append((logits_BC.detach(), labels_BC, losses_B.detach()))

    def own(self) -> tuple[Floats, Bools, Floats]:
        """Return probabilities (N, C), labels (N, C) and losses (N,) of this process's images."""
        if not self._batches:
            empty = np.zeros((0, self.num_classes))
            return empty, empty.astype(bool), np.zeros(0)
        columns = zip(*self._batches, strict=True)
        logits, labels, losses = (torch.cat([part.cpu() for part in parts]) for parts in columns)
        return probabilities(logits).numpy(), labels.numpy(), losses.double().numpy()

    def over_all(self, gather: Callable[[Any], list[Any]], groups_N: GroupNames | None = None) -> LabelFigures:
        """Return the figures of the images of all processes, which have to call this all; they are in order of rank.

        `groups_N`: of all of them, in the order of the split; None: each stands alone.
        """
        parts = gather(self.own())
        shares_NC, labels_NC, losses_N = (np.concatenate([part[at] for part in parts]) for at in range(3))
        return LabelFigures(shares_NC, labels_NC, losses_N, None if groups_N is None else number_groups(groups_N))


class LabelFigures:
    """Compute the figures of some images."""

    def __init__(
        self,
        probabilities_NC: Floats,
        labels_NC: Bools,
        losses_N: Floats,
        units_N: Ints | None = None,
        *,
        unit: str = "groups",
    ) -> None:
        """Take what the figures are of.

        Args:
            units_N: the number of the group of each, from 0, or of the image where there are several answers to each:
                errors are over these. None: each stands alone.
            unit: what these are.
        """
        self.probabilities_NC, self.labels_NC, self.losses_N = probabilities_NC, labels_NC, losses_N
        self.units_N, self._unit = units_N, unit
        assert units_N is None or len(units_N) == len(labels_NC), "each image has a group"

    @property
    def num_images(self) -> int:
        """Return how many images there are."""
        return len(self.labels_NC)

    @cached_property
    def _rankings(self) -> list[Ranking]:
        return label_rankings(self.labels_NC, self.probabilities_NC)

    @cached_property
    def average_precisions(self) -> list[float | None]:
        """Return that of each class; None of a class that no image has."""
        return [ranking.average_precision() for ranking in self._rankings]

    def mean_average_precision(self) -> float | None:
        """Return the mean over the classes that any image has; None where there is none."""
        return mean_known(self.average_precisions)

    def drawn_mean_average_precisions(self, counts_SN: Ints) -> Floats:
        """Return it of S samples, in which each image counts so often; NaN where a sample has no label."""
        samples, pairs = Samples.of(counts_SN), zip(self._rankings, _Scores(self.probabilities_NC), strict=True)
        drawn_CS = np.stack([one.drawn(_FIGURE, samples, scores_N) for one, scores_N in pairs if one.num_found])
        known_CS = ~np.isnan(drawn_CS)
        sums_S, num_S = np.where(known_CS, drawn_CS, 0.0).sum(axis=0), known_CS.sum(axis=0)
        means_S: Floats = np.divide(sums_S, num_S, out=np.full(len(sums_S), math.nan), where=num_S > 0)
        return means_S

    def summary(
        self, class_names: Sequence[str], thresholds: Sequence[float] | None, given_NC: Bools | None = None
    ) -> dict[str, Any]:
        """Return all figures as plain JSON values; fractions 0..1.

        Args:
            class_names: in their order.
            thresholds: the least probability of each class; None: `DEFAULT_THRESHOLD`.
            given_NC: the labels that the images were given, where no one threshold tells; then `threshold` is None.

        Returns:
            `num_images`; `mean_average_precision` (over the classes; the average precision of one is the sum over its
            images, by descending score, of precision times the growth of recall), and its
            `mean_average_precision_interval95` (normal, by a bootstrap over images, or over groups, of which
            `mean_average_precision_interval95_by` then tells how many); `loss` (mean over images of the
            binary cross-entropy); at the thresholds `macro_f1` (mean over the classes), `micro_f1` (of all labels
            together), `subset_accuracy` (images all of whose labels are right); `ece`, the mean of the calibration
            errors of the classes; `num_without_answer`; `per_class`: name -> `average_precision`, `f1`, `precision`,
            `recall`, `threshold`, `ece`, `num_images` that have it. A class without
            images has None for its figures, and is in no mean. `chance`: `mean_average_precision` of a network that
            never looks, the mean share of the images that have a class.
        """
        least: Sequence[float | None] = thresholds or [DEFAULT_THRESHOLD] * len(class_names)
        if given_NC is None:
            given_NC = labels_from(torch.from_numpy(self.probabilities_NC), thresholds).numpy()
        else:
            least = [None] * len(class_names)
        with_C, given_C = self.labels_NC.sum(axis=0), given_NC.sum(axis=0)
        hits_C = (self.labels_NC & given_NC).sum(axis=0)
        errors = _calibration_errors(self.probabilities_NC, self.labels_NC)
        per_class = {}
        for i, name in enumerate(class_names):
            count, given, hits = int(with_C[i]), int(given_C[i]), int(hits_C[i])
            per_class[name] = {
                "average_precision": self.average_precisions[i],
                "f1": 2 * hits / (count + given) if count else None,
                "precision": hits / given if count and given else None,
                "recall": hits / count if count else None,
                "threshold": least[i],
                "ece": errors[i],
                "num_images": count,
            }
        shares = [count / self.num_images for count in with_C.tolist() if count]
        loss = mean_known(self.losses_N.tolist())
        figure, error = self.mean_average_precision(), self.standard_error("mean_average_precision")
        return {
            "num_images": self.num_images,
            "mean_average_precision": figure,
            "mean_average_precision_interval95": None if figure is None or error is None else _interval(figure, error),
            **({} if self.units_N is None else {f"{_FIGURE}_interval95_by": {self._unit: self._num_units}}),
            "loss": loss if loss is not None and math.isfinite(loss) else None,
            "macro_f1": mean_known(row["f1"] for row in per_class.values()),
            "micro_f1": _ratio(2 * int(hits_C.sum()), int(with_C.sum() + given_C.sum())),
            "subset_accuracy": _ratio(int((self.labels_NC == given_NC).all(axis=1).sum()), self.num_images),
            "ece": mean_known(errors),
            "num_without_answer": int(np.isnan(self.probabilities_NC).any(axis=1).sum()),
            "chance": {"mean_average_precision": mean_known(shares)},
            "per_class": per_class,
            "confusion": None,
        }

    def standard_error(self, figure: str) -> float | None:
        """Return that of `loss`, of a mean; or of `mean_average_precision`, by a bootstrap with a fixed seed."""
        if figure == "loss" and self.units_N is not None:
            sums_G = np.bincount(self.units_N, self.losses_N).astype(np.float64)
            return error_of_ratio(sums_G, np.bincount(self.units_N))
        if figure == "loss":
            return error_of_mean(float(self.losses_N.sum()), float(np.square(self.losses_N).sum()), self.num_images)
        assert figure == "mean_average_precision", f"no standard error of {figure}"
        return self._error_of_map

    @cached_property
    def _num_units(self) -> int:
        """The number of images, or of groups, that the error is over."""
        return self.num_images if self.units_N is None else int(self.units_N.max(initial=-1)) + 1

    @cached_property
    def _error_of_map(self) -> float | None:
        units_N = np.arange(self.num_images) if self.units_N is None else self.units_N
        return error_over_rankings(_FIGURE, self._rankings, _Scores(self.probabilities_NC), units_N)

    def best_thresholds(self) -> list[float]:
        """Return for each class the threshold of the highest F1 here.

        It is the middle between two neighbouring scores; of equally good ones the nearest to `DEFAULT_THRESHOLD`, which
        stands for a class that no image has, too.
        """
        return [ranking.best_threshold() for ranking in self._rankings]


def label_rankings(labels_NC: Bools, probabilities_NC: Floats) -> list[Ranking]:
    """Return how each class ranks the images; one without an answer is behind all others."""
    pairs = zip(labels_NC.T, _Scores(probabilities_NC), strict=True)
    return [Ranking(has_N, scores_N) for has_N, scores_N in pairs]


class _Scores(Columns):
    """Iterate over the probabilities of the classes; below 0 where there is no answer."""

    def _converted(self, values_CN: npt.NDArray[np.floating[Any]]) -> Floats:
        scores_CN: Floats = np.nan_to_num(values_CN, nan=-1.0)
        return scores_CN


def _interval(figure: float, error: float) -> list[float]:
    return [max(figure - _Z95 * error, 0.0), min(figure + _Z95 * error, 1.0)]


def _ratio(part: float, whole: int) -> float | None:
    return part / whole if whole else None
