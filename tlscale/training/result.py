"""Write and read `result.json`, and tell in it what a run's score is of: the same for training and for a probe.

- `scored_model`: `exported`, or `before_refit`: the score is of a probe's classifier that was fitted to the training
  images alone, and the exported one was fitted again, to the validation images too, and has no score of its own. Or
  `folds`: the score is of the models of a cross-validation, each on images that it was not fitted to.
- `exported_model`: `fitted_on_train`, `refitted_on_train_and_validation`, or `fitted_on_all` images of the folds.
- `selected_on`: `validation` where there is no test split and the scored images have chosen the step, layer, pooling
  or strength, so that the score is likely somewhat too high; `earlier_run` where some of them chose a run that this
  one starts or learns from; else null.
- `majority`: `label`, the most frequent class of the training images, and `top1`, its share of the scored images. Of
  several labels there is none, and `chance` in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tlscale.codes.probes.ranking import DEFAULT_THRESHOLD
from tlscale.data.sources.folds import FOLDS
from tlscale.data.sources.open import ImageData, ImageSplit
from tlscale.models.calibration import Calibration
from tlscale.storage import faults
from tlscale.storage.files import naming_disk_errors, write_json
from tlscale.storage.run_folder import RunFolder
from tlscale.tracking.redact import places_of, without_places
from tlscale.tracking.stopwatch import with_seconds_of
from tlscale.training.calibration import SET_LEVEL, least_units
from tlscale.training.duplicates import clashing_labels, shared_images
from tlscale.training.evaluate import figures_of
from tlscale.training.label_set_metrics import LabelScores
from tlscale.training.metrics import Tally, majority, summary
from tlscale.training.predictions import MOST_LOGITS
from tlscale.training.setup import RunSetup, strategy_of

_LONG = ("per_class", "confusion", "pr_curves")
"""Figures that come last in the file."""
TOO_FEW_FOR_SETS = (
    f"no threshold can be given from so few images, or groups of them ({least_units(SET_LEVEL)} are needed): "
    "each set has all classes"
)


def score_of(figures: Mapping[str, Any]) -> str:
    """Return the key of the figure that stands for all: of one label an image, or of several."""
    return "mean_average_precision" if figures.get("task") == "multi_label" else "top1"


def named(score: str) -> str:
    """Return what people call it."""
    return {"mean_average_precision": "mAP"}.get(score, score)


def no_figures(setup: RunSetup) -> dict[str, Any]:
    """Return the figures of no image: of a model that is scored on none."""
    if setup.data.has_several_labels:
        return figures_of(LabelScores(len(setup.data.classes)), setup.data.classes)[0]
    return summary(Tally(len(setup.data.classes), "cpu"), setup.data.classes)


def calibration_given(setup: RunSetup) -> Calibration | None:
    """Return what the folds of a cross-validation chose for the model on all images."""
    return None if setup.part is None else setup.part.calibration


def about_score(
    setup: RunSetup, split: ImageSplit | None, *, has_chosen: bool, refitted: bool = False
) -> dict[str, Any]:
    """Return the four keys of above.

    `has_chosen`: the exported weights were chosen among several steps, layers or strengths. `refitted`: a probe's
    classifier was fitted again, to the validation images too.
    """
    data = setup.data
    own = "validation" if split is data.validation is not None and has_chosen else None
    return {
        "scored_model": "before_refit" if refitted and data.test is None else "exported",
        "exported_model": "refitted_on_train_and_validation" if refitted else "fitted_on_train",
        "selected_on": own or chose_earlier(setup, split),
        **often(data, split or data.train),
    }


def chose_earlier(setup: RunSetup, split: ImageSplit | None) -> str | None:
    """Return `earlier_run` where scored images chose a run that this one starts or learns from; None: none did."""
    scored = FOLDS if split is None else split.name
    return "earlier_run" if any(one.num_chose for one in setup.earlier if one.scored == scored) else None


def thresholds_unchosen(setup: RunSetup) -> Sequence[float]:
    """Return the thresholds of several labels where there is no validation split to choose them by."""
    given = None if setup.part is None else setup.part.thresholds
    return given or [DEFAULT_THRESHOLD] * len(setup.data.classes)


def often(data: ImageData, split: ImageSplit) -> dict[str, Any]:
    """Return `majority` on a split; of several labels that they are such, as none stands for an image."""
    if data.has_several_labels:
        return {"task": "multi_label"}
    return {"majority": majority(data.train.labels_N, split.labels_N, data.classes)}


def fitted(setup: RunSetup, *, refitted: bool = False) -> dict[str, Any]:
    """Return the keys of the exported model's `config.json` that tell what it was fitted and scored on."""
    if setup.part is not None and setup.part.fold.holds_none:
        return {"fitted_on": ["train"], "scored_on": FOLDS}
    scored_on = "test" if setup.data.test is not None else None if refitted else "validation"
    return {"fitted_on": ["train", "validation"] if refitted else ["train"], "scored_on": scored_on}


