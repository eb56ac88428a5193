"""Set a run up: from a recipe to everything that it needs, with nothing trained yet. `run` and `plan` share this.

Promise: whatever is wrong with the recipe, the data or the model is found here, before the first step.
"""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from tlscale.data.channel_stats import Began, channels_of
from tlscale.data.decode import Reading
from tlscale.data.input_spec import InputSpec, resolve_input, sampled_sizes
from tlscale.data.resize import seen_share
from tlscale.data.sampler import (
    BatchSplit,
    ClassDraw,
    DataOrder,
    Ints,
    least_in_a_pass,
    split_batch_size,
)
from tlscale.data.sources.folds import Fold
from tlscale.data.sources.open import BadImages, ImageData, ImageSplit, open_data
from tlscale.data.views import View, views_of
from tlscale.distributed.signals import check_stop
from tlscale.errors import DataError, ModelError, RecipeError
from tlscale.models.adapters import add_adapters, is_of_adapter
from tlscale.models.backbone import build_backbone
from tlscale.models.classifier import (
    Classifier,
    enable_gradient_checkpointing,
    feature_width,
    put_channels_last,
    trains_on_one_image,
    unused_parameters,
)
from tlscale.models.earlier_run import start_from_run, take_head
from tlscale.models.features import PENULTIMATE
from tlscale.models.heads import build_head, is_single_linear
from tlscale.models.model_folder import TrainedModel
from tlscale.models.weights import WeightsReport, named
from tlscale.recipe.duration import Duration
from tlscale.recipe.field_types import augmentation_values
from tlscale.recipe.schema import BackboneSection, DataSection, Recipe, StageSection
from tlscale.recipe.sections.network import MIN_MATCHED
from tlscale.recipe.seeds import derive_seed
from tlscale.tracking.stopwatch import Stopwatch
from tlscale.tracking.trackers import check_installed
from tlscale.training.distillation.loss import labels_teach
from tlscale.training.distillation.student import Student
from tlscale.training.distillation.teacher import Teacher, open_teacher
from tlscale.training.earlier_counts import EarlierImages
from tlscale.training.fold_parts import Part, all_images, first_stages
from tlscale.training.idle import refuse_idle
from tlscale.training.loss import loss_name, refuse_mixed_targets
from tlscale.training.optimizer import check_optimizer
from tlscale.training.predictions import MOST_LOGITS
from tlscale.training.select_checks import with_note_on_select
from tlscale.training.stages import Stage, apply_freezing, plan_stages, to_steps
from tlscale.training.view_checks import refuse_senseless_views


