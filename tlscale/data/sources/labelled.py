"""Open labelled images that are only scored: a test split, or else every image with a label.

Promise: nothing is held out and nothing is limited; labels are matched with the classes of the model by name, and one
that the model does not know is an error. How many of the images a run was trained on is counted by content.

Shape letters: N images of a split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tlscale.data.sources.joined import join_tables
from tlscale.data.sources.labels import is_integer
from tlscale.data.sources.open import ImageData, read_source
from tlscale.data.sources.split_names import ScoredSection
from tlscale.data.sources.splits import name_labels, number_labels
from tlscale.data.sources.tables import ImageSplit, LabelledTable, Role, Source, SourceSplit
from tlscale.errors import DataError
from tlscale.recipe.schema import DataSection


@dataclass(frozen=True)
class Labelled:
    """The images to score."""

    split: ImageSplit
    of: str
    """`test`, `train` or `validation`: that split; `all`: every labelled image of the source."""
    place: str
    """Where the source was found."""
    notes: tuple[str, ...]


def open_labelled(
    section: DataSection, classes: Sequence[str], *, name: Role | None = None, named: Sequence[Role] = ()
) -> Labelled:
    """Find labelled images to score a model on.

    Args:
        section: where they are; its limit, hold-out and classes have no effect.
        name: the split; None: the test split where there is one, else all labelled images.
        named: splits that the user named, which have to be there.

    Raises:
        DataError: missing or wrong, no such split, or labels that are no class of the model.
    """
    source = read_source(ScoredSection.model_construct(**dict(section)))
    for role in named:
        if role not in source.splits:
            raise DataError(
                f"{source.place} has no split {getattr(section, f'{role}_split')!r}; its splits are: "
                f"{', '.join(split.name for split in source.splits.values())}",
                key=f"data.{role}_split",
            )
    labelled, notes = _with_labels(source)
    wanted = _wanted(labelled, name, source.place)
    named_splits = name_labels({role: labelled[role] for role in wanted}, tuple(classes))
    tables = [number_labels(split, tuple(classes), role, source.place) for role, split in named_splits.items()]
    split = _joined(wanted[0], tables, [labelled[role] for role in wanted])
    notes = [*source.notes, *notes]
    used = {name for role in wanted for name in labelled[role].used_names()}
    if all(map(is_integer, used)) and not used & set(classes):
        notes.append(f"labels are numbers, and taken as places in the model's list of classes: 0 is {classes[0]!r}")
    return Labelled(split, wanted[0] if name or wanted == ["test"] else "all", source.place, tuple(notes))


def _with_labels(source: Source) -> tuple[dict[Role, SourceSplit], list[str]]:
    """Return the splits with any label; `_joined` drops their rows without one."""
    kept: dict[Role, SourceSplit] = {}
    notes = []
    for role, split in source.splits.items():
        num_without = int(np.count_nonzero(split.unlabelled_N))
        if num_without < len(split.label_ids_N):
            kept[role] = split
        if num_without:
            notes.append(
                f"{source.place}: {num_without:,} of {len(split.label_ids_N):,} images of the split {split.name!r} "
                "are not used: they have no label"
            )
    if not kept:
        raise DataError(f"{source.place}: no image has a label, so nothing can be scored")
    return kept, notes


def _wanted(labelled: dict[Role, SourceSplit], name: Role | None, place: str) -> list[Role]:
    if name is not None:
        if name not in labelled:
            raise DataError(f"{place} has no split '{name}' with labels; there are: {', '.join(labelled)}")
        return [name]
    return ["test"] if "test" in labelled else list(labelled)


def _joined(name: Role, tables: Sequence[LabelledTable], splits: Sequence[SourceSplit]) -> ImageSplit:
    """Make one split of the labelled rows of all tables."""
    unlabelled_N = np.concatenate([split.unlabelled_N for split in splits])
    return ImageSplit(name, join_tables(tables), np.flatnonzero(~unlabelled_N).astype(np.int64))


def are_shared(scored: ImageSplit, other: ImageSplit, *, reads: bool = True) -> npt.NDArray[np.bool_]:
    """Tell which of the images of `scored` are in `other` too, by content.

    Args:
        reads: read what no earlier run has read; of `other` only where one of `scored` has the size of the file.
            Else only contents that are known, or in memory, are compared.

    Raises:
        DataError: an image is not there.
    """
    wanted_K = None
    if reads:
        scored.digests()
        sizes = {_size(scored, i) for i in range(len(scored))}
        sizes_K = [_file_size(other, i) for i in range(len(other))]
        wanted_K = np.array([size is None or size in sizes for size in sizes_K], dtype=bool)
        other.digests(wanted_K)
    digests_N, known_N = scored.known_digests()
    others_K, others_known_K = other.known_digests()
    shared_N: npt.NDArray[np.bool_] = known_N & np.isin(digests_N, others_K[others_known_K])
    return shared_N


def _size(split: ImageSplit, i: int) -> int:
    size = _file_size(split, i)
    if size is not None:
        return size
    raw = split.read(i)
    return len(raw) if isinstance(raw, bytes) else raw.nbytes


def _file_size(split: ImageSplit, i: int) -> int | None:
    """Return the bytes of the file of an image; None where it is not a file of its own."""
    path = split.file_of(i)
    if path is None:
        return None
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def own_images(data: ImageData, *, refitted: bool) -> list[ImageSplit]:
    """Return the images that a run was trained on: of training, and of validation where a probe was refitted."""
    splits = [data.train]
    if refitted and data.validation is not None:
        splits.append(data.validation)
    return splits
