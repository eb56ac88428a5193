"""Stages: the parts of a run in which the same parameters are trained; most runs have one.

Promise: what is trained, with which learning rate, is a function of the recipe and the step. A stage is entered in the
same way whether the run came there or is resumed there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tlscale import faults
from tlscale.data.sampler import DataOrder
from tlscale.errors import RecipeError
from tlscale.models.classifier import Classifier
from tlscale.models.freeze import FreezeRow, check_trainable, fixed_names, freeze_parameters
from tlscale.recipe.duration import Duration
from tlscale.recipe.rules import Rule, match_rules
from tlscale.recipe.schema import OptimSection, Recipe, ScheduleSection, StageSection
from tlscale.training.checkpoint.optimizer_state import carry_moments
from tlscale.training.ema import Ema
from tlscale.training.optimizer import Group, build_optimizer, parameter_groups
from tlscale.training.schedule import make_lr_factor


@dataclass(frozen=True)
class Stage:
    """One stage, ready to be entered."""

    number: int  # from 0
    start_step: int
    stop_step: int  # exclusive
    freeze_rows: list[FreezeRow]
    trained: frozenset[str]  # rule names of the parameters
    fixed: frozenset[str]  # names in the state dict of what the stage cannot change
    groups: list[Group]
    optim: OptimSection
    schedule: ScheduleSection
    lr_factor: Callable[[int], float]  # of the step of the run
    trains_backbone: bool
    trains_all: bool

    @property
    def num_steps(self) -> int:
        return self.stop_step - self.start_step


def plan_stages(recipe: Recipe, classifier: Classifier, order: DataOrder) -> list[Stage]:
    """The stages of the recipe, in order; the classifier is left as the first one wants it.

    Raises:
        RecipeError: a rule without effect, a warm-up longer than its stage.
        ModelError: a stage that leaves nothing to train.
    """
    sections = recipe.stages or [StageSection(freeze=recipe.freeze, duration=recipe.duration)]
    learnable = [param for param in classifier.parameters() if param.requires_grad]
    stages: list[Stage] = []
    for number, section in enumerate(sections):
        where = f"stages[{number}]." if recipe.stages else ""
        for param in learnable:
            param.requires_grad_(True)
        rows = freeze_parameters(classifier.backbone, section.freeze, f"{where}freeze")
        check_trainable(classifier.parameters(), section.freeze, f"{where}freeze")
        start = stages[-1].stop_step if stages else 0
        stages.append(_plan_stage(recipe, section, classifier, order, rows, where, number, start))
    _refuse_idle_rules(recipe, classifier, stages)
    enter(classifier, stages[0])
    return stages


def enter(classifier: Classifier, stage: Stage) -> None:
    """Give a gradient to what the stage trains and to nothing else; what it freezes goes into eval mode."""
    for name, param in classifier.rule_names().items():
        param.requires_grad_(name in stage.trained)
    classifier.train()


def cross_boundary(
    classifier: Classifier, optimizer: torch.optim.Optimizer, ema: Ema | None, stage: Stage
) -> torch.optim.Optimizer:
    """Go from one stage to the next: what is frozen keeps its average, moments go over by parameter name.

    Args:
        optimizer: of the stage that is over.
        stage: the next one.

    Returns:
        The next stage's optimizer.
    """
    if ema is not None:
        ema.settle([name for name in ema.averages if name not in stage.trained])
    classifier.zero_grad(set_to_none=True)
    enter(classifier, stage)
    following = build_optimizer(stage.groups, stage.optim)
    carry_moments(optimizer, following)
    faults.at("stage")
    return following


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that makes `step` (from 0), or the last one after the end of the run."""
    return next((stage for stage in stages if step < stage.stop_step), stages[-1])


def _plan_stage(
    recipe: Recipe,
    section: StageSection,
    classifier: Classifier,
    order: DataOrder,
    rows: list[FreezeRow],
    where: str,
    number: int,
    start: int,
) -> Stage:
    params = {name: param for name, param in classifier.rule_names().items() if param.requires_grad}
    optim = _optim(recipe.optim, section, params, where)
    groups = parameter_groups(
        params,
        optim,
        layer_depth=classifier.layer_depth() if optim.layer_decay is not None else {},
        never_decayed=classifier.never_decayed(),
        where=where if section.lr_rules is not None else "",
    )
    schedule = section.schedule or recipe.schedule
    num_steps = to_steps(section.duration, order, None)
    _refuse_long_warmup(section, schedule, order, num_steps, where)
    factor = make_lr_factor(
        schedule, total_steps=num_steps, to_steps=lambda duration: to_steps(duration, order, num_steps)
    )
    return Stage(
        number=number,
        start_step=start,
        stop_step=start + num_steps,
        freeze_rows=rows,
        trained=frozenset(params),
        fixed=frozenset(fixed_names(classifier)),
        groups=groups,
        optim=optim,
        schedule=schedule,
        lr_factor=lambda step: factor(step - start),
        trains_backbone=any(param.requires_grad for param in classifier.backbone.parameters()),
        trains_all=all(param.requires_grad for param in classifier.parameters()),
    )


def to_steps(duration: Duration, order: DataOrder, total_steps: int | None) -> int:
    """A duration in steps over data in this order; a share is one of `total_steps`."""
    return duration.to_steps(num_images=order.images_per_epoch, batch_size=order.batch_size, total_steps=total_steps)


def _optim(
    optim: OptimSection, section: StageSection, params: dict[str, torch.nn.Parameter], where: str
) -> OptimSection:
    """The recipe's optimizer with what the stage says instead.

    Rules of the recipe stand for all stages, so those that have nothing to act on in this one are left out of it; a
    stage's own rules must act.
    """
    changes: dict[str, object] = {
        "lr_rules": _acting(optim.lr_rules, params) if where else optim.lr_rules,
        "weight_decay_rules": _acting(optim.weight_decay_rules, params) if where else optim.weight_decay_rules,
    }
    changes |= {
        key: getattr(section, key) for key in ("lr", "lr_rules", "layer_decay") if getattr(section, key) is not None
    }
    return optim.model_copy(update=changes)


def _acting(rules: tuple[Rule[float], ...], params: dict[str, torch.nn.Parameter]) -> tuple[Rule[float], ...]:
    return tuple(rule for rule in rules if any(rule.matches(name) for name in params))


def _refuse_idle_rules(recipe: Recipe, classifier: Classifier, stages: Sequence[Stage]) -> None:
    """Rules of the recipe that act in no stage."""
    own = [section.lr_rules is not None for section in recipe.stages or ()] or [False]
    taking = [stage for stage, has_own in zip(stages, own, strict=True) if not has_own]
    for rules, over, where in (
        (recipe.optim.lr_rules, taking, "optim.lr_rules"),
        (recipe.optim.weight_decay_rules, stages, "optim.weight_decay_rules"),
    ):
        if rules and not over:
            raise RecipeError(f"{where} has no effect: every stage has its own lr_rules. Take it out")
        trained: set[str] = set().union(*(stage.trained for stage in over))
        match_rules(rules, [name for name in classifier.rule_names() if name in trained], where)


def _refuse_long_warmup(
    section: StageSection, schedule: ScheduleSection, order: DataOrder, num_steps: int, where: str
) -> None:
    warmup_steps = to_steps(schedule.warmup, order, num_steps)
    if warmup_steps > num_steps:
        whose = where if section.schedule is not None else ""
        raise RecipeError(
            f"{whose}schedule.warmup = {schedule.warmup} is {warmup_steps} steps, and {where}duration = "
            f"{section.duration} is {num_steps}: the learning rate would never reach its peak. Shorten the warm-up"
        )
