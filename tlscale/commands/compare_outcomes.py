"""The outcomes of the runs that `tlscale compare` puts side by side, as they are read from their folders.

Promise: figures that an older tlscale got of images that the model had seen are not taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tlscale.data.sources.folds import FOLDS
from tlscale.errors import RunFolderError
from tlscale.models.features import PENULTIMATE
from tlscale.storage.run_folder import RunFolder
from tlscale.tracking.metrics_log import read_metrics
from tlscale.training.metrics import wilson
from tlscale.training.run_files import read_run_info


@dataclass(frozen=True)
class Outcome:
    """Hold the outcome of one run; figures are None where it failed, and `error` has the reason."""

    variant: str
    """A strategy, or the name of a recipe."""
    size: int
    """Labelled training images, those that are held out included."""
    seed: int
    folder: str
    recipe_sha256: str
    error: str | None = None
    top1: float | None = None
    interval95: tuple[float, float] | None = None
    held_out_top1: float | None = None
    wall_s: float | None = None
    trainable_params: int | None = None
    steps: int | None = None
    images_seen: int | None = None
    """Images that went through the backbone while codes were computed or the network was trained."""
    found_codes: bool = False
    """Codes that another run had computed were used, so that `wall_s` is without that."""
    seconds: dict[str, float] | None = None
    """The parts of `wall_s`; None of a run of an older version."""
    layer: str | None = None
    split: str | None = None
    num_images: int | None = None
    num_groups: int | None = None
    """Of the scored images, where the interval is over groups; None: it is over images."""
    fingerprint: str | None = None
    scored_sha256: str | None = None
    """Of the scored images by content; None of a run of an older version."""
    selected_on: str | None = None
    """The split of the score, where its images also chose the step, layer or strength."""
    scored_model: str | None = None
    """`exported`, or `before_refit`: then the exported model has no score of its own."""
    folds: tuple[int, int] | None = None
    """Their number and that of repeats; None: no cross-validation."""
    majority: dict[str, Any] | None = None
    """`label` and `top1` of always saying the most frequent class of the training images."""


@dataclass(frozen=True)
class Row:
    """Summarise a variant at one size over its seeds; `low` and `high` span the intervals and the seeds."""

    variant: str
    size: int
    runs: tuple[Outcome, ...]
    """Those that did not fail, of which there is at least one."""

    def mean(self, name: str) -> float | None:
        values = [value for run in self.runs if (value := getattr(run, name)) is not None]
        return fmean(values) if values else None

    @property
    def tops(self) -> list[float]:
        return [run.top1 for run in self.runs if run.top1 is not None]

    @property
    def top1(self) -> float:
        return fmean(self.tops)

    @property
    def majority_top1(self) -> float | None:
        shares = [run.majority["top1"] for run in self.runs if run.majority is not None]
        return fmean(shares) if shares else None

    @property
    def found_codes(self) -> bool:
        return any(run.found_codes for run in self.runs)

    @property
    def low(self) -> float:
        return min(*self.tops, fmean(run.interval95[0] for run in self.runs if run.interval95 is not None))

    @property
    def high(self) -> float:
        return max(*self.tops, fmean(run.interval95[1] for run in self.runs if run.interval95 is not None))


def finished(variant: str, size: int | None, seed: int, folder: RunFolder, result: Mapping[str, Any]) -> Outcome:
    """Read the outcome of a complete run; `size` None: as many training and held-out images as `run.json` counts."""
    record = read_run_info(folder, ("data", "recipe_sha256"))
    if record is None:
        raise RunFolderError(f"'{folder.path}' has a result, but no run.json or recipe.yaml: it is no run folder")
    counts, codes = record["data"]["num_images"], result.get("codes")
    whole_is_frozen = result["strategy"] not in ("finetune", "stages", "scratch")
    computed = codes["num_computed"] if codes is not None else None
    score = _score(result, counts)
    return Outcome(
        variant=variant,
        size=size if size is not None else counts["train"] + counts.get("validation", 0),
        seed=seed,
        folder=str(folder.path),
        recipe_sha256=record["recipe_sha256"],
        top1=score["top1"],
        interval95=tuple(score["top1_interval95"]),
        held_out_top1=_held_out_top1(folder, result),
        wall_s=result["wall_s"],
        seconds=result.get("seconds"),
        trainable_params=result["trainable_params"],
        steps=result["steps"],
        images_seen=computed if computed is not None and whole_is_frozen else result["images_seen"],
        found_codes=computed is not None and computed < sum(counts.values()),
        layer=_layer(result),
        split=result["split"],
        num_images=result["num_images"],
        fingerprint=record["data"]["fingerprint"],
        scored_sha256=result.get("scored_sha256"),
        num_groups=score.get("top1_interval95_by", {}).get("groups"),
        selected_on=score.get("selected_on"),
        scored_model=score.get("scored_model"),
        majority=result.get("majority"),
        folds=(result["folds"]["num_folds"], result["folds"]["num_repeats"]) if "folds" in result else None,
    )


def _score(result: Mapping[str, Any], counts: dict[str, int]) -> Mapping[str, Any]:
    """Return the figures of a run that may be shown.

    An older tlscale scored a probe that it had fitted again, to the validation images as well, on these very images.
    What they said of it before that is in the result, too.
    """
    probe = result.get("probe", {})
    saw_them = result["split"] == "validation" and probe.get("num_images", 0) > counts["train"]
    if "scored_model" in result or not saw_them:
        return result
    num_hits = round(probe["held_out_top1"] * result["num_images"])
    return {
        "top1": probe["held_out_top1"],
        "top1_interval95": wilson(num_hits, result["num_images"]),
        "scored_model": "before_refit",
        "selected_on": "validation" if sum(map(len, probe["tried"].values())) > 1 else None,
    }


def _held_out_top1(folder: RunFolder, result: Mapping[str, Any]) -> float | None:
    """Return the top1 of the exported weights on the images that chose them."""
    if "probe" in result:
        figure = result["probe"]["held_out_top1"]
        return figure if figure is None else float(figure)
    if result["split"] == FOLDS:
        return None  # each of its models has such a figure
    step = result["best"]["step"]
    records = [record for record in read_metrics(folder.metrics) if record.get("split") == "validation"]
    return next((float(record["top1"]) for record in records if record["step"] == step and "top1" in record), None)


def _layer(result: Mapping[str, Any]) -> str | None:
    probe = result.get("probe")
    return probe and (PENULTIMATE if probe["layer"] == PENULTIMATE else f"{probe['layer']}, {probe['pool']}")
