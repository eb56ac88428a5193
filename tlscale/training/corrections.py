"""List corrections: what an earlier version did wrongly, and which unfinished runs must not be resumed for it.

Promise: a run that began before a correction, and that would be another training from here on because of it, is refused
on `--resume` with the correction's name. `run.json` lists under `corrections` the names of those in force when the run
began; runs of versions that knew of none have no such key. A run that has made no step yet begins anew with all of
them.

To add one, write one more entry of `CORRECTIONS`:

    Correction("its-name", "what was wrong, and what is right now", lambda past: past.recipe.drop_last),

The predicate is asked for unfinished training runs that lack the name, have a checkpoint and have passed all other
checks of `--resume`; it says whether this run would be computed in another way than it began. Names are for ever.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tlscale.data.formats.few_bits import was_scaled
from tlscale.data.input_spec import sampled_rows, sampled_sizes
from tlscale.errors import ResumeError, flag, option
from tlscale.models.backbone import layer_depths
from tlscale.models.partition.partition import NoPartition, find_partition
from tlscale.models.partition.self_check import OF_BATCH_SIZE, OF_CALLS
from tlscale.recipe.schema import Recipe
from tlscale.storage.files import naming_disk_errors, write_json
from tlscale.storage.run_folder import RunFolder
from tlscale.training.checkpoint.files import list_checkpoints
from tlscale.training.setup import RunSetup
from tlscale.training.stages import apply_freezing


@dataclass(frozen=True)
class Past:
    """Hold an unfinished run that is to be resumed.

    `clock` is of its newest checkpoint, as `LoopState` is saved: `step`, `best`, `keeps_codes` (stage -> whether it
    trains on codes) and so on; a key may be missing in one of an older version.
    """

    setup: RunSetup
    run_info: dict[str, Any]  # its `run.json`
    clock: dict[str, Any]

    @property
    def recipe(self) -> Recipe:
        return self.setup.recipe


@dataclass(frozen=True)
class Correction:
    """Describe one correction."""

    name: str  # as `run.json` has it
    text: str  # what was wrong and what is right now, for the message
    applies: Callable[[Past], bool]  # whether a run that began without it would be resumed as another training


def _is_weighted(past: Past) -> bool:
    return past.recipe.loss.class_weights != "none"


def _is_smoothed(past: Past) -> bool:
    return past.recipe.loss.label_smoothing > 0


def _loss_chooses(past: Past) -> bool:
    chooses = past.recipe.evaluate.select == "loss" and past.setup.data.validation is not None
    return chooses and (_is_weighted(past) or _is_smoothed(past))


def _saw_fresh_views(past: Past) -> bool:
    """Return whether a stage that is not over trains on images, and its epochs come to a view that is seen again."""
    setup = past.setup
    if not setup.augment or setup.teacher is not None:
        return False
    for stage in setup.stages:
        views, decided = setup.image_views(stage), past.clock.get("keeps_codes", {}).get(str(stage.number))
        is_ahead, last_epoch = stage.stop_step > past.clock["step"], setup.order.epoch(stage.stop_step - 1)
        if views is not None and decided is False and is_ahead and last_epoch >= views:
            return True
    return False


def _was_a_layer_too_deep(past: Past) -> bool:
    """Return whether timm counts a part of the backbone to the classifier's layer, and a stage ahead decays by it."""
    ahead = [stage for stage in past.setup.stages if stage.stop_step > past.clock["step"]]
    if all(stage.optim.layer_decay in (None, 1.0) for stage in ahead):
        return False
    return min(layer_depths(past.setup.classifier.backbone)[0].values()) != 1


def _is_split_no_more(past: Past) -> bool:
    """Return whether a stage ahead trains on codes of a network that counts calls, or computes with the batch size."""
    setup, decided = past.setup, past.clock.get("keeps_codes", {})
    spec, generator = setup.spec, torch.Generator().manual_seed(0)
    images_BCHW = torch.randn(4, *spec.shape_CHW, generator=generator).to(setup.dtype)
    for stage in setup.stages:
        if stage.stop_step <= past.clock["step"] or not decided.get(str(stage.number)):
            continue
        apply_freezing(setup.classifier, stage)
        try:
            find_partition(setup.classifier, images_BCHW)
        except NoPartition as refused:
            if refused.kind in (OF_BATCH_SIZE, OF_CALLS):
                return True
        finally:
            apply_freezing(setup.classifier, setup.stages[0])
    return False


