"""Cross-validate: a run for each fold, a model that is fitted to all images, and one result.

Chapters: folds; the model on all images; the result. Whatever is chosen for a fold (layer, strength, step) is chosen by
images held out within what it is fitted to: its own images are scored once, and choose nothing of it. The model on all
images has what most folds chose, or the median of the lengths that they chose, and the temperature that the answers of
all folds choose (`fold_calibration`); its score is the folds'. Each of these is a run in a folder of its own, so that
what is complete is not done again.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from tlscale.codes.parts import layer_name, wanted_layers
from tlscale.codes.probes.kinds import kind_of
from tlscale.data.identity import folds_identity
from tlscale.data.sources.folds import FOLDS, Fold
from tlscale.data.sources.open import ImageData
from tlscale.distributed.processes import Processes
from tlscale.distributed.signals import check_stop
from tlscale.errors import flag
from tlscale.models.calibration import Calibration
from tlscale.models.model_copy import copy_model
from tlscale.recipe.schema import Recipe
from tlscale.storage.files import naming_disk_errors
from tlscale.storage.run_folder import RunFolder
from tlscale.tracking.console import Console, number
from tlscale.tracking.stopwatch import format_duration
from tlscale.tracking.trackers import check_installed
from tlscale.training.duplicates import note_on_folds
from tlscale.training.evaluate import scalars
from tlscale.training.fold_calibration import FITTED_TO_ALL, about_fold_calibration, choose_by_folds
from tlscale.training.fold_checks import check_folds, refuse_other_images
from tlscale.training.fold_parts import LONGEST_NAME, Part, all_images, group_name
from tlscale.training.label_set_figures import add_label_figures
from tlscale.training.logger import track_whole
from tlscale.training.out_of_fold import (
    count_copies_outside,
    join_predictions,
    label_set_figures,
    out_of_fold_figures,
    write_table,
)
from tlscale.training.prediction_figures import add_prediction_figures
from tlscale.training.result import chose_earlier, make_result, named, often, score_of, write_result
from tlscale.training.run_info import begin_folder
from tlscale.training.setup import RunSetup

Result = dict[str, Any]
RunPart = Callable[[Recipe, Path, Part, ImageData], Result]
_OF_TEST = (
    *("num_images", "top1", "top1_interval95", "top1_interval95_by", "top5", "loss", "macro_f1", "balanced_accuracy"),
    *("ece", "ece_interval95", "calibration", "auroc", "mean_average_precision"),
    # Of several labels.
    *("task", "mean_average_precision_interval95", "mean_average_precision_interval95_by"),
    *("micro_f1", "subset_accuracy", "chance"),
)
_OF_FOLD = {
    "top1": ("num_images", "top1", "loss", "macro_f1", "balanced_accuracy"),
    "mean_average_precision": (
        *("num_images", "mean_average_precision", "loss", "macro_f1", "micro_f1", "subset_accuracy"),
    ),
}
"""By the figure that stands for all."""


def cross_validate(
    setup: RunSetup,
    folder: RunFolder,
    processes: Processes,
    run_info: dict[str, Any] | None,
    console: Console,
    run_part: RunPart,
) -> tuple[Result, str]:
    """Run all folds, and then once on all images; return what `training.loop.train` does.

    Args:
        setup: of all images, none held out.
        run_info: contents of `run.json` when resuming, else None.
        run_part: runs a recipe in a folder as a part of these data, or goes on with it; returns its result.
    """
    recipe = setup.recipe
    check_installed(recipe.track)  # complete folds do not ask for it
    if run_info is None:
        with setup.watch("scan"):
            check_folds(setup, processes.world_size)
        run_info = processes.run_on_main(begin_folder, folder, setup, processes.world_size, str(processes.device))
    whole = all_images(recipe.evaluate)
    assert whole is not None, "the recipe has folds"
    # -- folds: each chooses and is scored by itself ------------------------------------------------------------------
    results, group = [], group_name(recipe, run_info)
    for fold in whole.folds:
        with console.part(f"fold {fold}"), setup.watch(FOLDS):
            result = _run(run_part, _of_part(recipe, fold), folder, Part(fold, group=group), setup, processes)
        console.say(f"fold {fold}: {_in_a_line(result)}")
        results.append(result)
    # -- the model on all images --------------------------------------------------------------------------------------
    calibration = processes.run_on_main(_calibration, folder, whole.folds, setup.data)
    part = Part(whole, statistics.median(map(_share, results)), _median_thresholds(results), calibration, group)
    with console.part("the model of all images"), setup.watch(FOLDS):
        last = _run(run_part, _with_choice(_of_part(recipe, whole), results), folder, part, setup, processes)
    console.say(f"the model of all images: {_chosen_in_words(last)}, in {format_duration(last['wall_s'])}")
    # -- the result ---------------------------------------------------------------------------------------------------
    how_to_load = processes.run_on_main(_take_model, folder)
    result = processes.run_on_main(_conclude, setup, folder, whole.folds, results, last)
    track_whole(recipe, folder, processes, run_info, result, console)
    return result, how_to_load


def _run(
    run_part: RunPart, recipe: Recipe, folder: RunFolder, part: Part, setup: RunSetup, processes: Processes
) -> Result:
    processes.run_on_all(check_stop, "cross-validating", flag("resume") + " goes on; complete folds are kept")
    return run_part(recipe, _folder_of(folder, part.fold).path, part, setup.data)


def _folder_of(folder: RunFolder, fold: Fold) -> RunFolder:
    return RunFolder(folder.folds / ("all" if fold.number is None else str(fold.number)))


def _of_part(recipe: Recipe, fold: Fold) -> Recipe:
    """Return the recipe under a name of the part's own, by which trackers tell it from the others."""
    suffix = "all" if fold.number is None else f"fold-{fold.number}"
    return recipe.model_copy(update={"name": f"{recipe.name[:LONGEST_NAME]}-{suffix}"})


