"""Compare an export with the model of the run: what it says of images, and how many it gets right.

Promise: an export counts only if, on the images at hand and in batches of other sizes than its example, its logits are
those of the model up to `TOLERANCE` of the largest, and its labels are the model's but for ties.

Shapes: N images, C classes.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tlscale.data.input_spec import InputSpec
from tlscale.data.transforms import normalise
from tlscale.errors import TlscaleError
from tlscale.models.classifier import CodesClassifier
from tlscale.models.knn import KnnHead
from tlscale.models.model_folder import TrainedModel

TOLERANCE = 1e-4
NO_UNKNOWN = (
    "This file does not compute the score of unknown images, which takes features of a frozen layer: tlscale predict "
    "RUN does, by unknown.safetensors in the run's model/."
)
EXAMPLE = 2
"""Images of the batch that exporters follow; exports are checked in batches of other sizes."""
BATCH_SIZES = (7, 1)
_MOST_ALONE = 16  # images that are answered one at a time
_EQUALLY_NEAR = 1e-5  # cosines


class WrongExportError(TlscaleError):
    """Raised when an export does not give what the model of the run gives."""


@dataclass(frozen=True)
class Evidence:
    """Hold the images that exports are compared on, and what the model of the run says of them."""

    trained: TrainedModel
    images_NCHW: Tensor
    """Prepared as the run prepares its own; one at least."""
    labels_N: Tensor | None
    """Class numbers, where they are known."""
    of: str
    """What images these are, in words."""

    @property
    def spec(self) -> InputSpec:
        """Return what images the network takes."""
        return self.trained.input_spec

    @property
    def example(self) -> Tensor:
        """Return the batch for exporters to follow."""
        repeated = self.images_NCHW.repeat(EXAMPLE, 1, 1, 1)[:EXAMPLE]
        return normalise(repeated, self.spec, torch.float32)

    @cached_property
    def expected_NC(self) -> Tensor:  # noqa: N802
        """Compute the logits of the model."""
        return self._answers(self.trained.model.eval(), BATCH_SIZES[0], len(self.images_NCHW))

    def compare(self, network: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Compare an export, given as a function from normalised images to logits.

        Returns:
            What was found, for people: which images, how large the difference is and, where there are labels, the
            accuracies.

        Raises:
            WrongExportError: it is not what the model gives, or there is no image on which that could be told.
        """
        if not self._undisputed_N.any():
            raise WrongExportError("of each image several neighbours are equally near: name other images to compare on")
        largest, limit = float(self.expected_NC.abs().max()), self._limit
        differences, first = [], None
        for size in BATCH_SIZES:
            count = len(self.images_NCHW) if size > 1 else min(len(self.images_NCHW), _MOST_ALONE)
            found_NC, expected_NC = self._answers(network, size, count), self.expected_NC[:count]
            first = found_NC if first is None else first
            if found_NC.shape != expected_NC.shape:
                shapes = f"{tuple(found_NC.shape)}, not {tuple(expected_NC.shape)}"
                raise WrongExportError(f"its logits have the shape {shapes}, in batches of {size}")
            off_NC = (found_NC - expected_NC)[self._undisputed_N[:count]].abs()
            differences.append(float(off_NC.max()) / largest if len(off_NC) else 0.0)
            if not differences[-1] <= limit:  # NaN is not
                raise WrongExportError(
                    f"its logits differ from the run's by {differences[-1]:.2g} of the largest, in batches of {size}"
                    f"{self._in_words(found_NC)}"
                )
        assert first is not None
        report = {"images": self.of, "num_images": len(self.images_NCHW), "batch_sizes": list(BATCH_SIZES)}
        return {**report, "largest_difference": max(differences), **self._accuracies(first)}

    def _answers(self, network: Callable[[Tensor], Tensor], size: int, count: int) -> Tensor:
        with torch.no_grad():
            batches = torch.split(self.images_NCHW[:count], size)
            return torch.cat([network(normalise(batch, self.spec, torch.float32)) for batch in batches])

    @property
    def _limit(self) -> float:
        """Return the largest difference that counts as none, as a share of the largest logit.

        Lower where logits hardly hang on the image: a network that never looks at it would pass.
        """
        largest = float(self.expected_NC.abs().max())
        spread = float((self.expected_NC - self.expected_NC.mean(0)).abs().max())
        return min(TOLERANCE, max(spread / largest / 100, TOLERANCE / 10)) if largest else TOLERANCE

    @cached_property
    def _undisputed_N(self) -> Tensor:  # noqa: N802
        """Find the images whose logits do not jump where two neighbours are equally near."""
        model = self.trained.model
        everyone_N = torch.ones(len(self.images_NCHW), dtype=torch.bool)
        if not isinstance(model, CodesClassifier) or not isinstance(head := model.head, KnnHead):
            return everyone_N
        if head.k == len(head.labels_N):
            return everyone_N
        wider = KnnHead(head.state(), head.k + 1, head.num_classes)
        last_N2 = self._answers(lambda images: wider.neighbours(model.codes(images)[0])[0][:, -2:], 7, len(everyone_N))
        return last_N2[:, 0] - last_N2[:, 1] > _EQUALLY_NEAR

    def _accuracies(self, found_NC: Tensor) -> dict[str, float]:
        if self.labels_N is None:
            return {}
        pairs = {"top1_of_run": self.expected_NC, "top1": found_NC}
        return {
            name: float((logits_NC.argmax(1) == self.labels_N[: len(logits_NC)]).double().mean())
            for name, logits_NC in pairs.items()
        }

    def _in_words(self, found_NC: Tensor) -> str:
        found = self._accuracies(found_NC)
        return f" (accuracy {found['top1']:.3f} in place of {found['top1_of_run']:.3f})" if found else ""


def require(*packages: str) -> None:
    """Refuse an export without the packages that it takes.

    Raises:
        TlscaleError: one is missing.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise TlscaleError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            key="to",
            remedy="Install what exports take: pip install 'tlscale[export]'",
        )


def about(trained: TrainedModel, version: str, run_id: str | None) -> dict[str, str]:
    """Describe a model for the metadata of its file: each value is JSON."""
    spec = trained.input_spec
    images = {
        "size": spec.image_size,
        "channels": spec.in_chans,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "interpolation": spec.interpolation,
        "crop": spec.crop_pct,
        "crop_mode": spec.crop_mode,
        **({} if spec.range is None else {"range": list(spec.range)}),
    }
    values: dict[str, Any] = {
        "classes": list(trained.classes),
        "input": images,
        "tlscale": {"version": version, "run": run_id},
    }
    if trained.calibration is not None:
        values["calibration"] = trained.calibration.model_dump()
    if trained.unknown is not None:
        settings = trained.unknown.settings.model_dump(exclude_none=True)
        values["unknown"] = {**settings, "computed": False, "note": NO_UNKNOWN}
    if trained.views:
        values["views"] = list(trained.views)
    if trained.thresholds is not None:
        values |= {"task": "multi_label", "thresholds": list(trained.thresholds)}
    return {key: json.dumps(value) for key, value in values.items()}
