"""Train: resume, then stages, steps and checkpoints, and a model in the end.

Promise: the step is the only clock. The learning rate, the order of images, augmentation and dropout are functions of
(recipe, step), so that a run that was stopped anywhere and resumed ends in the same weights, bit for bit, as one that
was not.

Shapes: B images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tlscale.data.decode import BadImageError
from tlscale.data.workers import most_workers
from tlscale.distributed.processes import Processes
from tlscale.distributed.signals import stopped_by
from tlscale.errors import NonFiniteLossError, Stopped, WorkerError, flag
from tlscale.recipe.seeds import derive_seed
from tlscale.storage.run_folder import RunFolder
from tlscale.tracking.console import Console
from tlscale.training import computed
from tlscale.training.cache_decision import refuse_codes_of_a_probe
from tlscale.training.checkpoint.files import Checkpoint, checkpoint_folder, pointed_to
from tlscale.training.checkpoint.run_state import point_to, restore, saved_loop_state
from tlscale.training.checkpoint.sharded import load_newest_on_all
from tlscale.training.finish import finish
from tlscale.training.input_pipeline import InputPipeline
from tlscale.training.logger import RunLogger
from tlscale.training.loop_state import LoopState, LossMeter
from tlscale.training.loss import Loss
from tlscale.training.nonfinite import FiniteCheck, are_finite
from tlscale.training.optimizer import set_lr
from tlscale.training.reading_check import ReadingCheck
from tlscale.training.run_info import begin_folder
from tlscale.training.setup import RunSetup
from tlscale.training.stages import stage_at
from tlscale.training.state import (
    TrainState,
    advance_stage,
    build_train_state,
    enter_stage,
    finite_check,
    save,
    stops_early,
    validate,
)
from tlscale.training.stop_poll import StopPoll
from tlscale.training.unread_images import telling_of_unread_images


def train(
    setup: RunSetup,
    folder: RunFolder,
    processes: Processes,
    run_info: dict[str, Any] | None,
    console: Console,
) -> tuple[dict[str, Any], str]:
    """Train, evaluate and export as the recipe asks; `run_info` are the contents of `run.json` when resuming.

    Returns:
        What `result.json` holds, and how to load the exported model.

    Raises:
        NonFiniteLossError: the loss or the weights became NaN or infinite.
        Stopped: the run was asked to stop; everything is saved.
    """
    refuse_codes_of_a_probe(setup.recipe.codes)
    # -- resume -------------------------------------------------------------------------------------------------------
    checkpoint = _newest_checkpoint(setup, folder, processes, run_info, console)
    loop = saved_loop_state(checkpoint) if checkpoint is not None else LoopState()
    # Decisions to train on codes that were made after this checkpoint are in run.json alone.
    loop.keeps_codes = {**(run_info or {}).get("keeps_codes", {}), **loop.keeps_codes}
    # Now, as it enters each stage on trial: later the network is wrapped.
    depending = computed.depends_on_passes(setup)
    # The stage of the last step that was made, not of the next step: a checkpoint at the end of a stage holds the
    # optimizer of that stage.
    state = build_train_state(setup, processes, console, stage_at(setup.stages, loop.step - 1))
    if checkpoint is not None:
        # Written again: the process that saved may have been killed before it wrote LATEST and BEST, or they point to a
        # checkpoint that is corrupt.
        processes.run_on_main(point_to, folder.checkpoints, loop)
        setup.watch.add_earlier(loop.spent_s)
        newest = checkpoint_folder(folder.checkpoints, loop.step)
        console.say(f"resumed from {newest}, at step {loop.step} of {setup.total_steps}")
    with telling_of_unread_images(setup, loop, folder, processes):
        _begin(state, loop, checkpoint)

    # -- the loop -----------------------------------------------------------------------------------------------------
    # The first file is written now, when all images are open: a bad image must not leave a half-begun run.
    if run_info is None:
        run_info = processes.run_on_main(begin_folder, folder, setup, processes.world_size, str(processes.device))
    split, engine = setup.split, processes.engine
    checkpointing = setup.recipe.compute.gradient_checkpointing
    start = computed.Computed(loop.step, split.world_size, split.micro_batch_size, engine.name, checkpointing)
    run_info = processes.run_on_main(computed.note_start, folder, run_info, start, loop, depending, console)
    loop.run_id = run_info.get("id")
    # The logger is closed before the console, so that its last lines are above the display. The watchdog ends before
    # both: while trackers send what is left, a long wait is no hang.
    with (
        console.begin(setup.total_steps, loop.step),
        RunLogger(setup, folder, processes, loop, run_info, console) as logger,
        processes.watchdog.watching(),
        setup.watch("train"),
    ):
        with telling_of_unread_images(setup, loop, folder, processes):
            # It may have been killed after the evaluation that it stopped early at.
            if not stops_early(state, loop):
                _train_stages(state, loop, logger, folder)
        with setup.watch("export"):
            return finish(state, loop, logger, folder, run_info)


def _train_stages(state: TrainState, loop: LoopState, logger: RunLogger, folder: RunFolder) -> None:
    """Make every step that is left, stage by stage."""
    setup, processes, due = state.setup, state.processes, state.due
    meter, stop_poll, say = LossMeter(loop, processes), StopPoll(processes, loop.step), state.codes_cache.console.say
    # The run ended in an evaluation (by a signal or a bad image): made up for before the next step changes the weights.
    if loop.awaits_evaluation and _rank_and_save(state, loop, logger, folder, is_due=True):
        return
    for stage in setup.stages[state.stage.number :]:
        if stage is not state.stage:  # the first one was entered before `run.json` was written
            with setup.watch("start"):
                advance_stage(state, stage)
                enter_stage(state, loop)
                # At once: a resumed run has to decide as this one did, also if it is killed before a checkpoint.
                processes.run_on_main(computed.note_decisions, folder, loop)
        reading = ReadingCheck(setup.watch, state.inputs.workers, most_workers(processes.world_size), say)
        # Closed whatever happens: the pipeline may have worker processes.
        with closing(state.inputs.steps(loop.step, stage.stop_step)) as steps:
            for micro_batches in setup.watch.each(_saving_before_errors(steps, state, loop, meter, logger, folder)):
                # -- train --------------------------------------------------------------------------------------------
                processes.watchdog.beat()
                if not state.ddp_is_warm:
                    warm_up_ddp(state, micro_batches[-1])
                num_images = setup.order.num_images_in(loop.step)
                # A function of the step: there is no scheduler whose state a checkpoint would have to hold.
                lr = set_lr(state.optimizer, stage.lr_factor(loop.step))
                trained = train_step(
                    state.model,
                    state.stepped,
                    state.loss_fn,
                    state.inputs,
                    micro_batches,
                    processes,
                    num_images=num_images,
                    # The step's own, and not drawn one after the other: a resumed run has to draw the same.
                    seed=derive_seed(setup.seed, "step", loop.step),
                    clip_grad_norm=stage.optim.clip_grad_norm,
                    # The check waits for the device in each step, so it is made only where the recipe asks for it.
                    check=finite_check(state) if state.non_finite.action == "skip" else None,
                )
                # Counted before anything is written: log lines and checkpoints bear the number of steps done.
                loop.step += 1
                _count_step(trained, num_images, state, loop, meter, logger, folder)

                # -- log, evaluate, save, stop: the host waits for the device only where one of them is due -----------
                is_milestone = due.save(loop.step) or due.evaluate(loop.step)
                # Before an evaluation or a save, which a stop should not wait for, and where processes meet anyway.
                stopping = stop_poll.is_stopping(loop.step, now=is_milestone)
                may_save = is_milestone or stopping  # an evaluation may find the best so far, which is saved
                if due.log(loop.step) or may_save:
                    # Before the save: no checkpoint may hold weights that are not finite.
                    _refuse_non_finite(meter.settle(), state, loop, folder, may_save=may_save)
                # No images: every step since the last line was skipped, and has a line of its own.
                if due.log(loop.step) and loop.window_images:
                    reading.at_line(loop.step, meter.settled_s)
                    logger.write_training(meter.take_mean(), lr, None if trained is None else trained.grad_norm)
                if _rank_and_save(state, loop, logger, folder, is_due=due.save(loop.step) or stopping):
                    return
                # After the last step nothing is left to resume: the model is exported in spite of the request.
                if stopping and loop.step < setup.total_steps:
                    raise _stopped(loop, setup, folder)


def _rank_and_save(state: TrainState, loop: LoopState, logger: RunLogger, folder: RunFolder, *, is_due: bool) -> bool:
    """Evaluate and rank the step where that is due, and save it where needed; return whether the run stops early.

    Raises:
        DataError: a validation image cannot be read; the step is saved, and evaluated when the run is resumed.
        Stopped: the run was asked to stop during the evaluation; the step is saved, and evaluated likewise.
    """
    is_kept = is_over = False
    # Before the save: a checkpoint holds the rank of its own step.
    if state.due.evaluate(loop.step) or loop.awaits_evaluation:
        loop.awaits_evaluation = True
        try:
            is_kept = validate(state, loop, logger)
        except (BadImageError, Stopped) as ended:
            save(state, loop, folder, logger)
            if isinstance(ended, Stopped):
                raise _stopped(loop, state.setup, folder) from None
            raise
        loop.awaits_evaluation = False
        is_over = stops_early(state, loop)
    if is_kept or is_due or is_over:
        save(state, loop, folder, logger)
    return is_over


def _saving_before_errors(
    steps: Iterator[list[Any]],
    state: TrainState,
    loop: LoopState,
    meter: LossMeter,
    logger: RunLogger,
    folder: RunFolder,
) -> Iterator[list[Any]]:
    """Yield each step's micro-batches; where reading them fails, save what was trained before the run ends."""
    began_at = loop.step
    try:
        yield from steps
    except (BadImageError, WorkerError):
        # Unless the newest checkpoint has all of it: made after the last step, or the one that this start began from.
        if loop.step > began_at and not state.due.save(loop.step):
            _refuse_non_finite(meter.settle(), state, loop, folder, may_save=True)
            save(state, loop, folder, logger)
        raise


