"""What validation images choose for predictions: a temperature, sets, and what is unknown; and what that is worth."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import tlscale
from tests.recompute import assert_follows
from tests.small_runs import put_small_folder, result, run_once
from tlscale.commands.evaluate import evaluate_run
from tlscale.models import model_folder
from tlscale.training.prediction_figures import UNKNOWN_FIGURES

TRAINED = {"freeze": ".*", "backbone": {"name": "test_resnet"}, "duration": "20 epochs", "optim": {"lr": 0.3}}
RUNS = {
    "trained": TRAINED,
    "probe": {"probe": {"kind": "ridge", "refit": False}},
    "no test split": TRAINED,
    "no validation": TRAINED,
    "refitted": {"probe": {"kind": "ridge"}, "backbone": {"name": "test_resnet"}},
    "layer": {
        "probe": {"kind": "ridge"},
        "backbone": {"name": "test_resnet"},
        "codes": {"layer": "layer2", "pool": "avg"},
    },
    "half": {**TRAINED, "freeze": r"(conv1|bn1|layer[12])\..*", "codes": {"keep": "always"}},
    "whole": {"duration": "1 epochs"},
    "too sure": {"duration": "60 epochs", "optim": {"lr": 5e-3}, "evaluate": {"every": "60 epochs"}},
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
    assert (config_of(out)["format"], told["num_images"]) == (5 if name == "probe" else 3, 24)
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
    figures = result(run("too sure"))
    assert figures["calibration"]["temperature"] > 1.1
    assert figures["calibration"]["loss"] < figures["loss"]


def test_images_that_chose_it_do_not_say_what_it_is_worth(run):
    figures = result(run("no test split"))
    assert figures["split"] == "validation"
    told = figures["calibration"]
    assert told["temperature"] > 0
    assert told["also_chose"]
    assert told["loss"] is told["ece"] is told["ece_interval95"] is None


@pytest.mark.parametrize(("split", "key"), [("validation", "num_selected_on"), ("train", "num_trained_on")])
def test_copies_of_images_that_had_a_part_do_not_say_it_either(split, key, run, tmp_path, capsys):
    """Under other names in other folders, among images that are new."""
    out = run("trained")
    data = out.parent / "data"
    own = tlscale.evaluate(out, split=split, out=tmp_path / "own").folder / "predictions.parquet"
    paths = pq.read_table(own)["path"].to_pylist()[:20]
    for number, place in enumerate([*(data / path for path in paths), *(data / "test").rglob("*.png")]):
        copy = tmp_path / "new" / place.parent.name / f"{number}.png"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(place, copy)
    new = tlscale.evaluate(out, data=str(tmp_path / "new"))
    assert (new["num_images"], new[key]) == (20 + 40, 20)
    temperature = result(out)["calibration"]["temperature"]
    assert new["calibration"] == {"temperature": temperature, **UNKNOWN_FIGURES}
    assert "too good by those, and none are given with the temperature" in new["notes"][-1]
    assert "60 images of new (too good: some of them had a part in the model): top1" in " ".join(
        capsys.readouterr().out.split()
    )
    for number in range(20):
        next((tmp_path / "new").glob(f"*/{number}.png")).unlink()
    assert tlscale.evaluate(out, data=str(tmp_path / "new"))["calibration"]["loss"] is not None


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
    assert "calibrated_probability" not in pq.read_schema(out / "predictions.parquet").names
    assert "not calibrated: " in " ".join(capsys.readouterr().out.split())


# -- what is unknown --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["refitted", "trained", pytest.param("half", marks=pytest.mark.slow)])
def test_predict_tells_what_is_unlike_the_training_images(name, run, tmp_path, capsys):
    out = run(name)
    told = result(out)["unknown"]
    assert told.items() >= config_of(out)["unknown"].items()
    assert told["bytes"] < (out / "model" / "unknown.safetensors").stat().st_size < told["bytes"] + 500
    noise = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    for number, image in enumerate(noise):
        Image.fromarray(image).save(tmp_path / f"noise{number}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    test = out.parent / "data" / "test"
    model = tlscale.load(out)
    made = model.predict([test, tmp_path])
    assert made.unknown[-4:] == [None, True, True, True]
    # The way of predict gives the scores of the run.
    assert 1 - np.mean(made.unknown[:-4]) == pytest.approx(told["known"])
    capsys.readouterr()
    tlscale.predict(out, [test, tmp_path], tmp_path / "rows.csv")
    rows = list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))
    names = {True: "true", False: "false", None: ""}
    assert [row["unknown"] for row in rows] == [names[one] for one in made.unknown]
    assert f", {made.unknown.count(True)} unlike anything trained on (column unknown)" in capsys.readouterr().err
    tlscale.predict(out, test, tmp_path / "rows.parquet")
    assert pq.read_table(tmp_path / "rows.parquet")["unknown"].to_pylist() == made.unknown[:-4]


def test_without_frozen_codes_or_validation_images_it_says_why_not(run):
    assert result(run("whole"))["unknown"] == {"threshold": None, "why": "there are no cached codes of a frozen part"}
    assert result(run("no validation"))["unknown"]["why"] == "there is no validation split"
    for name in ("whole", "no validation"):
        assert "unknown" not in config_of(run(name))
        made = tlscale.load(run(name)).predict(run(name).parent / "data" / "test" / "Bag")
        assert made.unknown is None
        assert "unknown" not in list(made.to_pandas())


def test_a_file_that_tells_what_is_unknown_is_checked_and_goes_along(run, tmp_path):
    out = run("refitted")
    tlscale.export(out, to="timm", out=tmp_path / "elsewhere")
    assert tlscale.load(tmp_path / "elsewhere").unknown.settings == tlscale.load(out).unknown.settings
    path = tmp_path / "elsewhere" / "unknown.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(tlscale.TlscaleError, match=r"unknown\.safetensors' is not the file that was exported"):
        tlscale.load(tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["refitted", "layer", "trained"])
def test_a_folder_without_its_run_tells_it_or_says_that_it_does_not(name, run, tmp_path, capsys):
    """The model's folder in the run has the run; an export has it of probes alone, and else says so, too."""
    out, images = run(name), run(name).parent / "data" / "test"
    expected = tlscale.load(out).predict(images)
    assert expected.unknown is not None
    inside = tlscale.load(out / "model").predict(images)
    assert inside.unknown == expected.unknown
    np.testing.assert_array_equal(inside.probabilities, expected.probabilities)
    tlscale.export(out, to="timm", out=tmp_path / "elsewhere")
    noted = "which the exported folder does not tell" in capsys.readouterr().err
    alone = tlscale.load(tmp_path / "elsewhere").predict(images)
    said = "the model's score of unknown images is not computed" in capsys.readouterr().err
    tlscale.predict(tmp_path / "elsewhere", images, tmp_path / "rows.csv")
    said_again = "the model's score of unknown images is not computed" in capsys.readouterr().err
    has_column = "unknown" in (tmp_path / "rows.csv").read_text().splitlines()[0].split(",")
    if name == "trained":
        assert (alone.unknown, has_column, noted, said, said_again) == (None, False, True, True, True)
    else:
        assert (alone.unknown, has_column) == (expected.unknown, True)
        assert (noted, said, said_again) == (False, False, False)


