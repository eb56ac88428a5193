"""The recipe: every key, its default, unit and range, here and in `sections`.

Promise: strict models. An unknown key, a wrong type or a value out of range is an error, and so is an option that
would have no effect with the others. A `Recipe` dumped with `to_plain` and loaded again is the same recipe.
The reference page (docs/recipe.md) is made from the descriptions here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from tlscale.recipe.duration import parse_duration
from tlscale.recipe.field_types import (
    TRACKERS,
    FreezeRules,
    Head,
    PositiveDuration,
    augmentation_values,
    run_name,
)
from tlscale.recipe.mistakes import InvalidValueError
from tlscale.recipe.sections.data import DataSection
from tlscale.recipe.sections.network import (
    AdaptersSection,
    BackboneSection,
    CodesSection,
    DistillSection,
    LoraSection,
    ProbeSection,
)
from tlscale.recipe.sections.run import CheckpointSection, ComputeSection, EvaluateSection, WandbSection
from tlscale.recipe.sections.section import Section, check_no_share
from tlscale.recipe.sections.training import (
    LossSection,
    NonFiniteSection,
    OptimSection,
    ScheduleSection,
    StageSection,
)

__all__ = [
    "NO_EFFECT_BESIDE",
    "AdaptersSection",
    "BackboneSection",
    "CheckpointSection",
    "CodesSection",
    "ComputeSection",
    "DataSection",
    "DistillSection",
    "EvaluateSection",
    "LoraSection",
    "LossSection",
    "NonFiniteSection",
    "OptimSection",
    "ProbeSection",
    "Recipe",
    "ScheduleSection",
    "Section",
    "StageSection",
    "WandbSection",
    "asks_for",
]

_PENULTIMATE = "penultimate"
# optim and schedule are taken whole; of the others, only what differs from its default was asked for.
NO_EFFECT_BESIDE = {
    "probe": (
        *("freeze", "adapters", "head", "duration", "drop_last", "optim", "schedule", "checkpoint"),
        *("loss.kind", "loss.focal_gamma", "loss.negative_gamma", "loss.negative_margin"),
        *("loss.logit_adjustment", "loss.label_smoothing"),
        *("data.augment", "data.sampling"),
        *("evaluate.every", "evaluate.batch_size", "evaluate.choose", "evaluate.patience"),
        *("batch_size", "compute.micro_batch_size", "compute.gradient_checkpointing", "compute.compile"),
        *("compute.engine", "distill"),
        *("non_finite", "log_every", "codes.views", "codes.keep", "codes.disk_gib", "data.workers"),
        *("backbone.drop_rate", "backbone.drop_path_rate"),
    ),
    "stages": ("freeze", "duration"),
}
_OF_ONE_LABEL = ("data.sampling", "loss.label_smoothing", "loss.logit_adjustment")


class Recipe(Section):
    """One run, from images to a model."""

    name: Annotated[str, AfterValidator(run_name)]
    """Name of the run, and of its folder below `runs/`."""
    seed: int = Field(0, ge=0, le=2**63 - 1)
    """Everything random follows from it."""
    data: DataSection
    """Images."""
    backbone: BackboneSection
    """Pretrained network."""
    freeze: FreezeRules = ()
    """Rules on the backbone's parameter names: a regex (or several) whose whole-name matches are frozen; or a list of
    `{regex: true | false}`, first match wins. The head is never matched."""
    adapters: AdaptersSection | None = None
    """Small trained parts next to the frozen backbone."""
    head: Head = ["linear"]
    """New layers on the pooled features, always freshly initialised: `linear` (with a width, except the last), an
    activation, `{dropout: p}`, `layernorm`, `batchnorm`."""
    codes: CodesSection = CodesSection()
    """Codes."""
    probe: ProbeSection | None = None
    """A classifier on codes instead of training."""
    distill: DistillSection | None = None
    """A teacher."""
    stages: list[StageSection] | None = Field(None, min_length=1, max_length=100)
    """Several stages, one after the other, each with its own `freeze` and `duration`; in place of those."""
    duration: PositiveDuration = Field(default_factory=lambda: parse_duration("10 epochs"))
    """Length of the run."""
    batch_size: int = Field(128, ge=1, le=10_000_000)
    """Images in one optimizer step over all processes."""
    drop_last: bool = False
    """Leave out the last, short batch of each epoch."""
    optim: OptimSection = OptimSection()
    """Optimizer."""
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    """Learning rate."""
    loss: LossSection = LossSection()
    """Loss."""
    non_finite: NonFiniteSection = NonFiniteSection()
    """NaN and infinity."""
    compute: ComputeSection = ComputeSection()
    """Hardware."""
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    """Evaluation."""
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    """Checkpoints."""
    log_every: PositiveDuration = Field(default_factory=lambda: parse_duration("10 steps"))
    """How often a line goes to `metrics.jsonl` and the trackers."""
    track: list[Literal[TRACKERS]] = []  # type: ignore[valid-type]
    """Trackers besides `metrics.jsonl`: wandb, tensorboard, or another of Accelerate's."""
    wandb: WandbSection | None = None
    """Weights & Biases; has an effect only where `track` names it."""
    override: ClassVar[Callable[..., Recipe]]
    """Applies a list of `key=value`; put here by `load`, which reads them, and imports this file."""

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.wandb is not None and "wandb" not in self.track:
            raise InvalidValueError(
                "has no effect unless wandb is tracked", "Write track: [wandb].", keys=["wandb", "track"]
            )
        check_no_share(self.duration)
        self._check_strategy()
        self._check_codes()
        self._check_distill()
        self._check_sampling()
        self._check_channels()
        if self.probe is not None and self.probe.kind == "knn" and self.loss.class_weights != "none":
            problem = "is not supported with probe.kind=knn, whose neighbours have one vote each"
            remedy = "Remove it, or write logistic."
            raise InvalidValueError(problem, remedy, keys=["loss.class_weights", "probe.kind"])
        check_task(self)
        if self.compute.engine == "fsdp2" and len(self.stages or ()) > 1:
            raise InvalidValueError(
                "several stages are not supported with compute.engine=fsdp2, where parameters stay sharded to the end "
                "of the run",
                "Write compute.engine: ddp, or a recipe for each stage.",
                keys=["stages", "compute.engine"],
            )
        if len(set(self.track)) != len(self.track):
            raise InvalidValueError("names a tracker twice", "Name each once.", keys=["track"])
        if self.compute.micro_batch_size is not None and self.compute.micro_batch_size > self.batch_size:
            raise InvalidValueError(
                f"{self.compute.micro_batch_size} is more than batch_size={self.batch_size}",
                "Lower it, or remove it.",
                keys=["compute.micro_batch_size", "batch_size"],
            )
        return self

    def _check_channels(self) -> None:
        channels = self.backbone.in_chans
        for key in ("mean", "std"):
            numbers = getattr(self.data, key)
            if numbers is not None and len(numbers) != channels:
                raise InvalidValueError(
                    f"has {len(numbers)} numbers, but backbone.in_chans={channels}",
                    "Write one number per channel.",
                    keys=[f"data.{key}", "backbone.in_chans"],
                )
        names = augmentation_values(self.data.augment)
        for name in ("color_jitter", "trivialaugment", "randaugment"):
            if name in names and channels not in (1, 3):
                problem = f"{name} is for grey and RGB, and backbone.in_chans is {channels}"
                remedy = "Write trivialaugment_geometric, which only moves, or remove it."
                raise InvalidValueError(problem, remedy, keys=["data.augment", "backbone.in_chans"])
            if name in names and name != "color_jitter" and self.data.range is not None:
                problem = f"{name} works on 8 bits, and data.range keeps more"
                remedy = "Write trivialaugment_geometric, or color_jitter; or remove it."
                raise InvalidValueError(problem, remedy, keys=["data.augment", "data.range"])

    def _check_strategy(self) -> None:
        """Refuse what has no effect with `probe` or `stages`; what is at its default was not asked for."""
        if self.probe is not None and self.stages is not None:
            raise InvalidValueError(
                "a probe trains nothing, but 'stages' says what is trained when",
                "Remove one of them.",
                keys=["probe", "stages"],
            )
        for name, why in (("probe", "a probe trains nothing"), ("stages", "each stage has its own")):
            if getattr(self, name) is None:
                continue
            for key in NO_EFFECT_BESIDE[name]:
                if asks_for(self, key):
                    raise InvalidValueError(f"has no effect with '{name}': {why}", "Remove it.", keys=[key, name])

    def _check_codes(self) -> None:
        if self.codes.views > 1 and not self.data.augment:
            raise InvalidValueError(
                "has no effect without data.augment, as all views would be the same",
                "Remove it, or write data.augment.",
                keys=["codes.views", "data.augment"],
            )
        if self.codes.pool != ["avg"] and set(self.codes.layer or [_PENULTIMATE]) == {_PENULTIMATE}:
            raise InvalidValueError(
                "has no effect on penultimate codes, which the backbone pools itself",
                "Remove it, or name layers in codes.layer.",
                keys=["codes.pool", "codes.layer"],
            )

    def _check_distill(self) -> None:
        if self.distill is None:
            if self.evaluate.select == "distill_loss":
                remedy = "Write another figure."
                raise InvalidValueError("distill_loss needs 'distill'", remedy, keys=["evaluate.select", "distill"])
            return
        if self.loss.kind != "cross_entropy":
            problem = f"{self.loss.kind} is not supported with 'distill'"
            raise InvalidValueError(problem, "Write cross_entropy.", keys=["loss.kind", "distill"])
        names = augmentation_values(self.data.augment)
        for name in ("mixup", "cutmix"):
            if name in names:
                problem = f"{name} is not supported with 'distill', whose teacher is queried for one image at a time"
                raise InvalidValueError(problem, "Remove it.", keys=["data.augment", "distill"])
        if names and self.codes.views == 1:
            raise InvalidValueError(
                "needs codes.views of at least 2 with 'distill'",
                "Write codes.views: so many augmented views of each image are shown to the teacher, once, and to the "
                "student, one an epoch.",
                keys=["data.augment", "codes.views", "distill"],
            )
        if self.compute.engine == "fsdp2":
            problem = "fsdp2 is not supported with 'distill'"
            raise InvalidValueError(problem, "Write ddp.", keys=["compute.engine", "distill"])
        if self.codes.keep != "auto":
            problem = "has no effect with 'distill', where the teacher's codes are cached in any case"
            raise InvalidValueError(problem, "Remove it.", keys=["codes.keep", "distill"])

    def _check_sampling(self) -> None:
        if self.data.sampling == "natural":
            return
        mixed = [name for name in ("mixup", "cutmix") if name in augmentation_values(self.data.augment)]
        beside = {
            "data.augment": mixed and f"{mixed[0]}, which draws the other image evenly",
            "distill": self.distill is not None and "'distill'",
        }
        for key, what in beside.items():
            if what:
                problem = f"is not supported with {what}"
                raise InvalidValueError(problem, "Remove one of them.", keys=["data.sampling", key])
        for key in ("loss.class_weights", "loss.logit_adjustment"):
            if asks_for(self, key):
                problem = f"makes up for rare classes as {key} does, and both would do it twice"
                raise InvalidValueError(problem, "Remove one of them.", keys=["data.sampling", key])

    @property
    def freezing(self) -> list[FreezeRules]:
        """Return the freeze rules of each stage; of one where there are no `stages`."""
        return [stage.freeze for stage in self.stages] if self.stages else [self.freeze]

    def with_(self, **changes: Any) -> Recipe:
        """Return the recipe with other values, checked as a whole: `with_(duration="5 epochs", **{"optim.lr": 3e-4})`.

        Args:
            changes: by key, with dots; plain values as YAML has them.

        Raises:
            RecipeError: no such key, a value that does not fit, or keys that do not fit each other.
        """
        return self.override([f"{key}={json.dumps(value)}" for key, value in changes.items()])

    def __str__(self) -> str:
        """Return what differs from the defaults, as YAML."""
        from tlscale.recipe.yaml_text import write_yaml  # imports a parser, which nobody needs before

        return write_yaml(self.model_dump(mode="json", exclude_defaults=True))

    def __repr__(self) -> str:
        return f"<Recipe {self.name!r}>"

    def to_plain(self) -> dict[str, Any]:
        """Return the complete recipe as plain YAML values, in schema order."""
        return self.model_dump(mode="json")


