"""Give each component of a run the section or the spec that it takes, so that none looks up the whole recipe."""

from __future__ import annotations

from dataclasses import replace

import torch

from tlscale.codes.cache import CodesCache, CodesSpec
from tlscale.data.loader import ImageCache
from tlscale.data.transforms import InputPath
from tlscale.data.views import crop_places
from tlscale.distributed.processes import Processes
from tlscale.tracking.console import Console
from tlscale.training.cache_decision import CacheSpec
from tlscale.training.distillation.targets import TeacherTargets
from tlscale.training.input_pipeline import PipelineSpec
from tlscale.training.loop_state import Due
from tlscale.training.loss import LOSSES, Loss, LossSpec, class_weights, log_priors, loss_name
from tlscale.training.setup import RunSetup
from tlscale.training.stages import Stage


def make_loss(setup: RunSetup, device: torch.device) -> Loss:
    """Build the recipe's loss, its class weights on `device`."""
    recipe, data = setup.recipe, setup.data
    weights_C = class_weights(recipe.loss, data.train.labels_N, data.classes)
    priors_C = log_priors(recipe.loss, data.train.labels_N, len(data.classes))
    of_classes = (None if one_C is None else one_C.to(setup.dtype).to(device) for one_C in (weights_C, priors_C))
    weights_C, priors_C = of_classes
    spec = LossSpec(recipe.loss, recipe.distill, weights_C, len(data.classes), priors_C)
    return LOSSES[loss_name(recipe.loss, recipe.distill, several=data.has_several_labels)].build(spec)


def make_due(setup: RunSetup) -> Due:
    """Return which steps are followed by a log line, an evaluation, a checkpoint."""
    recipe = setup.recipe
    return Due(
        last_step=setup.total_steps,
        stage_ends=[stage.stop_step for stage in setup.stages],
        log_every=setup.to_steps(recipe.log_every),
        save_every=setup.to_steps(recipe.checkpoint.every),
        evaluate_every=setup.to_steps(recipe.evaluate.every) if setup.data.validation is not None else None,
        patience=recipe.evaluate.patience,
        patient_from=setup.stages[-1].start_step,
    )


def input_path(setup: RunSetup, device: torch.device) -> InputPath:
    """Return the way of this run's image batches to the network's input."""
    return InputPath(setup.spec, setup.dtype, device, setup.recipe.compute.channels_last)


def pipeline_spec(setup: RunSetup, device: torch.device) -> PipelineSpec:
    """Return what the batches of a run depend on."""
    recipe = setup.recipe
    return PipelineSpec(
        data=setup.data,
        section=recipe.data,
        order=setup.order,
        split=setup.split,
        seed=setup.seed,
        augment=setup.augment,
        # Of evaluation: per process and forward pass.
        eval_batch_size=recipe.evaluate.batch_size or setup.split.micro_batch_size,
        inputs=input_path(setup, device),
        views=setup.views,
    )


def cache_spec(setup: RunSetup, stage: Stage, device: torch.device) -> CacheSpec:
    """Return what decides whether a stage trains on codes."""
    order, data, codes = setup.order, setup.data, setup.recipe.codes
    epochs = range(order.epoch(stage.start_step), order.epoch(stage.stop_step - 1) + 1)
    if order.draw is not None:
        epochs = range(codes.views)  # an image of a rare class has more epochs than there are
    return CacheSpec(
        section=codes,
        inputs=input_path(setup, device),
        views=sorted({epoch % codes.views for epoch in epochs[: codes.views]}),
        num_train=len(data.train),
        num_evaluated=len(setup.views) * sum(len(one) for one in (data.validation, data.test) if one is not None),
        images_seen=order.images_seen(stage.stop_step) - order.images_seen(stage.start_step),
        trains_all=stage.trains_all,
        augments=bool(setup.augment),
        has_teacher=setup.teacher is not None,
    )


def open_image_cache(setup: RunSetup) -> ImageCache:
    """Return the cache of this run's decoded images; nothing is decoded yet."""
    return ImageCache(
        setup.data,
        setup.recipe.data,
        setup.spec,
        crops="crop" in setup.augment,
        watch=setup.watch,
        places=crop_places(setup.view_names),
    )


def open_codes_cache(
    setup: RunSetup, processes: Processes, console: Console, *, force_fp32: bool = False
) -> CodesCache:
    """Return the cache of this run's codes; nothing is computed yet. `force_fp32`: where the run is in less."""
    recipe = setup.recipe
    precision = recipe.compute.precision
    spec = CodesSpec(
        section=recipe.codes,
        inputs=input_path(setup, processes.device),
        precision="fp32" if force_fp32 and precision != "fp64" else precision,
        augment=setup.augment,
        seed=setup.seed,
    )
    return CodesCache(spec, open_image_cache(setup), processes, console, setup.watch)


def ask_teacher(setup: RunSetup, processes: Processes, codes_cache: CodesCache) -> TeacherTargets | None:
    """Get the teacher's targets for all images of a run, where the recipe has a teacher: cached, or computed now.

    The run's `codes_cache` counts what is computed.

    Raises:
        DataError: an image cannot be read.
        Stopped: the run was asked to stop; what was computed stays.
    """
    teacher = setup.teacher
    if teacher is None:
        return None
    # What is learned in every epoch is computed once: it is not rounded for the sake of speed.
    as_it_sees = replace(setup, spec=teacher.spec)
    cache = open_codes_cache(as_it_sees, processes, codes_cache.console, force_fp32=True)
    processes.local.to_device(teacher.module)
    num_epochs = setup.order.epoch(setup.total_steps - 1) + 1
    targets = TeacherTargets(teacher, cache, range(min(cache.spec.section.views, num_epochs)), setup.dtype)
    for split in (setup.data.validation, setup.data.test):
        if split is not None:
            list(targets.of_split(split, ()))  # now, and not in the middle of the run
    if processes.device.type == "cuda":
        teacher.module.cpu()  # it is not asked again: its memory is the student's
    codes_cache.num_computed += cache.num_computed
    codes_cache.cached_bytes |= {f"teacher, {name}": count for name, count in cache.cached_bytes.items()}
    return targets
