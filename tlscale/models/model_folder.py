"""Load the model that `export` wrote.

Promise: of its folder only JSON and safetensors are read. The settings are checked before timm builds from them, and
the tensors before they go into the network: their names, shapes and kinds are exactly its own. Whatever is wrong is one
kind of error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import timm
import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from timm.models import PretrainedCfg
from torch import Tensor, nn

from tlscale.data.input_spec import InputSpec
from tlscale.errors import ModelError, RunFolderError, first_sentence, flag
from tlscale.models.calibration import Calibration
from tlscale.models.classifier import Classifier, CodesClassifier, feature_width
from tlscale.models.features import LayerCodes
from tlscale.models.foreign import check_model_args, no_model
from tlscale.models.heads import build_head
from tlscale.models.knn import KnnHead
from tlscale.models.tensor_checks import check_classifiers, check_like, refuse_non_finite
from tlscale.models.unknown import UNKNOWN_FILE, UnknownScore, UnknownSettings
from tlscale.models.weights import filter_of
from tlscale.recipe.field_types import POOLS, VIEWS, Head
from tlscale.storage.files import file_sha256, refuse_endless_file, text_sha256

# The format in which a key of `config.json` came: a version that does not know it must refuse it, not pass over it.
# 2: other codes than what the backbone gives, or nearest neighbours. 3: several labels; a calibration; what is unknown;
# images that are not square of 8-bit grey or RGB. 4: means over views; a calibration of several labels (`format_of`).
# 5: the layer that tells what is unknown, where it is the penultimate one (`format_of`).
_SINCE = {"layer": 2, "pool": 2, "task": 3, "thresholds": 3, "calibration": 3, "unknown": 3, "views": 4}
FORMAT = 5
MODEL_FILE = "model.safetensors"
HEAD_FILE = "head.safetensors"
CONFIG_FILE = "config.json"
_CHANGED = "It is damaged, or was changed: copy it again from where it is whole, or run the recipe again with "
_MOST_CONFIG_BYTES = 64 * 2**20  # a million classes


@dataclass(frozen=True)
class TrainedModel:
    """A model read from a run: `model(images)` gives logits for images prepared by `input_spec`."""

    model: nn.Module
    classes: tuple[str, ...]
    input_spec: InputSpec
    thresholds: tuple[float, ...] | None = None
    """Of several labels: the probability of each class from which on an image has it. None: an image has one class."""
    calibration: Calibration | None = None
    """None: probabilities are the softmax of the logits."""
    unknown: UnknownScore | None = None
    views: tuple[str, ...] = ()
    """`evaluate.views`: `predict` gives the mean over these views of an image, `model` takes one."""
    scored_on: str | None = None
    """The split that its run's score is of; `folds`: that score is of other models, and this one was fitted to all
    images; None: it has no score of its own."""


# -- settings ---------------------------------------------------------------------------------------------------------


class _Settings(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


_Share = Annotated[float, Field(gt=0.0, le=2.0)]
_Side = Annotated[int, Field(ge=1, le=2048)]


class _Input(_Settings):
    image_size: _Side | Annotated[list[_Side], Field(min_length=2, max_length=2)]
    in_chans: int = Field(ge=1, le=64)
    mean: list[float]
    std: list[Annotated[float, Field(gt=0.0)]]
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"]
    crop_pct: _Share
    crop_mode: Literal["center", "squash", "border"] = "center"
    range: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    channels_first: bool = False

    @model_validator(mode="after")
    def _check(self) -> _Input:
        if not len(self.mean) == len(self.std) == self.in_chans:
            raise ValueError(f"mean and std are of {len(self.mean)} and {len(self.std)} channels, not {self.in_chans}")
        return self


class _Neighbours(_Settings):
    k: int = Field(ge=1)


class _Knn(_Settings):
    knn: _Neighbours


class _Ours(_Settings):
    """What `export_model` notes in `config.json`."""

    format: int
    head: Head | _Knn
    classes: list[str] = Field(min_length=1)
    input: _Input
    whole: bool
    layer: str | None = None
    pool: Literal[POOLS] | None = None  # type: ignore[valid-type]
    task: Literal["single_label", "multi_label"] = "single_label"
    thresholds: list[Annotated[float, Field(ge=0.0, le=1.0)]] | None = None
    fitted_on: list[str] = []
    scored_on: str | None = None
    calibration: Calibration | None = None
    unknown: UnknownSettings | None = None
    views: list[Literal[VIEWS]] = []  # type: ignore[valid-type]
    sha256: dict[str, str] | None = None
    config_sha256: str | None = None

    @property
    def files(self) -> list[str]:
        """Return the files of tensors."""
        head = [] if self.whole else [HEAD_FILE]
        return [MODEL_FILE, *head, *([] if self.unknown is None else [UNKNOWN_FILE])]

    @model_validator(mode="after")
    def _check(self) -> _Ours:
        if (self.layer is None) != (self.pool is None) or (self.whole and self.layer is not None):
            raise ValueError("'layer', 'pool' and 'whole' do not go together")
        if isinstance(self.head, _Knn) and self.layer is None:
            raise ValueError("nearest neighbours are of a 'layer'")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("two classes have one name")
        if (self.task == "multi_label") != (self.thresholds is not None):
            raise ValueError("'task' and 'thresholds' do not go together")
        if self.calibration is not None and (self.calibration.sets is None) != (self.task == "multi_label"):
            raise ValueError("a calibration of several labels has no sets, and one of one label has")
        if self.thresholds is not None and len(self.thresholds) != len(self.classes):
            raise ValueError(f"{len(self.thresholds)} thresholds are not those of {len(self.classes)} classes")
        return self


def _known_to_timm(cfg: object) -> object:
    known = set(PretrainedCfg.__dataclass_fields__)
    if isinstance(cfg, dict) and (unknown := cfg.keys() - known):
        raise ValueError(f"timm {timm.__version__} knows no {', '.join(sorted(map(repr, unknown)))[:80]}")
    return cfg


_Names = str | list[str] | None
_Sizes = Annotated[list[Annotated[int, Field(ge=1, le=4096)]], Field(min_length=2, max_length=3)]


class _Pretrained(_Settings):
    """What timm reads of a network's own settings when it builds it; the rest is only shown."""

    model_config = ConfigDict(extra="allow")
    input_size: Annotated[_Sizes, Field(min_length=3)]
    fixed_input_size: bool = False
    num_classes: int = Field(ge=0, le=10_000_000)
    pool_size: _Sizes | None = None
    first_conv: _Names = None
    classifier: _Names = None
    crop_pct: _Share
    mean: list[float]
    std: list[float]
    interpolation: str
    crop_mode: str = "center"


