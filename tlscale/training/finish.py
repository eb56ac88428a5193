"""Finish a training run: evaluate the last and the chosen weights, export the chosen ones, write `result.json`."""

from __future__ import annotations

from typing import Any

from tlscale.data.identity import result_identity
from tlscale.data.sources.open import ImageSplit
from tlscale.models.export import export_model
from tlscale.storage.files import naming_disk_errors
from tlscale.storage.run_folder import RunFolder
from tlscale.training.checkpoint.files import checkpoint_folder
from tlscale.training.checkpoint.run_state import restore_weights
from tlscale.training.checkpoint.sharded import load_on_all
from tlscale.training.evaluate import scalars
from tlscale.training.input_pipeline import ImagePipeline, InputPipeline
from tlscale.training.logger import RunLogger
from tlscale.training.loop_state import LoopState
from tlscale.training.predictions import Predictions, write_predictions
from tlscale.training.result import about_score, fitted, make_result, write_result
from tlscale.training.specs import pipeline_spec
from tlscale.training.state import TrainState, unwrap

Figures = dict[str, Any]


def finish(
    state: TrainState, loop: LoopState, logger: RunLogger, folder: RunFolder, run_info: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """Score the last and the chosen weights on the split that chose nothing; export the chosen ones, as for `train`."""
    setup, processes = state.setup, state.processes
    split = setup.data.test or setup.data.validation
    assert split is not None, "set_up refuses data that nothing can be evaluated on"
    last, predictions = _score(state, state.inputs, split, loop.step)
    best = last
    if loop.chosen_step is not None and loop.chosen_step != loop.step:
        inputs = _take_chosen_weights(state, loop, folder)
        best, predictions = _score(state, inputs, split, loop.chosen_step)
    unwrap(state)  # the exported model has to give its logits without what mixed precision does to them
    with state.averaged():
        state.network = processes.engine.gather(state.network, keep=processes.is_main)
        how_to_load = processes.run_on_main(_export, state, folder)
    # Before the result, which says that all is there.
    write_predictions(folder.predictions, predictions, processes)
    result = _result(state, loop, split, best=best, last=last)
    result["changes"] = run_info["changes"]  # of how it was computed, from start to start
    result |= processes.run_on_main(result_identity, setup.data)
    result = processes.run_on_main(write_result, result, folder, setup.watch)
    logger.write_summary(result)
    return result, how_to_load


def _score(state: TrainState, inputs: InputPipeline, split: ImageSplit, step: int) -> tuple[Figures, Predictions]:
    predictions = Predictions(split, state.setup.data.classes)
    with state.setup.watch("test"):
        return {"step": step, **state.evaluate(split, inputs, predictions=predictions)}, predictions


def _take_chosen_weights(state: TrainState, loop: LoopState, folder: RunFolder) -> InputPipeline:
    """Load the weights of the chosen step; return the pipeline that they are evaluated with."""
    setup, processes = state.setup, state.processes
    assert loop.chosen_step is not None
    # By its step, and not by what BEST points to: that is for people, and may be older than the loop state.
    chosen = checkpoint_folder(folder.checkpoints, loop.chosen_step)
    checkpoint = load_on_all(chosen, setup.trained, processes, loop.run_id)
    restore_weights(checkpoint, state.network, state.ema, setup.unchanging_keys)
    if loop.chosen_step > state.stage.start_step:
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


def _export(state: TrainState, folder: RunFolder) -> str:
    setup = state.setup
    with naming_disk_errors(folder.model):
        return export_model(
            state.network,
            folder.model,
            head=setup.recipe.head,
            classes=setup.data.classes,
            spec=setup.spec,
            fitted=fitted(setup),
        )


def _result(state: TrainState, loop: LoopState, split: ImageSplit, *, best: Figures, last: Figures) -> dict[str, Any]:
    """Return the final figures; those at the top are of the exported weights."""
    setup, order = state.setup, state.setup.order
    brief = {name: {"step": figures["step"], **scalars(figures)} for name, figures in (("best", best), ("last", last))}
    has_codes = any(loop.keeps_codes.values()) or state.teacher_targets is not None
    # One evaluation, in the end, chooses nothing.
    score = about_score(setup, split, has_chosen=(state.due.evaluate_every or 0) < setup.total_steps)
    own = {
        "weights": "best" if setup.data.validation is not None else "last",
        "choice": loop.choice(state.evaluation),
        **brief,
        "epochs": round(loop.step / order.steps_per_epoch, 4),
        "steps": loop.step,
        "images_seen": order.images_seen(loop.step),
        "steps_left_out": loop.skipped_steps,
        "codes": state.codes_cache.stats() if has_codes else None,
        "trainable_params": setup.trainable_params,
        "total_params": setup.total_params,
    }
    return make_result(setup, split, best, score, own)
