"""What a run remembers: the little that is not a function of the step, and how all of it is saved and comes back.

Promise: after `restore` the run is where `snapshot` found it, on any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tlscale import faults
from tlscale.distributed.fsdp import local
from tlscale.distributed.processes import Processes
from tlscale.errors import CheckpointError
from tlscale.models.classifier import Classifier
from tlscale.recipe.schema import CheckpointSection, EvaluateSection
from tlscale.training.checkpoint.files import (
    Checkpoint,
    mark_best,
    mark_latest,
    prune,
    save_checkpoint,
)
from tlscale.training.checkpoint.optimizer_state import pack_optimizer, unpack_optimizer
from tlscale.training.ema import Ema


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


def snapshot(
    clock: LoopState,
    network: Classifier,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    accelerator: Accelerator,
    *,
    spent_s: dict[str, float] | None = None,
    fixed: Collection[str] = (),
) -> Checkpoint:
    """All that a run is, as a checkpoint.

    Args:
        spent_s: seconds of each part of the run so far.
        fixed: names in the network's state dict of what the run cannot change. They are left out: the weights that the
            run began with, whose identity is in `run.json`, have them.
    """
    tensors, plain = pack_optimizer(optimizer)
    weights = {name: tensor for name, tensor in network.state_dict().items() if name not in fixed}
    groups: dict[str, dict[str, Tensor]] = {"model": weights, "optimizer": tensors}
    if ema is not None:
        groups["ema"] = ema.averages
    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
    state = {"clock": {**asdict(clock), "spent_s": spent_s or {}}, "optimizer": plain, "scaler": scaler}
    return Checkpoint(clock.step, groups, state, clock.run_id)


def restore(
    checkpoint: Checkpoint,
    network: Classifier,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    fixed: Collection[str] = (),
) -> None:
    """Put a checkpoint back into the objects of a run; its clock is `saved_loop_state`.

    Args:
        optimizer: of the stage that the checkpoint was saved in.
        fixed: as `snapshot` was given it; the network has the weights that the run began with.

    Raises:
        CheckpointError: it is of another network.
    """
    restore_weights(checkpoint, network, ema, fixed)
    unpack_optimizer(optimizer, checkpoint.tensors["optimizer"], checkpoint.state["optimizer"])
    faults.at("restored")


def saved_loop_state(checkpoint: Checkpoint) -> LoopState:
    """The clock that a checkpoint was saved at."""
    saved = dict(checkpoint.state["clock"])
    if "elapsed_s" in saved:  # of an older version, which told no more apart
        train_s = saved.pop("train_s")
        saved["spent_s"] = {"start": max(saved.pop("elapsed_s") - train_s, 0.0), "train": train_s}
    best = [(int(step), float(figure)) for step, figure in saved["best"]]
    chosen = saved.get("chosen")  # checkpoints of older versions have none
    return LoopState(**{**saved, "best": best, "chosen": None if chosen is None else tuple(chosen)})


def restore_weights(checkpoint: Checkpoint, network: Classifier, ema: Ema | None, fixed: Collection[str] = ()) -> None:
    """Put the weights, and their averages, of a checkpoint of any stage back; arguments and errors as `restore`."""
    weights = dict(checkpoint.tensors["model"])
    lacking = [name for name in network.state_dict() if name not in weights and name not in fixed]
    if lacking:
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} lacks {len(lacking)} of the network's tensors: {lacking[0]} ..."
        )
    network.load_state_dict(weights, strict=not fixed)
    if ema is not None:
        ema.load(checkpoint.tensors["ema"])


def write_checkpoint(root: Path, checkpoint: Checkpoint, clock: LoopState, section: CheckpointSection) -> None:
    """Save, point BEST to the chosen step, and only then remove what need not be kept."""
    save_checkpoint(root, checkpoint)
    faults.at("checkpoint.best")
    tidy_up(root, clock, section)


def tidy_up(root: Path, clock: LoopState, section: CheckpointSection) -> None:
    """After a save: point BEST to the chosen step, and remove what need not be kept."""
    if clock.chosen_step is not None:
        mark_best(root, clock.chosen_step)
    prune(root, keep=section.keep, keep_steps=clock.kept_steps(section), run_id=clock.run_id)


def point_to(root: Path, clock: LoopState) -> None:
    """Have LATEST and BEST say what a run goes on from; who wrote it may have been killed, or newer ones be damaged.

    Raises:
        CheckpointError: the disk is full or cannot be written.
    """
    mark_latest(root, clock.step)
    if clock.chosen_step is not None:
        mark_best(root, clock.chosen_step)
