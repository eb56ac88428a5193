"""Cross-validation as whole runs: each image is answered by models that did not see it, and all of it can go on."""

from __future__ import annotations

import json
import os
import shutil
import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

import tlscale
from tests.coins import chance, put_coins
from tests.recompute import assert_follows
from tests.scenes import put_scenes
from tests.small_runs import When, assert_same_bits, exported, lines, logged, result, small_recipe
from tlscale.cli import main
from tlscale.commands.plan import plan
from tlscale.commands.tables import show_result
from tlscale.errors import EXIT_STOPPED, DataError, RecipeError, ResumeError, Stopped
from tlscale.tracking.console import Console
from tlscale.training.earlier_images import compare_with_earlier
from tlscale.training.setup import set_up

RESNET = {"name": "test_resnet", "weights": "none"}
PROBE = {"backbone": RESNET, "probe": {"kind": "ridge", "strengths": [1.0, 0.01]}}
TRAINED = {
    "duration": "2 epochs",
    "batch_size": 12,
    "checkpoint": {"every": "1 steps"},
    "schedule": {"warmup": "0%"},
    "evaluate": {"every": "1 steps", "choose": "best"},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """48 images of 4 classes without a test split."""
    return put_coins(tmp_path_factory.mktemp("data") / "images.parquet", {"train": 48}, classes=tuple("abcd"))


def recipe_of(folder, images, name="small", folds=3, **changes):
    data = {"source": "manifest", "path": str(images), "validation_fraction": 0.2, **changes.pop("data", {})}
    evaluate = {"folds": folds, **changes.pop("evaluate", {})}
    return small_recipe(folder / f"{name}.yaml", images, name=name, data=data, evaluate=evaluate, **changes)


@pytest.fixture(scope="module")
def probed(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("probed")
    recipe = recipe_of(
        folder, images, folds=2, codes={"layer": ["layer1", "penultimate"]}, evaluate={"repeats": 2}, **PROBE
    )
    return tlscale.run(recipe, folder / "run").folder


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return tlscale.run(recipe_of(folder, images, folds=2, **TRAINED), folder / "run").folder


def test_every_image_is_answered_once_a_repeat_by_a_fold_that_held_it(probed):
    table = pq.read_table(probed / "predictions.parquet")
    assert table.num_rows == 2 * 48
    assert table["row"].to_pylist() == [*range(48)] * 2
    assert table["repeat"].to_pylist() == [1] * 48 + [2] * 48
    assert sorted(os.listdir(probed / "folds")) == ["1", "2", "3", "4", "all"]
    for number in range(1, 5):
        own = pq.read_table(probed / "folds" / str(number) / "predictions.parquet")
        here = table.filter(np.array(table["fold"].to_pylist()) == number)
        assert here.drop_columns(["fold", "repeat"]).equals(own)
        assert set(here["repeat"].to_pylist()) == {(number + 1) // 2}
    figures = result(probed)
    assert figures["num_images"] == 48
    hits = np.array(table["label"].to_pylist()) == np.array(table["true_label"].to_pylist())
    assert figures["top1"] == pytest.approx(hits.mean())
    low, high = figures["top1_interval95"]
    assert low < figures["top1"] < high
    assert figures["top1_interval95_by"] == {"images": 48}
    assert sum(row["num_images"] for row in figures["per_class"].values()) == 48
    assert np.sum(figures["confusion"]) == 96
    scores = figures["folds"]["scores"]
    assert [score["top1"] for score in scores] == [result(probed / "folds" / str(n))["top1"] for n in range(1, 5)]
    assert figures["folds"]["top1_mean"] == pytest.approx(np.mean([score["top1"] for score in scores]))


def test_codes_are_computed_once_for_all_folds(probed):
    computed = [result(probed / "folds" / name)["codes"]["num_computed"] for name in ("1", "2", "4", "all")]
    assert computed == [48, 0, 0, 0]
    assert result(probed)["codes"]["num_computed"] == 48


def test_what_is_chosen_is_chosen_within_the_fold(probed):
    for number in range(1, 5):
        run_info = json.loads((probed / "folds" / str(number) / "run.json").read_text())
        group = f"small-{json.loads((probed / 'run.json').read_text())['id']}"
        assert run_info["fold"] == {
            "num_folds": 2, "num_repeats": 2, "number": number, "share": 1.0, "group": group
        }  # fmt: skip
        sizes = run_info["data"]["num_images"]
        assert sizes["test"] == 24
        assert sizes["train"] + sizes["validation"] == 24
        assert result(probed / "folds" / str(number))["selected_on"] is None


def test_the_model_is_of_all_images_with_what_most_folds_chose(probed):
    last = result(probed / "folds" / "all")
    chosen = [result(probed / "folds" / str(number))["probe"] for number in range(1, 5)]
    layers = [probe["layer"] for probe in chosen]
    assert layers.count(last["probe"]["layer"]) == max(map(layers.count, layers))
    assert last["probe"]["num_images"] == 48
    assert last["split"] is None
    assert last["top1"] is None
    figures = result(probed)
    assert (figures["split"], figures["scored_model"], figures["exported_model"]) == ("folds", "folds", "fitted_on_all")
    assert_same_bits(exported(probed), exported(probed / "folds" / "all"))
    config = json.loads((probed / "model" / "config.json").read_text())["tlscale"]
    assert (config["fitted_on"], config["scored_on"]) == (["train"], "folds")
    assert tlscale.load(probed).classes == tuple("abcd")


def test_figures_follow_from_the_predictions(trained):
    assert_follows(result(trained), trained / "predictions.parquet")
    assert result(trained)["top1_interval95"] != result(trained)["folds"]


def test_training_is_as_long_as_the_median_of_the_folds(trained):
    scores = result(trained)["folds"]["scores"]
    share = np.median([score["chosen"]["step"] / score["chosen"]["of"] for score in scores])
    last = result(trained / "folds" / "all")
    assert share < 1
    assert last["steps"] == max(round(share * 2 * 4), 1)  # of 48 images in batches of 12
    assert result(trained)["steps"] == last["steps"]
    # The learning rates are those of the whole length.
    rates = [line["lr"] for line in lines(trained / "folds" / "all", "train")]
    assert rates == [pytest.approx(2e-3 * (1 + np.cos(np.pi * step / 8)) / 2) for step in range(last["steps"])]


def test_stopped_in_a_fold_and_resumed_it_ends_as_one_that_was_not(trained, images, tmp_path):
    recipe, out = recipe_of(tmp_path, images, folds=2, **TRAINED), tmp_path / "run"
    stop = When(logged(out / "folds" / "2", 2), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped) as caught, stop:
        tlscale.run(recipe, out)
    assert caught.value.exit_code == EXIT_STOPPED
    assert (out / "STOPPED").exists()
    assert not (out / "result.json").exists()
    first = (out / "folds" / "1" / "result.json").stat().st_mtime_ns
    begun = json.loads((out / "folds" / "2" / "run.json").read_text())["id"]
    (out / "STOP").touch()  # from before this start: of no effect
    tlscale.run(recipe, out, resume=True)
    assert (out / "folds" / "1" / "result.json").stat().st_mtime_ns == first
    assert json.loads((out / "folds" / "2" / "run.json").read_text())["id"] == begun
    assert (out / "predictions.parquet").read_bytes() == (trained / "predictions.parquet").read_bytes()
    assert_same_bits(exported(out), exported(trained))
    timed = ("wall_s", "seconds", "waiting_s", "images_per_s", "codes")
    same, other = ({k: v for k, v in result(folder).items() if k not in timed} for folder in (out, trained))
    assert same == other


@pytest.mark.slow
@pytest.mark.long  # seconds; with the whole it is resumed above
def test_a_fold_is_resumed_by_itself(trained, images, tmp_path):
    recipe, out = recipe_of(tmp_path, images, folds=2, **TRAINED), tmp_path / "run"
    with pytest.raises(Stopped), When(logged(out / "folds" / "1", 1), lambda: (out / "STOP").touch()):
        tlscale.run(recipe, out)
    alone = out / "folds" / "1"
    figures = tlscale.run(alone / "recipe.yaml", alone, resume=True)
    assert figures.top1 == result(trained / "folds" / "1")["top1"]
    assert sorted(os.listdir(out / "folds")) == ["1"]
    assert_same_bits(exported(alone), exported(trained / "folds" / "1"))


def test_a_complete_one_is_not_run_again_and_no_other_recipe_is(trained, images, tmp_path):
    recipe = recipe_of(trained.parent, images, folds=2, **TRAINED)
    before = (trained / "result.json").stat().st_mtime_ns
    assert tlscale.run(recipe, trained, resume=True)["top1"] == result(trained)["top1"]
    assert (trained / "result.json").stat().st_mtime_ns == before
    with pytest.raises(ResumeError, match=r"evaluate.folds: 2 -> 4"):
        tlscale.run(recipe.with_(**{"evaluate.folds": 4}), trained, resume=True)
    with pytest.raises(ResumeError, match=r"duration: '2 epochs' -> '4 epochs'"):
        tlscale.run(recipe.with_(duration="4 epochs"), trained, resume=True)


def test_labels_drawn_at_random_have_the_score_of_a_guesser(probed, trained):
    for run in (probed, trained):
        low, high = chance(48, 0.25, 2)
        assert low <= result(run)["top1"] <= high


@pytest.mark.slow
@pytest.mark.long  # eight runs of a real network; `test_group_runs.py` has the hold-out
def test_a_planted_leak_is_gone_with_groups(tmp_path):
    scenes = put_scenes(tmp_path / "scenes", num_scenes=12, photos=3)
    nearest = {"backbone": {"name": "resnet10t", "weights": "bundled"}, "probe": {"kind": "knn", "neighbours": [1]}}
    keys = {"source": "folder", "validation_fraction": 0.0}
    leaking = tlscale.run(recipe_of(tmp_path, scenes, "plain", data=keys, **nearest), tmp_path / "plain")
    keys["group_regex"] = r"scene\d+"
    honest = tlscale.run(recipe_of(tmp_path, scenes, "grouped", data=keys, **nearest), tmp_path / "grouped")
    assert leaking.top1 > 0.8
    assert honest.top1 < leaking.top1 - 0.2
    assert honest["top1_interval95_by"] == {"groups": 12}
    table = pq.read_table(tmp_path / "grouped" / "predictions.parquet")
    folds_of = set(zip(table["group"].to_pylist(), table["fold"].to_pylist(), strict=True))
    assert len(folds_of) == 12


def test_a_given_test_split_is_scored_once_by_the_model_of_all_images(tmp_path):
    data = put_coins(tmp_path / "images.parquet", {"train": 30, "validation": 20, "test": 20})
    recipe = recipe_of(tmp_path, data, folds=2, data={"validation_fraction": 0.1}, **PROBE)
    figures = tlscale.run(recipe, tmp_path / "run")
    assert (figures["split"], figures["num_images"]) == ("folds", 50)
    last = result(tmp_path / "run" / "folds" / "all")
    assert figures["test"]["num_images"] == last["num_images"] == 20
    assert figures["test"]["top1"] == last["top1"]
    assert "num_images" in figures["test"]
    assert json.loads((tmp_path / "run" / "folds" / "1" / "run.json").read_text())["data"]["num_images"]["test"] == 25
    again = tlscale.evaluate(tmp_path / "run")
    assert (again["split"], again["num_images"]) == ("test", 20)
    assert again.top1 == pytest.approx(last["top1"], abs=0.051)
    paths = pq.read_table(tmp_path / "run" / "predictions.parquet")["path"].to_pylist()
    assert len(set(paths)) == 50


def test_what_cannot_be_chosen_is_refused_before_anything_is_written(images, tmp_path):
    recipe = recipe_of(tmp_path, images, data={"validation_fraction": 0.0}, **PROBE)
    with pytest.raises(tlscale.TlscaleError, match="no held-out images to choose by"):
        tlscale.run(recipe, tmp_path / "run")
    with pytest.raises(DataError, match="60 is more than the 48 images"):
        tlscale.run(recipe_of(tmp_path, images, folds=60, **PROBE), tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_plan_says_what_the_folds_are_and_what_they_cost(trained, images, tmp_path):
    recipe_of(tmp_path, images, folds=2, **TRAINED)
    done = CliRunner().invoke(main, ["plan", str(tmp_path / "small.yaml"), "--json"])
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    runs = [json.loads((trained / "folds" / name / "run.json").read_text()) for name in ("1", "2", "all")]
    assert plan["data"]["images"] == runs[0]["data"]["num_images"]
    longest = 2 * 48 // 12  # what the model on all images may take
    steps = sum(run["total_steps"] for run in runs[:2]) + longest
    assert plan["folds"] == {"num_folds": 2, "num_repeats": 1, "images": 48, "runs": 3, "most_steps": steps}
    assert runs[2]["total_steps"] <= longest


def test_no_image_is_scored_by_a_model_that_started_from_one_that_was_fitted_to_it(probed, images, tmp_path):
    start = {**PROBE, "backbone": {"name": "test_resnet", "weights": f"run:{probed}"}}
    with pytest.raises(RecipeError, match="was fitted to 48 of 48 images of the folds") as caught:
        tlscale.run(recipe_of(tmp_path, images, **start), tmp_path / "run")
    assert caught.value.key == "backbone.weights"
    assert not (tmp_path / "run" / "run.json").exists()
    with pytest.raises(RecipeError, match="was fitted to"):
        plan(recipe_of(tmp_path, images, **start), world_size=1)
    with pytest.raises(RecipeError, match="was fitted to 48 of 48"):
        compare_with_earlier(
            set_up(recipe_of(tmp_path, shutil.copy(images, tmp_path / "c.parquet"), **start), world_size=1)
        )
    table = pq.read_table(put_coins(tmp_path / "others.parquet", {"train": 90}, classes=tuple("abcd")))
    known = set(pq.read_table(images)["image"].to_pylist())
    is_new = np.array([image not in known for image in table["image"].to_pylist()])
    pq.write_table(table.filter(is_new), tmp_path / "others.parquet")
    setup = set_up(recipe_of(tmp_path, tmp_path / "others.parquet", **start), world_size=1)
    compare_with_earlier(setup)
    assert not any("LEAK" in note or "told" in note for note in setup.data.notes)
    named = {**PROBE, "backbone": {"name": f"local-dir:{probed / 'model'}", "weights": "pretrained"}}
    with pytest.raises(RecipeError, match="was fitted to 48 of 48") as caught:
        compare_with_earlier(set_up(recipe_of(tmp_path, images, **named), world_size=1))
    assert caught.value.key == "backbone.name"
    alone = shutil.copytree(probed / "model", tmp_path / "alone" / "model")
    start["backbone"] = {"name": "test_resnet", "weights": f"run:{alone}"}
    with pytest.raises(RecipeError, match="cannot be told"):
        compare_with_earlier(set_up(recipe_of(tmp_path, images, **start), world_size=1))


def test_a_split_that_the_start_was_fitted_to_is_noted(probed, images, tmp_path):
    start = {**PROBE, "backbone": {"name": "test_resnet", "weights": f"run:{probed / 'folds' / 'all'}"}}
    setup = set_up(recipe_of(tmp_path, images, **start).with_(**{"evaluate.folds": None}), world_size=1)
    compare_with_earlier(setup)
    note = setup.data.notes[-1]
    assert "LEAK: 10 of 10 images of validation are among those that the run of backbone.weights was fitted to" in note


def test_copies_that_a_refitted_probe_was_fitted_to_are_a_leak(tmp_path):
    table = pq.read_table(put_coins(tmp_path / "coins.parquet", {"train": 16}))
    pq.write_table(pa.concat_tables([table, table]), tmp_path / "twice.parquet")
    keys = {**PROBE, "probe": {"kind": "ridge", "strengths": [1.0]}}
    recipe = recipe_of(tmp_path, tmp_path / "twice.parquet", folds=2, data={"validation_fraction": 0.5}, **keys)
    found = tlscale.run(recipe, tmp_path / "run")
    answers = pq.read_table(tmp_path / "run" / "predictions.parquet")
    fold_of = dict(zip(answers["row"].to_pylist(), answers["fold"].to_pylist(), strict=True))
    count = sum(fold_of[row] != fold_of[(row + 16) % 32] for row in range(32))
    assert count
    assert f"LEAK: {count} answers are on images that are, byte for byte" in found["notes"][-1]


def test_what_is_wrong_with_any_fold_is_found_before_a_run_is_replaced(trained, images, tmp_path):
    keys = {**TRAINED, "evaluate": {"choose": "best"}, "data": {"validation_fraction": 0.0}}
    before = sorted(os.listdir(trained))
    with pytest.raises(RecipeError, match="no validation split"):
        tlscale.run(recipe_of(tmp_path, images, folds=2, **keys), trained, overwrite=True)
    assert sorted(os.listdir(trained)) == before
    table = pq.read_table(images).slice(0, 47)
    pq.write_table(table, tmp_path / "fewer.parquet")
    keys = {"head": ["batchnorm", "linear"], "batch_size": 5, "duration": "1 epochs", "backbone": RESNET}
    keys["data"] = {"validation_fraction": 0.0}
    with pytest.raises(RecipeError, match="batch norm cannot be trained on one image"):
        tlscale.run(recipe_of(tmp_path, tmp_path / "fewer.parquet", **keys), tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.slow  # a run of its own, whose images are replaced
def test_no_part_is_taken_whose_images_are_others_by_now(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(16):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(path)
    keys = {**PROBE, "probe": {"kind": "ridge", "strengths": [1.0]}}
    data = {"source": "folder", "validation_fraction": 0.0, "on_bad_image": "skip"}
    recipe, out = recipe_of(tmp_path, tmp_path / "images", folds=2, data=data, **keys), tmp_path / "run"
    tlscale.run(recipe, out)
    (out / "result.json").unlink()
    good = path.read_bytes()
    path.write_bytes(good[:-9] + bytes(9))
    with pytest.raises(ResumeError, match=r"folds/1' is no part of .* images that it .* not those of today"):
        tlscale.run(recipe, out, resume=True)
    # One that cannot be read by now is one of the images all the same: not left out of the second fold alone.
    shutil.rmtree(out / "folds" / "1")
    shutil.rmtree(out / "folds" / "2")
    path.write_bytes(bytes(len(good)))
    with pytest.raises(tlscale.TlscaleError, match=path.name):
        tlscale.run(recipe, out, resume=True)
    path.write_bytes(good)
    assert tlscale.run(recipe, out, resume=True)["num_images"] == 16


def test_the_model_resumed_by_itself_is_shown_without_a_score(probed, trained, capsys):
    for run in (probed, trained):
        alone = run / "folds" / "all"
        show_result(result(alone), Console(), folder=alone, how_to_load="load()")
        assert "this model was fitted to all images of the folds" in " ".join(capsys.readouterr().out.split())


def test_commands_say_that_the_score_is_that_of_the_folds(probed, images):
    assert "scored by folds, fitted to all images" in repr(tlscale.load(probed))
    with pytest.raises(DataError, match="fitted to all images of the folds.* no image left to score it on"):
        tlscale.evaluate(probed)
    fold = tlscale.evaluate(probed / "folds" / "2")
    assert (fold["split"], fold["num_images"]) == ("test", 24)
    assert fold.top1 == pytest.approx(result(probed / "folds" / "2")["top1"], abs=0.05)
    others = tlscale.evaluate(probed, data=str(images))
    assert others["num_trained_on"] == 48


def test_comparisons_pair_images_over_repeats(probed, trained, images, tmp_path):
    weak = {**PROBE, "probe": {"kind": "ridge", "strengths": [1e-6]}}
    recipe = recipe_of(tmp_path, images, "weak", folds=2, evaluate={"repeats": 2}, **weak)
    tlscale.run(recipe, tmp_path / "weak")
    found = tlscale.compare([probed, tmp_path / "weak", probed / "folds" / "all"], out=tmp_path / "compared")
    (pair,) = found["pairs"]
    assert pair["num_images"] == 48
    one, two = (pq.read_table(run / "predictions.parquet") for run in (probed, tmp_path / "weak"))
    rights = [np.array(t["label"].to_pylist()) == np.array(t["true_label"].to_pylist()) for t in (one, two)]
    leads = [right.reshape(2, 48).sum(0) for right in rights]
    names = [os.path.basename(run["folder"]) for run in found["runs"]]
    ahead = dict(zip(names, ((leads[0] > leads[1]).sum(), (leads[1] > leads[0]).sum()), strict=True))
    of = {label: name for label in (pair["first"], pair["second"]) for name in names if label.endswith(name)}
    assert (pair["num_first_only"], pair["num_second_only"]) == tuple(ahead[of[label]] for label in of)
    assert any("the model of a cross-validation, and has no score" in note for note in found["notes"])
    assert any("Each image is answered by models of folds" in note for note in found["notes"])
    other = tlscale.compare([probed, trained])  # one answered each image twice
    assert [run["held_out_top1"] for run in other["runs"] if run["steps"]] == [None]
    assert other["pairs"] == []
    with pytest.raises(DataError, match="have other folds"):
        tlscale.compare([recipe, recipe.with_(name="other", **{"evaluate.folds": 3})], out=tmp_path / "other")


@pytest.mark.slow
@pytest.mark.long  # eight starts; each of the runs in it is killed elsewhere
def test_killed_again_and_again_it_ends_as_one_that_was_not(forks, images, tmp_path):
    recipe_of(tmp_path, images, folds=2, **PROBE)
    words = ("run", tmp_path / "small.yaml", "--resume", "--out")
    variables = {"TLSCALE_CACHE": str(tmp_path / "cache")}
    assert forks.run(*words, tmp_path / "whole", log=tmp_path / "log", **variables) == 0, (tmp_path / "log").read_text()
    out = tmp_path / "killed"
    # In the first fold, the second, the model of all images, and what is made of them.
    for fault in ("record", "record@2", "export", "result@2", "result@2", "predictions", "result"):
        ended = forks.run(*words, out, log=tmp_path / "log", TLSCALE_FAULT=fault, **variables)
        assert ended == -signal.SIGKILL, (fault, (tmp_path / "log").read_text()[-3000:])
        assert not (out / "result.json").exists()
    assert forks.run(*words, out, log=tmp_path / "log", **variables) == 0, (tmp_path / "log").read_text()
    assert (out / "predictions.parquet").read_bytes() == (tmp_path / "whole" / "predictions.parquet").read_bytes()
    assert_same_bits(exported(out), exported(tmp_path / "whole"))
    assert sorted(os.listdir(out)) == sorted(os.listdir(tmp_path / "whole"))
