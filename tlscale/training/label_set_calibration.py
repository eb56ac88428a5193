"""Choose a temperature for images that have several labels each, and tell what probabilities with it are worth.

Promise: one number divides the logits of all classes before the sigmoid, so that the order of the images by a class,
and with it average precision, stay what they are. It is chosen by images that were not fitted, as with one label. Sets
of labels are not made: how often a set has to have all labels of an image is another question.

Shape letters: N images, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from tlscale.codes.probes.ranking import Bools
from tlscale.data.sources.tables import Ints
from tlscale.models.calibration import Calibration
from tlscale.training.calibration import choosing_rows, gains_more_than_its_error, least_by_newton
from tlscale.training.label_set_loss import binary_cross_entropy
from tlscale.training.label_set_metrics import label_calibration_error
from tlscale.training.label_set_predictions import label_matrix, logit_matrix
from tlscale.training.prediction_figures import units_of

Logits = npt.NDArray[np.floating[Any]]
UNKNOWN_LABEL_FIGURES: Mapping[str, Any] = dict.fromkeys(("loss", "ece"))
"""With a temperature, of images that have chosen it."""


def label_calibration_by(table: pa.Table) -> Calibration | None:
    """Choose the temperature by predictions on images that were not fitted; None where no image has an answer.

    It is 1 where these images, or the groups of them, do not tell it from 1: by more than one standard error of the
    gain in cross-entropy.
    """
    labels_NC, logits_NC, groups_N = _answers(table)
    if not len(labels_NC):
        return None
    rows = choosing_rows(logits_NC)
    drawn_NC, truth_NC = logits_NC[rows].astype(np.float64), labels_NC[rows]
    temperature = choose_label_temperature(truth_NC, drawn_NC)
    before_N, after_N = (
        binary_cross_entropy(torch.from_numpy(drawn_NC / each), torch.from_numpy(truth_NC)).numpy()
        for each in (1.0, temperature)
    )
    if not gains_more_than_its_error(before_N - after_N, None if groups_N is None else groups_N[rows]):
        temperature = 1.0
    return Calibration(temperature=temperature, num_images=len(labels_NC))


def choose_label_temperature(labels_NC: Bools, logits_NC: npt.NDArray[np.float64]) -> float:
    """Choose the temperature with the least binary cross-entropy, the mean over images and classes.

    As with one label no target is certain: (N + 1) / (N + 2) of a label that an image has, 1 / (N + 2) of another.
    """
    target = (len(labels_NC) + 1) / (len(labels_NC) + 2)
    targets_NC = np.where(labels_NC, target, 1 - target)

    def slope_and_curvature(factor: float) -> tuple[float, float]:
        shares_NC = torch.from_numpy(logits_NC * factor).sigmoid().numpy()
        slope = float((logits_NC * (shares_NC - targets_NC)).mean())
        return slope, float((logits_NC**2 * shares_NC * (1 - shares_NC)).mean())

    return 1 / least_by_newton(slope_and_curvature)


def label_calibrated_figures(parts: Iterable[tuple[pa.Table, Calibration]]) -> dict[str, Any]:
    """Compute loss and calibration error with the temperature, each table of images by one of its own."""
    losses, shares, truths = [], [], []
    for table, calibration in parts:
        labels_NC, logits_NC, _ = _answers(table)
        logits = torch.from_numpy(logits_NC.astype(np.float64))
        losses.append(binary_cross_entropy(logits / calibration.temperature, torch.from_numpy(labels_NC)))
        shares.append(calibration.label_probabilities(torch.from_numpy(logits_NC)).numpy())
        truths.append(labels_NC)
    truth_NC = np.concatenate(truths)
    if not len(truth_NC):
        return dict(UNKNOWN_LABEL_FIGURES)
    return {
        "loss": float(torch.cat(losses).mean()),
        "ece": label_calibration_error(np.concatenate(shares), truth_NC),
    }


def _answers(table: pa.Table) -> tuple[Bools, Logits, Ints | None]:
    """Return labels, logits and groups of the images that have an answer."""
    classes = json.loads(table.schema.metadata[b"tlscale"])["classes"]
    logits_NC = logit_matrix(table)
    kept_N = ~np.isnan(logits_NC).any(axis=1)
    return label_matrix(table["true_labels"], classes)[kept_N], logits_NC[kept_N], units_of(table, kept_N)
