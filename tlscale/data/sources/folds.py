"""Draw the folds of cross-validation: each image is held once a repeat, no group is cut, classes keep their shares.

Promise: that of `grouped_draws`, with and without groups. Repeats are draws of their own.

Shape letters: N rows, R repeats.
"""

from __future__ import annotations

import numpy as np

from tlscale.data.sources.grouped_draws import grouped_folds
from tlscale.data.sources.groups import units_of
from tlscale.data.sources.tables import Ints, LabelledTable
from tlscale.errors import DataError
from tlscale.recipe.seeds import derive_seed


def draw_folds(
    table: LabelledTable, rows_N: Ints, files_N: Ints | None, num_folds: int, num_repeats: int, seed: int
) -> Ints:
    """Return the fold of each of some rows of a table, from 0, for each repeat: (R, N).

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
    pairs = np.unique(np.stack([labels_N, units.numbers_N]), axis=1)[0]
    alone = np.flatnonzero(np.bincount(pairs) == 1)
    if len(alone):
        where = table.where(int(rows_N[np.flatnonzero(labels_N == alone[0])[0]]))
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
    return np.stack(draws)
