"""Scored images that had a part in the run that another one starts or learns from, under other names."""

from __future__ import annotations

import json
import shutil

import pyarrow.parquet as pq
import pytest

import tlscale
from tests.small_runs import put_small_folder, result, small_recipe
from tlscale.commands.plan import plan
from tlscale.training.earlier_images import compare_with_earlier
from tlscale.training.setup import set_up

BRIEF = {"duration": "2 steps", "evaluate": {"every": "1 steps"}}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """A run on 60 images, its data, the 12 images that were held out to choose its step, and the others."""
    folder = tmp_path_factory.mktemp("earlier")
    data = put_small_folder(folder / "data", test=10) / "train"
    run = tlscale.run(small_recipe(folder / "r.yaml", data, data={"source": "folder"}, **BRIEF), folder / "run").folder
    held = [data / path for path in pq.read_table(run / "predictions.parquet")["path"].to_pylist()]
    return run, data, held, [path for path in sorted(data.rglob("*.png")) if path not in held]


@pytest.fixture
def put(tmp_path):
    """Write a data set whose images are new, but for copies of some files under other names in one split."""
    new = sorted((put_small_folder(tmp_path / "unseen", train=90, test=44) / "test").rglob("*.png"))

    def write(files, split="test"):
        for number, file in enumerate(new):
            copy = tmp_path / "data" / ("test" if number % 11 == 0 else "train") / file.parent.name / f"{number}.png"
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
        for number, file in enumerate(files):
            copy = tmp_path / "data" / split / file.parent.name / f"copy{number}.png"
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
        return tmp_path / "data"

    return write


def starting(tmp_path, place, run, **changes):
    changes = {"backbone": {"weights": f"run:{run}"}, **BRIEF, **changes}
    return small_recipe(tmp_path / "new.yaml", place, data={"source": "folder"}, **changes)


def compared(recipe, **keys):
    setup = set_up(recipe, world_size=1)
    compare_with_earlier(setup, **keys)
    return setup


def counts(num_trained_on, num_selected_on, key="backbone.weights", scored="test"):
    return {"key": key, "scored": scored, "num_trained_on": num_trained_on, "num_selected_on": num_selected_on}


def test_copies_of_images_that_the_start_was_fitted_to_are_a_leak(earlier, put, tmp_path, capsys):
    run, data, _, fitted = earlier
    figures = tlscale.run(starting(tmp_path, put(fitted[:9]), run), tmp_path / "run")
    assert (figures["earlier_runs"], figures["selected_on"]) == ([counts(9, 0)], None)
    leak = "LEAK: 9 of 13 images of test are among those that the run of backbone.weights was fitted to"
    assert f"{leak}: figures on test are too good" in figures["notes"]
    again = tlscale.evaluate(tmp_path / "run")
    assert again["earlier_runs"] == figures["earlier_runs"]
    assert any(leak in note for note in again["notes"])
    on_theirs = tlscale.evaluate(tmp_path / "run", data=str(data))
    assert (on_theirs["num_trained_on"], on_theirs["earlier_runs"]) == (0, [counts(48, 12, scored="all")])
    assert "LEAK: 12 of these 60 images chose" in on_theirs["notes"][-1]
    assert "(too good: some of them had a part in the model)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("key", ["backbone.weights", "distill.run"])
def test_copies_of_images_that_chose_the_start_are_counted(key, earlier, put, tmp_path, capsys):
    run, _, held, _ = earlier
    place = put(held[:7])
    learns = {"backbone": {"weights": "none"}, "distill": {"run": str(run), "codes": 0, "logits": 1}}
    recipe = starting(tmp_path, place, run, **(learns if key == "distill.run" else {}))
    note = f"LEAK: 7 of 11 images of test chose the weights of the run of {key}: figures on test are too good"
    setup = compared(recipe)
    assert [one.to_plain() for one in setup.earlier] == [counts(0, 7, key)]
    assert note in setup.data.notes
    if key == "distill.run":
        return
    plan(recipe, world_size=1, as_json=True, checks_images=True)
    planned = json.loads(capsys.readouterr().out)
    assert planned["earlier_runs"] == [counts(0, 7)]
    assert note in planned["notes"]
    figures = tlscale.run(recipe, tmp_path / "run")
    assert (figures["earlier_runs"], figures["selected_on"]) == ([counts(0, 7)], "earlier_run")
    assert note in figures["notes"]
    assert note in " ".join(capsys.readouterr().out.split())
    # What starts from that run starts from the one before as well.
    assert compared(starting(tmp_path, place, tmp_path / "run")).earlier[0].num_chose == 7


def test_folds_tell_how_many_of_their_images_chose_the_start(earlier, put, tmp_path):
    run, _, held, _ = earlier
    place = put(held[:7], "train")
    shutil.rmtree(place / "test")
    figures = tlscale.run(starting(tmp_path, place, run, evaluate={"folds": 2}), tmp_path / "run")
    assert (figures["earlier_runs"], figures["selected_on"]) == ([counts(0, 7, scored="folds")], "earlier_run")
    assert any("LEAK: 7 of 47 images of folds chose the weights" in note for note in figures["notes"])
    parts = [result(tmp_path / "run" / "folds" / name)["earlier_runs"][0] for name in "12"]
    assert [part["scored"] for part in parts] == ["test", "test"]
    assert sum(part["num_selected_on"] for part in parts) == 7


def test_a_run_of_an_older_version_is_compared_and_that_is_said(earlier, put, tmp_path):
    run = shutil.copytree(earlier[0], tmp_path / "older")
    info = json.loads((run / "run.json").read_text())
    for key in ("used_sha256", "used_by", "scored_sha256", "scored_by"):
        del info["data"][key]
    (run / "run.json").write_text(json.dumps(info))
    setup = compared(starting(tmp_path, put(earlier[3][:9]), run))
    assert (setup.earlier[0].num_fitted, setup.earlier[0].problems) == (9, ())
    assert "an older tlscale made it and noted no contents" in setup.data.notes[-1]


def test_images_that_were_replaced_or_are_gone_make_it_uncertain(earlier, put, tmp_path):
    run, data = shutil.copytree(earlier[0], tmp_path / "earlier"), shutil.copytree(earlier[1], tmp_path / "theirs")
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace(str(earlier[1]), str(data)))
    place = put([])
    assert compared(starting(tmp_path, place, run)).earlier[0].to_plain() == counts(0, 0)
    (data / earlier[3][0].relative_to(earlier[1])).write_bytes(b"another")
    (found,) = compared(starting(tmp_path, place, run)).earlier
    assert found.to_plain() == counts(None, None)
    assert "some of its images are not those that it was fitted to" in found.problems[0]
    shutil.rmtree(data)
    setup = compared(starting(tmp_path, place, run))
    assert setup.earlier[0].to_plain() == counts(None, None)
    assert "cannot be told" in setup.data.notes[-1]