# -- what the folds chose ---------------------------------------------------------------------------------------------


def _share(result: Result) -> float:
    """Return the share of its steps after which a fold's weights were best; 1 of a probe."""
    return float(result["best"]["step"] / _num_steps(result)) if result["steps"] else 1.0


def _num_steps(result: Result) -> int:
    """Return the steps that a fold would have made if patience had not ended it."""
    early = result.get("stopped_early")
    return int(result["steps"] if early is None else early["of_steps"])


def _median_thresholds(results: Sequence[Result]) -> tuple[float, ...] | None:
    """Return for each class the median of the thresholds that the folds chose; None of one label an image.

    Each was chosen by validation images within its fold, so no image of its fold had a part in it.
    """
    if score_of(results[0]) == "top1":
        return None
    chosen = [[row["threshold"] for row in result["per_class"].values()] for result in results]
    return tuple(map(statistics.median, zip(*chosen, strict=True)))


def _calibration(folder: RunFolder, folds: Sequence[Fold], data: ImageData) -> Calibration | None:
    """Choose the temperature of the model on all images by the answers of the folds."""
    return choose_by_folds(_answers(folder, folds, data))


def _with_choice(recipe: Recipe, results: Sequence[Result]) -> Recipe:
    """Return the recipe of a probe with the layer, pooling and setting that most folds chose.

    Of equally many the layer that is named first, and of the settings with it the smoothest.
    """
    if recipe.probe is None:
        return recipe
    kind = kind_of(recipe.probe.kind).setting
    probes = [result["probe"] for result in results]
    pairs = Counter((probe["layer"], probe["pool"]) for probe in probes)
    layer, pool = max(wanted_layers(recipe.codes), key=lambda pair: pairs[pair])  # the first one of equals
    settings = Counter(probe["setting"] for probe in probes if (probe["layer"], probe["pool"]) == (layer, pool))
    setting = max(settings, key=lambda value: (settings[value], value))
    value = int(setting) if kind.key == "neighbours" else setting
    return recipe.model_copy(
        update={
            "codes": recipe.codes.model_copy(update={"layer": [layer], "pool": [pool]}),
            "probe": recipe.probe.model_copy(update={kind.key: [value]}),
        }
    )


# -- the result -------------------------------------------------------------------------------------------------------


def _take_model(folder: RunFolder) -> str:
    """Copy the model that was fitted to all images to the run's folder; return how to load it."""
    with naming_disk_errors(folder.model):
        return copy_model(RunFolder(folder.folds / "all").model, folder.model)