@dataclass
class RunSetup:
    """Hold what a run begins with."""

    recipe: Recipe
    data: ImageData
    spec: InputSpec
    classifier: Classifier
    weights: WeightsReport
    code_width: int
    order: DataOrder
    split: BatchSplit
    stages: list[Stage]
    teacher: Teacher | None = None
    watch: Stopwatch = field(default_factory=Stopwatch)
    seen_share: float = 1.0
    """Share of a typical training image that the network is shown in an evaluation."""
    part: Part | None = None
    """Of a cross-validation: the run of a fold, or of the model on all images. None: the whole, or none."""
    earlier: tuple[EarlierImages, ...] = ()
    """Scored images that had a part in the runs that this one starts or learns from."""

    @property
    def bad_images(self) -> BadImages:
        return self.data.bad_images

    @property
    def total_steps(self) -> int:
        return self.stages[-1].stop_step if self.stages else 0  # a probe makes none

    def to_steps(self, duration: Duration) -> int:
        """Convert a duration of this run to steps, at least 1."""
        return max(to_steps(duration, self.order, self.total_steps), 1)

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that any stage trains, by rule name."""
        names = frozenset[str]().union(*(stage.trained for stage in self.stages))
        return {name: param for name, param in self.classifier.rule_names().items() if name in names}

    @property
    def unchanging_keys(self) -> frozenset[str]:
        """Keys of the classifier's state dict whose values no stage can change."""
        return frozenset.intersection(*(stage.unchanging_keys for stage in self.stages))

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def seed(self) -> int:
        return self.recipe.seed

    @property
    def trainable_params(self) -> int:
        return sum(param.numel() for param in self.trained.values())

    @property
    def total_params(self) -> int:
        return sum(param.numel() for param in self.classifier.parameters())

    @property
    def frozen_params(self) -> int:
        """Parameters that no stage trains."""
        return self.total_params - self.trainable_params

    @property
    def view_names(self) -> list[str]:
        return self.recipe.evaluate.views

    @property
    def views(self) -> tuple[View, ...]:
        """The views of an image that an evaluation averages over; the plain one alone where the recipe names none."""
        return views_of(self.view_names)

    @property
    def augment(self) -> dict[str, float | None]:
        return augmentation_values(self.recipe.data.augment)

    def num_seen(self, stage: Stage, step: int) -> int:
        """Return how many training images a stage sees from `step` on, partners of mixup included.

        Stages after it count where they cannot be trained on codes, which are not decoded for them.
        """
        later = [one for one in self.stages[stage.number + 1 :] if one.trains_all or self.recipe.codes.keep == "never"]
        spans = [(step, stage.stop_step), *((one.start_step, one.stop_step) for one in later)]
        seen = sum(self.order.images_seen(stop) - self.order.images_seen(start) for start, stop in spans)
        return seen * (2 if {"mixup", "cutmix"} & set(self.augment) else 1)

    def image_views(self, stage: Stage) -> int | None:
        """Return the number of augmented views of each training image that a stage sees; None: a new one each epoch.

        It depends on the recipe alone, and not on whether codes are cached, for which there may be no room.
        """
        codes = self.recipe.codes
        are_few = codes.views > 1 or (codes.keep == "always" and not stage.trains_all)
        return codes.views if are_few or self.teacher is not None else None

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and of the images as they enter the network."""
        return torch.float64 if self.recipe.compute.precision == "fp64" else torch.float32


def set_up(
    recipe: Recipe,
    *,
    world_size: int,
    part: Part | None = None,
    bad_images: BadImages | None = None,
    is_new: bool | None = None,
    tries_images: bool = True,
    watch: Stopwatch | None = None,
    began: Began = None,
) -> RunSetup:
    """Open the data, build the model, match the rules, do the arithmetic.

    Args:
        part: of a recipe with `evaluate.folds`; None: all images are trained on, and none is held out.
        bad_images: those that an earlier start of this run found; None: find them, where the recipe says to skip them.
        is_new: the run begins now; None: where the bad images are not known.
        tries_images: decode images to find those; else all are taken as sound.
        began: `input` of `run.json`, by which an earlier start keeps the mean of channels that it measured.

    Raises:
        TlscaleError: whatever is wrong, of the kind that says where.
    """
    check_installed(recipe.track)
    check_optimizer(recipe.optim)
    loss = loss_name(recipe.loss, recipe.distill, several=recipe.data.task == "multi_label")
    refuse_mixed_targets(loss, augmentation_values(recipe.data.augment))
    watch = watch or Stopwatch()
    fold = part.fold if part is not None else all_images(recipe.evaluate)
    with watch("scan"):
        opened = partial(open_data, in_chans=recipe.backbone.in_chans, tries_images=tries_images)
        data = opened(recipe.data, recipe.seed, fold=fold, bad_images=bad_images)
    _refuse_no_images(data, fold)
    data = with_note_on_select(recipe, data)
    backbone, weights, earlier = _backbone(recipe)
    check_stop("setting up")
    sizes = sampled_sizes(data.train.table, Reading.of(recipe.data))
    spec = _input_spec(recipe, data.train, sizes, backbone, began)
    teacher = _teacher(recipe, data, spec)
    if recipe.adapters is not None:
        add_adapters(backbone, recipe.adapters.lora, recipe.freezing, seed=recipe.seed)
    classifier, code_width = _assemble(recipe, data, backbone, spec, teacher)
    if earlier is not None and recipe.probe is None:
        weights = take_head(classifier.head, earlier, data.classes, weights)
    draw = _class_draw(recipe.data, data.train.labels_N, recipe.seed)
    order = DataOrder(len(data.train), recipe.batch_size, recipe.seed, recipe.drop_last, draw)
    # A probe takes no steps: its batches are of its own making.
    batch_size = recipe.batch_size if recipe.probe is None else world_size
    split = split_batch_size(batch_size, world_size, recipe.compute.micro_batch_size)
    stages = _plan_stages(recipe, classifier, order, spec, part) if recipe.probe is None else []
    setup = RunSetup(recipe, data, spec, classifier, weights, code_width, order, split, stages, teacher, watch)
    setup.part, setup.seen_share = part, statistics.median(seen_share(*size, spec) for size in sizes)
    refuse_senseless_views(recipe.evaluate.views, data.classes, setup.seen_share)
    if is_new or (is_new is None and bad_images is None):  # a run that began earlier goes on as it began
        _refuse_random_frozen(setup)
        refuse_idle(recipe, data, classifier, stages, order, fold)
    check_stop("setting up")
    if stages:
        _refuse_what_cannot_train(setup, world_size)
    return setup


def _class_draw(section: DataSection, labels_N: Ints, seed: int) -> ClassDraw | None:
    if section.sampling == "natural":
        return None
    return ClassDraw(labels_N, 0.0 if section.sampling == "balanced" else section.sampling, seed)


def _backbone(recipe: Recipe) -> tuple[torch.nn.Module, WeightsReport, TrainedModel | None]:
    """Build the backbone; where its weights are those of a finished run, return that run's model as well."""
    check_stop("setting up")
    build = start_from_run if recipe.backbone.from_run else build_backbone
    backbone, weights, *earlier = build(recipe.backbone, image_size=recipe.data.image_size, seed=recipe.seed)
    return backbone, weights, earlier[0] if earlier else None


