"""Tell of images that are in two splits, or under two labels, byte for byte, whatever their names are.

Shape letters: N rows of pooled images.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from tlscale.data.sources.duplicates import Shared, find_shared
from tlscale.data.sources.labelled import own_images
from tlscale.data.sources.open import ImageData
from tlscale.data.sources.tables import label_numbers, label_text
from tlscale.training.predictions import image_names

_MOST_EXAMPLES = 5


def shared_images(data: ImageData) -> tuple[list[dict[str, Any]], list[str]]:
    """Return images that are in two splits, as `result.json` has them, and notes on them for people.

    It is for the end of a run: nothing is read for it, and what the run did not see is not compared.
    """
    plain, notes = [], []
    for shared in find_shared(data.splits):
        count, examples = len(shared.positions_M), _examples(shared)
        plain.append({"splits": [shared.one.name, shared.other.name], "num_images": count, "examples": examples})
        if shared.one is (data.test or data.validation):
            word, effect = "LEAK", f"figures on {shared.one.name} are too good"
        else:
            word, effect = "DUPLICATES", "they chose what was trained on them"
        notes.append(
            f"{word}: {count:,} of {len(shared.one):,} images of {shared.one.name} are, byte for byte, in "
            f"{shared.other.name} too: {effect} (such as {' = '.join(examples[0])})"
        )
    return plain, notes


def count_copies_in_folds(whole: ImageData, parts: Iterable[ImageData], *, refits: bool) -> int:
    """Count the answers that a cross-validation will give on images that their fold's model is fitted to, too.

    Args:
        whole: all its images, whose contents are known.
        parts: the images of each fold, with those that it holds as test.
        refits: the model is fitted to validation images as well.
    """
    digests_N = whole.train.table.noted_digests(np.arange(len(whole.train.table)))[0]
    count = 0
    for part in parts:
        assert part.test is not None, "a fold is held out"
        fitted = np.concatenate([split.rows_N for split in own_images(part, refitted=refits)])
        count += int(np.isin(digests_N[part.test.rows_N], digests_N[fitted]).sum())
    return count


def note_on_folds(count: int) -> list[str]:
    """Say how many answers are on images that are, byte for byte, in what their fold's model is fitted to."""
    if not count:
        return []
    return [
        f"LEAK: {count:,} answers are on images that are, byte for byte, among those that their fold's model was "
        "fitted to: figures are too good (data.duplicates: drop keeps equal images in one fold)"
    ]


def clashing_labels(data: ImageData) -> list[str]:
    """Return a note where images of any splits are equal and have different labels; else nothing.

    As `shared_images` it compares what was read, and reads nothing for it.
    """
    splits = list(data.splits.values())
    digests_N, known_N = (np.concatenate(parts) for parts in zip(*(one.noted_digests() for one in splits), strict=True))
    labels_N = label_numbers(np.concatenate([split.labels_N for split in splits]))
    known = np.flatnonzero(known_N)
    _, of_image = np.unique(digests_N[known], return_inverse=True)
    of_image = of_image.reshape(-1)
    least, most = np.full(len(known), np.iinfo(np.int64).max), np.full(len(known), -1)
    np.minimum.at(least, of_image, labels_N[known])
    np.maximum.at(most, of_image, labels_N[known])
    clashing = (least < most)[of_image]
    if not clashing.any():
        return []
    first = int(np.argmax(clashing))
    other = int(np.flatnonzero((of_image == of_image[first]) & (labels_N[known] != labels_N[known[first]]))[0])
    ends = np.cumsum([len(split) for split in splits])
    told = []
    for row in (int(known[first]), int(known[other])):
        split = splits[int(np.searchsorted(ends, row, side="right"))]
        at = row - int(ends[splits.index(split)]) + len(split)
        told.append(f"{image_names(split, np.array([at]))[0]} is {label_text(split.labels_N[at], data.classes)!r}")
    pair = " and ".join(told)
    return [
        f"LABELS: {int(clashing.sum()):,} of {len(labels_N):,} images are, byte for byte, there under another label "
        f"too, and one label at most is right: {pair} (data.duplicates: drop leaves them out)"
    ]


def _examples(shared: Shared) -> list[list[str]]:
    some = slice(0, _MOST_EXAMPLES)
    names = image_names(shared.one, shared.positions_M[some]), image_names(shared.other, shared.others_M[some])
    return [[one, other] for one, other in zip(*names, strict=True)]
