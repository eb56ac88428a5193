"""`tlscale evaluate`: the figures of a finished run again, on its own data and on other."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

import tlscale
from tests.small_runs import put_small_folder, put_small_idx, result, small_recipe
from tlscale.cli import main
from tlscale.training.predictions import read_predictions

PROBE = {"kind": "ridge", "strengths": [1.0]}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    idx = put_small_idx(folder / "idx")
    tlscale.run(small_recipe(folder / "recipe.yaml", idx, loss={"label_smoothing": 0.1}), folder / "run")
    return folder / "run"


def put_images(place, train=60, test=20):
    """Images in class folders, of a training and a test split."""
    return put_small_folder(place, train, test)


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """A probe on a folder of images: 60 of training (a fifth of them held out), 20 of test; `refit` is on."""
    folder = tmp_path_factory.mktemp("probed")
    data = put_images(folder / "data")
    recipe = small_recipe(folder / "recipe.yaml", data, data={"source": "folder"}, probe=PROBE)
    tlscale.run(recipe, folder / "run")
    return folder / "run", data


@pytest.fixture
def probe_without_test(tmp_path):
    """Runs a probe on images without a test split; gives its run folder and its data."""

    def make(**changes):
        data = put_images(tmp_path / "data")
        shutil.rmtree(data / "test")
        recipe = small_recipe(tmp_path / "recipe.yaml", data, data={"source": "folder"}, probe={**PROBE, **changes})
        tlscale.run(recipe, tmp_path / "run")
        return tmp_path / "run", data

    return make


def invoke(*words):
    return CliRunner().invoke(main, ["evaluate", *map(str, words)])


def figures_of(*words):
    done = invoke(*words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_it_gives_the_figures_of_the_run(run_folder):
    before = (run_folder / "result.json").read_bytes()
    figures = figures_of(run_folder)
    expected = result(run_folder)
    for key in ("split", "num_images", "top1", "top5", "confusion", "per_class"):
        assert figures[key] == expected[key], key
    assert json.loads((run_folder / "evaluations/test/figures.json").read_text()) == figures
    assert "selected_on" not in figures
    assert (run_folder / "result.json").read_bytes() == before


def test_it_has_predictions_and_the_most_frequent_class_as_a_run_has(run_folder, tmp_path):
    figures = figures_of(run_folder, "--out", tmp_path)
    own, again = (read_predictions(folder / "predictions.parquet") for folder in (run_folder, tmp_path))
    assert again.drop(["logits"]).equals(own.drop(["logits"]))
    assert np.allclose(*(table["logits"].combine_chunks().flatten().to_numpy() for table in (own, again)), atol=1e-5)
    assert figures["majority"] == result(run_folder)["majority"]
    label, share = figures["majority"]["label"], figures["majority"]["top1"]
    assert f"against {share:.4f} for always saying '{label}'" in invoke(run_folder, "--out", tmp_path).stdout


def test_the_most_frequent_class_of_other_data_is_that_of_training(probed, tmp_path):
    run, data = probed
    written = result(run)
    figures = figures_of(run, *folder_of_one_class(data, tmp_path))
    label = written["majority"]["label"]
    assert figures["majority"] == {"label": label, "top1": float(label == "Coat")}
    assert len(read_predictions(run / "evaluations" / "new" / "predictions.parquet")) == figures["num_images"]
    del written["majority"]  # as an older run
    (tmp_path / "older").mkdir()
    older = shutil.copytree(run, tmp_path / "older" / "run")
    (older / "result.json").write_text(json.dumps(written))
    assert figures_of(older, f"data.path={tmp_path / 'new'}")["majority"] == figures["majority"]


def test_tables_are_printed_without_json_and_a_validation_split_is_marked(run_folder):
    done = invoke(run_folder, "--split", "validation")
    assert done.exit_code == 0, done.output
    assert "validation images (they chose the model): top1" in done.stdout
    figures = json.loads((run_folder / "evaluations/validation/figures.json").read_text())
    assert figures["selected_on"] == "validation"


def test_the_classes_are_those_of_the_model_whatever_order_other_data_would_give_them(tmp_path):
    folder, copy = put_small_folder(tmp_path / "folder"), put_small_folder(tmp_path / "copy")
    classes = sorted((path.name for path in (folder / "train").iterdir()), reverse=True)
    data = {"source": "folder", "classes": classes}
    tlscale.run(small_recipe(tmp_path / "recipe.yaml", folder, data=data), tmp_path / "run")
    figures = figures_of(tmp_path / "run", f"data.path={copy}")
    assert figures["confusion"] == result(tmp_path / "run")["confusion"]
    assert (figures["split"], figures["num_trained_on"]) == ("test", 0)


def flat_folder(data, place):
    """All 60 training images and nothing else: a folder per class, no splits."""
    shutil.copytree(data / "train", place / "new")
    return [f"--data={place / 'new'}"]


def csv_without_splits(data, place):
    rows = [f"{image},{image.parent.name}" for image in sorted((data / "train").rglob("*.png"))]
    (place / "new.csv").write_text("\n".join(["path,label", *rows]))
    return ["--data", place / "new.csv"]


def folder_of_train_and_validation(data, place):
    shutil.copytree(data / "train", place / "new" / "train")
    shutil.copytree(data / "test", place / "new" / "val")
    return ["data.source=folder", f"data.path={place / 'new'}"]


def folder_of_one_class(data, place):
    shutil.copytree(data / "train" / "Coat", place / "new" / "Coat")
    return [f"data.path={place / 'new'}", "data.validation_fraction=0"]


@pytest.mark.parametrize(
    ("put", "num_images", "num_trained_on"),
    [
        (flat_folder, 60, 60),
        (csv_without_splits, 60, 60),
        (folder_of_train_and_validation, 80, 60),
        (folder_of_one_class, 7, 7),
    ],
)
def test_other_data_without_a_test_split_are_scored_whole(probed, tmp_path, put, num_images, num_trained_on):
    """And how many of them the (refitted) probe was fitted on is known by content, whatever the files are called."""
    run, data = probed
    figures = figures_of(run, *put(data, tmp_path))
    assert (figures["split"], figures["num_images"]) == ("all", num_images)
    assert figures["num_trained_on"] == num_trained_on
    assert sum(map(sum, figures["confusion"])) == num_images


@pytest.mark.parametrize("other", [(), ("train",), ("val",)])
def test_a_test_split_of_other_data_is_what_is_scored(probed, tmp_path, other):
    run, data = probed
    shutil.copytree(data / "test", tmp_path / "new" / "test")
    for name in other:
        shutil.copytree(data / "train", tmp_path / "new" / name)
    figures = figures_of(run, "--data", tmp_path / "new")
    assert (figures["split"], figures["num_images"], figures["num_trained_on"]) == ("test", 20, 0)
    assert figures["confusion"] == result(run)["confusion"]


def test_images_that_only_chose_are_counted_apart(probe_without_test, tmp_path):
    run, data = probe_without_test(refit=False)
    shutil.copytree(data / "train", tmp_path / "copy")
    for number, image in enumerate(sorted((tmp_path / "copy").rglob("*.png"))):
        image.rename(image.with_name(f"{1000 - number}.png"))
    figures = figures_of(run, "--data", tmp_path / "copy")
    num_images = json.loads((run / "run.json").read_text())["data"]["num_images"]
    assert figures["num_trained_on"] == num_images["train"]
    assert figures["num_selected_on"] == num_images["validation"] == 12


def test_where_the_training_images_are_gone_it_says_so(probe_without_test, tmp_path):
    run, data = probe_without_test()
    data.rename(tmp_path / "moved")
    done = invoke(run, "--data", tmp_path / "moved", "--json")
    assert json.loads(done.stdout)["num_trained_on"] is None
    assert "cannot be told" in done.stderr
    noted = json.loads(done.stdout)["notes"]
    assert any("cannot be told" in note for note in noted)
    assert str(tmp_path) in done.stderr
    assert str(tmp_path) not in json.dumps(noted)


def test_a_refitted_probe_has_no_score_of_its_own(probe_without_test):
    run, _ = probe_without_test()
    (run / "result.json").unlink()  # whose `probe.refitted` says it in newer runs
    for words in ([], ["--split", "validation"]):
        done = invoke(run, *words)
        assert done.exit_code == 2
        assert "--data DATA" in done.stderr
    assert not (run / "evaluations").exists()


def test_result_json_says_whether_the_probe_was_refitted(probe_without_test):
    run, _ = probe_without_test()
    written = result(run)
    written["probe"]["refitted"] = False
    (run / "result.json").write_text(json.dumps(written))
    assert figures_of(run)["selected_on"] == "validation"


def test_a_probe_that_was_not_refitted_is_scored_on_what_chose_it(probe_without_test):
    run, _ = probe_without_test(refit=False)
    assert figures_of(run)["selected_on"] == "validation"


def test_a_hold_out_of_changed_data_is_not_drawn_again(probe_without_test):
    run, data = probe_without_test(refit=False)
    shutil.copy(next((data / "train" / "Coat").iterdir()), data / "train" / "Coat" / "another.png")
    done = invoke(run)
    assert done.exit_code == 2
    assert "not those that it was trained on" in done.stderr


def test_labels_that_the_model_does_not_know_are_named(probed, tmp_path):
    run, data = probed
    shutil.copytree(data / "train" / "Coat", tmp_path / "new" / "Raincoat")
    done = invoke(run, "--data", tmp_path / "new")
    assert done.exit_code == 2
    assert "'Raincoat'" in done.stderr


@pytest.mark.parametrize(
    "change",
    [
        "seed=0",
        "data.image_size=96",
        "data.crop_pct=0.5",
        "data.mean=[0.9]",
        "data.interpolation=nearest",
        "data.classes=null",
        "data.augment=[flip]",
        "data.train_limit=3",
        "data.validation_fraction=0",
        "backbone.name=resnet50",
        "loss.class_weights.Coat=3",
        "optim.lr=1",
        "batch_size=3",
        "compute.compile=true",
        "data={image_size: 96}",
    ],
)
def test_what_has_no_effect_exits_2(run_folder, change):
    done = invoke(run_folder, change)
    assert done.exit_code == 2
    assert f"{change.partition('=')[0]}: no effect" in done.stderr


@pytest.mark.parametrize(
    "change", ["evaluate.batch_size=5", "compute.threads=1", "data.cache_mib=0", "data.max_megapixels=1"]
)
def test_what_says_how_it_is_computed_is_taken(run_folder, change):
    assert figures_of(run_folder, change)["confusion"] == result(run_folder)["confusion"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--split", "train", "data.path=nowhere"], "nowhere"),
        (["--data", "nowhere"], "does not exist"),
        (["--data", __file__], "neither a folder nor a table"),
        (["--data", ".", "data.path=there"], "Give one of them"),
        (["--name", "../run"], "--name"),
        (["data.pth=there"], "Did you mean 'path'"),
    ],
)
def test_what_is_not_there_exits_2(run_folder, words, message):
    done = invoke(run_folder, *words)
    assert done.exit_code == 2
    assert message in done.stderr


def test_splits_that_are_named_have_to_be_there(probed, tmp_path):
    run, data = probed
    done = invoke(run, *flat_folder(data, tmp_path), "data.test_split=later")
    assert done.exit_code == 2
    assert "'later'" in done.stderr


def test_a_folder_that_is_no_run_exits_2(tmp_path):
    done = invoke(tmp_path)
    assert done.exit_code == 2
    assert "is not a run folder" in done.stderr


def test_each_data_has_a_folder_of_its_own(probed, tmp_path):
    run, data = probed
    before = sorted(path.name for path in run.iterdir() if path.name != "evaluations")
    words = flat_folder(data, tmp_path)
    (tmp_path / "other").mkdir()
    others = flat_folder(data, tmp_path / "other")
    shutil.rmtree(run / "evaluations", ignore_errors=True)
    for each in (words, others, words):  # the last replaces its own
        figures_of(run, *each)
    names = sorted(path.name for path in (run / "evaluations").iterdir())
    assert len(names) == 2
    assert names[0] == "new"
    assert re.fullmatch("new-[0-9a-f]{12}", names[1])
    figures_of(run, *words, "--name", "spring")
    assert (run / "evaluations" / "spring" / "figures.json").is_file()
    assert sorted(path.name for path in run.iterdir() if path.name != "evaluations") == before


def test_out_writes_elsewhere_and_into_no_run(run_folder, tmp_path):
    figures = figures_of(run_folder, "--out", tmp_path / "there")
    assert json.loads((tmp_path / "there" / "figures.json").read_text()) == figures
    assert invoke(run_folder, "--out", run_folder).exit_code == 2
    (tmp_path / "there" / "figures.json").write_text("{}")
    assert invoke(run_folder, "--out", tmp_path / "there").exit_code == 2
    assert (tmp_path / "there" / "figures.json").read_text() == "{}"


def test_figures_that_cannot_be_written_are_shown(run_folder, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy, ignore=shutil.ignore_patterns("evaluations", "checkpoints"))
    (copy / "evaluations").write_text("in the way, for root can write anywhere")
    done = invoke(copy)
    assert done.exit_code == 0, done.output
    assert "37 test images: top1" in done.stdout
    assert "could not be written" in done.stderr


def test_an_unreadable_image_is_an_error_or_skipped_and_counted(probed, tmp_path):
    run, data = probed
    words = flat_folder(data, tmp_path)
    next((tmp_path / "new" / "Coat").iterdir()).write_bytes(b"no image")
    assert invoke(run, *words).exit_code == 2
    figures = figures_of(run, *words, "data.on_bad_image=skip")
    assert (figures["num_images"], figures["num_bad_images"], figures["num_trained_on"]) == (59, 1, 59)


def test_whole_numbers_stand_for_the_classes_in_order(probed, tmp_path):
    run, data = probed
    classes = json.loads((run / "model" / "config.json").read_text())["tlscale"]["classes"]
    rows = [f"{image},{classes.index(image.parent.name)}" for image in sorted((data / "test").rglob("*.png"))]
    (tmp_path / "numbers.csv").write_text("\n".join(["path,label", *rows]))
    done = invoke(run, "--data", tmp_path / "numbers.csv", "--json")
    assert json.loads(done.stdout)["confusion"] == result(run)["confusion"]
    assert "places in the model's list of classes" in done.stderr


def test_the_examples_of_the_help_run(probed, tmp_path, monkeypatch):
    run, data = probed
    shutil.copytree(run, tmp_path / "runs" / "photos")
    shutil.copytree(data / "test", tmp_path / "more_photos")
    monkeypatch.chdir(tmp_path)
    text = CliRunner().invoke(main, ["evaluate", "--help"]).output
    examples = re.findall(r"^ +tlscale evaluate (runs.*)$", text, re.MULTILINE)
    assert len(examples) == 2
    for example in examples:
        done = invoke(*example.split())
        assert done.exit_code == 0, done.output
