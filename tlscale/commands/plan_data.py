"""The plan of a run as plain values, for `tlscale plan --json`.

Promise: a key that is here stays, with its meaning; docs/guide.md lists them.
"""

from __future__ import annotations

from typing import Any

from tlscale import __version__
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
        "input": spec.to_plain(),
        "augment": setup.augment,
        "backbone": {"name": recipe.backbone.name, "features": setup.code_width, "weights": str(setup.weights)},
        "teacher": None if setup.teacher is None else str(setup.teacher),
        "parameters": {"trainable": setup.trainable_params, "total": setup.total_params},
        "batch": None if not setup.stages else {"size": recipe.batch_size, **_batch(setup)},
        "steps": None if not setup.stages else _steps(setup),
        "stages": [_stage(stage, setup) for stage in setup.stages],
        "probe": None,
    }


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
