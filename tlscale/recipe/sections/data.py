"""The section `data`: where images come from, and what is done to them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from tlscale.recipe.field_types import Augment
from tlscale.recipe.image_size import SizeInRecipe
from tlscale.recipe.mistakes import InvalidValueError
from tlscale.recipe.rules import parse_rule
from tlscale.recipe.sections.section import Section
from tlscale.recipe.sources import SOURCE_KEYS, SOURCES, check_source_keys


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
    """Column that holds the image or its path; found by default when the name is usual (`image`, `img`, `path`...)."""
    label_column: str | None = None
    """Column that holds the label; found by default when the name is usual (`label`, `labels`, `class`...)."""
    class_folder: Literal["top", "parent"] | None = None
    """Which folder is the class where a folder per class has folders in it: `top`, the one below the split (or below
    `path`, without splits), or `parent`, the one that an image lies in; by default there must be none."""
    group_column: str | None = Field(None, min_length=1)
    """Column that tells which images belong together, such as photos of one patient or scene: a held-out split never
    cuts a group, and intervals of scores are over groups. An image without one (empty) is a group of its own."""
    group_regex: str | None = Field(None, min_length=1)
    """The same from the path below the data, such as `(patient[0-9]+)_`: the group is what the brackets match, or
    without any the whole match. It is searched for, and has to be found in every path."""
    groups_across_splits: Literal["error", "allow"] = "error"
    """A group in two splits of the source: an error, or allowed, with a note in the result."""
    exclude: str | None = Field(None, min_length=1)
    """CSV file with the columns `path` and `reason`: what is left out of a folder or a table, files or whole folders,
    as paths below that folder or that of the table. Relative to the folder tlscale is started in."""
    train_split: str = "train"
    """Name of the training split in the source. `.`: the folder itself, whose folders are all classes, also `test`."""
    validation_split: str | None = None
    """Name of the validation split; by default `validation`, `valid` or `val` where one is there."""
    test_split: str = "test"
    """Name of the test split; never used to choose anything. Without one, results are those of the validation."""
    validation_fraction: float = Field(0.1, ge=0.0, le=0.5)
    """Share of the training images that becomes the validation split, stratified, where the source has none."""
    task: Literal["single_label", "multi_label"] | None = None
    """`multi_label`: an image has any number of labels, also none. By default it has one, and labels of a column that
    look like several (`young;female`) or like numbers (an age) are refused; `single_label`: they are classes whatever
    they look like."""
    label_separator: str | None = Field(None, min_length=1)
    """`multi_label`: what stands between the labels of an image in a column of text, such as `;`. Without it the column
    holds lists."""
    label_columns: list[str] | None = Field(None, min_length=2)
    """`multi_label`: columns of 0 and 1, one a class and called as it is, in place of `label_column`."""
    classes: list[str] | None = Field(None, min_length=2)
    """Class names in the order of their numbers; by default those of the training split, sorted."""
    train_limit: int | None = Field(None, ge=1, le=10**12)
    """Use only so many labelled training images, a stratified subset by seed, validation included."""
    fallback: Literal["sample"] | None = None
    """`sample`: where `fashion_mnist` is not available, use the 7,000 real images that ship with tlscale."""
    on_bad_image: Literal["error", "skip"] = "error"
    """An image that cannot be read: stop, or try all images first and skip the bad ones of every split, before a limit
    or a hold-out is drawn; the results count them."""
    duplicates: Literal["warn", "drop", "error"] = "warn"
    """An image that two splits have, byte for byte: report it when the run has read them; or read all images first,
    and leave it out of training and validation (never of test), or stop. Equal images of train then stay together;
    under different labels all of them are left out, or stop."""
    max_megapixels: float = Field(64.0, ge=1e-4, le=89.0)
    """Larger images are bad images (a decompression bomb is one); 89 is the limit of the library that reads them."""
    image_size: SizeInRecipe = None
    """What the backbone sees, in pixels: one number for a square, or `[height, width]`; by default the size it was
    pretrained at. A vision transformer's position embeddings are interpolated to another size, which is reported."""
    interpolation: Literal["auto", "nearest", "bilinear", "bicubic", "lanczos"] = "auto"
    """How images are resized; `auto`: as the backbone was pretrained."""
    crop_mode: Literal["auto", "center", "squash", "border"] = "auto"
    """How an image of other proportions than `image_size` gets them: `center` cuts out the middle,
    `squash` changes its proportions, `border` pads it with the mean color; `auto`: as the backbone was pretrained,
    mostly `center`."""
    crop_pct: float | None = Field(None, ge=0.1, le=1.0)
    """Share of the resized image that the evaluation's centre crop keeps; by default the backbone's, or 1 where the
    images are no larger than that crop or `crop_mode` says to show all of them."""
    range: list[Annotated[float, Field(ge=-1e9, le=1e9)]] | None = Field(None, min_length=2, max_length=2)
    """`[low, high]`: the numbers in the image files that become 0 and 1; others are scaled linearly, and clipped, and
    16 bits stay 16 bits. By default images are read as 8 bits, for which 16-bit grey is scaled from 0..65535."""
    channels_first: bool = False
    """Arrays (`.npy` files) are channels x height x width, and not height x width x channels."""
    mean: list[Annotated[float, Field(ge=0.0, le=1.0)]] | None = None
    """Mean of each channel, 0..1; by default the backbone's, or measured on training images where `backbone.in_chans`
    is neither 1 nor 3."""
    std: list[Annotated[float, Field(ge=1e-4, le=1.0)]] | None = None
    """Standard deviation of each channel, 0..1; by default as `mean`."""
    augment: Augment = []
    """`none`, or a list of flip, vertical_flip, crop, rotation, color_jitter, trivialaugment, trivialaugment_geometric
    (moves only: for grey and medical images), randaugment, blur, erasing, mixup, cutmix, each with or without its
    number, such as `[flip, {crop: 0.5}, {mixup: 0.2}]`."""
    sampling: Literal["natural", "balanced"] | Annotated[float, Field(gt=0.0, lt=1.0)] = "natural"
    """How often images of each class are trained on, in epochs of as many images as there are: `natural`: each once;
    `balanced`: all classes equally often; a power such as 0.5: a class in proportion to its size to that power. An
    image comes again, differently augmented, when all others of its class have come."""
    workers: int | None = Field(None, ge=0, le=256)
    """Processes that read images for each training process; by default 0 when the images are cached and not
    augmented, or when training runs on the CPU, whose cores they would take; else one a core but the last, up to
    16."""
    cache_mib: int = Field(2048, ge=0, le=10**9)
    """Images are decoded once and cached as pixels when all of them need no more than this, in MiB; 0: never."""

    @field_validator("task", mode="before")
    @classmethod
    def _refuse_regression(cls, value: object) -> object:
        if value == "regression":
            remedy = "Divide the numbers into classes, such as 'under 18' and '18 and over'."
            raise InvalidValueError("regression is not supported: what is learned is classes", remedy)
        return value

    @field_validator("group_regex")
    @classmethod
    def _check_regex(cls, value: str | None) -> str | None:
        return value if value is None else parse_rule(value, True).pattern

    @model_validator(mode="after")
    def _check(self) -> DataSection:
        check_source_keys(self.source, [key for key in SOURCE_KEYS if getattr(self, key) is not None])
        if self.classes is not None and len(set(self.classes)) != len(self.classes):
            raise InvalidValueError("names a class twice", "Name each class once.", keys=["classes"])
        self._check_labels()
        if self.group_column is not None and self.group_regex is not None:
            raise InvalidValueError("both name the groups", "Write one of them.", keys=["group_regex", "group_column"])
        if self.groups_across_splits != "error" and self.group_column is None and self.group_regex is None:
            remedy = "Name the groups (data.group_column, data.group_regex), or take it out."
            raise InvalidValueError("has no effect without groups", remedy, keys=["groups_across_splits"])
        if self.range is not None and self.range[0] >= self.range[1]:
            remedy = "Write the lower one first: [low, high]."
            raise InvalidValueError("takes a low number and a higher one", remedy, keys=["range"])
        if (self.mean is None) != (self.std is None) and len(self.mean or self.std or ()) not in (1, 3):
            raise InvalidValueError("need each other", "Write both, one number per channel.", keys=["mean", "std"])
        return self

    def _check_labels(self) -> None:
        for key in ("label_separator", "label_columns"):
            if getattr(self, key) is not None and self.task != "multi_label":
                remedy = "Write task: multi_label, where an image has several labels."
                raise InvalidValueError("has no effect where an image has one label", remedy, keys=[key, "task"])
        for key in ("label_column", "label_separator"):
            if self.label_columns is not None and getattr(self, key) is not None:
                problem = "does not go with label_columns, which hold a label each"
                raise InvalidValueError(problem, "Write one of them.", keys=[key, "label_columns"])
        if self.label_columns is not None and len(set(self.label_columns)) < len(self.label_columns):
            raise InvalidValueError("names a column twice", "Name each once.", keys=["label_columns"])
