"""The recipe: every key, its default, unit and range, in this one place.

Promise: strict models. An unknown key, a wrong type or a value out of range is an error, and so is an option that
would have no effect beside the others. A `Recipe` dumped with `to_plain` and loaded again is the same recipe.
The reference page (docs/recipe.md) is made from the descriptions here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from tlscale.recipe.duration import parse_duration
from tlscale.recipe.field_types import (
    TRACKERS,
    AnyDuration,
    Augment,
    FreezeRules,
    Head,
    Names,
    NumberRules,
    Pools,
    PositiveDuration,
    augmentation_values,
    run_name,
    weights_place,
)
from tlscale.recipe.sources import SOURCE_KEYS, SOURCES, check_source_keys


class Section(BaseModel):
    """A part of the recipe; strict, closed and frozen."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        arbitrary_types_allowed=True,
        use_attribute_docstrings=True,
    )


class DataSection(Section):
    """Where the images come from, and what is done to them before the backbone sees them."""

    source: Literal[tuple(SOURCES)] = Field(  # type: ignore[valid-type]
        description="; ".join(f"`{name}`: {source.about}" for name, source in SOURCES.items()) + "."
    )
    path: str | None = Field(None, min_length=1)
    """Folder or file of the source; for `hub` its name there. Relative to the folder tlscale is started in."""
    config: str | None = None
    """Configuration of a hub data set."""
    revision: str | None = None
    """Commit, tag or branch of a hub data set; the commit it stands for is written to `run.json`."""
    image_column: str | None = None
    """Column that holds the image or its path; found by itself when the name is usual (`image`, `img`, `path`...)."""
    label_column: str | None = None
    """Column that holds the label; found by itself when the name is usual (`label`, `labels`, `class`...)."""
    train_split: str = "train"
    """Name of the training split in the source."""
    validation_split: str | None = None
    """Name of the validation split; by itself `validation`, `valid` or `val` where one is there."""
    test_split: str = "test"
    """Name of the test split; never used to choose anything. Without one, results are those of the validation."""
    validation_fraction: float = Field(0.1, ge=0.0, le=0.5)
    """Share of the training images that is held out, stratified, where the source has no validation split."""
    classes: list[str] | None = Field(None, min_length=2)
    """Class names in the order of their numbers; by itself those of the training split, sorted."""
    train_limit: int | None = Field(None, ge=1)
    """Use only so many labelled training images, a stratified subset by seed; held-out validation comes out of them."""
    fallback: Literal["sample"] | None = None
    """`sample`: where `fashion_mnist` cannot be had, use the 7,000 real images that ship with tlscale, and say so."""
    on_bad_image: Literal["error", "skip"] = "error"
    """An image that cannot be read: stop, or try all images first and skip the bad ones of every split, before a limit
    or a hold-out is drawn; the results count them."""
    max_megapixels: float = Field(64.0, gt=0.0, le=89.0)
    """Larger images are bad images (a decompression bomb is one); 89 is the limit of the library that reads them."""
    image_size: int | None = Field(None, ge=8, le=2048)
    """Height and width the backbone sees, in pixels; by itself the size it was pretrained at."""
    interpolation: Literal["auto", "nearest", "bilinear", "bicubic", "lanczos"] = "auto"
    """How images are resized; `auto`: as the backbone was pretrained."""
    crop_pct: float | None = Field(None, gt=0.0, le=1.0)
    """Share of the resized image that the evaluation's centre crop keeps; by itself the backbone's, or 1 where the
    images are no larger than that crop."""
    mean: list[float] | None = None
    """Mean of each channel, 0..1; by itself the backbone's."""
    std: list[float] | None = None
    """Standard deviation of each channel, 0..1; by itself the backbone's."""
    augment: Augment = []
    """`none`, or a list of flip, crop, trivialaugment, randaugment, erasing, mixup, cutmix, each with or without its
    number, such as `[flip, {crop: 0.5}, {mixup: 0.2}]`."""
    workers: int | None = Field(None, ge=0, le=256)
    """Processes that read images beside each training process; by itself 0 when the images are cached and not
    augmented, or when training runs on the CPU, whose cores they would take; else up to 4."""
    cache_mib: int = Field(2048, ge=0)
    """Images are decoded once and kept as uint8 when all of them need no more than this, in MiB; 0: never."""

    @model_validator(mode="after")
    def _belongs(self) -> DataSection:
        check_source_keys(self.source, [key for key in SOURCE_KEYS if getattr(self, key) is not None])
        if self.classes is not None and len(set(self.classes)) != len(self.classes):
            raise ValueError("'classes' names a class twice")
        for key in ("mean", "std"):
            if getattr(self, key) is not None and len(getattr(self, key)) not in (1, 3):
                raise ValueError(f"'{key}' has one number per channel, 1 or 3")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError("'std' must be more than 0")
        return self


