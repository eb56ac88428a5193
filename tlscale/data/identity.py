"""Identify the images of a run: the rows that it uses, and the rows that it scores.

Promise: two digests. Equal digests mean the same splits, row by row and in order, with the same labels and the same
images. An image is its content where that is known of all of them; else its name and its size. So copies of files with
new times are the same data, other pixels under equal names are not, and neither is another choice of rows. Where groups
decide which rows are drawn, they belong to what is used.

Shape letters: N images of a split.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tlscale.data.content import digest_of_parts
from tlscale.data.sources.open import ImageData
from tlscale.data.sources.tables import ImageSplit

By = Literal["content", "place"]


@dataclass(frozen=True)
class Identity:
    """The identity of some splits."""

    sha256: str
    by: By
    """What stands for an image in it."""


def used_identity(data: ImageData, by: By | None = None, *, without: Collection[tuple[str, int]] = ()) -> Identity:
    """Return the identity of the rows that a run trains on and chooses by.

    Args:
        by: what stands for an image; `content` reads what is not known. None: content where it is known of all.
        without: images, each as its split and its position there, that count as rows with a label alone.

    Raises:
        DataError: an image cannot be read.
    """
    splits = [split for split in (data.train, data.validation) if split is not None]
    decide = data.groups is not None and data.groups.draw
    return _identity(data.classes, splits, by, without, with_groups=decide)


def scored_identity(data: ImageData, by: By | None = None) -> Identity:
    """Return the identity of the rows that the figures of a run are of: those of test, else of validation.

    Of a cross-validation, whose folds are scored, those of train. Arguments and errors are those of `used_identity`.
    """
    return _identity(data.classes, [data.test or data.validation or data.train], by)


def result_identity(data: ImageData) -> dict[str, Any]:
    """Return both for `result.json`, that of the scored rows by content: they were all read, and reports compare it."""
    return _figures(used_identity(data), scored_identity(data, "content"))


def folds_identity(data: ImageData) -> dict[str, Any]:
    """Return both for `result.json` of a cross-validation, which scores the images that it trains on."""
    scored = _identity(data.classes, [data.train], "content")  # first: then the contents are known for the other, too
    return _figures(used_identity(data), scored)


def run_identity(data: ImageData) -> dict[str, Any]:
    """Return both for `run.json`."""
    return _figures(used_identity(data), scored_identity(data))


def _figures(used: Identity, scored: Identity) -> dict[str, Any]:
    return {
        "used_sha256": used.sha256,
        "used_by": used.by,
        "scored_sha256": scored.sha256,
        "scored_by": scored.by,
    }


def _identity(
    classes: Sequence[str],
    splits: Sequence[ImageSplit],
    by: By | None,
    without: Collection[tuple[str, int]] = (),
    *,
    with_groups: bool = False,
) -> Identity:
    if by is None:
        by = "content" if all(split.known_digests()[1].all() for split in splits) else "place"
    parts: list[bytes | str] = [by, str(len(classes)), *classes]
    for split in splits:
        split.table.remember()  # what the run has read by now
        parts += [split.name, str(len(split)), split.labels_N.astype("<i8").tobytes()]
        if with_groups and split.groups_N is not None:
            parts.append("\0".join("" if name is None else f"+{name}" for name in split.groups_N.to_pylist()))
        parts += _images(split, by, [position for name, position in without if name == split.name])
    return Identity(digest_of_parts(parts), by)


def _images(split: ImageSplit, by: By, without: Sequence[int]) -> Iterable[bytes | str]:
    if by == "content":
        digests_N = split.digests().copy()
        digests_N[list(without)] = b""
        return [digests_N.tobytes()]
    places = split.places()
    for position in without:
        places[position] = ""
    return places
