"""Read `run.json` and `result.json` of a run folder, of this or an older version.

Promise: what is read has the keys that are used, each of its type; a damaged file is an error that names it, and is
never taken for one that is not there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from tlscale.data.sources.bad_images import BadImages
from tlscale.errors import RunFolderError, flag
from tlscale.storage.files import refuse_endless_file
from tlscale.storage.run_folder import RunFolder, refuse_irregular
from tlscale.training.computed import Computed

_MOST_BYTES = 256 * 2**20
_Count = Annotated[int, Field(ge=0, le=2**53)]
_Share = Annotated[float, Field(ge=0.0, le=1.0)]


class _Facts(BaseModel):
    # What is not listed is only passed on.
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


def _bad_images(plain: object) -> object:
    try:
        BadImages.from_plain(plain)
    except (AttributeError, TypeError) as error:
        raise ValueError(str(error)) from error
    return plain


class _Weights(_Facts):
    sha256: str


_BY_CONTENT = ("used_sha256", "used_by", "scored_sha256", "scored_by")


class _Data(_Facts):
    num_images: dict[str, _Count]
    fingerprint: str
    labels_sha256: str | None = None
    tables_sha256: str | None = None
    # An older version wrote none of these.
    used_sha256: str = ""
    used_by: Literal["content", "place"] = "place"
    scored_sha256: str = ""
    scored_by: Literal["content", "place"] = "place"
    earlier_scored_sha256: list[str] = []

    @model_validator(mode="after")
    def _check(self) -> _Data:
        if 0 < len(self.model_fields_set & set(_BY_CONTENT)) < len(_BY_CONTENT):
            raise ValueError(f"of {', '.join(_BY_CONTENT)} some are missing")
        return self


def _start(plain: object) -> object:
    """Check a start as `computed` will read it, whatever fields that has by now."""
    try:
        TypeAdapter(Computed).validate_python(Computed(**plain).__dict__)  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(str(error)) from error
    return plain


class _Fold(_Facts):
    num_folds: Annotated[int, Field(ge=2, le=1000)]
    num_repeats: Annotated[int, Field(ge=1, le=100)]
    number: Annotated[int, Field(ge=1, le=100_000)] | None
    share: Annotated[float, Field(gt=0.0, le=1.0)]
    thresholds: list[_Share] | None = None


class _Change(_Facts):
    step: _Count


class _RunInfo(_Facts):
    tlscale: str
    id: str | None = None
    recipe_sha256: str = ""
    data: _Data | None = None
    bad_images: Annotated[Any, BeforeValidator(_bad_images)] = []
    input: dict[str, Any] = {}
    weights: _Weights | None = None
    teacher: _Weights | None = None
    corrections: list[str] = []
    batch: str | None = None
    world_size: _Count = 1
    computed: list[Annotated[Any, BeforeValidator(_start)]] = []
    changes: list[_Change] = []
    keeps_codes: dict[str, bool] = {}
    fold: _Fold | None = None


class _Majority(_Facts):
    label: str
    top1: _Share


class _Probe(_Facts):
    layer: str
    pool: str
    held_out_top1: _Share | None
    num_images: _Count
    refitted: bool | None = None
    tried: dict[str, list[Any]]


class _Codes(_Facts):
    num_computed: _Count | None = None


class _ComputedScores(_Facts):
    on_codes: bool
    batch_size: Annotated[int, Field(ge=1, le=10_000_000)]
    num_processes: Annotated[int, Field(ge=1, le=1_000_000)]


class _Best(_Facts):
    step: _Count


class _Result(_Facts):
    strategy: str
    split: str | None
    num_images: _Count
    # Of one label an image, or of several.
    top1: _Share | None = None
    top1_interval95: Annotated[list[_Share], Field(min_length=2, max_length=2)] | None = None
    mean_average_precision: _Share | None = None
    task: Literal["multi_label"] | None = None
    best: _Best
    steps: _Count
    images_seen: _Count
    wall_s: Annotated[float, Field(ge=0.0)]
    seconds: dict[str, float] | None = None
    trainable_params: _Count
    majority: _Majority | None = None
    scored_sha256: str | None = None
    selected_on: str | None = None
    scored_model: str | None = None
    probe: _Probe | None = None
    codes: _Codes | None = None
    computed_scores: _ComputedScores | None = None

    @model_validator(mode="after")
    def _check(self) -> _Result:
        is_of_one = self.split is not None and self.task is None
        if is_of_one and (self.top1 is None or self.top1_interval95 is None):
            raise ValueError("a split was scored, and top1 or its interval is missing")
        return self


def _read(path: Path, facts: type[_Facts]) -> dict[str, Any] | None:
    try:
        refuse_endless_file(path, _MOST_BYTES)
        plain: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        facts.model_validate(plain)
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, str(error)) from error
    return plain


def damaged(path: Path, why: str) -> RunFolderError:
    """Make the error of a file of a run folder that is not as the run left it."""
    return RunFolderError(
        f"'{path}' is damaged, or was changed: {why}",
        remedy="Bring it back, or run the recipe again with " + flag("overwrite"),
    )


def read_run_info(folder: RunFolder, needed: Sequence[str] = ()) -> dict[str, Any] | None:
    """Read `run.json` of a run that began earlier; None where there is none.

    `recipe.yaml` is written after it, so a folder without that was killed before its first step: nothing began.

    Args:
        needed: keys that it must have, and not null.

    Raises:
        RunFolderError: it is damaged, or something in the folder is no file.
    """
    refuse_irregular(folder)
    run_info = _read(folder.run_json, _RunInfo) if folder.recipe.exists() else None
    lacking = [key for key in needed if run_info is not None and run_info.get(key) is None]
    if lacking:
        raise damaged(folder.run_json, f"it lacks {', '.join(lacking)}")
    return run_info


def read_result(folder: RunFolder) -> dict[str, Any] | None:
    """Read `result.json`; None where the run is not complete.

    Raises:
        RunFolderError: it is damaged, or something in the folder is no file.
    """
    refuse_irregular(folder)
    return _read(folder.result, _Result)