def _refuse_random_frozen(setup: RunSetup) -> None:
    """Refuse a file of weights without layers that nothing trains, unless the recipe asks for less than by default."""
    section = setup.recipe.backbone
    frozen = [name for name in setup.weights.missing if not setup.stages or f"backbone.{name}" in setup.unchanging_keys]
    if frozen and section.min_matched >= MIN_MATCHED:
        raise ModelError(
            f"'{section.weights}' lacks tensors, or has them in another shape, that are frozen, and would stay random: "
            f"{named(frozen)}",
            remedy="Give a file of the whole network, or have these trained (freeze); backbone.min_matched below "
            f"{MIN_MATCHED} takes them as they are",
            key="backbone.weights",
        )


def _refuse_no_images(data: ImageData, fold: Fold | None) -> None:
    if len(data.train) == 0:
        raise DataError(f"all training images are bad, such as {next(iter(data.bad_images.reasons()))}")
    if fold is not None:
        if len(data.classes) > MOST_LOGITS:
            problem = f"not supported with {len(data.classes):,} classes; the most is {MOST_LOGITS:,}"
            raise DataError(problem, key="evaluate.folds", remedy="Take it out")
        return
    if data.test is None and data.validation is None:
        raise DataError("there is nothing to evaluate on: no test split, and data.validation_fraction is 0")


def _plan_stages(
    recipe: Recipe, classifier: Classifier, order: DataOrder, spec: InputSpec, part: Part | None
) -> list[Stage]:
    whole_run = StageSection(freeze=recipe.freeze, duration=recipe.duration)
    stages = plan_stages(recipe.stages, whole_run, recipe.optim, recipe.schedule, classifier, order)
    _refuse_idle_rates(recipe.backbone, stages)
    if recipe.compute.gradient_checkpointing:
        # Tried in the stage that trains most; it acts in each that trains a part of the backbone.
        apply_freezing(classifier, max(stages, key=lambda stage: len(stage.trained)))
        enable_gradient_checkpointing(classifier, in_chans=spec.in_chans, image_size=spec.image_size)
        apply_freezing(classifier, stages[0])
    return stages if part is None else first_stages(stages, part.share)


def _refuse_idle_rates(backbone: BackboneSection, stages: list[Stage]) -> None:
    if any(stage.trains_backbone for stage in stages):
        return
    for key in ("drop_rate", "drop_path_rate"):
        if getattr(backbone, key) > 0:
            raise RecipeError("has no effect: the whole backbone is frozen, and so in eval mode", key=f"backbone.{key}")


def _input_spec(
    recipe: Recipe, train: ImageSplit, sizes: list[tuple[int, int]], backbone: torch.nn.Module, began: Began
) -> InputSpec:
    cfg: dict[str, Any] = backbone.pretrained_cfg  # type: ignore[assignment]
    in_chans = recipe.backbone.in_chans
    measure = channels_of(train, recipe.data, in_chans, began)
    return resolve_input(recipe.data, in_chans=in_chans, pretrained_cfg=cfg, sizes=sizes, measure=measure)


