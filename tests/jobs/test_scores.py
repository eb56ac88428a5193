"""What a run says of its score: whose it is, what the scored images chose, and the predictions that it follows from."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

import tlscale
from tests.coins import put_coins
from tests.older_runs import put_older_runs
from tests.recompute import assert_follows
from tests.small_runs import put_small_folder, put_small_idx, put_teacher, result, small_recipe
from tlscale.codes.probes.kinds import PROBE_KINDS
from tlscale.commands.compare_outcomes import finished
from tlscale.commands.compare_report import table, to_rows
from tlscale.commands.evaluate import evaluate_run
from tlscale.commands.paired_tests import paired_tests
from tlscale.storage.run_folder import RunFolder
from tlscale.training.setup import set_up

RESNET = {"name": "test_resnet"}
BY_HEART = {"logistic": [1e-3], "ridge": [1e-3], "sklearn": [1e-3], "knn": None}
TRAINED = {"duration": "2 epochs", "freeze": ".*", "optim": {"lr": 0.1}}


@pytest.fixture(scope="module")
def coins(tmp_path_factory):
    """240 coin flips and no test split."""
    return put_coins(tmp_path_factory.mktemp("coins") / "coins.parquet", {"train": 240})


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return put_teacher(tmp_path_factory.mktemp("weights") / "weights.safetensors", in_chans=1)


@pytest.fixture
def run(tmp_path, coins, weights):
    def go(name="run", place=coins, source="manifest", **changes):
        data = {"source": source, "path": str(place), "validation_fraction": 0.5, **changes.pop("data", {})}
        backbone = {**RESNET, "weights": str(weights)}
        tlscale.run(
            small_recipe(tmp_path / f"{name}.yaml", place, data=data, backbone=backbone, **changes), tmp_path / name
        )
        return tmp_path / name

    return go


def config_of(out):
    return json.loads((out / "model" / "config.json").read_text())["tlscale"]


# -- a probe that is fitted again -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PROBE_KINDS)
def test_the_score_is_of_a_classifier_that_never_saw_the_scored_images(kind, run, capsys):
    """Coin flips; fitted to all images, these probes know them by heart."""
    setting = {"neighbours": [1]} if kind == "knn" else {"strengths": BY_HEART[kind]}
    probe = {"kind": kind, **setting}
    refitted, kept = run("refitted", probe=probe), run("kept", probe={**probe, "refit": False})
    figures, plain = result(refitted), result(kept)
    assert figures["top1"] == plain["top1"] < 0.65
    assert figures["confusion"] == plain["confusion"]
    assert figures["top1"] == figures["probe"]["held_out_top1"]
    assert figures["loss"] == pytest.approx(figures["probe"]["held_out_loss"], rel=1e-3)
    same = ("path", "row", "true_label", "label", "probability", "true_probability", "logits")
    tables = [pq.read_table(out / "predictions.parquet", columns=list(same)) for out in (refitted, kept)]
    assert tables[0].equals(tables[1])
    # The exported one is another, and does know them.
    assert (figures["probe"]["refitted"], plain["probe"]["refitted"]) == (True, False)
    assert (figures["scored_model"], plain["scored_model"]) == ("before_refit", "exported")
    assert figures["exported_model"] == "refitted_on_train_and_validation"
    assert plain["exported_model"] == "fitted_on_train"
    assert figures["selected_on"] is plain["selected_on"] is None  # one layer, one setting
    assert (config_of(refitted)["fitted_on"], config_of(refitted)["scored_on"]) == (["train", "validation"], None)
    assert (config_of(kept)["fitted_on"], config_of(kept)["scored_on"]) == (["train"], "validation")
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("has no score of its own") == 1
    assert said.count("against 0.5000 for always saying 'heads'") == 2
    assert "selected on validation" not in said


def test_images_that_chose_are_named_beside_the_score(run, capsys):
    for name, changes in {
        "strength": {"probe": {"kind": "ridge"}},
        "layer": {"probe": {"kind": "ridge", "strengths": [1.0]}, "codes": {"layer": ["layer2", "layer3"]}},
        "step": TRAINED,
    }.items():
        assert result(run(name, **changes))["selected_on"] == "validation", name
        assert "selected on validation: without a test split" in " ".join(capsys.readouterr().out.split())
    # One evaluation, at the end, chooses nothing.
    assert result(run("end", **TRAINED, evaluate={"every": "2 epochs"}))["selected_on"] is None
    assert "selected on" not in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{"probe": {"kind": "ridge"}}, TRAINED], ids=["probe", "training"])
def test_with_a_test_split_the_exported_model_has_the_score(changes, run, tmp_path):
    idx = put_small_idx(tmp_path / "idx")
    out = run(place=idx, source="idx", data={"validation_fraction": 0.2}, **changes)
    figures = result(out)
    assert (figures["split"], figures["scored_model"], figures["selected_on"]) == ("test", "exported", None)
    assert config_of(out)["scored_on"] == "test"
    if "probe" in changes:
        assert figures["exported_model"] == "refitted_on_train_and_validation"
        assert config_of(out)["fitted_on"] == ["train", "validation"]
    # That model, on these images, gives these answers.
    trained = tlscale.load(out)
    table = pq.read_table(out / "predictions.parquet")
    assert list(trained.classes) == json.loads(table.schema.metadata[b"tlscale"])["classes"]
    assert evaluate_run(out)["confusion"] == figures["confusion"]


# -- predictions ------------------------------------------------------------------------------------------------------

RUNS = {
    "probe on test": {"probe": {"kind": "logistic", "strengths": [0.1]}},
    "knn on validation": {"probe": {"kind": "knn"}},
    "head on codes": TRAINED,
    "bf16": {"duration": "2 epochs", "compute": {"precision": "bf16"}},
    "fp64, averages": {"duration": "2 epochs", "compute": {"precision": "fp64"}, "optim": {"ema_decay": 0.5}},
}


@pytest.mark.parametrize("name", RUNS)
def test_the_scored_figures_follow_from_the_predictions_alone(name, run, tmp_path):
    folder = put_small_folder(tmp_path / "data", test=30)
    if "validation" in name:
        (tmp_path / "data" / "test").rename(tmp_path / "other")
    out = run(place=folder, source="folder", data={"validation_fraction": 0.3, "image_size": 32}, **RUNS[name])
    figures = result(out)
    assert_follows(figures, out / "predictions.parquet", rel=1e-5)
    table = pq.read_table(out / "predictions.parquet")
    paths = table["path"].to_pylist()
    split = "test" if figures["split"] == "test" else "train"
    assert all((folder / path).is_file() and path.startswith(f"{split}/") for path in paths)
    assert len(set(paths)) == len(paths) == figures["num_images"]
    assert [path.split("/")[1] for path in paths] == table["true_label"].to_pylist()
    assert table["row"].to_pylist() == sorted(table["row"].to_pylist())
    wide = str(table.schema.field("logits").type.value_type)
    assert wide == ("double" if "fp64" in name else "float")
    written = [(out / file).stat().st_mtime_ns for file in ("predictions.parquet", "result.json")]
    assert written == sorted(written)


def test_predictions_are_of_the_weights_that_are_exported(run, tmp_path):
    """The last step is far worse than the best: a learning rate that only rises."""
    idx = put_small_idx(tmp_path / "idx")
    changes = {"duration": "4 epochs", "optim": {"lr": 3.0, "name": "sgd"}, "schedule": {"warmup": "100%"}}
    changes["evaluate"] = {"select": "loss"}
    out = run(place=idx, source="idx", data={"validation_fraction": 0.2}, **changes)
    figures = result(out)
    assert figures["best"]["step"] != figures["last"]["step"]
    assert figures["best"]["loss"] != figures["last"]["loss"]
    assert_follows(figures, out / "predictions.parquet", rel=1e-5)


def test_the_majority_class_is_that_of_training(run, tmp_path):
    manifest = tmp_path / "m.parquet"
    table = pq.read_table(put_coins(manifest, {"train": 60, "validation": 20, "test": 30}))
    labels, splits = table["label"].to_pylist(), np.array(table["split"].to_pylist())
    of_train, of_test = np.flatnonzero(splits == "train"), np.flatnonzero(splits == "test")
    for place in of_train:
        labels[place] = "tails" if place % 3 else "heads"
    for place in of_test:
        labels[place] = "heads" if place % 5 else "tails"
    pq.write_table(table.set_column(1, "label", [labels]), manifest)
    out = run(place=manifest, data={"validation_fraction": 0.1}, probe={"kind": "ridge"})
    share = np.mean([labels[place] == "tails" for place in of_test])
    assert result(out)["majority"] == {"label": "tails", "top1": pytest.approx(share)}
    assert share < 0.5


# -- runs of an older version -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_test", [True, False])
@pytest.mark.parametrize("changes", [{"probe": {"kind": "ridge"}}, {"duration": "1 epochs"}], ids=str)
def test_copies_of_training_images_among_the_scored_are_counted(changes, has_test, tmp_path, capsys):
    """Files of other names, inodes and times, which no list of files can tell."""
    data = put_small_folder(tmp_path / "data")
    copied = sorted((data / "train").rglob("*.png"))[::3]
    for path in copied:
        shutil.copyfile(path, path.parent / f"again_{path.name}")
    if has_test:
        for path in copied[:4]:
            (data / "test" / path.parent.name).mkdir(exist_ok=True)
            shutil.copyfile(path, data / "test" / path.parent.name / f"copy_{path.name}")
    else:
        shutil.rmtree(data / "test")
    section = {"source": "folder", "validation_fraction": 0.5}
    recipe = small_recipe(tmp_path / "r.yaml", data, data=section, **changes)
    tlscale.run(recipe, tmp_path / "run")
    notes = [note for note in result(tmp_path / "run")["notes"] if note.startswith("LEAK")]
    setup = set_up(recipe, world_size=1)
    splits = [split for split in (setup.data.train, setup.data.validation, setup.data.test) if split is not None]
    held = {split.name: [split.read(at) for at in range(len(split))] for split in splits}
    scored = splits[-1].name
    said = []
    for other in held:
        if count := sum(raw in held[other] for raw in held[scored]) * (other != scored):
            said.append(f"LEAK: {count} of {len(held[scored])} images of {scored} are, byte for byte, in {other} too")
    assert [note.split(":", 2)[1] for note in notes] == [text.split(":")[1] for text in said]
    assert notes
    shown = " ".join(capsys.readouterr().out.split())
    assert all(note in shown for note in notes)
    told = {tuple(row["splits"]): row for row in result(tmp_path / "run")["duplicates"]["in_two_splits"]}
    assert told[scored, "train"]["num_images"] == sum(raw in held["train"] for raw in held[scored])
    for row in told.values():
        one, other = (data / path for path in row["examples"][0])
        assert one.read_bytes() == other.read_bytes()
    if has_test:  # copies among the images of train that a hold-out divides are told of, too
        crossing = sum(raw in held["train"] for raw in held["validation"])
        assert told["validation", "train"]["num_images"] == crossing > 0
        assert f"DUPLICATES: {crossing} of {len(held['validation'])} images of validation" in shown


def test_older_runs_are_compared_by_the_score_before_the_refit_and_without_a_test(tmp_path):
    folder = put_older_runs(tmp_path / "older") / "runs"
    old, record = result(folder / "probe_no_test"), json.loads((folder / "probe_no_test" / "run.json").read_text())
    assert old["probe"]["num_images"] > record["data"]["num_images"]["train"]
    assert "scored_model" not in old, "it was scored on what it was fitted to"
    found = finished("codes", 100, 0, RunFolder(folder / "probe_no_test"), old)
    assert (found.top1, found.scored_model) == (old["probe"]["held_out_top1"], "before_refit")
    other = finished("other", 100, 0, RunFolder(folder / "probe_no_test"), old)
    pairs = paired_tests(to_rows([found, other]))
    assert pairs == []
    assert [row[4] for row in table([found, other], pairs)] == ["best", "+0.0 points, no paired test"]