class BackboneSection(Section):
    """The network that transfer starts from."""

    name: str
    """A timm model, with or without the tag of its weights (`resnet18`, `resnet18.a1_in1k`)."""
    weights: Annotated[str, AfterValidator(weights_place)] = "pretrained"
    """`pretrained`: timm's; `bundled`: those that ship with tlscale; `none`: random, by seed; else the path of a
    `.safetensors` (or `.pth`) file."""
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    """Refuse the file of weights unless it has this SHA-256."""
    allow_pickle: bool = False
    """Allow a `.pth`, `.pt` or `.bin` file, read by torch's restricted unpickler (`weights_only`)."""
    min_matched: float = Field(0.9, ge=0.0, le=1.0)
    """Least share of the backbone's tensors that the file of weights must hold, by name and shape."""
    in_chans: Literal[1, 3] = 3
    """Channels of the input; 1 reads images as grey, and sums pretrained first filters over their channels."""
    drop_rate: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout inside the backbone, where the architecture has it."""
    drop_path_rate: float = Field(0.0, ge=0.0, lt=1.0)
    """Stochastic depth, where the architecture has it."""

    @property
    def from_file(self) -> bool:
        """Whether `weights` is the path of a file."""
        return self.weights not in ("pretrained", "bundled", "none")

    @model_validator(mode="after")
    def _belongs(self) -> BackboneSection:
        for key, unset in (("sha256", None), ("allow_pickle", False), ("min_matched", 0.9)):
            if not self.from_file and getattr(self, key) != unset:
                raise ValueError(f"'{key}' has an effect only where 'weights' is the path of a file")
        return self


class OptimSection(Section):
    """The optimizer and what its parameter groups get."""

    name: str = "adamw"
    """One of timm's optimizers; its `sgd` has Nesterov momentum of 0.9, plain momentum is `momentum`."""
    lr: float = Field(1e-3, gt=0.0)
    """Peak learning rate, for the global batch size of the recipe as it stands (it is not scaled)."""
    weight_decay: float = Field(0.05, ge=0.0)
    """Weight decay of what no rule names; norm layers and biases have none unless `decay_norm_and_bias`."""
    decay_norm_and_bias: bool = False
    """Decay norm layers and biases as well."""
    options: dict[str, float | int | bool | list[float]] = {}
    """Other arguments of the optimizer, such as `{betas: [0.9, 0.95]}` or `{momentum: 0.9}`."""
    lr_rules: NumberRules = ()
    """Rules, regex -> factor on the learning rate; parameters that no rule matches have 1."""
    weight_decay_rules: NumberRules = ()
    """Rules, regex -> weight decay in place of `weight_decay`."""
    layer_decay: float | None = Field(None, gt=0.0, le=1.0)
    """Factor on the learning rate for each layer (timm's grouping) away from the head."""
    clip_grad_norm: float | None = Field(None, gt=0.0)
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
    def _belongs(self) -> ScheduleSection:
        stairs = (self.step_every, self.step_factor)
        if self.decay == "step" and None in stairs:
            raise ValueError("'decay: step' needs 'step_every' and 'step_factor'")
        if self.decay != "step" and stairs != (None, None):
            raise ValueError(f"'step_every' and 'step_factor' have no effect with 'decay: {self.decay}'")
        if self.decay in ("step", "constant") and self.min_factor != 0.0:
            raise ValueError(f"'min_factor' has no effect with 'decay: {self.decay}'")
        return self


