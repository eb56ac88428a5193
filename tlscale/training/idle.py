"""Find keys of a recipe that would have no effect with these data and this network; `tlscale.recipe.idle` has more.

Promise: only what differs from its default was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath

from tlscale.data.decode import ARRAYS
from tlscale.data.sampler import DataOrder
from tlscale.data.sources.folds import Fold
from tlscale.data.sources.joined import JoinedStore
from tlscale.data.sources.open import ImageData
from tlscale.data.sources.stores import FileStore
from tlscale.data.sources.tables import class_counts
from tlscale.errors import RecipeError
from tlscale.models.classifier import Classifier
from tlscale.recipe.schema import Recipe, asks_for
from tlscale.training.stages import Stage, to_steps


def refuse_idle(
    recipe: Recipe,
    data: ImageData,
    classifier: Classifier,
    stages: list[Stage],
    order: DataOrder,
    fold: Fold | None = None,
) -> None:
    """Refuse the first key that does nothing; `stages` are empty of a probe.

    Of a cross-validation what hangs on the data is checked with all images, and the rest with those of a fold.

    Raises:
        RecipeError: there is one.
    """
    is_whole = fold is None or fold.holds_none
    found = [*_of_groups(recipe, data), *_of_arrays(recipe, data), *_of_classes(recipe, data)] if is_whole else []
    has_fold = fold is None or not fold.holds_none
    if not stages and has_fold and data.validation is None and asks_for(recipe, "evaluate.select"):
        found.append(("evaluate.select", "there is no validation split to choose by"))
    if stages and has_fold:
        found += _of_validation(recipe, data)
        found += _of_patience(recipe, stages, order)
        found += _of_layers(recipe, classifier, stages)
        found += _of_stairs(stages, order)
    for key, why in found[:1]:
        raise RecipeError(f"has no effect: {why}", key=key, remedy="Take it out.")


def _of_groups(recipe: Recipe, data: ImageData) -> Iterator[tuple[str, str]]:
    key = "data.groups_across_splits"
    if data.groups is not None and len(data.groups.counts) == 1 and asks_for(recipe, key):
        yield key, "the source has one split, and what is drawn of it cuts no group"


def _of_arrays(recipe: Recipe, data: ImageData) -> Iterator[tuple[str, str]]:
    stores = [split.table.store for split in data.splits.values()]
    parts = [part for store in stores for part in (store.parts if isinstance(store, JoinedStore) else [store])]
    paths = [store.paths_N for store in parts if isinstance(store, FileStore)]
    if len(paths) < len(parts) or not asks_for(recipe, "data.channels_first"):
        return  # what is not in files of its own may be an array
    if not any(PurePath(path).suffix.lower() in ARRAYS for paths_N in paths for path in paths_N.to_pylist()):
        yield "data.channels_first", f"none of the images is an array ({', '.join(sorted(ARRAYS))})"


def _of_classes(recipe: Recipe, data: ImageData) -> Iterator[tuple[str, str]]:
    """Give keys for classes of unequal sizes; a limit may make equal what is not, as one of a comparison's sizes."""
    counts_C = class_counts(data.train.labels_N, len(data.classes))
    if recipe.data.train_limit is not None or counts_C.min() < counts_C.max():
        return
    for key in ("data.sampling", "loss.logit_adjustment"):
        if asks_for(recipe, key):
            yield key, f"each of the {len(counts_C):,} classes has {int(counts_C[0]):,} training images"


def _of_validation(recipe: Recipe, data: ImageData) -> Iterator[tuple[str, str]]:
    if data.validation is None:
        for key in ("evaluate.select", "evaluate.choose", "checkpoint.keep_best"):
            if asks_for(recipe, key):
                yield key, "there is no validation split to choose by, and the last weights are exported"
        # Not evaluate.every, which recipes have beside this, and which a comparison stretches with their length.
        if asks_for(recipe, "evaluate.patience"):
            yield "evaluate.patience", "there is no validation split to evaluate while the run trains"


def _of_patience(recipe: Recipe, stages: list[Stage], order: DataOrder) -> Iterator[tuple[str, str]]:
    patience, start, total = recipe.evaluate.patience, stages[-1].start_step, stages[-1].stop_step
    if patience is None:
        return
    every = max(to_steps(recipe.evaluate.every, order, total), 1)
    # The first evaluation of a run is its best so far; that of its last stage need not be.
    if (start // every + patience + (not start)) * every >= total:
        num = (total - 1) // every - start // every
        yield (
            "evaluate.patience",
            f"before its last step the run is evaluated {num:,} times (evaluate.every: {recipe.evaluate.every}), so "
            f"{patience:,} evaluations that are no better come with its end",
        )


def _of_layers(recipe: Recipe, classifier: Classifier, stages: list[Stage]) -> Iterator[tuple[str, str]]:
    own = [section.layer_decay for section in recipe.stages or ()]
    decayed = [stage for stage in stages if stage.optim.layer_decay is not None]
    depths = classifier.layer_depth() if decayed else {}
    idle = [stage for stage in decayed if not any(depths[name] for name in stage.trained)]
    why = "nothing is trained but the head, which is no layer away from itself"
    for stage in idle:
        if own and own[stage.number] is not None:
            yield f"stages[{stage.number}].layer_decay", why
    if idle and len(idle) == len(decayed):
        yield "optim.layer_decay", why


def _of_stairs(stages: list[Stage], order: DataOrder) -> Iterator[tuple[str, str]]:
    for stage in stages:
        schedule, num_steps = stage.schedule, stage.num_steps
        if schedule.step_every is None:
            continue
        left = num_steps - to_steps(schedule.warmup, order, num_steps)
        if to_steps(schedule.step_every, order, num_steps) >= left:
            where = f"stages[{stage.number}]." if len(stages) > 1 else ""
            yield (
                f"{where}schedule.step_every",
                f"{left:,} steps are left, and a stair is {schedule.step_every}",
            )
