"""Groups on several processes: the split, the figures and the predictions of one."""

import json
import shutil

import pyarrow.parquet as pq
import pytest

import tlscale
from tests.dist.launches import exit_code_of, launch
from tests.scenes import put_scenes
from tests.small_runs import REPO, assert_same_bits, exported, largest_difference, result, small_recipe

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]


def test_two_processes_hold_out_what_one_does_and_go_on_with_it(tmp_path):
    scenes = put_scenes(tmp_path / "scenes", num_scenes=20, photos=3)
    data = {"source": "folder", "path": str(scenes), "group_regex": r"scene\d+", "validation_fraction": 0.3}
    place, log = tmp_path / "recipe.yaml", tmp_path / "log"
    changes = {"duration": "4 steps", "checkpoint": {"every": "2 steps"}}
    recipe = small_recipe(place, scenes, data={**data, "train_limit": 50}, **changes)
    tlscale.run(recipe, tmp_path / "one")
    command = REPO / "tlscale" / "run.py", place, "--out", tmp_path / "two"
    with launch(2, *command, log=log, launcher="torchrun") as launched:
        assert exit_code_of(launched, log) == 0, log.read_text()[-3000:]
    assert "2 processes" in json.loads((tmp_path / "two" / "run.json").read_text())["batch"]
    by_two = result(tmp_path / "two")
    (tmp_path / "two" / "result.json").unlink()
    tlscale.run(recipe, tmp_path / "two", resume=True)
    assert result(tmp_path / "two")["top1_interval95"] == by_two["top1_interval95"]
    one, two = (pq.read_table(tmp_path / name / "predictions.parquet") for name in ("one", "two"))
    assert two["path"].equals(one["path"])
    assert two["group"].equals(one["group"])
    assert result(tmp_path / "two")["groups"] == result(tmp_path / "one")["groups"]
    assert result(tmp_path / "two")["top1_interval95_by"] == result(tmp_path / "one")["top1_interval95_by"]
    held = set(one["group"].to_pylist())
    assert len(held) == result(tmp_path / "one")["top1_interval95_by"]["groups"] > 1
    assert one.num_rows == 3 * len(held)  # whole groups


def test_two_processes_choose_by_auroc_what_one_does(tmp_path):
    """In float64, in which they give the answers of one."""
    scenes = put_scenes(tmp_path / "scenes", num_scenes=20, photos=3)
    data = {"source": "folder", "path": str(scenes), "group_regex": r"scene\d+", "validation_fraction": 0.4}
    choosing = {"evaluate": {"select": "auroc", "every": "1 steps"}, "compute": {"precision": "fp64"}}
    place, log = tmp_path / "recipe.yaml", tmp_path / "log"
    recipe = small_recipe(place, scenes, data=data, duration="4 steps", **choosing)
    tlscale.run(recipe, tmp_path / "one")
    command = REPO / "tlscale" / "run.py", place, "--out", tmp_path / "two"
    with launch(2, *command, log=log, launcher="torchrun") as launched:
        assert exit_code_of(launched, log) == 0, log.read_text()[-3000:]
    one, two = (result(tmp_path / name) for name in ("one", "two"))
    assert one["choice"] == two["choice"]
    assert one["choice"]["select"] == "auroc"
    assert one["choice"]["standard_error_by"]["groups"] > 1


@pytest.mark.long  # four processes, on as few cores
@pytest.mark.timeout(600)
def test_four_processes_answer_in_folds_of_groups_as_one(tmp_path):
    """In float64, in which they give the answers of one; with an image that is skipped, and resumed in the end."""
    scenes = put_scenes(tmp_path / "scenes", num_scenes=12, photos=3)
    bad = next(scenes.glob("a/*_1.png"))
    bad.write_bytes(bad.read_bytes()[:70])
    data = {"source": "folder", "path": str(scenes), "group_regex": r"scene\d+", "on_bad_image": "skip"}
    changes = {"duration": "6 steps", "batch_size": 8, "compute": {"precision": "fp64"}}
    place, log = tmp_path / "recipe.yaml", tmp_path / "log"
    data["validation_fraction"] = 0.3
    recipe = small_recipe(place, scenes, data=data, evaluate={"folds": 2, "every": "2 steps"}, **changes)
    first = tlscale.run(recipe, tmp_path / "one")
    command = REPO / "tlscale" / "run.py", place, "--out", tmp_path / "four"
    with launch(4, *command, log=log, launcher="torchrun") as launched:
        assert exit_code_of(launched, log, 500) == 0, log.read_text()[-3000:]
    assert json.loads((tmp_path / "four" / "folds" / "1" / "run.json").read_text())["world_size"] == 4
    one, four = (pq.read_table(tmp_path / name / "predictions.parquet") for name in ("one", "four"))
    for column in ("path", "group", "fold", "repeat", "label"):
        assert one[column].equals(four[column]), column
    assert one.num_rows == 35
    second = result(tmp_path / "four")
    for key in ("num_images", "top1", "top1_interval95", "top1_interval95_by", "confusion", "groups", "skipped_images"):
        assert second[key] == first[key], key
    chosen = [[score["chosen"] for score in figures["folds"]["scores"]] for figures in (first, second)]
    assert chosen[0] == chosen[1]
    assert largest_difference(exported(tmp_path / "one"), exported(tmp_path / "four")) < 1e-11
    # What is left of it is gone on with by four processes again.
    answers, network = (tmp_path / "four" / "predictions.parquet").read_bytes(), exported(tmp_path / "four")
    (tmp_path / "four" / "result.json").unlink()
    shutil.rmtree(tmp_path / "four" / "folds" / "2")
    with launch(4, *command, "--resume", log=log, launcher="torchrun") as launched:
        assert exit_code_of(launched, log, 500) == 0, log.read_text()[-3000:]
    assert (tmp_path / "four" / "predictions.parquet").read_bytes() == answers
    assert_same_bits(exported(tmp_path / "four"), network)
