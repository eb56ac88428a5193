"""What is wrong with any fold is found before the first begins."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.coins import put_coins
from tests.small_runs import small_recipe
from tlscale.data.sources.folds import Fold
from tlscale.errors import DataError, RecipeError
from tlscale.training.fold_checks import check_folds
from tlscale.training.fold_parts import Part
from tlscale.training.setup import set_up

PROBE = {"backbone": {"name": "test_resnet", "weights": "none"}, "probe": {"kind": "ridge", "strengths": [1.0]}}


def recipe_of(tmp_path, images, evaluate=None, **data):
    keys = {"source": "manifest", "path": str(images), "validation_fraction": 0.0, **data}
    evaluate = {"folds": 2, **(evaluate or {})}
    return small_recipe(tmp_path / "r.yaml", images, data=keys, evaluate=evaluate, **PROBE)


def test_a_limit_that_a_given_validation_split_comes_on_top_of_is_refused(tmp_path):
    images = put_coins(tmp_path / "images.parquet", {"train": 16, "validation": 8})
    check_folds(set_up(recipe_of(tmp_path, images), world_size=1), 1)
    with pytest.raises(DataError, match="8 images of the given validation split come on top") as caught:
        check_folds(set_up(recipe_of(tmp_path, images, train_limit=10), world_size=1), 1)
    assert caught.value.key == "data.train_limit"


def test_a_fold_that_holds_all_groups_of_a_class_is_refused(tmp_path):
    images = put_coins(tmp_path / "images.parquet", {"train": 8})
    rows = ["1a", "1b", "1c", "2a", "2d", "3b", "3c", "3d"]  # however they are divided, one side lacks a class
    table = pa.table(
        {
            "image": pq.read_table(images)["image"],
            "label": [row[1] for row in rows],
            "patient": [row[0] for row in rows],
        }
    )
    pq.write_table(table, images)
    with pytest.raises(DataError, match="a fold would train without class") as caught:
        check_folds(set_up(recipe_of(tmp_path, images, group_column="patient"), world_size=1), 1)
    assert caught.value.key == "evaluate.folds"


def test_a_probe_with_nothing_to_select_by_within_a_fold_says_so(tmp_path):
    images = put_coins(tmp_path / "images.parquet", {"train": 16})
    recipe = recipe_of(tmp_path, images, evaluate={"select": "macro_f1"})
    with pytest.raises(RecipeError, match="no validation split to choose by") as caught:
        set_up(recipe, world_size=1, part=Part(Fold(2, 1, 1)))
    assert caught.value.key == "evaluate.select"


def test_a_fold_whose_validation_images_are_of_one_class_is_refused_before_the_first_begins(tmp_path):
    images = put_coins(tmp_path / "images.parquet", {"train": 25})
    labels = pa.array(["heads"] * 20 + ["tails"] * 5)  # three of these in one fold, and so two to hold out of
    pq.write_table(pa.table({"image": pq.read_table(images)["image"], "label": labels}), images)
    recipe = recipe_of(tmp_path, images, evaluate={"select": "auroc"}, validation_fraction=0.2)
    set_up(recipe, world_size=1, part=Part(Fold(2, 1, 1)))  # the first one has both
    with pytest.raises(DataError, match="validation images are of one class, so that auroc cannot choose") as caught:
        check_folds(set_up(recipe, world_size=1), 1)
    assert caught.value.key == "evaluate.select"
