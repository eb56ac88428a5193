"""Keys that do nothing with the data or the network at hand are refused before a run begins."""

from __future__ import annotations

import pytest

from tests.small_runs import put_small_idx, small_recipe
from tlscale.errors import RecipeError
from tlscale.training.setup import set_up

NO_VALIDATION = {"data": {"validation_fraction": 0.0}}
STAIRS = {"decay": "step", "step_every": "3 steps", "step_factor": 0.5, "warmup": "0 steps"}
IDLE = {
    "evaluate.select": {**NO_VALIDATION, "evaluate": {"select": "loss"}},
    "evaluate.choose": {**NO_VALIDATION, "evaluate": {"choose": "best"}},
    "checkpoint.keep_best": {**NO_VALIDATION, "checkpoint": {"keep_best": 2}},
    "optim.layer_decay": {"freeze": ".*", "optim": {"layer_decay": 0.5}},
    "schedule.step_every": {"duration": "3 steps", "schedule": STAIRS},
    "stages[0].layer_decay": {
        "stages": [{"freeze": ".*", "duration": "1 steps", "layer_decay": 0.5}, {"duration": "1 steps"}],
    },
}
ACTING = [
    {"evaluate": {"select": "loss", "choose": "best"}},
    {**NO_VALIDATION, "evaluate": {"select": "top1"}},
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


@pytest.mark.parametrize("changes", ACTING, ids=str)
def test_a_key_that_acts_is_taken(changes, tmp_path, idx):
    assert set_up(made(tmp_path, idx, changes), world_size=1).stages
