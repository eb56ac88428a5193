"""Lengthen a run: `--resume` with a longer `duration` makes the steps that it would have made if it had been so long.

Promise: the weights of the last step are those of a run that was as long from the start, bit for bit, where both train
on codes or both on images. What would have made a step that was made another one is refused.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from tlscale.errors import ResumeError, flag, option
from tlscale.recipe.duration import Duration
from tlscale.recipe.load import dump_recipe, load_stored_recipe, recipe_digest
from tlscale.recipe.schema import Recipe
from tlscale.storage.files import flush, naming_disk_errors, write_json, write_text
from tlscale.storage.run_folder import RunFolder
from tlscale.training.setup import RunSetup

Changes = Sequence[tuple[str, object, object]]
"""Of a recipe: key, old value, new value."""


def lengthens(stored: Recipe, recipe: Recipe, changes: Changes) -> bool:
    """Report whether nothing but the length of the last stage is another, and not a shorter one as it is written."""
    if stored.probe is not None or stored.evaluate.folds is not None or len(changes) != 1:
        return False
    key, old, new = changes[0]
    if key == "stages":
        if not (isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and old[:-1] == new[:-1]):
            return False
        if {**old[-1], "duration": ""} != {**new[-1], "duration": ""}:
            return False
    elif key != "duration":
        return False
    before, after = _duration(stored), _duration(recipe)
    return before.unit != after.unit or before.amount < after.amount


def other_steps(stored: Recipe) -> str | None:
    """Say why a longer run would have made other steps than this one did; None: it would not."""
    last = stored.stages[-1] if stored.stages else None
    schedule, where = stored.schedule, "schedule"
    if stored.stages and last is not None and last.schedule is not None:
        schedule, where = last.schedule, f"stages[{len(stored.stages) - 1}].schedule"
    every = stored.evaluate.every
    if schedule.decay != "constant":
        return f"with {where}.decay: {schedule.decay} each step of a longer run has another learning rate"
    if schedule.warmup.unit == "%" and schedule.warmup.amount:
        return f"with {where}.warmup: {schedule.warmup} the warm-up of a longer run is longer"
    if every.unit == "%":
        return f"with evaluate.every: {every} a longer run is evaluated, and its best step chosen, elsewhere"
    return None


def refuse_longer(why: str, changes: Changes, folder: RunFolder) -> None:
    """Refuse to make a finished run longer.

    Raises:
        ResumeError: with the words that start another run from its weights.
    """
    weights = shlex.quote(f"backbone.weights=run:{folder.path}")
    raise ResumeError(
        f"'{folder.path}' cannot be made longer: {why}",
        key=changes[0][0],
        remedy="Train on from its weights in a run of its own: without "
        + flag("resume")
        + ", and with "
        + option("out", "DIR")
        + f" {weights}",
    )


def lengthen(setup: RunSetup, run_info: dict[str, Any], folder: RunFolder) -> dict[str, Any]:
    """Make the run an unfinished one of the new length; return what `run.json` holds from now on.

    Raises:
        ResumeError: it is not longer, or what the student of a teacher learns would be another.
    """
    longer = setup.recipe
    stored = load_stored_recipe(folder.recipe).recipe
    stored = stored.model_copy(update={"duration": longer.duration, "stages": longer.stages})
    if run_info.get("lengthened") and run_info["recipe_sha256"] == recipe_digest(stored):
        _write_recipe(stored, folder)  # it was killed between the two files
        return run_info
    run_info = settle_length(run_info, folder)
    steps = run_info["total_steps"]
    epochs, views = setup.order.epoch(steps - 1) + 1, longer.codes.views
    if setup.total_steps <= steps:
        problem = f"'{folder.path}' cannot be made longer: {_duration(longer)} are {setup.total_steps:,} steps, and it "
        raise ResumeError(f"{problem}has {steps:,}", key="duration", remedy="Give a longer one")
    if longer.distill is not None and epochs < views:
        problem = (
            f"'{folder.path}' cannot be made longer: its {epochs:,} epochs saw fewer than codes.views={views} views"
        )
        remedy = "Start another run, which standardises what the teacher gives over all of them: " + option(
            "out", "DIR"
        )
        raise ResumeError(problem, key="duration", remedy=remedy)
    earlier = [*run_info.get("lengthened", []), {"total_steps": steps, "recipe_sha256": run_info["recipe_sha256"]}]
    now = {"total_steps": setup.total_steps, "recipe_sha256": recipe_digest(stored), "lengthened": earlier}
    run_info = {**run_info, **now}
    with naming_disk_errors(folder.path):
        # First, so that a run that is killed from here on is never taken for a complete one of the new length.
        folder.result.unlink(missing_ok=True)
        flush(folder.path)
        write_json(folder.run_json, run_info)
    _write_recipe(stored, folder)
    return run_info


def settle_length(run_info: dict[str, Any], folder: RunFolder) -> dict[str, Any]:
    """Take back a lengthening that was killed between its two files, and that nobody asks for any more.

    Returns:
        What `run.json` holds from now on: the length that the recipe in the folder has.
    """
    *before, last = run_info.get("lengthened") or [None]
    if last is None or recipe_digest(load_stored_recipe(folder.recipe).recipe) != last["recipe_sha256"]:
        return run_info
    kept = {key: value for key, value in run_info.items() if key != "lengthened"}
    settled: dict[str, Any] = {**kept, **last, **({"lengthened": before} if before else {})}
    with naming_disk_errors(folder.path):
        write_json(folder.run_json, settled)
    return settled


def _write_recipe(recipe: Recipe, folder: RunFolder) -> None:
    with naming_disk_errors(folder.path):
        write_text(folder.recipe, dump_recipe(recipe))


def _duration(recipe: Recipe) -> Duration:
    return recipe.stages[-1].duration if recipe.stages else recipe.duration
