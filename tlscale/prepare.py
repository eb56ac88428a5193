"""From a recipe to everything that a run needs, with nothing trained yet: `run` and `plan` share this.

Promise: whatever is wrong with the recipe, the data or the model is found here, before the first step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from tlscale.data.images import decode_image
from tlscale.data.loaders import ImageStore, default_workers, find_bad_images
from tlscale.data.sampler import BatchSplit, DataOrder, split_batch_size
from tlscale.data.sources import ImageData, ImageSplit, open_data
from tlscale.data.transforms import InputSpec, resolve_input
from tlscale.errors import DataError, RecipeError
from tlscale.model.backbone import WeightsReport, build_backbone
from tlscale.model.classifier import Classifier, enable_gradient_checkpointing, feature_width
from tlscale.model.freeze import FreezeRow, check_trainable, freeze_parameters
from tlscale.model.heads import build_head, is_single_linear
from tlscale.objective import Objective, class_weights
from tlscale.optim import Group, check_optimizer, parameter_groups
from tlscale.recipe.duration import Duration
from tlscale.recipe.schema import Recipe
from tlscale.recipe.values import augmentation_values
from tlscale.schedule import make_lr_factor
from tlscale.seeds import derive_seed
from tlscale.tracking import check_installed


@dataclass
class Prepared:
    """A run about to begin."""

    recipe: Recipe
    data: ImageData
    bad_images: list[tuple[int, str]]
    spec: InputSpec
    classifier: Classifier
    weights: WeightsReport
    freeze_rows: list[FreezeRow]
    code_width: int
    groups: list[Group]
    order: DataOrder
    split: BatchSplit
    total_steps: int
    lr_factor: Callable[[int], float]

    def to_steps(self, duration: Duration) -> int:
        """A duration of this run in steps, at least 1."""
        return max(_to_steps(duration, self.order, self.total_steps), 1)

    @property
    def trainable_params(self) -> int:
        return sum(param.numel() for param in self.classifier.parameters() if param.requires_grad)

    @property
    def total_params(self) -> int:
        return sum(param.numel() for param in self.classifier.parameters())

    @property
    def augment(self) -> dict[str, float | None]:
        return augmentation_values(self.recipe.data.augment)

    def train_store(self) -> ImageStore:
        """The training images, kept in memory where they fit."""
        return ImageStore(self.data.train, self.recipe.data, self.spec, crops="crop" in self.augment)

    def eval_store(self, split: ImageSplit) -> ImageStore:
        """The images of a split as evaluation wants them."""
        return ImageStore(split, self.recipe.data, self.spec)

    def workers(self, store: ImageStore, device: torch.device, *, augmented: bool, processes: int) -> int:
        """Worker processes for `store`, when so many training processes share the machine."""
        return default_workers(
            self.recipe.data, cached=store.cached, augmented=augmented, device=device, processes=processes
        )

    @property
    def eval_batch_size(self) -> int:
        """Images per process and forward pass at evaluation."""
        return self.recipe.evaluate.batch_size or self.split.micro_batch_size

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and of the images as they enter the network."""
        return torch.float64 if self.recipe.compute.precision == "fp64" else torch.float32


class Due:
    """Which steps are followed by what; a function of the step (counted from 1)."""

    def __init__(self, prepared: Prepared, *, validates: bool) -> None:
        recipe = prepared.recipe
        self._last = prepared.total_steps
        self._log, self._save = prepared.to_steps(recipe.log_every), prepared.to_steps(recipe.checkpoint.every)
        self._evaluate = prepared.to_steps(recipe.evaluate.every) if validates else None

    def log(self, step: int) -> bool:
        return step % self._log == 0 or step == self._last

    def save(self, step: int) -> bool:
        return step % self._save == 0 or step == self._last

    def evaluate(self, step: int) -> bool:
        return self._evaluate is not None and (step % self._evaluate == 0 or step == self._last)


def prepare(recipe: Recipe, *, world_size: int, bad_images: list[tuple[int, str]] | None = None) -> Prepared:
    """Open the data, build the model, match the rules, do the arithmetic.

    Args:
        recipe: the recipe.
        world_size: number of processes.
        bad_images: positions and reasons of training images that an earlier start of this run found bad; None:
            look for them, where the recipe says to skip them.

    Raises:
        TlscaleError: whatever is wrong, of the kind that says where.
    """
    check_installed(recipe.track)
    check_optimizer(recipe.optim)
    data = open_data(recipe.data, recipe.seed)
    if data.test is None and data.validation is None:
        raise DataError("there is nothing to evaluate on: no test split, and data.validation_fraction is 0")
    backbone, weights = build_backbone(recipe.backbone, image_size=recipe.data.image_size, seed=recipe.seed)
    spec = _input_spec(recipe, data, backbone)
    bad_images = _find_bad(recipe, data, spec) if bad_images is None else bad_images
    data = _without(data, bad_images)
    classifier, freeze_rows, code_width = _assemble(recipe, data, backbone, spec)
    params = classifier.rule_names()
    depth = classifier.layer_depth() if recipe.optim.layer_decay is not None else {}
    groups = parameter_groups(params, recipe.optim, layer_depth=depth, never_decayed=classifier.never_decayed())
    order = DataOrder(len(data.train), recipe.batch_size, recipe.seed, recipe.drop_last)
    total_steps = _to_steps(recipe.duration, order, None)
    _refuse_long_warmup(recipe, order, total_steps)
    lr_factor = make_lr_factor(
        recipe.schedule, total_steps=total_steps, to_steps=lambda duration: _to_steps(duration, order, total_steps)
    )
    split = split_batch_size(recipe.batch_size, world_size, recipe.compute.micro_batch_size)
    return Prepared(
        recipe, data, bad_images, spec, classifier, weights, freeze_rows, code_width, groups, order, split,
        total_steps, lr_factor,
    )  # fmt: skip


