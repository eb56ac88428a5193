"""Images of other shapes than a square of 8-bit grey or RGB, from files to the exported model and back."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image

import tlscale
from tests.small_runs import result, small_recipe
from tlscale.cli import main
from tlscale.models.exports.check import about

RESNET = {"name": "test_resnet", "weights": "none", "in_chans": 1}
LONG = {"image_size": [16, 48], "crop_mode": "squash"}


def put_long_images(folder, per_class=(12, 6), seed=0):
    """Grey pictures of 20 x 60 pixels with a bright square at one end: the class is which one."""
    draws = np.random.default_rng(seed)
    for split, count in zip(("train", "test"), per_class, strict=True):
        for name, left in (("left", 2), ("right", 46)):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                image_HW = draws.integers(0, 60, (20, 60)).astype(np.uint8)
                image_HW[4:16, left : left + 12] += 180
                Image.fromarray(image_HW).save(folder / split / name / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def long_images(tmp_path_factory):
    return put_long_images(tmp_path_factory.mktemp("long"))


def cli(*words):
    return CliRunner().invoke(main, [*map(str, words)])


def test_long_images_are_trained_on_predicted_and_exported(long_images, tmp_path, monkeypatch):
    monkeypatch.setenv("TLSCALE_CACHE", str(tmp_path / "cache"))
    recipe = small_recipe(
        tmp_path / "recipe.yaml",
        long_images,
        data={"source": "folder", **LONG, "augment": [{"crop": 0.8}]},
        backbone=RESNET,
        freeze=r"(conv1|bn1|layer1)\..*",
        codes={"keep": "always"},
        batch_size=8,
        duration="1 epochs",
    )
    run = tmp_path / "run"
    tlscale.run(recipe, run)
    assert json.loads((run / "run.json").read_text())["input"]["image_size"] == [16, 48]
    assert "16 x 48 px" in cli("codes", "list").output
    model = tlscale.load(run)
    assert "images of 16 x 48 x 1)" in repr(model)
    table = pq.read_table(run / "predictions.parquet")
    made = model.predict(long_images / "test")
    assert made.labels == table["label"].to_pylist()
    figures = tlscale.evaluate(run, data=long_images / "test")
    assert (figures["top1"], figures["num_images"]) == (result(run)["top1"], 12)
    out = tlscale.export(run, to="timm", out=tmp_path / "timm")
    found = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(found)
    assert (config["input_size"], config["crop_mode"]) == ((1, 16, 48), "squash")
    with torch.no_grad():
        transform = timm.data.create_transform(**config, is_training=False)
        pictures = [transform(Image.open(path)) for path in made.paths]
        logits_NC = found(torch.stack(pictures))
    np.testing.assert_allclose(logits_NC.numpy(), np.array(table["logits"].to_pylist()), atol=1e-3)
    assert json.loads(about(model, "1", None)["input"])["size"] == [16, 48]
    resumed = cli("run", tmp_path / "recipe.yaml", "data.image_size=[48, 16]", "--out", run, "--resume")
    assert resumed.exit_code == 2
    assert "data.image_size" in resumed.output + resumed.stderr


BANDS = {"range": [0, 4000], "image_size": [16, 20], "crop_mode": "squash"}


def put_bands(folder, seed=0):
    """Arrays of five channels and 12 bits: the class is which of the last two is bright."""
    draws = np.random.default_rng(seed)
    for split, count in (("train", 10), ("test", 4)):
        for number, name in enumerate(("a", "b")):
            (folder / split / name).mkdir(parents=True)
            for image in range(count):
                bands_HWC = draws.integers(0, 1000, (18, 25, 5)).astype(np.uint16)
                bands_HWC[:, :, 3 + number] += 2500
                np.save(folder / split / name / f"{image}.npy", bands_HWC)
    return folder


def test_bands_of_sixteen_bits_are_trained_on_predicted_and_exported(tmp_path):
    data = put_bands(tmp_path / "data")
    backbone = {"name": "test_resnet", "weights": "none", "in_chans": 5}
    keys = {"source": "folder", **BANDS, "augment": ["crop", "trivialaugment_geometric"], "on_bad_image": "skip"}
    recipe = small_recipe(tmp_path / "recipe.yaml", data, data=keys, backbone=backbone, duration="1 epochs")
    run = tmp_path / "run"
    tlscale.run(recipe, run)
    spec = json.loads((run / "run.json").read_text())["input"]
    assert spec["range"] == [0, 4000]
    assert spec["mean"] == pytest.approx([0.125] * 3 + [0.4375] * 2, abs=0.01)  # measured, and recorded
    assert json.loads((run / "model" / "config.json").read_text())["tlscale"]["format"] == 3
    model = tlscale.load(run)
    assert list(model.input_spec.mean) == spec["mean"]
    made = model.predict(data / "test")
    assert made.labels == pq.read_table(run / "predictions.parquet")["label"].to_pylist()
    arrays = [np.load(path) for path in made.paths]
    for given in (arrays, np.stack(arrays)):
        np.testing.assert_array_equal(model.predict(given).probabilities, made.probabilities)
    one = model.predict(arrays[0].astype(np.float64))
    np.testing.assert_allclose(one.probabilities[0], made.probabilities[0], atol=1e-6)
    assert tlscale.evaluate(run, data=data / "test")["top1"] == result(run)["top1"]
    out = tlscale.export(run, to="timm", out=tmp_path / "timm")
    found = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert next(found.parameters()).shape[1] == 5
