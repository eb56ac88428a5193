"""Several labels on two and four processes: the answers and figures of one; plain, and in folds of groups."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

import tlscale
from tests.dist.launches import exit_code_of, launch
from tests.garments import SEVERAL, put_garments
from tests.small_runs import REPO, assert_same_bits, exported, largest_difference, result, small_recipe

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]
# In float64, in which several processes give the answers of one.
TRAINED = {"duration": "4 steps", "batch_size": 8, "compute": {"precision": "fp64"}, "evaluate": {"every": "2 steps"}}
IN_FOLDS = {
    "backbone": {"name": "test_resnet", "weights": "none"},
    "probe": {"kind": "logistic", "strengths": [1.0, 0.01], "refit": False},
    "evaluate": {"folds": 2},
}


def close_to(figures):
    return {k: pytest.approx(v, rel=1e-6) if isinstance(v, float) else v for k, v in figures.items()}


@pytest.mark.parametrize(
    ("name", "processes"),
    [("plain", 2), ("folds and groups", 2), pytest.param("folds and groups", 4, marks=pytest.mark.long)],
)
def test_several_processes_answer_as_one(name, processes, tmp_path):
    is_plain = name == "plain"
    table = put_garments(tmp_path / "data", 48, num_test=15 if is_plain else 0, photos=1 if is_plain else 3)
    data = {**SEVERAL, "validation_fraction": 0.3, **({} if is_plain else {"group_column": "patient"})}
    place, log = tmp_path / "recipe.yaml", tmp_path / "log"
    recipe = small_recipe(place, table, data=data, **(TRAINED if is_plain else IN_FOLDS))
    tlscale.run(recipe, tmp_path / "one")
    command = REPO / "tlscale" / "run.py", place, "--out", tmp_path / "more"
    with launch(processes, *command, log=log, launcher="torchrun") as launched:
        assert exit_code_of(launched, log) == 0, log.read_text()[-3000:]
    of_more = tmp_path / "more" / ("." if is_plain else "folds/1")
    assert json.loads((of_more / "run.json").read_text())["world_size"] == processes
    one, more = (pq.read_table(tmp_path / by / "predictions.parquet") for by in ("one", "more"))
    for column in set(one.column_names) - {"logits"}:
        assert one[column].equals(more[column]), column
    first, second = result(tmp_path / "one"), result(tmp_path / "more")
    if not is_plain:  # its codes are the same, and the main process fits
        assert one.equals(more)
        assert_same_bits(exported(tmp_path / "one"), exported(tmp_path / "more"))
        assert first["folds"] == second["folds"]
    np.testing.assert_allclose(more["logits"].to_pylist(), one["logits"].to_pylist(), atol=1e-11)
    assert largest_difference(exported(tmp_path / "one"), exported(tmp_path / "more")) < 1e-11
    interval = "mean_average_precision_interval95"
    assert (interval + "_by" in first) != is_plain
    assert first.get(interval + "_by") == second.get(interval + "_by")
    assert second["mean_average_precision"] == pytest.approx(first["mean_average_precision"], rel=1e-12)
    assert second[interval] == pytest.approx(first[interval], rel=1e-9)
    assert second["calibration"] == close_to(first["calibration"])
    for label, row in first["per_class"].items():
        assert second["per_class"][label] == close_to(row)