def _to_steps(duration: Duration, order: DataOrder, total_steps: int | None) -> int:
    return duration.to_steps(num_images=order.images_per_epoch, batch_size=order.batch_size, total_steps=total_steps)


def _refuse_long_warmup(recipe: Recipe, order: DataOrder, total_steps: int) -> None:
    warmup_steps = _to_steps(recipe.schedule.warmup, order, total_steps)
    if warmup_steps > total_steps:
        raise RecipeError(
            f"schedule.warmup = {recipe.schedule.warmup} is {warmup_steps} steps, and duration = {recipe.duration} is "
            f"{total_steps}: the learning rate would never reach its peak. Shorten the warm-up"
        )


def _refuse_idle_rates(recipe: Recipe, backbone: torch.nn.Module) -> None:
    if any(param.requires_grad for param in backbone.parameters()):
        return
    for key in ("drop_rate", "drop_path_rate"):
        if getattr(recipe.backbone, key) > 0:
            raise RecipeError(f"backbone.{key} has no effect: the whole backbone is frozen, and so in eval mode")


def _input_spec(recipe: Recipe, data: ImageData, backbone: torch.nn.Module) -> InputSpec:
    cfg: dict[str, Any] = backbone.pretrained_cfg  # type: ignore[assignment]
    image_hw = _first_image_hw(recipe, data.train)
    return resolve_input(recipe.data, in_chans=recipe.backbone.in_chans, pretrained_cfg=cfg, image_hw=image_hw)


def _first_image_hw(recipe: Recipe, split: ImageSplit) -> tuple[int, int]:
    """Height and width of the first training image that can be read."""
    max_pixels = round(recipe.data.max_megapixels * 1e6)
    for row in range(len(split)):
        try:
            image_HWC = decode_image(
                split.read(row), in_chans=recipe.backbone.in_chans, max_pixels=max_pixels, where=split.where(row)
            )
        except DataError:
            if recipe.data.on_bad_image == "error":
                raise
            continue
        return image_HWC.shape[0], image_HWC.shape[1]
    raise DataError(f"none of the {len(split)} training images can be read; the first is {split.where(0)}")


def _find_bad(recipe: Recipe, data: ImageData, spec: InputSpec) -> list[tuple[int, str]]:
    if recipe.data.on_bad_image == "error":
        return []
    max_pixels = round(recipe.data.max_megapixels * 1e6)
    return find_bad_images(data.train, in_chans=spec.in_chans, max_pixels=max_pixels)


def _without(data: ImageData, bad_images: list[tuple[int, str]]) -> ImageData:
    if not bad_images:
        return data
    train = data.train.without([position for position, _ in bad_images])
    if len(train) == 0:
        raise DataError(f"all {len(bad_images)} training images are bad; the first: {bad_images[0][1]}")
    return replace(data, train=train)


def _assemble(
    recipe: Recipe, data: ImageData, backbone: torch.nn.Module, spec: InputSpec
) -> tuple[Classifier, list[FreezeRow], int]:
    width = feature_width(backbone, in_chans=spec.in_chans, image_size=spec.image_size)
    rows = freeze_parameters(backbone, recipe.freeze)
    _refuse_idle_rates(recipe, backbone)
    seed = derive_seed(recipe.seed, "head")
    head = build_head(recipe.head, in_features=width, num_classes=len(data.classes), seed=seed)
    classifier = Classifier(backbone, head)
    check_trainable(classifier.parameters(), recipe.freeze)
    if recipe.compute.gradient_checkpointing:
        enable_gradient_checkpointing(classifier, in_chans=spec.in_chans, image_size=spec.image_size)
    if recipe.compute.precision == "fp64":
        classifier.double()
    if recipe.compute.channels_last:
        classifier.to(memory_format=torch.channels_last)
    return classifier.train(), rows, width


def make_objective(prepared: Prepared, device: torch.device) -> Objective:
    """The recipe's loss, its class weights on `device`."""
    recipe, data = prepared.recipe, prepared.data
    weights_C = class_weights(recipe.loss, data.train.labels_N, data.classes)
    if weights_C is not None:
        weights_C = weights_C.to(prepared.dtype).to(device)
    return Objective(recipe.loss, weights_C)


def strategy_of(prepared: Prepared) -> str:
    """The strategy's name (design.md, section 2): scratch, head, mlp or finetune."""
    recipe = prepared.recipe
    if not any(param.requires_grad for param in prepared.classifier.backbone.parameters()):
        return "head" if is_single_linear(recipe.head) else "mlp"
    return "scratch" if recipe.backbone.weights == "none" and not recipe.freeze else "finetune"
