"""Tell the runs of a cross-validation apart: each of its folds, and the one on all images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from tlscale.data.sources.folds import Fold
from tlscale.models.calibration import Calibration
from tlscale.recipe.schema import EvaluateSection, Recipe
from tlscale.tracking.trackers import RunGroup
from tlscale.training.stages import Stage

LONGEST_NAME = 90
"""Of a recipe within the names of its parts: leaves room for the fold, or for an id."""


class Part(NamedTuple):
    """A run of a cross-validation."""

    fold: Fold
    share: float = 1.0
    """Of the steps of the recipe: so many are made, with the learning rates that they have in the whole."""
    thresholds: tuple[float, ...] | None = None
    """Of several labels, for the model on all images, where none is left to choose them by."""
    calibration: Calibration | None = None
    """For the model on all images, likewise; None also of a run that an older version began."""
    group: str | None = None
    """By which trackers show all runs of the cross-validation together; None of a run that an older version began."""

    @property
    def tracked_as(self) -> RunGroup | None:
        """Return what trackers show it as."""
        return None if self.group is None else RunGroup(self.group, "model" if self.fold.holds_none else "fold")

    def to_plain(self) -> dict[str, Any]:
        """Return plain values for `run.json`."""
        thresholds = {} if self.thresholds is None else {"thresholds": list(self.thresholds)}
        calibration = {} if self.calibration is None else {"calibration": self.calibration.model_dump()}
        group = {} if self.group is None else {"group": self.group}
        return {**self.fold.to_plain(), "share": self.share, **thresholds, **calibration, **group}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Part:
        """Read what `to_plain` gave."""
        thresholds, calibration = plain.get("thresholds"), plain.get("calibration")
        return cls(
            Fold.from_plain(plain),
            plain["share"],
            None if thresholds is None else tuple(thresholds),
            None if calibration is None else Calibration.model_validate(calibration),
            plain.get("group"),
        )


def group_name(recipe: Recipe, run_info: Mapping[str, Any]) -> str | None:
    """Return `Part.group` of the parts of a cross-validation, by its own `run.json`."""
    return f"{recipe.name[:LONGEST_NAME]}-{run_info['id']}" if "id" in run_info else None


def all_images(section: EvaluateSection) -> Fold | None:
    """Return the part of a cross-validation that holds no image out; None: the recipe has none."""
    return None if section.folds is None else Fold(section.folds, section.repeats, None)


def fold_of(recipe: Recipe, run_info: Mapping[str, Any]) -> Fold | None:
    """Return which part of a cross-validation a run is, by its recipe and `run.json`; None: it is none."""
    part = run_info.get("fold")
    return all_images(recipe.evaluate) if part is None else Part.from_plain(part).fold


def first_stages(stages: Sequence[Stage], share: float) -> list[Stage]:
    """Return the stages of the first steps of a run."""
    stop = max(round(share * stages[-1].stop_step), 1)
    return [replace(stage, stop_step=min(stage.stop_step, stop)) for stage in stages if stage.start_step < stop]
