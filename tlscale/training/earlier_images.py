"""Find images that a run scores among those of an earlier run, which it starts or learns from.

Promise: a cross-validation never scores images that its start was fitted to; other runs say so of theirs, and all say
how many of them chose the step or the settings of the start. Images are compared by place and by content, so that
neither a copy under another name nor another image under the same one goes unnoticed.

Shape letters: N images of a split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tlscale.codes.probes.ranking import Bools
from tlscale.data.identity import used_identity
from tlscale.data.sources.folds import FOLDS
from tlscale.data.sources.labelled import are_shared, own_images
from tlscale.data.sources.open import BadImages, ImageData, ImageSplit, open_data
from tlscale.errors import DataError, RecipeError, Stopped, TlscaleError, first_line, option
from tlscale.recipe.load import load_stored_recipe
from tlscale.recipe.schema import Recipe
from tlscale.storage.run_folder import RunFolder
from tlscale.training.earlier_counts import EarlierImages
from tlscale.training.fold_parts import fold_of
from tlscale.training.run_files import read_result, read_run_info
from tlscale.training.setup import RunSetup

_LOCAL = "local-dir:"
_LEVELS = 3  # from a file of a checkpoint to its run
_REMEDY = "Start from weights that were fitted to other images; or take evaluate.folds out, and score a test split"


def compare_with_earlier(
    setup: RunSetup, *, is_new: bool = True, reads_images: bool = True, is_whole: bool = True
) -> None:
    """Refuse, or note, scored images that the start, or the teacher, was fitted to; note those that chose it.

    Args:
        is_new: the run begins now; one that began before goes on.
        reads_images: else only contents that are known are compared, and names.
        is_whole: of a cross-validation all images of the folds are scored; else those of this fold.

    Raises:
        RecipeError: images of folds were fitted, or that cannot be told.
    """
    recipe, data = setup.recipe, setup.data
    scored: dict[str, list[ImageSplit]]
    if recipe.evaluate.folds is None or not is_whole:
        scored = {split.name: [split] for split in (data.test or data.validation,) if split is not None}
    else:
        held = [] if setup.part is None else [data.test]
        pooled = [split for split in (data.train, data.validation, *held) if split is not None]
        scored = {FOLDS: pooled}
        if setup.part is None and data.test is not None:
            scored["test"] = [data.test]
    found = []
    for key, folder in _earlier_runs(recipe):
        earlier = _Earlier.of(folder)
        for name, splits in scored.items():
            one = earlier.count(key, name, splits, reads_images=reads_images)
            if name == FOLDS and is_new:
                _refuse_fitted(one, folder)
            found.append(one)
    setup.earlier = tuple(found)
    setup.data = replace(data, notes=(*data.notes, *(note for one in found for note in one.notes())))


def count_earlier(recipe: Recipe, scored: ImageSplit, name: str) -> list[EarlierImages]:
    """Count images, called `name`, that a finished run's model is scored on by the runs that it came from."""
    runs = _earlier_runs(recipe)
    return [_Earlier.of(folder).count(key, name, [scored], reads_images=True) for key, folder in runs]


def refuse_replacing_start(recipe: Recipe, folder: RunFolder) -> None:
    """Refuse to replace a run by one that starts or learns from it.

    Raises:
        RecipeError: that is so.
    """
    for key, path in _earlier_runs(recipe):
        run = _run_of(path)
        if run is not None and run.path.resolve().is_relative_to(folder.path.resolve()):
            remedy = "Write this run elsewhere: " + option("out", "DIR")
            raise RecipeError(f"'{path}' is the run that would be replaced", key=key, remedy=remedy)


def _refuse_fitted(found: EarlierImages, folder: Path) -> None:
    if found.num_fitted:
        problem = f"'{folder}' was fitted to {found.num_fitted:,} of {found.num_images:,} images of the folds"
        raise RecipeError(f"{problem}, so that their score would be too good", key=found.key, remedy=_REMEDY)
    if found.problems:
        problem = f"whether '{folder}' was fitted to images of these folds cannot be told: {found.problems[0]}"
        raise RecipeError(f"{problem}; if it was, their score says nothing", key=found.key, remedy=_REMEDY)


