"""Make probabilities of logits by a temperature, and sets of labels by a threshold, both chosen by validation images.

Promise: in double precision on the CPU, so that they are the same bits wherever the logits are.

Shapes: N images, C classes.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

_Share = Annotated[float, Field(ge=0.0, le=1.0)]


class _Chosen(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class LabelSets(_Chosen):
    """Give to each image a set of labels that has the true one as often as `level` says (split conformal).

    Where it was chosen by groups of images, that is: to an image of a new group.
    """

    level: _Share
    threshold: _Share
    """A class with at least this probability is in the set; the label itself always is."""

    def members(
        self, probabilities_NC: npt.NDArray[np.floating[Any]], labels_N: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Return which classes are in the set of each image; none where there is no label (a number below 0)."""
        members_NC: npt.NDArray[np.bool_] = probabilities_NC >= self.threshold
        np.put_along_axis(members_NC, np.maximum(labels_N, 0)[:, None], values=True, axis=1)
        return members_NC & (labels_N >= 0)[:, None]


class Calibration(_Chosen):
    """Hold what was chosen; `config.json` of a model has it under `tlscale.calibration`."""

    temperature: Annotated[float, Field(gt=0.0)]
    """Logits are divided by it."""
    num_images: Annotated[int, Field(ge=1)]
    """Validation images that chose."""
    sets: LabelSets | None = None
    """None of several labels an image."""

    def probabilities(self, logits_NC: Tensor) -> Tensor:
        """Return float64 (N, C), on the CPU."""
        finite_NC = torch.nan_to_num(logits_NC.cpu() if logits_NC.dtype == torch.float64 else logits_NC.cpu().float())
        return (finite_NC.double() / self.temperature).softmax(dim=1)

    def label_probabilities(self, logits_NC: Tensor) -> Tensor:
        """Return that of each class by itself, for several labels; float64 (N, C), on the CPU."""
        return (logits_NC.cpu().double() / self.temperature).sigmoid()
