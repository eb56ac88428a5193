"""The sections on the pretrained network, and on what is computed from its codes (cached features)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from tlscale.recipe.field_types import Names, Pools, weights_place
from tlscale.recipe.image_size import SizeInRecipe
from tlscale.recipe.mistakes import InvalidValueError
from tlscale.recipe.rules import parse_rule
from tlscale.recipe.sections.section import Section

MIN_MATCHED = 0.9
RUN = "run:"


def _regex(pattern: str) -> str:
    return parse_rule(pattern, value=True).pattern


class BackboneSection(Section):
    """The network that transfer starts from."""

    name: str
    """A timm model, with or without the tag of its weights (`resnet18`, `resnet18.a1_in1k`)."""
    weights: Annotated[str, AfterValidator(weights_place)] = "pretrained"
    """`pretrained`: timm's; `bundled`: those that ship with tlscale; `none`: random, by seed; `run:PATH`: those of a
    finished run, with its head where head and classes are the same; else the path of a `.safetensors` (or `.pth`)
    file."""
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    """Refuse the file of weights unless it has this SHA-256."""
    allow_pickle: bool = False
    """Allow a `.pth`, `.pt` or `.bin` file, read by torch's restricted unpickler (`weights_only`); also one of a
    `local-dir:` or `hf-hub:` model that has no safetensors."""
    min_matched: float = Field(MIN_MATCHED, ge=0.0, le=1.0)
    """Least share of the backbone's tensors that the file of weights must hold, by name and shape. What it lacks is
    trained from random values, and must not be frozen unless this is below 0.9."""
    in_chans: int = Field(3, ge=1, le=64)
    """Channels of the input; 1 reads images as grey, and sums pretrained first filters over their channels. With
    any number but 1 and 3, images must have so many channels (arrays, TIFF), and pretrained first filters are repeated
    in their order, for channels 4, 5, 6 those of 1, 2, 3, and scaled by 3 / in_chans, as timm does it."""
    drop_rate: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout inside the backbone, where the architecture has it."""
    drop_path_rate: float = Field(0.0, ge=0.0, lt=1.0)
    """Stochastic depth, where the architecture has it."""

    @property
    def from_file(self) -> bool:
        """Return whether `weights` is the path of a file."""
        return self.weights not in ("pretrained", "bundled", "none") and not self.from_run

    @property
    def from_run(self) -> bool:
        """Return whether `weights` are those of a finished run."""
        return self.weights.startswith(RUN)

    @property
    def run(self) -> str:
        """Return the folder of that run."""
        return self.weights.removeprefix(RUN)

    @property
    def elsewhere(self) -> bool:
        """Return whether `name` is a folder, or a repository of the hub, and no architecture of timm."""
        return self.name.startswith(("hf-hub:", "local-dir:"))

    @model_validator(mode="after")
    def _check(self) -> BackboneSection:
        reads_file = self.from_file or (self.weights == "pretrained" and self.elsewhere)
        for key, unset in (("sha256", None), ("allow_pickle", False), ("min_matched", MIN_MATCHED)):
            if not reads_file and getattr(self, key) != unset:
                raise InvalidValueError(
                    f"has no effect with weights={self.weights}, which is not the path of a file",
                    "Remove it, or name a file.",
                    keys=[key, "weights"],
                )
        return self


class LoraSection(Section):
    """Low-rank adapters (Hu et al. 2021): next to a frozen weight W two small matrices A and B are trained, and the
    layer computes with W + alpha / rank x B A. At the end they are merged into W: the architecture stays as it was.
    """

    layers: Annotated[str, AfterValidator(_regex)]
    """Regex on names of layers, whole names (`blocks\\.(9|10|11)\\.attn\\.(qkv|proj)`). Linear layers and convolutions
    without groups get an adapter, but for those that `freeze` freezes; others that it matches are left alone."""
    rank: int = Field(8, ge=1, le=1024)
    """Rows of A and columns of B."""
    alpha: float | None = Field(None, gt=0.0, le=1e6)
    """What the adapter adds is scaled by alpha / rank; by default alpha = rank."""


class AdaptersSection(Section):
    """Small trained parts next to a frozen backbone. With them, all of the backbone's own parameters are frozen but
    those that `freeze` exempts (`{'.*norm.*': false}`)."""

    lora: LoraSection
    """Low-rank adapters."""


class CodesSection(Section):
    """Codes (cached features): what is frozen is computed once, and stored in `$TLSCALE_CACHE/codes`."""

    keep: Literal["auto", "always", "never"] = "auto"
    """`auto`: train on cached codes where that costs less than computing the frozen part again, and report where it
    does not; `always`: in any case; `never`: compute it in every step."""
    layer: Names | None = None
    """Layers by module name (`layer3`, `blocks.4`), or `penultimate`, what the backbone gives after its pooling; one or
    a list. For a probe, which takes the best of them on the validation split, and for `tlscale codes`; training finds
    its own: the last values that nothing trainable has a part in."""
    pool: Pools = ["avg"]
    """What becomes of a layer's positions: their mean `avg`, their maximum `max`, both `avgmax`, the class `token`, or
    `none`: all of them. One or a list, of which each is tried. `penultimate` is as the backbone pools it."""
    views: int = Field(1, ge=1, le=1000)
    """With `data.augment`: so many augmented views of each training image, whether their codes are cached or not; epoch
    e sees view e modulo `views`. With 1 and `keep: auto`, no codes are cached, and each epoch sees new ones."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Data type of the cached codes; `auto`: as they are computed."""
    disk_gib: float = Field(20.0, gt=0.0, le=1e6)
    """`keep: auto`: most GiB that the codes of this run may take on the disk."""
    memory_mib: int = Field(4096, ge=0, le=10**9)
    """Codes that need no more, in MiB, are read into memory once; others are mapped from the disk."""
    cache_gib: float = Field(50.0, gt=0.0, le=1e6)
    """Most GiB that the codes of all runs may take; the least recently used are evicted first."""