def _earlier_runs(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    """Yield the runs that a recipe takes weights of, also by the name of a file or a folder in them, with the key."""
    distill = recipe.distill
    if distill is not None and distill.run is not None:
        yield "distill.run", Path(distill.run)
    for key, section in (
        ("backbone", recipe.backbone),
        ("distill.teacher", None if distill is None else distill.teacher),
    ):
        if section is None:
            continue
        if section.from_run:
            yield f"{key}.weights", Path(section.run)
        elif section.from_file and _run_of(Path(section.weights)) is not None:
            yield f"{key}.weights", Path(section.weights)
        elif section.name.startswith(_LOCAL) and _run_of(Path(section.name.removeprefix(_LOCAL))) is not None:
            yield f"{key}.name", Path(section.name.removeprefix(_LOCAL))


def _run_of(path: Path) -> RunFolder | None:
    """Return the run that a file or folder is in, its own folder included; None where it is in none."""
    path = path.expanduser().absolute()
    above = (path, *list(path.parents)[:_LEVELS])
    return next((RunFolder(place) for place in above if RunFolder(place).run_json.is_file()), None)


@dataclass
class _Earlier:
    """Hold the images that had a part in a run, and in those that it started or learned from."""

    fitted: list[ImageSplit] = field(default_factory=list)
    chose: list[ImageSplit] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Why there may be more of them."""
    remarks: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, path: Path) -> _Earlier:
        """Find them."""
        earlier = cls()
        earlier._add(path)
        return earlier

    def _add(self, path: Path, later: tuple[Path, ...] = ()) -> None:
        """Add those of a run; `later` are the runs that started or learned from it."""
        try:
            folder = _run_of(path)
            if folder is not None and folder.path.resolve() in later:
                raise DataError(f"'{folder.path}' starts from itself: the run that was there before is gone")
            run_info = None if folder is None else read_run_info(folder)
            if folder is None or run_info is None:
                raise DataError(f"'{path}' is no run folder, but a model alone")
            recipe = load_stored_recipe(folder.recipe).recipe
            self._add_own(folder, recipe, run_info)
        except Stopped:
            raise
        except TlscaleError as error:
            self.problems.append(first_line(error))
            return
        for _, before in _earlier_runs(recipe):
            self._add(before, (*later, folder.path.resolve()))

    def _add_own(self, folder: RunFolder, recipe: Recipe, run_info: Mapping[str, Any]) -> None:
        """Add the images of a run alone.

        Raises:
            TlscaleError: they are not known, or not there.
        """
        then = run_info["data"]
        section = recipe.data.model_copy(update={"classes": then.get("classes")})
        bad_images = BadImages.from_plain(run_info.get("bad_images", {}))
        data = open_data(section, recipe.seed, fold=fold_of(recipe, run_info), bad_images=bad_images)
        if then.get("labels_sha256") != data.identity["labels_sha256"]:
            raise DataError("its data are not those that it was fitted to")
        if "used_sha256" not in then:
            self.remarks.append("an older tlscale made it and noted no contents: its images are taken as they are now")
        elif _are_others(data, then):
            self.problems.append("some of its images are not those that it was fitted to")
        probe = (read_result(folder) or {}).get("probe") or {}
        refitted = bool(probe.get("refitted", recipe.probe is not None))
        self.fitted += own_images(data, refitted=refitted)
        if data.validation is not None and not refitted:
            self.chose.append(data.validation)

    def count(self, key: str, name: str, scored: Sequence[ImageSplit], *, reads_images: bool) -> EarlierImages:
        """Count the scored images that are among them, by place or content."""
        problems = list(self.problems)
        num_fitted = num_chose = 0
        for split in scored:
            fitted_N, chose_N = (
                _seen(split, those, problems, reads_images=reads_images) for those in (self.fitted, self.chose)
            )
            num_fitted += int(fitted_N.sum())
            num_chose += int((chose_N & ~fitted_N).sum())
        num_images = sum(map(len, scored))
        why, remarks = tuple(dict.fromkeys(problems)), tuple(dict.fromkeys(self.remarks))
        return EarlierImages(key, name, num_images, num_fitted, num_chose, why, remarks)


def _are_others(data: ImageData, then: Mapping[str, Any]) -> bool:
    """Report whether images of a run were replaced since: by name and size, or by content where that is known."""
    now = used_identity(data, "place" if then["used_by"] == "place" else None)
    return now.by == then["used_by"] and bool(now.sha256 != then["used_sha256"])


def _seen(split: ImageSplit, those: Sequence[ImageSplit], problems: list[str], *, reads_images: bool) -> Bools:
    """Tell which images are at a place, of a file or in one, where one of those is, or are equal to one."""
    places = {other.where(i) for other in those for i in range(len(other))}
    seen_N = np.array([split.where(i) in places for i in range(len(split))], dtype=bool)
    try:
        for other in those:
            seen_N |= are_shared(split, other, reads=reads_images)
    except Stopped:
        raise
    except TlscaleError as error:
        problems.append(f"compared by name alone: {first_line(error)}")
    return seen_N
