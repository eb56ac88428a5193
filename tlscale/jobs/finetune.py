"""THE story of training: stages, steps, checkpoints, and a model in the end.

Chapters: resume; the loop; finish. The step is the only clock: the learning rate, the order of images, augmentation
and dropout are functions of (recipe, step), so that a run that was stopped anywhere and resumed ends in the same
weights, bit for bit, as one that was not.

Shapes: B images, C classes.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tlscale.checkpoint import checkpoint_folder, load_checkpoint, newest_valid, pointed_to
from tlscale.codes.batches import CodeBatch
from tlscale.data.sources import ImageSplit
from tlscale.data.transforms import ImageBatch
from tlscale.desync import refuse_desync, what_must_agree
from tlscale.dist import Processes
from tlscale.errors import NonFiniteLossError, Stopped
from tlscale.evaluate import evaluate, scalars
from tlscale.feed import Feed, ImageFeed, open_feed, refuse_codes_of_a_probe
from tlscale.keeper import Images, Keeper
from tlscale.model.classifier import Classifier
from tlscale.model.ema import Ema
from tlscale.model.export import export_model
from tlscale.objective import Objective
from tlscale.optim import build_optimizer, set_lr
from tlscale.prepare import Due, Prepared, make_objective, strategy_of
from tlscale.progress import Progress
from tlscale.run_book import RunBook
from tlscale.run_folder import RunFolder, naming_disk_errors, write_json
from tlscale.run_record import begin_folder, make_record, read_record
from tlscale.run_state import Clock, LossWindow, are_finite, restore, restore_weights, snapshot, write_checkpoint
from tlscale.screen import show_result
from tlscale.seeds import derive_seed
from tlscale.stages import Stage, cross_boundary, enter, stage_at
from tlscale.stop import StopRequest
from tlscale.vigil import Vigil


@dataclass
class Parts:
    """The objects of a run; `network` is the bare one, which checkpoints and export are of."""

    prepared: Prepared
    processes: Processes
    network: Classifier
    ema: Ema | None
    objective: Objective
    keeper: Keeper
    careful_until: int  # steps before this one are looked at before their update
    # Of the stage that the run is in:
    stage: Stage
    optimizer: torch.optim.Optimizer
    feed: Feed | None = None
    wrapped: tuple[nn.Module, AcceleratedOptimizer] | None = None  # what Accelerate made of the feed's module
    is_settled: bool = False  # whether the order in which gradients are summed over processes is final

    def figures(self, split: ImageSplit, feed: Feed) -> dict[str, Any]:
        """Evaluation of the weights that a user would get: the averages, where averages are kept."""
        self.processes.share_buffers(self.network)
        with self.averaged():
            return evaluate(
                feed.module,
                feed.eval_batches(split),
                inputs=feed.inputs,
                num_images=len(split),
                objective=self.objective,
                classes=self.prepared.data.classes,
                processes=self.processes,
            )

    def averaged(self) -> AbstractContextManager[None]:
        """Within: the network has its averaged weights, where averages are kept."""
        return nullcontext() if self.ema is None else self.ema.in_place()


def _make_parts(
    prepared: Prepared, processes: Processes, stop: StopRequest, screen: Progress, stage: Stage, careful_until: int
) -> Parts:
    recipe, device = prepared.recipe, processes.device
    network = prepared.classifier.to(device)
    enter(network, stage)
    return Parts(
        prepared,
        processes,
        network,
        Ema(prepared.trained, recipe.optim.ema_decay) if recipe.optim.ema_decay is not None else None,
        make_objective(prepared, device),
        Keeper(prepared, processes, Images(prepared), screen, stop),
        careful_until if recipe.non_finite.action != "skip" else prepared.total_steps,
        stage,
        build_optimizer(stage.groups, stage.optim),
    )


def train(
    prepared: Prepared,
    folder: RunFolder,
    processes: Processes,
    stop: StopRequest,
    record: dict[str, Any] | None,
    screen: Progress,
) -> dict[str, Any]:
    """Train as the recipe says; what `result.json` holds.

    Args:
        record: `run.json` of the run that is gone on with; None where a new one begins.
    """
    refuse_codes_of_a_probe(prepared.recipe)
    careful_until = 0
    while True:
        try:
            return _train(prepared, folder, processes, stop, record, screen, careful_until)
        except NonFiniteLossError as error:
            # A step that was looked at and found good would end there again.
            if prepared.recipe.non_finite.action != "rollback" or error.step <= careful_until:
                raise
            careful_until = error.step
            screen.say(
                f"WARNING: not finite at step {error.step}: back to the last checkpoint, to leave out what is not",
                style="bold red",
            )
        record = processes.on_main(partial(read_record, folder))


def _train(
    prepared: Prepared,
    folder: RunFolder,
    processes: Processes,
    stop: StopRequest,
    record: dict[str, Any] | None,
    screen: Progress,
    careful_until: int,
) -> dict[str, Any]:
    recipe = prepared.recipe

    # -- resume: into the bare objects of the stage that the checkpoint is of, before Accelerate wraps them -----------
    newest = processes.on_main(partial(_newest, folder, screen)) if record is not None else None
    checkpoint = processes.on_all(partial(load_checkpoint, newest)) if newest is not None else None
    saved_in = stage_at(prepared.stages, checkpoint.step - 1 if checkpoint is not None else 0)
    parts = _make_parts(prepared, processes, stop, screen, saved_in, careful_until)
    clock = Clock()
    if checkpoint is not None:
        clock = restore(checkpoint, parts.network, parts.optimizer, parts.ema, prepared.fixed)
        screen.say(f"resumed from {newest}, at step {clock.step} of {prepared.total_steps}")
    if stage_at(prepared.stages, clock.step) is not parts.stage:
        _next_stage(parts)

    # -- the loop: its first file is written when all images are there, so that bad ones leave no half-begun run ----
    _begin_stage(parts, clock, checkpoint.state["scaler"] if checkpoint is not None else None)
    if record is None:
        record = make_record(prepared, world_size=processes.world_size, device=str(processes.device))
        processes.on_main(partial(begin_folder, folder, recipe, record))
    if checkpoint is None and recipe.non_finite.action == "rollback":
        _save(parts, clock, folder, elapsed_s=0.0)  # something to go back to
    with (
        _unwrapping(parts),
        Progress(prepared.total_steps, clock.step, enabled=processes.is_main) as progress,
        RunBook(prepared, folder, processes, clock, record, progress) as book,
        processes.watchdog.watching(),
        closing(_steps(parts, clock, book)) as steps,
    ):
        window, due = LossWindow(clock, processes), Due(prepared)
        parts.keeper.screen = progress
        book.training_begins()
        for batches in steps:
            # Train.
            processes.watchdog.beat()
            num_images = prepared.order.num_images_in(clock.step)
            lr = set_lr(parts.optimizer, parts.stage.lr_factor(clock.step))
            seed = derive_seed(recipe.seed, "step", clock.step)
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
            book.trained(num_images)

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
                assert prepared.data.validation is not None
                assert parts.feed is not None
                with book.not_training():
                    figures = parts.figures(prepared.data.validation, parts.feed)
                improved = clock.rank_step(figures[recipe.evaluate.select], recipe.evaluate, recipe.checkpoint)
                book.write_evaluation("validation", figures, is_best=clock.best_step == clock.step)
                due_save = due_save or improved
            if due_save:
                with book.not_training():
                    _save(parts, clock, folder, elapsed_s=book.elapsed_s())
            if stopping and clock.step < prepared.total_steps:
                raise Stopped(_stopped(stop, clock, prepared, folder))
        return _finish(parts, clock, book, folder, progress)


def _steps(parts: Parts, clock: Clock, book: RunBook) -> Generator[list[Any], None, None]:
    """The batches of every step that is left, over all stages; a stage is begun when its first step comes."""
    stages = parts.prepared.stages
    while True:
        assert parts.feed is not None
        with closing(parts.feed.steps(clock.step, parts.stage.stop_step)) as steps:
            yield from steps
        if parts.stage is stages[-1]:
            return
        with book.not_training():
            _next_stage(parts)
            _begin_stage(parts, clock, None)


def _next_stage(parts: Parts) -> None:
    """Leave the stage that is over: unwrap, freeze, and build the optimizer again with the moments that go on."""
    _unwrap(parts)
    # Batch statistics differ by rank until they are shared, and what is frozen now must be the same on all.
    parts.processes.share_buffers(parts.network)
    parts.stage = parts.prepared.stages[parts.stage.number + 1]
    parts.optimizer = cross_boundary(parts.network, parts.optimizer, parts.ema, parts.stage)


def _unwrap(parts: Parts) -> None:
    """Take off what Accelerate put around (and, for mixed precision, into) the module that was trained."""
    if parts.feed is not None:
        parts.processes.accelerator.unwrap_model(parts.feed.module, keep_fp32_wrapper=False)
        # Accelerate leaves alone what bears this mark, and so the next stage would go without mixed precision.
        vars(parts.feed.module).pop("_is_accelerate_prepared", None)
        parts.processes.accelerator.free_memory()
        parts.feed, parts.wrapped = None, None


def _begin_stage(parts: Parts, clock: Clock, scaler_state: dict[str, Any] | None) -> None:
    """Open the feed of the stage, which may compute codes, and have Accelerate wrap what is trained."""
    prepared, accelerator, key = parts.prepared, parts.processes.accelerator, str(parts.stage.number)
    decided = clock.keeps_codes.get(key)
    parts.keeper.begin_stage()
    parts.feed, keeps = open_feed(parts.stage, prepared, parts.processes, parts.keeper, decided=decided)
    clock.keeps_codes[key] = keeps
    if prepared.recipe.compute.compile:
        parts.feed.module.compile()
    parts.feed.module.train()
    parts.wrapped = accelerator.prepare(parts.feed.module, parts.optimizer)
    # Two numbers give the same sum in any order.
    parts.is_settled = parts.processes.world_size < 3 or not isinstance(parts.wrapped[0], DistributedDataParallel)
    if scaler_state is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(scaler_state)


@contextmanager
def _unwrapping(parts: Parts) -> Iterator[None]:
    """Within: a loss that is not finite leaves the network bare, so that the run can begin again in this process."""
    try:
        yield
    except NonFiniteLossError:
        _unwrap(parts)
        raise


def _leave_out(clock: Clock, parts: Parts, book: RunBook, folder: RunFolder) -> None:
    """Write down that the step changed nothing.

    Raises:
        NonFiniteLossError: there were too many of them.
    """
    most = parts.prepared.recipe.non_finite.most_steps
    clock.left_out.append(clock.step)
    book.write_left_out(len(clock.left_out), most)
    if len(clock.left_out) > most:
        why = f"{len(clock.left_out)} steps were left out, and non_finite.most_steps is {most}. "
        raise NonFiniteLossError(why + _non_finite(clock.step, folder), clock.step)


def _refuse_non_finite(bad_step: int | None, clock: Clock, parts: Parts, folder: RunFolder, *, may_save: bool) -> None:
    if bad_step is None and may_save and not are_finite(parts.network):
        bad_step = clock.step  # in the backward pass: the loss would show it in the next step
    if bad_step is not None:
        raise NonFiniteLossError(_non_finite(bad_step, folder), bad_step)


def _save(parts: Parts, clock: Clock, folder: RunFolder, *, elapsed_s: float) -> None:
    processes, keeping = parts.processes, parts.prepared.recipe.checkpoint
    processes.share_buffers(parts.network)
    refuse_desync(what_must_agree(parts.network, parts.ema), processes, clock.step)
    checkpoint = snapshot(
        clock,
        parts.network,
        parts.optimizer,
        parts.ema,
        processes.accelerator,
        elapsed_s=elapsed_s,
        fixed=parts.prepared.fixed,
    )
    processes.on_main(partial(write_checkpoint, folder.checkpoints, checkpoint, clock, keeping))


def _finish(parts: Parts, clock: Clock, book: RunBook, folder: RunFolder, progress: Progress) -> dict[str, Any]:
    """The last and the best weights on the split that chose nothing; the best are exported."""
    prepared, processes, feed = parts.prepared, parts.processes, parts.feed
    assert feed is not None
    split = prepared.data.test or prepared.data.validation
    assert split is not None, "prepare refuses data that nothing can be evaluated on"
    last = {"step": clock.step, **parts.figures(split, feed)}
    best = last
    if clock.best_step is not None and clock.best_step != clock.step:
        # By its step, and not by what BEST points to: that is for people, and may be older than the clock.
        best_folder = checkpoint_folder(folder.checkpoints, clock.best_step)
        checkpoint = processes.on_all(partial(load_checkpoint, best_folder))
        restore_weights(checkpoint, parts.network, parts.ema, prepared.fixed)
        if clock.best_step <= parts.stage.start_step:  # of another stage, whose frozen part was another
            feed = ImageFeed(prepared, processes, parts.network, parts.keeper.images)
        best = {"step": clock.best_step, **parts.figures(split, feed)}
    _unwrap(parts)  # the exported model has to give its logits without what mixed precision does to them
    with parts.averaged():
        how = processes.on_main(partial(_export, parts, folder))
    result = _result(parts, clock, split.name, wall_s=book.elapsed_s(), best=best, last=last)
    processes.on_main(partial(_write_result, result, folder))
    book.trackers.summary(scalars(result))
    show_result(result, progress, folder=folder.path, how_to_load=how)
    return result


def _export(parts: Parts, folder: RunFolder) -> str:
    prepared = parts.prepared
    with naming_disk_errors(folder.model):
        return export_model(
            parts.network,
            folder.model,
            head=prepared.recipe.head,
            classes=prepared.data.classes,
            spec=prepared.spec,
        )


def _write_result(result: dict[str, Any], folder: RunFolder) -> None:
    with naming_disk_errors(folder.result):
        write_json(folder.result, result)


def train_step(
    batches: list[Any], parts: Parts, *, num_images: int, seed: int, step: int
) -> tuple[Tensor, Tensor | None] | None:
    """One optimizer step over this process's micro-batches.

    The gradient is that of the loss summed over all images of all processes, divided by their number `num_images`:
    exact for short batches too, where a mean of means is not. DDP averages over processes, hence the world size.

    Returns:
        The loss summed over this process's images, on the device, and the norm of the gradient where it is clipped.
        None where `step` (from 0) is one that is looked at, and was not finite: it changed nothing.
    """
    processes, accelerator = parts.processes, parts.processes.accelerator
    assert parts.feed is not None
    assert parts.wrapped is not None
    inputs, (model, optimizer) = parts.feed.inputs, parts.wrapped
    if not parts.is_settled:
        _settle_order_of_sums(batches[-1], parts)
    vigil = _vigil(parts) if step < parts.careful_until else None
    loss_sums = []
    for number, batch in enumerate(batches):
        # Dropout and stochastic depth differ between processes and micro-batches, and are the same after a resume.
        processes.seed(derive_seed(seed, processes.rank, number))
        batch = batch.to(processes.device, non_blocking=True)
        is_last = number == len(batches) - 1
        with nullcontext() if is_last else accelerator.no_sync(model):
            losses_B = _losses(parts.objective, model(*inputs(batch)), batch)
            loss_sum = losses_B[: batch.num_real].sum()
            accelerator.backward(loss_sum * processes.world_size / num_images)
        loss_sums.append(loss_sum.detach())
    loss_sum = torch.stack(loss_sums).sum()
    if vigil is not None and vigil.is_bad(loss_sum):
        vigil.undo()
        return None
    clip = parts.prepared.recipe.optim.clip_grad_norm
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), clip) if clip is not None else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss_sum, grad_norm


def _settle_order_of_sums(batch: Any, parts: Parts) -> None:  # noqa: ANN401 (of the feed's own kind)
    """A pass that changes nothing.

    DDP arranges its buckets anew after the first backward pass of a start, and then sums over processes in another
    order: without this, a run that goes on would differ in the last bits from one that was never stopped.
    """
    assert parts.feed is not None
    assert parts.wrapped is not None
    processes = parts.processes
    vigil, batch = _vigil(parts), batch.to(processes.device)
    processes.seed(derive_seed(parts.prepared.recipe.seed, "settle", processes.rank))
    losses_B = _losses(parts.objective, parts.wrapped[0](*parts.feed.inputs(batch)), batch)
    processes.accelerator.backward(losses_B[: batch.num_real].sum())
    vigil.undo()
    parts.is_settled = True


def _vigil(parts: Parts) -> Vigil:
    scales_loss = parts.processes.accelerator.scaler is not None
    vigil = Vigil(parts.network, parts.processes, parts.stage.fixed, scales_loss=scales_loss)
    vigil.begin()
    return vigil


def _losses(objective: Objective, logits_BC: Tensor, batch: ImageBatch | CodeBatch) -> Tensor:
    if batch.partner_labels_B is None or batch.lam_B is None:
        return objective.losses(logits_BC, batch.labels_B)
    return objective.mixed_losses(logits_BC, batch.labels_B, batch.partner_labels_B, batch.lam_B)


def _newest(folder: RunFolder, progress: Progress) -> Path | None:
    path, faults = newest_valid(folder.checkpoints)
    for fault in faults:
        progress.say(f"WARNING: {fault}", style="bold red")
    return path


def _non_finite(bad_step: int, folder: RunFolder) -> str:
    newest = pointed_to(folder.checkpoints, "LATEST")
    return (
        f"the loss or the weights became NaN or infinite at step {bad_step}; up to step {bad_step - 1} all was finite. "
        f"{f'The last checkpoint is {newest}' if newest else 'There is no checkpoint yet'}; nothing was saved after. "
        "Lower optim.lr, lengthen schedule.warmup, set optim.clip_grad_norm=1.0, or use compute.precision=fp32; "
        "non_finite.action=skip or rollback leaves single steps out."
    )


def _stopped(stop: StopRequest, clock: Clock, prepared: Prepared, folder: RunFolder) -> str:
    return (
        f"stopped by {stop.by or 'a signal to another process'} after step {clock.step} of {prepared.total_steps}; all "
        f"is saved in '{folder.path}'. The same line with --resume goes on."
    )


def _result(
    parts: Parts, clock: Clock, split: str, *, wall_s: float, best: dict[str, Any], last: dict[str, Any]
) -> dict[str, Any]:
    """The final figures; those at the top are of the exported weights."""
    prepared, order = parts.prepared, parts.prepared.order
    brief = {name: {"step": figures["step"], **scalars(figures)} for name, figures in (("best", best), ("last", last))}
    return {
        "name": prepared.recipe.name,
        "strategy": strategy_of(prepared),
        "split": split,
        "num_classes": len(prepared.data.classes),
        **{key: value for key, value in best.items() if key not in ("step", "confusion", "per_class")},
        "weights": "best" if prepared.data.validation is not None else "last",
        **brief,
        "epochs": round(clock.step / order.steps_per_epoch, 4),
        "steps": clock.step,
        "images_seen": order.images_seen(clock.step),
        "steps_left_out": clock.left_out,
        "wall_s": round(wall_s, 3),
        "images_per_s": round(order.images_seen(clock.step) / max(clock.train_s, 1e-9), 1),
        "codes": parts.keeper.facts() if any(clock.keeps_codes.values()) else None,
        "trainable_params": prepared.trainable_params,
        "total_params": prepared.total_params,
        "is_sample": prepared.data.is_sample,
        "notes": list(prepared.data.notes),
        "num_bad_images": len(prepared.bad_images),
        "per_class": best["per_class"],
        "confusion": best["confusion"],
    }