class CodesSection(Section):
    """What is frozen is computed once: the codes, and how they are kept below `$TLSCALE_CACHE/codes`."""

    keep: Literal["auto", "always", "never"] = "auto"
    """`auto`: train on kept codes where that costs less than computing the frozen part again, and say so where it does
    not; `always`: in any case; `never`: compute it in every step."""
    layer: Names | None = None
    """Layers by module name (`layer3`, `blocks.4`), or `penultimate`, what the backbone gives after its pooling; one or
    a list. For a probe, which takes the best of them by held-out images, and for `tlscale codes`; training finds its
    own: the last values that nothing trainable has a part in."""
    pool: Pools = ["avg"]
    """What becomes of a layer's positions: their mean `avg`, their maximum `max`, both `avgmax`, the class `token`, or
    `none`: all of them. One or a list, of which each is tried. `penultimate` is as the backbone pools it."""
    views: int = Field(1, ge=1, le=1000)
    """With `data.augment`: so many augmented views of each training image, whether codes of them are kept or not; epoch
    e sees view e modulo `views`. With 1 and `keep: auto`, no codes are kept, and each epoch sees new ones."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """In what the codes are kept; `auto`: as they are computed."""
    disk_gib: float = Field(20.0, gt=0.0)
    """`keep: auto`: most GiB that the codes of this run may take on the disk."""
    memory_mib: int = Field(4096, ge=0)
    """Codes that need no more, in MiB, are read into memory once; others are mapped from the disk."""
    cache_gib: float = Field(50.0, gt=0.0)
    """Most GiB that the codes of all runs may take; those that were not used for longest go first."""


class ProbeSection(Section):
    """A classifier that is fitted on codes instead of training: the network stays as it is, and no step is made."""

    kind: Literal["logistic", "ridge", "knn", "sklearn"] = "logistic"
    """`logistic`: multinomial logistic regression; `ridge`: least squares; `knn`: nearest neighbours; `sklearn`:
    scikit-learn's LogisticRegression."""
    strengths: list[Annotated[float, Field(gt=0.0)]] | None = Field(None, min_length=1)
    """Strengths of the L2 regularisation that are tried; by itself a range that fits the kind. Not for `knn`."""
    neighbours: list[Annotated[int, Field(ge=1)]] | None = Field(None, min_length=1)
    """Numbers of neighbours that are tried; for `knn` only."""
    refit: bool = True
    """Fit once more on training and held-out images together, with what the held-out images chose. Without a test
    split that exported classifier has no score: the run's is that of the one before it."""

    @model_validator(mode="after")
    def _belongs(self) -> ProbeSection:
        if self.kind == "knn" and self.strengths is not None:
            raise ValueError("'strengths' has no effect with 'kind: knn'; it takes 'neighbours'")
        for key in ("strengths", "neighbours"):
            values = getattr(self, key)
            if values is not None and len(set(values)) != len(values):
                raise ValueError(f"'{key}' names a value twice")
        if self.kind != "knn" and self.neighbours is not None:
            raise ValueError(f"'neighbours' has an effect with 'kind: knn' only, not with '{self.kind}'")
        return self


