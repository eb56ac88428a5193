"""Keep what a run remembers: the little that is not a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tlscale.distributed.fsdp import local
from tlscale.distributed.processes import Processes
from tlscale.models.classifier import Classifier
from tlscale.recipe.schema import CheckpointSection, EvaluateSection


@dataclass
class LoopState:
    """The step, and what is kept beside it in a checkpoint's `state.json`."""

    step: int = 0
    spent_s: dict[str, float] = field(default_factory=dict)  # by part, over all starts, as of the last checkpoint
    window_loss: float = 0.0  # summed since the last log line, over all processes
    window_images: int = 0
    best: list[tuple[int, float]] = field(default_factory=list)  # (step, validation figure), best first
    best_error: float | None = None  # standard error of the best figure
    # (step, validation figure, its standard error), where that is not the best: the latest within an error of it.
    chosen: tuple[int, float, float | None] | None = None
    run_id: str | None = None  # of `run.json`
    wandb_run_id: str | None = None
    keeps_codes: dict[str, bool] = field(default_factory=dict)  # stage -> whether it trains on codes
    left_out: list[int] = field(default_factory=list)  # steps that changed nothing, as something was not finite

    @property
    def chosen_step(self) -> int | None:
        """The step whose weights would be exported now."""
        return self.chosen[0] if self.chosen else self.best[0][0] if self.best else None

    def kept_steps(self, keeping: CheckpointSection) -> list[int]:
        """The steps whose checkpoints are kept whatever comes after: the chosen one, and the best."""
        steps = [] if self.chosen_step is None else [self.chosen_step]
        return [*steps, *(step for step, _ in self.best if step not in steps)][: keeping.keep_best]

    def rank_step(
        self,
        figure: float | None,
        evaluation: EvaluateSection,
        keeping: CheckpointSection,
        error: float | None = None,
    ) -> bool:
        """Enter this step's validation figure; whether its checkpoint is one to keep.

        The earlier of two equal figures is the better one. The chosen step only ever moves to this one: it is the
        latest, so it is chosen where it is best, or within one standard error of the best.

        Args:
            figure: None (a loss that is not finite) is never among the best.
            error: its standard error; None: as 0.
        """
        if figure is None:
            return False
        sign = 1 if evaluation.select in ("loss", "distill_loss") else -1
        entries = sorted([*self.best, (self.step, figure)], key=lambda entry: (sign * entry[1], entry[0]))
        self.best = entries[: keeping.keep_best]
        best_step, best = self.best[0]
        if best_step == self.step:
            self.best_error, self.chosen = error, None
        elif evaluation.choose == "latest_within_se" and sign * (figure - best) <= (self.best_error or 0.0):
            self.chosen = self.step, figure, error
        return self.step in self.kept_steps(keeping)

    def choice(self, evaluation: EvaluateSection) -> dict[str, Any] | None:
        """Which validation figure chose the weights, beside the best one, each with its standard error."""
        if not self.best:
            return None
        step, figure = self.best[0]
        best = {"step": step, "figure": figure, "standard_error": self.best_error}
        chosen = best if self.chosen is None else dict(zip(best, self.chosen, strict=True))
        return {"select": evaluation.select, "choose": evaluation.choose, **chosen, "best": best}


class LossMeter:
    """Loss since the last log line, summed on the device so that no step waits for it.

    `settle` is where the host waits: it adds up over processes and finds the first step whose loss was not finite.
    """

    def __init__(self, clock: LoopState, processes: Processes) -> None:
        self._clock = clock
        self._processes = processes
        self._sums: list[tuple[int, Tensor]] = []

    def add(self, loss_sum: Tensor, num_images: int, step: int) -> None:
        """Enter a step (counted from 1): the loss summed over this process's images, and the global count."""
        self._sums.append((step, loss_sum))
        self._clock.window_images += num_images

    def settle(self) -> int | None:
        """Move what was added into the clock; the first step with a non-finite loss on any process, or None."""
        if not self._sums:
            return None
        steps = [step for step, _ in self._sums]
        totals = self._processes.sum(self._processes.to_cpu([loss for _, loss in self._sums]).double())
        self._sums.clear()
        for step, total in zip(steps, totals.tolist(), strict=True):
            if not math.isfinite(total):
                return step
            self._clock.window_loss += total
        return None

    def take_mean(self) -> float:
        """Mean loss of an image since the last call."""
        mean = self._clock.window_loss / max(self._clock.window_images, 1)
        self._clock.window_loss, self._clock.window_images = 0.0, 0
        return mean


def are_finite(network: Classifier) -> bool:
    """Whether all that is trained, as far as this process has it, is a number; what is not must never be saved."""
    trained = [local(param.detach()) for param in network.parameters() if param.requires_grad]
    return bool(torch.stack([param.isfinite().all() for param in trained]).all())