class Trained(NamedTuple):
    """Hold the loss of a step, summed over this process's images, on the device, and the gradient's norm."""

    loss_sum: Tensor
    grad_norm: Tensor | None  # before clipping; None: it is not clipped, and so not computed


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Loss,
    inputs: InputPipeline,
    micro_batches: Sequence[Any],
    processes: Processes,
    *,
    num_images: int,
    seed: int,
    clip_grad_norm: float | None = None,
    check: FiniteCheck | None = None,
) -> Trained | None:
    """Make one optimizer step over this process's micro-batches.

    The gradient is that of the loss summed over all images of all processes, divided by their number: exact for short
    batches too, where a mean of means is not.

    Args:
        model, optimizer: as the engine wrapped them.
        micro_batches: of this process; the same number on each.
        num_images: in the step, over all processes.
        seed: of the step: dropout and stochastic depth.
        clip_grad_norm: the largest norm of the gradient; None: any.
        check: of this step; None: it is not checked.

    Returns:
        None where the step was checked and is not finite: it changed nothing.
    """
    if check is not None:
        check.begin()
    loss_sums = []
    for number, batch in enumerate(micro_batches):
        # Dropout and stochastic depth differ between processes and micro-batches, and are the same after a resume.
        processes.local.seed(derive_seed(seed, processes.rank, number))
        batch = batch.to(processes.device, non_blocking=True)
        # Gradients are summed over the processes in the last backward pass alone: one exchange a step.
        with processes.engine.micro_batch(model, is_last=number == len(micro_batches) - 1):
            losses_B = loss_fn(model(*inputs.inputs(batch)), batch)
            # A batch may be filled up with images that are not of the step: every process makes as many passes.
            loss_sum = losses_B[: batch.num_real].sum()
            # DDP and FSDP2 average over processes, where we want the sum: hence the world size.
            processes.accelerator.backward(loss_sum * processes.world_size / num_images)
        # Not read: the host would wait for the device in each step.
        loss_sums.append(loss_sum.detach())
    loss_sum = torch.stack(loss_sums).sum()
    # Before clipping, which would make all of a gradient NaN of one part, and before moments take it up.
    if check is not None and not check.is_finite(loss_sum):
        check.undo()
        return None
    grad_norm = processes.engine.clip_grad_norm(model, clip_grad_norm) if clip_grad_norm is not None else None
    optimizer.step()
    # To None, and not to zeros: a parameter without a gradient must not decay, nor move by its momentum.
    optimizer.zero_grad(set_to_none=True)
    return Trained(loss_sum, grad_norm)


