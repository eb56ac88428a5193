"""Write the predictions of images that have several labels each: `predictions.parquet` of such a run.

Promise: as that of `predictions`.

| column | holds |
|---|---|
| `path`, `row`, `group` | as in `predictions` |
| `true_labels` | a list of class names |
| `labels` | those whose probability is their threshold or more; null where the network gave no number (NaN) |
| `logits` | a list of C numbers, in the order of the classes: the probability of a class is the sigmoid of its own |

The metadata has `task`, and the `thresholds` of the classes, besides; thresholds are of the sigmoid of the logits as
they are, whatever the temperature under `calibration` makes of it for people. Of a cross-validation it has no
thresholds, as each fold chose its own.

Shapes: N images of the split, B images of a batch, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from tlscale.data.sources.open import ImageSplit
from tlscale.distributed.device import CopyToCpu
from tlscale.models.model_folder import TrainedModel
from tlscale.training.label_set_metrics import labels_from, probabilities
from tlscale.training.predictions import FORMAT, Predictions, image_names, lists


class LabelSetPredictions(Predictions):
    """Collect this process's predictions on a split, on the CPU."""

    def __init__(self, split: ImageSplit, classes: Sequence[str], thresholds: Sequence[float]) -> None:
        super().__init__(split, classes)
        self._thresholds = list(thresholds)

    @torch.no_grad()
    def add(self, positions_B: Tensor, logits_BC: Tensor) -> None:
        """Take a batch, as `Predictions` does."""
        logits_BC = logits_BC if logits_BC.dtype == torch.float64 else logits_BC.float()
        earlier, self._on_the_way = self._on_the_way, [CopyToCpu((positions_B, logits_BC))]
        self._keep(earlier)

    def _keep(self, batches: Iterable[CopyToCpu]) -> None:
        for batch in batches:
            positions_B, logits_BC = batch.wait()
            self._kept.append({"position": positions_B, "logits": logits_BC})

    def _table(self, columns: dict[str, np.ndarray]) -> pa.Table:
        positions_B, logits_BC = columns["position"], columns["logits"]
        shares_BC = probabilities(torch.from_numpy(logits_BC))
        arrays = {
            "path": pa.array(image_names(self.split, positions_B), pa.string()),
            "row": pa.array(self.split.rows_N[positions_B], pa.int64()),
            **self._groups(positions_B),
            "true_labels": _names(self.split.labels_N[positions_B], self.classes),
            "labels": _names(
                labels_from(shares_BC, self._thresholds).numpy(), self.classes, shares_BC.isnan().any(dim=1).numpy()
            ),
            "logits": lists(pa.array(logits_BC.ravel()), len(self.classes)),
        }
        about = {
            "format": FORMAT,
            "classes": list(self.classes),
            "split": self.split.name,
            "task": "multi_label",
            "thresholds": self._thresholds,
            **({} if self.calibration is None else {"calibration": self.calibration.model_dump()}),
        }
        return pa.table(arrays).replace_schema_metadata({"tlscale": json.dumps(about, ensure_ascii=False)})


def _names(
    has_BC: npt.NDArray[np.bool_], classes: Sequence[str], is_null_B: npt.NDArray[np.bool_] | None = None
) -> pa.ListArray:
    """Return lists of names."""
    rows, numbers = np.nonzero(has_BC)
    ends_B = np.cumsum(np.bincount(rows, minlength=len(has_BC)))
    offsets = pa.array(
        np.concatenate([[0], ends_B]).astype(np.int32),
        mask=None if is_null_B is None else np.append(is_null_B, False),
    )
    return pa.ListArray.from_arrays(offsets, pa.array(classes, pa.string()).take(pa.array(numbers)))


def label_matrix(names_N: pa.ChunkedArray, classes: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Return which classes the lists of a column name, (N, C); none where it is null."""
    lists_N = names_N.combine_chunks()
    numbers = pc.index_in(lists_N.flatten(), value_set=pa.array(classes, pa.string()))
    has_NC = np.zeros((len(names_N), len(classes)), dtype=bool)
    has_NC[pc.list_parent_indices(lists_N).to_numpy(), numbers.to_numpy()] = True
    return has_NC


def logit_matrix(table: pa.Table) -> npt.NDArray[np.floating[Any]]:
    """Return the logits of a table, (N, C)."""
    logits: npt.NDArray[np.floating[Any]] = table["logits"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.array(logits).reshape(len(table), -1)


def collect(split: ImageSplit, classes: Sequence[str], thresholds: Sequence[float] | None) -> Predictions:
    """Begin to collect predictions; `thresholds` None: of one label an image."""
    return Predictions(split, classes) if thresholds is None else LabelSetPredictions(split, classes, thresholds)


def collect_of(split: ImageSplit, trained: TrainedModel) -> Predictions:
    """Begin to collect predictions of a model."""
    predictions = collect(split, trained.classes, trained.thresholds)
    predictions.calibration = trained.calibration
    return predictions
