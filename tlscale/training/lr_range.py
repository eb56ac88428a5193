"""Try learning rates: a short training in which the rate grows from step to step, until the loss does.

After Smith 2017, "Cyclical learning rates for training neural networks" (https://arxiv.org/abs/1506.01186). The steps
are those of a run: the recipe's images, augmentation, loss, freezing and optimizer, on cached codes where it freezes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from tlscale.distributed.processes import Processes
from tlscale.distributed.signals import check_stop
from tlscale.errors import RecipeError
from tlscale.recipe.duration import parse_duration
from tlscale.recipe.schema import Recipe, ScheduleSection
from tlscale.recipe.seeds import derive_seed
from tlscale.tracking.console import Console
from tlscale.tracking.progress import Pace
from tlscale.training.loop import train_step
from tlscale.training.loop_state import LoopState
from tlscale.training.optimizer import set_lr
from tlscale.training.setup import RunSetup, set_up
from tlscale.training.state import build_train_state, enter_stage

LOWEST, HIGHEST = 1e-7, 10.0
_SMOOTHING = 0.9
_DIVERGED = 4.0  # times the least loss so far
_LEAST_STEPS = 20
_BELOW_LEAST = 10.0  # the suggestion is so many times smaller than the rate with the least loss


@dataclass(frozen=True)
class LrRange:
    """What each learning rate did."""

    lrs: tuple[float, ...]
    """Of the steps that were made; the recipe's rules and layer decay count from it."""
    losses: tuple[float, ...]
    """Mean loss of each step's images, before the step."""
    smoothed: tuple[float, ...]
    suggestion: float | None
    """None: the loss never fell below that of the first step."""
    recipe_lr: float


def lr_range(
    recipe: Recipe,
    processes: Processes,
    console: Console,
    *,
    steps: int = 100,
    low: float = LOWEST,
    high: float = HIGHEST,
) -> LrRange:
    """Train for a few steps, each with a higher learning rate than the last.

    Args:
        steps: most steps; fewer are made where the loss grows beyond all measure.
        low, high: the first and the last rate.

    Raises:
        RecipeError: a probe, which has no learning rate, or rates and steps that make no sense.
        Stopped: it was asked to stop.
    """
    if recipe.probe is not None:
        raise RecipeError("a probe is fitted without a learning rate", key="probe", remedy="Name a recipe that trains")
    if not 0 < low < high or steps < _LEAST_STEPS:
        problem = f"from {low:g} to {high:g} in {steps} steps"
        raise RecipeError(
            problem, key="lr", remedy=f"Name two rates, the lower first, and {_LEAST_STEPS} steps or more"
        )
    setup = set_up(_short(recipe, steps), world_size=processes.world_size)
    (stage,) = setup.stages

    def rate(step: int) -> float:
        return float(low * (high / low) ** (step / (steps - 1)))

    setup.stages = [replace(stage, lr_factor=lambda step: rate(step) / stage.optim.lr)]
    losses = _losses(setup, processes, console)
    lrs = tuple(rate(step) for step in range(len(losses)))
    smoothed = _smoothed(losses)
    return LrRange(lrs, tuple(losses), smoothed, _suggestion(lrs, smoothed), stage.optim.lr)


def _short(recipe: Recipe, steps: int) -> Recipe:
    """Return the recipe, or its first stage, with so many steps and no schedule."""
    length = parse_duration(f"{steps} steps")
    stages = recipe.stages
    if stages is not None:
        stages = [stages[0].model_copy(update={"duration": length, "schedule": None})]
    return recipe.model_copy(update={"duration": length, "stages": stages, "schedule": ScheduleSection()})


def _losses(setup: RunSetup, processes: Processes, console: Console) -> list[float]:
    """Train, and return the loss of each step until it is beyond all measure."""
    (stage,) = setup.stages
    state, losses = build_train_state(setup, processes, console, stage), list[float]()
    enter_stage(state, LoopState())
    pace = Pace(setup.order.images_seen(stage.num_steps), "trying learning rates", console)
    with closing(state.inputs.steps(0, stage.num_steps)) as batches, pace:
        for step, micro_batches in enumerate(batches):
            check_stop("trying learning rates")
            set_lr(state.optimizer, stage.lr_factor(step))
            num_images = setup.order.num_images_in(step)
            seed = derive_seed(setup.seed, "step", step)
            trained = train_step(
                *(state.model, state.stepped, state.loss_fn, state.inputs, micro_batches, processes),
                num_images=num_images,
                seed=seed,
                clip_grad_norm=stage.optim.clip_grad_norm,
            )
            assert trained is not None, "only a step that is checked may be skipped"
            loss = float(processes.sum(trained.loss_sum)) / num_images
            if not math.isfinite(loss) or (losses and loss > _DIVERGED * max(min(losses), losses[0] / 2)):
                break
            losses.append(loss)
            pace.add(num_images)
    return losses


def _smoothed(losses: Sequence[float]) -> tuple[float, ...]:
    """Return a moving average with decay 0.9, corrected for its beginning at zero, as that of Adam is."""
    average, smoothed = 0.0, []
    for number, loss in enumerate(losses, start=1):
        average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
        smoothed.append(average / (1 - _SMOOTHING**number))
    return tuple(smoothed)


def _suggestion(lrs: Sequence[float], smoothed: Sequence[float]) -> float | None:
    """Return a tenth of the rate with the least loss; None where the loss never fell."""
    least = min(range(len(smoothed)), key=smoothed.__getitem__, default=0)
    return lrs[least] / _BELOW_LEAST if least else None
