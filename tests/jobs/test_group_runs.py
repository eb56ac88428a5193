"""Whole runs on data with groups: a leak is found, and figures, files and comparisons go by groups."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import tlscale
from tests.scenes import put_scenes, scene_of
from tests.small_runs import result, small_recipe
from tlscale.cli import main
from tlscale.errors import DataError, ResumeError
from tlscale.training.group_interval import group_interval

REGEX = r"scene\d+"
PROBE = {
    "backbone": {"name": "test_resnet", "weights": "none"},
    "probe": {"kind": "logistic", "strengths": [0.01], "refit": False},
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return put_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture
def recipe(tmp_path, scenes):
    def make(name, changes, **data):
        data = {"source": "folder", "path": str(scenes), "validation_fraction": 0.25, **data}
        return small_recipe(tmp_path / f"{name}.yaml", scenes, data=data, **changes)

    return make


def test_a_planted_leak_is_gone_with_groups(recipe, tmp_path, capsys):
    nearest = {"backbone": {"name": "resnet10t", "weights": "bundled"}, "probe": {"kind": "knn", "neighbours": [1]}}
    leaking = tlscale.run(recipe("plain", nearest), tmp_path / "plain")
    honest = tlscale.run(recipe("grouped", nearest, group_regex=REGEX), tmp_path / "grouped")
    assert leaking.top1 > 0.8  # each held-out photo has others of its scene in train
    low, high = honest.interval
    assert low < 0.5 < high
    assert honest.top1 < leaking.top1 - 0.2
    assert honest["groups"]["by"] == "data.group_regex: scene\\d+"
    assert honest["groups"]["num_groups"] == {"train": 40}
    assert "groups" not in leaking
    assert "top1_interval95_by" not in leaking
    assert f"over {honest['top1_interval95_by']['groups']} groups)" in " ".join(capsys.readouterr().out.split())


@pytest.fixture
def grouped(recipe, tmp_path):
    tlscale.run(recipe("grouped", PROBE, group_regex=REGEX), tmp_path / "grouped")
    return tmp_path / "grouped"


def test_few_groups_choose_neither_sets_nor_what_is_unknown(grouped, recipe, scenes, tmp_path, capsys):
    """However many photos they have: 10 groups are enough for sets, which take 9, and not for what is unknown (19)."""
    told = result(grouped)
    assert (told["calibration"]["num_images"], told["top1_interval95_by"]) == (60, {"groups": 10})
    assert told["calibration"]["sets"]["threshold"] > 0
    assert told["unknown"]["why"].startswith("groups of validation images are too few (19)")
    both = {name: scenes for name in ("train", "test")}
    for name, place in both.items():
        shutil.copytree(place, tmp_path / "both" / name)
    keys = {"path": str(tmp_path / "both"), "group_regex": REGEX, "groups_across_splits": "allow"}
    few = tlscale.run(recipe("few", PROBE, **keys, validation_fraction=0.1), tmp_path / "few")
    sets = few["calibration"]["sets"]
    assert (sets["threshold"], sets["coverage"], sets["mean_size"]) == (0.0, 1.0, few["num_classes"])
    assert "so few images, or groups of them (9 are needed): each set has all classes" in sets["why"]
    assert f"sets of labels: {sets['why']}" in " ".join(capsys.readouterr().out.split())


def counts_of(table) -> tuple[list[int], list[int]]:
    hits, images = {}, {}
    for row in table.to_pylist():
        hits[row["group"]] = hits.get(row["group"], 0) + (row["label"] == row["true_label"])
        images[row["group"]] = images.get(row["group"], 0) + 1
    return list(hits.values()), list(images.values())


def test_predictions_name_the_groups_and_evaluations_go_by_them(grouped):
    table = pq.read_table(grouped / "predictions.parquet")
    assert table["group"].to_pylist() == [scene_of(path) for path in table["path"].to_pylist()]
    figures = result(grouped)
    assert figures["top1_interval95"] == group_interval(*map(np.array, counts_of(table)))
    done = CliRunner().invoke(main, ["evaluate", str(grouped)])
    assert done.exit_code == 0, done.output
    again = json.loads((grouped / "evaluations" / "validation" / "figures.json").read_text())
    assert again["top1_interval95"] == figures["top1_interval95"]
    assert again["top1_interval95_by"] == figures["top1_interval95_by"]
    assert f"over {figures['top1_interval95_by']['groups']} groups" in " ".join(done.output.split())


def test_other_data_need_no_groups(grouped, tmp_path):
    other = put_scenes(tmp_path / "other", num_scenes=4, photos=2, seed=1)
    for path in sorted(other.glob("*/*.png")):
        path.rename(path.with_name(path.name.replace("scene", "")))
    figures = tlscale.evaluate(grouped, data=str(other))
    assert "top1_interval95_by" not in figures


TRAINED = {"backbone": {"name": "test_resnet", "weights": "none"}, "duration": "2 steps", "freeze": ".*"}


def test_held_out_images_of_other_groups_are_not_scored_as_those_of_the_run(recipe, tmp_path, scenes):
    """Groups decide which images are held out: with others, some of them were trained on."""
    rows = [f"{path},{path.parent.name},{scene_of(path.name)}" for path in sorted(scenes.glob("*/*.png"))]
    table = tmp_path / "list.csv"
    table.write_text("\n".join(["path,label,scene", *rows]) + "\n")
    keys = {"source": "manifest", "path": str(table), "group_column": "scene"}
    run = tmp_path / "table"
    first = tlscale.run(recipe("table", PROBE, **keys), run)
    assert tlscale.evaluate(run, split="validation").top1 == first.top1
    table.write_text("\n".join(["path,label,scene", *(row.replace(",scene", ",place") for row in rows)]) + "\n")
    with pytest.raises(DataError, match="are not those that it was trained on"):
        tlscale.evaluate(run, split="validation")


def test_a_run_is_not_resumed_with_other_groups(recipe, tmp_path, scenes):
    rows = [f"{path},{path.parent.name},{scene_of(path.name)}" for path in sorted(scenes.glob("*/*.png"))]
    table = tmp_path / "list.csv"
    keys = {"source": "manifest", "path": str(table), "group_column": "scene"}

    def put(rows):
        table.write_text("\n".join(["path,label,scene", *rows]) + "\n")

    put(rows)
    made = recipe("table", TRAINED, **keys)
    tlscale.run(made, tmp_path / "table")
    (tmp_path / "table" / "result.json").unlink()
    by_path = tlscale.run(recipe("paths", TRAINED, group_regex=REGEX), tmp_path / "paths")
    assert tlscale.run(made, tmp_path / "table", resume=True).top1 == by_path.top1
    (tmp_path / "table" / "result.json").unlink()
    put([row.replace(",scene39", ",scene38") for row in rows])
    with pytest.raises(ResumeError, match="its data are not those"):
        tlscale.run(made, tmp_path / "table", resume=True)


def test_a_run_that_took_groups_that_look_alike_for_two_is_told_what_is_wrong_and_what_to_do(recipe, tmp_path, scenes):
    """As an older version did. Blanks at the ends of a name have never told two groups apart."""
    rows = [f"{path},{path.parent.name},{scene_of(path.name)}" for path in sorted(scenes.glob("*/*.png"))]
    table, out = tmp_path / "list.csv", tmp_path / "table"
    keys = {"source": "manifest", "path": str(table), "group_column": "scene"}

    def put(other):
        of_one = [number for number, row in enumerate(rows) if row.endswith(",scene38")]
        lines = [row.replace(",scene38", other) if number == of_one[0] else row for number, row in enumerate(rows)]
        table.write_text("\n".join(["path,label,scene", *lines]) + "\n")
        (out / "result.json").unlink(missing_ok=True)

    put(",scene38")
    made = recipe("table", TRAINED, **keys)
    first = tlscale.run(made, out)
    put(",scene38 ")
    assert tlscale.run(made, out, resume=True)["groups"] == first["groups"]
    put(",scene38\u200b")
    with pytest.raises(DataError, match=r"the groups 'scene38\\u200b' and 'scene38' are the same to the eye") as caught:
        tlscale.run(made, out, resume=True)
    assert caught.value.key == "data.group_column"
    assert "Write them alike" in str(caught.value)
    # Written alike, they are not what the older version began with, as here with another name.
    put(",scene37")
    with pytest.raises(ResumeError, match=r"its data are not those that it was started with .* start another"):
        tlscale.run(made, out, resume=True)


def test_the_error_of_what_chooses_the_weights_is_over_groups(recipe, tmp_path, capsys):
    out = tmp_path / "run"
    changes = {**TRAINED, "evaluate": {"every": "1 steps"}, "checkpoint": {"every": "1 steps", "keep": 9}}
    choice = tlscale.run(recipe("run", changes, group_regex=REGEX), out)["choice"]
    # There is no test split, so the predictions are of the chosen step on the images that chose it.
    hits_G, images_G = map(np.array, counts_of(pq.read_table(out / "predictions.parquet")))
    misses_G = hits_G - hits_G.sum() / images_G.sum() * images_G
    error = (len(hits_G) / (len(hits_G) - 1) * (misses_G**2).sum()) ** 0.5 / images_G.sum()
    assert choice["standard_error"] == pytest.approx(error)
    assert choice["standard_error_by"] == {"groups": len(hits_G)}
    share = choice["figure"]
    assert abs(choice["standard_error"] - (share * (1 - share) / images_G.sum()) ** 0.5) > 1e-3
    assert f"over {len(hits_G)} groups" in " ".join(capsys.readouterr().out.split()).partition("chose the weights")[2]


def test_compare_tests_over_groups(recipe, tmp_path):
    runs = []
    for name, strength in (("weak", 1e-4), ("strong", 10.0)):
        changes = {**PROBE, "name": name, "probe": {**PROBE["probe"], "strengths": [strength]}}
        tlscale.run(recipe(name, changes, group_regex=REGEX), tmp_path / name)
        runs.append(str(tmp_path / name))
    found = tlscale.compare(runs, out=tmp_path / "compared")
    (pair,) = found["pairs"]
    assert (
        pair["num_groups"]
        == found["runs"][0]["num_groups"]
        == result(tmp_path / "weak")["top1_interval95_by"]["groups"]
    )
    assert "sign-flip tests over groups of images" in " ".join(found["notes"])
    assert "a bootstrap over groups of images" in found["notes"][0]


def test_a_run_drops_what_test_has_and_a_checked_plan_tells_of_it(recipe, tmp_path):
    scenes = put_scenes(tmp_path / "data" / "train", num_scenes=8, photos=3)
    test = put_scenes(tmp_path / "data" / "test", num_scenes=4, photos=2, seed=1)
    shutil.copyfile(scenes / "a" / sorted(path.name for path in (scenes / "a").iterdir())[0], test / "a" / "copy.png")
    path = {"path": str(tmp_path / "data")}
    recipe("plain", PROBE, **path)
    done = CliRunner().invoke(main, ["plan", str(tmp_path / "plain.yaml"), "--check-images"])
    assert done.exit_code == 0, done.output
    assert "LEAK: 1 of 9 images of test are, byte for byte, in validation too" in " ".join(done.output.split())
    figures = tlscale.run(recipe("dropped", PROBE, duplicates="drop", **path), tmp_path / "dropped")
    assert figures["duplicates"] == {"action": "drop", "in_two_splits": [], "num_dropped": {"train": 1}}
    assert figures["num_images"] == 9
    assert tlscale.evaluate(tmp_path / "dropped").top1 == figures.top1
    (tmp_path / "dropped" / "result.json").unlink()
    again = tlscale.run(recipe("dropped", PROBE, duplicates="drop", **path), tmp_path / "dropped", resume=True)
    assert again.top1 == figures.top1
    # What is in train has no part in the score: it is not read for it, and may be another image by now.
    (scenes / "a" / sorted(path.name for path in (scenes / "a").iterdir())[0]).write_bytes(b"gone")
    scored = tlscale.evaluate(tmp_path / "dropped")
    assert scored.top1 == figures.top1
    assert [note for note in scored["notes"] if "are not those" in note] == []
