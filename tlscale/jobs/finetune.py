"""THE story: from a recipe to a trained, evaluated, reloadable model.

Chapters: process; folder; data, model and weights; plan; resume; the loop; finish. The step is the only clock: the
learning rate, the order of images, augmentation and dropout are functions of (recipe, step), so that a run that was
stopped anywhere and resumed ends in the same weights, bit for bit, as one that was not.

Shapes: B images, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from tlscale.checkpoint import checkpoint_folder, load_checkpoint, newest_valid, pointed_to
from tlscale.data.loaders import ImageStore, train_batches
from tlscale.data.transforms import ImageBatch
from tlscale.dist import Processes, start_processes
from tlscale.errors import NonFiniteLossError, ResumeError, Stopped
from tlscale.evaluate import InputPath, evaluate, scalars
from tlscale.model.classifier import Classifier, export_model
from tlscale.model.ema import Ema
from tlscale.objective import Objective
from tlscale.optim import build_optimizer, set_lr
from tlscale.prepare import Due, Prepared, make_objective, prepare, strategy_of
from tlscale.progress import Progress
from tlscale.recipe.load import diff_recipes, dump_recipe, load_recipe
from tlscale.recipe.schema import Recipe
from tlscale.run_book import RunBook
from tlscale.run_folder import Mode, RunFolder, claim, clear, naming_disk_errors, write_json, write_text
from tlscale.run_record import make_record, read_record
from tlscale.run_state import Clock, LossWindow, are_finite, restore, snapshot, write_checkpoint
from tlscale.screen import show_plan, show_result
from tlscale.seeds import derive_seed
from tlscale.stop import StopRequest

# A resumed run may differ in these: none of them changes what is learned.
MAY_CHANGE = (
    "checkpoint.",
    "compute.num_processes",
    "compute.micro_batch_size",
    "data.cache_mib",
    "data.workers",
    "evaluate.batch_size",
    "log_every",
    "track",
    "wandb",
)


def run(
    recipe: Recipe, out: str | Path | None = None, *, resume: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """Train as the recipe says.

    Args:
        recipe: from `load_recipe`.
        out: the run folder; by itself `runs/<recipe name>`.
        resume: go on from the newest valid checkpoint there, or start if there is none.
        overwrite: replace a run that is there.

    Returns:
        What `result.json` holds.

    Raises:
        TlscaleError: wrong input, a run that failed, or `Stopped` after a signal, when all is saved.
    """
    # -- process ------------------------------------------------------------------------------------------------
    processes = start_processes(recipe.compute)
    torch.use_deterministic_algorithms(recipe.compute.deterministic)
    mode: Mode = "resume" if resume else "overwrite" if overwrite else "fresh"
    folder = RunFolder(Path(out) if out is not None else Path("runs") / recipe.name)
    # -- folder: the main process holds it for all ----------------------------------------------------------------
    with closing(processes), StopRequest() as stop, processes.main_holds(lambda: claim(folder.path, mode)):
        screen = Progress(0, enabled=processes.is_main)
        record = None if overwrite else processes.on_main(lambda: read_record(folder))
        if record is not None:
            processes.on_main(lambda: _refuse_other_recipe(recipe, folder))
            if processes.on_main(folder.result.exists):
                screen.say(f"'{folder.path}' is complete already; its figures are in {folder.result}")
                return dict(json.loads(folder.result.read_text()))

        # -- data, model and weights: whatever is wrong with them ends the run here -------------------------------
        bad_images = [(int(row), str(why)) for row, why in record["bad_images"]] if record else None
        with processes.main_first():  # what a hub has to give is fetched once
            prepared = prepare(recipe, world_size=processes.world_size, bad_images=bad_images)

        # -- plan -------------------------------------------------------------------------------------------------
        show_plan(prepared, screen, device=str(processes.device))
        if record is not None:
            processes.on_main(partial(_refuse_other_inputs, record, prepared, folder))
        return _train(prepared, folder, processes, stop, record, screen)


@dataclass(frozen=True)
class Parts:
    """The objects of a run; `network` is the bare one, which checkpoints, evaluation and export are of."""

    prepared: Prepared
    processes: Processes
    network: Classifier
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    objective: Objective
    input_path: InputPath

    def figures(self, store: ImageStore) -> dict[str, Any]:
        """Evaluation of the weights that a user would get: the averages, where averages are kept."""
        self.processes.share_buffers(self.network)
        with self.averaged():
            return evaluate(
                self.network,
                store,
                input_path=self.input_path,
                objective=self.objective,
                classes=self.prepared.data.classes,
                batch_size=self.prepared.eval_batch_size,
                workers=self.prepared.workers(
                    store, self.processes.device, augmented=False, processes=self.processes.world_size
                ),
                processes=self.processes,
            )

    def averaged(self) -> AbstractContextManager[None]:
        """Within: the network has its averaged weights, where averages are kept."""
        return nullcontext() if self.ema is None else self.ema.in_place()


def _make_parts(prepared: Prepared, processes: Processes) -> Parts:
    recipe, device = prepared.recipe, processes.device
    network = prepared.classifier.to(device)
    return Parts(
        prepared,
        processes,
        network,
        build_optimizer(prepared.groups, recipe.optim),
        Ema(network.rule_names(), recipe.optim.ema_decay) if recipe.optim.ema_decay is not None else None,
        make_objective(prepared, device),
        InputPath(prepared.spec, prepared.dtype, device, recipe.compute.channels_last),
    )


def _train(
    prepared: Prepared,
    folder: RunFolder,
    processes: Processes,
    stop: StopRequest,
    record: dict[str, Any] | None,
    screen: Progress,
) -> dict[str, Any]:
    recipe, accelerator = prepared.recipe, processes.accelerator

    # -- resume: into the bare objects, before Accelerate wraps them ------------------------------------------------
    parts = _make_parts(prepared, processes)
    clock, scaler_state = _resume(parts, folder, screen) if record is not None else (Clock(), None)
    if recipe.compute.compile:
        parts.network.compile()
    model, optimizer = accelerator.prepare(parts.network, parts.optimizer)
    if scaler_state is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(scaler_state)

    # -- the loop: its first file is written when all images are there, so that bad ones leave no half-begun run ----
    stores = _open_stores(prepared, processes)
    if record is None:
        record = make_record(prepared, world_size=processes.world_size, device=str(processes.device))
        processes.on_main(partial(_begin, folder, recipe, record))
    with (
        Progress(prepared.total_steps, clock.step, enabled=processes.is_main) as progress,
        RunBook(prepared, folder, processes, clock, record, progress) as book,
        closing(_batches_from(clock.step, prepared, stores["train"], processes)) as steps,
    ):
        window, due = LossWindow(clock, processes), Due(prepared, validates="validation" in stores)
        parts.network.train()
        book.training_begins()
        for batches in steps:
            # Train.
            num_images = prepared.order.num_images_in(clock.step)
            lr = set_lr(parts.optimizer, prepared.lr_factor(clock.step))
            seed = derive_seed(recipe.seed, "step", clock.step)
            loss_sum, grad_norm = train_step(batches, model, optimizer, parts, num_images=num_images, seed=seed)
            clock.step += 1
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
            if due.log(clock.step):
                norm = {} if grad_norm is None else {"grad_norm": float(grad_norm)}
                book.write_training({"loss": window.take_mean(), "lr": lr, **norm})
            if due.evaluate(clock.step):
                with book.not_training():
                    figures = parts.figures(stores["validation"])
                improved = clock.rank_step(figures[recipe.evaluate.select], recipe.evaluate, recipe.checkpoint)
                book.write_evaluation("validation", figures, is_best=clock.best_step == clock.step)
                due_save = due_save or improved
            if due_save:
                with book.not_training():
                    _save(parts, clock, folder, elapsed_s=book.elapsed_s())
            if stopping and clock.step < prepared.total_steps:
                raise Stopped(_stopped(stop, clock, prepared, folder))
        return _finish(parts, stores, clock, book, folder, progress)


def _resume(parts: Parts, folder: RunFolder, screen: Progress) -> tuple[Clock, dict[str, Any] | None]:
    """Put the newest valid checkpoint into `parts`; its clock, and the state of the gradient scaler."""
    processes = parts.processes
    newest = processes.on_main(lambda: _newest(folder, screen))
    if newest is None:
        return Clock(), None
    checkpoint = processes.on_all(partial(load_checkpoint, newest))
    clock = restore(checkpoint, parts.network, parts.optimizer, parts.ema)
    screen.say(f"resumed from {newest}, at step {clock.step} of {parts.prepared.total_steps}")
    return clock, checkpoint.state["scaler"]


def _open_stores(prepared: Prepared, processes: Processes) -> dict[str, ImageStore]:
    stores = {"train": processes.on_all(prepared.train_store)}
    if prepared.data.validation is not None:
        stores["validation"] = processes.on_all(partial(prepared.eval_store, prepared.data.validation))
    return stores


def _batches_from(
    step: int, prepared: Prepared, store: ImageStore, processes: Processes
) -> Generator[list[ImageBatch], None, None]:
    augmented, device = bool(prepared.augment), processes.device
    return train_batches(
        store,
        prepared.order,
        prepared.split,
        processes.rank,
        seed=prepared.recipe.seed,
        augment=prepared.augment,
        start_step=step,
        stop_step=prepared.total_steps,
        workers=prepared.workers(store, device, augmented=augmented, processes=processes.world_size),
        pin_memory=device.type == "cuda",
    )


def _refuse_non_finite(bad_step: int | None, clock: Clock, parts: Parts, folder: RunFolder, *, may_save: bool) -> None:
    if bad_step is None and may_save and not are_finite(parts.network):
        bad_step = clock.step  # in the backward pass: the loss would show it in the next step
    if bad_step is not None:
        raise NonFiniteLossError(_non_finite(bad_step, folder))


def _save(parts: Parts, clock: Clock, folder: RunFolder, *, elapsed_s: float) -> None:
    processes, keeping = parts.processes, parts.prepared.recipe.checkpoint
    processes.share_buffers(parts.network)
    checkpoint = snapshot(clock, parts.network, parts.optimizer, parts.ema, processes.accelerator, elapsed_s=elapsed_s)
    processes.on_main(partial(write_checkpoint, folder.checkpoints, checkpoint, clock, keeping))


def _finish(
    parts: Parts, stores: dict[str, ImageStore], clock: Clock, book: RunBook, folder: RunFolder, progress: Progress
) -> dict[str, Any]:
    """The last and the best weights on the split that chose nothing; the best are exported."""
    prepared, processes = parts.prepared, parts.processes
    split = prepared.data.test or prepared.data.validation
    assert split is not None, "prepare refuses data that nothing can be evaluated on"
    store = stores["validation"] if split is prepared.data.validation else prepared.eval_store(split)
    last = {"step": clock.step, **parts.figures(store)}
    best = last
    if clock.best_step is not None and clock.best_step != clock.step:
        # By its step, and not by what BEST points to: that is for people, and may be older than the clock.
        best_folder = checkpoint_folder(folder.checkpoints, clock.best_step)
        checkpoint = processes.on_all(partial(load_checkpoint, best_folder))
        restore(checkpoint, parts.network, parts.optimizer, parts.ema)
        best = {"step": clock.best_step, **parts.figures(store)}
    # Mixed precision was put into the network's own forward; the exported model has to give its logits without.
    processes.accelerator.unwrap_model(parts.network, keep_fp32_wrapper=False)
    with parts.averaged():
        how = processes.on_main(partial(_export, parts, folder))
    result = _result(prepared, clock, split.name, wall_s=book.elapsed_s(), best=best, last=last)
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
    batches: list[ImageBatch],
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    parts: Parts,
    *,
    num_images: int,
    seed: int,
) -> tuple[Tensor, Tensor | None]:
    """One optimizer step over this process's micro-batches.

    The gradient is that of the loss summed over all images of all processes, divided by their number `num_images`:
    exact for short batches too, where a mean of means is not. DDP averages over processes, hence the world size.

    Returns:
        The loss summed over this process's images, on the device, and the norm of the gradient where it is clipped.
    """
    processes, accelerator = parts.processes, parts.processes.accelerator
    loss_sums = []
    for number, batch in enumerate(batches):
        # Dropout and stochastic depth differ between processes and micro-batches, and are the same after a resume.
        processes.seed(derive_seed(seed, processes.rank, number))
        batch = batch.to(processes.device, non_blocking=True)
        is_last = number == len(batches) - 1
        with nullcontext() if is_last else accelerator.no_sync(model):
            losses_B = _losses(parts.objective, model(parts.input_path(batch)), batch)
            loss_sum = losses_B[: batch.num_real].sum()
            accelerator.backward(loss_sum * processes.world_size / num_images)
        loss_sums.append(loss_sum.detach())
    clip = parts.prepared.recipe.optim.clip_grad_norm
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), clip) if clip is not None else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.stack(loss_sums).sum(), grad_norm


def _losses(objective: Objective, logits_BC: Tensor, batch: ImageBatch) -> Tensor:
    if batch.partner_labels_B is None or batch.lam_B is None:
        return objective.losses(logits_BC, batch.labels_B)
    return objective.mixed_losses(logits_BC, batch.labels_B, batch.partner_labels_B, batch.lam_B)


def _refuse_other_recipe(recipe: Recipe, folder: RunFolder) -> None:
    changes = [
        f"{key}: {old!r} -> {new!r}"
        for key, old, new in diff_recipes(load_recipe(folder.recipe), recipe)
        if not key.startswith(MAY_CHANGE)
    ]
    if changes:
        lines = "\n  ".join(changes)
        raise ResumeError(
            f"'{folder.path}' cannot be resumed with another recipe:\n  {lines}\n  Its own recipe is "
            f"'{folder.recipe}'; another recipe wants another folder: --out DIR"
        )


def _refuse_other_inputs(record: dict[str, Any], prepared: Prepared, folder: RunFolder) -> None:
    now = {"data": str(prepared.data.identity["fingerprint"]), "weights": prepared.weights.sha256}
    for what, key in (("data", "fingerprint"), ("weights", "sha256")):
        if record[what][key] != now[what]:
            raise ResumeError(
                f"'{folder.path}' cannot be resumed: its {what} are not those that it was started with "
                f"({record[what][key][:12]} then, {now[what][:12]} now). Bring them back, or start another: --out DIR"
            )


def _begin(folder: RunFolder, recipe: Recipe, record: dict[str, Any]) -> None:
    with naming_disk_errors(folder.path):
        clear(folder)  # only --overwrite finds anything there
        write_json(folder.run_json, record)
        write_text(folder.recipe, dump_recipe(recipe))


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
        "Lower optim.lr, lengthen schedule.warmup, set optim.clip_grad_norm=1.0, or use compute.precision=fp32."
    )


def _stopped(stop: StopRequest, clock: Clock, prepared: Prepared, folder: RunFolder) -> str:
    return (
        f"stopped by {stop.by or 'a signal to another process'} after step {clock.step} of {prepared.total_steps}; all "
        f"is saved in '{folder.path}'. The same line with --resume goes on."
    )


def _result(
    prepared: Prepared, clock: Clock, split: str, *, wall_s: float, best: dict[str, Any], last: dict[str, Any]
) -> dict[str, Any]:
    """The final figures; those at the top are of the exported weights."""
    order = prepared.order
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
        "wall_s": round(wall_s, 3),
        "images_per_s": round(order.images_seen(clock.step) / max(clock.train_s, 1e-9), 1),
        "trainable_params": prepared.trainable_params,
        "total_params": prepared.total_params,
        "is_sample": prepared.data.is_sample,
        "notes": list(prepared.data.notes),
        "num_bad_images": len(prepared.bad_images),
        "per_class": best["per_class"],
        "confusion": best["confusion"],
    }