def test_an_older_version_refuses_what_tells_the_layer(run, monkeypatch):
    assert config_of(run("refitted"))["unknown"]["layer"] == "penultimate"
    monkeypatch.setattr(model_folder, "FORMAT", 4)
    with pytest.raises(tlscale.TlscaleError, match="has format 5, this tlscale reads up to 4"):
        tlscale.load(run("refitted"))


@pytest.mark.slow  # exporters take seconds
def test_an_exported_network_says_that_it_does_not_tell_what_is_unknown(run, tmp_path, capsys):
    import onnx

    tlscale.export(run("refitted"), to="onnx", out=tmp_path / "onnx")
    props = {prop.key: json.loads(prop.value) for prop in onnx.load(tmp_path / "onnx" / "model.onnx").metadata_props}
    own = config_of(run("refitted"))["unknown"]
    assert props["unknown"].items() >= {**own, "computed": False}.items()
    assert "unknown.safetensors" in props["unknown"]["note"]
    assert "does not compute the score of unknown images" in capsys.readouterr().err


def test_the_card_tells_how_images_are_read_and_which_probabilities_its_figures_are_of(run, tmp_path):
    out = run("too sure")
    tlscale.export(out, to="hub", out=tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text().split("## Recipe")[0]
    figures, model = result(out), tlscale.load(out)
    assert "crop_mode center, crop_pct" in card
    assert f"range 0 to 255 is scaled to 0..1, then mean {model.input_spec.mean[0]:.6g}" in card
    assert f"calibration error of the uncalibrated probabilities (softmax of the logits): {figures['ece']:.4f}" in card
    told = figures["calibration"]
    assert f"calibration error with the temperature: {told['ece']:.4f}" in card
    assert f"- temperature {model.calibration.temperature:.6g}, chosen by {told['num_images']} images" in card
    assert f"a calibrated probability of {model.calibration.sets.threshold:.6g} or more" in card
    assert f"of the scored images {told['sets']['coverage']:.4f} were" in card
    assert "calibration error 0." not in card
