"""Plan stages: the parts of a run in which the same parameters are trained; most runs have one.

Promise: what is trained, with which learning rate, is a function of the recipe and the step. A stage is entered in the
same way whether the run came there or is resumed there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tlscale.data.sampler import DataOrder
from tlscale.errors import RecipeError
from tlscale.models.adapters import freezing_beside
from tlscale.models.classifier import Classifier
from tlscale.models.freeze import FreezeRow, check_trainable, freeze_parameters, unchanging_keys
from tlscale.recipe.duration import Duration
from tlscale.recipe.matching import check_time
from tlscale.recipe.rules import Rule, match_rules
from tlscale.recipe.schema import OptimSection, ScheduleSection, StageSection
from tlscale.training.optimizer import Group, build_optimizer, parameter_groups


@dataclass(frozen=True)
class Stage:
    """Describe one stage, ready to be entered."""

    number: int  # from 0
    start_step: int
    stop_step: int  # exclusive
    freeze_rows: list[FreezeRow]
    trained: frozenset[str]  # rule names of the parameters
    unchanging_keys: frozenset[str]  # of the state dict: what the stage cannot change
    groups: list[Group]
    optim: OptimSection
    schedule: ScheduleSection
    lr_factor: Callable[[int], float]  # of the step of the run
    trains_backbone: bool
    trains_all: bool

    @property
    def num_steps(self) -> int:
        return self.stop_step - self.start_step

    def build_optimizer(self, groups: list[Group] | None = None) -> torch.optim.Optimizer:
        """Build the stage's optimizer over its own groups, or over `groups`: the same ones, of sharded parameters."""
        return build_optimizer(self.groups if groups is None else groups, self.optim)


def plan_stages(
    sections: Sequence[StageSection] | None,
    whole_run: StageSection,
    optim: OptimSection,
    schedule: ScheduleSection,
    classifier: Classifier,
    order: DataOrder,
) -> list[Stage]:
    """Plan the stages of a run, in order; leave the classifier as the first one wants it.

    A recipe without `stages` has one, `whole_run`. A stage may change the recipe's `optim` and replace its `schedule`.

    Raises:
        RecipeError: a rule without effect, a warm-up longer than its stage.
        ModelError: a stage that leaves nothing to train.
    """
    learnable = [param for param in classifier.parameters() if param.requires_grad]
    stages: list[Stage] = []
    for number, section in enumerate(sections or [whole_run]):
        where = f"stages[{number}]." if sections else ""
        for param in learnable:
            param.requires_grad_(True)
        rules = freezing_beside(classifier.backbone, section.freeze)
        rows = freeze_parameters(classifier.backbone, rules, f"{where}freeze")
        check_trainable(classifier.parameters(), section.freeze, f"{where}freeze")
        start = stages[-1].stop_step if stages else 0
        stages.append(_plan_stage(optim, schedule, section, classifier, order, rows, where, number, start))
    _refuse_idle_rules(sections or [whole_run], optim, classifier, stages)
    apply_freezing(classifier, stages[0])
    return stages


def apply_freezing(classifier: Classifier, stage: Stage) -> None:
    """Give a gradient to what the stage trains and to nothing else; what it freezes goes into eval mode."""
    for name, param in classifier.rule_names().items():
        param.requires_grad_(name in stage.trained)
    classifier.train()


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """Return the stage that makes `step` (from 0): the first one before it, the last one after the end of the run."""
    return next((stage for stage in stages if step < stage.stop_step), stages[-1])


def _plan_stage(
    optim: OptimSection,
    schedule: ScheduleSection,
    section: StageSection,
    classifier: Classifier,
    order: DataOrder,
    rows: list[FreezeRow],
    where: str,
    number: int,
    start: int,
) -> Stage:
    params = {name: param for name, param in classifier.rule_names().items() if param.requires_grad}
    optim = _optim(optim, section, params, where)
    groups = parameter_groups(
        params,
        optim,
        layer_depth=classifier.layer_depth() if optim.layer_decay is not None else {},
        never_decayed=classifier.never_decayed(),
        where=where if section.lr_rules is not None else "",
    )
    schedule = section.schedule or schedule
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
        unchanging_keys=frozenset(unchanging_keys(classifier)),
        groups=groups,
        optim=optim,
        schedule=schedule,
        lr_factor=lambda step: factor(step - start),
        trains_backbone=any(param.requires_grad for param in classifier.backbone.parameters()),
        trains_all=all(param.requires_grad for param in classifier.parameters()),
    )


