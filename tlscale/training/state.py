"""The objects of a training run, and what becomes of them from stage to stage and from start to start.

Promise: whoever wraps the network (Accelerate, FSDP2) is known here; checkpoints and export are of the bare one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tlscale.codes.cache import CodesCache
from tlscale.data.sources.open import ImageSplit
from tlscale.distributed.consistency import check_replicas_agree
from tlscale.distributed.fsdp import Fsdp2Engine, meta_copy, sharded_groups
from tlscale.distributed.processes import Processes
from tlscale.distributed.signals import StopRequest
from tlscale.errors import NonFiniteLossError
from tlscale.models.classifier import Classifier
from tlscale.models.freeze import is_norm
from tlscale.storage.run_folder import RunFolder
from tlscale.tracking.console import Console
from tlscale.training.checkpoint.run_state import snapshot, write_checkpoint
from tlscale.training.distillation.targets import Targets, ask_teacher
from tlscale.training.ema import Ema
from tlscale.training.evaluate import evaluate
from tlscale.training.input_pipeline import InputPipeline, open_pipeline
from tlscale.training.logger import RunLogger
from tlscale.training.loop_state import LoopState
from tlscale.training.loss import Objective
from tlscale.training.optimizer import build_optimizer
from tlscale.training.optimizer_trial import check_optimizer_shards
from tlscale.training.predictions import Predictions
from tlscale.training.replicas import replicated_tensors
from tlscale.training.setup import RunSetup, make_objective, open_codes_cache
from tlscale.training.stages import Stage, cross_boundary, enter


@dataclass
class Parts:
    """The objects of a run; `network` is the bare one, which checkpoints and export are of."""

    setup: RunSetup
    processes: Processes
    network: Classifier
    ema: Ema | None
    objective: Objective
    codes_cache: CodesCache
    careful_until: int  # steps before this one are looked at before their update
    # Of the stage that the run is in:
    stage: Stage
    optimizer: torch.optim.Optimizer
    feed: InputPipeline | None = None
    targets: Targets | None = None  # of all stages, where there is a teacher
    # What is called and stepped: what Accelerate, or FSDP2, made of the feed's module.
    wrapped: tuple[nn.Module, torch.optim.Optimizer] | None = None
    hollow: Classifier | None = None  # where the network is spread over the processes: what is exported in its place
    is_rehearsed: bool = True  # false before the first step of a start or a stage, where it matters

    def figures(
        self,
        split: ImageSplit,
        feed: InputPipeline,
        *,
        error_of: str | None = None,
        predictions: Predictions | None = None,
    ) -> dict[str, Any]:
        """Evaluate the weights that a user would get: the averages, where averages are kept.

        Args:
            error_of: the figure whose standard error is wanted, too.
            predictions: takes them image by image, where they are wanted.
        """
        self.processes.broadcast_buffers(self.network)
        with self.averaged():
            return evaluate(
                feed.module,
                feed.eval_batches(split),
                inputs=feed.inputs,
                num_images=len(split),
                objective=self.objective,
                classes=self.setup.data.classes,
                processes=self.processes,
                lockstep=self.hollow is not None,
                error_of=error_of,
                predictions=predictions,
            )

    def averaged(self) -> AbstractContextManager[None]:
        """Within: the network has its averaged weights, where averages are kept."""
        return nullcontext() if self.ema is None else self.ema.in_place()


def make_parts(
    setup: RunSetup, processes: Processes, stop: StopRequest, console: Console, stage: Stage, careful_until: int
) -> Parts:
    """What a run begins with, in `stage`; nothing is wrapped yet.

    Args:
        careful_until: steps before this one are looked at before their update.
    """
    recipe, device = setup.recipe, processes.device
    network = processes.to_device(setup.classifier)
    enter(network, stage)
    return Parts(
        setup,
        processes,
        network,
        None if processes.engine.shards else _averages(setup),
        make_objective(setup, device),
        open_codes_cache(setup, processes, console, stop),
        careful_until if recipe.non_finite.action != "skip" else setup.total_steps,
        stage,
        build_optimizer(stage.groups, stage.optim),
    )


def _averages(setup: RunSetup) -> Ema | None:
    decay = setup.recipe.optim.ema_decay
    return Ema(setup.trained, decay) if decay is not None else None


def begin_stage(parts: Parts, clock: LoopState, scaler_state: dict[str, Any] | None) -> None:
    """Open the feed of the stage, which may compute codes, and have Accelerate wrap what is trained."""
    setup, accelerator, key = parts.setup, parts.processes.accelerator, str(parts.stage.number)
    decided = clock.keeps_codes.get(key)
    parts.codes_cache.forget_loaded()
    if parts.targets is None:
        parts.targets = ask_teacher(setup, parts.processes, parts.codes_cache)
    parts.feed, keeps = open_pipeline(
        parts.stage, setup, parts.processes, parts.codes_cache, targets=parts.targets, decided=decided
    )
    clock.keeps_codes[key] = keeps
    if setup.recipe.compute.compile:
        parts.feed.module.compile()
    parts.feed.module.train()
    engine = parts.processes.engine
    if isinstance(engine, Fsdp2Engine):
        _shard(parts, parts.feed.module, engine)
    parts.wrapped = engine.wrap(parts.feed.module, parts.optimizer)
    parts.is_rehearsed = not engine.needs_warm_up(parts.wrapped[0])
    parts.processes.mark_step()  # what was loaded; else the first step would be a program of its own
    if scaler_state is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(scaler_state)


def _shard(parts: Parts, module: nn.Module, engine: Fsdp2Engine) -> None:
    """Shard what is trained over the processes; the optimizer and the averages are of each one's shards."""
    setup, stage = parts.setup, parts.stage
    check_optimizer_shards(stage.optim, engine.mesh, parts.processes)
    parts.hollow = meta_copy(parts.network)
    norms = [param for layer in module.modules() if is_norm(layer) for param in layer.parameters(recurse=False)]
    num_blocks = engine.shard(module, parts.network, setup.recipe.compute.precision, keep_fp32=norms)
    groups = sharded_groups(stage.groups, parts.network.rule_names())
    parts.optimizer, parts.ema = build_optimizer(groups, stage.optim), _averages(setup)
    parts.codes_cache.console.say(
        f"fsdp2: {setup.trainable_params:,} trained parameters sharded over {engine.mesh.size()} processes, "
        f"{num_blocks} blocks unsharded one after the other"
    )


