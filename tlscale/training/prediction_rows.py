"""Answer for images that somebody gives, and lay the answers out: one row an image.

| column | holds |
|---|---|
| `path` | as it was given or found; bytes of a name that are no UTF-8 are escaped |
| `label`, `probability` | the most likely class, and how likely; empty where there is no answer |
| `label_2`, `probability_2`, ... | the next ones, where more than one is wanted |
| `labels` | of a model of several labels in place of those: all that it has, joined by a bar; empty also where none |
| `set` | where the model has a calibration: classes joined by a bar, one of them the true one in 90 % of cases |
| `unknown` | where the model can tell: whether the image is unlike those of training |
| `p_<class>` | how likely each class is, where all are wanted, and for several labels |
| `error` | why there is no answer; else empty |

Promise: a text of others is a text in every reader. A bar within a joined name has a backslash before it. In CSV a cell
that begins with what a spreadsheet takes for a formula has an apostrophe before it, and one with a comma, a quote or a
line break is quoted.

Shapes: N images, C classes, K most likely of them, S image size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tlscale.codes.shards import BLOCK
from tlscale.data.given import Given, read_given
from tlscale.data.loader import stacked
from tlscale.data.sampler import Ints
from tlscale.data.sources.excluded import FORMULAS
from tlscale.data.sources.tables import Labels, joined_labels, label_text
from tlscale.distributed.processes import Processes
from tlscale.models.calibration import Calibration, LabelSets
from tlscale.training.label_set_metrics import labels_from, probabilities
from tlscale.training.predictions import NO_ANSWER, answers
from tlscale.training.run_path import FeaturesPath, RunPath

NO_NUMBER = "the network gives no number for it (NaN)"
Cell = str | float | bool | None
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Answers:
    """Hold what a network says of some images."""

    labels_N: Labels
    """Class numbers; `NO_ANSWER` where there are none. Of several labels which classes each has, bool (N, C)."""
    probabilities_NC: npt.NDArray[Any]
    """float32 or float64; NaN where there is no answer."""
    errors: list[str | None]
    scores_N: npt.NDArray[np.float64] | None = None
    """How unlike the training images each is; NaN where it cannot be read. None: the model does not tell."""

    def __len__(self) -> int:
        return len(self.errors)

    def ranked(self, top_k: int) -> Ints:
        """Return the classes of each image, (N, top_k), most likely first; of equal ones that of the lower number."""
        if top_k == 1:
            return self.labels_N[:, None]
        key_NC = np.nan_to_num(self.probabilities_NC)
        np.put_along_axis(key_NC, np.maximum(self.labels_N, 0)[:, None], np.inf, axis=1)  # the answer comes first
        return np.argsort(-key_NC, axis=1, kind="stable")[:, :top_k]

    def members(self, sets: LabelSets) -> Iterator[list[int]]:
        """Give the classes in the set of each image, most likely first; none where there is no answer."""
        members_NC = sets.members(self.probabilities_NC, self.labels_N)
        for label, members_C, shares_C in zip(self.labels_N.tolist(), members_NC, self.probabilities_NC, strict=True):
            others = np.flatnonzero(members_C)
            yield sorted(others.tolist(), key=lambda number: (number != label, -shares_C[number], number))


def answer(
    given: Sequence[Given],
    sizes: Sequence[int],
    path: RunPath,
    processes: Processes,
    on_images: Callable[[int], None] = lambda num_images: None,
) -> Answers:
    """Read and answer for a chunk of images, in batches of these sizes; those that cannot be read are passed over.

    `on_images` is called with a number of images when so many more are done.
    """
    errors: list[str | None] = []
    blocks = read_blocks(given, path, errors, on_images=on_images)
    outputs_BC, scores_B = path.outputs(blocks, sizes, processes)
    if path.thresholds is not None:
        return _label_sets(outputs_BC.cpu(), errors, path.thresholds, path.calibration)
    labels_N = np.full(len(given), NO_ANSWER, np.int64)
    logits_BC, labels_B, softmax_BC = answers(outputs_BC)
    calibrated_BC = softmax_BC if path.calibration is None else path.calibration.probabilities(logits_BC)
    probabilities_BC = calibrated_BC.cpu().numpy()
    sound_N = np.array([why is None for why in errors], dtype=bool)
    labels_N[sound_N] = labels_B.cpu().numpy()
    probabilities_NC = np.full((len(given), path.num_classes), np.nan, probabilities_BC.dtype)
    probabilities_NC[sound_N] = probabilities_BC
    for at in np.flatnonzero(sound_N & (labels_N == NO_ANSWER)).tolist():
        # Softmax was of other numbers than the network's own.
        errors[at], probabilities_NC[at] = NO_NUMBER, np.nan
    scores_N = None
    if scores_B is not None:
        scores_N = np.full(len(given), np.nan)
        scores_N[sound_N] = scores_B
    return Answers(labels_N, probabilities_NC, errors, scores_N)


def _label_sets(
    logits_BC: Tensor, errors: list[str | None], thresholds: Sequence[float], calibration: Calibration | None
) -> Answers:
    """Return the answers of several labels; the images that were read have logits.

    Thresholds are of the sigmoid of the logits, and what people read is with the temperature.
    """
    sound_N = np.array([why is None for why in errors], dtype=bool)
    shares_BC = probabilities(logits_BC)
    labels_NC = np.zeros((len(errors), len(thresholds)), dtype=bool)
    labels_NC[sound_N] = labels_from(shares_BC, thresholds).numpy()
    shares_NC = np.full(labels_NC.shape, np.nan)
    if calibration is not None:
        shares_BC = calibration.label_probabilities(logits_BC)
    shares_NC[sound_N] = shares_BC.numpy()
    for at in np.flatnonzero(sound_N & np.isnan(shares_NC).any(axis=1)).tolist():
        errors[at] = NO_NUMBER
    return Answers(labels_NC, shares_NC, errors)


def read_blocks(
    given: Sequence[Given],
    path: RunPath | FeaturesPath,
    errors: list[str | None],
    *,
    block: int = BLOCK,
    on_images: Callable[[int], None] = lambda num_images: None,
) -> Iterator[Tensor]:
    """Read images in blocks, the next one while this one is worked on; `errors` takes why each cannot be read, or None.

    `on_images` is called with a number of images when so many more are done.
    """
    pieces = [given[start : start + block] for start in range(0, len(given), block)]
    for pixels_B, why_B in _ahead(
        lambda piece: read_given(piece, path.spec, path.facts.max_pixels, path.places), pieces
    ):
        errors.extend(why_B)
        if pixels_B:
            yield torch.from_numpy(stacked(pixels_B))
        on_images(len(why_B))


def _ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Map in order, the next one in a thread while this one is worked on."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            coming = pool.submit(function, item)
            if waiting is not None:
                yield waiting.result()
            waiting = coming
        if waiting is not None:
            yield waiting.result()


# -- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """Choose the columns of predictions."""

    classes: tuple[str, ...]
    top_k: int = 1
    all_probabilities: bool = False
    sets: LabelSets | None = None
    unknown_from: float | None = None
    """Images with a higher score are unknown; None: the model does not tell."""
    several: bool = False
    """Of a model of several labels: the labels, and the probabilities of all classes."""

    @property
    def names(self) -> list[str]:
        """Return their names, in order."""
        if self.several:
            return ["path", "labels", *(f"p_{name}" for name in self.classes), "error"]
        more = [f"{name}_{place}" for place in range(2, self.top_k + 1) for name in ("label", "probability")]
        each = [f"p_{name}" for name in self.classes] if self.all_probabilities else []
        sets, unknown = ["set"] if self.sets else [], ["unknown"] if self.unknown_from is not None else []
        return ["path", "label", "probability", *more, *sets, *unknown, *each, "error"]

    def rows(self, paths: Sequence[str], answers: Answers) -> Iterator[list[Cell]]:
        """Give the cells of each image, in the order of the names; None for what is empty."""
        if self.several:
            yield from self._rows_of_several(paths, answers)
            return
        ranked_NK = answers.ranked(self.top_k)
        best_NK = np.take_along_axis(answers.probabilities_NC, np.maximum(ranked_NK, 0), axis=1)
        every_NC = answers.probabilities_NC if self.all_probabilities else best_NK[:, :0]
        tables = (ranked_NK.tolist(), *(table.astype(np.float64).tolist() for table in (best_NK, every_NC)))
        sets: Iterable[list[int]] = repeat([], len(answers)) if self.sets is None else answers.members(self.sets)
        unknown_N = self.unknown(answers)
        for path, why, members, unknown, labels, best, every in zip(
            paths, answers.errors, sets, unknown_N, *tables, strict=True
        ):
            row: list[Cell] = [path]
            for label, probability in zip(labels, best, strict=True):
                row += [None, None] if why is not None else [self.classes[label], probability]
            if self.sets is not None:
                row.append(None if why is not None else joined_labels(self.classes[number] for number in members))
            if self.unknown_from is not None:
                row.append(unknown)
            yield [*row, *(each if why is None else None for each in every), why]

    def _rows_of_several(self, paths: Sequence[str], answers: Answers) -> Iterator[list[Cell]]:
        for path, why, labels_C, shares_C in zip(
            paths, answers.errors, answers.labels_N, answers.probabilities_NC.tolist(), strict=True
        ):
            own = [label_text(labels_C, self.classes), *shares_C] if why is None else [None] * (1 + len(shares_C))
            yield [path, *own, why]

    def unknown(self, answers: Answers) -> list[bool | None]:
        """Tell which images are unlike those of training; None where an image cannot be read, or of a model without."""
        if self.unknown_from is None or answers.scores_N is None:
            return [None] * len(answers)
        is_unknown_N = (answers.scores_N > self.unknown_from).tolist()
        return [None if why is not None else one for one, why in zip(is_unknown_N, answers.errors, strict=True)]


def csv_line(cells: Iterable[Cell]) -> str:
    """Write a row as CSV."""
    return ",".join(map(csv_cell, cells)) + "\n"


def csv_cell(cell: Cell) -> str:
    """Write a cell as CSV that no spreadsheet runs."""
    if isinstance(cell, bool):
        return str(cell).lower()
    if not isinstance(cell, str):
        return "" if cell is None else repr(cell)
    text = f"'{cell}" if cell.startswith(FORMULAS) else cell
    if any(mark in text for mark in ',"\r\n'):
        return '"' + text.replace('"', '""') + '"'
    return text


def json_line(names: Sequence[str], cells: Sequence[Cell]) -> str:
    """Write a row as a JSON object."""
    return json.dumps(dict(zip(names, cells, strict=True)), ensure_ascii=False, allow_nan=False) + "\n"
