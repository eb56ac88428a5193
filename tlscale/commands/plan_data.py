"""The plan of a run as plain values, for `tlscale plan --json`.

Promise: a key that is here stays, with its meaning; docs/guide.md lists them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tlscale import __version__
from tlscale.data.sources.folds import Fold
from tlscale.data.sources.open import ImageData
from tlscale.training.setup import RunSetup, strategy_of
from tlscale.training.stages import Stage, to_steps


def plan_of(setup: RunSetup) -> dict[str, Any]:
    """Return all that is known of a run without a pass of the network."""
    recipe, data, spec = setup.recipe, setup.data, setup.spec
    splits = [split for split in (data.train, data.validation, data.test) if split is not None]
    return {
        "tlscale": __version__,
        "name": recipe.name,
        "strategy": strategy_of(setup),
        "processes": setup.split.world_size,
        "precision": recipe.compute.precision,
        "data": {"source": recipe.data.source, "images": {split.name: len(split) for split in splits}},
        "classes": list(data.classes),
        "bad_images": len(setup.bad_images),
        "notes": [*data.notes, *setup.weights.notes],
        "earlier_runs": [one.to_plain() for one in setup.earlier],
        "input": spec.to_plain(),
        "views": [str(view) for view in setup.views],
        "augment": setup.augment,
        "backbone": {"name": recipe.backbone.name, "features": setup.code_width, "weights": str(setup.weights)},
        "teacher": None if setup.teacher is None else str(setup.teacher),
        "parameters": {"trainable": setup.trainable_params, "total": setup.total_params},
        "batch": None if not setup.stages else {"size": recipe.batch_size, **_batch(setup)},
        "steps": None if not setup.stages else _steps(setup),
        "stages": [_stage(stage, setup) for stage in setup.stages],
        "probe": None,
        "folds": None if setup.part is None else _folds(setup, setup.part.fold),
    }


def _folds(setup: RunSetup, fold: Fold) -> dict[str, Any]:
    """Return what a cross-validation takes, whose first fold the rest of the plan is of."""
    recipe, num_runs = setup.recipe, len(fold.folds)
    num_images = sum(len(split) for split in setup.data.splits.values())
    order = replace(setup.order, num_images=num_images, draw=None)
    lengths = [stage.duration for stage in recipe.stages] if recipe.stages else [recipe.duration]
    of_all = sum(to_steps(length, order, None) for length in lengths)
    return {
        "num_folds": fold.num_folds,
        "num_repeats": fold.num_repeats,
        "images": num_images,
        "runs": num_runs + 1,
        "most_steps": num_runs * setup.total_steps + of_all if setup.stages else 0,
    }


def fold_rows(setup: RunSetup, fold: Fold, whole: ImageData | None) -> list[tuple[str, str]]:
    """Return rows for people on a cross-validation, whose first fold the rest of the plan is of."""
    given = None if whole is None else whole.test
    folds, data = _folds(setup, fold), setup.data
    assert data.test is not None, "a fold is held out"
    times = "" if fold.num_repeats == 1 else f", {fold.num_repeats} times"
    chosen = "" if data.validation is None else f", {len(data.validation):,} to choose by"
    cost = f"{folds['runs']} runs: {folds['runs'] - 1} as planned here for the first fold, then one on all images"
    steps = f", at most {folds['most_steps']:,} steps" if folds["most_steps"] else "; codes are computed once for all"
    return [
        ("folds", f"{fold.num_folds} of {folds['images']:,} images{times}"),
        ("each", f"{len(data.train):,} to train on{chosen}, {len(data.test):,} held out to be scored"),
        ("model", f"on all {folds['images']:,}, with what most folds chose, or the median of their lengths"),
        *([] if given is None else [("test", f"the given split of {len(given):,}, scored once by this model")]),
        ("cost", cost + steps),
    ]


def _batch(setup: RunSetup) -> dict[str, int]:
    return {"micro_batch_size": setup.split.micro_batch_size, "micro_batches": setup.split.accumulation}


def _steps(setup: RunSetup) -> dict[str, int]:
    order = setup.order
    return {
        "total": setup.total_steps,
        "per_epoch": order.steps_per_epoch,
        "images_per_epoch": order.images_per_epoch,
    }


def _stage(stage: Stage, setup: RunSetup) -> dict[str, Any]:
    warmup = stage.schedule.warmup
    return {
        "start_step": stage.start_step,
        "stop_step": stage.stop_step,
        "freeze": [
            {
                "rule": row.pattern,
                "frozen": row.is_frozen,
                "tensors": row.num_tensors,
                "parameters": row.num_params,
                "norm_layers": row.norm_mode,
            }
            for row in stage.freeze_rows
        ],
        "optimizer": stage.optim.name,
        "groups": [
            {"lr": group["base_lr"], "weight_decay": group["weight_decay"], "tensors": list(group["names"])}
            for group in stage.groups
        ],
        "warmup_steps": to_steps(warmup, setup.order, stage.num_steps) if warmup.amount > 0 else 0,
        "decay": stage.schedule.decay,
    }
