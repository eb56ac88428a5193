"""Score a cross-validation: the answers of all folds together, each image by the models that were not fitted to it.

Promise: every image is in the predictions once a repeat, and all figures follow from them. An interval is over images
or groups, never over the scores of folds: these share most of what they were fitted to.

Shape letters: N images, R repeats, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tlscale.data.content import Digests
from tlscale.data.sources.folds import FOLDS, Fold
from tlscale.data.sources.open import ImageSplit
from tlscale.storage import faults
from tlscale.storage.files import naming_disk_errors, replacing
from tlscale.training.group_interval import interval_over_units
from tlscale.training.label_set_loss import binary_cross_entropy
from tlscale.training.label_set_metrics import LabelFigures, probabilities
from tlscale.training.label_set_predictions import label_matrix, logit_matrix
from tlscale.training.loss import cross_entropy
from tlscale.training.metrics import Tally, summary
from tlscale.training.prediction_figures import class_numbers, units_of
from tlscale.training.predictions import FORMAT, read_predictions

_CHUNK = 4096  # answers that are counted at once
_OF_A_FOLD = ("calibrated_probability",)


def join_predictions(files: Sequence[Path], folds: Sequence[Fold], pool: ImageSplit) -> pa.Table:
    """Return the predictions of all folds, with columns `fold` and `repeat`: repeat by repeat, in the order of `pool`.

    They are without what the temperatures of folds make of their probabilities: each fold has another one, and so it
    is with the thresholds of several labels, by which `labels` were given.

    Raises:
        RunFolderError: a file is damaged.
    """
    tables = []
    for file, fold in zip(files, folds, strict=True):
        table = read_predictions(file)
        table = table.drop_columns([name for name in _OF_A_FOLD if name in table.column_names])
        for name, value in (("fold", fold.number), ("repeat", fold.repeat)):
            table = table.append_column(name, pa.array(np.full(len(table), value, np.int64)))
        tables.append(table)
    whole = pa.concat_tables(tables)
    whole = whole.take(pa.array(np.lexsort((whole["row"].to_numpy(), whole["repeat"].to_numpy()))))
    expected_N = np.tile(pool.rows_N, folds[0].num_repeats)
    assert np.array_equal(whole["row"].to_numpy(), expected_N), "every image once a repeat"
    metadata = json.loads(whole.schema.metadata[b"tlscale"])
    about = {key: value for key, value in metadata.items() if key not in ("calibration", "thresholds")}
    about |= {"format": FORMAT, "split": FOLDS}
    return whole.replace_schema_metadata({"tlscale": json.dumps(about, ensure_ascii=False)})


def write_table(path: Path, table: pa.Table) -> None:
    """Write predictions, whole or not at all."""
    with naming_disk_errors(path), replacing(path) as aside:
        pq.write_table(table, aside, compression="zstd")
        faults.at("predictions")


def out_of_fold_figures(table: pa.Table, classes: Sequence[str], num_repeats: int) -> dict[str, Any]:
    """Compute all figures of predictions as `join_predictions` gives them.

    Shares are over all answers, and so are the counts of `confusion` and `num_without_answer`; images are counted once.
    """
    tally = Tally(len(classes), "cpu")
    for logits_BC, labels_B in _answers(table, classes):
        tally.update(logits_BC, labels_B, cross_entropy(logits_BC, labels_B))
    figures = summary(tally, classes)
    if num_repeats == 1 and "group" not in table.column_names:
        return figures
    figures["num_images"] //= num_repeats
    for row in figures["per_class"].values():
        row["num_images"] //= num_repeats
    return _over_units(figures, table, classes)


def label_set_figures(table: pa.Table, classes: Sequence[str], num_repeats: int) -> dict[str, Any]:
    """Compute the same of several labels an image: F1 is by the labels that each fold gave by its own thresholds."""
    logits_NC = torch.from_numpy(logit_matrix(table))
    labels_NC, given_NC = (label_matrix(table[name], classes) for name in ("true_labels", "labels"))
    losses_N = binary_cross_entropy(logits_NC, torch.from_numpy(labels_NC)).double().numpy()
    unit = "groups" if "group" in table.column_names else "images"
    stand_alone = unit == "images" and num_repeats == 1
    units_N = None if stand_alone else units_of(table, np.ones(len(table), dtype=bool))
    found = LabelFigures(probabilities(logits_NC).numpy(), labels_NC, losses_N, units_N, unit=unit)
    figures = found.summary(classes, None, given_NC)
    figures["num_images"] //= num_repeats
    for row in figures["per_class"].values():
        row["num_images"] //= num_repeats
    return figures


def count_copies_outside(table: pa.Table, digests_N: Digests, num_repeats: int) -> int:
    """Count the answers of `join_predictions` on images that another fold of the repeat has, too, byte for byte."""
    _, contents_N, sizes = np.unique(digests_N, return_inverse=True, return_counts=True)
    contents_N = contents_N.reshape(-1)
    folds_RN = table["fold"].to_numpy().reshape(num_repeats, -1)
    count = 0
    for folds_N in folds_RN:
        _, of_N, sizes_here = np.unique(
            np.stack([contents_N, folds_N]), axis=1, return_inverse=True, return_counts=True
        )
        count += int((sizes_here[of_N.reshape(-1)] < sizes[contents_N]).sum())
    return count


def _answers(table: pa.Table, classes: Sequence[str]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    labels_N = class_numbers(table["true_label"], classes)
    for start in range(0, len(table), _CHUNK):
        column = table["logits"].slice(start, _CHUNK).combine_chunks()
        logits_BC = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, len(classes))
        yield torch.tensor(logits_BC), torch.from_numpy(labels_N[start : start + _CHUNK])


def _over_units(figures: dict[str, Any], table: pa.Table, classes: Sequence[str]) -> dict[str, Any]:
    """Put intervals over groups, or over images with their answers of all repeats, in place of those over answers."""
    labels_N, answers_N = (class_numbers(table[name], classes) for name in ("true_label", "label"))
    units_N, is_hit_N = units_of(table, np.ones(len(table), dtype=bool)), labels_N == answers_N
    assert units_N is not None, "there is a column of repeats"
    per_class = {
        name: {
            **figures["per_class"][name],
            "accuracy_interval95": interval_over_units(units_N[labels_N == label], is_hit_N[labels_N == label]),
        }
        for label, name in enumerate(classes)
    }
    by = {"groups" if "group" in table.column_names else "images": len(np.unique(units_N))}
    whole = interval_over_units(units_N, is_hit_N)
    return {**figures, "top1_interval95": whole, "top1_interval95_by": by, "per_class": per_class}
