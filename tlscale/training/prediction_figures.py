"""Compute the figures that take all scored images at once, from `predictions.parquet` alone.

Promise: whatever the number of processes, they are those of the file. They go where `metrics.summary` goes, which adds
up over batches: what needs sums alone is there.

Shape letters: N images, C classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from tlscale.codes.probes.class_figures import ClassShares, class_rankings
from tlscale.codes.probes.ranking import Bools, Floats, Ranking, mean_known
from tlscale.data.sources.tables import Ints, number_groups
from tlscale.models.calibration import Calibration
from tlscale.training.calibration import calibration_error, calibration_interval, choose_calibration
from tlscale.training.group_interval import interval_over_units
from tlscale.training.metrics import wilson
from tlscale.training.predictions import NO_ANSWER, read_predictions

_CHUNK = 4096  # images
MOST_CURVES = 100
"""With more classes than this no curves are told: they would be most of `result.json`."""

UNKNOWN_FIGURES: Mapping[str, Any] = {
    **dict.fromkeys(("loss", "ece", "ece_interval95")),
    "sets": dict.fromkeys(("coverage", "coverage_interval95", "mean_size")),
}
"""With a temperature, of images that have chosen it."""


@dataclass(frozen=True)
class ScoredImages:
    """Hold what a file of predictions tells, of the images that have an answer."""

    classes: tuple[str, ...]
    labels_N: Ints
    is_hit_N: Bools
    confidence_N: Floats
    logits_NC: npt.NDArray[np.floating[Any]] | None
    """As they were computed; None where the file has the best of each image alone."""
    groups_N: Ints | None
    """Equal for answers that do not stand alone: of one group, and over repeats of one image. None: all do."""
    calibration: Calibration | None
    """What validation images chose; None: there is none."""

    @classmethod
    def read(cls, path: Path) -> ScoredImages:
        """Read them.

        Raises:
            RunFolderError: the file is damaged.
        """
        optional = ("logits", "group", "row", "repeat")
        return cls.of(read_predictions(path, ["true_label", "label", "probability"], if_there=optional))

    @classmethod
    def of(cls, table: pa.Table) -> ScoredImages:
        """Take them from a table such as the file has."""
        about = json.loads(table.schema.metadata[b"tlscale"])
        classes = about["classes"]
        labels_N, answers_N = (class_numbers(table[name], classes) for name in ("true_label", "label"))
        kept_N = answers_N != NO_ANSWER
        logits_NC = None
        if "logits" in table.column_names:
            logits_NC = table["logits"].combine_chunks().flatten().to_numpy().reshape(-1, len(classes))[kept_N]
        return cls(
            tuple(classes),
            labels_N[kept_N],
            (labels_N == answers_N)[kept_N],
            table["probability"].to_numpy()[kept_N],
            logits_NC,
            units_of(table, kept_N),
            Calibration.model_validate(about["calibration"]) if "calibration" in about else None,
        )


def class_numbers(names: pa.ChunkedArray, classes: Sequence[str]) -> Ints:
    """Return the number of each class by its name; `NO_ANSWER` of null."""
    found = pc.index_in(names, value_set=pa.array(classes, pa.string())).fill_null(NO_ANSWER)
    numbers_N: Ints = found.to_numpy().astype(np.int64)
    return numbers_N


def units_of(table: pa.Table, kept_N: Bools) -> Ints | None:
    """Return the number of the unit of each answer that is kept: its group, or over repeats its image."""
    groups_N = None
    if "group" in table.column_names:
        groups_N = table["group"].combine_chunks().cast(pa.large_string())
    if "repeat" not in table.column_names:
        return None if groups_N is None else number_groups(groups_N.filter(pa.array(kept_N)))
    units_N = table["row"].to_numpy()
    if groups_N is not None:
        encoded = groups_N.dictionary_encode()
        named_N = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        units_N = np.where(named_N < 0, len(encoded.dictionary) + units_N, named_N)
    numbers_N: Ints = np.unique(units_N[kept_N], return_inverse=True)[1].reshape(-1).astype(np.int64)
    return numbers_N


def calibration_by(table: pa.Table) -> Calibration | None:
    """Choose the temperature by predictions on images that were not fitted; None where no image has an answer."""
    images = ScoredImages.of(table)
    assert images.logits_NC is not None
    return choose_calibration(images.labels_N, images.logits_NC, images.groups_N)


def add_prediction_figures(figures: dict[str, Any], path: Path, *, have_chosen: bool = False) -> dict[str, Any]:
    """Return the figures of `metrics.summary` with those that follow from the predictions in a file as well.

    They are of the images that have an answer, one class against all others, by its probability: `auroc` and
    `average_precision` of each class in `per_class` (None of a class without images), `auroc` and
    `mean_average_precision`, the means over classes; `pr_curves`, of each class (with more than `MOST_CURVES` classes
    none); `ece_interval95`. Of more classes than logits are stored of, only the last one. `calibration` has the loss
    and the calibration error with the temperature, where there is one; None where the images `have_chosen` it.

    Raises:
        RunFolderError: the file is damaged.
    """
    images = ScoredImages.read(path)
    interval = calibration_interval(images.confidence_N, images.is_hit_N, images.groups_N)
    found = {**figures, "ece_interval95": None if interval is None else list(interval)}
    if images.logits_NC is None:
        return found
    if images.calibration is not None:
        found["calibration"] = _calibration(images, images.calibration, have_chosen=have_chosen)
    rankings = class_rankings(ClassShares(images.logits_NC), images.labels_N)
    return {**found, **ranked(figures["per_class"], images.classes, rankings)}


def ranked(
    per_class: Mapping[str, Mapping[str, Any]], classes: Sequence[str], rankings: Iterable[Ranking]
) -> dict[str, Any]:
    """Return the figures by the order in which each class ranks the images, and the rows of classes with theirs."""
    rows = {name: dict(row) for name, row in per_class.items()}
    curves = {}
    for name, ranking in zip(classes, rankings, strict=True):
        rows[name] |= {"auroc": ranking.auroc(), "average_precision": ranking.average_precision()}
        if len(classes) <= MOST_CURVES:
            curves[name] = ranking.curve()
    return {
        "auroc": mean_known([row["auroc"] for row in rows.values()]),
        "mean_average_precision": mean_known([row["average_precision"] for row in rows.values()]),
        "per_class": rows,
        **({"pr_curves": curves} if curves else {}),
    }


def _calibration(images: ScoredImages, calibration: Calibration, *, have_chosen: bool) -> dict[str, Any]:
    """Return the temperature, and the figures with it; those of images that chose it would be too good."""
    if have_chosen:
        return {"temperature": calibration.temperature, **UNKNOWN_FIGURES}
    figures = calibrated_figures(images, [(np.arange(len(images.labels_N)), calibration)])
    return {"temperature": calibration.temperature, **figures}


def calibrated_figures(images: ScoredImages, parts: Iterable[tuple[Ints, Calibration]]) -> dict[str, Any]:
    """Compute loss and calibration error with the temperature, and how often the sets have the true label.

    `parts`: positions of images, each once, and the calibration that they are scored with.
    """
    assert images.logits_NC is not None
    num_images = len(images.labels_N)
    confidence_N, is_covered_N = np.zeros(num_images), np.zeros(num_images, dtype=bool)
    losses, size = [0.0], 0
    for rows_P, calibration in parts:
        assert calibration.sets is not None
        for start in range(0, len(rows_P), _CHUNK):
            rows_B = rows_P[start : start + _CHUNK]
            logits_BC, labels_B1 = images.logits_NC[rows_B], images.labels_N[rows_B, None]
            best_B = np.nan_to_num(logits_BC).argmax(axis=1)
            shares_BC = calibration.probabilities(torch.from_numpy(logits_BC)).numpy()
            members_BC = calibration.sets.members(shares_BC, best_B)
            with np.errstate(divide="ignore"):
                losses += (-np.log(np.take_along_axis(shares_BC, labels_B1, axis=1))).ravel().tolist()
            confidence_N[rows_B] = np.take_along_axis(shares_BC, best_B[:, None], axis=1)[:, 0]
            is_covered_N[rows_B] = np.take_along_axis(members_BC, labels_B1, axis=1)[:, 0]
            size += int(members_BC.sum())
    loss, interval = math.fsum(losses), calibration_interval(confidence_N, images.is_hit_N, images.groups_N)
    return {
        "loss": loss / num_images if num_images and math.isfinite(loss) else None,
        "ece": calibration_error(confidence_N, images.is_hit_N),
        "ece_interval95": None if interval is None else list(interval),
        "sets": {
            "coverage": int(is_covered_N.sum()) / num_images if num_images else None,
            "coverage_interval95": share_interval(is_covered_N, images.groups_N),
            "mean_size": size / num_images if num_images else None,
        },
    }


def share_interval(hits_N: Bools, groups_N: Ints | None) -> list[float] | None:
    """Return the 95% interval of a share, over groups where there are any."""
    return wilson(int(hits_N.sum()), len(hits_N)) if groups_N is None else interval_over_units(groups_N, hits_N)
