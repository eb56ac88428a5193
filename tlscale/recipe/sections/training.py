"""The sections on how the network is trained: optimizer, schedule, stages and loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tlscale.recipe.duration import parse_duration
from tlscale.recipe.field_types import AnyDuration, FreezeRules, NumberRules, PositiveDuration
from tlscale.recipe.mistakes import InvalidValueError
from tlscale.recipe.sections.section import Section, check_no_share


class OptimSection(Section):
    """The optimizer and what its parameter groups get."""

    name: str = "adamw"
    """One of timm's optimizers; its `sgd` has Nesterov momentum of 0.9, plain momentum is `momentum`."""
    lr: float = Field(1e-3, ge=1e-12, le=1e38)
    """Peak learning rate, for the global batch size of the recipe as it stands (it is not scaled)."""
    weight_decay: float = Field(0.05, ge=0.0, le=1e4)
    """Weight decay of what no rule names; norm layers and biases have none unless `decay_norm_and_bias`."""
    decay_norm_and_bias: bool = False
    """Decay norm layers and biases as well."""
    options: dict[str, float | int | bool | list[float]] = {}
    """Other arguments of the optimizer, such as `{betas: [0.9, 0.95]}` or `{momentum: 0.9}`."""
    lr_rules: NumberRules = ()
    """Rules, regex -> factor on the learning rate; parameters that no rule matches have 1."""
    weight_decay_rules: NumberRules = ()
    """Rules, regex -> weight decay in place of `weight_decay`."""
    layer_decay: float | None = Field(None, ge=0.01, le=1.0)
    """Factor on the learning rate for each layer (timm's grouping) away from the head."""
    clip_grad_norm: float | None = Field(None, ge=1e-9, le=1e9)
    """Scale the gradient down to this norm, taken over all trainable parameters of the global batch."""
    ema_decay: float | None = Field(None, gt=0.0, lt=1.0)
    """Keep an exponential moving average of the trainable parameters, and evaluate and export that."""


class ScheduleSection(Section):
    """The learning rate as a function of the step."""

    warmup: AnyDuration = Field(default_factory=lambda: parse_duration("5%"))
    """Linear from 0 to the peak."""
    decay: Literal["cosine", "linear", "constant", "step"] = "cosine"
    """What comes after the warm-up."""
    min_factor: float = Field(0.0, ge=0.0, le=1.0)
    """Where cosine and linear end, as a share of the peak."""
    step_every: PositiveDuration | None = None
    """`decay: step` only: how long a stair is."""
    step_factor: float | None = Field(None, gt=0.0, lt=1.0)
    """`decay: step` only: factor from one stair to the next."""

    @model_validator(mode="after")
    def _check(self) -> ScheduleSection:
        for key in ("step_every", "step_factor"):
            is_given = getattr(self, key) is not None
            if is_given and self.decay != "step":
                raise InvalidValueError(
                    f"has no effect with decay={self.decay}", "Remove it, or write decay: step.", keys=[key, "decay"]
                )
            if not is_given and self.decay == "step":
                remedy = "Write both 'step_every' and 'step_factor'."
                raise InvalidValueError("missing with decay=step", remedy, keys=[key, "decay"])
        if self.decay in ("step", "constant") and self.min_factor != 0.0:
            raise InvalidValueError(
                f"has no effect with decay={self.decay}", "Remove it.", keys=["min_factor", "decay"]
            )
        return self


class StageSection(Section):
    """A part of the run with its own frozen layers; a key that is absent is as in the rest of the recipe."""

    freeze: FreezeRules = ()
    """As the recipe's `freeze`, for this stage; absent: nothing is frozen."""
    duration: PositiveDuration
    """Length of the stage."""
    lr: float | None = Field(None, ge=1e-12, le=1e38)
    """In place of `optim.lr`."""
    lr_rules: NumberRules | None = None
    """In place of `optim.lr_rules`."""
    layer_decay: float | None = Field(None, ge=0.01, le=1.0)
    """In place of `optim.layer_decay`."""
    schedule: ScheduleSection | None = None
    """In place of the recipe's `schedule`; shares (`5%`) are of the stage."""

    @model_validator(mode="after")
    def _check(self) -> StageSection:
        check_no_share(self.duration)
        return self


