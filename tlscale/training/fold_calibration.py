"""Choose the temperature of the model on all images of a cross-validation, and tell what it is worth.

Promise: what chooses is the answers of the folds, so each image by a model that was not fitted to it, and each image
once: those of the first repeat. Further repeats are other answers on the same images; they would not tell a temperature
from 1 any better.

What it is worth is told crosswise: the answers of each fold get a temperature (and sets) that the other folds of its
repeat chose, and so one that no image of the fold, and none of a group in it, has chosen. The models of the other folds
were fitted to the images of the fold, which so have a part in one number: with fewer than 60 images the figures still
come out somewhat too good (ADR 26 has the measurement). The temperatures that some folds choose within themselves would
be another choice, by other images; a probe that is fitted again to these has none.

Shape letters: N answers, P of them in a fold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlscale.codes.probes.ranking import Bools
from tlscale.models.calibration import Calibration
from tlscale.training.label_set_calibration import (
    UNKNOWN_LABEL_FIGURES,
    label_calibrated_figures,
    label_calibration_by,
)
from tlscale.training.prediction_figures import UNKNOWN_FIGURES, ScoredImages, calibrated_figures, calibration_by

FITTED_TO_ALL = "the model was fitted to all images of the folds"


def choose_by_folds(table: pa.Table) -> Calibration | None:
    """Choose by predictions as `out_of_fold.join_predictions` gives them; None where no image has an answer."""
    return _choose(table.filter(pc.equal(table["repeat"], 1)))


def about_fold_calibration(chosen: Mapping[str, Any], table: pa.Table) -> dict[str, Any]:
    """Return `calibration` of a cross-validation's `result.json`.

    Args:
        chosen: that of the model on all images, whose own figures are of a given test split. Without a temperature
            where an older version began that model.
        table: predictions as `out_of_fold.join_predictions` gives them.
    """
    if chosen["temperature"] is None:
        return {"temperature": None, "why": FITTED_TO_ALL}
    figures = crosswise_figures(table)
    if "sets" in chosen:
        own = {key: chosen["sets"][key] for key in ("level", "threshold", "why") if key in chosen["sets"]}
        figures["sets"] = own | figures["sets"]
    return {**{key: chosen[key] for key in ("temperature", "num_images", "also_chose")}, **figures}


def crosswise_figures(table: pa.Table) -> dict[str, Any]:
    """Return the figures with a temperature and sets, each fold's by those that the other folds chose.

    As `add_prediction_figures` has them under `calibration`, or of several labels `add_label_figures`. They are
    None where the answers of one fold alone have chosen.
    """
    has_several = _has_several(table)
    table = table.filter(pc.is_valid(table["labels" if has_several else "label"]))
    parts = []
    for is_here_N, calibration in _crosswise(table):
        if calibration is None:
            return dict(UNKNOWN_LABEL_FIGURES if has_several else UNKNOWN_FIGURES)
        parts.append((is_here_N, calibration))
    if has_several:
        return label_calibrated_figures((table.filter(pa.array(is_here_N)), by) for is_here_N, by in parts)
    return calibrated_figures(ScoredImages.of(table), ((np.flatnonzero(is_here_N), by) for is_here_N, by in parts))


def _crosswise(table: pa.Table) -> Iterator[tuple[Bools, Calibration | None]]:
    """Give for each fold which answers are its own, and what the other folds of its repeat choose."""
    folds_N, repeats_N = table["fold"].to_numpy(), table["repeat"].to_numpy()
    for fold in np.unique(folds_N):
        is_here_N: Bools = folds_N == fold
        is_other_N = ~is_here_N & (repeats_N == repeats_N[is_here_N][0])
        yield is_here_N, _choose(table.filter(pa.array(is_other_N)))


def _choose(table: pa.Table) -> Calibration | None:
    return label_calibration_by(table) if _has_several(table) else calibration_by(table)


def _has_several(table: pa.Table) -> bool:
    return "true_labels" in table.column_names
