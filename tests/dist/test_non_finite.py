"""The loss of one process becomes NaN: all of them take the same way, and none is left waiting."""

import pytest

import tests.small_models  # noqa: F401 (makes per_image_resnet known to timm)
import tlscale
from tests.dist import non_finite
from tests.dist.launches import facts_of
from tests.small_runs import put_small_idx_with_one_white, result, small_recipe

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return put_small_idx_with_one_white(tmp_path_factory.mktemp("white"))


@pytest.fixture(scope="module")
def by_two(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("by2")
    return folder, facts_of(2, "non_finite.py", folder, data)


def test_the_image_is_on_one_process_at_a_time(by_two):
    _, facts = by_two
    ones, others = (fact["skip"]["has_white"] for fact in facts)
    assert len(ones) == len(others) == 10
    assert sum(ones) + sum(others) == 2, "once an epoch, on one process"


def test_both_fail_and_one_says_it(by_two):
    folder, facts = by_two
    for rank, fact in enumerate(facts):
        assert fact["raise"]["error"]["kind"] == "NonFiniteLossError"
        assert fact["raise"]["error"]["said_by_main"] or rank == 0
        assert fact["raise"]["error"]["message"] == facts[0]["raise"]["error"]["message"]
    assert len(facts[0]["raise"]["has_white"]) == len(facts[1]["raise"]["has_white"])
    assert not (folder / "raise" / "result.json").exists()


def test_both_skip_the_same_steps_and_stay_equal(by_two, data, tmp_path):
    folder, facts = by_two
    for fact in facts:
        assert fact["skip"]["error"] is None
        assert all(fact["skip"]["agreed"]), "a process went on from other weights than the other"
    steps = [
        step for step, white in enumerate(zip(*(f["skip"]["has_white"] for f in facts), strict=True), 1) if any(white)
    ]
    assert result(folder / "skip")["steps_left_out"] == steps
    # And they are those that one process skips.
    recipe = small_recipe(tmp_path / "recipe.yaml", data, **non_finite.changes_of("skip"))
    assert tlscale.run(recipe, tmp_path / "run")["steps_left_out"] == steps
