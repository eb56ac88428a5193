"""Find keys of a recipe that would have no effect with these data and this network; `tlscale.recipe.idle` has more.

Promise: only what differs from its default was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator

from tlscale.data.sampler import DataOrder
from tlscale.data.sources.open import ImageData
from tlscale.errors import RecipeError
from tlscale.models.classifier import Classifier
from tlscale.recipe.schema import Recipe, asks_for
from tlscale.training.stages import Stage, to_steps


def refuse_idle(recipe: Recipe, data: ImageData, classifier: Classifier, stages: list[Stage], order: DataOrder) -> None:
    """Refuse the first key that does nothing in a run that trains.

    Raises:
        RecipeError: there is one.
    """
    found = (*_of_validation(recipe, data), *_of_layers(recipe, classifier, stages), *_of_stairs(stages, order))
    for key, why in found[:1]:
        raise RecipeError(f"has no effect: {why}", key=key, remedy="Take it out.")


def _of_validation(recipe: Recipe, data: ImageData) -> Iterator[tuple[str, str]]:
    if data.validation is None:
        for key in ("evaluate.select", "evaluate.choose", "checkpoint.keep_best"):
            if asks_for(recipe, key):
                yield key, "there is no validation split to choose by, and the last weights are exported"


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