def check_task(recipe: Recipe) -> None:
    """Refuse what is of several labels an image alone, and what of them is not supported.

    Raises:
        InvalidValueError: there is such a key.
    """
    if recipe.data.task != "multi_label":
        if recipe.loss.kind == "asymmetric":
            remedy = "Write another one; or data.task: multi_label, where an image has several labels."
            raise InvalidValueError("is of several labels an image", remedy, keys=["loss.kind", "data.task"])
        return
    unsupported = {
        "loss.kind": recipe.loss.kind == "focal",
        "evaluate.select": recipe.evaluate.select not in ("top1", "mean_average_precision", "loss"),
        "probe.kind": recipe.probe is not None and recipe.probe.kind != "logistic",
        "distill": recipe.distill is not None,
        "loss.class_weights": recipe.probe is not None and recipe.loss.class_weights != "none",
        **{key: asks_for(recipe, key) for key in _OF_ONE_LABEL},
    }
    remedies = {
        "loss.kind": "Write cross_entropy or asymmetric.",
        "evaluate.select": "Write mean_average_precision or loss.",
        "probe.kind": "Write logistic.",
    }
    for key, is_given in unsupported.items():
        if is_given:
            problem = "is not supported with several labels an image"
            raise InvalidValueError(problem, remedies.get(key, "Remove it."), keys=[key, "data.task"])


def asks_for(recipe: Recipe, dotted: str) -> bool:
    """Return whether a key has another value than its default."""
    section: Section = recipe
    *above, name = dotted.split(".")
    for part in above:
        section = getattr(section, part)
    return bool(getattr(section, name) != type(section).model_fields[name].get_default(call_default_factory=True))
