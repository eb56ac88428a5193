"""Keys that do nothing with the data or the network at hand are refused before a run begins."""

from __future__ import annotations

import numpy as np
import pytest

from tests.recipes.wrong_data import put_folder
from tests.small_runs import put_small_idx, small_recipe
from tlscale.errors import RecipeError
from tlscale.training.setup import set_up

NO_VALIDATION = {"data": {"validation_fraction": 0.0}}
STAIRS = {"decay": "step", "step_every": "3 steps", "step_factor": 0.5, "warmup": "0 steps"}
IDLE = {
    "evaluate.select": {**NO_VALIDATION, "evaluate": {"select": "loss"}},
    "evaluate.choose": {**NO_VALIDATION, "evaluate": {"choose": "best"}},
    "checkpoint.keep_best": {**NO_VALIDATION, "checkpoint": {"keep_best": 2}},
    "evaluate.patience": {"duration": "4 steps", "evaluate": {"every": "2 steps", "patience": 1}},
    "optim.layer_decay": {"freeze": ".*", "optim": {"layer_decay": 0.5}},
    "schedule.step_every": {"duration": "3 steps", "schedule": STAIRS},
    "stages[0].layer_decay": {
        "stages": [{"freeze": ".*", "duration": "1 steps", "layer_decay": 0.5}, {"duration": "1 steps"}],
    },
}
ACTING = [
    {"evaluate": {"select": "loss", "choose": "best"}},
    {"duration": "5 steps", "evaluate": {"every": "2 steps", "patience": 1}},
    {
        "stages": [{"freeze": ".*", "duration": "4 steps"}, {"duration": "3 steps"}],
        "evaluate": {"every": "2 steps", "patience": 1},
    },
    {**NO_VALIDATION, "evaluate": {"select": "top1"}},
    {**NO_VALIDATION, "evaluate": {"every": "2 steps"}},
    {"freeze": "patch_embed.*", "optim": {"layer_decay": 0.5}},
    {"duration": "4 steps", "schedule": STAIRS},
]


@pytest.fixture(scope="module")
def idx(tmp_path_factory):
    return put_small_idx(tmp_path_factory.mktemp("idx"), train=40, test=10)


def made(tmp_path, idx, changes):
    return small_recipe(tmp_path / "recipe.yaml", idx, **changes)


@pytest.mark.parametrize("key", IDLE)
def test_an_idle_key_is_refused_but_where_a_run_goes_on(key, tmp_path, idx):
    recipe = made(tmp_path, idx, IDLE[key])
    with pytest.raises(RecipeError, match="has no effect") as caught:
        set_up(recipe, world_size=1)
    assert caught.value.key == key


def test_patience_needs_validation_images(tmp_path, idx):
    recipe = made(tmp_path, idx, {**NO_VALIDATION, "evaluate": {"patience": 1}})
    with pytest.raises(RecipeError, match="no validation split to evaluate") as caught:
        set_up(recipe, world_size=1)
    assert caught.value.key == "evaluate.patience"


PROBED = {"backbone": {"name": "test_resnet"}, "probe": {"kind": "knn"}}
FOLDER = {"source": "folder", "validation_fraction": 0.25}
EQUAL = {
    "data.sampling": {"data": {**FOLDER, "sampling": "balanced"}},
    "loss.logit_adjustment": {"data": FOLDER, "loss": {"logit_adjustment": 1.0}},
}


@pytest.fixture(scope="module")
def equal(tmp_path_factory):
    return put_folder(tmp_path_factory.mktemp("equal"), a=8, b=8)


@pytest.mark.parametrize("key", EQUAL)
def test_what_makes_up_for_unequal_classes_needs_some(key, tmp_path, equal):
    changes = EQUAL[key]
    with pytest.raises(RecipeError, match="each of the 2 classes has 6 training images") as caught:
        set_up(small_recipe(tmp_path / "r.yaml", equal, **changes), world_size=1)
    assert caught.value.key == key
    # As at one of the sizes of a comparison.
    limited = {**changes, "data": {**changes["data"], "train_limit": 8}}
    assert set_up(small_recipe(tmp_path / "r.yaml", equal, **limited), world_size=1).stages
    (equal / "a" / "0.png").rename(tmp_path / "0.png")
    try:
        assert set_up(small_recipe(tmp_path / "r.yaml", equal, **changes), world_size=1).stages
    finally:
        (tmp_path / "0.png").rename(equal / "a" / "0.png")


@pytest.mark.parametrize("more", [{}, PROBED], ids=["trained", "probed"])
def test_groups_of_one_split_are_in_no_two(more, tmp_path, equal):
    data = {**FOLDER, "group_regex": r"\d", "groups_across_splits": "allow"}
    with pytest.raises(RecipeError, match="the source has one split") as caught:
        set_up(small_recipe(tmp_path / "r.yaml", equal, data=data, **more), world_size=1)
    assert caught.value.key == "data.groups_across_splits"


@pytest.mark.parametrize("more", [{}, {"evaluate": {"folds": 2}}], ids=["plain", "folds"])
def test_channels_come_first_in_arrays_alone(more, tmp_path, equal):
    data = {**FOLDER, "channels_first": True, "validation_fraction": 0.0 if more else 0.2}
    with pytest.raises(RecipeError, match=r"no effect: none of the images is an array \(.npy\)") as caught:
        set_up(small_recipe(tmp_path / "r.yaml", equal, data=data, **more), world_size=1)
    assert caught.value.key == "data.channels_first"
    for file in equal.rglob("*.png"):
        place = tmp_path / "arrays" / file.parent.name / f"{file.stem}.npy"
        place.parent.mkdir(parents=True, exist_ok=True)
        np.save(place, np.zeros((1, 8, 8), np.uint8))
    recipe = small_recipe(tmp_path / "r.yaml", tmp_path / "arrays", data=data, **more)
    assert set_up(recipe, world_size=1).spec.channels_first


def test_what_chooses_a_probe_needs_validation_images(tmp_path, idx):
    probed = {"probe": {"kind": "ridge", "strengths": [1.0]}, "evaluate": {"select": "macro_f1"}}
    with pytest.raises(RecipeError, match="no validation split to choose by") as caught:
        set_up(made(tmp_path, idx, {**NO_VALIDATION, **probed}), world_size=1)
    assert caught.value.key == "evaluate.select"


@pytest.mark.parametrize("changes", ACTING, ids=str)
def test_a_key_that_acts_is_taken(changes, tmp_path, idx):
    assert set_up(made(tmp_path, idx, changes), world_size=1).stages
