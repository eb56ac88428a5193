"""What one of two processes finds damaged ends both, in the same step, and nothing is lost."""

import pytest

from tests.dist.launches import facts_of
from tests.small_runs import assert_same_runs, put_small_folder

pytestmark = [pytest.mark.dist, pytest.mark.long]


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def by_two(request, tmp_path_factory):
    """The folder, the engine, and what each of the processes saw."""
    folder = tmp_path_factory.mktemp("damaged")
    data = put_small_folder(folder / "images")
    return folder, request.param, facts_of(2, "damaged.py", folder, data, request.param, launcher="torchrun")


def test_a_training_image_of_one_process_costs_no_step(by_two):
    folder, engine, facts = by_two
    for fact in facts:
        found = fact["training"]
        assert found["error"]["kind"] == "DataError"
        assert found["path"] in found["error"]["message"]
        assert "Up to step 2 all is saved" in found["error"]["message"]
        assert found["saved"] == ["step_00000002"]
    assert_same_runs(folder / f"{engine}_whole", folder / f"{engine}_training")


def test_a_test_image_of_one_process_costs_no_model(by_two):
    folder, engine, facts = by_two
    for fact in facts:
        found = fact["test"]
        assert found["path"] in found["error"]["message"]
        assert found["there"] == [True, False, False]
    assert_same_runs(folder / f"{engine}_whole", folder / f"{engine}_test")


def test_predictions_that_cannot_be_put_together_leave_nobody_waiting(by_two):
    for fact in by_two[2]:
        assert ["out of bounds" in error["message"] for error in fact["predictions"]] == [True, True]
