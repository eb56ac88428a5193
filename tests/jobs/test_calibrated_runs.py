"""Probabilities that validation images chose a temperature for: where they stand, and what they are worth."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

import tlscale
from tests.recompute import assert_follows
from tests.small_runs import put_small_folder, result, run_once
from tlscale.commands.evaluate import evaluate_run

TRAINED = {"freeze": ".*", "backbone": {"name": "test_resnet"}, "duration": "4 epochs", "optim": {"lr": 0.3}}
RUNS = {
    "trained": TRAINED,
    "probe": {"probe": {"kind": "ridge", "refit": False}},
    "no test split": TRAINED,
    "no validation": TRAINED,
    "refitted": {"probe": {"kind": "ridge"}},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    data = put_small_folder(folder / "data", train=120, test=40)

    def go(name):
        changes = {**RUNS[name], "data": {"image_size": 32}}
        if name == "no validation":
            changes["data"]["validation_fraction"] = 0.0
        return run_once(folder, data / "train" if name == "no test split" else data, name, changes)

    return go


def config_of(out):
    return json.loads((out / "model" / "config.json").read_text())["tlscale"]


@pytest.mark.parametrize("name", ["trained", "probe"])
def test_the_temperature_goes_from_validation_to_every_place(name, run, capsys):
    out = run(name)
    told = result(out)["calibration"]
    assert told["temperature"] != 1
    chosen = config_of(out)["calibration"]
    assert (chosen["temperature"], chosen["num_images"]) == (told["temperature"], told["num_images"])
    assert chosen["sets"].items() < told["sets"].items()
    assert (config_of(out)["format"], told["num_images"]) == (3, 24)
    table = pq.read_table(out / "predictions.parquet")
    assert json.loads(table.schema.metadata[b"tlscale"])["calibration"] == chosen
    made = tlscale.load(out).predict(out.parent / "data" / "test")
    calibrated_N = table["calibrated_probability"].to_numpy()
    np.testing.assert_array_equal(made.probabilities.max(1), calibrated_N.astype(np.float32))
    assert made.labels == table["label"].to_pylist()
    assert not np.allclose(calibrated_N, table["probability"].to_numpy(), atol=1e-3)
    covered = [true in some for true, some in zip(table["true_label"].to_pylist(), made.sets, strict=True)]
    assert told["sets"]["coverage"] == pytest.approx(np.mean(covered))
    assert [some[0] for some in made.sets] == made.labels
    # The run's own figures are of its logits, and those of the temperature follow from the file.
    assert_follows(result(out), out / "predictions.parquet", rel=1e-5)
    again = evaluate_run(out)["calibration"]
    assert again["temperature"] == told["temperature"]
    assert again["sets"].items() < told["sets"].items()
    assert [again[key] for key in ("loss", "ece")] == pytest.approx([told["loss"], told["ece"]], abs=1e-6)


def test_it_lowers_the_error_of_one_that_is_too_sure(run):
    figures = result(run("trained"))
    assert figures["calibration"]["temperature"] > 1.1
    assert figures["calibration"]["loss"] < figures["loss"]


def test_images_that_chose_it_do_not_say_what_it_is_worth(run):
    figures = result(run("no test split"))
    assert figures["split"] == "validation"
    told = figures["calibration"]
    assert told["temperature"] > 0
    assert told["also_chose"]
    assert told["loss"] is told["ece"] is told["ece_interval95"] is None


@pytest.mark.parametrize(
    ("name", "why"),
    [("no validation", "there is no validation split"), ("refitted", "fitted to the validation images")],
)
def test_without_images_that_were_not_fitted_none_is_chosen(name, why, run, capsys):
    out = run(name)
    told = result(out)["calibration"]
    assert told["temperature"] is None
    assert why in told["why"]
    assert "calibration" not in config_of(out)
    assert config_of(out)["format"] < 3
    assert "calibrated_probability" not in pq.read_schema(out / "predictions.parquet").names
    assert "not calibrated: " in " ".join(capsys.readouterr().out.split())
