"""Cross-validation on two processes: the folds, choices and answers of one, also when it was stopped in between."""

import json

import pyarrow.parquet as pq
import pytest

import tlscale
from tests.coins import put_coins
from tests.dist.launches import exit_code_of, launch
from tests.small_runs import REPO, When, assert_same_bits, exported, logged, result, small_recipe

pytestmark = [pytest.mark.dist, pytest.mark.long, pytest.mark.timeout(600)]
CHANGES = {
    "probe": {
        "backbone": {"name": "test_resnet", "weights": "none"},
        "probe": {"kind": "ridge", "strengths": [1.0, 0.01]},
    },
    "training": {  # in float64, in which two processes give the answers of one
        "duration": "3 epochs",
        "batch_size": 8,
        "compute": {"precision": "fp64"},
        "checkpoint": {"every": "1 steps"},
    },
}


def run_by_two(place, out, log, *words):
    with launch(2, REPO / "tlscale" / "run.py", place, "--out", out, *words, log=log, launcher="torchrun") as launched:
        return exit_code_of(launched, log)


@pytest.mark.parametrize("name", CHANGES)
def test_two_processes_answer_as_one(name, tmp_path):
    images = put_coins(tmp_path / "images.parquet", {"train": 48}, classes=tuple("abcd"))
    data = {"source": "manifest", "path": str(images), "validation_fraction": 0.25}
    place = tmp_path / "recipe.yaml"
    recipe = small_recipe(place, images, data=data, evaluate={"folds": 2}, **CHANGES[name])
    tlscale.run(recipe, tmp_path / "one")
    assert run_by_two(place, tmp_path / "two", tmp_path / "log") == 0, (tmp_path / "log").read_text()[-3000:]
    assert json.loads((tmp_path / "two" / "folds" / "1" / "run.json").read_text())["world_size"] == 2
    one, two = (pq.read_table(tmp_path / name / "predictions.parquet") for name in ("one", "two"))
    for column in ("path", "fold", "repeat", "label"):
        assert one[column].equals(two[column]), column
    chosen = [[score["chosen"] for score in result(tmp_path / name)["folds"]["scores"]] for name in ("one", "two")]
    assert chosen[0] == chosen[1]
    if name == "probe":
        assert one.equals(two)
        assert_same_bits(exported(tmp_path / "one"), exported(tmp_path / "two"))
        return
    # Stopped in the second fold, and resumed.
    log = tmp_path / "log"
    command = REPO / "tlscale" / "run.py", place, "--out", tmp_path / "parts"
    stop = When(logged(tmp_path / "parts" / "folds" / "2", 2), lambda: (tmp_path / "parts" / "STOP").touch())
    with launch(2, *command, log=log, launcher="torchrun") as launched, stop:
        exit_code_of(launched, log)
    assert (tmp_path / "parts" / "STOPPED").exists(), log.read_text()[-3000:]
    assert not (tmp_path / "parts" / "result.json").exists()
    assert run_by_two(place, tmp_path / "parts", log, "--resume") == 0, log.read_text()[-3000:]
    assert pq.read_table(tmp_path / "parts" / "predictions.parquet").equals(two)
    assert_same_bits(exported(tmp_path / "parts"), exported(tmp_path / "two"))
