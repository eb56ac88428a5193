"""Hold the objects of a training run, and take them from stage to stage.

Promise: whoever wraps the network (Accelerate, FSDP2) is known here; checkpoints and export are of the bare one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tlscale.codes.cache import CodesCache
from tlscale.codes.probes.class_figures import OF_SCORES
from tlscale.data.sources.open import ImageSplit
from tlscale.distributed.consistency import check_replicas_agree
from tlscale.distributed.fsdp import sharded_groups
from tlscale.distributed.processes import Processes
from tlscale.models.classifier import Classifier
from tlscale.models.freeze import is_norm
from tlscale.models.views import over_views
from tlscale.recipe.schema import CheckpointSection, ComputeSection, EvaluateSection, NonFiniteSection
from tlscale.storage import faults
from tlscale.storage.run_folder import RunFolder
from tlscale.tracking.console import Console
from tlscale.training.checkpoint.optimizer_state import carry_moments
from tlscale.training.checkpoint.run_state import snapshot, write_checkpoint
from tlscale.training.class_scores import ClassScores
from tlscale.training.distillation.targets import TeacherTargets
from tlscale.training.ema import Ema
from tlscale.training.evaluate import SeveralLabels, evaluate
from tlscale.training.group_error import GroupError, num_error_groups
from tlscale.training.input_pipeline import InputPipeline, open_pipeline
from tlscale.training.logger import RunLogger
from tlscale.training.loop_state import Due, LoopState
from tlscale.training.loss import Loss
from tlscale.training.nonfinite import FiniteCheck
from tlscale.training.optimizer_trial import check_optimizer_shards
from tlscale.training.predictions import Predictions
from tlscale.training.read_contents import record_contents
from tlscale.training.setup import RunSetup
from tlscale.training.specs import ask_teacher, cache_spec, make_due, make_loss, open_codes_cache, pipeline_spec
from tlscale.training.stages import Stage, apply_freezing


@dataclass
class TrainState:
    """Hold what is trained and what trains it."""

    setup: RunSetup
    processes: Processes
    network: Classifier  # the bare one, which checkpoints and export are of
    ema: Ema | None
    loss_fn: Loss
    codes_cache: CodesCache
    due: Due
    compute: ComputeSection
    evaluation: EvaluateSection
    keeping: CheckpointSection
    non_finite: NonFiniteSection
    # Of the stage that the run is in:
    stage: Stage
    optimizer: torch.optim.Optimizer
    pipeline: InputPipeline | None = None  # None: no stage was entered
    # What is called and stepped: what Accelerate, or FSDP2, made of the pipeline's module and the optimizer.
    wrapped: tuple[nn.Module, torch.optim.Optimizer] | None = None
    ddp_is_warm: bool = True  # false before the first step of a start or a stage, where it matters
    # Of all stages:
    teacher_targets: TeacherTargets | None = None

    @property
    def inputs(self) -> InputPipeline:
        """The pipeline of the stage, which was entered."""
        assert self.pipeline is not None
        return self.pipeline

    @property
    def model(self) -> nn.Module:
        """The module that is called in training."""
        assert self.wrapped is not None
        return self.wrapped[0]

    @property
    def stepped(self) -> torch.optim.Optimizer:
        """The optimizer as it is stepped in training."""
        assert self.wrapped is not None
        return self.wrapped[1]

    def evaluate(
        self,
        split: ImageSplit,
        inputs: InputPipeline,
        *,
        error_of: str | None = None,
        predictions: Predictions | None = None,
        several: SeveralLabels | None = None,
    ) -> dict[str, Any]:
        """Evaluate the weights that a user would get: the averages, where averages are kept.

        `inputs` is the pipeline of the network, or of its trained part; the rest is as `evaluate.evaluate` takes it,
        but that `several` has an effect on data with several labels alone.
        """
        classes, has_several = self.setup.data.classes, self.setup.data.has_several_labels
        of_all: GroupError | ClassScores | None = None
        # Images of a group stand or fall together, and an error over images is too small by that. Where each group has
        # one image they change nothing, to the last bit.
        groups_N = split.groups_N if num_error_groups(split.groups_N) is not None else None
        # AUROC and average precision hang on the order of all images, which no counts that add up over batches have;
        # of several labels an image all scores are collected anyway.
        if error_of in OF_SCORES and not has_several:
            of_all = ClassScores(error_of, len(split), groups_N)
        elif error_of is not None and groups_N is not None and not has_several:
            of_all = GroupError(groups_N, error_of, len(classes))
        # Batch statistics differ by rank; a figure has to be of one network.
        self.processes.broadcast_buffers(self.network)
        # What would be exported is evaluated: with averages, these.
        with self.averaged():
            # Not the wrapped one: processes have batches in different numbers, and DDP would wait for the others.
            network = over_views(inputs.module, len(self.setup.views), len(classes), several=has_several)
            return evaluate(
                network,
                inputs.eval_batches(split),
                inputs=inputs.eval_inputs,
                num_images=len(split),
                loss_fn=self.loss_fn,
                classes=classes,
                processes=self.processes,
                error_of=error_of,
                of_all=of_all,
                predictions=predictions,
                several=replace(several or SeveralLabels(), groups_N=split.groups_N) if has_several else None,
            )

    def averaged(self) -> AbstractContextManager[None]:
        """Give the network its averaged weights within the context, where averages are kept."""
        return nullcontext() if self.ema is None else self.ema.in_place()


def build_train_state(setup: RunSetup, processes: Processes, console: Console, stage: Stage) -> TrainState:
    """Build what a run begins with, in `stage`; nothing is wrapped yet."""
    recipe = setup.recipe  # each component gets its own section of it
    # Before the freezing and the optimizer: they are of the parameters on the device.
    network = processes.local.to_device(setup.classifier)
    apply_freezing(network, stage)
    return TrainState(
        setup,
        processes,
        network,
        # Where parameters will be sharded, the averages are made of the shards, when the stage is entered.
        ema=processes.engine.if_whole(lambda: _averages(setup, stage)),
        loss_fn=make_loss(setup, processes.device),
        codes_cache=open_codes_cache(setup, processes, console),
        due=make_due(setup),
        compute=recipe.compute,
        evaluation=recipe.evaluate.of_task(recipe.data.task),
        keeping=recipe.checkpoint,
        non_finite=recipe.non_finite,
        stage=stage,
        # Of what this stage trains alone: a frozen parameter in a group would decay.
        optimizer=stage.build_optimizer(),
    )


def _averages(setup: RunSetup, stage: Stage) -> Ema | None:
    # Of all that any stage trains: a stage that thaws more must find averages that began with the run.
    decay = stage.optim.ema_decay
    return Ema(setup.trained, decay) if decay is not None else None


def enter_stage(state: TrainState, loop: LoopState, scaler_state: dict[str, Any] | None = None) -> None:
    """Open the pipeline of the stage, which may compute codes, and wrap what is trained."""
    setup, stage, processes = state.setup, state.stage, state.processes
    engine, key = processes.engine, str(stage.number)  # checkpoints are JSON, whose keys are text
    # Codes of the stage before are not read again: give back what they took of codes.memory_mib.
    state.codes_cache.forget_loaded()
    # Once for all stages, so that the teacher computes each image once.
    if state.teacher_targets is None:
        state.teacher_targets = ask_teacher(setup, processes, state.codes_cache)
    # Before the wrapping: a partition is found in the bare network, and its suffix is what is wrapped.
    state.pipeline, loop.keeps_codes[key] = open_pipeline(
        setup.classifier,
        pipeline_spec(setup, processes.device),
        cache_spec(setup, stage, processes.device),
        processes,
        state.codes_cache,
        title=f"stage {stage.number + 1} of {len(setup.stages)}: " if len(setup.stages) > 1 else "",
        image_views=setup.image_views(stage),
        num_seen=setup.num_seen(stage, loop.step),
        targets=state.teacher_targets,
        # What an earlier start decided: room and speed are measured, and may have changed since.
        decided=loop.keeps_codes.get(key),
        last_split=setup.data.test if stage is setup.stages[-1] and loop.step < setup.total_steps else None,
    )
    if state.compute.compile:
        state.pipeline.module.compile()  # before it is wrapped: DDP's hooks stay outside of the graph
    state.pipeline.module.train()
    _shard(state, state.pipeline.module)
    # What the pipeline feeds is wrapped: with codes that is the suffix alone.
    state.wrapped = engine.wrap(state.pipeline.module, state.optimizer)
    state.ddp_is_warm = not engine.needs_warm_up(state.wrapped[0])
    processes.local.mark_step()  # what was loaded; else the first step would be a program of its own
    # After the wrapping, which makes the scaler.
    if scaler_state is not None and processes.accelerator.scaler is not None:
        processes.accelerator.scaler.load_state_dict(scaler_state)


def _shard(state: TrainState, module: nn.Module) -> None:
    """Let the engine shard what is trained; then the optimizer and the averages are of each process's shards."""
    setup, stage, processes = state.setup, state.stage, state.processes

    def rebuild(num_blocks: int) -> None:
        # The parameters are other objects now: the optimizer is built again, of shards.
        groups = sharded_groups(stage.groups, state.network.rule_names())
        state.optimizer, state.ema = stage.build_optimizer(groups), _averages(setup, stage)
        state.codes_cache.console.detail(
            f"fsdp2: {setup.trainable_params:,} trained parameters sharded over {processes.world_size} processes, "
            f"{num_blocks} blocks unsharded one after the other"
        )

    # Tried, and not looked up in a list: some optimizers learn something else on shards without a word.
    check_optimizer_shards(stage.optim, processes.engine.mesh, processes)
    norms = [param for layer in module.modules() if is_norm(layer) for param in layer.parameters(recurse=False)]
    processes.engine.shard(module, state.network, state.compute.precision, norms, rebuild)


