"""The temperature of several labels in a run: from validation to the model, to predict and to the result."""

from __future__ import annotations

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

import tlscale
from tests.garments import CLASSES, SEVERAL, put_garments
from tests.small_runs import result, small_recipe
from tlscale.commands.tables import show_result
from tlscale.tracking.console import Console
from tlscale.training.label_set_metrics import label_calibration_error

PROBE = {"backbone": {"name": "test_resnet", "weights": "none"}, "probe": {"kind": "logistic", "strengths": [1e-6]}}
TRAINED = {"freeze": ".*", "backbone": {"name": "test_resnet"}, "duration": "20 epochs", "optim": {"lr": 0.3}}
RUNS = {"probed": {**PROBE, "probe": {**PROBE["probe"], "refit": False}}, "trained": TRAINED, "refitted": PROBE}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, done = tmp_path_factory.mktemp("runs"), {}
    table = put_garments(folder / "data", 150, num_test=50)

    def go(name):
        if name not in done:
            recipe = small_recipe(
                folder / f"{name}.yaml", table, data={**SEVERAL, "validation_fraction": 0.5}, **RUNS[name]
            )
            done[name] = tlscale.run(recipe, folder / name)
        return done[name]

    return go


@pytest.mark.parametrize("name", ["probed", "trained"])
def test_the_temperature_goes_from_validation_to_every_place(name, run, capsys, tmp_path):
    figures = run(name)
    told = figures["calibration"]
    assert told["temperature"] > 1.2 if name == "probed" else told["temperature"] != 1
    counts = json.loads((figures.folder / "run.json").read_text())["data"]["num_images"]
    assert told["num_images"] == counts["validation"]
    config = json.loads((figures.folder / "model" / "config.json").read_text())["tlscale"]
    assert (config["format"], config["calibration"]["temperature"]) == (4, told["temperature"])
    table = pq.read_table(figures.folder / "predictions.parquet")
    about = json.loads(table.schema.metadata[b"tlscale"])
    assert about["calibration"] == config["calibration"]
    # What people get has the temperature, and the labels are those of the file, whose thresholds are without.
    logits_NC = np.array(table["logits"].to_pylist())
    shares_NC = 1 / (1 + np.exp(-logits_NC / told["temperature"]))
    paths = [str(figures.folder.parent / "data" / path) for path in table["path"].to_pylist()]
    made = tlscale.load(figures.folder).predict(paths)
    np.testing.assert_allclose(made.probabilities, shares_NC, rtol=1e-4)
    assert made.labels == [tuple(own) for own in table["labels"].to_pylist()]
    assert made.sets is None
    tlscale.predict(figures.folder, paths[:3], tmp_path / "p.csv")
    with (tmp_path / "p.csv").open() as file:
        (first, *_) = csv.DictReader(file)
    assert float(first[f"p_{CLASSES[0]}"]) == pytest.approx(shares_NC[0, 0], rel=1e-4)
    truth_NC = np.array([[name in own for name in CLASSES] for own in table["true_labels"].to_pylist()])
    assert told["ece"] == pytest.approx(label_calibration_error(shares_NC, truth_NC), rel=1e-5)
    assert figures["ece"] == pytest.approx(label_calibration_error(1 / (1 + np.exp(-logits_NC)), truth_NC), rel=1e-5)
    if name == "probed":  # it was too sure
        assert told["loss"] < figures["loss"]
    assert "sets" not in told
    show_result(result(figures.folder), Console(), folder=figures.folder, how_to_load="load()")
    assert f"with temperature {told['temperature']:.3g}, chosen by" in " ".join(capsys.readouterr().out.split())
    again = tlscale.evaluate(figures.folder)
    assert again["calibration"]["ece"] == pytest.approx(told["ece"], abs=1e-4)


def test_a_probe_that_is_fitted_to_the_validation_images_has_none(run):
    told = run("refitted")["calibration"]
    assert told["temperature"] is None
    assert "fitted to the validation images, too" in told["why"]
    config = json.loads((run("refitted").folder / "model" / "config.json").read_text())["tlscale"]
    assert (config["format"], "calibration" in config) == (3, False)


def test_the_images_that_chose_it_do_not_judge_it(run):
    found = tlscale.evaluate(run("probed").folder, split="validation")
    assert found["calibration"] == {
        "temperature": run("probed")["calibration"]["temperature"],
        "loss": None,
        "ece": None,
    }
