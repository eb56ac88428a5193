"""Check that the figure that chooses can be told on the validation split, and note over which classes it is a mean."""

from __future__ import annotations

from dataclasses import replace

from tlscale.codes.probes.class_figures import OF_SCORES
from tlscale.data.sources.open import ImageData
from tlscale.data.sources.tables import class_counts
from tlscale.errors import DataError, RecipeError, first_few
from tlscale.recipe.schema import Recipe
from tlscale.training.predictions import MOST_LOGITS

_KEY = "evaluate.select"


def with_note_on_select(recipe: Recipe, data: ImageData) -> ImageData:
    """Return the data; where `evaluate.select` is a mean that lacks classes, with a note on these.

    Raises:
        RecipeError: the figure is not computed for so many classes.
        DataError: the validation images are of one class, and there are no others to rank them before.
    """
    select = recipe.evaluate.select
    if select not in OF_SCORES or data.has_several_labels or data.validation is None:
        return data
    if len(data.classes) > MOST_LOGITS:
        problem = f"{select} is computed for up to {MOST_LOGITS:,} classes, and there are {len(data.classes):,}"
        raise RecipeError(problem, key=_KEY, remedy="Write another figure, such as balanced_accuracy")
    counts_C = class_counts(data.validation.labels_N, len(data.classes))
    absent = [name for name, count in zip(data.classes, counts_C.tolist(), strict=True) if not count]
    if len(absent) >= len(data.classes) - 1:
        raise DataError(
            f"all {len(data.validation):,} validation images are of one class, so that {select} cannot choose",
            key=_KEY,
            remedy="Raise data.validation_fraction, or write loss",
        )
    if not absent:
        return data
    note = (
        f"{_KEY}: {select} is the mean over the {len(data.classes) - len(absent):,} classes that have validation "
        f"images; {len(absent):,} of {len(data.classes):,} have none ({first_few(absent)})"
    )
    return replace(data, notes=(*data.notes, note))