class _Config(_Settings):
    model_config = ConfigDict(extra="ignore")
    architecture: str
    num_classes: int = Field(ge=0, le=10_000_000)
    global_pool: str | None = None
    label_names: list[str] | None = None
    # Each value of these is checked by `check_model_args`.
    model_args: dict[str, Any] = {}
    pretrained_cfg: Annotated[_Pretrained, BeforeValidator(_known_to_timm)]
    tlscale: _Ours

    @model_validator(mode="after")
    def _check(self) -> _Config:
        num_classes = len(self.tlscale.classes) if self.tlscale.whole else self.num_classes
        of_args = self.model_args.get("num_classes", num_classes)
        if not num_classes == self.num_classes == self.pretrained_cfg.num_classes == of_args:
            raise ValueError("the numbers of classes differ")
        return self


def format_of(ours: Mapping[str, Any]) -> int:
    """Return the lowest format that has a place for what `export_model` notes: older versions load what they can."""
    least = 4 if {"calibration", "task"} <= ours.keys() else 1 if InputSpec.from_plain(ours["input"]).is_usual else 3
    least = 5 if "layer" in ours.get("unknown", ()) else least
    return max(least, *(_SINCE.get(key, 1) for key in ours))


def config_digest(config: Mapping[str, Any]) -> str:
    """Compute SHA-256 of the values in `config.json` but for its own."""
    ours = {key: value for key, value in config["tlscale"].items() if key != "config_sha256"}
    return text_sha256(json.dumps({**config, "tlscale": ours}, sort_keys=True))


