"""Find images that a run scores among those that an earlier run, which it starts or learns from, was fitted to.

Promise: a cross-validation never scores images that its start was fitted to; other runs say so of theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tlscale.data.sources.labelled import count_shared, own_images
from tlscale.data.sources.open import BadImages, ImageSplit, open_data
from tlscale.errors import DataError, RecipeError, Stopped, TlscaleError, first_line, option
from tlscale.recipe.load import load_stored_recipe
from tlscale.recipe.schema import Recipe
from tlscale.storage.run_folder import RunFolder
from tlscale.training.fold_parts import fold_of
from tlscale.training.run_files import read_result, read_run_info
from tlscale.training.setup import RunSetup

_LOCAL = "local-dir:"
_LEVELS = 3  # from a file of a checkpoint to its run
_REMEDY = "Start from weights that were fitted to other images; or take evaluate.folds out, and score a test split"


def compare_with_earlier(setup: RunSetup, *, is_new: bool = True, reads_images: bool = True) -> None:
    """Refuse, or note, scored images that the start, or the teacher, was fitted to.

    Of a cross-validation once, with all its images.

    Args:
        is_new: the run begins now; one that began before goes on.
        reads_images: compare those of a cross-validation by content, where names tell of none.

    Raises:
        RecipeError: of images of folds that is so, or cannot be told.
    """
    recipe, data = setup.recipe, setup.data
    if recipe.evaluate.folds is not None and is_new:
        held = [data.test] if setup.part is not None else []
        for key, folder in _earlier_runs(recipe):
            for split in (data.train, data.validation, *held):
                _refuse_seen(key, folder, split, reads_images=reads_images)
    scored = data.test or data.validation
    if scored is not None and setup.part is None:
        notes = [note for key, folder in _earlier_runs(recipe) if (note := _note_on_seen(key, folder, scored))]
        setup.data = replace(data, notes=(*data.notes, *notes))


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


def _refuse_seen(key: str, folder: Path, split: ImageSplit | None, *, reads_images: bool) -> None:
    if split is None:
        return
    try:
        seen = list(_fitted_images(folder))
        count = _count_named(split, seen)
        if not count and reads_images:
            count = max(count_shared(split, one) for one in seen)
    except Stopped:
        raise
    except TlscaleError as error:
        problem = f"whether '{folder}' was fitted to images of these folds cannot be told: {first_line(error)}"
        raise RecipeError(f"{problem}; if it was, their score says nothing", key=key, remedy=_REMEDY) from error
    if count:
        problem = f"'{folder}' was fitted to {count:,} of {len(split):,} images of the folds"
        raise RecipeError(f"{problem}, so that their score would be too good", key=key, remedy=_REMEDY)


def _note_on_seen(key: str, folder: Path, scored: ImageSplit) -> str | None:
    try:
        count = _count_named(scored, list(_fitted_images(folder)))
    except Stopped:
        raise
    except TlscaleError as error:
        return f"{key}: whether it was fitted to images of {scored.name} cannot be told: {first_line(error)}"
    if not count:
        return None
    what = f"LEAK: {count:,} of {len(scored):,} images of {scored.name} are among those that the run of {key}"
    return f"{what} was fitted to: figures on {scored.name} are too good"


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


def _fitted_images(path: Path, later: tuple[Path, ...] = ()) -> Iterator[ImageSplit]:
    """Yield the images that a run was fitted to, and those of the runs that it started or learned from.

    `later` are the runs that started or learned from it.

    Raises:
        TlscaleError: they are not known, or not there.
    """
    folder = _run_of(path)
    if folder is not None and folder.path.resolve() in later:
        raise DataError(f"'{folder.path}' starts from itself: the run that was there before is gone")
    run_info = None if folder is None else read_run_info(folder)
    if folder is None or run_info is None:
        raise DataError(f"'{path}' is no run folder, but a model alone")
    recipe = load_stored_recipe(folder.recipe).recipe
    then = run_info["data"]
    section = recipe.data.model_copy(update={"classes": then.get("classes")})
    bad_images = BadImages.from_plain(run_info.get("bad_images", {}))
    data = open_data(section, recipe.seed, fold=fold_of(recipe, run_info), bad_images=bad_images)
    if then.get("labels_sha256") != data.identity["labels_sha256"]:
        raise DataError("its data are not those that it was fitted to")
    refitted = ((read_result(folder) or {}).get("probe") or {}).get("refitted", recipe.probe is not None)
    yield from own_images(data, refitted=bool(refitted))
    for _, earlier in _earlier_runs(recipe):
        yield from _fitted_images(earlier, (*later, folder.path.resolve()))


def _count_named(scored: ImageSplit, seen: Sequence[ImageSplit]) -> int:
    """Count the scored images that are at a place, of a file or in one, where there is one that was seen."""
    places = {split.where(i) for split in seen for i in range(len(split))}
    return sum(scored.where(i) in places for i in range(len(scored)))