def _teacher(recipe: Recipe, data: ImageData, spec: InputSpec) -> Teacher | None:
    if recipe.distill is None:
        return None
    crops = "crop" in augmentation_values(recipe.data.augment)
    teacher = open_teacher(recipe.distill, recipe.seed, data.classes, spec, crops=crops)
    if recipe.compute.precision == "fp64":
        teacher.module.double()
    return teacher


def _assemble(
    recipe: Recipe, data: ImageData, backbone: torch.nn.Module, spec: InputSpec, teacher: Teacher | None
) -> tuple[Classifier, int]:
    width = feature_width(backbone, in_chans=spec.in_chans, image_size=spec.image_size)
    seed = derive_seed(recipe.seed, "head")
    head = build_head(recipe.head, in_features=width, num_classes=len(data.classes), seed=seed)
    classifier = Classifier(backbone, head)
    if recipe.distill is not None and teacher is not None:
        classifier = Student(
            backbone,
            head,
            [(recipe.distill.match[layer], teacher.widths[layer]) for layer in teacher.layers],
            image_size=spec.image_size,
            in_chans=spec.in_chans,
            labels_teach=labels_teach(recipe.distill),
            seed=derive_seed(recipe.seed, "projections"),
        )
    if recipe.compute.precision == "fp64":
        classifier.double()
    if recipe.compute.channels_last:
        put_channels_last(classifier, in_chans=spec.in_chans, image_size=spec.image_size)
    return classifier, width


def _refuse_what_cannot_train(setup: RunSetup, world_size: int) -> None:
    """Find by a pass on trial what would fail in the middle of an epoch, or leave a process waiting."""
    classifier, stages, trained = setup.classifier, setup.stages, setup.trained
    for name, param in classifier.rule_names().items():
        param.requires_grad_(name in trained)
    size: dict[str, Any] = {"in_chans": setup.spec.in_chans, "image_size": setup.spec.image_size}
    least = least_in_a_pass(setup.order, setup.split, setup.total_steps)
    alone = least == 1 and not trains_on_one_image(classifier, **size)
    # Each process waits for the others' gradient of every trained parameter, and so each must get one.
    waits = world_size > 1 and any(stage.trains_backbone for stage in stages)
    has_adapters = any(map(is_of_adapter, trained))
    unused = unused_parameters(classifier, **size) if (waits or has_adapters) and not alone else []
    apply_freezing(classifier, stages[0])
    if alone:
        raise _one_image(setup)
    if idle := [name for name in unused if is_of_adapter(name)]:
        raise ModelError(
            f"{type(classifier.backbone).__name__} reads the weight of '{idle[0].rpartition('.')[0]}' without calling "
            "the layer, and so past its adapter",
            key="adapters.lora.layers",
            remedy="Leave this layer out",
        )
    if unused and waits:
        raise ModelError(
            f"{type(classifier.backbone).__name__} has {len(unused)} parameters that are trained but have no "
            f"part in what is learned: {', '.join(unused[:5])}{' ...' if len(unused) > 5 else ''}. They never "
            "get a gradient, which several processes would wait for",
            key="backbone",
            remedy=f"Freeze them, in each stage: freeze: '{'|'.join(map(re.escape, unused))}'; or train on one "
            "process.",
        )


def _one_image(setup: RunSetup) -> RecipeError:
    order, split = setup.order, setup.split
    rest = order.num_images_in(order.steps_per_epoch - 1)
    if split.micro_batch_size == 1:
        what, remedy = "micro-batches are of one image", "Set compute.micro_batch_size, or batch_size, to more"
    else:
        what = f"the last batch of an epoch ({rest} of {order.batch_size} images) leaves a process with one image"
        remedy = "Set drop_last: true, or another batch_size"
    problem = f"{split.describe()}: {what}, and batch norm cannot be trained on one image"
    return RecipeError(problem, remedy=remedy)


def strategy_of(setup: RunSetup) -> str:
    """Return the strategy's name: codes, early_codes, mlp, head, lora, finetune, stages, scratch or distill."""
    recipe = setup.recipe
    if recipe.distill is not None:
        return "distill"
    if recipe.probe is not None:
        return "codes" if set(recipe.codes.layer or [PENULTIMATE]) == {PENULTIMATE} else "early_codes"
    if len(setup.stages) > 1:
        return "stages"
    if not setup.stages[0].trains_backbone:
        return "head" if is_single_linear(recipe.head) else "mlp"
    if recipe.adapters is not None:
        return "lora"
    return "finetune" if recipe.backbone.weights != "none" or setup.frozen_params else "scratch"
