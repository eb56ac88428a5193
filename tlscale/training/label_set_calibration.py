"""Choose a temperature for images that have several labels each, and tell what probabilities with it are worth.

Promise: one number divides the logits of all classes before the sigmoid, so that the order of the images by a class,
and with it average precision, stay what they are. It is chosen by images that were not fitted, as with one label. Sets
of labels are not made: how often a set has to have all labels of an image is another question.

Shape letters: N images, C classes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from tlscale.codes.probes.ranking import Bools
from tlscale.models.calibration import Calibration
from tlscale.training.calibration import choosing_rows, gains_more_than_its_error, least_by_newton
from tlscale.training.label_set_loss import binary_cross_entropy
from tlscale.training.label_set_metrics import label_calibration_error
from tlscale.training.label_set_predictions import label_matrix, logit_matrix
from tlscale.training.predictions import read_predictions

Logits = npt.NDArray[np.floating[Any]]


def label_calibration_by(table: pa.Table) -> Calibration | None:
    """Choose the temperature by predictions on images that were not fitted; None where no image has an answer.

    It is 1 where these images do not tell it from 1: by more than one standard error of the gain in cross-entropy.
    """
    labels_NC, logits_NC = _answers(table)
    if not len(labels_NC):
        return None
    rows = choosing_rows(logits_NC)
    drawn_NC, truth_NC = logits_NC[rows].astype(np.float64), labels_NC[rows]
    temperature = choose_label_temperature(truth_NC, drawn_NC)
    before_N, after_N = (
        binary_cross_entropy(torch.from_numpy(drawn_NC / each), torch.from_numpy(truth_NC)).numpy()
        for each in (1.0, temperature)
    )
    if not gains_more_than_its_error(before_N - after_N):
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


def add_label_calibration(figures: dict[str, Any], path: Path, *, have_chosen: bool) -> dict[str, Any]:
    """Return the figures with the loss and the calibration error with the temperature, where the file notes one.

    Both are None where the images `have_chosen` it.

    Raises:
        RunFolderError: the file is damaged.
    """
    table = read_predictions(path, ("true_labels", "labels", "logits"))
    plain = json.loads(table.schema.metadata[b"tlscale"]).get("calibration")
    if plain is None:
        return figures
    calibration = Calibration.model_validate(plain)
    told: dict[str, Any] = {"temperature": calibration.temperature, "loss": None, "ece": None}
    labels_NC, logits_NC = _answers(table)
    if not have_chosen and len(labels_NC):
        logits, truth = torch.from_numpy(logits_NC.astype(np.float64)), torch.from_numpy(labels_NC)
        loss = float(binary_cross_entropy(logits / calibration.temperature, truth).mean())
        shares_NC = calibration.label_probabilities(torch.from_numpy(logits_NC)).numpy()
        told |= {"loss": loss, "ece": label_calibration_error(shares_NC, labels_NC)}
    return {**figures, "calibration": told}


def _answers(table: pa.Table) -> tuple[Bools, Logits]:
    """Return labels and logits of the images that have an answer."""
    classes = json.loads(table.schema.metadata[b"tlscale"])["classes"]
    logits_NC = logit_matrix(table)
    kept_N = ~np.isnan(logits_NC).any(axis=1)
    return label_matrix(table["true_labels"], classes)[kept_N], logits_NC[kept_N]