def _conclude(
    setup: RunSetup, folder: RunFolder, folds: Sequence[Fold], results: Sequence[Result], last: Result
) -> Result:
    """Write the predictions of all folds, and the result."""
    data = setup.data
    for fold, done in zip(folds, results, strict=True):  # an image may have been replaced while they ran
        refuse_other_images(setup.recipe, data, done, _folder_of(folder, fold))
    table = _answers(folder, folds, data)
    write_table(folder.predictions, table)
    if data.has_several_labels:
        figures = label_set_figures(table, data.classes, folds[0].num_repeats)
        figures = add_label_figures(figures, folder.predictions)
    else:
        figures = out_of_fold_figures(table, data.classes, folds[0].num_repeats)
        figures = add_prediction_figures(figures, folder.predictions)
    score = {
        "scored_model": FOLDS,
        "exported_model": "fitted_on_all",
        "selected_on": chose_earlier(setup, None),
        **often(data, data.train),
    }
    own = _own(figures, folds, results, last) | {"calibration": about_fold_calibration(last["calibration"], table)}
    result = make_result(setup, data.train, figures, score, own)
    result |= {"split": FOLDS, **folds_identity(data)}
    if all((fold.get("probe") or {}).get("refitted") for fold in results):
        count = count_copies_outside(table, data.train.digests(), folds[0].num_repeats)
    else:
        count = _in_train(results)
    result["notes"] += note_on_folds(count)
    if data.test is not None:
        data.test.digests()  # the model on all images was scored on them: copies in train are noted below
    return write_result(result, folder, setup, [*results, last])


def _answers(folder: RunFolder, folds: Sequence[Fold], data: ImageData) -> pa.Table:
    """Read the predictions of all folds, each of its own images."""
    return join_predictions([_folder_of(folder, fold).predictions for fold in folds], folds, data.train)


def _own(figures: Result, folds: Sequence[Fold], results: Sequence[Result], last: Result) -> Result:
    """Return what `result.json` tells of a cross-validation alone, but for its calibration."""
    figure = score_of(last)
    scores = [
        {
            "fold": fold.number,
            "repeat": fold.repeat,
            **{key: result[key] for key in _OF_FOLD[figure]},
            "chosen": _chosen(result),
        }
        for fold, result in zip(folds, results, strict=True)
    ]
    known = [score[figure] for score in scores if score[figure] is not None]
    thresholds = _median_thresholds(results)
    brief = {"step": last["steps"], **scalars(figures)}
    keys = ("weights", "epochs", "steps", "trainable_params", "total_params", "probe")
    tested = {} if last["split"] is None else {"test": {key: last[key] for key in _OF_TEST if key in last}}
    return {
        "folds": {
            "num_folds": folds[0].num_folds,
            "num_repeats": folds[0].num_repeats,
            f"{figure}_mean": statistics.fmean(known) if known else None,
            f"{figure}_sd": statistics.stdev(known) if len(known) > 1 else None,
            **({} if thresholds is None else {"thresholds": dict(zip(figures["per_class"], thresholds, strict=True))}),
            "scores": scores,
        },
        **tested,
        "best": brief,
        "last": brief,
        "unknown": {"threshold": None, "why": FITTED_TO_ALL},
        **{key: last[key] for key in keys if key in last},
        # Of images that others bring, which several processes do not have in the shares of a split.
        **({"computed_scores": {**last["computed_scores"], "num_processes": 1}} if "computed_scores" in last else {}),
        "images_seen": sum(result["images_seen"] for result in (*results, last)),
        "codes": _codes([*results, last]),
    }


def _chosen(result: Result) -> Result:
    if "probe" in result:
        return {key: result["probe"][key] for key in ("layer", "pool", "setting")}
    return {"step": result["best"]["step"], "of": _num_steps(result)}


def _in_a_line(result: Result) -> str:
    """Tell the figures of a fold, what was chosen within it, and its seconds."""
    score = score_of(result)
    figures = f"{named(score)} {number(result[score])}  loss {number(result['loss'])}  {result['num_images']:,} images"
    return f"{figures}, by {_chosen_in_words(result)}, in {format_duration(result['wall_s'])}"


def _chosen_in_words(result: Result) -> str:
    chosen = _chosen(result)
    if "step" in chosen:
        return f"step {chosen['step']:,} of {chosen['of']:,}"
    return f"{layer_name((chosen['layer'], chosen['pool']))}, {chosen['setting']:g}"


def _codes(results: Sequence[Result]) -> Result | None:
    """Return how many images were computed for codes, over all parts, and what is cached of the last one."""
    known = [result["codes"] for result in results if result["codes"] is not None]
    return {**known[-1], "num_computed": sum(codes["num_computed"] for codes in known)} if known else None


def _in_train(results: Sequence[Result]) -> int:
    """Count images that are, byte for byte, among the training images of their fold."""
    shared = [one for result in results for one in result.get("duplicates", {}).get("in_two_splits", ())]
    return sum(one["num_images"] for one in shared if one["splits"] == ["test", "train"])