def _read_config(path: Path) -> _Config:
    """Read and check `config.json`.

    Raises:
        RunFolderError: it is none of ours, is damaged, or of a newer format.
    """
    try:
        refuse_endless_file(path, _MOST_CONFIG_BYTES)
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(f"'{path}' is damaged: {error}") from error
    ours = config.get("tlscale") if isinstance(config, dict) else None
    if not isinstance(ours, dict):
        raise RunFolderError(
            f"'{path}' was not written by tlscale",
            remedy=f"Load it with timm.create_model('local-dir:{path.parent}', pretrained=True)",
        )
    written_as = ours.get("format")
    if isinstance(written_as, int) and written_as > FORMAT:
        raise RunFolderError(
            f"'{path}' has format {written_as}, this tlscale reads up to {FORMAT}", remedy="Update tlscale"
        )
    try:
        checked = _Config.model_validate(config)
        if not timm.is_model(checked.architecture):
            raise ValueError(f"timm {timm.__version__} has no model {checked.architecture!r:.80}")
        check_model_args(checked.architecture, checked.model_args, str(path))
    except ValidationError as error:
        raise RunFolderError(f"'{path}' is damaged: {_first_mistake(error)}") from error
    except (ValueError, ModelError) as error:
        raise RunFolderError(f"'{path}' is damaged: {error}") from error
    # Exports of before have neither.
    if checked.tlscale.sha256 is not None and checked.tlscale.config_sha256 not in (None, config_digest(config)):
        raise RunFolderError(
            f"the model in '{path.parent}' cannot be loaded: '{path}' is not the file that was exported",
            remedy=_CHANGED + flag("overwrite"),
        )
    return checked


def _first_mistake(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place or 'its values'}: {first['msg']}"


# -- tensors ----------------------------------------------------------------------------------------------------------


def _read_tensors(folder: Path, file: str, ours: _Ours) -> dict[str, Tensor]:
    """Read a file of tensors; one that has a checksum must have it, as corruption shows in no format.

    Raises:
        ModelError: it is not what was exported. Exports of before have no checksums.
    """
    path = folder / file
    if not path.is_file():
        raise ModelError(f"there is no '{path}'", remedy="Copy it again")
    if ours.sha256 is not None and (found := file_sha256(path)) != ours.sha256.get(file):
        raise ModelError(
            f"'{path}' is not the file that was exported (its SHA-256 is {found}, not {ours.sha256.get(file)})",
            remedy=_CHANGED + flag("overwrite"),
        )
    return safetensors.torch.load_file(path)


# -- the model --------------------------------------------------------------------------------------------------------


