"""Finish a training run: export the chosen weights, evaluate them and the last ones, write `result.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tlscale.codes.probes.ranking import DEFAULT_THRESHOLD
from tlscale.data.decode import BadImageError
from tlscale.data.identity import result_identity
from tlscale.data.sources.open import ImageSplit
from tlscale.errors import CheckpointError
from tlscale.models.adapters import merged
from tlscale.models.calibration import Calibration
from tlscale.models.classifier import Classifier
from tlscale.models.export import DecisionRules, export_model
from tlscale.models.unknown import UnknownScore
from tlscale.storage.files import flush, naming_disk_errors
from tlscale.storage.run_folder import RunFolder
from tlscale.training.checkpoint.files import Checkpoint, checkpoint_folder
from tlscale.training.checkpoint.run_state import restore_weights
from tlscale.training.checkpoint.sharded import load_on_all
from tlscale.training.evaluate import SeveralLabels, scalars
from tlscale.training.group_error import num_error_groups
from tlscale.training.input_pipeline import CodePipeline, ImagePipeline, InputPipeline
from tlscale.training.label_set_calibration import label_calibration_by
from tlscale.training.label_set_figures import add_label_figures
from tlscale.training.label_set_predictions import collect
from tlscale.training.logger import RunLogger
from tlscale.training.loop_state import LoopState
from tlscale.training.prediction_figures import add_prediction_figures, calibration_by
from tlscale.training.predictions import Predictions, gather_predictions, write_predictions
from tlscale.training.result import (
    about_calibration,
    about_score,
    calibration_given,
    fitted,
    make_result,
    no_figures,
    thresholds_unchosen,
    why_not_calibrated,
    write_result,
)
from tlscale.training.specs import pipeline_spec
from tlscale.training.state import TrainState, unwrap
from tlscale.training.unknown import about_unknown, images_to_judge, unknown_by
from tlscale.training.unread_images import unread_test_image

Figures = dict[str, Any]


def finish(
    state: TrainState, loop: LoopState, logger: RunLogger, folder: RunFolder, run_info: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """Export the chosen weights, and score them and the last ones on the split that chose nothing, as for `train`.

    The validation images are asked once more before, about the temperature that the model takes along. Without a split
    to score, as for the model of a cross-validation, nothing is scored.

    Raises:
        DataError: an image of that split cannot be read; the model is exported.
    """
    setup, processes = state.setup, state.processes
    split = setup.data.test or setup.data.validation
    last_weights = _weights(state)
    chosen = _take_chosen_weights(state, loop, folder)
    judged, calibration = _calibrate(state, chosen)
    unknown = processes.run_on_main(_find_unknown, state, chosen)
    thresholds, of_labels = _decide_labels(state, chosen.inputs)
    calibration = calibration_given(setup) or calibration or of_labels
    rules = DecisionRules(calibration, unknown, thresholds)
    # The model first: whatever becomes of the rest, the run was not for nothing.
    with state.averaged():
        network = processes.engine.gather(state.network, keep=processes.is_main)
        how_to_load = processes.run_on_main(_export, network, state, folder, rules)
    try:
        best = last = {"step": chosen.step, **no_figures(setup)}
        if split is not None:
            judged = judged if split is setup.data.validation else None
            best, last = _score_both(state, loop, chosen, folder, split, judged, rules, last_weights)
        identity = processes.run_on_main(result_identity, setup.data)
    except BadImageError as error:
        raise unread_test_image(error, folder) from error
    unwrap(state)
    # One evaluation, in the end, chooses nothing; a run that was made longer had one at each of its ends.
    has_chosen = (state.due.evaluate_every or 0) < setup.total_steps or bool(run_info.get("lengthened"))
    has_chosen = has_chosen or rules.thresholds is not None
    score = about_score(setup, split, has_chosen=has_chosen)
    result = make_result(setup, split, best, score, _own(state, loop, chosen, best=best, last=last))
    result["computed_scores"] = _scoring(state, chosen.inputs)
    result["calibration"] = about_calibration(setup, calibration, best, has_chosen=has_chosen)
    result["unknown"] = processes.run_on_main(_tell_unknown, unknown, chosen, split)
    result["changes"] = run_info["changes"]  # of how it was computed, from start to start
    result |= identity
    processes.run_on_main(logger.sync)
    result = processes.run_on_main(write_result, result, folder, setup)
    logger.write_summary(result)
    return result, how_to_load


def _score_both(
    state: TrainState,
    loop: LoopState,
    chosen: _Chosen,
    folder: RunFolder,
    split: ImageSplit,
    judged: tuple[Figures, Predictions] | None,
    rules: DecisionRules,
    last_weights: Checkpoint,
) -> tuple[Figures, Figures]:
    """Score the chosen weights, or take them as `judged` on this split, and the last ones; write the predictions."""
    setup, processes = state.setup, state.processes
    best, predictions = judged or _score(state, chosen.inputs, split, chosen.step, rules.thresholds)
    predictions.calibration = rules.calibration
    last = best
    if chosen.step != loop.step:
        restore_weights(last_weights, state.network, state.ema, setup.unchanging_keys)
        last, _ = _score(state, state.inputs, split, loop.step, rules.thresholds)
    # Before the result, which says that all is there.
    write_predictions(folder.predictions, predictions, processes)
    scored = _all_figures(state, best, folder, split)
    return scored, scored if last is best else last


def _score(
    state: TrainState, inputs: InputPipeline, split: ImageSplit, step: int, thresholds: Sequence[float] | None
) -> tuple[Figures, Predictions]:
    predictions = collect(split, state.setup.data.classes, thresholds)
    with state.setup.watch("test"):
        figures = state.evaluate(split, inputs, predictions=predictions, several=SeveralLabels(thresholds))
    return {"step": step, **figures}, predictions


def _all_figures(state: TrainState, figures: Figures, folder: RunFolder, split: ImageSplit) -> Figures:
    """Add the figures that take all scored images at once; of several labels those with the temperature are missing."""
    add = add_label_figures if state.setup.data.has_several_labels else add_prediction_figures
    with state.setup.watch("test"):
        return state.processes.run_on_main(add, figures, folder.predictions, have_chosen=split.name == "validation")


def _decide_labels(state: TrainState, inputs: InputPipeline) -> tuple[Sequence[float] | None, Calibration | None]:
    """Choose the thresholds and the temperature of several labels on the validation images; None of one label."""
    data, setup = state.setup.data, state.setup
    if not data.has_several_labels:
        return None, None
    if data.validation is None:
        return thresholds_unchosen(setup), None
    predictions = collect(data.validation, data.classes, thresholds_unchosen(setup))
    try:
        with setup.watch("evaluate"):
            several = SeveralLabels("best")
            figures = state.evaluate(data.validation, inputs, predictions=predictions, several=several)
    except BadImageError as error:  # gone since it was evaluated; the model is exported all the same
        warning = f"WARNING: all thresholds are {DEFAULT_THRESHOLD}, as a validation image cannot be read: {error}"
        state.codes_cache.console.say(warning, style="bold red")
        return thresholds_unchosen(setup), None
    thresholds = [row["threshold"] for row in figures["per_class"].values()]
    if why_not_calibrated(data) is not None:
        return thresholds, None
    table = gather_predictions(predictions, state.processes)
    return thresholds, state.processes.run_on_main(label_calibration_by, table)


def _calibrate(state: TrainState, chosen: _Chosen) -> tuple[tuple[Figures, Predictions] | None, Calibration | None]:
    """Score the validation images, and choose the temperature by them; None where that is not done."""
    validation = state.setup.data.validation
    has_several = state.setup.data.has_several_labels  # whose thresholds are chosen in the same pass
    if validation is None or has_several or why_not_calibrated(state.setup.data) is not None:
        return None, None
    try:
        judged = _score(state, chosen.inputs, validation, chosen.step, None)
    except BadImageError:  # gone since it was evaluated; the model is exported all the same
        return None, None
    table = gather_predictions(judged[1], state.processes)
    return judged, state.processes.run_on_main(calibration_by, table)


def _find_unknown(state: TrainState, chosen: _Chosen) -> UnknownScore | str:
    """Fit the score of unknown images to the cached codes, or tell why not."""
    data, inputs = state.setup.data, chosen.inputs
    if not isinstance(inputs, CodePipeline):
        return "there are no cached codes of a frozen part"
    with state.setup.watch("test"):
        return unknown_by(inputs.pooled, data.train.labels_N, data.validation)


def _tell_unknown(unknown: UnknownScore | str, chosen: _Chosen, split: ImageSplit | None) -> dict[str, Any]:
    """Return what the result tells of it; images that chose the threshold do not judge it."""
    judges = split is not None and split.name != "validation"
    if isinstance(unknown, str) or not isinstance(chosen.inputs, CodePipeline) or not judges:
        return about_unknown(unknown, None)
    assert split is not None
    return about_unknown(unknown, chosen.inputs.pooled(split.name, images_to_judge(len(split))))


def _scoring(state: TrainState, inputs: InputPipeline) -> dict[str, Any]:
    """Note how the scored images went through the network, on which the last bits of their predictions hang."""
    return {
        "on_codes": isinstance(inputs, CodePipeline),
        "batch_size": pipeline_spec(state.setup, state.processes.device).eval_batch_size,
        "num_processes": state.processes.world_size,
    }


# -- the weights that are exported ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chosen:
    """Tell which weights the network has."""

    step: int
    inputs: InputPipeline
    """The pipeline that they are evaluated with."""
    lost: list[dict[str, Any]]
    """Steps that were better, and whose checkpoints cannot be used, each with the reason."""


def _weights(state: TrainState) -> Checkpoint:
    """Copy the weights that training ended with, and their averages."""
    own = {n: t.clone() for n, t in state.network.state_dict().items() if n not in state.setup.unchanging_keys}
    averages = {} if state.ema is None else {n: t.clone() for n, t in state.ema.averages.items()}
    return Checkpoint(0, {"model": own, "ema": averages}, {})


def _take_chosen_weights(state: TrainState, loop: LoopState, folder: RunFolder) -> _Chosen:
    """Load the weights of the chosen step; where they are lost those of the next best, or else leave the last ones."""
    say = partial(state.codes_cache.console.say, style="bold red")
    lost: list[dict[str, Any]] = []
    steps = [] if loop.chosen_step is None else [loop.chosen_step, *(step for step, _ in loop.best)]
    chosen = _Chosen(loop.step, state.inputs, lost)
    for step in dict.fromkeys(steps):
        if step == loop.step:
            break
        try:
            chosen = _Chosen(step, _take_weights_of(step, state, loop, folder), lost)
            break
        except CheckpointError as error:
            lost.append({"step": step, "why": str(error)})
            say(f"WARNING: the weights of step {step} are lost: {error}")
    if lost:
        say(f"WARNING: step {lost[0]['step']} was chosen, and is lost: step {chosen.step} is exported in its place")
    return chosen


def _take_weights_of(step: int, state: TrainState, loop: LoopState, folder: RunFolder) -> InputPipeline:
    """Load the weights of an earlier step; return the pipeline that they are evaluated with."""
    setup, processes = state.setup, state.processes
    # By its step, and not by what BEST points to: that is for people, and may be older than the loop state.
    checkpoint = load_on_all(checkpoint_folder(folder.checkpoints, step), setup.trained, processes, loop.run_id)
    restore_weights(checkpoint, state.network, state.ema, setup.unchanging_keys)
    if step > state.stage.start_step:
        return state.inputs
    # Of another stage, whose frozen part was another: the codes of this one are not of these weights.
    return ImagePipeline(
        pipeline_spec(setup, processes.device),
        processes,
        state.network,
        state.codes_cache.images,
        state.teacher_targets,
        num_seen=0,
    )


def _export(network: Classifier, state: TrainState, folder: RunFolder, rules: DecisionRules) -> str:
    setup = state.setup
    with naming_disk_errors(folder.model), merged(network):
        # A run that was complete is not until it is so again.
        folder.result.unlink(missing_ok=True)
        flush(folder.path)
        return export_model(
            network,
            folder.model,
            head=setup.recipe.head,
            classes=setup.data.classes,
            spec=setup.spec,
            fitted=fitted(setup),
            rules=rules,
            views=setup.view_names,
        )


def _choice(state: TrainState, loop: LoopState) -> dict[str, Any] | None:
    """Return what chose the weights, and over how many groups its standard errors are."""
    choice, validation = loop.choice(state.evaluation), state.setup.data.validation
    groups = None if validation is None else num_error_groups(validation.groups_N)
    return choice if choice is None or groups is None else {**choice, "standard_error_by": {"groups": groups}}


def _stopped_early(state: TrainState, loop: LoopState) -> dict[str, Any] | None:
    """Return where patience ended the run, and at what share of the peak learning rate; None: it made all its steps."""
    if loop.step >= state.due.last_step:
        return None
    factor = state.stage.lr_factor(loop.step - 1)
    steps = {"step": loop.step, "of_steps": state.due.last_step, "best_step": loop.best_step}
    return {**steps, "patience": state.due.patience, "lr_factor": round(factor, 6)}


def _own(state: TrainState, loop: LoopState, chosen: _Chosen, *, best: Figures, last: Figures) -> dict[str, Any]:
    """Return what `result.json` tells of training alone."""
    setup, order = state.setup, state.setup.order
    brief = {name: {"step": figures["step"], **scalars(figures)} for name, figures in (("best", best), ("last", last))}
    has_codes = any(loop.keeps_codes.values()) or state.teacher_targets is not None
    return {
        "weights": "last" if setup.data.validation is None or (chosen.lost and last is best) else "best",
        **({"lost_weights": chosen.lost} if chosen.lost else {}),
        "choice": _choice(state, loop),
        **({} if state.due.patience is None else {"stopped_early": _stopped_early(state, loop)}),
        **brief,
        "epochs": round(loop.step / order.steps_per_epoch, 4),
        "steps": loop.step,
        "images_seen": order.images_seen(loop.step),
        "steps_left_out": loop.skipped_steps,
        "codes": state.codes_cache.stats() if has_codes else None,
        "trainable_params": setup.trainable_params,
        "total_params": setup.total_params,
    }
