"""Choose what a run uses of a source: one class list, a stratified limit, a stratified hold-out.

Promise: every choice is a pure function of (seed, labels), as that of `stratified_draws` and `grouped_draws`.

Shape letters: N images or rows, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from tlscale.data.sources.folds import DrawnFolds, Fold, hold_fold, hold_none, pool_splits
from tlscale.data.sources.groups import GroupedDraw, Groups, check_groups, describe_groups, notes_on_groups
from tlscale.data.sources.label_kinds import are_numbers, separator_of
from tlscale.data.sources.label_set_draws import LabelSetDraw
from tlscale.data.sources.labels import REGRESSION, check_alike, is_integer, missing_labels, sort_labels
from tlscale.data.sources.same_files import check_files
from tlscale.data.sources.stratified_draws import holdout_of_files, stratified_holdout, stratified_subset
from tlscale.data.sources.tables import (
    NO_LABEL,
    ImageSplit,
    Ints,
    LabelledTable,
    Labels,
    Role,
    Source,
    SourceSplit,
    class_counts,
    has_several,
)
from tlscale.errors import DataError, counted, first_few, quoted, suggestion
from tlscale.recipe.schema import DataSection
from tlscale.recipe.seeds import derive_seed
from tlscale.recipe.sources import SOURCES

_FEW_CLASSES = 10
_DEFAULT_FRACTION = DataSection.model_fields["validation_fraction"].default


@dataclass(frozen=True)
class Chosen:
    """The splits of a run."""

    classes: tuple[str, ...]
    tables: Mapping[Role, LabelledTable]
    """Whole splits of the source."""
    splits: Mapping[Role, ImageSplit]
    notes: tuple[str, ...]
    groups: Groups | None = None
    folds: DrawnFolds | None = None
    """Of the pooled images, where no fold of them is held out."""


@dataclass(frozen=True)
class Numbered:
    """A source whose labels have numbers, before anything is chosen from it."""

    place: str
    classes: tuple[str, ...]
    tables: Mapping[Role, LabelledTable]
    files: Mapping[Role, Ints | None]
    """`SourceSplit.files_N` of each."""
    notes: tuple[str, ...]


def number_source(section: DataSection, source: Source, *, is_new: bool = True) -> Numbered:
    """Give the classes numbers.

    Args:
        is_new: the run begins now; one that began before goes on with the labels that it has.

    Raises:
        DataError: labels outside the classes, fewer than two classes, or labels that look like no classes.
    """
    labelled, notes = _with_labels(source)
    used = labelled["train"].used_names()
    if len(used) < 2:
        raise DataError(
            f"{source.place}: the training split has one class only, {used[0]!r}; a classifier needs two or more"
        )
    classes = tuple(section.classes or source.declared_classes or sort_labels(used))
    if is_new and section.task is None and section.classes is None and source.declared_classes is None:
        _refuse_other_tasks(section, labelled["train"], source.place)
    tables = {
        role: number_labels(split, classes, role, source.place)
        for role, split in name_labels(labelled, classes).items()
    }
    files = {role: split.files_N for role, split in labelled.items()}
    return Numbered(source.place, classes, tables, files, notes)


def choose_splits(
    section: DataSection,
    source: Numbered,
    seed: int,
    bad: Mapping[Role, Sequence[int]] | None = None,
    *,
    contents: Mapping[Role, Ints] | None = None,
    fold: Fold | None = None,
) -> Chosen:
    """Limit the training images, hold out a validation split.

    Args:
        bad: rows of the source's splits that are skipped: to what is drawn they are not there.
        contents: numbers of the rows of train and validation that are equal for images that are not to be divided; by
            default those of their files.
        fold: the part of a cross-validation: its held images are the test split, and images of train and validation
            are pooled.

    Raises:
        DataError: a group in two splits, or a limit or hold-out that is not possible.
    """
    classes, tables, notes = source.classes, source.tables, source.notes
    files = {**source.files, **(contents or {})}
    good = {role: _good_rows(table, role, (bad or {}).get(role, ())) for role, table in tables.items()}
    pooled = fold is not None
    notes += tuple(check_files(tables, source.files, good, classes, source.place, pooled=pooled))
    notes += _absences(classes, tables, good)
    notes += () if section.classes else _missing(classes)
    notes += _few_images(classes, len(good["train"]))
    shared = check_groups(section, tables, good, source.place, pooled=pooled)
    splits = {role: ImageSplit(role, table, good[role]) for role, table in tables.items()}
    draws = _draw(tables["train"], files["train"], good["train"])
    splits["train"], limited = _limit_train(section, splits["train"], draws, seed)
    folds = None
    if fold is None:
        divided, drawn = _divide_train(section, splits, draws, classes, seed)
    elif fold.number is None:
        divided, folds = hold_none(splits, files, fold, seed)
        drawn = [folds.describe(fold.num_folds)]
    else:
        divided, drawn = _divide_pool(section, splits, files, fold, classes, seed)
    draw = "validation" in divided.keys() - tables.keys() or section.train_limit is not None or pooled
    groups = describe_groups(section, tables, good, shared, draw=draw)
    notes += () if groups is None else tuple(notes_on_groups(groups, good, section.groups_across_splits))
    return Chosen(classes, tables, divided, (*notes, *limited, *drawn), groups, folds)


def _with_labels(source: Source) -> tuple[dict[Role, SourceSplit], tuple[str, ...]]:
    """Return the splits that are usable; a test split whose labels are withheld (hub contests do that) is not."""
    kept: dict[Role, SourceSplit] = {}
    notes: tuple[str, ...] = ()
    for role, split in source.splits.items():
        if not len(split.label_ids_N):
            raise DataError(f"{source.place}: the {role} split {split.name!r} has no images")
        without_N = np.flatnonzero(split.unlabelled_N)
        if role == "test" and len(without_N) == len(split.label_ids_N):
            notes = (f"{source.place}: the test split {split.name!r} is not used: its labels are withheld",)
            continue
        if len(without_N):
            raise DataError(
                f"{source.place}: {len(without_N):,} of {len(split.label_ids_N):,} images of the {role} split have no "
                f"label, the first is {split.store.where(int(without_N[0]))}"
            )
        kept[role] = split
    return kept, notes


def _refuse_other_tasks(section: DataSection, train: SourceSplit, place: str) -> None:
    """Refuse labels of a column that look like no classes.

    Raises:
        DataError: they look like several labels an image, or like numbers.
    """
    if "task" not in SOURCES[section.source].keys:
        return
    counts = train.counts()
    as_classes = "Where they are classes all the same, write data.task: single_label"
    if (separator := separator_of(counts)) is not None:
        joined = [name for name in counts if separator in name]
        raise DataError(
            f"{place}: labels look like several an image, with {separator!r} between them: {first_few(quoted(joined))}",
            remedy=f"If so, write data.task: multi_label and data.label_separator: '{separator}'. {as_classes}",
        )
    if are_numbers(counts, section.label_column):
        raise DataError(
            f"{place}: labels look like numbers, of which there are {len(counts):,}: {first_few(quoted(list(counts)))}",
            remedy=f"{REGRESSION}. {as_classes}",
        )


def name_labels(splits: Mapping[Role, SourceSplit], classes: tuple[str, ...]) -> dict[Role, SourceSplit]:
    """Give the splits labels that are class names: integers count from 0 where `classes` gives them names."""
    used = {name for split in splits.values() for name in split.used_names()}
    if used & set(classes) or not all(is_integer(name) for name in used):
        return dict(splits)
    named = {str(i): name for i, name in enumerate(classes)}
    return {
        role: replace(s, label_names=tuple(named.get(name, name) for name in s.label_names))
        for role, s in splits.items()
    }


def number_labels(split: SourceSplit, classes: tuple[str, ...], role: Role, place: str) -> LabelledTable:
    """Give the labels of a split numbers by their place in `classes`.

    Raises:
        DataError: labels that are no class, or alike.
    """
    check_alike([*classes, *split.used_names()], place)
    number = {name: i for i, name in enumerate(classes)}
    outside = [name for name in split.used_names() if name not in number]
    if outside:
        label_id = split.label_names.index(outside[0])
        several = has_several(split.label_ids_N)
        has_N = split.label_ids_N[:, label_id] if several else split.label_ids_N == label_id
        first = split.store.where(int(np.flatnonzero(has_N)[0]))
        raise DataError(
            f"{place}: labels of the {role} split that are no class: {first_few(quoted(outside))} (first at {first}); "
            f"the {len(classes)} classes are {first_few(quoted(classes), 10)}",
            remedy=suggestion(outside[0], classes) or None,
        )
    numbers_K = np.array([number.get(name, NO_LABEL) for name in split.label_names], dtype=np.int64)
    if not has_several(split.label_ids_N):
        return LabelledTable(split.store, numbers_K[split.label_ids_N], split.groups_N)
    labels_NC = np.zeros((len(split.label_ids_N), len(classes)), dtype=bool)
    known_K = numbers_K != NO_LABEL
    labels_NC[:, numbers_K[known_K]] = split.label_ids_N[:, known_K]
    return LabelledTable(split.store, labels_NC, split.groups_N)


def _good_rows(table: LabelledTable, role: Role, bad: Sequence[int]) -> Ints:
    rows_N = np.delete(np.arange(len(table), dtype=np.int64), np.array(bad, dtype=np.int64))
    if not len(rows_N):
        raise DataError(f"all {len(table):,} images of the {role} split are bad; the first is {table.where(0)}")
    return rows_N


def _absences(
    classes: tuple[str, ...], tables: Mapping[Role, LabelledTable], good: Mapping[Role, Ints]
) -> tuple[str, ...]:
    notes = []
    for role, table in tables.items():
        counts_C = class_counts(table.labels_N[good[role]], len(classes))
        absent = [classes[i] for i in np.flatnonzero(counts_C == 0)]
        if absent:
            notes.append(f"{role}: no images of {len(absent)} of {len(classes)} classes: {first_few(quoted(absent))}")
        if has_several(table.labels_N) and (count := int((~table.labels_N[good[role]].any(axis=1)).sum())):
            notes.append(f"{role}: {count:,} of {len(good[role]):,} images have none of the labels")
    return tuple(notes)


def _missing(classes: Sequence[str]) -> tuple[str, ...]:
    """Return a note where a class is called as if its label were missing."""
    missing = missing_labels(classes)
    if not missing:
        return ()
    what = (
        f"MISSING LABELS? {first_few(quoted(missing))} is a class here, and what programs write where nothing is known"
    )
    return (f"{what}. Take such rows out, or name the classes (data.classes)",)


def _few_images(classes: Sequence[str], num_images: int) -> tuple[str, ...]:
    """Return a note where classes are nearly as many as the images to learn them from."""
    if len(classes) <= _FEW_CLASSES or num_images >= 2 * len(classes):
        return ()
    what = f"MANY CLASSES: {len(classes):,} of them, and {num_images:,} training images"
    return (f"{what}: few can be learned from one or two images each. Are the labels classes?",)


Draw: TypeAlias = "_ImageDraw | GroupedDraw | LabelSetDraw"


def _draw(table: LabelledTable, files_N: Ints | None, rows_N: Ints) -> Draw:
    """Return how images of a table are drawn, of which there are these rows."""
    if table.groups_N is not None:
        return GroupedDraw(table, files_N, rows_N)
    return (LabelSetDraw if has_several(table.labels_N) else _ImageDraw)(table.labels_N, files_N)


def _limit_train(section: DataSection, train: ImageSplit, draw: Draw, seed: int) -> tuple[ImageSplit, list[str]]:
    """Return the training images that the recipe takes, and a note on a limit."""
    if section.train_limit is None:
        return train, []
    _check_limit(section.train_limit, train.labels_N)
    kept = draw.subset(train.rows_N, section.train_limit, derive_seed(seed, "data", "train_limit"))
    note = f"train: {len(kept):,} of {len(train):,} images, stratified (data.train_limit)"
    return ImageSplit("train", train.table, train.rows_N[kept]), [note]


def _divide_train(
    section: DataSection,
    splits: Mapping[Role, ImageSplit],
    draw: Draw,
    classes: tuple[str, ...],
    seed: int,
) -> tuple[dict[Role, ImageSplit], list[str]]:
    """Hold a validation split out of train, where the source has none; with notes on it."""
    fraction = section.validation_fraction
    if "validation" in splits:
        if fraction not in (0.0, _DEFAULT_FRACTION):
            raise DataError(
                f"{fraction} has no effect, as the source has a validation split",
                remedy="Take it out",
                key="data.validation_fraction",
            )
        return dict(splits), []
    if fraction == 0.0:
        return dict(splits), ["no validation split, and none is held out (data.validation_fraction: 0)"]
    return _hold_out(section, splits, draw, classes, derive_seed(seed, "data", "validation"))


def _divide_pool(
    section: DataSection,
    splits: Mapping[Role, ImageSplit],
    files: Mapping[Role, Ints | None],
    fold: Fold,
    classes: tuple[str, ...],
    seed: int,
) -> tuple[dict[Role, ImageSplit], list[str]]:
    """Pool train and validation, hold a fold out as the test split, and within the rest a validation split."""
    pool, files_N = pool_splits(splits, files)
    train, held = hold_fold(pool, files_N, fold, seed)
    divided: dict[Role, ImageSplit] = {"train": train, "test": held}
    note = f"test: {len(held):,} images, held out as fold {fold} (evaluate.folds)"
    if section.validation_fraction == 0.0:
        return divided, [note, "no validation split is held out within the fold (data.validation_fraction: 0)"]
    draw = _draw(train.table, files_N, train.rows_N)
    assert fold.number is not None, "a fold is held out"
    inner_seed = derive_seed(seed, "data", "folds", "validation", fold.number)
    divided, notes = _hold_out(section, divided, draw, classes, inner_seed)
    return divided, [note, *notes]


def _hold_out(
    section: DataSection,
    splits: Mapping[Role, ImageSplit],
    draw: Draw,
    classes: tuple[str, ...],
    seed: int,
) -> tuple[dict[Role, ImageSplit], list[str]]:
    table, rows_N = splits["train"].table, splits["train"].rows_N
    held = draw.holdout(rows_N, section.validation_fraction, seed)
    if not len(held) and section.train_limit is not None and draw.unit == "group":
        raise DataError(
            f"none of {len(rows_N):,} images can be held out: groups that the limit cuts, and the only one of a class, "
            "stay in train",
            key="data.train_limit",
            remedy="Set a higher one, bring a validation split, or set data.validation_fraction: 0",
        )
    if not len(held):
        raise DataError(
            f"no validation split, and none can be held out: each class has one training {draw.unit}",
            remedy="Bring a validation split, more images, or set data.validation_fraction: 0",
        )
    held_N = rows_N[held]
    of = "" if draw.unit == "image" else f" in {counted(draw.num_units(held_N), draw.unit)}"
    notes = [f"validation: {len(held_N):,} images{of} held out of train, stratified (data.validation_fraction)"]
    single = [classes[i] for i in draw.classes_of_one(rows_N)]
    if single:
        notes.append(f"validation: none of {first_few(quoted(single))}, whose only training {draw.unit} stays in train")
    train = ImageSplit("train", table, np.delete(rows_N, held))
    return {**splits, "train": train, "validation": ImageSplit("validation", table, held_N)}, notes


@dataclass(frozen=True, eq=False)
class _ImageDraw:
    """Draw images; those of a file stay together. `GroupedDraw` and `LabelSetDraw` are the other ways."""

    labels_N: Ints
    files_N: Ints | None
    unit = "image"

    def subset(self, rows_N: Ints, count: int, seed: int) -> Ints:
        return stratified_subset(self.labels_N[rows_N], rows_N, count, seed, keep_all_classes=True)

    def holdout(self, rows_N: Ints, fraction: float, seed: int) -> Ints:
        def drawn(at: Ints) -> Ints:
            return stratified_holdout(self.labels_N[rows_N[at]], rows_N[at], fraction, seed)

        return holdout_of_files(self.files_N, rows_N, drawn)

    def num_units(self, rows_N: Ints) -> int:
        return len(rows_N)

    def classes_of_one(self, rows_N: Ints) -> list[int]:
        """Return the classes of which there is one image."""
        return [int(label) for label in np.flatnonzero(np.bincount(self.labels_N[rows_N]) == 1)]


def _check_limit(limit: int, labels_N: Labels) -> None:
    several = has_several(labels_N)
    num_classes = int(labels_N.any(axis=0).sum()) if several else len(np.unique(labels_N))
    if limit > len(labels_N):
        raise DataError(
            f"{limit:,} is more than the {len(labels_N):,} training images there are", key="data.train_limit"
        )
    if limit < num_classes:
        raise DataError(
            f"{limit:,} is less than one image for each of the {num_classes:,} classes", key="data.train_limit"
        )
