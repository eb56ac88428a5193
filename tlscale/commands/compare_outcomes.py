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
from tlscale.training.result import score_of
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
    task: str | None = None
    """`multi_label`: then these three are in place of `top1`, `held_out_top1` and `majority`."""
    mean_average_precision: float | None = None
    held_out_mean_average_precision: float | None = None
    chance: float | None = None
    """The mean average precision of a network that never looks."""

    @property
    def figure(self) -> str:
        """Return the key of the figure that is compared."""
        return score_of({"task": self.task})

    @property
    def score(self) -> float | None:
        figure: float | None = getattr(self, self.figure)
        return figure

    @property
    def held_out(self) -> float | None:
        """Return the same on the images that chose the weights."""
        figure: float | None = getattr(self, f"held_out_{self.figure}")
        return figure

    @property
    def baseline(self) -> float | None:
        """Return the same of an answer that learns nothing from an image."""
        return self.chance if self.majority is None else float(self.majority["top1"])


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
    def figure(self) -> str:
        """Return the key of the figure that is compared, the same in all rows."""
        return self.runs[0].figure

    @property
    def scores(self) -> list[float]:
        return [run.score for run in self.runs if run.score is not None]

    @property
    def score(self) -> float:
        return fmean(self.scores)

    @property
    def found_codes(self) -> bool:
        return any(run.found_codes for run in self.runs)

    @property
    def has_interval(self) -> bool:
        return any(run.interval95 is not None for run in self.runs)

    @property
    def low(self) -> float:
        return min([*self.scores, *self._mean_end(0)])

    @property
    def high(self) -> float:
        return max([*self.scores, *self._mean_end(1)])

    def _mean_end(self, at: int) -> list[float]:
        """Return the mean of the lower, or upper, ends of the intervals; empty where there is none, of few images."""
        ends = [run.interval95[at] for run in self.runs if run.interval95 is not None]
        return [fmean(ends)] if ends else []


def finished(variant: str, size: int | None, seed: int, folder: RunFolder, result: Mapping[str, Any]) -> Outcome:
    """Read the outcome of a complete run; `size` None: as many training and held-out images as `run.json` counts."""
    record = read_run_info(folder, ("data", "recipe_sha256"))
    if record is None:
        raise RunFolderError(f"'{folder.path}' has a result, but no run.json or recipe.yaml: it is no run folder")
    counts, codes = record["data"]["num_images"], result.get("codes")
    whole_is_frozen = result["strategy"] not in ("finetune", "stages", "scratch")
    computed = codes["num_computed"] if codes is not None else None
    score, figure = _score(result, counts), score_of(result)
    interval = score[f"{figure}_interval95"]
    return Outcome(
        variant=variant,
        size=size if size is not None else counts["train"] + counts.get("validation", 0),
        seed=seed,
        folder=str(folder.path),
        recipe_sha256=record["recipe_sha256"],
        error=None if score[figure] is not None else "no scored image has any of the labels",
        interval95=None if interval is None else tuple(interval),
        **{figure: score[figure], f"held_out_{figure}": _held_out(folder, result, figure)},
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
        num_groups=score.get(f"{figure}_interval95_by", {}).get("groups"),
        selected_on=score.get("selected_on"),
        scored_model=score.get("scored_model"),
        majority=result.get("majority"),
        task=result.get("task"),
        chance=result["chance"][figure] if "chance" in result else None,
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


def _held_out(folder: RunFolder, result: Mapping[str, Any], figure: str) -> float | None:
    """Return the figure of the exported weights on the images that chose them."""
    if "probe" in result:
        value = result["probe"][f"held_out_{figure}"]
        return value if value is None else float(value)
    if result["split"] == FOLDS:
        return None  # each of its models has such a figure
    step = result["best"]["step"]
    records = [record for record in read_metrics(folder.metrics) if record.get("split") == "validation"]
    return next((float(record[figure]) for record in records if record["step"] == step and figure in record), None)


def _layer(result: Mapping[str, Any]) -> str | None:
    probe = result.get("probe")
    return probe and (PENULTIMATE if probe["layer"] == PENULTIMATE else f"{probe['layer']}, {probe['pool']}")