class LossSection(Section):
    """Summed over the images and divided by their number over all processes: what is trained on. The `loss` of every
    evaluation is plain cross-entropy (of several labels the binary one), without weights, smoothing and adjustment."""

    kind: Literal["cross_entropy", "focal", "asymmetric"] = "cross_entropy"
    """`cross_entropy`: of several labels (`data.task: multi_label`) the binary one of each class, averaged; `focal`:
    cross-entropy times (1 - p)^gamma, p the probability of an image's own class (Lin et al. 2017); `asymmetric`: of
    several labels, where those that an image lacks weigh less (Ridnik et al. 2021)."""
    focal_gamma: float = Field(2.0, ge=0.0, le=10.0)
    """How much less the images weigh that the network is sure of. For `focal`."""
    negative_gamma: float = Field(4.0, ge=0.0, le=10.0)
    """How much less the labels weigh that an image lacks, and that the network is sure of. For `asymmetric`."""
    negative_margin: float = Field(0.05, ge=0.0, lt=1.0)
    """Probability up to which a label that an image lacks weighs nothing. For `asymmetric`."""
    logit_adjustment: float = Field(0.0, ge=0.0, le=3.0)
    """For classes of unequal sizes: in training this times the logarithm of a class's share of the training images is
    added to its logit, so that the network itself does not favor the frequent ones (Menon et al. 2021, who take 1)."""
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of the target that is shared by all classes."""
    class_weights: Literal["none", "balanced"] | dict[str, Annotated[float, Field(ge=0.0, le=1e6)]] = "none"
    """`balanced`: inverse to each class's number of training images; or a weight for each class by name. An image's
    loss is multiplied by the weight of its own label; one mixed of two labels has a share of each label's weighted
    loss. Weights are scaled such that their mean over the training images is 1. Of several labels, for each class:
    `balanced`: images with it and images without have equal weight in all; by name: how many times as much those with
    it weigh. A probe takes these alone of `loss` (not with several labels); nearest neighbours have none."""

    @model_validator(mode="after")
    def _check(self) -> LossSection:
        if self.kind != "focal" and self.focal_gamma != 2.0:
            problem = f"has no effect with kind={self.kind}"
            raise InvalidValueError(problem, "Remove it, or write kind: focal.", keys=["focal_gamma", "kind"])
        for key, default in (("negative_gamma", 4.0), ("negative_margin", 0.05)):
            if self.kind != "asymmetric" and getattr(self, key) != default:
                problem = f"has no effect with kind={self.kind}"
                raise InvalidValueError(problem, "Remove it, or write kind: asymmetric.", keys=[key, "kind"])
        for key in ("label_smoothing", "logit_adjustment"):
            if self.kind == "focal" and getattr(self, key) > 0:
                raise InvalidValueError("is not supported with kind=focal", "Remove it.", keys=[key, "kind"])
        if self.logit_adjustment > 0 and self.class_weights != "none":
            raise InvalidValueError(
                "makes up for rare classes as class_weights does, and both would do it twice",
                "Remove one of them.",
                keys=["logit_adjustment", "class_weights"],
            )
        return self


class NonFiniteSection(Section):
    """What happens when the loss or a gradient is NaN or infinite, on any process."""

    action: Literal["raise", "skip"] = "raise"
    """`raise`: the run fails, and its checkpoints stay; `skip`: that step changes nothing, for which all processes
    check every step before its update."""
    most_steps: int = Field(10, ge=1, le=10**12)
    """If more steps than these would be skipped, the run fails. For `skip`."""

    @model_validator(mode="after")
    def _check(self) -> NonFiniteSection:
        if self.action == "raise" and self.most_steps != 10:
            raise InvalidValueError("has no effect with action=raise", "Remove it.", keys=["most_steps", "action"])
        return self
