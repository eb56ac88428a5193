"""Several labels an image, cross-validated: every image by a model and thresholds that did not see it."""

from __future__ import annotations

import json
import os
import shutil
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from sklearn.metrics import average_precision_score, f1_score

import tlscale
from tests.garments import CLASSES, SEVERAL, put_garments
from tests.small_runs import When, assert_same_bits, exported, logged, result, small_recipe
from tlscale.cli import main
from tlscale.commands.tables import show_result
from tlscale.errors import DataError, Stopped
from tlscale.tracking.console import Console

KEYS = {**SEVERAL, "validation_fraction": 0.3}
PROBE = {"backbone": {"name": "test_resnet", "weights": "none"}, "probe": {"kind": "logistic", "strengths": [1.0, 0.1]}}
TRAINED = {
    "duration": "2 epochs",
    "batch_size": 12,
    "checkpoint": {"every": "1 steps"},
    "schedule": {"warmup": "0%"},
}
OF_EACH = {"evaluate": {"folds": 2, "every": "1 steps", "choose": "best"}}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return put_garments(tmp_path_factory.mktemp("data"), 60)


@pytest.fixture(scope="module")
def trained(table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return tlscale.run(small_recipe(folder / "r.yaml", table, data=KEYS, **TRAINED, **OF_EACH), folder / "run")


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """Three photos of each patient, and two repeats."""
    folder = tmp_path_factory.mktemp("probed")
    table, keys = put_garments(folder / "data", 60, photos=3), {**KEYS, "group_column": "patient"}
    recipe = small_recipe(folder / "r.yaml", table, data=keys, evaluate={"folds": 2, "repeats": 2}, **PROBE)
    return tlscale.run(recipe, folder / "run")


@pytest.fixture(params=["trained", "probed"])
def figures(request):
    return request.getfixturevalue(request.param)


def answers(folder):
    """The table, and of each answer the probabilities, the labels that it has, and those that it was given."""
    table = pq.read_table(folder / "predictions.parquet")
    shares_NC = 1 / (1 + np.exp(-np.array(table["logits"].to_pylist(), dtype=np.float64)))
    truth_NC, given_NC = (
        np.array([[name in own for name in CLASSES] for own in table[column].to_pylist()])
        for column in ("true_labels", "labels")
    )
    return table, shares_NC, truth_NC, given_NC


def thresholds(folder):
    return json.loads((folder / "model" / "config.json").read_text())["tlscale"]["thresholds"]


def numbers_of(run):
    return sorted((name for name in os.listdir(run.folder / "folds") if name != "all"), key=int)


def test_all_figures_are_scikit_learns_on_the_answers_of_all_folds(figures):
    table, shares_NC, truth_NC, given_NC = answers(figures.folder)
    assert figures["split"] == "folds"
    assert figures["num_images"] == len(set(table["row"].to_pylist())) == 60
    assert figures["mean_average_precision"] == pytest.approx(average_precision_score(truth_NC, shares_NC))
    rows = [figures["per_class"][name] for name in CLASSES]
    assert [row["average_precision"] for row in rows] == pytest.approx(
        average_precision_score(truth_NC, shares_NC, average=None)
    )
    assert [row["f1"] for row in rows] == pytest.approx(f1_score(truth_NC, given_NC, average=None))
    assert figures["macro_f1"] == pytest.approx(f1_score(truth_NC, given_NC, average="macro"))
    assert figures["micro_f1"] == pytest.approx(f1_score(truth_NC, given_NC, average="micro"))
    assert figures["subset_accuracy"] == pytest.approx((truth_NC == given_NC).all(axis=1).mean())
    assert sum(row["num_images"] for row in rows) == truth_NC.sum() * 60 / len(table)
    low, high = figures.interval
    assert low < figures["mean_average_precision"] < high
    assert not set(figures) & {"top1", "majority"}


def test_an_answer_has_the_labels_by_the_thresholds_that_its_fold_chose(figures):
    table, shares_NC, _, given_NC = answers(figures.folder)
    folds_N, chosen = np.array(table["fold"].to_pylist()), {}
    for number in numbers_of(figures):
        chosen[number] = thresholds(figures.folder / "folds" / number)
        here_N = folds_N == int(number)
        assert (given_NC[here_N] == (shares_NC[here_N] >= chosen[number])).all()
        own = result(figures.folder / "folds" / number)
        assert own["selected_on"] is None
        assert [row["threshold"] for row in own["per_class"].values()] == chosen[number]
    assert len({tuple(own) for own in chosen.values()}) > 1
    assert [row["threshold"] for row in figures["per_class"].values()] == [None] * 4
    about = json.loads(table.schema.metadata[b"tlscale"])
    assert (about["task"], "thresholds" in about) == ("multi_label", False)


def test_the_model_of_all_images_has_the_median_of_the_folds_thresholds(figures):
    of_folds = [thresholds(figures.folder / "folds" / number) for number in numbers_of(figures)]
    assert thresholds(figures.folder) == np.median(of_folds, axis=0).tolist()
    assert list(figures["folds"]["thresholds"].values()) == thresholds(figures.folder)
    last = result(figures.folder / "folds" / "all")
    assert (last["split"], last["mean_average_precision"], last["task"]) == (None, None, "multi_label")
    assert_same_bits(exported(figures.folder), exported(figures.folder / "folds" / "all"))
    with pytest.raises(DataError, match="no image left to score it on"):
        tlscale.evaluate(figures.folder)


def test_the_score_of_each_fold_is_told(figures, capsys):
    scores = figures["folds"]["scores"]
    own = [result(figures.folder / "folds" / number)["mean_average_precision"] for number in numbers_of(figures)]
    assert [score["mean_average_precision"] for score in scores] == own
    assert figures["folds"]["mean_average_precision_mean"] == pytest.approx(np.mean(own))
    assert figures["folds"]["mean_average_precision_sd"] == pytest.approx(np.std(own, ddof=1))
    show_result(result(figures.folder), Console(), folder=figures.folder, how_to_load="load()")
    shown = " ".join(capsys.readouterr().out.split())
    assert f"mean of the folds: mAP {np.mean(own):.4f}" in shown
    assert "mAP is of the models of the folds, each on images that it was not fitted to" in shown
    assert "images by models of folds" in repr(figures)


def test_an_interval_of_patients_and_repeats_is_over_patients(probed, trained):
    assert probed["mean_average_precision_interval95_by"] == {"groups": 20}
    assert "mean_average_precision_interval95_by" not in trained
    table = pq.read_table(probed.folder / "predictions.parquet")
    assert len(set(zip(*(table[name].to_pylist() for name in ("group", "repeat", "fold")), strict=True))) == 40
    assert table["row"].to_pylist() == [*range(60)] * 2


def test_stopped_in_a_fold_and_resumed_it_ends_as_one_that_was_not(trained, table, tmp_path):
    recipe, out = small_recipe(tmp_path / "r.yaml", table, data=KEYS, **TRAINED, **OF_EACH), tmp_path / "run"
    with pytest.raises(Stopped), When(logged(out / "folds" / "2", 2), lambda: os.kill(os.getpid(), signal.SIGTERM)):
        tlscale.run(recipe, out)
    tlscale.run(recipe, out, resume=True)
    assert (out / "predictions.parquet").read_bytes() == (trained.folder / "predictions.parquet").read_bytes()
    assert_same_bits(exported(out), exported(trained.folder))
    assert thresholds(out) == thresholds(trained.folder)
    timed = ("wall_s", "seconds", "waiting_s", "images_per_s", "codes")
    same, other = ({k: v for k, v in result(folder).items() if k not in timed} for folder in (out, trained.folder))
    assert same == other


@pytest.mark.slow
@pytest.mark.long  # six starts
def test_killed_again_and_again_it_ends_as_one_that_was_not(forks, table, tmp_path):
    small_recipe(tmp_path / "r.yaml", table, data=KEYS, evaluate={"folds": 2}, **PROBE)
    words = ("run", tmp_path / "r.yaml", "--resume", "--out")
    variables = {"TLSCALE_CACHE": str(tmp_path / "cache")}
    assert forks.run(*words, tmp_path / "whole", log=tmp_path / "log", **variables) == 0, (tmp_path / "log").read_text()
    out = tmp_path / "killed"
    for fault in ("record@2", "export", "result@2", "record", "export", "predictions", "result"):
        ended = forks.run(*words, out, log=tmp_path / "log", TLSCALE_FAULT=fault, **variables)
        assert ended == -signal.SIGKILL, (fault, (tmp_path / "log").read_text()[-3000:])
    assert forks.run(*words, out, log=tmp_path / "log", **variables) == 0, (tmp_path / "log").read_text()
    assert (out / "predictions.parquet").read_bytes() == (tmp_path / "whole" / "predictions.parquet").read_bytes()
    assert_same_bits(exported(out), exported(tmp_path / "whole"))
    assert thresholds(out) == thresholds(tmp_path / "whole")
    assert result(out)["calibration"] == result(tmp_path / "whole")["calibration"]
    assert tlscale.load(out).calibration == tlscale.load(tmp_path / "whole").calibration is not None


def test_the_model_resumed_by_itself_keeps_its_thresholds(probed, tmp_path):
    shutil.copytree(probed.folder / "folds" / "all", tmp_path / "all")
    (tmp_path / "all" / "result.json").unlink()
    shutil.rmtree(tmp_path / "all" / "model")
    tlscale.run(tmp_path / "all" / "recipe.yaml", tmp_path / "all", resume=True)
    assert thresholds(tmp_path / "all") == thresholds(probed.folder)


def test_a_given_test_split_is_scored_once_by_the_model_of_all_images(tmp_path):
    table = put_garments(tmp_path / "data", 60, num_test=20)
    recipe = small_recipe(tmp_path / "r.yaml", table, data=KEYS, evaluate={"folds": 2}, **PROBE)
    figures = tlscale.run(recipe, tmp_path / "run")
    last = result(tmp_path / "run" / "folds" / "all")
    assert (figures["num_images"], figures["test"]["num_images"]) == (40, 20)
    for key in ("mean_average_precision", "mean_average_precision_interval95", "macro_f1"):
        assert figures["test"][key] == last[key]
    again = tlscale.evaluate(tmp_path / "run")
    assert (again["split"], again["num_images"]) == ("test", 20)
    assert again["mean_average_precision"] == pytest.approx(last["mean_average_precision"], abs=0.02)


def test_a_label_of_one_image_is_refused_before_anything_is_written(table, tmp_path):
    lines = table.read_text().splitlines()
    (table.parent / "rare.csv").write_text("\n".join([*lines[:-1], lines[-1] + ";hat"]) + "\n")
    recipe = small_recipe(tmp_path / "r.yaml", table.parent / "rare.csv", data=KEYS, evaluate={"folds": 2}, **PROBE)
    with pytest.raises(DataError, match="is in one of the images alone"):
        tlscale.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


def test_new_writes_folds_and_plan_counts_them(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["new", str(table), "--out", "a.yaml"])
    assert done.exit_code == 0, done.output
    assert "in 5 folds" in done.output
    planned = CliRunner().invoke(main, ["plan", "a.yaml", "--json"])
    assert planned.exit_code == 0, planned.output
    assert json.loads(planned.stdout)["folds"] == {
        "num_folds": 5, "num_repeats": 1, "images": 60, "runs": 6, "most_steps": 0
    }  # fmt: skip
