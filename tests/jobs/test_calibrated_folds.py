"""The temperature of a cross-validation's model: chosen by the answers of the folds, and carried to every place."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import tlscale
from tests.coins import put_coins
from tests.garments import SEVERAL, put_garments
from tests.small_runs import When, result, small_recipe
from tlscale.commands.tables import show_result
from tlscale.errors import Stopped
from tlscale.tracking.console import Console
from tlscale.training.fold_calibration import choose_by_folds, crosswise_figures

RESNET = {"name": "test_resnet", "weights": "none"}
RUNS = {
    "trained": {"duration": "6 epochs", "batch_size": 12, "optim": {"lr": 2e-2}, "evaluate": {"folds": 2}},
    "probed": {
        "backbone": RESNET,
        "probe": {"kind": "logistic", "strengths": [1e-4]},
        "evaluate": {"folds": 2, "repeats": 2},
    },
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Labels drawn at random, so that every network is too sure: of one label, or of several with three photos each."""
    folder, done = tmp_path_factory.mktemp("runs"), {}
    images = put_coins(folder / "images.parquet", {"train": 48, "test": 20}, classes=tuple("abcd"))
    garments = put_garments(folder / "garments", 60, photos=3)

    def go(name):
        if name not in done:
            kind, _, several = name.partition(", ")
            data = {"source": "manifest", "path": str(images), "validation_fraction": 0.2}
            if several:
                data = {**SEVERAL, "path": str(garments), "validation_fraction": 0.3, "group_column": "patient"}
            recipe = small_recipe(folder / f"{name}.yaml", images, data=data, **RUNS[kind])
            done[name] = tlscale.run(recipe, folder / name)
        return done[name]

    return go


def config_of(out):
    return json.loads((out / "model" / "config.json").read_text())["tlscale"]


@pytest.mark.parametrize("name", ["trained", "probed", "trained, several", "probed, several"])
def test_it_goes_from_the_folds_to_every_place(name, run, tmp_path):
    figures, out = run(name), run(name).folder
    told, table = figures["calibration"], pq.read_table(out / "predictions.parquet")
    chosen = choose_by_folds(table)
    assert chosen.temperature != 1 or name == "trained, several"  # by 20 patients
    assert config_of(out)["calibration"] == chosen.model_dump()
    assert config_of(out)["format"] == (4 if "several" in name else 3)
    assert chosen.num_images == told["num_images"] == (60 if "several" in name else 48)
    assert json.loads((out / "folds" / "all" / "run.json").read_text())["fold"]["calibration"] == chosen.model_dump()
    # The figures are of what the other folds chose, for each.
    crosswise = crosswise_figures(table)
    assert (told["temperature"], told["also_chose"]) == (chosen.temperature, False)
    assert (told["loss"], told["ece"]) == (crosswise["loss"], crosswise["ece"])
    assert told["loss"] < figures["loss"] or name == "trained, several"
    if "several" not in name:
        assert told["sets"] == {"level": 0.9, "threshold": chosen.sets.threshold, **crosswise["sets"]}
    # Predict and exports have it.
    trained = tlscale.load(out)
    assert trained.calibration == chosen
    tlscale.export(out, to="timm", out=tmp_path / "elsewhere")
    assert tlscale.load(tmp_path / "elsewhere").calibration == chosen


@pytest.mark.parametrize("name", ["trained", "probed"])
def test_predict_gives_probabilities_with_it_and_a_test_split_judges_it(name, run):
    out = run(name).folder
    table = pq.read_table(out / "folds" / "all" / "predictions.parquet")
    chosen = tlscale.load(out).calibration
    logits_NC = torch.tensor(table["logits"].to_pylist())
    np.testing.assert_array_equal(
        table["calibrated_probability"].to_numpy(), chosen.probabilities(logits_NC).amax(1).numpy()
    )
    told, last = run(name)["test"]["calibration"], result(out / "folds" / "all")
    assert told == last["calibration"]
    assert told["temperature"] == chosen.temperature
    true_N = [sorted(set("abcd")).index(label) for label in table["true_label"].to_pylist()]
    loss = torch.nn.functional.cross_entropy(logits_NC.double() / chosen.temperature, torch.tensor(true_N))
    assert told["loss"] == pytest.approx(float(loss))
    assert told["sets"]["coverage"] is not None
    again = tlscale.evaluate(out)["calibration"]
    assert again["temperature"] == chosen.temperature
    assert again["loss"] == pytest.approx(told["loss"], abs=1e-5)


def test_the_screen_tells_by_what_it_was_chosen(run, capsys):
    out = run("trained").folder
    capsys.readouterr()
    show_result(result(out), Console(), folder=out, how_to_load="load()")
    shown = " ".join(capsys.readouterr().out.split())
    assert "chosen by 48 images of the folds, each of which is scored with that of the others" in shown


@pytest.mark.parametrize("name", ["trained", "probed, several"])
def test_resumed_it_is_the_same_and_what_an_older_version_began_has_none(name, run, tmp_path):
    out = shutil.copytree(run(name).folder, tmp_path / "run")
    recipe, before = out / "recipe.yaml", result(out)["calibration"]

    def undo():
        (out / "result.json").unlink()
        shutil.rmtree(out / "model")
        shutil.rmtree(out / "folds" / "all" / "model")

    undo()
    (out / "folds" / "all" / "result.json").unlink()
    assert tlscale.run(recipe, out, resume=True)["calibration"] == before
    assert config_of(out)["calibration"]["temperature"] == before["temperature"]
    # As an older version left it, in the midst of the model of all images.
    undo()
    (out / "folds" / "all" / "result.json").unlink()
    run_json = out / "folds" / "all" / "run.json"
    about = json.loads(run_json.read_text())
    del about["fold"]["calibration"]
    run_json.write_text(json.dumps(about))
    older = {"temperature": None, "why": "the model was fitted to all images of the folds"}
    assert tlscale.run(recipe, out, resume=True)["calibration"] == older
    assert "calibration" not in config_of(out)
    # And where that was complete.
    undo()
    assert tlscale.run(recipe, out, resume=True)["calibration"] == older


def test_a_model_resumed_by_itself_keeps_it(run, tmp_path):
    recipe, out = run("trained").folder / "recipe.yaml", tmp_path / "run"
    at_once = config_of(run("trained").folder)["calibration"]
    begun = out / "folds" / "all" / "run.json"
    with pytest.raises(Stopped), When(begun.exists, lambda: (out / "STOP").touch()):
        tlscale.run(recipe, out)
    tlscale.run(out / "folds" / "all" / "recipe.yaml", out / "folds" / "all", resume=True)
    assert config_of(out / "folds" / "all")["calibration"] == at_once