def advance_stage(state: TrainState, stage: Stage) -> None:
    """Leave the stage that is over for the next one: unwrap, freeze, and build the optimizer again.

    What is frozen from here on keeps its average; moments are carried over by parameter name.
    """
    # DDP registers its hooks when it wraps: a parameter that is thawed later would never be synchronised.
    unwrap(state)
    # Batch statistics differ by rank until they are broadcast, and what is frozen now must be the same on all.
    state.processes.broadcast_buffers(state.network)
    if state.ema is not None:
        state.ema.settle([name for name in state.ema.averages if name not in stage.trained])
    # Before freezing: the old gradient of a parameter that is frozen now would still be clipped and stepped.
    state.network.zero_grad(set_to_none=True)
    apply_freezing(state.network, stage)
    # Another one: groups and rates are the stage's. Moments of what was trained before are carried over.
    optimizer = stage.build_optimizer()
    carry_moments(state.optimizer, optimizer)
    # Only now: until here the moments were taken from the optimizer of the stage before.
    state.stage, state.optimizer = stage, optimizer
    faults.at("stage")


def unwrap(state: TrainState) -> None:
    """Take off what was put around (and, for mixed precision, into) the module that was trained."""
    # A run that is resumed at the end of a stage leaves that stage without having entered it.
    if state.pipeline is not None:
        state.processes.engine.unwrap(state.pipeline.module)
        state.pipeline, state.wrapped = None, None