def warm_up_ddp(state: TrainState, batch: Any) -> None:  # noqa: ANN401 (of the pipeline's own kind)
    """Warm up DDP: run one discarded forward and backward pass, so that its buckets are built before the first step.

    DDP lays out its gradient buckets anew after its first backward pass. Three processes or more add up in an order
    that depends on the place of a gradient, so without this the first step after a resume would be rounded in another
    way than the same step of a run that was not stopped.
    """
    processes = state.processes
    check = finite_check(state)
    check.begin()
    batch = batch.to(processes.device)
    processes.local.seed(derive_seed(state.setup.seed, "settle", processes.rank))
    losses_B = state.loss_fn(state.model(*state.inputs.inputs(batch)), batch)
    processes.accelerator.backward(losses_B[: batch.num_real].sum())
    check.undo()  # no trace is left but in DDP
    state.ddp_is_warm = True


def _newest_checkpoint(
    setup: RunSetup, folder: RunFolder, processes: Processes, run_info: dict[str, Any] | None, console: Console
) -> Checkpoint | None:
    """Return the newest valid checkpoint of the run, or None where it begins."""
    if run_info is None:
        return None
    # Chosen by all processes together: where one cannot read the newest, none may begin from it.
    checkpoint, unusable = load_newest_on_all(folder.checkpoints, setup.trained, processes, run_info.get("id"))
    for why in unusable:
        console.say(f"WARNING: {why}", style="bold red")
    return checkpoint