class DistillSection(Section):
    """Learn what a teacher says of the same images, from its codes, which are computed once: alone, or beside the
    labels. Projections from the student's layers to the teacher's codes are trained with it, and dropped at the end."""

    teacher: BackboneSection | None = None
    """The teacher: a backbone with its weights, as in `backbone`."""
    run: str | None = Field(None, min_length=1)
    """In place of `teacher`: the folder of a run that has ended, whose logits can be matched too."""
    image_size: int | None = Field(None, ge=8, le=2048)
    """Height and width that the teacher sees, in pixels; by itself what it was trained at."""
    match: dict[str, Names] = {}
    """Layers of the teacher, each with the layer (or layers) of the student that its codes are predicted from:
    `{blocks.4: layer3, penultimate: penultimate}`. Codes are pooled by their mean over positions, and the teacher's
    are standardised over the training images."""
    codes: float = Field(1.0, ge=0.0)
    """Weight of the loss on codes: the squared error of an image, as a mean over all the numbers that are predicted."""
    logits: float = Field(0.0, ge=0.0)
    """Weight of the loss on logits: the divergence of the student's classes from the teacher's, both softened by
    `temperature`, times its square (Hinton et al. 2015). For `run`."""
    temperature: float = Field(4.0, gt=0.0)
    """Of the loss on logits."""
    labels: float = Field(1.0, ge=0.0)
    """Weight of the loss on labels. With 0, and `logits` 0, labels have no part in what the backbone learns: the head
    is trained on its features all the same, and so tells what can be read from them."""

    @model_validator(mode="after")
    def _belongs(self) -> DistillSection:
        if (self.teacher is None) == (self.run is None):
            raise ValueError("name one teacher: 'teacher' (a backbone and its weights), or 'run' (a run folder)")
        if self.teacher is not None and self.teacher.weights == "none":
            raise ValueError("'teacher.weights: none' is a teacher that knows nothing; name weights")
        if self.teacher is not None and (self.teacher.drop_rate or self.teacher.drop_path_rate):
            raise ValueError("'teacher' is in eval mode, where 'drop_rate' and 'drop_path_rate' have no effect")
        if bool(self.match) != (self.codes > 0):
            raise ValueError(
                "'match' says which codes the loss 'codes' is of: name layers and give it a weight, or do neither "
                "(codes: 0)"
            )
        if self.logits > 0 and self.run is None:
            raise ValueError("'logits' needs a teacher that knows the classes: 'run', the folder of a run")
        if self.codes == self.logits == 0:
            raise ValueError("nothing of the teacher is learned: 'codes' and 'logits' are both 0")
        if self.logits == 0 and self.temperature != 4.0:
            raise ValueError("'temperature' has no effect where 'logits' is 0")
        return self


class StageSection(Section):
    """A part of the run with its own frozen layers; what is left out is as in the rest of the recipe."""

    freeze: FreezeRules = ()
    """As the recipe's `freeze`, for this stage; absent: nothing is frozen."""
    duration: PositiveDuration
    """Length of the stage."""
    lr: float | None = Field(None, gt=0.0)
    """In place of `optim.lr`."""
    lr_rules: NumberRules | None = None
    """In place of `optim.lr_rules`."""
    layer_decay: float | None = Field(None, gt=0.0, le=1.0)
    """In place of `optim.layer_decay`."""
    schedule: ScheduleSection | None = None
    """In place of the recipe's `schedule`; shares (`5%`) are of the stage."""

    @model_validator(mode="after")
    def _belongs(self) -> StageSection:
        if self.duration.unit == "%":
            raise ValueError(f"'duration: {self.duration}' is a share of nothing; give epochs, steps or images")
        return self