def finite_check(state: TrainState) -> FiniteCheck:
    """Return a check of the next pass, which can undo what the pass changed."""
    # A GradScaler (fp16) makes gradients infinite on purpose, and skips those steps itself.
    scales_loss = state.processes.accelerator.scaler is not None
    return FiniteCheck(state.network, state.processes, state.stage.unchanging_keys, scales_loss=scales_loss)


def validate(state: TrainState, loop: LoopState, logger: RunLogger) -> bool:
    """Evaluate the validation split and rank the step; return whether its checkpoint is one to keep."""
    split, select = state.setup.data.validation, state.evaluation.select
    assert split is not None
    # Steps are ranked by what would be exported: the averages, where they are kept.
    with state.setup.watch("evaluate"):
        figures = state.evaluate(split, state.inputs, error_of=select)
    is_kept = loop.rank_step(figures[select], state.evaluation, state.keeping, figures[f"{select}_se"])
    logger.write_evaluation("validation", figures, is_best=loop.chosen_step == loop.step, error_of=select)
    return is_kept


def stops_early(state: TrainState, loop: LoopState) -> bool:
    """Report, and say, whether the run is over before its last step, as its validation figure gets no better.

    Asked of the loop state alone: a run that was killed after this step finds the same when it is resumed.
    """
    if loop.awaits_evaluation or not state.due.stop_early(loop.step, loop.best_step):
        return False
    # Where none was ever finite, patience counts from the start.
    best = "none was finite" if loop.best_step is None else f"the best is that of step {loop.best_step}"
    state.codes_cache.console.say(
        f"stopped early at step {loop.step} of {state.due.last_step}: in {state.due.patience} evaluations "
        f"{state.evaluation.select} of validation was no better ({best})"
    )
    return True


def save(state: TrainState, loop: LoopState, folder: RunFolder, logger: RunLogger) -> None:
    """Make a checkpoint of the run, on all processes; first the log up to it is forced to the disk.

    Raises:
        DesyncError: the processes do not have the same weights any more.
        CheckpointError: the disk is full or cannot be written; the checkpoints before are untouched.
    """
    processes, setup = state.processes, state.setup
    with setup.watch("save"):
        # First, so that a run that is resumed from this checkpoint lacks no line of the log before it.
        processes.run_on_main(logger.sync)
        # What was read so far, by content: when the run is resumed, a file that was replaced is noticed.
        processes.run_on_main(record_contents, folder, setup.data)
        # The main process saves for all, so all take its buffers; parameters and averages must be equal by now.
        processes.broadcast_buffers(state.network)
        check_replicas_agree(replicated_tensors(state.network, state.ema), processes, loop.step)
        # By name and in the bare objects: any number of processes, with any engine, can resume from it.
        checkpoint = snapshot(
            loop,
            state.network,
            state.optimizer,
            state.ema,
            processes.accelerator,
            spent_s=setup.watch.spent(),
            unchanging_keys=setup.unchanging_keys,
        )
        write_checkpoint(folder.checkpoints, checkpoint, loop, state.keeping, processes)


def replicated_tensors(network: Classifier, ema: Ema | None) -> dict[str, Tensor]:
    """Return trained parameters by the names that rules match, buffers, and averages: the same names on every process.

    What is sharded over the processes (`compute.engine: fsdp2`) is not among them: each has another shard of it.
    """
    # What is frozen is not compared: nothing changes it.
    tensors = {name: param for name, param in network.rule_names().items() if param.requires_grad}
    buffers = {name.removeprefix("backbone."): buffer for name, buffer in network.named_buffers()}
    averages = {f"average of {name}": average for name, average in ema.averages.items()} if ema is not None else {}
    return {
        name: tensor for name, tensor in {**tensors, **buffers, **averages}.items() if not isinstance(tensor, DTensor)
    }
