"""The sections on how a run is computed, evaluated, saved and tracked."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tlscale.recipe.duration import parse_duration
from tlscale.recipe.field_types import VIEWS, PositiveDuration
from tlscale.recipe.mistakes import InvalidValueError
from tlscale.recipe.sections.section import Section


class ComputeSection(Section):
    """How it is computed; nothing here changes what is learned, up to rounding."""

    engine: Literal["auto", "ddp", "fsdp2"] = "auto"
    """How several processes train together: `ddp`, each with a whole network; `fsdp2`, each with its share of every
    tensor that is trained, of its gradient, moments and average. `auto`: `ddp` where there are several."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """Of the forward and backward pass; weights are kept in float32 (float64 for `fp64`)."""
    micro_batch_size: int | None = Field(None, ge=1, le=10_000_000)
    """Most images that one process passes through the network at once; by default its whole share of the batch."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory; an error where the backbone does not do it."""
    channels_last: bool = False
    """Keep activations in channels-last order."""
    compile: bool = False
    """Compile the model with `torch.compile`."""
    deterministic: bool = False
    """Use only deterministic algorithms (the CPU's are; on a GPU slower, and some operations have none)."""
    threads: int | None = Field(None, ge=1, le=1024)
    """CPU threads of a process; by default the machine's cores divided among its processes. Sums on a CPU depend on it
    in the last bit, so a run that is to be repeated exactly elsewhere names it."""
    num_processes: int | None = Field(None, ge=1, le=1_000_000)
    """Refuse to run on any other number of processes; by default as many as the launcher started."""
    hang_timeout_s: float = Field(1800.0, ge=1.0, le=2_592_000.0)
    """Seconds without a sign of life (a step, a batch of an evaluation, a block of codes) after which a process writes
    the stack of each of its threads to stderr and ends; also how long it waits for the others."""

    def without_engine(self) -> ComputeSection:
        """Return the same section for what trains nothing, which several processes do without any engine."""
        return self.model_copy(update={"engine": "auto"})

    @model_validator(mode="after")
    def _check(self) -> ComputeSection:
        if self.engine != "fsdp2":
            return self
        if self.precision == "fp16":
            problem = "fp16 is not supported with engine=fsdp2, as the loss would have to be scaled over all shards"
            raise InvalidValueError(problem, "Write bf16.", keys=["precision", "engine"])
        for key, why in (
            ("channels_last", "FSDP2 cannot shard tensors in this memory format"),
            ("compile", "untested"),
        ):
            if getattr(self, key):
                problem = f"not supported with engine=fsdp2 ({why})"
                raise InvalidValueError(problem, "Remove one of them.", keys=[key, "engine"])
        return self


class EvaluateSection(Section):
    """When the validation images are evaluated, and which weights are best; or a cross-validation."""

    folds: int | None = Field(None, ge=2, le=1000)
    """Cross-validation: the images of train (and of a given validation split) are divided into so many folds,
    stratified, and no group is divided. Each fold is scored by a run that was not fitted to it, and that chooses on a
    validation split of its own; the result is over all of these images. By default there are none."""
    repeats: int = Field(1, ge=1, le=100)
    """How often the cross-validation is repeated, each time with other folds. For `folds`."""
    views: list[Literal[VIEWS]] = []  # type: ignore[valid-type]
    """Test-time augmentation: probabilities are means over these views of an image, next to the plain one, in each
    evaluation and in `predict`. `flip`: left for right; `vertical_flip`; `five_crop`: the corners as well as the centre
    of the resized image. Of several all combinations, so that `[flip, five_crop]` are the usual ten crops; the cost of
    an evaluation is as many times as high. Where codes are cached, each view's are computed once."""
    every: PositiveDuration = Field(default_factory=lambda: parse_duration("1 epochs"))
    """How often; the last step is always evaluated."""
    batch_size: int | None = Field(None, ge=1, le=10_000_000)
    """Images per process and forward pass; by default what a process takes in training."""
    select: Literal[
        "top1", "loss", "macro_f1", "balanced_accuracy", "auroc", "mean_average_precision", "distill_loss"
    ] = "top1"
    """The validation figure by which weights are best; `balanced_accuracy`: the mean of the classes' own accuracies;
    `auroc` and `mean_average_precision`: means over the classes that have validation images, each against the rest, by
    its probability; the latter is the default of several labels an image, which have no other such figure;
    `distill_loss`: what `distill` adds to the loss. Of a probe: by which layer, pooling and strength are best."""
    choose: Literal["latest_within_se", "best"] = "latest_within_se"
    """Which weights are exported: `best`: those of the best validation figure; `latest_within_se`: the latest ones
    whose figure is within one standard error of the best, since the best of many figures of few images is best by luck.
    The error is binomial for `top1`, that of the mean for a loss, and by bootstrap for the others; of images in groups
    it is over these."""
    patience: int | None = Field(None, ge=1, le=10**6)
    """Stop early, when so many evaluations in a row were no better than the best one before; of several stages those of
    the last one count. The learning rate is laid out over the whole duration, wherever the run stops: with a rate that
    falls to its end (`schedule.decay: cosine`) it stops at a high one, so write `constant` with this."""

    @model_validator(mode="after")
    def _check(self) -> EvaluateSection:
        if self.repeats > 1 and self.folds is None:
            raise InvalidValueError("has no effect without 'folds'", "Remove it, or write folds.", keys=["repeats"])
        if len(set(self.views)) < len(self.views):
            raise InvalidValueError("names a view twice", "Write each once.", keys=["views"])
        return self

    def of_task(self, task: str | None) -> EvaluateSection:
        """Return the section with the default figure of a task: nothing is top 1 among several labels."""
        is_default = task == "multi_label" and self.select == "top1"
        return self.model_copy(update={"select": "mean_average_precision"}) if is_default else self


class CheckpointSection(Section):
    """What is kept of a run while it runs."""

    every: PositiveDuration = Field(default_factory=lambda: parse_duration("1 epochs"))
    """How often; the last step, and a stop by signal, are always saved."""
    keep: int = Field(2, ge=1, le=1000)
    """Newest checkpoints to keep."""
    keep_best: int = Field(1, ge=1, le=1000)
    """Best checkpoints to keep besides, by `evaluate.select`; the one that `evaluate.choose` names is the first."""


class WandbSection(Section):
    """Weights & Biases; keys and passwords never go into a recipe."""

    project: str = "tlscale"
    """Project there."""
    entity: str | None = None
    """User or team there."""
    mode: Literal["auto", "online", "offline"] = "auto"
    """`auto`: online where somebody is logged in, else offline (`wandb sync` uploads it later)."""
    tags: list[str] = []
    """Tags of the run."""