class LossSection(Section):
    """Cross-entropy, summed over the images and divided by their number over all processes: what is trained on. The
    `loss` of every evaluation is plain cross-entropy, without weights and smoothing."""

    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of the target that is spread over all classes."""
    class_weights: Literal["none", "balanced"] | dict[str, float] = "none"
    """`balanced`: inverse to each class's number of training images; or a weight for each class by name. An image's
    loss is multiplied by the weight of its own label; one mixed of two labels has a share of each label's weighted
    loss. Weights are scaled such that their mean over the training images is 1."""


class ComputeSection(Section):
    """How it is computed; nothing here changes what is learned, up to rounding."""

    engine: Literal["auto", "ddp", "fsdp2"] = "auto"
    """How several processes train together: `ddp`, each with a whole network; `fsdp2`, each with its share of every
    tensor that is trained, of its gradient, moments and average. `auto`: `ddp` where there are several."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """Of the forward and backward pass; weights are kept in float32 (float64 for `fp64`)."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Most images that one process takes through the network at once; by itself its whole share of the batch."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory; an error where the backbone does not do it."""
    channels_last: bool = False
    """Keep activations in channels-last order."""
    compile: bool = False
    """Compile the model with `torch.compile`."""
    deterministic: bool = False
    """Use only deterministic algorithms (the CPU's are; on a GPU slower, and some operations have none)."""
    threads: int | None = Field(None, ge=1, le=1024)
    """CPU threads of a process; by itself the machine's cores divided among its processes. Sums on a CPU depend on it
    in the last bit, so a run that is to be repeated exactly elsewhere names it."""
    num_processes: int | None = Field(None, ge=1)
    """Refuse to run on any other number of processes; by itself as many as the launcher started."""
    hang_timeout_s: float = Field(1800.0, ge=1.0)
    """Seconds without a sign of life (a step, a batch of an evaluation, a block of codes) after which a process writes
    the stack of each of its threads to stderr and ends; so long it waits for the others, too."""

    def without_engine(self) -> ComputeSection:
        """The same for what trains nothing, which several processes do without any engine."""
        return self.model_copy(update={"engine": "auto"})

    @model_validator(mode="after")
    def _belongs(self) -> ComputeSection:
        if self.engine != "fsdp2":
            return self
        if self.precision == "fp16":
            raise ValueError("'precision: fp16' would need its loss scaled over all shares; take bf16 beside 'fsdp2'")
        for key, why in (
            ("channels_last", "FSDP2 cannot cut tensors that lie in this order"),
            ("compile", "it was never tried with FSDP2"),
        ):
            if getattr(self, key):
                raise ValueError(f"'{key}' cannot be had beside 'engine: fsdp2': {why}. Take one of them out")
        return self


class NonFiniteSection(Section):
    """What happens when the loss or a gradient is NaN or infinite, on any process."""

    action: Literal["raise", "skip"] = "raise"
    """`raise`: the run fails, and its checkpoints stay; `skip`: that step changes nothing, for which all processes
    check every step before its update."""
    most_steps: int = Field(10, ge=1)
    """If more steps than these would be skipped, the run fails. For `skip`."""

    @model_validator(mode="after")
    def _belongs(self) -> NonFiniteSection:
        if self.action == "raise" and self.most_steps != 10:
            raise ValueError("'most_steps' has no effect with 'action: raise'")
        return self


class EvaluateSection(Section):
    """When the validation images are evaluated, and which weights are best."""

    every: PositiveDuration = Field(default_factory=lambda: parse_duration("1 epochs"))
    """How often; the last step is always evaluated."""
    batch_size: int | None = Field(None, ge=1)
    """Images per process and forward pass; by itself what a process takes in training."""
    select: Literal["top1", "loss", "macro_f1", "distill_loss"] = "top1"
    """The validation figure by which weights are best; `distill_loss`: what `distill` adds to the loss."""
    choose: Literal["latest_within_se", "best"] = "latest_within_se"
    """Which weights are exported: `best`: those of the best validation figure; `latest_within_se`: the latest ones
    whose figure is within one standard error of the best, since the best of many figures of few images is best by luck.
    The error is binomial for `top1`, that of the mean for a loss, and by bootstrap for `macro_f1`."""


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
    batch_size: int = Field(128, ge=1)
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

    @model_validator(mode="after")
    def _belongs(self) -> Recipe:
        if self.wandb is not None and "wandb" not in self.track:
            raise ValueError("section 'wandb' has no effect unless 'track' names wandb: track: [wandb]")
        if self.duration.unit == "%":
            raise ValueError(f"'duration: {self.duration}' is a share of nothing; give epochs, steps or images")
        self._strategy_belongs()
        self._distill_belongs()
        self._engine_belongs()
        if len(set(self.track)) != len(self.track):
            raise ValueError("'track' names a tracker twice")
        if self.compute.micro_batch_size is not None and self.compute.micro_batch_size > self.batch_size:
            raise ValueError(
                f"'compute.micro_batch_size: {self.compute.micro_batch_size}' is more than "
                f"'batch_size: {self.batch_size}'"
            )
        channels = self.backbone.in_chans
        for key in ("mean", "std"):
            numbers = getattr(self.data, key)
            if numbers is not None and len(numbers) != channels:
                raise ValueError(f"'data.{key}' has {len(numbers)} numbers, but 'backbone.in_chans' is {channels}")
        return self

    def _strategy_belongs(self) -> None:
        """What has no effect beside `probe` or `stages`; what is as it is by itself was not asked for."""
        if self.probe is not None and self.stages is not None:
            raise ValueError("'probe' trains nothing and 'stages' says what is trained when; take one of them out")
        for name, why in (("probe", "a probe trains nothing"), ("stages", "each stage has its own")):
            if getattr(self, name) is None:
                continue
            for key in NO_EFFECT_BESIDE[name]:
                if _asks_for(self, key):
                    raise ValueError(f"'{key}' has no effect beside '{name}': {why}. Take it out")
        if self.codes.views > 1 and not self.data.augment:
            raise ValueError("'codes.views' has no effect without 'data.augment': all views would be the same")
        if self.codes.pool != ["avg"] and set(self.codes.layer or [_PENULTIMATE]) == {_PENULTIMATE}:
            raise ValueError(
                "'codes.pool' has no effect on penultimate codes, which the backbone pools itself; name layers in "
                "'codes.layer'"
            )

    def _distill_belongs(self) -> None:
        if self.distill is None:
            if self.evaluate.select == "distill_loss":
                raise ValueError("'evaluate.select: distill_loss' is there only beside 'distill'")
            return
        names = augmentation_values(self.data.augment)
        mixing = [name for name in ("mixup", "cutmix") if name in names]
        if mixing:
            raise ValueError(f"'data.augment' cannot have {mixing[0]} beside 'distill': a teacher is asked one image")
        if names and self.codes.views == 1:
            raise ValueError(
                "'data.augment' beside 'distill' needs 'codes.views' of 2 or more: so many augmented views of each "
                "image are shown to the teacher, once, and to the student, one an epoch"
            )
        if self.compute.engine == "fsdp2":
            raise ValueError("'distill' cannot be had beside 'compute.engine: fsdp2' yet. Take 'ddp'")
        if self.codes.keep != "auto":
            raise ValueError("'codes.keep' has no effect beside 'distill': the teacher's codes are kept in any case")

    def _engine_belongs(self) -> None:
        if self.compute.engine != "fsdp2":
            return
        if len(self.stages or ()) > 1:
            raise ValueError(
                "several 'stages' cannot be had beside 'compute.engine: fsdp2': what is spread over the processes is "
                "so to the end of the run. Take 'compute.engine: ddp', or a recipe for each stage"
            )

    def to_plain(self) -> dict[str, Any]:
        """The complete recipe as plain YAML values, in schema order."""
        return self.model_dump(mode="json")


_PENULTIMATE = "penultimate"
# optim and schedule are taken whole; of the others, only what differs from its default was asked for.
NO_EFFECT_BESIDE = {
    "probe": (
        *("freeze", "head", "duration", "drop_last", "optim", "schedule", "loss", "checkpoint", "data.augment"),
        *("batch_size", "compute.micro_batch_size", "compute.gradient_checkpointing", "compute.compile", "evaluate"),
        *("compute.engine", "distill"),
        *("non_finite", "log_every", "codes.views", "codes.keep", "codes.disk_gib", "data.workers"),
        *("backbone.drop_rate", "backbone.drop_path_rate"),
    ),
    "stages": ("freeze", "duration"),
}


def _asks_for(recipe: Recipe, dotted: str) -> bool:
    """Whether a key has another value than it has by itself."""
    section: Section = recipe
    *above, name = dotted.split(".")
    for part in above:
        section = getattr(section, part)
    return bool(getattr(section, name) != type(section).model_fields[name].get_default(call_default_factory=True))
