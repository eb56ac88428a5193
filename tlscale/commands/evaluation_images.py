"""Find the images that an evaluation scores, and what part they had in the model.

Promise: images that were fitted, or chose something, are never scored as if they had not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tlscale.data.decode import Reading
from tlscale.data.sources.bad_images import find_bad_images
from tlscale.data.sources.folds import ABOUT_FOLDS, FOLDS
from tlscale.data.sources.labelled import are_shared, open_labelled, own_images
from tlscale.data.sources.open import BadImages, ImageData, ImageSplit, open_data
from tlscale.data.sources.tables import Role
from tlscale.distributed.processes import Processes
from tlscale.errors import DataError, option
from tlscale.models.export import TrainedModel
from tlscale.recipe.schema import DataSection, Recipe
from tlscale.storage.files import text_sha256
from tlscale.storage.run_folder import RunFolder
from tlscale.training.earlier_images import count_earlier
from tlscale.training.fold_parts import fold_of
from tlscale.training.metrics import majority
from tlscale.training.run_files import read_result, read_run_info


@dataclass(frozen=True)
class Scored:
    """Hold the images that are scored, and what is known of them."""

    split: ImageSplit
    figures: dict[str, Any]
    """Go before the figures: which split, of which data (`own`: the run's), what part the images had in the model."""
    majority_label: str | None
    """The most frequent class of the run's training images; None where that is not known, or of several labels."""
    notes: list[str] = field(default_factory=list)

    def majority(self, classes: Sequence[str]) -> dict[str, Any] | None:
        """Score always saying the most frequent class, as `result.json` does."""
        if self.majority_label is None:
            return None
        share = float((self.split.labels_N == classes.index(self.majority_label)).mean())
        return {"label": self.majority_label, "top1": share}


@dataclass(frozen=True)
class FinishedRun:
    """Read a run folder, and the model in it."""

    folder: Path
    recipe: Recipe
    trained: TrainedModel

    @property
    def run_info(self) -> dict[str, Any]:
        """Return its `run.json`; empty where there is none."""
        return read_run_info(RunFolder(self.folder)) or {}

    @property
    def result(self) -> dict[str, Any]:
        """Return its `result.json`; empty where there is none."""
        return read_result(RunFolder(self.folder)) or {}

    @property
    def _data(self) -> dict[str, Any]:
        return self.run_info.get("data") or {}

    def open_data(self, split: Role | None = None) -> ImageData:
        """Open the data that it was trained on, as far as they are there.

        Args:
            split: that is wanted; None: the test split, if there is one. Nothing is left out of that, so that no image
                of the others is read only to compare it.
        """
        # The model's classes are the truth: a class list that other data would give may be in another order.
        section = self.recipe.data.model_copy(update={"classes": list(self.trained.classes)})
        skipped = self.run_info.get("bad_images")
        bad_images = None if skipped is None else BadImages.from_plain(skipped)
        fold = fold_of(self.recipe, self.run_info)
        if section.duplicates != "warn" and split in (None, "test") and self._knows_test:
            unread = section.model_copy(update={"duplicates": "warn", "groups_across_splits": "allow"})
            data = open_data(unread, self.recipe.seed, fold=fold, bad_images=bad_images)
            if data.test is not None:
                return data
        return open_data(section, self.recipe.seed, fold=fold, bad_images=bad_images)

    @property
    def _knows_test(self) -> bool:
        """Report whether the test split is the source's, and not a fold, and the run noted its labels."""
        return bool(self._data.get("tables_sha256")) and self.run_info.get("fold") is None

    def has_trained_on(self, data: ImageData, split: Role = "train") -> bool:
        """Compare the labels, row by row, with those that the run began with; True where it did not note them.

        What was trained on and held out counts, but where the test split is what is wanted of the data.
        """
        keys = ("tables_sha256", "labels_sha256") if split == "test" and self._knows_test else ("labels_sha256",)
        key = next((key for key in keys if self._data.get(key)), None)
        return key is None or self._data[key] == data.identity.get(key)

    @property
    def refitted(self) -> bool:
        """Report whether the exported classifier was fitted on training and validation images together."""
        noted = (self.result.get("probe") or {}).get("refitted")
        return bool(noted) if noted is not None else self.recipe.probe is not None and self.recipe.probe.refit

    def majority_label(self, data: ImageData | None) -> str | None:
        """Return the most frequent class of its training images: as it noted, else from its data."""
        if self.trained.thresholds is not None:
            return None  # of several labels none stands for an image
        noted = (self.result.get("majority") or {}).get("label")
        if noted in self.trained.classes:
            return str(noted)
        if data is None or not self.has_trained_on(data):
            return None
        return str(majority(data.train.labels_N, data.train.labels_N, self.trained.classes)["label"])


def own_split(run: FinishedRun, name: Role | None) -> Scored:
    """Choose a split of the run's own data, by default its test split, else its validation split.

    Raises:
        DataError: there is no such split, or the model was fitted on it.
    """
    data, folder, section = run.open_data(name), run.folder, run.recipe.data
    splits = {split.name: split for split in (data.test, data.validation, data.train) if split is not None}
    is_given, name = name is not None, name or next(iter(splits))
    if name == "train" and not is_given:
        raise DataError(
            f"'{folder}': {ABOUT_FOLDS}, so its own data have no image left to score it on",
            remedy="Score it on other images ("
            + option("data", "DATA")
            + "); the score of its folds is in result.json",
        )
    if name not in splits:
        remedy = f"Name one of: {', '.join(splits)}"
        raise DataError(f"the data of '{folder}' have no split '{name}'", key=option("split"), remedy=remedy)
    if name == "validation" and run.refitted:
        raise DataError(
            f"'{folder}': its probe was fitted once more on training and validation images together "
            "(probe.refit), so its own data have no image left to score it on",
            remedy="Score it on other images ("
            + option("data", "DATA")
            + "), or run it again with a test split or with probe.refit=false",
        )
    figures: dict[str, Any] = {"split": name, "source": section.source, "data": data_name(section), "own": True}
    notes = []
    if not run.has_trained_on(data, name):
        changed = f"the data of '{folder}' are not those that it was trained on"
        if name != "test":
            raise DataError(
                f"{changed}, so its {name} images are not known",
                remedy="Bring the data back, or give " + option("data", "DATA"),
            )
        notes.append(f"{changed}: the test images may be others as well")
    if name == "validation":
        figures["selected_on"] = "validation"
        notes.append("these images chose the weights or the settings of the model, so the figures are too good")
    if section.on_bad_image == "skip":
        figures["num_bad_images"] = data.bad_images.counts.get(name, 0)
    if name == "train":
        figures["num_trained_on"] = len(splits[name])
        notes.append("the model was trained on these images, so the figures are too good")
    if run.trained.scored_on == FOLDS:
        notes.append(ABOUT_FOLDS)
    earlier, more = _in_earlier(run, splits[name], name)
    scored = Scored(splits[name], {**figures, **earlier}, run.majority_label(data), [*notes, *more])
    return (
        without_bad(scored, section, run.trained.input_spec.in_chans) if section.on_bad_image == "error" else scored
    )  # else the run noted them


def other_images(
    run: FinishedRun, section: DataSection, name: Role | None, named: Sequence[Role], processes: Processes
) -> Scored:
    """Find images of other data, and count those that the run was trained on.

    `name` is the split; None: the test split where there is one, else all labelled images. The user `named` splits that
    have to be there.
    """
    with processes.main_first():
        found = open_labelled(section, run.trained.classes, name=name, named=named)
    counts, label, note = processes.run_on_main(_trained_on, run, found.split)
    about = {"split": found.of, "source": section.source, "data": data_name(section), "own": False}
    earlier, more = processes.run_on_main(_in_earlier, run, found.split, found.of)
    scored = Scored(found.split, {**about, **counts, **earlier}, label, [*found.notes, note, *more])
    return without_bad(scored, section, run.trained.input_spec.in_chans)


def _trained_on(run: FinishedRun, scored: ImageSplit) -> tuple[dict[str, int | None], str | None, str]:
    """Count by content the images that the run was trained on; with its most frequent class, and a note."""
    data, refitted = None, run.refitted
    try:
        data = run.open_data("train")
        if not run.has_trained_on(data):
            raise DataError("its data are not those that it was trained on")
        fitted_N = np.any([are_shared(scored, split) for split in own_images(data, refitted=refitted)], axis=0)
        num = int(fitted_N.sum())
        chose = 0 if refitted or data.validation is None else int(are_shared(scored, data.validation).sum())
    except DataError as error:
        first = str(error).splitlines()[0]
        note = f"whether the run was trained on any of these images cannot be told: {first}"
        return {"num_trained_on": None}, run.majority_label(data), note
    note = f"the run was trained on {num:,} of these {len(scored):,} images"
    if chose:
        note += f", and {chose:,} of these chose its weights, settings or temperature"
    if num or chose:
        note += ": the figures are too good by those"
        note += "" if run.trained.calibration is None else ", and none are given with the temperature"
    counts: dict[str, int | None] = {"num_trained_on": num, **({"num_selected_on": chose} if chose else {})}
    return counts, run.majority_label(data), note


def had_a_part(figures: Mapping[str, Any]) -> bool:
    """Report whether any of the scored images chose something of the model, or was fitted."""
    return any(map(figures.get, ("selected_on", "num_selected_on", "num_trained_on")))


def _in_earlier(run: FinishedRun, scored: ImageSplit, name: str) -> tuple[dict[str, Any], list[str]]:
    """Count images that had a part in the runs that this one started or learned from; with notes."""
    found = count_earlier(run.recipe, scored, name)
    figures = {"earlier_runs": [one.to_plain() for one in found]} if found else {}
    return figures, [note for one in found for note in one.notes()]


def without_bad(scored: Scored, section: DataSection, in_chans: int) -> Scored:
    """Drop the images that cannot be read, and count them, where `data.on_bad_image` is `skip`."""
    if section.on_bad_image != "skip":
        return scored
    max_pixels, reading = round(section.max_megapixels * 1e6), Reading.of(section)
    bad = find_bad_images(scored.split, max_pixels=max_pixels, in_chans=in_chans, reading=reading)
    if len(bad) == len(scored.split):
        raise DataError(f"none of the {len(bad):,} images can be read; the first: {bad[0][1]}")
    notes = [f"skipped {len(bad):,} of {len(scored.split):,} images, which cannot be read: {bad[0][1]}"] if bad else []
    split = scored.split.without([row for row, _ in bad])
    figures = {**scored.figures, "num_bad_images": len(bad)}
    return Scored(split, figures, scored.majority_label, [*scored.notes, *notes])


def data_name(section: DataSection) -> dict[str, str]:
    """Name data without the folders above them, with a digest that tells equal names apart."""
    place = section.path or section.source
    digest = text_sha256(f"{section.source} {place} {section.config} {section.revision}")
    return {"name": Path(place).name or section.source, "id": digest[:12]}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty where there is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
