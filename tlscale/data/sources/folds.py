"""Draw the folds of cross-validation: each image is held once a repeat, no group is cut, classes keep their shares.

Promise: that of `grouped_draws`, with and without groups. Repeats are draws of their own.

Shape letters: N rows, R repeats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from tlscale.data.sources.grouped_draws import grouped_folds, num_units_by_class
from tlscale.data.sources.groups import units_of
from tlscale.data.sources.joined import join_files, join_tables
from tlscale.data.sources.tables import ImageSplit, Ints, LabelledTable, Role, has_several
from tlscale.errors import DataError
from tlscale.recipe.seeds import derive_seed

FOLDS = "folds"
"""As the split of a score: images of train, each by a model that was not fitted to it."""

ABOUT_FOLDS = (
    "this model was fitted to all images of the folds; the run's score is of the models of the folds, each on images "
    "that it was not fitted to"
)


@dataclass(frozen=True)
class Fold:
    """A part of a cross-validation: the images that one of its models is not fitted to."""

    num_folds: int
    num_repeats: int
    number: int | None
    """From 1, over the folds of all repeats, repeat after repeat; None: all images are fitted to, none is held out."""

    @property
    def holds_none(self) -> bool:
        return self.number is None

    @property
    def repeat(self) -> int:
        """Return the number of its repeat, from 1."""
        return self._at // self.num_folds + 1

    @property
    def place(self) -> int:
        """Return its place among the folds of its repeat, from 0."""
        return self._at % self.num_folds

    @property
    def _at(self) -> int:
        assert self.number is not None, "all images are in no fold"
        return self.number - 1

    @property
    def folds(self) -> list[Fold]:
        """Return all folds of the cross-validation."""
        numbers = range(1, self.num_folds * self.num_repeats + 1)
        return [Fold(self.num_folds, self.num_repeats, number) for number in numbers]

    def __str__(self) -> str:
        return f"{self.number} of {self.num_folds * self.num_repeats}"

    def to_plain(self) -> dict[str, int | None]:
        """Return plain values for `run.json`; `from_plain` reads them."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, int | None]) -> Fold:
        folds, repeats, number = plain["num_folds"], plain["num_repeats"], plain["number"]
        assert folds is not None, "it was checked"
        assert repeats is not None, "it was checked"
        return cls(folds, repeats, number)


@dataclass(frozen=True, eq=False)
class DrawnFolds:
    """All folds of pooled images."""

    folds_RN: Ints
    """The fold of each image, from 0, for each repeat."""
    units_N: Ints
    """What no fold divides: equal for images of one group, and of one file."""

    def describe(self, num_folds: int) -> str:
        """Say how many images there are in each fold."""
        sizes = [size for folds_N in self.folds_RN for size in np.bincount(folds_N, minlength=num_folds).tolist()]
        num_repeats, num_images = self.folds_RN.shape
        times = "" if num_repeats == 1 else f", {num_repeats} times"
        each = f"{min(sizes):,}" if min(sizes) == max(sizes) else f"{min(sizes):,} to {max(sizes):,}"
        return f"folds: {num_images:,} images, in {num_folds} folds of {each} images{times} (evaluate.folds)"


def pool_splits(splits: Mapping[Role, ImageSplit], files: Mapping[Role, Ints | None]) -> tuple[ImageSplit, Ints | None]:
    """Return images of train and, where there is one, of the given validation split as one; and files of its table."""
    parts = [splits[role] for role in ("train", "validation") if role in splits]
    tables = [part.table for part in parts]
    starts = np.cumsum([0, *map(len, tables)])
    rows_N = np.concatenate([part.rows_N + start for part, start in zip(parts, starts, strict=False)])
    return ImageSplit("train", join_tables(tables), rows_N), join_files([files[part.name] for part in parts], tables)


def hold_none(
    splits: Mapping[Role, ImageSplit], files: Mapping[Role, Ints | None], fold: Fold, seed: int
) -> tuple[dict[Role, ImageSplit], DrawnFolds]:
    """Return the pooled images as train, with the test split if there is one, and all folds of the former.

    Raises:
        DataError: as `draw_folds`.
    """
    pool, files_N = pool_splits(splits, files)
    others: dict[Role, ImageSplit] = {role: split for role, split in splits.items() if role == "test"}
    drawn = draw_folds(pool.table, pool.rows_N, files_N, fold.num_folds, fold.num_repeats, seed)
    return {"train": pool, **others}, drawn


def hold_fold(pool: ImageSplit, files_N: Ints | None, fold: Fold, seed: int) -> tuple[ImageSplit, ImageSplit]:
    """Return what is left of pooled images, and those of a fold.

    Raises:
        DataError: as `draw_folds`.
    """
    drawn = draw_folds(pool.table, pool.rows_N, files_N, fold.num_folds, fold.repeat, seed)
    is_held_N = drawn.folds_RN[-1] == fold.place
    held = ImageSplit("test", pool.table, pool.rows_N[is_held_N])
    return ImageSplit("train", pool.table, pool.rows_N[~is_held_N]), held


def draw_folds(
    table: LabelledTable, rows_N: Ints, files_N: Ints | None, num_folds: int, num_repeats: int, seed: int
) -> DrawnFolds:
    """Draw the folds of some rows of a table.

    Args:
        rows_N: those that there are to draw from.
        files_N: of all rows of the table, the number of the file; None: each is a file of its own.
        num_folds: at least 2.
        num_repeats: at least 1; the first is the same however many there are.
        seed: of the recipe.

    Raises:
        DataError: fewer groups than folds, or a class of which a fold would hold all images.
    """
    units = units_of(table, files_N).of(rows_N)
    labels_N = table.labels_N[rows_N]
    what = "images" if table.groups_N is None else "groups"
    if len(units.names) < num_folds:
        problem = f"{num_folds} is more than the {len(units.names)} {what} there are"
        raise DataError(problem, key="evaluate.folds", remedy="Take fewer folds")
    alone = np.flatnonzero(num_units_by_class(labels_N, units.numbers_N) == 1)
    if len(alone):
        has_it_N = labels_N[:, alone[0]] if has_several(labels_N) else labels_N == alone[0]
        where = table.where(int(rows_N[np.flatnonzero(has_it_N)[0]]))
        raise DataError(
            f"class {int(alone[0])} (such as {where}) is in one of the {what} alone: the fold that holds it would "
            "train without",
            key="evaluate.folds",
            remedy=f"Bring more {what} of it, or leave the class out",
        )
    draws = [
        grouped_folds(labels_N, units, num_folds, derive_seed(seed, "data", "folds", repeat))
        for repeat in range(num_repeats)
    ]
    return DrawnFolds(np.stack(draws), units.numbers_N)
