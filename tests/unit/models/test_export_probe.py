"""The model of a probe as files: codes of any layer and what was fitted on them come back as one classifier."""

import json
import os

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from tests.small_models import noise, section, state_of
from tlscale.data.input_spec import InputSpec
from tlscale.errors import ModelError, RunFolderError
from tlscale.models import export as export_module
from tlscale.models.backbone import build_backbone
from tlscale.models.classifier import CodesClassifier
from tlscale.models.export import export_model, load
from tlscale.models.features import LayerCodes
from tlscale.models.heads import build_head
from tlscale.models.knn import KnnHead

CLASSES = ("ankle boot", "bag", "coat", "dress", "pullover")


def export(network, folder, head=("linear",)):
    spec = InputSpec(32, 3, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.9)
    return export_model(network, folder, head=head, classes=CLASSES, spec=spec)


def logits_of(network, images):
    with torch.inference_mode():
        return network.eval()(images)


def from_timm(folder, **keys):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **keys)


def probe(name, layer, pool, head="linear", image_size=32, **keys) -> CodesClassifier:
    """A head that was fitted on codes, without the fitting."""
    backbone, _ = build_backbone(section(name, **keys), image_size=image_size, seed=0)
    codes = LayerCodes(backbone, [(layer, pool)])
    with torch.no_grad():
        (known,) = codes(noise(1, count=12, image_size=image_size))
    torch.manual_seed(1)
    if head == "linear":
        return CodesClassifier(codes, nn.Linear(known.shape[1], len(CLASSES)))
    labels = torch.arange(12) % len(CLASSES)
    mean, std = known.mean(0), known.std(0).clamp(min=1e-6)
    state = {
        "codes_ND": nn.functional.normalize((known - mean) / std),
        "labels_N": labels,
        "mean_D": mean,
        "std_D": std,
    }
    return CodesClassifier(codes, KnnHead(state, head, len(CLASSES)))


@pytest.mark.slow
@pytest.mark.parametrize("head", ["linear", 1, 5])
@pytest.mark.parametrize(
    ("name", "layer", "pool"),
    [
        ("test_resnet", "layer2", "avg"),
        ("test_resnet", "layer3.0.conv1", "avgmax"),
        ("test_resnet", "act1", "none"),
        ("test_vit", "blocks.1", "token"),
        ("test_vit", "blocks.1", "avg"),
        ("test_mambaout", "stages.1", "max"),
    ],
)
def test_a_probe_of_any_layer(name, layer, pool, head, tmp_path):
    network = probe(name, layer, pool, head)
    assert export(network, tmp_path / "model") == f"tlscale.load('{tmp_path}/model')"
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "head.safetensors", "model.safetensors"]
    config = json.loads((tmp_path / "model" / "config.json").read_text())["tlscale"]
    assert (config["format"], config["layer"], config["pool"]) == (2, layer, pool)
    assert config["head"] == (["linear"] if head == "linear" else {"knn": {"k": head}})
    trained = load(tmp_path)
    assert not any(module.training for module in trained.model.modules())
    for images in (noise(1, count=12), noise(7)):
        torch.testing.assert_close(logits_of(trained.model, images), logits_of(network, images))
    features = logits_of(from_timm(tmp_path / "model", num_classes=0), noise())  # the whole backbone is there
    torch.testing.assert_close(features, logits_of(network.backbone, noise()))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "mobilenetv3_small_050"])
def test_a_linear_probe_on_penultimate_codes_is_timms_own_model(name, tmp_path):
    network = probe(name, "penultimate", "avg")
    assert "timm.create_model" in export(network, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tlscale"]["format"] == 1  # nothing new in it
    for model in (from_timm(tmp_path), load(tmp_path).model):
        torch.testing.assert_close(logits_of(model, noise(7)), logits_of(network, noise(7)), rtol=1e-5, atol=1e-5)


def test_neighbours_of_penultimate_codes(tmp_path):
    network = probe("test_vit", "penultimate", "avg", 3)
    export(network, tmp_path)
    trained = load(tmp_path)
    assert trained.classes == CLASSES
    assert torch.equal(logits_of(trained.model, noise(7)), logits_of(network, noise(7)))
    nearest = logits_of(probe("test_vit", "penultimate", "avg", 1), noise(1, count=12)).argmax(1)
    assert torch.equal(nearest, torch.arange(12) % len(CLASSES))  # each known image is nearest to itself


LAYERS = [{"linear": 7}, "relu", "layernorm", {"dropout": 0.3}, "batchnorm", "linear"]


def test_an_mlp_on_early_codes(tmp_path):
    network = probe("test_resnet", "layer2", "avg")
    head = build_head(LAYERS, in_features=48, num_classes=len(CLASSES), seed=0)
    network = CodesClassifier(network.codes, head.eval())
    export(network, tmp_path, LAYERS)
    torch.testing.assert_close(logits_of(load(tmp_path).model, noise(7)), logits_of(network, noise(7)))


def test_exporting_a_probe_leaves_it_as_it_is(tmp_path):
    network = probe("test_resnet", "layer2", "avg", 3).double()
    before, loaded_before = state_of(network), logits_of(network, noise().double())
    export(network, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert load(tmp_path).model.double()(noise().double()).shape == loaded_before.shape
    assert torch.equal(logits_of(network, noise().double()), loaded_before)


@pytest.mark.parametrize("head", ["linear", 3])
@pytest.mark.parametrize("file", ["model", "head"])
def test_what_a_probe_wrote_is_checked(file, head, tmp_path, monkeypatch):
    write = export_module._write_tensors

    def write_changed(state, path):
        shift = 0.1 if path.stem == file else 0
        write({name: t + shift if t.is_floating_point() else t for name, t in state.items()}, path)

    monkeypatch.setattr(export_module, "_write_tensors", write_changed)
    with pytest.raises(ModelError, match="gives other logits than the run"):
        export(probe("test_resnet", "layer2", "avg", head), tmp_path)


@pytest.mark.parametrize(("key", "value"), [("layer", "layer9"), ("pool", "token"), ("layer", "layer3")])
def test_a_probe_whose_configuration_does_not_fit(key, value, tmp_path):
    export(probe("test_resnet", "layer2", "avg", 3), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["tlscale"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunFolderError, match="the model in '.*' cannot be loaded"):
        load(tmp_path)


def test_neighbours_that_are_missing(tmp_path):
    export(probe("test_resnet", "layer2", "avg", 3), tmp_path)
    safetensors.torch.save_file({"mean_D": torch.zeros(48)}, tmp_path / "head.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tlscale"]["sha256"]  # which would tell first that it is another file
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunFolderError, match="cannot be loaded: probe: the nearest neighbours lack their codes_ND"):
        load(tmp_path)