def _begin(state: TrainState, loop: LoopState, checkpoint: Checkpoint | None) -> None:
    """Enter the stage of the next step, with what the checkpoint holds."""

    def put_back() -> None:
        if checkpoint is not None:
            restore(checkpoint, state.network, state.optimizer, state.ema, state.setup.unchanging_keys)

    # Into the bare objects of the stage that was saved, before they are wrapped and before the stage is left; or, where
    # the engine shards, into the shards that come into being when the stage is entered.
    with state.processes.engine.restoring(put_back):
        # An evaluation that is owed is made in the stage that it was due in.
        stage = state.stage if loop.awaits_evaluation else stage_at(state.setup.stages, loop.step)
        if stage is not state.stage:
            advance_stage(state, stage)
        enter_stage(state, loop, checkpoint.state["scaler"] if checkpoint is not None else None)


def _count_step(
    trained: Trained | None,
    num_images: int,
    state: TrainState,
    loop: LoopState,
    meter: LossMeter,
    logger: RunLogger,
    folder: RunFolder,
) -> None:
    """Do what follows on each step, which is counted by now; nothing of it waits for the device."""
    if trained is None:
        _skip_step(state, loop, logger, folder)
    else:
        # After the update: the average is one of weights that the run has had.
        if state.ema is not None:
            state.ema.update(loop.step)
        meter.add(trained.loss_sum, num_images, loop.step)
    # XLA runs now what was recorded, so that each step is the same program.
    state.processes.local.mark_step()
    logger.trained(num_images)


def _skip_step(state: TrainState, loop: LoopState, logger: RunLogger, folder: RunFolder) -> None:
    """Write down that the step changed nothing; raise `NonFiniteLossError` where too many were skipped."""
    most = state.non_finite.most_steps
    loop.skipped_steps.append(loop.step)
    count = len(loop.skipped_steps)
    logger.write_skipped(count, most)
    if count > most:
        why = f"non_finite.most_steps is {most}, and {count} steps were skipped: "
        raise _non_finite(loop.step, folder, why)


def _refuse_non_finite(
    bad_step: int | None, state: TrainState, loop: LoopState, folder: RunFolder, *, may_save: bool
) -> None:
    # Where only the backward pass was not finite, the loss would show it in the next step: too late for this save.
    if bad_step is None and may_save and state.processes.any(not are_finite(state.network)):
        bad_step = loop.step
    if bad_step is not None:
        raise _non_finite(bad_step, folder)


def _non_finite(bad_step: int, folder: RunFolder, why: str = "") -> NonFiniteLossError:
    """Return the error that the loss or the weights are not finite: what is saved, and what to do."""
    newest = pointed_to(folder.checkpoints, "LATEST")
    last = f"The last checkpoint is {newest}" if newest else "There is no checkpoint yet"
    return NonFiniteLossError(
        f"{why}the loss or the weights became NaN or infinite at step {bad_step}; up to step {bad_step - 1} all was "
        f"finite. {last}; nothing was saved after",
        bad_step,
        remedy="Lower optim.lr, lengthen schedule.warmup, set optim.clip_grad_norm=1.0, or use compute.precision=fp32; "
        "non_finite.action=skip skips single steps.",
    )


def _stopped(loop: LoopState, setup: RunSetup, folder: RunFolder) -> Stopped:
    """Tell that the run was stopped, and by what."""
    return Stopped(
        f"stopped by {stopped_by()} after step {loop.step} of {setup.total_steps}; all is saved in '{folder.path}'",
        remedy="The same line with " + flag("resume") + " resumes it.",
    )
