"""Remember the little of a run that is not a function of the step, and tell what follows on a step.

Names on disk (`clock` of a checkpoint's `state.json`) are those of the first version, whatever the fields are called.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from tlscale.distributed.processes import Processes
from tlscale.recipe.schema import CheckpointSection, EvaluateSection

_ON_DISK = {"skipped_steps": "left_out"}
"""Fields of `LoopState` whose key in `state.json` has another name."""


@dataclass
class LoopState:
    """Hold the step, and what is saved with it in a checkpoint's `state.json`."""

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
    skipped_steps: list[int] = field(default_factory=list)  # they changed nothing, as something was not finite
    awaits_evaluation: bool = False  # the step was saved, and could not be evaluated

    def to_plain(self) -> dict[str, Any]:
        """Return the `clock` of `state.json`."""
        plain = {_ON_DISK.get(name, name): value for name, value in asdict(self).items()}
        return plain if self.awaits_evaluation else {k: v for k, v in plain.items() if k != "awaits_evaluation"}

    @classmethod
    def from_plain(cls, saved: Mapping[str, Any]) -> LoopState:
        """Read the `clock` of a `state.json`, also of older versions."""
        saved = dict(saved)
        if "elapsed_s" in saved:  # older versions told only training from the rest
            train_s = saved.pop("train_s")
            saved["spent_s"] = {"start": max(saved.pop("elapsed_s") - train_s, 0.0), "train": train_s}
        saved |= {name: saved.pop(key) for name, key in _ON_DISK.items() if key in saved}
        best = [(int(step), float(figure)) for step, figure in saved["best"]]
        chosen = saved.get("chosen")  # older versions chose the best always
        return cls(**{**saved, "best": best, "chosen": None if chosen is None else tuple(chosen)})

    @property
    def best_step(self) -> int | None:
        """The step of the best validation figure."""
        return self.best[0][0] if self.best else None

    @property
    def chosen_step(self) -> int | None:
        """The step whose weights would be exported now."""
        return self.chosen[0] if self.chosen else self.best_step

    def kept_steps(self, keeping: CheckpointSection) -> list[int]:
        """Return the steps whose checkpoints are kept whatever comes after: the chosen one, and the best."""
        steps = [] if self.chosen_step is None else [self.chosen_step]
        return [*steps, *(step for step, _ in self.best if step not in steps)][: keeping.keep_best]

    def rank_step(
        self,
        figure: float | None,
        evaluation: EvaluateSection,
        keeping: CheckpointSection,
        error: float | None = None,
    ) -> bool:
        """Enter this step's validation figure and its standard `error`; return whether its checkpoint is one to keep.

        The earlier of two equal figures is the better one; None (a loss that is not finite) is never among the best.
        The chosen step only ever moves to this one: it is the latest, so it is chosen where it is best, or within one
        standard error of the best.
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
        """Return the validation figure that chose the weights and the best one, each with its standard error."""
        if not self.best:
            return None
        step, figure = self.best[0]
        best = {"step": step, "figure": figure, "standard_error": self.best_error}
        chosen = best if self.chosen is None else dict(zip(best, self.chosen, strict=True))
        return {"select": evaluation.select, "choose": evaluation.choose, **chosen, "best": best}


@dataclass(frozen=True)
class Due:
    """Tell what follows on a step (counted from 1); a function of the step, the same on every process."""

    last_step: int
    stage_ends: Sequence[int]  # their last steps: what comes after one may take long, and a stop must not lose it
    log_every: int
    save_every: int
    evaluate_every: int | None  # None: there is no validation split
    patience: int | None = None  # evaluations in a row that may be no better; None: any
    patient_from: int = 0  # the step that the last stage starts at

    def log(self, step: int) -> bool:
        return step % self.log_every == 0 or step == self.last_step

    def save(self, step: int) -> bool:
        return step % self.save_every == 0 or step in self.stage_ends

    def evaluate(self, step: int) -> bool:
        return self.evaluate_every is not None and (step % self.evaluate_every == 0 or step == self.last_step)

    def stop_early(self, step: int, best_step: int | None) -> bool:
        """Report whether patience ends at the evaluation of `step`; a function of when the best one was."""
        if self.patience is None or self.evaluate_every is None or not self.evaluate(step) or step >= self.last_step:
            return False
        since = max(best_step or 0, self.patient_from)
        return step // self.evaluate_every - since // self.evaluate_every >= self.patience


class LossMeter:
    """Sum the loss since the last log line, on the device so that no step waits for it.

    `settle` is where the host waits: it adds up over processes and finds the first step whose loss was not finite.
    """

    def __init__(self, loop: LoopState, processes: Processes) -> None:
        self._loop = loop
        self._processes = processes
        self._sums: list[tuple[int, Tensor]] = []
        self.settled_s = 0.0  # that the host has waited for the device

    def add(self, loss_sum: Tensor, num_images: int, step: int) -> None:
        """Enter a step (counted from 1): the loss summed over this process's images, and the global count."""
        self._sums.append((step, loss_sum))
        self._loop.window_images += num_images

    def settle(self) -> int | None:
        """Move what was added into the loop state; return the first step with a non-finite loss anywhere, or None."""
        if not self._sums:
            return None
        steps = [step for step, _ in self._sums]
        began_s = time.monotonic()
        sums = self._processes.local.to_cpu([loss for _, loss in self._sums])
        self.settled_s += time.monotonic() - began_s
        totals = self._processes.sum(sums.double())
        self._sums.clear()
        for step, total in zip(steps, totals.tolist(), strict=True):
            if not math.isfinite(total):
                return step
            self._loop.window_loss += total
        return None

    def take_mean(self) -> float:
        """Return the mean loss of an image since the last call."""
        mean = self._loop.window_loss / max(self._loop.window_images, 1)
        self._loop.window_loss, self._loop.window_images = 0.0, 0
        return mean