class ProbeSection(Section):
    """A classifier that is fitted on codes instead of training: the network stays as it is, and no step is made."""

    kind: Literal["logistic", "ridge", "knn", "sklearn"] = "logistic"
    """`logistic`: multinomial logistic regression; `ridge`: least squares; `knn`: nearest neighbours; `sklearn`:
    scikit-learn's LogisticRegression."""
    strengths: list[Annotated[float, Field(ge=1e-12, le=1e12)]] | None = Field(None, min_length=1, max_length=1000)
    """Strengths of the L2 regularisation that are tried; by default a range that fits the kind. Not for `knn`."""
    neighbours: list[Annotated[int, Field(ge=1, le=10**9)]] | None = Field(None, min_length=1, max_length=1000)
    """Numbers of neighbours that are tried; for `knn` only."""
    refit: bool = True
    """Fit once more on the training and validation splits together, with what the validation split chose. Without a
    test split that exported classifier has no score: the run's is that of the one before it."""

    @model_validator(mode="after")
    def _check(self) -> ProbeSection:
        for key, other in (("strengths", "neighbours"), ("neighbours", "strengths")):
            values = getattr(self, key)
            if values is not None and (self.kind == "knn") != (key == "neighbours"):
                remedy = f"Remove it; '{other}' is for this kind."
                raise InvalidValueError(f"has no effect with kind={self.kind}", remedy, keys=[key, "kind"])
            if values is not None and len(set(values)) != len(values):
                raise InvalidValueError("names a value twice", "Name each once.", keys=[key])
        return self


class DistillSection(Section):
    """Learn from a teacher's codes of the same images, which are computed once: alone, or together with the
    labels. Projections from the student's layers to the teacher's codes are trained with it, and dropped at the end."""

    teacher: BackboneSection | None = None
    """The teacher: a backbone with its weights, as in `backbone`."""
    run: str | None = Field(None, min_length=1)
    """In place of `teacher`: the folder of a run that has ended, whose logits can be matched too."""
    image_size: SizeInRecipe = None
    """What the teacher sees, in pixels, as `data.image_size`; by default what it was trained at."""
    match: dict[str, Names] = {}
    """Layers of the teacher, each with the layer (or layers) of the student that its codes are predicted from:
    `{blocks.4: layer3, penultimate: penultimate}`. Codes are pooled by their mean over positions, and the teacher's
    are standardised over the training images."""
    codes: float = Field(1.0, ge=0.0, le=1e6)
    """Weight of the loss on codes: the squared error of an image, as a mean over all the numbers that are predicted."""
    logits: float = Field(0.0, ge=0.0, le=1e6)
    """Weight of the loss on logits: the divergence of the student's classes from the teacher's, both softened by
    `temperature`, times its square (Hinton et al. 2015). For `run`."""
    temperature: float = Field(4.0, ge=0.01, le=1000.0)
    """Of the loss on logits."""
    labels: float = Field(1.0, ge=0.0, le=1e6)
    """Weight of the loss on labels. With 0, and `logits` 0, labels have no part in what the backbone learns: the head
    is trained on its features all the same, and so tells what can be read from them."""

    @model_validator(mode="after")
    def _check(self) -> DistillSection:
        self._check_teacher()
        if bool(self.match) != (self.codes > 0):
            problem = "names the layers whose codes the loss weighted by 'codes' compares, so neither works alone"
            remedy = "Name layers and give 'codes' a weight, or do neither (codes: 0)."
            raise InvalidValueError(problem, remedy, keys=["match", "codes"])
        if self.logits > 0 and self.run is None:
            remedy = "Write 'run', the folder of a run, in place of 'teacher'."
            raise InvalidValueError("needs a teacher that knows the classes", remedy, keys=["logits", "run"])
        if self.codes == self.logits == 0:
            problem = "is 0, and so is 'logits': nothing of the teacher is learned"
            raise InvalidValueError(problem, "Give one of them a weight.", keys=["codes", "logits"])
        if self.logits == 0 and self.temperature != 4.0:
            raise InvalidValueError("has no effect with logits=0", "Remove it.", keys=["temperature", "logits"])
        return self

    def _check_teacher(self) -> None:
        if (self.teacher is None) == (self.run is None):
            problem = "one teacher is needed, and no more"
            remedy = "Write either 'teacher' (a backbone and its weights) or 'run' (a run folder)."
            raise InvalidValueError(problem, remedy, keys=["teacher", "run"])
        if self.teacher is not None and self.teacher.weights == "none":
            raise InvalidValueError("none is a teacher that knows nothing", "Name weights.", keys=["teacher.weights"])
        for key in ("drop_rate", "drop_path_rate"):
            if self.teacher is not None and getattr(self.teacher, key):
                problem = "has no effect on a teacher, which is in eval mode"
                raise InvalidValueError(problem, "Remove it.", keys=[f"teacher.{key}"])