def next_stage(parts: Parts) -> None:
    """Leave the stage that is over: unwrap, freeze, and build the optimizer again with the moments that go on."""
    unwrap(parts)
    # Batch statistics differ by rank until they are shared, and what is frozen now must be the same on all.
    parts.processes.broadcast_buffers(parts.network)
    parts.stage = parts.setup.stages[parts.stage.number + 1]
    parts.optimizer = cross_boundary(parts.network, parts.optimizer, parts.ema, parts.stage)


def unwrap(parts: Parts) -> None:
    """Take off what Accelerate put around (and, for mixed precision, into) the module that was trained."""
    if parts.feed is not None:
        parts.processes.engine.unwrap(parts.feed.module)
        parts.feed, parts.wrapped = None, None


@contextmanager
def unwrapping(parts: Parts) -> Iterator[None]:
    """Within: a loss that is not finite leaves the network bare, so that the run can begin again in this process."""
    try:
        yield
    except NonFiniteLossError:
        unwrap(parts)
        raise


def validate(parts: Parts, clock: LoopState, book: RunLogger) -> bool:
    """Evaluate the validation images and rank the step; whether its checkpoint is one to keep."""
    recipe, split = parts.setup.recipe, parts.setup.data.validation
    assert split is not None
    assert parts.feed is not None
    select = recipe.evaluate.select
    with parts.setup.watch("evaluate"):
        figures = parts.figures(split, parts.feed, error_of=select)
    is_kept = clock.rank_step(figures[select], recipe.evaluate, recipe.checkpoint, figures[f"{select}_se"])
    book.write_evaluation("validation", figures, is_best=clock.chosen_step == clock.step, error_of=select)
    return is_kept


def save(parts: Parts, clock: LoopState, folder: RunFolder) -> None:
    """Make a checkpoint of the run, on all processes.

    Raises:
        DesyncError: the processes do not have the same weights any more.
        CheckpointError: the disk is full or cannot be written; the checkpoints before are untouched.
    """
    with parts.setup.watch("save"):
        _save(parts, clock, folder)


def _save(parts: Parts, clock: LoopState, folder: RunFolder) -> None:
    processes, keeping = parts.processes, parts.setup.recipe.checkpoint
    processes.broadcast_buffers(parts.network)
    check_replicas_agree(replicated_tensors(parts.network, parts.ema), processes, clock.step)
    checkpoint = snapshot(
        clock,
        parts.network,
        parts.optimizer,
        parts.ema,
        processes.accelerator,
        spent_s=parts.setup.watch.spent(),
        fixed=parts.setup.fixed,
    )
    write_checkpoint(folder.checkpoints, checkpoint, clock, keeping, processes)