def to_steps(duration: Duration, order: DataOrder, total_steps: int | None) -> int:
    """Convert a duration to steps over data in this order; a share is one of `total_steps`."""
    return duration.to_steps(num_images=order.images_per_epoch, batch_size=order.batch_size, total_steps=total_steps)


def _optim(
    optim: OptimSection, section: StageSection, params: dict[str, torch.nn.Parameter], where: str
) -> OptimSection:
    """Return the recipe's optimizer with what the stage has instead.

    The recipe's rules are for all stages, so one that matches nothing in this stage is skipped here; a stage's own
    rules must match.
    """
    changes: dict[str, object] = {
        key: _acting(getattr(optim, key), params, f"optim.{key}") if where else getattr(optim, key)
        for key in ("lr_rules", "weight_decay_rules")
    }
    changes |= {
        key: getattr(section, key) for key in ("lr", "lr_rules", "layer_decay") if getattr(section, key) is not None
    }
    return optim.model_copy(update=changes)


def _acting(
    rules: tuple[Rule[float], ...], params: dict[str, torch.nn.Parameter], where: str
) -> tuple[Rule[float], ...]:
    for rule in rules:
        check_time(rule.pattern, tuple(params), where)
    return tuple(rule for rule in rules if any(rule.matches(name) for name in params))


def _refuse_idle_rules(
    sections: Sequence[StageSection], optim: OptimSection, classifier: Classifier, stages: Sequence[Stage]
) -> None:
    """Refuse rules of the recipe that match nothing in any stage."""
    taking = [stage for stage, section in zip(stages, sections, strict=True) if section.lr_rules is None]
    for rules, over, where in (
        (optim.lr_rules, taking, "optim.lr_rules"),
        (optim.weight_decay_rules, stages, "optim.weight_decay_rules"),
    ):
        if rules and not over:
            raise RecipeError("has no effect: every stage has its own lr_rules", key=where, remedy="Remove it")
        trained: set[str] = set().union(*(stage.trained for stage in over))
        match_rules(rules, [name for name in classifier.rule_names() if name in trained], where)


def _refuse_long_warmup(
    section: StageSection, schedule: ScheduleSection, order: DataOrder, num_steps: int, where: str
) -> None:
    warmup_steps = to_steps(schedule.warmup, order, num_steps)
    if warmup_steps > num_steps:
        whose = where if section.schedule is not None else ""
        raise RecipeError(
            f"{schedule.warmup} is {warmup_steps} steps, and {where}duration = {section.duration} is "
            f"{num_steps}: the learning rate would never reach its peak",
            key=f"{whose}schedule.warmup",
            remedy="Shorten the warm-up",
        )


def make_lr_factor(
    section: ScheduleSection, *, total_steps: int, to_steps: Callable[[Duration], int]
) -> Callable[[int], float]:
    """Return the factor on the peak learning rate for step 0, 1, ... `total_steps - 1`.

    Warm-up of w steps takes step s to (s + 1) / w, so that no step is wasted at zero and step w - 1 is at the
    peak. Cosine: Loshchilov and Hutter 2017, one period, reaching `min_factor` after the last step.
    """
    warmup_steps = to_steps(section.warmup)
    stair_steps = to_steps(section.step_every) if section.step_every is not None else 0
    decay_steps = max(total_steps - warmup_steps, 1)

    def lr_factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        share = min((step - warmup_steps) / decay_steps, 1.0)
        match section.decay:
            case "cosine":
                return section.min_factor + (1 - section.min_factor) * (1 + math.cos(math.pi * share)) / 2
            case "linear":
                return section.min_factor + (1 - section.min_factor) * (1 - share)
            case "step":
                assert section.step_factor is not None
                return float(section.step_factor ** ((step - warmup_steps) // stair_steps))
            case "constant":
                return 1.0

    return lr_factor