def _was_shown_otherwise(past: Past) -> bool:
    """Return whether a teacher was shown images, not all of which are square, by a crop mode of its own."""
    teacher, recorded, data = past.setup.teacher, past.run_info.get("teacher"), past.setup.data
    if teacher is None or recorded is None or recorded["input"]["crop_mode"] == teacher.spec.crop_mode:
        return False
    return any(height != width for height, width in sampled_sizes(data.train.table, teacher.spec.reading))


def _was_scaled_by_pillow(past: Past) -> bool:
    """Return whether grey of 2 or 4 bits, of which a sample of images has some, is read with a range."""
    table, value_range = past.setup.data.train.table, past.setup.spec.range
    return value_range is not None and any(was_scaled(table.read(row), value_range) for row in sampled_rows(table))


CORRECTIONS: tuple[Correction, ...] = (
    Correction(
        "weights-beside-smoothing",
        "loss.class_weights with loss.label_smoothing weighed every class of the smoothed target by its own weight, "
        "so that a rare class was the answer for everything; an image has the weight of its own label now",
        lambda past: _is_weighted(past) and _is_smoothed(past),
    ),
    Correction(
        "plain-validation-loss",
        "the validation loss, by which evaluate.select: loss chooses the weights, had class weights and smoothing in "
        "it; it is plain cross-entropy now, and figures of both kinds cannot be ranked together",
        _loss_chooses,
    ),
    Correction(
        "same-views-without-codes",
        "codes.views had no effect where there was no room for codes, and each epoch saw new augmented images; it sees "
        "the same codes.views of them either way now",
        _saw_fresh_views,
    ),
    Correction(
        "layer-decay-of-timm",
        "optim.layer_decay counted one layer too many in backbones whose last norm timm counts to the classifier's "
        "layer (ConvNeXt, EVA, BEiT, MobileNetV3, others), so that all of them learned too slowly; it counts as timm "
        "does now",
        _was_a_layer_too_deep,
    ),
    Correction(
        "no-codes-of-what-counts",
        "a network that counts its calls, or whose frozen part computes with the size of the batch, was trained on "
        "codes, which are not what it would compute in training; such a one is trained on images now",
        _is_split_no_more,
    ),
    Correction(
        "teacher-with-the-students-crop",
        "a teacher that was pretrained with another crop mode than the student has was shown another part of images "
        "that are not square; it is shown the student's part now",
        _was_shown_otherwise,
    ),
    Correction(
        "few-bits-as-stored",
        "grey of 2 and 4 bits was scaled to 0..255 before data.range was applied, so that all but black was white; it "
        "is read as it is stored now",
        _was_scaled_by_pillow,
    ),
)


def names() -> list[str]:
    """Return the names of all corrections, for `run.json` of a run that begins."""
    return [correction.name for correction in CORRECTIONS]


def refuse_uncorrected(folder: RunFolder, setup: RunSetup, run_info: dict[str, Any]) -> dict[str, Any]:
    """Let a run be resumed only where no correction makes it another training.

    Returns:
        What `run.json` holds from now on.

    Raises:
        ResumeError: naming the corrections.
    """
    if set(names()) <= set(run_info.get("corrections", [])):
        return run_info  # none can apply, so no checkpoint need be opened for it
    clock = _newest_clock(folder)
    if clock is None or not clock["step"]:
        run_info = {**run_info, "corrections": names()}
        with naming_disk_errors(folder.run_json):
            write_json(folder.run_json, run_info)
        return run_info
    past, known = Past(setup, run_info, clock), run_info.get("corrections", [])
    found = [correction for correction in CORRECTIONS if correction.name not in known and correction.applies(past)]
    if found:
        lines = "\n  ".join(f"{correction.name}: {correction.text}" for correction in found)
        raise ResumeError(
            f"'{folder.path}' cannot be resumed: it began with a version of tlscale in which something was wrong, and "
            f"would be another training from step {clock['step']} on:\n  {lines}",
            remedy="Finish it with the version that it began with, or begin it again: "
            + flag("overwrite")
            + ", or "
            + option("out", "DIR"),
        )
    return run_info


def _newest_clock(folder: RunFolder) -> dict[str, Any] | None:
    """Return the clock of the newest checkpoint that has one; whether that is valid is found when it is loaded."""
    for checkpoint in reversed(list_checkpoints(folder.checkpoints)):
        try:
            return dict(json.loads((checkpoint / "state.json").read_text())["clock"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None
