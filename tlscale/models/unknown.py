"""Score how unlike the training images an image is, by its frozen codes.

The score is the Mahalanobis distance to the nearest class mean, with one covariance for all classes (Lee et al. 2018),
squared, a feature: about 1 for images like those of training. Codes of a frozen network are there in any case, and do
not hang on which classes are known.

Shapes: N images, B images of a batch, C classes, D features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from tlscale.errors import ModelError

UNKNOWN_FILE = "unknown.safetensors"
MOST_FEATURES = 2048
"""Of more the covariance would be a large part of a model, and of no few seconds."""
Floats = npt.NDArray[np.float64]


class UnknownSettings(BaseModel):
    """Hold what `config.json` has under `tlscale.unknown`."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    threshold: Annotated[float, Field(ge=0.0)]
    """An image with a higher score is unknown."""
    recall: Annotated[float, Field(gt=0.0, lt=1.0)]
    """The share of images of known classes that are not, by the threshold."""
    num_images: Annotated[int, Field(ge=1)]
    """Validation images that chose the threshold."""
    layer: Literal["penultimate"] | None = None
    """Whose codes it is of, where the network alone does not tell that; None: those of its `layer`, or of the part that
    the run froze."""


@dataclass(frozen=True)
class UnknownScore:
    """Hold what images of training are like, and from which score on an image is not."""

    settings: UnknownSettings
    means_CD: Tensor
    """float32: of the codes of each class that has training images."""
    whitening_DD: Tensor
    """float32: codes times this have the identity as their covariance within classes."""

    @classmethod
    def of_state(cls, settings: UnknownSettings, state: Mapping[str, Tensor]) -> UnknownScore:
        """Take the tensors of a file.

        Raises:
            ModelError: they are not such.
        """
        means_CD, whitening_DD = state.get("means_CD"), state.get("whitening_DD")
        if means_CD is None or whitening_DD is None or means_CD.ndim != 2 or not len(means_CD):
            raise ModelError(f"'{UNKNOWN_FILE}' lacks what images are compared with")
        if whitening_DD.shape != (means_CD.shape[1], means_CD.shape[1]):
            raise ModelError(f"'{UNKNOWN_FILE}' has tensors that do not go together")
        return cls(settings, means_CD, whitening_DD)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors for a file."""
        return {"means_CD": self.means_CD, "whitening_DD": self.whitening_DD}

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state().values())

    def scores(self, codes_BD: Tensor) -> Floats:
        """Compute the score of each image, in double precision on the CPU."""
        whitening_DD = self.whitening_DD.double()
        codes_BD, means_CD = codes_BD.cpu().double() @ whitening_DD, self.means_CD.double() @ whitening_DD
        scores_B: Floats = (torch.cdist(codes_BD, means_CD).amin(dim=1).square() / codes_BD.shape[1]).numpy()
        return scores_B


def pooled_codes(values: Sequence[Tensor], image_hw: tuple[int, int]) -> Tensor:
    """Take codes of images to one vector each: means over positions, of several values side by side.

    Positions are those after channels (B, C, H, W), before them (B, H, W, C) where these have the images' proportions
    and the others have not, and the tokens of (B, positions, D).
    """
    return torch.cat([_pooled(value.float(), image_hw) for value in values if value.is_floating_point()], dim=1)


def _pooled(value: Tensor, image_hw: tuple[int, int]) -> Tensor:
    if value.ndim == 4:
        _, *sides = value.shape
        # A map's sides are rounded; how far its proportions are from the images', as a factor.
        first, last = (
            abs(math.log(height / width * image_hw[1] / image_hw[0])) for height, width in (sides[1:], sides[:2])
        )
        return value.mean(dim=(1, 2) if last < first else (2, 3))
    return value.mean(dim=1) if value.ndim == 3 else value.flatten(1)
