"""THE story of training: stages, steps, checkpoints, and a model in the end.

Chapters: resume; the loop; finish. The step is the only clock: the learning rate, the order of images, augmentation
and dropout are functions of (recipe, step), so that a run that was stopped anywhere and resumed ends in the same
weights, bit for bit, as one that was not.

Shapes: B images, C classes.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from tlscale import faults
from tlscale.commands.tables import show_result
from tlscale.data.identity import result_identity
from tlscale.data.sources.open import ImageSplit
from tlscale.distributed.processes import Processes
from tlscale.distributed.signals import StopRequest
from tlscale.errors import NonFiniteLossError, Stopped
from tlscale.models.export import export_model
from tlscale.recipe.seeds import derive_seed
from tlscale.storage.files import naming_disk_errors, write_json
from tlscale.storage.run_folder import RunFolder
from tlscale.tracking.console import Console
from tlscale.tracking.places import places_of, without_places
from tlscale.training import computed
from tlscale.training.checkpoint.files import Checkpoint, checkpoint_folder
from tlscale.training.checkpoint.run_state import point_to, restore, restore_weights, saved_loop_state
from tlscale.training.checkpoint.sharded import load_newest_on_all, load_on_all
from tlscale.training.endings import non_finite, stopped
from tlscale.training.evaluate import scalars
from tlscale.training.input_pipeline import ImagePipeline, refuse_codes_of_a_probe
from tlscale.training.logger import RunLogger
from tlscale.training.loop_state import LoopState, LossMeter, are_finite
from tlscale.training.nonfinite import Vigil
from tlscale.training.optimizer import set_lr
from tlscale.training.predictions import Predictions, write_predictions
from tlscale.training.run_info import begin_folder, read_record
from tlscale.training.scores import fitted, score_of_training
from tlscale.training.setup import Due, RunSetup, strategy_of
from tlscale.training.stages import stage_at
from tlscale.training.state import Parts, begin_stage, make_parts, next_stage, save, unwrap, unwrapping, validate


def train(
    setup: RunSetup,
    folder: RunFolder,
    processes: Processes,
    stop: StopRequest,
    record: dict[str, Any] | None,
    console: Console,
) -> dict[str, Any]:
    """Train as the recipe says; what `result.json` holds.

    Args:
        record: `run.json` of the run that is gone on with; None where a new one begins.
    """
    refuse_codes_of_a_probe(setup.recipe)
    careful_until = 0
    while True:
        try:
            return _train(setup, folder, processes, stop, record, console, careful_until)
        except NonFiniteLossError as error:
            # A step that was looked at and found good would end there again.
            if setup.recipe.non_finite.action != "rollback" or error.step <= careful_until:
                raise
            careful_until = error.step
            console.say(
                f"WARNING: not finite at step {error.step}: back to the last checkpoint, to leave out what is not",
                style="bold red",
            )
        record = processes.run_on_main(read_record, folder)


def _train(
    setup: RunSetup,
    folder: RunFolder,
    processes: Processes,
    stop: StopRequest,
    record: dict[str, Any] | None,
    console: Console,
    careful_until: int,
) -> dict[str, Any]:
    # -- resume -------------------------------------------------------------------------------------------------------
    run_id = record.get("id") if record is not None else None
    checkpoint = None
    if record is not None:
        checkpoint, unusable = load_newest_on_all(folder.checkpoints, setup.trained, processes, run_id)
        for why in unusable:
            console.say(f"WARNING: {why}", style="bold red")
    hangs_on = computed.what_hangs_on_passes(setup)
    saved_in = stage_at(setup.stages, checkpoint.step - 1 if checkpoint is not None else 0)
    parts = make_parts(setup, processes, stop, console, saved_in, careful_until)
    clock = saved_loop_state(checkpoint) if checkpoint is not None else LoopState()
    computed.keep_decisions(record, clock)
    if checkpoint is not None:
        processes.run_on_main(point_to, folder.checkpoints, clock)
        if careful_until == 0:  # else what it tells of is of this very start
            setup.watch.add_earlier(clock.spent_s)
        source = checkpoint_folder(folder.checkpoints, clock.step)
        console.say(f"resumed from {source}, at step {clock.step} of {setup.total_steps}")
    _go_on(checkpoint, clock, parts)

    # -- the loop: its first file is written when all images are there, so that bad ones leave no half-begun run ----
    start = computed.of_start(setup, processes, clock.step)
    record = processes.run_on_main(_record, record, folder, setup, processes, start, clock, hangs_on, console)
    clock.run_id = record.get("id")
    if checkpoint is None and setup.recipe.non_finite.action == "rollback":
        save(parts, clock, folder)  # something to go back to
    with (
        unwrapping(parts),
        console.begin(setup.total_steps, clock.step) as progress,
        RunLogger(setup, folder, processes, clock, record, progress) as book,
        processes.watchdog.watching(),
        setup.watch("train"),
        closing(_steps(parts, clock, book, folder)) as steps,
    ):
        window, due = LossMeter(clock, processes), Due(setup)
        for batches in steps:
            # Train.
            lr, grad_norm = _make_step(batches, parts, clock, window, book, folder)

            # Log, evaluate, save, stop: the host waits for the device only where one of them is due.
            stopping = processes.any(stop.requested)
            due_save = due.save(clock.step) or stopping
            may_save = due_save or due.evaluate(clock.step)  # the best so far is saved too
            if due.log(clock.step) or may_save:
                _refuse_non_finite(window.settle(), clock, parts, folder, may_save=may_save)
            if due.log(clock.step) and clock.window_images:
                norm = {} if grad_norm is None else {"grad_norm": float(grad_norm)}
                book.write_training({"loss": window.take_mean(), "lr": lr, **norm})
            if due.evaluate(clock.step):
                due_save = validate(parts, clock, book) or due_save
            if due_save:
                save(parts, clock, folder)
            if stopping and clock.step < setup.total_steps:
                raise Stopped(stopped(stop, clock, setup, folder))
        with setup.watch("export"):
            return _finish(parts, clock, book, folder, progress, record)


def _record(
    record: dict[str, Any] | None,
    folder: RunFolder,
    setup: RunSetup,
    processes: Processes,
    start: computed.Computed,
    clock: LoopState,
    hangs_on: list[str],
    console: Console,
) -> dict[str, Any]:
    """`run.json` of a run that begins, or that goes on in the way of this start."""
    if record is None:
        record = begin_folder(folder, setup, world_size=processes.world_size, device=str(processes.device))
    return computed.note_start(folder, record, start, clock, hangs_on, console)


def _go_on(checkpoint: Checkpoint | None, clock: LoopState, parts: Parts) -> None:
    """Begin where the checkpoint was made, or at the beginning.

    It is put into the bare objects of the stage that it is of, before Accelerate wraps them; what is spread over the
    processes comes into being with the feed, and takes its share after that.
    """
    fixed, is_spread = parts.setup.fixed, parts.processes.engine.shards
    if checkpoint is not None and not is_spread:
        restore(checkpoint, parts.network, parts.optimizer, parts.ema, fixed)
    if stage_at(parts.setup.stages, clock.step) is not parts.stage:
        next_stage(parts)
    begin_stage(parts, clock, checkpoint.state["scaler"] if checkpoint is not None else None)
    if checkpoint is not None and is_spread:
        restore(checkpoint, parts.network, parts.optimizer, parts.ema, fixed)


def _make_step(
    batches: list[Any], parts: Parts, clock: LoopState, window: LossMeter, book: RunLogger, folder: RunFolder
) -> tuple[float, Tensor | None]:
    """A step of the run: what is learned, and what is remembered of it; the learning rate, and the clipped norm."""
    setup = parts.setup
    parts.processes.watchdog.beat()
    num_images = setup.order.num_images_in(clock.step)
    lr = set_lr(parts.optimizer, parts.stage.lr_factor(clock.step))
    seed = derive_seed(setup.recipe.seed, "step", clock.step)
    made = train_step(batches, parts, num_images=num_images, seed=seed, step=clock.step)
    clock.step += 1
    grad_norm = None
    if made is None:
        _leave_out(clock, parts, book, folder)
    else:
        loss_sum, grad_norm = made
        if parts.ema is not None:
            parts.ema.update(clock.step)
        window.add(loss_sum, num_images, clock.step)
    parts.processes.mark_step()
    book.trained(num_images)
    return lr, grad_norm


def _steps(parts: Parts, clock: LoopState, book: RunLogger, folder: RunFolder) -> Generator[list[Any], None, None]:
    """The batches of every step that is left, over all stages; a stage is begun when its first step comes."""
    stages = parts.setup.stages
    while True:
        assert parts.feed is not None
        with closing(parts.feed.steps(clock.step, parts.stage.stop_step)) as steps:
            yield from parts.setup.watch.each(steps)
        if parts.stage is stages[-1]:
            return
        with parts.setup.watch("start"):
            next_stage(parts)
            begin_stage(parts, clock, None)
            parts.processes.run_on_main(computed.note_decisions, folder, clock)


def _leave_out(clock: LoopState, parts: Parts, book: RunLogger, folder: RunFolder) -> None:
    """Write down that the step changed nothing.

    Raises:
        NonFiniteLossError: there were too many of them.
    """
    most = parts.setup.recipe.non_finite.most_steps
    clock.left_out.append(clock.step)
    book.write_left_out(len(clock.left_out), most)
    if len(clock.left_out) > most:
        why = f"{len(clock.left_out)} steps were left out, and non_finite.most_steps is {most}. "
        raise NonFiniteLossError(why + non_finite(clock.step, folder), clock.step)


def _refuse_non_finite(
    bad_step: int | None, clock: LoopState, parts: Parts, folder: RunFolder, *, may_save: bool
) -> None:
    if bad_step is None and may_save and parts.processes.any(not are_finite(parts.network)):
        bad_step = clock.step  # in the backward pass: the loss would show it in the next step
    if bad_step is not None:
        raise NonFiniteLossError(non_finite(bad_step, folder), bad_step)


def _finish(
    parts: Parts, clock: LoopState, book: RunLogger, folder: RunFolder, progress: Console, record: dict[str, Any]
) -> dict[str, Any]:
    """The last and the chosen weights on the split that chose nothing; the chosen ones are exported."""
    setup, processes, feed = parts.setup, parts.processes, parts.feed
    assert feed is not None
    split = setup.data.test or setup.data.validation
    assert split is not None, "prepare refuses data that nothing can be evaluated on"
    predictions = Predictions(split, setup.data.classes)
    with setup.watch("test"):
        last = {"step": clock.step, **parts.figures(split, feed, predictions=predictions)}
    best = last
    if clock.chosen_step is not None and clock.chosen_step != clock.step:
        # By its step, and not by what BEST points to: that is for people, and may be older than the clock.
        best_folder = checkpoint_folder(folder.checkpoints, clock.chosen_step)
        checkpoint = load_on_all(best_folder, setup.trained, processes, clock.run_id)
        restore_weights(checkpoint, parts.network, parts.ema, setup.fixed)
        if clock.chosen_step <= parts.stage.start_step:  # of another stage, whose frozen part was another
            feed = ImagePipeline(setup, processes, parts.network, parts.codes_cache.images, parts.targets)
        predictions = Predictions(split, setup.data.classes)
        with setup.watch("test"):
            best = {"step": clock.chosen_step, **parts.figures(split, feed, predictions=predictions)}
    unwrap(parts)  # the exported model has to give its logits without what mixed precision does to them
    with parts.averaged():
        parts.network = processes.engine.gather(parts.network, parts.hollow, keep=processes.is_main)
        how = processes.run_on_main(_export, parts, folder)
    write_predictions(folder.predictions, predictions, processes)
    result = _result(parts, clock, split, best=best, last=last)
    result["changes"] = record["changes"]  # of how it was computed, from start to start
    result |= processes.run_on_main(result_identity, setup.data)
    processes.run_on_main(_write_result, result, folder)
    book.write_summary(result)
    show_result(result, progress, folder=folder.path, how_to_load=how)
    return result


def _export(parts: Parts, folder: RunFolder) -> str:
    setup = parts.setup
    with naming_disk_errors(folder.model):
        return export_model(
            parts.network,
            folder.model,
            head=setup.recipe.head,
            classes=setup.data.classes,
            spec=setup.spec,
            fitted=fitted(setup),
        )


def _write_result(result: dict[str, Any], folder: RunFolder) -> None:
    faults.at("result")
    with naming_disk_errors(folder.result):
        write_json(folder.result, result)


def train_step(
    batches: list[Any], parts: Parts, *, num_images: int, seed: int, step: int
) -> tuple[Tensor, Tensor | None] | None:
    """One optimizer step over this process's micro-batches.

    The gradient is that of the loss summed over all images of all processes, divided by their number `num_images`:
    exact for short batches too, where a mean of means is not. DDP and FSDP2 average over processes, hence the world
    size.

    Returns:
        The loss summed over this process's images, on the device, and the norm of the gradient where it is clipped.
        None where `step` (from 0) is one that is looked at, and was not finite: it changed nothing.
    """
    processes, accelerator = parts.processes, parts.processes.accelerator
    assert parts.feed is not None
    assert parts.wrapped is not None
    inputs, (model, optimizer) = parts.feed.inputs, parts.wrapped
    if not parts.is_rehearsed:
        _rehearse(batches[-1], parts)
    vigil = _vigil(parts) if step < parts.careful_until else None
    loss_sums = []
    for number, batch in enumerate(batches):
        # Dropout and stochastic depth differ between processes and micro-batches, and are the same after a resume.
        processes.seed(derive_seed(seed, processes.rank, number))
        batch = batch.to(processes.device, non_blocking=True)
        is_last = number == len(batches) - 1
        with processes.engine.micro_batch(model, is_last=is_last):
            losses_B = parts.objective.of_batch(model(*inputs(batch)), batch)
            loss_sum = losses_B[: batch.num_real].sum()
            accelerator.backward(loss_sum * processes.world_size / num_images)
        loss_sums.append(loss_sum.detach())
    loss_sum = torch.stack(loss_sums).sum()
    if vigil is not None and vigil.is_bad(loss_sum):
        vigil.undo()
        return None
    clip = parts.setup.recipe.optim.clip_grad_norm
    grad_norm = processes.engine.clip_grad_norm(model, clip) if clip is not None else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss_sum, grad_norm


def _rehearse(batch: Any, parts: Parts) -> None:
    """A forward and a backward pass that leave no trace but in DDP, which then knows the order of the gradients.

    It lays them out anew after its first backward pass. Three processes or more add up in an order that depends on the
    place of a gradient, so without this the first step after a resume would be rounded in another way than the same
    step of a run that was not stopped.
    """
    assert parts.feed is not None
    assert parts.wrapped is not None
    processes = parts.processes
    vigil, batch = _vigil(parts), batch.to(processes.device)
    processes.seed(derive_seed(parts.setup.recipe.seed, "settle", processes.rank))
    losses_B = parts.objective.of_batch(parts.wrapped[0](*parts.feed.inputs(batch)), batch)
    processes.accelerator.backward(losses_B[: batch.num_real].sum())
    vigil.undo()
    parts.is_rehearsed = True


def _vigil(parts: Parts) -> Vigil:
    scales_loss = parts.processes.accelerator.scaler is not None
    vigil = Vigil(parts.network, parts.processes, parts.stage.fixed, scales_loss=scales_loss)
    vigil.begin()
    return vigil


def _result(
    parts: Parts, clock: LoopState, split: ImageSplit, *, best: dict[str, Any], last: dict[str, Any]
) -> dict[str, Any]:
    """The final figures; those at the top are of the exported weights."""
    setup, order = parts.setup, parts.setup.order
    brief = {name: {"step": figures["step"], **scalars(figures)} for name, figures in (("best", best), ("last", last))}
    return {
        "name": setup.recipe.name,
        "strategy": strategy_of(setup),
        "split": split.name,
        **score_of_training(setup, split),
        "num_classes": len(setup.data.classes),
        **{key: value for key, value in best.items() if key not in ("step", "confusion", "per_class")},
        "weights": "best" if setup.data.validation is not None else "last",
        "choice": clock.choice(setup.recipe.evaluate),
        **brief,
        "epochs": round(clock.step / order.steps_per_epoch, 4),
        "steps": clock.step,
        "images_seen": order.images_seen(clock.step),
        "steps_left_out": clock.left_out,
        **setup.watch.figures(order.images_seen(clock.step)),
        "codes": parts.codes_cache.stats() if any(clock.keeps_codes.values()) or parts.targets is not None else None,
        "trainable_params": setup.trainable_params,
        "total_params": setup.total_params,
        "is_sample": setup.data.is_sample,
        "notes": without_places(list(setup.data.notes), places_of(setup.recipe)),
        "num_bad_images": len(setup.bad_images),
        "skipped_images": setup.bad_images.counts,
        "per_class": best["per_class"],
        "confusion": best["confusion"],
    }