def why_not_calibrated(data: ImageData, *, refitted: bool = False) -> str | None:
    """Tell why no images are left to choose a temperature by; None where there are some."""
    if data.validation is None:
        return "there is no validation split"
    if len(data.classes) > MOST_LOGITS:
        return f"there are more than {MOST_LOGITS:,} classes"
    if refitted:
        return "the classifier was fitted to the validation images, too (probe.refit: false keeps them for it)"
    return None


def about_calibration(
    setup: RunSetup,
    calibration: Calibration | None,
    figures: dict[str, Any],
    *,
    has_chosen: bool,
    refitted: bool = False,
) -> dict[str, Any]:
    """Return what `result.json` tells of the probabilities that `predict` gives.

    Returns:
        `temperature` (None: none was chosen, and `why` tells why), `num_images` of the validation split, or of all
        folds, that chose it, `also_chose`: whether they chose the step, layer or strength before; `loss`, `ece` and
        `ece_interval95` with the temperature, on the scored images: None where these chose it; `sets`: their `level`
        and `threshold` (0: each has all classes, and `why` tells why), and `coverage`, `coverage_interval95` and
        `mean_size` on the scored images. Of several labels there are no sets, and no interval.
    """
    if calibration is None:
        why = why_not_calibrated(setup.data, refitted=refitted) or "no validation image has an answer"
        return {"temperature": None, "why": why}
    told = figures.get("calibration", {})
    chosen = {**calibration.model_dump(exclude={"sets"}), "also_chose": has_chosen and calibration_given(setup) is None}
    if calibration.sets is None:
        return {**chosen, **told}
    few = {} if calibration.sets.threshold else {"why": TOO_FEW_FOR_SETS}
    return {**chosen, **told, "sets": {**calibration.sets.model_dump(), **few, **told.get("sets", {})}}


def make_result(
    setup: RunSetup, split: ImageSplit | None, figures: dict[str, Any], score: dict[str, Any], own: dict[str, Any]
) -> dict[str, Any]:
    """Return what `result.json` holds: the figures on the scored split, and what a kind of job tells of its own."""
    return {
        "name": setup.name,
        "strategy": strategy_of(setup),
        "split": None if split is None else split.name,
        **score,
        "num_classes": len(setup.data.classes),
        **({"views": list(setup.view_names)} if setup.view_names else {}),
        **{key: value for key, value in figures.items() if key not in ("step", *_LONG)},
        **own,
        **({} if setup.data.groups is None else {"groups": setup.data.groups.to_plain()}),
        **({"earlier_runs": [one.to_plain() for one in setup.earlier]} if setup.earlier else {}),
        "is_sample": setup.data.is_sample,
        "notes": without_places(list(setup.data.notes), places_of(setup.recipe)),
        "num_bad_images": len(setup.bad_images),
        "skipped_images": setup.bad_images.counts,
        **{key: figures[key] for key in _LONG if key in figures},
    }


def write_result(
    result: dict[str, Any], folder: RunFolder, setup: RunSetup, runs: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Write the last file of a run, and return it; where it is there, the run is complete.

    Copies among the images are noted here, where their contents are known. The watch is read last of all, so that its
    seconds are all that there were until this file. A full disk is a `TlscaleError`. `runs`: results of those of a
    cross-validation, whose seconds are its own.
    """
    faults.at("result")
    shared, notes = shared_images(setup.data)
    result["notes"] += notes
    action, dropped = setup.recipe.data.duplicates, dict(setup.data.num_dropped)
    result["notes"] += clashing_labels(setup.data) if action == "warn" else []
    if shared or action != "warn":
        result["duplicates"] = {"action": action, "in_two_splits": shared, "num_dropped": dropped}
    with naming_disk_errors(folder.result):
        result |= with_seconds_of(runs, setup.watch.figures(result["images_seen"]), FOLDS, result["images_seen"])
        write_json(folder.result, result)
    return result
