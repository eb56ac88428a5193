"""Compute the figures of several labels an image that take all scored images at once, from `predictions.parquet` alone.

Promise: as those of one label (`prediction_figures`), by the same functions. An image without an answer ranks behind
all others, and has no label.

Shape letters: N images, C classes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tlscale.models.calibration import Calibration
from tlscale.training.label_set_calibration import UNKNOWN_LABEL_FIGURES, label_calibrated_figures
from tlscale.training.label_set_metrics import label_rankings, probabilities
from tlscale.training.label_set_predictions import label_matrix, logit_matrix
from tlscale.training.prediction_figures import ranked, share_interval, units_of
from tlscale.training.predictions import read_predictions


def add_label_figures(figures: dict[str, Any], path: Path, *, have_chosen: bool = False) -> dict[str, Any]:
    """Return the figures of `LabelFigures.summary` with those that follow from the predictions in a file as well.

    They are `auroc`, the mean over classes, and that of each class in `per_class`, with `recall_interval95` (Wilson's,
    or over groups); `pr_curves` of each class; and under `calibration` the loss and the calibration error with the
    temperature, where the file notes one, None where the images `have_chosen` it.

    Raises:
        RunFolderError: the file is damaged.
    """
    table = read_predictions(path, ("true_labels", "labels", "logits"), if_there=("group", "row", "repeat"))
    about = json.loads(table.schema.metadata[b"tlscale"])
    has_NC, given_NC = (label_matrix(table[name], about["classes"]) for name in ("true_labels", "labels"))
    rankings = label_rankings(has_NC, probabilities(torch.from_numpy(logit_matrix(table))).numpy())
    found = {**figures, **ranked(figures["per_class"], about["classes"], rankings)}
    units_N = units_of(table, np.ones(len(table), dtype=bool))
    for name, has_N, given_N in zip(about["classes"], has_NC.T, given_NC.T, strict=True):
        interval = share_interval(given_N[has_N], None if units_N is None else units_N[has_N])
        found["per_class"][name]["recall_interval95"] = interval
    if "calibration" not in about:
        return found
    calibration = Calibration.model_validate(about["calibration"])
    told = UNKNOWN_LABEL_FIGURES if have_chosen else label_calibrated_figures([(table, calibration)])
    return {**found, "calibration": {"temperature": calibration.temperature, **told}}