def load(run: str | Path, *, as_stored: bool = False) -> TrainedModel:
    """Load the model of a run folder (or of its `model/` folder), in eval mode on the CPU.

    `as_stored`: in the type that its tensors were exported in (float64 of a run in fp64), and not in float32.

    Raises:
        RunFolderError: there is no model there, a damaged one, or one of a newer format.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise RunFolderError(f"there is no folder '{run}'", remedy="Name the folder of a run")
    folder = folder / "model" if (folder / "model" / CONFIG_FILE).is_file() else folder
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise no_model(Path(run), path)
    ours = _read_config(path).tlscale
    with _cannot_be_loaded(folder), torch.random.fork_rng(devices=[]):
        states = [_read_tensors(folder, file, ours) for file in ours.files]
        unknown = None if ours.unknown is None else UnknownScore.of_state(ours.unknown, states.pop())
        if ours.sha256 is None:
            refuse_non_finite({name: tensor for state in states for name, tensor in state.items()}, f"'{folder}'")
        model = _build(folder, states[0])
        spec = InputSpec.from_plain(ours.input.model_dump())
        check_classifiers(model, len(ours.classes) if ours.whole else None)
        if not ours.whole:
            model = _with_head(model, states[1], ours, spec)
        if as_stored:
            _take_as_stored(model, states)
    thresholds = None if ours.thresholds is None else tuple(ours.thresholds)
    return TrainedModel(
        model.eval(),
        tuple(ours.classes),
        spec,
        thresholds,
        ours.calibration,
        unknown,
        tuple(ours.views),
        ours.scored_on,
    )


def fault_of_model(folder: Path) -> str | None:
    """Find why the files of an exported model are not those that were written, building nothing; None if they are."""
    try:
        ours = _read_config(folder / CONFIG_FILE).tlscale
        with _cannot_be_loaded(folder):
            for file in ours.files:
                _read_tensors(folder, file, ours)
    except RunFolderError as error:
        return str(error)
    return None


@contextmanager
def _cannot_be_loaded(folder: Path) -> Iterator[None]:
    # Every architecture complains in its own way of settings that it cannot be built with.
    try:
        yield
    except Exception as error:
        what = str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {first_sentence(error)}"
        raise RunFolderError(f"the model in '{folder}' cannot be loaded: {what}") from error


def _build(folder: Path, state: Mapping[str, Tensor]) -> nn.Module:
    """Build the network, and give it its tensors."""
    what = f"'{folder / MODEL_FILE}'"
    name = f"local-dir:{folder}"
    with suppress(NotImplementedError, RuntimeError), torch.device("meta"):  # some compute while they are built
        # Settings may describe a network that no memory holds.
        planned = timm.create_model(name, pretrained=False)
        check_like(_as_today(state, planned), planned.state_dict(), what)
    model: nn.Module = timm.create_model(name, pretrained=False)
    state = _as_today(state, model)
    check_like(state, model.state_dict(), what)
    model.load_state_dict(state)
    return model


def _as_today(state: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    """Return the tensors by the names that this version of timm gives them."""
    filter_fn = filter_of(model)
    if state.keys() == model.state_dict().keys() or filter_fn is None:
        return state
    return filter_fn(dict(state), model)


def _with_head(
    backbone: nn.Module, state: Mapping[str, Tensor], ours: _Ours, spec: InputSpec
) -> Classifier | CodesClassifier:
    num_classes = len(ours.classes)
    if ours.layer is None or ours.pool is None:
        width = feature_width(backbone, in_chans=spec.in_chans, image_size=spec.image_size)
        assert not isinstance(ours.head, _Knn), "the settings were checked"
        return Classifier(backbone, _layers(ours.head, width, num_classes, state))
    codes = LayerCodes(backbone, [(ours.layer, ours.pool)])
    (row,) = codes.describe(torch.zeros(2, *spec.shape_CHW))
    if not isinstance(ours.head, _Knn):
        return CodesClassifier(codes, _layers(ours.head, row.width, num_classes, state))
    head = KnnHead(state, ours.head.knn.k, num_classes)
    if len(head.mean_D) != row.width:
        raise ModelError(f"'{row.layer}' gives {row.width} features, its nearest neighbours have {len(head.mean_D)}")
    return CodesClassifier(codes, head)


def _take_as_stored(model: nn.Module, states: Sequence[Mapping[str, Tensor]]) -> None:
    parts = [model] if len(states) == 1 else [getattr(model, name) for name in ("backbone", "head")]
    for part, state in zip(parts, states, strict=True):
        if not isinstance(part, KnnHead):  # which has its tensors as they are
            dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
            part.to(dtype).load_state_dict(_as_today(state, part))


def _layers(head: Sequence[Any], width: int, num_classes: int, state: Mapping[str, Tensor]) -> nn.Sequential:
    with torch.device("meta"):
        expected = build_head(head, in_features=width, num_classes=num_classes, seed=0).state_dict()
    check_like(state, expected, "the head")
    built = build_head(head, in_features=width, num_classes=num_classes, seed=0)
    built.load_state_dict(state)
    return built
