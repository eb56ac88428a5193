"""Make the learning rate a pure function of the step: nothing to save, nothing to lose on resume."""

from __future__ import annotations

import math
from collections.abc import Callable

from tlscale.recipe.duration import Duration
from tlscale.recipe.schema import ScheduleSection


def make_lr_factor(
    section: ScheduleSection, *, total_steps: int, to_steps: Callable[[Duration], int]
) -> Callable[[int], float]:
    """Return the factor on the peak learning rate for step 0, 1, ... `total_steps - 1`.

    Warm-up of w steps takes step s to (s + 1) / w, so that no step is wasted at zero and step w - 1 is at the
    peak. Cosine: Loshchilov and Hutter 2017, one period, reaching `min_factor` after the last step.

    Args:
        section: the recipe's schedule.
        total_steps: length of the run.
        to_steps: turns a duration into steps of this run.
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
