"""Features of any layer: `model.features`, and `tlscale codes RECIPE --out FILE`."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import tlscale
from tests.small_runs import put_small_folder, small_recipe
from tlscale.cli import main
from tlscale.errors import EXIT_BAD_INPUT, DataError, ModelError

pytestmark = pytest.mark.slow  # four runs
RESNET = {"name": "test_resnet"}
RUNS = {
    "probe": {"probe": {"kind": "logistic"}, "backbone": RESNET},
    "early": {
        "probe": {"kind": "ridge"},
        "backbone": RESNET,
        "codes": {"layer": "layer2", "pool": "avgmax", "dtype": "float16"},
        "compute": {"precision": "bf16"},
    },
    "finetune": {"backbone": RESNET, "duration": "2 steps"},
    "mlp": {"head": [{"linear": 16}, "relu", "linear"], "duration": "2 steps"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return put_small_folder(tmp_path_factory.mktemp("data"), train=40, test=20)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Runs a strategy once: its model."""
    folder, models = tmp_path_factory.mktemp("runs"), {}

    def run(name):
        if name not in models:
            recipe = small_recipe(folder / f"{name}.yaml", data, **{**RUNS[name], "data": {"source": "folder"}})
            tlscale.run(recipe, folder / name)
            models[name] = tlscale.load(folder / name)
        return models[name]

    return run


def head_of(model):
    """Of the model itself, or of timm's own, which a linear head is put into."""
    return model.model.head if hasattr(model.model, "head") else model.model.get_classifier()


@pytest.mark.parametrize(("name", "layer", "pool"), [("probe", "penultimate", "avg"), ("early", "layer2", "avgmax")])
def test_features_are_what_the_probe_was_fitted_to(name, layer, pool, trained, data):
    model = trained(name)
    found = model.features(data / "test", layer=layer, pool=pool)
    assert (found.dtype, len(found), list(found.errors)) == (np.float32, 20, [None] * 20)
    table = pq.read_table(model.folder / "predictions.parquet")
    assert found.paths == [str(data / path) for path in table["path"].to_pylist()]
    with torch.no_grad():
        logits_NC = head_of(model)(torch.from_numpy(np.asarray(found)))
    np.testing.assert_array_equal(logits_NC.numpy(), np.array(table["logits"].to_pylist(), np.float32))


@pytest.mark.parametrize("name", ["finetune", "mlp"])
def test_features_of_what_was_trained_are_those_of_its_own_network(name, trained, data):
    model = trained(name)
    paths = sorted(map(str, (data / "test").rglob("*.png")))[:7]
    whole, layer = (model.model, "layer3") if name == "finetune" else (model.model.backbone, "blocks.2")
    taken = []  # of a copy, which has the hooks as well
    with whole.get_submodule(layer).register_forward_hook(lambda _module, _images, value: taken.append(value)):
        made = model.predict(paths)
    (value,) = taken
    pooled = value.mean((2, 3)) if value.ndim == 4 else value[:, 1:].mean(1)  # without the class token
    np.testing.assert_allclose(model.features(paths, layer=layer), pooled.numpy(), rtol=1e-4, atol=1e-5)
    found = model.features(paths)
    np.testing.assert_allclose(model.features(paths, batch_size=2), found, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        probabilities = head_of(model)(torch.from_numpy(np.asarray(found))).softmax(1).numpy()
    np.testing.assert_allclose(probabilities, made.probabilities, atol=1e-5)


def test_images_in_memory_and_unreadable_ones(trained, data, tmp_path):
    model = trained("probe")
    path = str(next((data / "test").rglob("*.png")))
    (tmp_path / "cut.png").write_bytes(Path(path).read_bytes()[:80])
    with Image.open(path) as image:
        found = model.features([path, tmp_path / "cut.png", image, np.asarray(image)], layer="layer3")
    assert [why is None for why in found.errors] == [True, False, True, True]
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_array_equal(found[0], found[3])
    assert found.paths[1] == str(tmp_path / "cut.png")
    assert list((found @ found.T).shape) == [4, 4]
    with pytest.raises(DataError, match="cut.png"):
        model.features(tmp_path / "cut.png")


def test_wrong_layers_are_named_as_in_python(trained, data):
    model = trained("probe")
    with pytest.raises(ModelError, match=r"^layer: .*no layer 'layer9'"):
        model.features(data / "test", layer="layer9")
    with pytest.raises(ModelError, match=r"^pool: there is no 'mean'"):
        model.features(data / "test", pool="mean")
    with pytest.raises(DataError, match=r"^batch_size: 0 is no number"):
        model.features(data / "test", batch_size=0)


# -- tlscale codes RECIPE --out ---------------------------------------------------------------------------------------


def codes(*words):
    return CliRunner().invoke(main, ["codes", *map(str, words)])


def test_codes_of_all_splits_in_a_file(trained, data, tmp_path):
    """What the probe was fitted to, under the names of its images."""
    model = trained("early")
    recipe = model.folder.parent / "early.yaml"
    done = codes(recipe, "--out", tmp_path / "codes.parquet", "codes.layer=[layer2, penultimate]")
    assert done.exit_code == 0, done.output
    table = pq.read_table(tmp_path / "codes.parquet")
    assert table.column_names == ["path", "split", "label", "row", "layer2 avgmax", "penultimate"]
    assert table.schema.field("penultimate").type.list_size == 96
    counts = {name: table["split"].to_pylist().count(name) for name in ("train", "validation", "test")}
    assert counts == {"train": 32, "validation": 8, "test": 20}
    assert table["label"].to_pylist() == [path.split("/")[1] for path in table["path"].to_pylist()]
    found = model.features([data / path for path in table["path"].to_pylist()], layer="layer2", pool="avgmax")
    np.testing.assert_array_equal(np.array(table["layer2 avgmax"].to_pylist(), np.float32), found)
    scored = pq.read_table(model.folder / "predictions.parquet", columns=["path", "row"])
    assert scored.to_pylist() == table.select(["path", "row"]).slice(40).to_pylist()


def test_codes_as_a_matrix_of_a_recipe_that_trains(trained, tmp_path):
    recipe = trained("finetune").folder.parent / "finetune.yaml"
    done = codes(recipe, "--out", tmp_path / "codes.npy")
    assert done.exit_code == 0, done.output
    matrix = np.load(tmp_path / "codes.npy")
    assert (matrix.shape, matrix.dtype) == ((60, 96), np.float32)
    assert np.isfinite(matrix).all()
    assert len(np.unique(matrix, axis=0)) > 50
    with (tmp_path / "codes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["split"] for row in rows] == ["train"] * 32 + ["validation"] * 8 + ["test"] * 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codes.csv", "codes.npy"]


def test_files_that_cannot_be_written_are_refused_before_anything_is_computed(trained, tmp_path):
    recipe = trained("finetune").folder.parent / "finetune.yaml"
    for words, said in [
        (["--out", tmp_path / "codes.txt"], "--out: '.*codes.txt' has no ending"),
        (["--out", tmp_path / "none" / "codes.npy"], "--out: there is no folder"),
        (["--out", tmp_path / "codes.npy", "codes.layer=[layer1, layer2]"], "--out: a .npy file holds codes of one"),
    ]:
        done = codes(recipe, *words)
        assert done.exit_code == EXIT_BAD_INPUT
        assert re.search(said, done.stderr), done.stderr
