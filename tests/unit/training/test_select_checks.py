"""What AUROC and average precision need of the validation split is checked before a run begins."""

from __future__ import annotations

import shutil

import pytest

from tests.small_runs import put_small_folder, small_recipe
from tlscale.errors import DataError, RecipeError
from tlscale.training import select_checks
from tlscale.training.setup import set_up


@pytest.fixture
def folder(tmp_path):
    return put_small_folder(tmp_path / "data", test=40)


def set_up_with(folder, kept, select="auroc", **changes):
    """Of the validation images (half of what was the test split) only classes of these numbers."""
    validation = folder / "val"
    (folder / "test").rename(validation)
    for place in sorted(validation.iterdir())[kept:]:
        shutil.rmtree(place)
    data = {"source": "folder", "validation_fraction": 0.0, "validation_split": "val"}
    recipe = small_recipe(folder / "r.yaml", folder, data=data, evaluate={"select": select}, **changes)
    return set_up(recipe, world_size=1)


@pytest.mark.parametrize("select", ["auroc", "mean_average_precision"])
def test_classes_without_validation_images_are_told(folder, select):
    (note,) = [note for note in set_up_with(folder, 7, select).data.notes if note.startswith("evaluate.select")]
    assert f"{select} is the mean over the 7 classes that have validation images; 3 of 10 have none" in note


def test_nothing_is_told_where_all_have_some_or_another_figure_chooses(folder, tmp_path):
    assert not [note for note in set_up_with(folder, 10).data.notes if note.startswith("evaluate.select")]
    other = put_small_folder(tmp_path / "other", test=40)
    assert not [note for note in set_up_with(other, 7, "macro_f1").data.notes if note.startswith("evaluate.select")]


def test_validation_images_of_one_class_are_refused(folder):
    with pytest.raises(DataError, match="validation images are of one class, so that auroc cannot choose") as caught:
        set_up_with(folder, 1)
    assert caught.value.key == "evaluate.select"


def test_more_classes_than_the_result_has_it_for_are_refused(folder, monkeypatch):
    monkeypatch.setattr(select_checks, "MOST_LOGITS", 9)
    with pytest.raises(RecipeError, match="auroc is computed for up to 9 classes, and there are 10") as caught:
        set_up_with(folder, 10)
    assert caught.value.key == "evaluate.select"
