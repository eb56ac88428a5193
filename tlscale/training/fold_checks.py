"""Check the parts of a cross-validation: all folds before the first begins, and each part against the whole.

Promise: what is wrong with any fold is found before anything is written or removed; the parts of a result are of the
same images under the same labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tlscale.codes.probes.select import refuse_wrong_probe
from tlscale.data.identity import scored_identity, used_identity
from tlscale.data.sampler import least_in_a_pass
from tlscale.data.sources.folds import Fold
from tlscale.data.sources.open import BadImages, ImageData, open_data
from tlscale.data.sources.tables import class_counts
from tlscale.distributed.signals import check_stop
from tlscale.errors import DataError, ResumeError, flag
from tlscale.recipe.schema import Recipe
from tlscale.storage.run_folder import RunFolder
from tlscale.training.fold_parts import Part, all_images
from tlscale.training.run_files import read_run_info
from tlscale.training.select_checks import with_note_on_select
from tlscale.training.setup import RunSetup, set_up

_REMOVE = "Remove it, and resume the whole with " + flag("resume") + "; or run all anew with " + flag("overwrite")


def open_folds(recipe: Recipe, whole: ImageData) -> Iterator[tuple[Fold, ImageData]]:
    """Open the images of each fold, without those that the whole skips.

    Raises:
        DataError: a fold cannot be drawn.
    """
    every = all_images(recipe.evaluate)
    assert every is not None, "the recipe has folds"
    for fold in every.folds:
        check_stop("drawing folds")
        yield fold, open_data(recipe.data, recipe.seed, fold=fold, bad_images=whole.bad_images)


def check_folds(whole: RunSetup, world_size: int) -> None:
    """Draw all folds, and set up those in which something else may go wrong than in the others.

    Raises:
        TlscaleError: a fold cannot be drawn, trained or chosen by.
    """
    recipe = whole.recipe
    _refuse_limit(whole)
    for fold, data in open_folds(recipe, whole.data):
        _refuse_absent(whole.data, data)
        with_note_on_select(recipe, data)  # the note is of the fold's own run
        if recipe.probe is not None:
            refuse_wrong_probe(recipe.probe, recipe.codes, len(data.train), len(data.validation or ()))
        order = replace(whole.order, num_images=len(data.train), draw=None)
        is_odd = bool(whole.stages) and least_in_a_pass(order, whole.split, whole.total_steps) == 1
        if fold.number == 1 or is_odd:
            set_up(recipe, world_size=world_size, part=Part(fold), bad_images=whole.bad_images, is_new=True)


def _refuse_limit(whole: RunSetup) -> None:
    """Refuse a limit of train where a given validation split is pooled with it, which it does not limit."""
    limit, count = whole.recipe.data.train_limit, len(whole.data.train)
    if limit is not None and count > limit:
        raise DataError(
            f"{limit:,} limits the train split alone, and with evaluate.folds {count - limit:,} images of the given "
            "validation split come on top",
            key="data.train_limit",
            remedy="Take it out, or the validation split out of the data",
        )


def _refuse_absent(whole: ImageData, data: ImageData) -> None:
    """Refuse a fold that holds all images of a class: few groups of several classes may leave no better one."""
    counts_C, all_C = (class_counts(one.train.labels_N, len(whole.classes)) for one in (data, whole))
    absent = np.flatnonzero((counts_C == 0) & (all_C > 0))
    if len(absent):
        raise DataError(
            f"a fold would train without class {whole.classes[int(absent[0])]!r}: its images are in too few groups",
            key="evaluate.folds",
            remedy="Take another number of folds, or bring more groups of it",
        )


def refuse_other_part(whole: ImageData, part: ImageData, folder: RunFolder) -> None:
    """Refuse a part whose images or labels are not those of the whole.

    Raises:
        ResumeError: they are not.
    """
    same = part.identity["tables_sha256"] == whole.identity["tables_sha256"]
    if not same or part.bad_images.rows != whole.bad_images.rows:
        raise _other(folder, "its labels, or the images that it skips, are")


def refuse_other_images(recipe: Recipe, whole: ImageData, result: Mapping[str, Any], folder: RunFolder) -> None:
    """Refuse a complete part whose images were replaced by others, or have other labels now.

    Raises:
        ResumeError: they were.
    """
    run_info = read_run_info(folder)
    if run_info is None or "used_sha256" not in result:
        return  # of an older version
    part = Part.from_plain(run_info["fold"])
    skipped = BadImages.from_plain(run_info["bad_images"])
    data = open_data(recipe.data, recipe.seed, fold=part.fold, bad_images=skipped)
    refuse_other_part(whole, data, folder)
    if used_identity(data, result["used_by"]).sha256 != result["used_sha256"]:
        raise _other(folder, "images that it was fitted to, or chose by, are")
    if (data.test is not None) and scored_identity(data, result["scored_by"]).sha256 != result["scored_sha256"]:
        raise _other(folder, "images that it scored are")


def _other(folder: RunFolder, what: str) -> ResumeError:
    problem = f"'{folder.path}' is no part of this cross-validation any more: {what} not those of today"
    return ResumeError(problem, remedy=f"Bring the data back. {_REMOVE}")
