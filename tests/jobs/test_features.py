"""Features of any layer: `model.features`, and `tlscale codes RECIPE --out FILE`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import tlscale
from tests.small_runs import put_small_folder, small_recipe
from tlscale.errors import DataError, ModelError

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
